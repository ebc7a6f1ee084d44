#!/usr/bin/env bash
# Traces the system calls of the monitor while tests run, and holds them against resources/seccomp/x86_64.json: fails on
# calls that the filter of their thread lacks, and on rules that nothing used. Needs strace. Guest tests run in the lab,
# one after the other, as tracing makes them some times slower: all of them take hours.
#
# usage: coverage.sh [--some] [--add] [TEST_PROGRAM...]
#   TEST_PROGRAM  paths of built test programs (default: all of tests/tests)
#   --some        not all features are tested: rules that nothing used are shown and are no failure
#   --add         what earlier runs have traced counts too, so that the tests can be run in parts
# environment: MAYFLY_BIN  the binary (default: the release build)
#              FILTERS     parts of the names of the tests to run, with blanks between (default: all)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly RULES=resources/seccomp/x86_64.json
traces=$PWD/build/seccomp
binary=$(readlink -f "${MAYFLY_BIN:-target/x86_64-unknown-linux-gnu/release/mayfly}")

fail() { echo "coverage: $*" >&2 && exit 1; }

# run PROGRAM...: runs test programs whose monitors are traced.
run() {
    local program filters
    read -ra filters <<<"${FILTERS:-}"
    for program in "$@"; do
        MAYFLY_BIN=$traces/mayfly "$program" --test-threads 1 "${filters[@]}" || echo "coverage: ${program##*/} has failed" >&2
    done
}

main() {
    local all=(--all-used) add='' here=() guests=() program
    while [[ ${1:-} == -* ]]; do
        case $1 in
            --run) run "${@:2}" && exit ;;
            --some) all=() ;;
            --add) add=yes ;;
            *) fail "unknown option $1" ;;
        esac
        shift
    done
    command -v strace >/dev/null || fail "there is no strace: install the package strace"
    [[ -x $binary ]] || fail "no binary $binary: run make build"
    if (($# == 0)); then
        mapfile -t programs < <(cargo test -p mayfly-tests --tests --no-run --locked --message-format=json-render-diagnostics |
            sed -n 's/.*"kind":\["test"\].*"executable":"\([^"]*\)".*/\1/p')
        set -- "${programs[@]}"
    fi
    for program in "$@"; do
        # In a jail there is nothing to trace with.
        [[ ${program##*/} != *_jailer* ]] || continue
        if [[ ${program##*/} == guest_* ]]; then guests+=("$program"); else here+=("$program"); fi
    done
    [[ $add ]] || rm -rf "$traces"
    # Some monitors are another user's.
    mkdir -p "$traces/out" && chmod 1777 "$traces/out"
    # -D: the monitor stays the child of the test, which measures and signals it.
    cat >"$traces/mayfly" <<END
#!/bin/sh
exec strace -D -f -qq -n -Y -X raw -e raw=all -e signal=none -o "$traces/out/\$\$-\$(basename "\$PWD")" "$binary" "\$@"
END
    chmod +x "$traces/mayfly"
    ((${#here[@]} == 0)) || run "${here[@]}"
    # A test that fails, or a lab that dies, may leave rules unused, which is then told.
    for program in "${guests[@]}"; do
        tests/lab/lab.sh --share-out "$traces/out" --timeout 0 -- \
            env FILTERS="${FILTERS:-}" tests/seccomp/coverage.sh --run "$program" ||
            echo "coverage: the lab of ${program##*/} has failed" >&2
    done
    cargo run -q -p mayfly-tests --bin filter_coverage --locked -- "${all[@]}" "$RULES" "$traces"/out/*
}

main "$@"

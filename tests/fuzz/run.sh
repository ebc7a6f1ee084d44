#!/usr/bin/env bash
# Fuzzes the targets of tests/fuzz, two at a time, each for SECONDS, and prints how many inputs each has tried. Stops with
# the report of the first finding; the input that made it is kept in tests/fuzz/artifacts.
#
# usage: run.sh SECONDS [TARGET...]   (default: all of them; see fuzz_targets)
# What is learned stays in tests/fuzz/corpus, so that the next run goes on from there; seeds/ is the beginning.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# shellcheck disable=SC2034 # lib.sh reports under this name
readonly PROGRAM=fuzz
# shellcheck source=resources/guest/lib.sh
. resources/guest/lib.sh

readonly CARGO_FUZZ_VERSION=0.13.1
readonly HERE=tests/fuzz LOGS=build/fuzz
readonly TRIPLE=x86_64-unknown-linux-gnu

# The compiler that can instrument code for the fuzzer, and the fuzzer's front end.
require_fuzzer() {
    cargo +nightly --version >/dev/null 2>&1 ||
        die "no nightly Rust toolchain: rustup toolchain install nightly --profile minimal"
    require_tools c++:g++
    [[ $(cargo fuzz --version 2>/dev/null) != "cargo-fuzz $CARGO_FUZZ_VERSION" ]] || return 0
    say "installing cargo-fuzz $CARGO_FUZZ_VERSION"
    cargo install --quiet --locked --version "$CARGO_FUZZ_VERSION" cargo-fuzz
}

# fuzz TARGET: the program is run as cargo fuzz would, but needs no build lock, so that targets run side by side.
# Inputs are long from the start: left to itself, the fuzzer has a few steps in each for the first minutes.
fuzz() {
    local seeds=()
    mkdir -p "$HERE/corpus/$1" "$HERE/artifacts/$1"
    [[ ! -d $HERE/seeds/$1 ]] || seeds=("$HERE/seeds/$1")
    if ! "$HERE/target/$TRIPLE/release/$1" -artifact_prefix="$HERE/artifacts/$1/" -max_total_time="$seconds" \
        -timeout=10 -len_control=0 -print_final_stats=1 "$HERE/corpus/$1" "${seeds[@]}" >"$LOGS/$1.log" 2>&1; then
        tail -n 40 "$LOGS/$1.log" >&2
        say "$1: FINDING (see $LOGS/$1.log)"
        return 1
    fi
    say "$1: no finding in $seconds s and $(sed -n 's/^stat::number_of_executed_units: *//p' "$LOGS/$1.log") runs"
}

main() {
    (($#)) || die "usage: run.sh SECONDS [TARGET...]"
    local seconds=$1 targets=("${@:2}") target running=0
    ((${#targets[@]})) || mapfile -t targets < <(sed -n 's/^name = "\([a-z0-9_]*\)"$/\1/p' "$HERE/Cargo.toml")
    require_fuzzer
    mkdir -p "$LOGS"
    say "building the fuzz targets"
    cargo +nightly fuzz build --fuzz-dir "$HERE" --target "$TRIPLE"
    trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
    for target in "${targets[@]}"; do
        if ((running == 2)); then
            wait -n
            running=$((running - 1))
        fi
        fuzz "$target" &
        running=$((running + 1))
    done
    while ((running)); do
        wait -n
        running=$((running - 1))
    done
}

main "$@"

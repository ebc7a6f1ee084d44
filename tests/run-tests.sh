#!/usr/bin/env bash
# `make test`: unit tests anywhere, life-cycle tests (tests/tests/*.rs) on any /dev/kvm, and guest tests
# (tests/tests/guest_*.rs), which boot Linux: on this machine if its CPU has vmx or svm, else in the lab (tests/lab).
# Everything needs root, for network taps. Fails if no guest booted.
#
# usage: run-tests.sh [--unit | --life-cycle | --guest] [FILTER...]   (default: all three; FILTER: part of a test's name)
# environment: MAYFLY_TEST_THREADS   guest tests at a time (default 2)
# The output of the last run is kept in build/tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly PROGRAM=test
# shellcheck source=resources/guest/lib.sh
. resources/guest/lib.sh

readonly LOGS=$PWD/build/tests
# The test programs that have run to their end.
readonly DONE=$LOGS/done
# How often the lab is started again when its emulated host dies under the tests, as it does once in a while.
readonly LAB_TRIES=3 LAB_FAILED=125
export MAYFLY_GUEST_COUNT_FILE=$LOGS/guests
export MAYFLY_TEST_THREADS=${MAYFLY_TEST_THREADS:-2}

usage() { sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; }

# recorded NAME COMMAND...: runs a part of the tests, and keeps what it prints.
recorded() {
    local started=$SECONDS
    say "$1 tests"
    if "${@:2}" 2>&1 | tee "$LOGS/$1.log"; then
        say "$1 tests: passed ($((SECONDS - started)) s)"
    else
        say "$1 tests: FAILED ($((SECONDS - started)) s)"
        failed+=("$1")
    fi
}

# build_tests: compiles the tests of the crate tests/ and prints the paths of the programs, one a line.
build_tests() {
    cargo test -p mayfly-tests --tests --no-run --locked --message-format=json-render-diagnostics |
        sed -n 's/.*"kind":\["test"\].*"executable":"\([^"]*\)".*/\1/p'
}

# run_programs THREADS PROGRAM... [-- FILTER...]: runs test programs one after the other.
run_programs() {
    local threads=$1 program programs=() code=0
    shift
    while (($#)) && [[ $1 != -- ]]; do
        programs+=("$1")
        shift
    done
    (($# == 0)) || shift
    for program in "${programs[@]}"; do
        say "${program##*/}"
        "$program" --test-threads "$threads" "$@" || code=1
        echo "$program" >>"$DONE"
    done
    return "$code"
}

life_cycle_tests() {
    if { : <>/dev/kvm; } 2>/dev/null; then
        run_programs 2 "${life_cycle[@]}" -- "${filters[@]}"
    else
        say "no /dev/kvm here: using the lab"
        tests/lab/lab.sh --share-out "$LOGS" -- tests/run-tests.sh --programs 2 "${life_cycle[@]}" -- "${filters[@]}"
    fi
}

guest_tests() {
    resources/guest/build.sh || return
    local try code result=0 rest=("${guest[@]}")
    for ((try = 1; try <= LAB_TRIES; try++)); do
        code=0
        tests/lab/lab.sh --share-out "$LOGS" --memory "$(lab_memory)" -- \
            tests/run-tests.sh --programs "$MAYFLY_TEST_THREADS" "${rest[@]}" -- "${filters[@]}" || code=$?
        ((code == 0 || code == LAB_FAILED)) || result=$code
        mapfile -t rest < <(printf '%s\n' "${guest[@]}" | grep -vxFf "$DONE")
        ((code == LAB_FAILED && ${#rest[@]} > 0)) || return "$result"
        say "the lab host died (try $try of $LAB_TRIES); ${#rest[@]} test programs are left"
    done
    return "$LAB_FAILED"
}

# lab_memory: MiB for the lab host: room for a guest beyond the 3-4 GiB hole where this machine has it.
lab_memory() {
    awk '/^MemAvailable/ { m = int($2 / 1024 * 3 / 4); print (m > 7168 ? 7168 : m < 2048 ? 2048 : m) }' /proc/meminfo
}

# summary: counts what the test programs said, and the guests that booted.
summary() {
    local passed wrong guests=0
    passed=$(cat "$LOGS"/*.log | sed -n 's/^test result: .* \([0-9]*\) passed;.*/\1/p' | awk '{ n += $1 } END { print n + 0 }')
    wrong=$(cat "$LOGS"/*.log | sed -n 's/^test result: .* \([0-9]*\) failed;.*/\1/p' | awk '{ n += $1 } END { print n + 0 }')
    [[ ! -e $MAYFLY_GUEST_COUNT_FILE ]] || guests=$(wc -l <"$MAYFLY_GUEST_COUNT_FILE")
    # Names of failed tests, which the programs have printed long ago.
    sed -n 's/^test \(.*\) \.\.\. FAILED\r\{0,1\}$/FAILED \1/p' "$LOGS"/*.log
    echo "$guests real guests booted"
    echo "$passed passed, $wrong failed"
    if [[ $parts == *guest* ]] && ((guests == 0)); then die "no guest booted: nothing was tested for real"; fi
    ((${#failed[@]} == 0)) || die "failed: ${failed[*]} tests (see $LOGS)"
    say "finished in $SECONDS s"
}

main() {
    local parts='unit life-cycle guest' filters=() failed=() life_cycle=() guest=() program list
    case ${1:-} in
        --programs) shift && run_programs "$@" && exit || exit 1 ;;
        --unit | --life-cycle | --guest) parts=${1#--} && shift ;;
        -h | --help) usage && exit ;;
        -*) die "unknown option $1 (try --help)" ;;
    esac
    filters=("$@")
    ((EUID == 0)) || die "needs root: tests create network taps, and the lab shares this machine's files"
    require_tools cc:gcc curl:curl ip:iproute2
    rm -rf "$LOGS"
    mkdir -p "$LOGS"
    : >"$DONE"
    [[ $parts != *unit* ]] || recorded unit cargo test --workspace --lib --bins --locked -- "${filters[@]}"
    if [[ $parts != unit ]]; then
        say "building the release binaries"
        cargo build --release --locked
        say "building the test programs"
        list=$(build_tests)
        for program in $list; do
            if [[ ${program##*/} == guest_* ]]; then guest+=("$program"); else life_cycle+=("$program"); fi
        done
        [[ $parts != *life-cycle* ]] || recorded life-cycle life_cycle_tests
        [[ $parts != *guest* ]] || recorded guest guest_tests
    fi
    summary
}

main "$@"

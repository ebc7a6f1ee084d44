#!/usr/bin/env bash
# `make test`: unit tests anywhere, life-cycle tests (tests/tests/*.rs) on any /dev/kvm, and guest tests
# (tests/tests/guest_*.rs), which boot Linux: on this machine if its CPU has vmx or svm, else in the lab (tests/lab).
# Between them, tests/openapi holds the binary against resources/openapi.yaml. The lab's own tests run when they are asked for.
# Everything needs root, for network taps. Fails if no guest booted.
#
# usage: run-tests.sh [--unit | --life-cycle | --openapi | --guest | --lab] [FILTER...]
#        run-tests.sh --soak
#   (default: all parts but --lab; FILTER: part of a test's name; --soak: the tests that can go on for longer, for long)
# environment: MAYFLY_TEST_THREADS   guest tests at a time (default 2)
# The output of the last run is kept in build/tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly PROGRAM=test
# shellcheck source=resources/guest/lib.sh
. resources/guest/lib.sh

readonly LOGS=$PWD/build/tests
# lab.sh's exit code when the lab itself failed, and how many labs are started for one part of the tests.
readonly LAB_FAILED=125 LAB_TRIES=4
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

# build_tests: compiles the tests of the crates tests/ and tests/clients/ and prints the paths of the programs, one a line.
build_tests() {
    # Programs that tests start.
    cargo build -p mayfly-tests --examples --locked || return
    {
        cargo test -p mayfly-tests --tests --no-run --locked --message-format=json-render-diagnostics &&
            cargo test --manifest-path tests/clients/Cargo.toml --tests --no-run --locked \
                --message-format=json-render-diagnostics
    } | sed -n 's/.*"kind":\["test"\].*"executable":"\([^"]*\)".*/\1/p'
}

# list_tests PROGRAM...: the tests that the filters choose, one a line: program, name.
list_tests() {
    local program
    for program in "$@"; do
        "$program" --list --format terse "${filters[@]}" | sed -n "s|^\\(.*\\): test\$|$program \\1|p"
    done
}

# run_listed RUNNER PROGRAMS THREADS: runs the tests in $LOGS/pending by RUNNER: so many programs at a time, each with so
# many tests at a time. What a program says is kept in $LOGS/run.PROGRAM.log, and shown when it has ended.
run_listed() {
    local program name
    local -A names=()
    rm -f "$LOGS/wrong"
    while read -r name; do names[${name% *}]+=" ${name##* }"; done <"$LOGS/pending"
    # Those with many tests begin, so that none of them is left over at the end.
    for program in "${!names[@]}"; do
        echo "$(wc -w <<<"${names[$program]}") $program"
    done | sort -rn >"$LOGS/order"
    while read -r _ program; do
        while (($(jobs -rp | wc -l) >= $2)); do wait -n || true; done
        # shellcheck disable=SC2086 # names of tests have no blanks
        run_program "$1" "$program" "$3" ${names[$program]} </dev/null &
    done <"$LOGS/order"
    wait
    [[ ! -e $LOGS/wrong ]]
}

# run_program RUNNER PROGRAM THREADS TEST...
run_program() {
    local log=$LOGS/run.${2##*/}.log
    export MAYFLY_GUEST_COUNT_FILE=$LOGS/guests.${2##*/}
    "$@" >>"$log" 2>&1 || : >"$LOGS/wrong"
    cat "$log"
}

# run_here PROGRAM THREADS TEST...
run_here() {
    say "${1##*/}"
    "$1" --test-threads "$2" --exact "${@:3}"
}

# run_in_lab PROGRAM THREADS TEST...: runs the tests of a program in an emulated host of its own. That can die of a fault in
# the emulation; then what has not passed runs again in a new one. What failed runs once more, as a fault of the emulation
# can also look like one of the guest; the summary names it.
run_in_lab() {
    local program=$1 threads=$2 tests=("${@:3}") try code again=''
    for ((try = 1; try <= LAB_TRIES; try++)); do
        code=0
        # The host may have died in the middle of a line.
        echo && say "${program##*/}"
        tests/lab/lab.sh --share-out "$LOGS" --memory "$(lab_memory)" --timeout "$lab_time" -- \
            "$program" --test-threads "$threads" --exact "${tests[@]}" || code=$?
        ((code != 0)) || return 0
        mapfile -t tests < <(left_over "$program" "${tests[@]}")
        ((${#tests[@]} > 0)) || return 0
        if ((code == LAB_FAILED)); then
            say "the emulated host died (try $try of $LAB_TRIES); ${#tests[@]} tests have not passed yet"
        elif [[ $again ]]; then
            return "$code"
        else
            again=yes
            printf '%s\n' "${tests[@]/#/$program }" >>"$LOGS/again"
            say "running again in a new emulated host what failed: ${#tests[@]} tests"
        fi
    done
    return 1
}

# left_over PROGRAM TEST...: those of the tests that have not passed.
left_over() {
    local passed
    passed=$(verdicts "$LOGS/run.${1##*/}.log" | sed -n 's/^[^ ]* \(.*\) ok$/\1/p')
    printf '%s\n' "${@:2}" | grep -vxF -f <(echo "$passed") || true
}

life_cycle_tests() {
    list_tests "${life_cycle[@]}" >"$LOGS/pending"
    if { : <>/dev/kvm; } 2>/dev/null; then
        run_listed run_here 1 2
    else
        say "no /dev/kvm here: using the lab"
        run_listed run_in_lab "$MAYFLY_TEST_THREADS" 1
    fi
}

openapi_tests() {
    local filter='' code=0
    ((${#filters[@]} == 0)) || filter=$(printf ' or %s' "${filters[@]}")
    tests/openapi/run.sh -k "${filter# or }" || code=$?
    # 5: no test has such a name.
    ((code == 0 || (code == 5 && ${#filters[@]} > 0)))
}

# lab_tests: the script has a name like that of a test program here, for the summary.
lab_tests() {
    say lab_selftest-0
    tests/lab/selftest.sh "${filters[@]}"
}

guest_tests() {
    resources/guest/build.sh || return
    resources/guest/tools.sh || return
    list_tests "${guest[@]}" >"$LOGS/pending"
    if has_kvm; then
        run_listed run_here "$MAYFLY_TEST_THREADS" 1
    else
        run_listed run_in_lab "$MAYFLY_TEST_THREADS" 1
    fi
}

# Tests that can go on for longer, and how long they do for `make soak`.
readonly SOAKS=(plugging_again_and_again streams_work_both_ways_on_pci an_image_survives_the_death)
soak() {
    export MAYFLY_HOTPLUG_CYCLES=1000 MAYFLY_VSOCK_MIB=1024 MAYFLY_QCOW2_KILLS=300
    export MAYFLY_TEST_THREADS=1
    lab_time=7200
    filters=("${SOAKS[@]}")
}

# verdicts LOG...: the last verdict of each test, one a line: program, name, ok or FAILED.
verdicts() {
    cat "$@" | tr -d '\r' | awk '
        /^test: [a-z_]+-[0-9a-f]+$/ { program = $2 }
        $1 == "Running" { program = $NF; gsub(/.*\/|[()]/, "", program) }
        /^test .* \.\.\. (ok|FAILED)$/ { verdict[program " " $2] = $NF }
        # pytest: a file, its test, a verdict, a percentage
        match($0, /^tests\/.*\.py::.* (PASSED|FAILED|ERROR) /) {
            name = substr($0, 1, RLENGTH)
            result = name ~ / PASSED $/ ? "ok" : "FAILED"
            sub(/ [A-Z]+ $/, "", name)
            gsub(/ /, "_", name)
            sub(/::/, "-0 ", name)
            verdict[name] = result
        }
        END { for (test in verdict) print test, verdict[test] }' | sort
}

# lab_memory: MiB for a lab host: room for a guest beyond the 3-4 GiB hole where this machine has it.
lab_memory() {
    awk '/^MemAvailable/ { m = int($2 / 1024 * 3 / 4); print (m > 7168 ? 7168 : m < 2048 ? 2048 : m) }' /proc/meminfo
}

# summary: counts what the test programs said, and the guests that booted.
summary() {
    local passed wrong guests
    verdicts "$LOGS"/*.log >"$LOGS/verdicts"
    passed=$(grep -c ' ok$' "$LOGS/verdicts" || true)
    wrong=$(grep -c ' FAILED$' "$LOGS/verdicts" || true)
    guests=$(find "$LOGS" -name 'guests.*' -exec cat {} + | wc -l)
    # Their programs have printed them long ago.
    sed -n 's/\(.*\)-[0-9a-f]* \(.*\) FAILED$/FAILED \1: \2/p' "$LOGS/verdicts"
    [[ ! -e $LOGS/again ]] || sed 's|.*/\(.*\)-[0-9a-f]* |run a second time, in a new emulated host: \1: |' "$LOGS/again"
    echo "$guests real guests booted"
    echo "$passed passed, $wrong failed"
    if [[ $parts == *guest* ]] && ((guests == 0)); then die "no guest booted: nothing was tested for real"; fi
    ((${#failed[@]} == 0)) || die "failed: ${failed[*]} tests (see $LOGS)"
    say "finished in $SECONDS s"
}

main() {
    local parts='unit life-cycle openapi guest' filters=() failed=() life_cycle=() guest=() program programs list
    # Seconds after which a lab host is given up.
    local lab_time=1500
    case ${1:-} in
        --unit | --life-cycle | --openapi | --guest | --lab) parts=${1#--} && shift ;;
        -h | --help) usage && exit ;;
        --soak) ;;
        -*) die "unknown option $1 (try --help)" ;;
    esac
    filters=("$@")
    if [[ ${1:-} == --soak ]]; then
        parts='life-cycle guest'
        soak
    fi
    ((EUID == 0)) || die "needs root: tests create network taps, and the lab shares this machine's files"
    require_tools cc:gcc curl:curl ip:iproute2 iptables:iptables sysctl:procps losetup:mount mke2fs:e2fsprogs e2fsck:e2fsprogs \
        qemu-img:qemu-utils qemu-storage-daemon:qemu-system-common passt:passt newuidmap:uidmap
    rm -rf "$LOGS"
    mkdir -p "$LOGS"
    [[ $parts != *unit* ]] || recorded unit cargo test --workspace --lib --locked -- "${filters[@]}"
    if [[ $parts != unit && $parts != lab ]]; then
        say "building the release binaries"
        cargo build --release --locked
    fi
    if [[ $parts == *life-cycle* || $parts == *guest* ]]; then
        say "building the test programs"
        list=$(build_tests)
        mapfile -t programs <<<"$list"
        # The lab has no network to make it from.
        MAYFLY_CLIENT_PYTHON=$(python_environment tests/clients/requirements.txt)/bin/python
        export MAYFLY_CLIENT_PYTHON
        for program in "${programs[@]}"; do
            if [[ ${program##*/} == guest_* ]]; then guest+=("$program"); else life_cycle+=("$program"); fi
        done
    fi
    [[ $parts != *life-cycle* ]] || recorded life-cycle life_cycle_tests
    [[ $parts != *openapi* ]] || recorded openapi openapi_tests
    [[ $parts != *guest* ]] || recorded guest guest_tests
    [[ $parts != lab ]] || recorded lab lab_tests
    summary
}

main "$@"

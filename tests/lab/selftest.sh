#!/usr/bin/env bash
# Tests lab.sh itself: output, exit codes, arguments, shared folders, the terminal, limits, and that nothing stays behind.
# Takes about three minutes. usage: selftest.sh [FILTER...]
#   (default: every function here whose name starts with test_; FILTER: part of a test's name)
# shellcheck disable=SC2016,SC2317 # quoted scripts are for the lab; the tests are called by name
set -uo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SCRATCH=$(mktemp -d)
# lab.sh keeps its files here, so that what it leaves behind is seen.
mkdir "$SCRATCH/tmp"
export TMPDIR=$SCRATCH/tmp
trap '[[ $BASHPID != "$$" ]] || rm -rf "$SCRATCH"' EXIT

lab() { "$HERE/lab.sh" --always --quiet "$@"; }

# expect WHAT WANTED GOT
expect() {
    [[ $2 == "$3" ]] && return
    printf '  %s: wanted %q, got %q\n' "$1" "$2" "$3"
    failed=1
}

# expect_clean: no process and no file of lab.sh is left, at the latest after a second.
expect_clean() {
    local tries
    for ((tries = 0; tries < 10; tries++)); do
        pgrep -f "$SCRATCH/tmp" >/dev/null || break
        sleep 0.1
    done
    expect "processes left" '' "$(pgrep -af "$SCRATCH/tmp" | cut -c1-100)"
    expect "files left" "${1-}" "$(ls "$SCRATCH/tmp")"
    rm -rf "${SCRATCH:?}/tmp/"*
}

test_exit_code_and_kvm_reach_the_caller() {
    local output
    output=$(lab -- python3 -c 'import fcntl, sys; print(fcntl.ioctl(open("/dev/kvm"), 0xAE00)); sys.exit(7)')
    expect "exit code" 7 $?
    expect "KVM API version" 12 "$output"
}

test_arguments_arrive_exactly() {
    local arguments=('' ' two  words ' $'line\nbreak\ttab' "it's \"quoted\"" '$HOME `id` $(id) \n' '*' 'ünï' $'\x01\x7f') output
    output=$(lab -- python3 -c 'import sys; print(ascii([a.encode("utf-8", "surrogateescape") for a in sys.argv[1:]]))' "${arguments[@]}")
    expect arguments "$(python3 -c 'import sys; print(ascii([a.encode("utf-8", "surrogateescape") for a in sys.argv[1:]]))' "${arguments[@]}")" \
        "$output"
}

test_ten_megabytes_arrive_complete() {
    expect "output" "$(seq 1 1400000 | sha256sum)" "$(lab -- seq 1 1400000 | sha256sum)"
}

test_output_is_live() {
    local first
    exec 5< <(exec "$HERE/lab.sh" --always --quiet -- sh -c 'echo first; sleep 30')
    read -r -t 25 first <&5
    expect "line before the end" first "$first"
    kill $!
    wait $!
    exec 5<&-
}

test_environment_directory_and_standard_files() {
    local output
    output=$(cd "$HERE" && MAYFLY_A='a b' OTHER=1 WANTED=2 lab --env WANTED -- \
        sh -c 'pwd; echo "$MAYFLY_A,$OTHER,$WANTED,$MAYFLY_LAB"; cat; echo more >/dev/stdout; echo error >&2')
    expect "output" "$HERE"$'\na b,,2,1\nmore\nerror' "$output"
}

test_shared_folder_is_written_and_the_rest_forgotten() {
    mkdir "$SCRATCH/out"
    lab --share-out "$SCRATCH/out:/mnt/results" -- sh -c "echo kept >/mnt/results/file; echo lost >$HERE/lost; cat $HERE/lost" >/dev/null
    expect "exit code" 0 $?
    expect "shared file" kept "$(cat "$SCRATCH/out/file")"
    [[ ! -e $HERE/lost ]] || expect "a file outside the shared folder" absent present
}

test_modules_load_on_demand() {
    lab -- sh -c 'ip link add br0 type bridge && ip tuntap add tap0 mode tap && ip link set tap0 master br0'
    expect "exit code" 0 $?
}

test_missing_command_and_background_process() {
    lab -- no-such-command >/dev/null
    expect "exit code of a missing command" 127 $?
    lab -- sh -c 'sleep 1000 & exit 3'
    expect "exit code beside a background process" 3 $?
}

test_a_machine_with_kvm_is_used_directly() {
    local output
    output=$(lab -- sh -c "'$HERE/lab.sh' -- sh -c 'echo inside; exit 5' 2>&1; echo \$?; '$HERE/lab.sh' --quiet --timeout 1 -- sleep 9; echo \$?")
    expect "output" $'lab: this machine has KVM: running the command directly\ninside\n5\n124' "$output"
}

test_time_limit() {
    lab --timeout 2 -- sleep 100 2>/dev/null
    expect "exit code" 124 $?
}

test_host_that_does_not_boot() {
    lab --boot-timeout 1 -- true 2>/dev/null
    expect "exit code" 125 $?
}

# signal_lab SIGNAL: sends it to lab.sh while the command runs.
signal_lab() {
    setsid "$HERE/lab.sh" --always --quiet -- sh -c 'echo running; sleep 100' >"$SCRATCH/log" 2>&1 &
    local pid=$!
    for _ in {1..300}; do
        ! grep -qs running "$SCRATCH/log" || break
        sleep 0.1
    done
    kill "-$1" "$pid"
    { wait "$pid"; } 2>/dev/null
}

test_signals_end_everything() {
    signal_lab TERM
    expect "exit code" 143 $?
    expect_clean
    signal_lab HUP
    expect "exit code" 129 $?
    expect_clean
    signal_lab KILL
    # Nobody can tidy up the files of a script that was killed; the processes must end even so.
    expect_clean "$(ls "$SCRATCH/tmp")"
}

test_terminal() {
    python3 "$HERE/terminal_test.py" "$HERE/lab.sh"
    expect "exit code" 0 $?
}

all_failed=0
for test in $(compgen -A function test_); do
    (($# == 0)) || grep -qF -f <(printf "%s\n" "$@") <<<"$test" || continue
    failed=0
    "$test"
    expect_clean
    # As the test programs say it.
    printf 'test %s ... %s\n' "$test" "$( ((failed)) && echo FAILED || echo ok)"
    ((all_failed |= failed))
done
exit "$all_failed"

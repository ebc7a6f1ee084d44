#!/usr/bin/env bash
# A guided tour without a terminal: configures, boots, shows, pauses, resumes and stops a guest through the API. Prints
# every curl command with its answer, and what the guest says. Exits 0 if all of it went as it should.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# shellcheck source=resources/demo/machine.sh
. resources/demo/machine.sh

# How long the guest may take to boot or to stop, in seconds; an emulated host is slow.
readonly PATIENCE=120

fail() {
    printf 'tour: %s\n' "$*" >&2
    if [[ -e $work/console ]]; then
        echo "the end of the guest's console and of the log:" >&2
        tail -n 15 "$work/console" "$work/log" >&2
    fi
    exit 1
}

title() { printf '\n== %s\n' "$*"; }

# api METHOD PATH [BODY]: one request; it must succeed.
api() {
    local body=() answer
    printf '$ curl --unix-socket %s' "$socket"
    [[ $1 == GET ]] || printf ' -X %s' "$1"
    (($# < 3)) || { body=(-d "$3") && printf " -d '%s'" "$3"; }
    printf ' http://localhost%s\n' "$2"
    answer=$(curl -sS --max-time 30 --unix-socket "$socket" -X "$1" "${body[@]}" -w '\nHTTP %{http_code}\n' \
        "http://localhost$2") || fail "no answer to $1 $2"
    sed '/^$/d; s/^/  /' <<<"$answer"
    [[ $answer == *$'\n'"HTTP 2"?? ]] || fail "$1 $2 was refused"
}

# wait_for PATTERN: until the guest's console shows it.
wait_for() {
    local tries
    for ((tries = 0; tries < PATIENCE * 5; tries++)); do
        ! grep -qa -- "$1" "$work/console" || return 0
        kill -0 "$monitor" 2>/dev/null || fail "the monitor ended early"
        sleep 0.2
    done
    fail "the guest's console did not show '$1' in $PATIENCE s"
}

# ask COMMAND: runs a command in the guest's shell and prints its output. The marks are written in two pieces, so that an
# echo of the command line is not taken for them.
ask() {
    local id=${EPOCHREALTIME/./}
    printf 'echo "@@""begin %s"; %s; echo "@@""end %s"\n' "$id" "$1" "$id" >&3
    wait_for "^@@end $id"
    tr -d '\r' <"$work/console" | sed -n "/^@@begin $id\$/,/^@@end $id\$/{/^@@/d; p}"
}

# show COMMAND: the same, as it would look in the guest's shell.
show() {
    printf 'guest# %s\n' "$1"
    ask "$1" | sed 's/^/  /'
}

start_monitor() {
    mkfifo "$work/input"
    : >"$work/console"
    printf '$ mayfly --api-sock %s --id demo &\n' "$socket"
    "$MAYFLY" --api-sock "$socket" --id demo --log-path "$work/log" <>"$work/input" >"$work/console" 2>&1 &
    monitor=$!
    exec 3<>"$work/input"
    for ((tries = 0; tries < 100; tries++)); do
        [[ ! -S $socket ]] || return 0
        sleep 0.05
    done
    fail "the monitor opened no API socket"
}

configure() {
    title "Configuration"
    api GET /version
    api PUT /machine-config "$MACHINE"
    api PUT /boot-source "$BOOT_SOURCE"
    api PUT /drives/rootfs "$DRIVE"
    [[ -z $NETWORK ]] || api PUT /network-interfaces/eth0 "$NETWORK"
    api PUT /entropy '{}'
    title "Boot"
    api PUT /actions '{ "action_type": "InstanceStart" }'
    wait_for 'a shell on'
    printf 'stty -echo; PS1=\n' >&3
    ask true >/dev/null
}

# shellcheck disable=SC2016 # the guest expands it
look_around() {
    title "The guest"
    show 'uname -srv'
    show 'grep -c ^processor /proc/cpuinfo'
    show 'free -m | head -2'
    show 'mount | grep " / "; cat /proc/partitions'
    if [[ $NETWORK ]]; then
        show 'ip addr show eth0'
        show "ping -c 2 $HOST_IP"
    fi
    show 'date -u'
    printf 'host#  date -u\n  %s\n' "$(date -u)"
}

pause_and_resume() {
    local before after
    title "Pause and resume"
    before=$(ask 'cut -d. -f1 /proc/uptime')
    api PATCH /vm '{ "state": "Paused" }'
    api GET /
    echo "(paused for 5 s)"
    sleep 5
    api PATCH /vm '{ "state": "Resumed" }'
    after=$(ask 'cut -d. -f1 /proc/uptime')
    echo "guest's uptime before and after: $before s, $after s"
    ((after - before < 5)) || fail "the guest's clock went on while it was paused"
}

stop() {
    local code=0
    title "Graceful stop"
    api PUT /actions '{ "action_type": "PowerButton" }'
    timeout "$PATIENCE" tail --pid="$monitor" -f /dev/null || fail "the guest did not stop in $PATIENCE s"
    wait "$monitor" || code=$?
    monitor=''
    echo "the guest has powered off; mayfly's exit code: $code"
    ((code == 0)) || fail "the exit code should be 0"
    [[ ! -e $socket ]] || fail "the monitor left its socket behind"
}

prepare
socket=$work/api.sock
start_monitor
configure
look_around
pause_and_resume
stop

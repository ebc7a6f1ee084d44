#!/usr/bin/env bash
# `make bench`: what a guest and its monitor cost. Prints a table; asserts nothing.
#
# Where the CPU has vmx or svm the cases run on this machine and the figures are its time. Elsewhere each case runs in an
# emulated host whose clock counts instructions, 2 ns each: such figures are the same on every machine to about 0.3 %,
# and compare builds, not machines. The start-up, API and disk figures are always this machine's time.
#
# What two queues gain shows only on a host with CPUs for them: for that case the emulated one has two, and the clock's
# time, so that its figures are rough and only their ratios say something; it is the middle one of three runs that counts.
#
# usage: bench.sh [CASE...]   (boot, boot-mmio, memory, block, block-async, net, queues, startup, api, disk; default: all)
# environment: MAYFLY_BENCH_ICOUNT=1   count instructions even where there is KVM
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly PROGRAM=bench
# shellcheck source=resources/guest/lib.sh
. resources/guest/lib.sh

readonly CASES=(boot boot-mmio memory block block-async net queues startup api disk)
readonly IMAGES=${MAYFLY_GUEST_DIR:-$PWD/build/guest}
readonly MAYFLY=$PWD/target/x86_64-unknown-linux-gnu/release/mayfly
# An emulated host now and then stops for good inside the emulated SVM; with two CPUs it or its guest can crash. Then it is
# started again.
readonly TRIES=5 PATIENCE=150
readonly COUNTING=(-accel tcg,thread=single -icount shift=1,sleep=off -smp 1 -cpu max,+svm,+npt,-la57)
readonly TWO_CPUS=(-accel tcg,thread=multi -smp 2 -cpu max,+svm,+npt,-la57,-erms,-fsrm)

usage() { sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; }

# build: the monitor and the bench programs; sets guest, host, startup, api, disk to their paths.
build() {
    local name path
    cargo build --release --locked
    while read -r name path; do
        printf -v "$name" %s "$path"
    done < <(cargo bench -p mayfly-tests --no-run --locked --message-format=json-render-diagnostics |
        sed -n 's/.*"kind":\["bench"\].*"name":"\([a-z]*\)".*"executable":"\([^"]*\)".*/\1 \2/p')
    resources/guest/build.sh
}

# pack_guest: the bench guest: the guest image's files and the program that is its init.
pack_guest() {
    mkdir -p "$work/guest"
    cp "$guest" "$work/guest/bench"
    pack_cpio "$work/guest" "$work/bench.cpio"
    cat "$IMAGES/initramfs.cpio" "$work/bench.cpio" >"$work/guest.cpio"
}

# pack_lab: the whole emulated host: a file server beside it would not count in instructions.
pack_lab() {
    local tree=$work/lab
    BUSYBOX=$IMAGES/busybox/bin/busybox
    mkdir -p "$tree"/{bin,dev,proc,sys,sbin}
    printf 'kvm-amd\ntun\n' >"$work/modules"
    add_modules "$IMAGES/kernel" "$tree" "$work/modules"
    cp "$BUSYBOX" "$tree/bin/busybox"
    "$BUSYBOX" --list | grep -vx busybox | while read -r applet; do ln -s busybox "$tree/bin/$applet"; done
    cp tests/benches/lab-init "$tree/init"
    cp "$host" "$tree/host"
    cp "$MAYFLY" "$tree/mayfly"
    cp "$IMAGES/vmlinux" "$tree/vmlinux"
    cp "$work/guest.cpio" "$tree/guest.cpio"
    chmod +x "$tree"/{init,host,mayfly}
    pack_cpio "$tree" "$work/lab.cpio"
}

# run_emulated CASE ARGUMENT...: prints the figures of one case from an emulated host.
run_emulated() {
    local try
    for ((try = 1; try <= TRIES; try++)); do
        timeout "$PATIENCE" qemu-system-x86_64 -M q35 "${@:2}" -m 2048 \
            -nodefaults -no-user-config -display none -no-reboot -serial stdio \
            -kernel "$IMAGES/vmlinux" -initrd "$work/lab.cpio" -append \
            "console=ttyS0 quiet panic=-1 mitigations=off nokaslr audit=0 apparmor=0 nowatchdog bench.case=$1" \
            </dev/null 2>&1 | tr -d '\r' >"$work/$1.log" || true
        if grep -q '^@exit 0$' "$work/$1.log"; then
            sed -n '/^[a-z0-9_]* [0-9.-]*$/p' "$work/$1.log"
            return
        fi
        say "$1: the emulated host or its guest stopped (try $try of $TRIES)"
    done
    tail -n 30 "$work/$1.log" >&2
    die "$1: no figures"
}

# run_thrice CASE ARGUMENT...: for each figure the middle one of three runs.
run_thrice() {
    local run
    for run in 1 2 3; do run_emulated "$@"; done | awk '
        !($1 in count) { names[++figures] = $1 }
        { values[$1, ++count[$1]] = $2 }
        function middle(a, b, c) { return a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b) }
        END { for (i = 1; i <= figures; i++) { n = names[i]; print n, middle(values[n, 1], values[n, 2], values[n, 3]) } }'
}

# run_case CASE: prints lines "NAME VALUE".
run_case() {
    case $1 in
        startup) "$startup" "$MAYFLY" "$MAYFLY-jailer" ;;
        api) "$api" "$MAYFLY" ;;
        # Images in memory: no disk is measured.
        disk) TMPDIR=/dev/shm "$disk" ;;
        *)
            if [[ ! $counted ]]; then
                "$host" "$1" "$MAYFLY" "$IMAGES/vmlinux" "$work/guest.cpio"
            elif [[ $1 == queues ]]; then
                run_thrice "$1" "${TWO_CPUS[@]}"
            else
                run_emulated "$1" "${COUNTING[@]}"
            fi
            ;;
    esac
}

# describe NAME: what a figure means.
describe() {
    case $1 in
        init_ms) echo "guest: power on to init, ms" ;;
        total_ms) echo "monitor: process start to end, ms" ;;
        outside_ms) echo "of it outside the guest, ms" ;;
        private_dirty_kb) echo "monitor: private dirty memory without guest RAM, KiB" ;;
        seq_read_ms) echo "read 48 MiB in order, 256 KiB a request, ms" ;;
        seq_write_ms) echo "write 48 MiB in order, 256 KiB a request, ms" ;;
        rand_read_us) echo "read 4 KiB anywhere, us" ;;
        rand_write_us) echo "write 4 KiB anywhere, us" ;;
        flush_us) echo "write 4 KiB and flush, us" ;;
        tx_ms) echo "TCP, guest to host, 40 MiB, ms" ;;
        rx_ms) echo "TCP, host to guest, 40 MiB, ms" ;;
        round_trip_us) echo "TCP, 1 byte there and back, us" ;;
        both_read_us_1) echo "disk with one queue: two CPUs read 4 KiB anywhere, us" ;;
        both_tx_ms_1) echo "card with one pair: two CPUs send 20 MiB each, ms" ;;
        both_rx_ms_1) echo "card with one pair: two CPUs receive 20 MiB each, ms" ;;
        both_*_2) echo "the same with two" ;;
        both_*_ratio) echo "how many times as fast two are" ;;
        startup_cpu_us) echo "process start to API socket, CPU time, us" ;;
        jailed_startup_cpu_us) echo "jailer start to API socket in the jail, CPU time of both, us" ;;
        startup_cpu_us_quartiles | jailed_startup_cpu_us_quartiles) echo "the quartiles of 200 starts, us" ;;
        get_instance_us) echo "GET /, CPU time of the monitor, us" ;;
        get_vm_config_us) echo "GET /vm/config, CPU time of the monitor, us" ;;
        put_drive_us) echo "PUT /drives/{id}, CPU time of the monitor, us" ;;
        disk_read_raw_ns) echo "random 4 KiB read of a raw image, ns" ;;
        disk_write_raw_ns) echo "random 4 KiB write to a raw image, ns" ;;
        async_disk_read_raw_ns) echo "random 4 KiB read of a raw image, Async, ns" ;;
        async_disk_write_raw_ns) echo "random 4 KiB write to a raw image, Async, ns" ;;
        *disk_read_qcow2_ns) echo "of a qcow2 image, ns" ;;
        *disk_write_qcow2_ns) echo "to a qcow2 image, ns" ;;
        *disk_*_ratio) echo "the one to the other" ;;
        get_metrics_us) echo "GET /metrics, CPU time of the monitor, us" ;;
        *) echo "$1" ;;
    esac
}

main() {
    local cases=("$@") in_guests=() case figures name value counted=1 guest='' host='' startup='' api='' disk=''
    [[ ${1:-} != -h && ${1:-} != --help ]] || { usage && exit; }
    ((${#cases[@]})) || cases=("${CASES[@]}")
    ((EUID == 0)) || die "needs root: the cases net and queues create a network tap"
    require_tools cc:gcc qemu-img:qemu-utils
    ! has_kvm || [[ ${MAYFLY_BENCH_ICOUNT:-} == 1 ]] || counted=''
    [[ ! $counted ]] || require_tools cpio:cpio qemu-system-x86_64:qemu-system-x86
    build
    work=$(mktemp -d "${TMPDIR:-/tmp}/mayfly-bench.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    pack_guest
    for case in "${cases[@]}"; do [[ $case == @(startup|api|disk) ]] || in_guests+=("$case"); done
    if [[ $counted ]] && ((${#in_guests[@]})); then
        pack_lab
        say "no KVM with vmx or svm: counting instructions in an emulated host, about half a minute a case"
    fi
    for case in "${cases[@]}"; do
        figures=$(run_case "$case")
        while read -r name value; do
            printf '%-11s %-55s %12s\n' "$case" "$(describe "$name")" "$value"
        done <<<"$figures"
    done
}

main "$@"

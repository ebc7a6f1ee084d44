#!/usr/bin/env bash
# Runs a command where there is KVM: on this machine if its CPU has it, else in the lab, a host emulated by QEMU (an AMD
# CPU with SVM, a Debian kernel with kvm-amd) that has this machine's own root file system. What the command writes
# there is forgotten when it ends, but for what it writes to a shared folder.
#
# usage: lab.sh [OPTION...] -- COMMAND [ARGUMENT...]
#   --interactive        connect this terminal (raw: Ctrl-C goes to the command), instead of only showing the output
#   --share-out DIR[:AT] make DIR of this machine writable in the lab, at the path AT (default: the same); repeatable
#   --env NAME           pass this variable too (always passed: PATH HOME USER LOGNAME SHELL TERM LANG LC_* TZ CI
#                        CARGO* RUST* MAYFLY_*); repeatable
#   --timeout SECONDS    wall-clock limit for the command, exit code 124 (default 1500, 0: none)
#   --boot-timeout S     wall-clock limit for one try to boot the lab host; there are 3 tries (default 60)
#   --memory MIB         the lab host's memory (default 3072)
#   --cpus N             the lab host's CPUs (default 1: with more, the emulated SVM lets hosts and guests crash)
#   --always             use the lab even where this machine has KVM
#   --console FILE       keep the lab host's kernel console in FILE
#   --quiet              say nothing unless something fails
# The exit code is the command's; 124: it took too long, 125: the lab failed.
# environment: MAYFLY_GUEST_DIR   cache of the images (default: build/guest in the project root)
#
# In the lab: root, this directory, /dev/kvm, /dev/net/tun, cgroup2, loopback only, and /tmp, /run, /dev/shm of its own
# (the current directory must not be below these, unless it is shared). stdin is /dev/null unless --interactive, and
# stdout and stderr are one. MAYFLY_LAB=1 says that this is the lab.
# The lab reads this machine's files through a cache: do not change them while it runs.
set -euo pipefail

# SILENCE: seconds without a sign of life from one of its CPUs after which the host is given up: the emulated SVM can
# stop one or all of them for good.
readonly PROGRAM=lab FAILED=125 TIMED_OUT=124 BOOT_TRIES=3 SILENCE=90
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
CACHE=${MAYFLY_GUEST_DIR:-$ROOT/build/guest}
# lib.sh sets it for the scripts' own use.
user_lc_all=${LC_ALL-}
# shellcheck source=resources/guest/lib.sh
. "$ROOT/resources/guest/lib.sh"

interactive='' always='' quiet='' console='' memory=3072 cpus=1 timeout=1500 boot_timeout=60
shares=() variables=() command=()
# What cleanup has to end, and its terminal settings to restore.
work='' qemu='' tail='' terminal='' virtiofsd=''

usage() { sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; }

die() {
    say "error: $*"
    exit "$FAILED"
}

report() { [[ $quiet ]] || say "$*"; }

parse_options() {
    while (($#)); do
        case $1 in
            --interactive) interactive=1 ;;
            --always) always=1 ;;
            --quiet) quiet=1 ;;
            --share-out | --env | --timeout | --boot-timeout | --memory | --cpus | --console)
                (($# > 1)) || die "$1 needs a value (try --help)"
                parse_value "$1" "$2"
                shift
                ;;
            -h | --help) usage && exit ;;
            --) shift && break ;;
            *) die "unknown option $1 (try --help)" ;;
        esac
        shift
    done
    command=("$@")
    ((${#command[@]})) || die "no command (usage: lab.sh [OPTION...] -- COMMAND [ARGUMENT...])"
}

# parse_value OPTION VALUE
parse_value() {
    case $1 in
        --share-out) shares+=("$2") ;;
        --env) variables+=("$2") ;;
        --console) console=$2 ;;
        *)
            [[ $2 =~ ^[0-9]+$ ]] || die "$1 needs a number, not $2"
            case $1 in
                --timeout) timeout=$2 ;;
                --boot-timeout) boot_timeout=$2 ;;
                --memory) memory=$2 ;;
                --cpus) cpus=$2 ;;
            esac
            ;;
    esac
}

run_directly() {
    report "this machine has KVM: running the command directly"
    ((timeout == 0)) || command=(timeout --foreground "$timeout" "${command[@]}")
    exec "${command[@]}"
}

# seconds_since START: START in microseconds, as EPOCHREALTIME without its point.
seconds_since() {
    local elapsed=$((${EPOCHREALTIME/./} - $1))
    printf '%d.%d' $((elapsed / 1000000)) $((elapsed / 100000 % 10))
}

# make_initramfs: the lab host's initramfs into the cache, unless it is there, made from the same inputs.
make_initramfs() {
    local inputs tmp
    inputs=$(cat "$HERE"/{init,modules.list,lab.sh} "$ROOT/resources/guest/lib.sh" "$CACHE"/{kernel,busybox}/version |
        sha256sum)
    exec 8>"$CACHE/lab.lock"
    flock 8
    if [[ ! -s $CACHE/lab.cpio || ! -e $CACHE/lab.stamp || $(<"$CACHE/lab.stamp") != "$inputs" ]]; then
        report "packing the lab host's initramfs"
        tmp=$work/tree
        mkdir -p "$tmp"/{bin,dev,proc}
        BUSYBOX=$CACHE/busybox/bin/busybox
        add_modules "$CACHE/kernel" "$tmp" "$HERE/modules.list"
        cp "$BUSYBOX" "$tmp/bin/busybox"
        ln -s busybox "$tmp/bin/sh"
        cp "$HERE/init" "$tmp/init"
        chmod +x "$tmp/init"
        # modprobe on demand, for every module of the package.
        "$BUSYBOX" depmod -b "$CACHE/kernel" "$(cd "$CACHE/kernel/lib/modules" && echo *)"
        rm -f "$CACHE/lab.stamp"
        pack_cpio "$tmp" "$CACHE/lab.cpio.new"
        mv "$CACHE/lab.cpio.new" "$CACHE/lab.cpio"
        echo "$inputs" >"$CACHE/lab.stamp"
        rm -r "$tmp"
    fi
    exec 8>&-
}

# share_paths SHARE: sets `from` and `at` of a --share-out.
share_paths() {
    from=$(realpath -e "${1%%:*}") || die "--share-out: no folder ${1%%:*}"
    at=$(realpath -m "${1#*:}")
}

# write_job: the control share: the command as a script, and what the initramfs is to set up for it.
write_job() {
    local name n from at size
    mkdir -p "$work/control"
    [[ -z $terminal ]] || size=$(stty size)
    cp "$HERE/supervise" "$work/control/supervise"
    [[ -z $interactive ]] || : >"$work/control/interactive"
    : >"$work/control/output"
    {
        printf 'ln -s %q /new/lib/modules 2>/dev/null\n' "$CACHE/kernel/lib/modules"
        for n in "${!shares[@]}"; do
            share_paths "${shares[n]}"
            printf 'mkdir -p %q && mount -t virtiofs share%d %q || fail "cannot mount a shared folder"\n' \
                "/new$at" "$n" "/new$at"
        done
    } >"$work/control/setup"
    {
        for name in PATH HOME USER LOGNAME SHELL TERM LANG TZ CI "${!LC_@}" "${!CARGO@}" "${!RUST@}" "${!MAYFLY_@}" \
            "${variables[@]}"; do
            [[ ! -v $name || $name == LC_ALL ]] || printf 'export %s=%q\n' "$name" "${!name}"
        done
        [[ -z $user_lc_all ]] || printf 'export LC_ALL=%q\n' "$user_lc_all"
        echo 'export MAYFLY_LAB=1'
        [[ -z $terminal ]] || printf 'stty rows %d cols %d\n' "${size% *}" "${size#* }"
        printf 'cd %q || exit 125\n' "$PWD"
        printf 'exec'
        printf ' %q' "${command[@]}"
        echo
    } >"$work/control/job"
}

# detached: runs a program that dies with this script, however that ends.
detached() { exec setpriv --pdeathsig KILL "$@"; }

# find_virtiofsd: sets `virtiofsd`. It is a part of QEMU up to version 7, and a program of its own after that.
find_virtiofsd() {
    for virtiofsd in /usr/libexec/virtiofsd /usr/lib/qemu/virtiofsd; do
        [[ ! -x $virtiofsd ]] || return 0
    done
    return 1
}

# require_virtiofsd: installs the package that has it here.
require_virtiofsd() {
    local package=virtiofsd
    ! find_virtiofsd || return 0
    (know_package "$package") 2>/dev/null || package=qemu-system-common
    install_packages "$package"
    find_virtiofsd || die "the package $package has no virtiofsd where it is looked for"
}

# serve NAME FOLDER CACHE_MODE: a virtiofsd; it ends when QEMU does.
serve() {
    detached "$virtiofsd" --socket-path="$work/$1.socket" -o "source=$2" -o "cache=$3" \
        -o sandbox=chroot </dev/null >>"$work/virtiofsd.log" 2>&1 &
    servers+=($!)
    qemu_args+=(-chardev "socket,id=$1,path=$work/$1.socket" -device "vhost-user-fs-pci,chardev=$1,tag=$1")
}

# boot: starts the lab host. Sets qemu, servers.
boot() {
    local n from at
    local qemu_args=()
    local kernel_parameters="console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on audit=0 apparmor=0"
    # The emulation now and then loses a timer's interrupt. A timer that ticks for ever goes on after that; one that is set
    # for each event stops its CPU for good, and guests with many CPUs then fail in strange ways.
    kernel_parameters+=" nowatchdog nohz=off highres=off"
    # Memory that guests have run code in is slow to write for whoever gets it next: every single write to a page makes
    # the emulation look for translated code. So fewer pages are cleared, and by words, not bytes (no erms, no fsrm).
    kernel_parameters+=" init_on_alloc=0"
    servers=()
    rm -f "$work"/*.socket "$work/control"/{up,beat.*}
    serve root / always
    serve control "$work/control" none
    for n in "${!shares[@]}"; do
        share_paths "${shares[n]}"
        serve "share$n" "$from" auto
    done
    for ((n = 0; n < 100; n++)); do
        (($(find "$work" -name '*.socket' | wc -l) < ${#servers[@]})) || break
        pause 0.05
    done
    qemu_args+=(-M q35 -accel "tcg,thread=multi" -cpu "max,+svm,+npt,-la57,-erms,-fsrm" -smp "$cpus" -m "$memory"
        -object "memory-backend-memfd,id=ram,size=${memory}M,share=on" -machine "memory-backend=ram"
        -nodefaults -no-user-config -display none -no-reboot
        -kernel "$CACHE/vmlinux" -initrd "$CACHE/lab.cpio"
        -append "$kernel_parameters"
        -chardev "file,id=console,path=$work/console" -serial chardev:console
        -device virtio-rng-pci)
    if [[ $interactive ]]; then
        detached qemu-system-x86_64 "${qemu_args[@]}" -device virtio-serial-pci \
            -chardev stdio,id=terminal,signal=off -device virtconsole,chardev=terminal <&3 2>"$work/qemu.log" &
    else
        detached qemu-system-x86_64 "${qemu_args[@]}" </dev/null >"$work/qemu.log" 2>&1 &
    fi
    qemu=$!
}

# pause SECONDS: a sleep that a signal ends at once.
pause() {
    sleep "$1" &
    wait $!
}

alive() { kill -0 "$1" 2>/dev/null; }

# end_host: ends QEMU and, with it, the virtiofsds.
end_host() {
    local pid
    for pid in $qemu "${servers[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in $qemu "${servers[@]}"; do wait "$pid" 2>/dev/null || true; done
    qemu=''
    servers=()
}

# start_host: boots until the lab host says that it is up.
start_host() {
    local try started
    for ((try = 1; try <= BOOT_TRIES; try++)); do
        started=${EPOCHREALTIME/./}
        boot
        while alive "$qemu" && ((${EPOCHREALTIME/./} - started < boot_timeout * 1000000)); do
            [[ ! -e $work/control/up ]] || break 2
            pause 0.1
        done
        say "the lab host did not come up in $(seconds_since "$started") s (try $try of $BOOT_TRIES)"
        end_host
        tail -n 5 "$work"/{console,qemu.log,virtiofsd.log} >&2 2>/dev/null || true
    done
    ((try <= BOOT_TRIES)) || die "no lab host"
    report "emulated KVM host up in $(seconds_since "$started") s; running: ${command[*]}"
}

# silent: a CPU of the lab host has given no sign of life for too long.
silent() {
    (($(find "$work/control" -name 'beat.*' -newermt "-$SILENCE seconds" 2>/dev/null | wc -l) < cpus))
}

# run_command: shows the output until the command or its time ends; prints nothing else on stdout.
run_command() {
    local started=${EPOCHREALTIME/./} code checks=0 gone='ended before the command did'
    if [[ ! $interactive ]]; then
        detached tail -c +1 -s 0.1 -f --pid="$qemu" "$work/control/output" &
        tail=$!
    fi
    # QEMU made the terminal raw but for this; the lab's terminal has already made "\r\n" of "\n".
    [[ -z $terminal ]] || stty -onlcr <&3
    while alive "$qemu" && ! [[ -e $work/control/code ]]; do
        ((timeout == 0 || ${EPOCHREALTIME/./} - started < timeout * 1000000)) || break
        if ((++checks % 100 == 0)) && silent; then
            gone="has stopped: no sign of life from one of its CPUs for $SILENCE s"
            break
        fi
        pause 0.1
    done
    end_host
    [[ -z $terminal ]] || stty "$terminal" <&3
    # Ends by itself once it has shown everything, as QEMU is gone.
    [[ -z $tail ]] || wait "$tail" || true
    tail=''
    if [[ ! -e $work/control/code ]]; then
        ((timeout == 0 || ${EPOCHREALTIME/./} - started < timeout * 1000000)) ||
            { say "the command took more than $timeout s" && exit "$TIMED_OUT"; }
        tail -n 20 "$work"/{console,qemu.log} >&2 || true
        die "the lab host $gone"
    fi
    code=$(<"$work/control/code")
    report "the command ended with exit code $code after $(seconds_since "$started") s"
    exit "$code"
}

# shellcheck disable=SC2317 # called by the trap
cleanup() {
    trap '' EXIT INT TERM HUP
    end_host
    [[ -z $tail ]] || kill "$tail" 2>/dev/null || true
    [[ -z $terminal ]] || stty "$terminal" <&3 || true
    [[ -z $console || ! -e $work/console ]] || cp "$work/console" "$console"
    [[ -z $work ]] || rm -rf "$work"
}

main() {
    parse_options "$@"
    [[ $always ]] || ! has_kvm || run_directly
    ((EUID == 0)) || die "the lab needs root (virtiofsd serves this machine's files)"
    servers=()
    exec 3<&0
    trap cleanup EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    trap 'exit 129' HUP
    [[ ! $interactive || ! -t 0 ]] || terminal=$(stty -g)
    "$ROOT/resources/guest/build.sh" || die "no guest images"
    CACHE=$(cd "$CACHE" && pwd)
    require_tools flock:util-linux setpriv:util-linux cpio:cpio qemu-system-x86_64:qemu-system-x86
    require_virtiofsd
    work=$(mktemp -d "${TMPDIR:-/tmp}/mayfly-lab.XXXXXX")
    make_initramfs
    write_job
    start_host
    run_command
}

main "$@"

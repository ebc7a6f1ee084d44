# shellcheck shell=bash
# The machine of the demonstration: two CPUs, a root disk, a network card and an entropy device. Sourced by tour.sh and
# shell.sh, in the project root, where KVM is: on this machine or in the lab.
# shellcheck disable=SC2034 # used by the scripts that source this

readonly MAYFLY=$PWD/target/x86_64-unknown-linux-gnu/release/mayfly
readonly IMAGES=${MAYFLY_GUEST_DIR:-$PWD/build/guest}
readonly TAP=mayfly-demo HOST_IP=172.30.77.1 GUEST_IP=172.30.77.2
readonly BOOT_SOURCE='{
    "kernel_image_path": "'$IMAGES'/vmlinux",
    "initrd_path": "'$IMAGES'/initramfs.cpio",
    "boot_args": "console=ttyS0 reboot=k panic=-1 quiet mayfly.ip='$GUEST_IP/24'"
}'
readonly MACHINE='{ "vcpu_count": 2, "mem_size_mib": 256 }'

# prepare: a folder for this run, removed at exit, with a root disk that the guest may write to; and the network tap.
# Sets work, DRIVE and NETWORK (empty without the right to make a tap).
prepare() {
    NETWORK=''
    work=$(mktemp -d /tmp/mayfly-demo.XXXXXX)
    trap cleanup EXIT
    cp --sparse=always "$IMAGES/rootfs.ext4" "$work/rootfs.ext4"
    DRIVE='{ "drive_id": "rootfs", "path_on_host": "'$work'/rootfs.ext4", "is_root_device": true, "is_read_only": false }'
    if ((EUID == 0)); then
        ip link delete "$TAP" 2>/dev/null || true
        ip tuntap add "$TAP" mode tap
        ip addr add "$HOST_IP/24" dev "$TAP"
        ip link set "$TAP" up
        NETWORK='{ "iface_id": "eth0", "host_dev_name": "'$TAP'", "guest_mac": "06:00:ac:1e:4d:02" }'
    else
        echo "(no network card: making a tap needs root)"
    fi
}

cleanup() {
    [[ -z ${monitor:-} ]] || kill "$monitor" 2>/dev/null || true
    [[ -z ${relay:-} ]] || kill "$relay" 2>/dev/null || true
    [[ -z $NETWORK ]] || ip link delete "$TAP" || true
    rm -rf "$work"
}

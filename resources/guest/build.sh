#!/usr/bin/env bash
# Builds the guest images for tests, `make run` and the lab out of Debian packages:
#
#   vmlinux              uncompressed ELF kernel with a PVH note (Debian's cloud kernel)
#   bzImage              the same kernel as Debian packs it
#   initramfs.cpio.gz    busybox, the virtio modules and resources/guest/init; initramfs.cpio is the same, not compressed
#   rootfs.ext4          the same files as a root disk
#   kernel/              the unpacked kernel package, for other modules (the lab uses it)
#
# usage: build.sh [--update | --check-reproducible | --help]
#   --update               look for a newer kernel package (else the one in the cache stays)
#   --check-reproducible   build the images twice from scratch and compare them
# environment: MAYFLY_GUEST_DIR   the cache folder (default: build/guest in the project root)
#
# Does nothing, and needs no network, while the cache is complete and its inputs have not changed. Needs no root but to
# install missing Debian packages.
set -euo pipefail

readonly PROGRAM=guest
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CACHE=${MAYFLY_GUEST_DIR:-$(cd "$HERE/../.." && pwd)/build/guest}
# shellcheck source=resources/guest/lib.sh
. "$HERE/lib.sh"

readonly IMAGES=(vmlinux bzImage initramfs.cpio initramfs.cpio.gz rootfs.ext4)
# Any fixed value will do; it also seeds the directory hashes.
readonly ROOTFS_UUID=6d617966-6c79-4d56-8d00-726f6f746673
readonly ROOTFS_SIZE=64M

usage() { sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; }

# inputs: what the images are made from, as one hash.
inputs() {
    {
        cat "$HERE"/{build.sh,lib.sh,init,console,agent,modules.list}
        cat "$CACHE"/{kernel,busybox}/version
    } 2>/dev/null | sha256sum | cut -d' ' -f1
}

complete() {
    local image
    [[ -e $CACHE/stamp && -e $CACHE/kernel/version && -e $CACHE/busybox/version ]] || return 1
    for image in "${IMAGES[@]}"; do [[ -s $CACHE/$image ]] || return 1; done
    [[ $(<"$CACHE/stamp") == "$(inputs)" ]]
}

# fetch_packages UPDATE: the kernel and busybox into the cache, if they are not there (or are outdated, with UPDATE).
fetch_packages() {
    local kernel
    if [[ $1 && $EUID == 0 ]]; then apt update || die "apt-get update failed"; fi
    if [[ $1 || ! -e $CACHE/kernel/version ]]; then
        kernel=$(cloud_kernel_package)
        outdated kernel "$kernel" && unpack_package "$kernel" "$CACHE/kernel"
    fi
    if [[ $1 || ! -e $CACHE/busybox/version ]]; then
        outdated busybox busybox-static && unpack_package busybox-static "$CACHE/busybox"
    fi
    return 0
}

# outdated NAME PACKAGE: the cache has another version of PACKAGE under NAME than apt would install, or none.
outdated() {
    [[ ! -e $CACHE/$1/version ]] ||
        [[ $(<"$CACHE/$1/version") != $'Package: '"$2"$'\nVersion: '"$(package_field "$2" Version)" ]]
}

# make_kernel OUT: bzImage, and the vmlinux inside it. The setup header says where the payload is (Linux boot protocol
# 2.08: payload_offset 0x248, payload_length 0x24c, setup_sects 0x1f1); its last 4 bytes are the unpacked size.
make_kernel() {
    local offset length sectors
    cp "$CACHE"/kernel/boot/vmlinuz-* "$1/bzImage"
    sectors=$(od -An -tu1 -j $((0x1f1)) -N1 "$1/bzImage")
    read -r offset length < <(od -An -tu4 -j $((0x248)) -N8 "$1/bzImage")
    offset=$((offset + (sectors + 1) * 512))
    tail -c +$((offset + 1)) "$1/bzImage" | head -c $((length - 4)) >"$1/payload" || true
    decompress "$1/payload" >"$1/vmlinux"
    rm "$1/payload"
    [[ $(head -c4 "$1/vmlinux") == $'\x7fELF' ]] || die "the kernel package's bzImage holds no ELF kernel"
}

# make_tree TREE: the files of the guest. The initramfs and the root disk have the same.
make_tree() {
    local applet
    mkdir -p "$1"/{bin,sbin,dev,etc/acpi/PWRF,newroot,proc,root,run,sys,tmp}
    add_modules "$CACHE/kernel" "$1" "$HERE/modules.list"
    cp "$BUSYBOX" "$1/bin/busybox"
    for applet in $("$BUSYBOX" --list); do
        [[ $applet == busybox ]] || ln -s busybox "$1/bin/$applet"
    done
    # The kernel loads modules on demand through this path.
    ln -s ../bin/busybox "$1/sbin/modprobe"
    cp "$HERE/init" "$1/sbin/init"
    cp "$HERE/console" "$1/sbin/mayfly-console"
    cp "$HERE/agent" "$1/sbin/mayfly-agent"
    ln -s sbin/init "$1/init"
    printf '#!/bin/sh\nexec poweroff\n' >"$1/etc/acpi/PWRF/00000080"
    chmod +x "$1/etc/acpi/PWRF/00000080"
    printf '%s\n' 'sys /sys sysfs' 'pts /dev/pts devpts' 'shm /dev/shm tmpfs' \
        'run /run tmpfs' 'tmp /tmp tmpfs' >"$1/etc/fstab"
    echo 'root::0:0:root:/root:/bin/sh' >"$1/etc/passwd"
    echo 'root:x:0:' >"$1/etc/group"
}

# make_rootfs TREE FILE: an ext4 image. mke2fs copies owner and change time from TREE, which differ with the user and
# the moment: debugfs sets them.
make_rootfs() {
    local -x E2FSPROGS_FAKE_TIME=$EPOCH SOURCE_DATE_EPOCH=$EPOCH PATH=$PATH:/usr/sbin:/sbin
    settle "$1"
    truncate -s "$ROOTFS_SIZE" "$2"
    mke2fs -q -t ext4 -b 4096 -I 256 -m 0 -L mayfly-root -U "$ROOTFS_UUID" \
        -E "root_owner=0:0,hash_seed=$ROOTFS_UUID,lazy_itable_init=0,nodiscard" -d "$1" "$2"
    (cd "$1" && find . | sed 's/^\.$//; s/^\.//' | sort) | while read -r path; do
        printf 'sif "%s" %s\n' "${path:-/}" 'uid 0' "${path:-/}" 'gid 0' "${path:-/}" "ctime @$EPOCH" \
            "${path:-/}" "atime @$EPOCH"
    done >"$1.debugfs"
    debugfs -w -f "$1.debugfs" "$2" >/dev/null 2>"$1.log" || die "debugfs failed: $(tail -1 "$1.log")"
    rm "$1.debugfs" "$1.log"
}

# make_images OUT: every image into the folder OUT.
make_images() {
    mkdir -p "$1/tree"
    say "unpacking the kernel"
    make_kernel "$1"
    say "packing the initramfs and the root disk"
    make_tree "$1/tree"
    pack_cpio "$1/tree" "$1/initramfs.cpio"
    gzip -9 -n -c "$1/initramfs.cpio" >"$1/initramfs.cpio.gz"
    make_rootfs "$1/tree" "$1/rootfs.ext4"
    rm -r "$1/tree"
}

# build: images are made aside and moved into place; the stamp, which makes them count, comes last.
build() {
    local tmp image
    tmp=$(mktemp -d "$CACHE/tmp.XXXXXX")
    # shellcheck disable=SC2064 # the folder is fixed now
    trap "rm -rf '$tmp'" EXIT
    make_images "$tmp"
    rm -f "$CACHE/stamp"
    for image in "${IMAGES[@]}"; do mv -f "$tmp/$image" "$CACHE/$image"; done
    inputs >"$tmp/stamp"
    mv "$tmp/stamp" "$CACHE/stamp"
    say "built in $CACHE: $(cd "$CACHE" && du -h "${IMAGES[@]}" | awk '{ printf "%s%s %s", sep, $2, $1; sep = ", " }')"
}

# check_reproducible: two builds, on different file systems if possible, give the same bytes.
check_reproducible() {
    local first second
    first=$(mktemp -d "$CACHE/tmp.XXXXXX")
    second=$(mktemp -d -p "$([[ -w /dev/shm ]] && echo /dev/shm || echo "$CACHE")")
    # shellcheck disable=SC2064 # the folders are fixed now
    trap "rm -rf '$first' '$second'" EXIT
    make_images "$first"
    # Another second, so that a time that slipped in shows.
    sleep 1.1
    make_images "$second"
    diff <(cd "$first" && sha256sum -- *) <(cd "$second" && sha256sum -- *) >&2 || die "the builds differ"
    say "reproducible: two builds gave the same images"
    (cd "$first" && sha256sum -- *)
}

main() {
    local update='' check=''
    case ${1:-} in
        '') ;;
        --update) update=1 ;;
        --check-reproducible) check=1 ;;
        -h | --help) usage && exit ;;
        *) die "unknown option $1 (try --help)" ;;
    esac
    mkdir -p "$CACHE"
    CACHE=$(cd "$CACHE" && pwd)
    BUSYBOX=$CACHE/busybox/bin/busybox
    [[ $update || $check ]] || ! complete || exit 0
    require_tools flock:util-linux apt-get:apt dpkg-deb:dpkg cpio:cpio lz4:lz4 mke2fs:e2fsprogs debugfs:e2fsprogs
    exec 9>"$CACHE/lock"
    flock -n 9 || { say "waiting for another build"; flock 9; }
    # Left by a build that was killed.
    rm -rf "$CACHE"/tmp.* "$CACHE"/{kernel,busybox}.??????
    fetch_packages "$update"
    if [[ $check ]]; then
        check_reproducible
    elif ! complete; then
        build
    fi
}

main "$@"

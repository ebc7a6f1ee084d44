#!/usr/bin/env bash
# Builds tools.ext4, a disk that tests attach to a guest: programs of Debian packages with the libraries that they need,
# which the small guest images do not have. The guest mounts it anywhere and calls its scripts: fio, mke2fs, e2fsck,
# blkdiscard.
#
# usage: tools.sh [--help]
# environment: MAYFLY_GUEST_DIR   the cache folder (default: build/guest in the project root)
#
# Does nothing, and needs no network, while the cache is complete and this script has not changed. Packages stay in the
# cache as they are; to get newer ones remove its folder tools/.
set -euo pipefail

readonly PROGRAM=tools
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CACHE=${MAYFLY_GUEST_DIR:-$(cd "$HERE/../.." && pwd)/build/guest}
# shellcheck source=resources/guest/lib.sh
. "$HERE/lib.sh"

# What tests call, by package.
readonly -A PROGRAMS=([fio]=usr/bin/fio [mke2fs]=sbin/mke2fs [e2fsck]=sbin/e2fsck [blkdiscard]=sbin/blkdiscard)
readonly PACKAGES=(fio e2fsprogs util-linux)
# The loader of programs is found as the library that it also is.
readonly LOADER=ld-linux-x86-64.so.2

usage() { sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; }

# inputs: what the disk is made from, as one hash.
inputs() {
    cat "$HERE"/{tools.sh,lib.sh} "$CACHE"/tools/*/version | sha256sum | cut -d' ' -f1
}

complete() {
    [[ -s $CACHE/tools.ext4 && -e $CACHE/tools.stamp ]] && [[ $(<"$CACHE/tools.stamp") == "$(inputs)" ]]
}

# depends PACKAGE...: the libraries among what packages need, one a line.
depends() {
    (cd "$CACHE/tools" && sed -n 's/^\(Pre-\)\?Depends: //p' "${@/%//version}") | tr ',' '\n' |
        sed 's/|.*//; s/(.*//; s/:.*//; s/ //g' | grep -E '^(lib|zlib)' | sort -u
}

# unpack_packages PACKAGE...: downloads packages, all by one call of apt, and unpacks them into folders of their own.
unpack_packages() {
    local tmp deb
    say "downloading $# packages: $*"
    tmp=$(mktemp -d "$CACHE/tools.XXXXXX")
    # As part of a condition it does not end by itself where something fails.
    (
        cd "$tmp" || exit
        apt download "$@" || { ((EUID == 0)) && apt update && apt download "$@"; } ||
            die "cannot download them (stale package lists? as root: apt-get update)"
        for deb in ./*.deb; do
            dpkg -x "$deb" tree || exit
            dpkg-deb -f "$deb" Package Version Pre-Depends Depends >tree/version || exit
            mv tree "$CACHE/tools/$(dpkg-deb -f "$deb" Package)" || exit
        done
    ) || exit 1
    rm -r "$tmp"
}

# shared_libraries FILE: the names of the libraries that an ELF file asks for.
shared_libraries() { readelf -d "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]$/\1/p'; }

# close_over: follows what the programs ask for through the packages at hand. Sets `used` (a library's name to its file)
# and `unknown` (names that no package has yet).
close_over() {
    local file name queue=()
    local -A index=()
    used=() unknown=()
    # A file goes before a link of its name, which may lead out of the package.
    while read -r file; do index[${file##*/}]=$file; done < <(
        find "$CACHE/tools" -name '*.so*' -type l
        find "$CACHE/tools" -name '*.so*' -type f
    )
    for name in "${PROGRAMS[@]}"; do queue+=("$(echo "$CACHE"/tools/*/"$name")"); done
    while ((${#queue[@]})); do
        file=${queue[0]}
        queue=("${queue[@]:1}")
        for name in $(shared_libraries "$file"); do
            [[ -z ${used[$name]:-} ]] || continue
            if [[ -z ${index[$name]:-} ]]; then
                unknown+=("$name")
            else
                used[$name]=$(realpath "${index[$name]}")
                queue+=("${used[$name]}")
            fi
        done
    done
}

# fetch_packages: the programs' packages, and level by level those that have their libraries.
fetch_packages() {
    local package found level=("${PACKAGES[@]}") missing
    mkdir -p "$CACHE/tools"
    know_package "${PACKAGES[0]}"
    while :; do
        missing=()
        for package in "${level[@]}"; do [[ -e $CACHE/tools/$package/version ]] || missing+=("$package"); done
        ((${#missing[@]} == 0)) || unpack_packages "${missing[@]}"
        close_over
        ((${#unknown[@]})) || return 0
        ((${#missing[@]})) || die "no package has ${unknown[*]}"
        # Only a package that has a library in use is asked what it needs.
        mapfile -t found < <(printf '%s\n' "${used[@]#"$CACHE/tools/"}" | grep -o '^[^/]\+' | sort -u)
        mapfile -t level < <(depends "${PACKAGES[@]}" "${found[@]}")
    done
}

# make_tree TREE: the programs under bin/, the libraries under lib/, and a script for each program that puts both together.
make_tree() {
    local name file
    mkdir -p "$1"/{bin,lib}
    for name in "${!used[@]}"; do cp "${used[$name]}" "$1/lib/$name"; done
    for name in "${!PROGRAMS[@]}"; do
        cp "$CACHE"/tools/*/"${PROGRAMS[$name]}" "$1/bin/$name"
        # shellcheck disable=SC2016 # for the guest's shell
        printf '#!/bin/sh\nhere=${0%%/*}\nexec "$here/lib/%s" --library-path "$here/lib" "$here/bin/%s" "$@"\n' \
            "$LOADER" "$name" >"$1/$name"
        chmod +x "$1/$name"
    done
    settle "$1"
}

build() {
    local tmp size
    local -A used=()
    local unknown=()
    fetch_packages
    tmp=$(mktemp -d "$CACHE/tools.XXXXXX")
    # shellcheck disable=SC2064 # the folder is fixed now
    trap "rm -rf '$tmp'" EXIT
    say "packing ${!PROGRAMS[*]} and ${#used[@]} libraries"
    make_tree "$tmp/tree"
    size=$(du -sm "$tmp/tree" | cut -f1)
    # Nobody writes to it, so it has no journal and little room.
    truncate -s "$((size + size / 8 + 4))M" "$tmp/tools.ext4"
    PATH=$PATH:/usr/sbin:/sbin mke2fs -q -t ext4 -b 4096 -m 0 -L mayfly-tools -O ^has_journal -d "$tmp/tree" \
        "$tmp/tools.ext4"
    mv "$tmp/tools.ext4" "$CACHE/tools.ext4"
    inputs >"$tmp/stamp"
    mv "$tmp/stamp" "$CACHE/tools.stamp"
    say "built $CACHE/tools.ext4: $(du -h "$CACHE/tools.ext4" | cut -f1)"
}

main() {
    case ${1:-} in
        '') ;;
        -h | --help) usage && exit ;;
        *) die "unknown option $1 (try --help)" ;;
    esac
    mkdir -p "$CACHE"
    CACHE=$(cd "$CACHE" && pwd)
    ! complete 2>/dev/null || exit 0
    require_tools flock:util-linux apt-get:apt dpkg-deb:dpkg mke2fs:e2fsprogs readelf:binutils
    exec 9>"$CACHE/tools.lock"
    flock -n 9 || { say "waiting for another build"; flock 9; }
    # Left by a build that was killed.
    rm -rf "$CACHE"/tools.??????
    complete 2>/dev/null || build
}

main "$@"

# shellcheck shell=bash
# Shared by resources/guest/build.sh and tests/lab/lab.sh: host tools, Debian packages, kernel modules, cpio archives.
# Sourced, never run. Everything is reported on stderr under $PROGRAM.

# All timestamps in the images (2024-01-01 00:00:00 UTC), so that the same inputs give the same bytes.
readonly EPOCH=1704067200
# Sorting must not depend on the user's locale.
export LC_ALL=C

say() { printf '%s: %s\n' "$PROGRAM" "$*" >&2; }

die() {
    say "error: $*"
    exit 1
}

# has_kvm: hardware virtualization, and the right to use it.
has_kvm() { grep -qwE 'vmx|svm' /proc/cpuinfo && { : <>/dev/kvm; } 2>/dev/null; }

apt() { apt-get -qq -o APT::Sandbox::User=root "$@" >&2; }

# require_tools COMMAND:PACKAGE...: installs the packages whose command is missing (root), or names them and stops.
require_tools() {
    local spec missing=()
    for spec in "$@"; do
        PATH=$PATH:/usr/sbin:/sbin command -v "${spec%%:*}" >/dev/null || missing+=("${spec##*:}")
    done
    ((${#missing[@]} == 0)) || install_packages "${missing[@]}"
}

# install_packages PACKAGE...
install_packages() {
    ((EUID == 0)) || die "missing Debian packages: $* (as root: apt-get install $*)"
    say "installing Debian packages: $*"
    apt update || die "apt-get update failed: is the Debian package mirror reachable?"
    DEBIAN_FRONTEND=noninteractive apt install -y --no-install-recommends "$@" || die "cannot install $*"
}

# python_environment REQUIREMENTS: makes a virtual environment with the packages that the file pins, unless it is
# there, and prints its folder.
python_environment() {
    local folder stamp
    require_tools python3:python3
    python3 -c 'import ensurepip, venv' 2>/dev/null || install_packages python3-venv
    stamp=$(python3 --version && cat "$1")
    folder=$PWD/build/python/$(sha256sum <<<"$stamp" | cut -c -16)
    if [[ ! -e $folder/complete ]]; then
        say "making a Python environment of $1"
        rm -rf "$folder"
        python3 -m venv "$folder"
        "$folder/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "$1" >&2 ||
            die "cannot install the packages of $1: is the Python package index reachable?"
        "$folder/bin/pip" check --quiet >&2 || die "$1 does not name all packages that it needs"
        touch "$folder/complete"
    fi
    echo "$folder"
}

# package_field PACKAGE FIELD: a field of the version that apt would install; fails if apt does not know the package.
package_field() {
    apt-cache show --no-all-versions "$1" 2>/dev/null | sed -n "s/^$2: //p" | grep -m1 .
}

# know_package PACKAGE: refreshes apt's package lists if they do not have the package.
know_package() {
    package_field "$1" Version >/dev/null && return
    ((EUID == 0)) || die "apt does not know the package $1 (as root: apt-get update; needs a Debian mirror)"
    say "refreshing the package lists"
    apt update || die "apt-get update failed: is the Debian package mirror reachable?"
    package_field "$1" Version >/dev/null || die "the configured package mirrors do not have $1: add a Debian mirror"
}

# unpack_package PACKAGE DIR: downloads and unpacks a package into DIR, without installing it. DIR/version appears
# with the rest or not at all.
unpack_package() {
    local package=$1 dir=$2 tmp size
    know_package "$package"
    size=$(package_field "$package" Size)
    say "downloading $package $(package_field "$package" Version) ($(((size + 1048575) / 1048576)) MiB)"
    tmp=$(mktemp -d "$dir.XXXXXX")
    # As part of a condition it does not end by itself where something fails.
    (
        cd "$tmp" || exit
        # Stale package lists name files that the mirror has replaced.
        apt download "$package" || { ((EUID == 0)) && apt update && apt download "$package"; } ||
            die "cannot download $package (stale package lists? as root: apt-get update)"
        dpkg -x ./*.deb . || exit
        dpkg-deb -f ./*.deb Package Version >version || exit
        rm ./*.deb
    ) || { rm -rf "$tmp"; exit 1; }
    rm -rf "$dir"
    mv "$tmp" "$dir"
}

# cloud_kernel_package: the real package behind Debian's linux-image-cloud-amd64, e.g. linux-image-6.1.0-9-cloud-amd64.
cloud_kernel_package() {
    local depends
    know_package linux-image-cloud-amd64
    depends=$(package_field linux-image-cloud-amd64 Depends)
    [[ $depends =~ (linux-image-[0-9][^ ,]*) ]] || die "linux-image-cloud-amd64 names no kernel: $depends"
    printf '%s\n' "${BASH_REMATCH[1]}"
}

# decompress FILE: to stdout, whatever the kernel packagers used. lz4 reports the size field that follows the
# payload of a bzImage as trailing garbage; the caller has cut it off.
decompress() {
    case $(od -An -tx1 -N4 "$1" | tr -d ' ') in
        02214c18) lz4 -dc "$1" ;;
        1f8b*) gzip -dc <"$1" ;;
        28b52ffd) require_tools zstd:zstd && zstd -dcq <"$1" ;;
        fd377a58) require_tools xz:xz-utils && xz -dc <"$1" ;;
        *) cat "$1" ;;
    esac
}

# add_modules KERNEL_DIR TREE LIST: puts the modules named in LIST (one a line; "?" after a name: optional) with all
# they depend on into TREE/lib/modules/VERSION, with what modprobe needs, and the names in order in TREE/etc/modules.
add_modules() {
    local kernel=$1 tree=$2 list=$3 version out path name
    local -A index=() seen=()
    version=$(cd "$kernel/lib/modules" && echo *)
    out=$tree/lib/modules/$version
    mkdir -p "$out" "$tree/etc"
    while read -r path; do
        name=${path##*/}
        name=${name%%.ko*}
        index[${name//-/_}]=$path
    done < <(find "$kernel/lib/modules" -name '*.ko*')
    while read -r name; do
        add_module "${name%\?}" "$name" && echo "${name%\?}"
    done < <(sed 's/#.*//; s/[[:space:]]//g; /^$/d' "$list") >"$tree/etc/modules"
    "$BUSYBOX" depmod -b "$tree" "$version"
    rm -f "$out"/modules.symbols
    for path in "$out"/modules.*; do sort -o "$path" "$path"; done
}

# add_module NAME WANTED: add_modules for one name; fails if the name is built in or an absent optional one.
add_module() {
    local name=${1//-/_} path depends dependency
    [[ -z ${seen[$name]:-} ]] || return 0
    path=${index[$name]:-}
    if [[ -z $path ]]; then
        grep -qE "/${name//_/[-_]}\.ko" "$kernel/lib/modules/$version/modules.builtin" && return 1
        [[ $2 == *\? ]] && return 1
        die "the kernel package has no module $1"
    fi
    seen[$name]=1
    decompress "$path" >"$out/$1.ko" || die "cannot unpack $path"
    drop_signature "$out/$1.ko"
    depends=$(tr '\0' '\n' <"$out/$1.ko" | sed -n 's/^depends=//p' | tr ',' ' ')
    for dependency in $depends; do add_module "$dependency" "$dependency" || true; done
}

# drop_signature MODULE: cuts off the signature that the kernel would check at every load (a hash over the module, slow
# in an emulated host). Layout at the end of the file: signature, 12 bytes of which the last 4 are the signature's
# length (big endian), a fixed line of 28 bytes.
drop_signature() {
    local length
    [[ $(tail -c 28 "$1") == '~Module signature appended~' ]] || return 0
    length=$((0x$(tail -c 32 "$1" | od -An -tx1 -N4 | tr -d ' ')))
    truncate -s -$((length + 40)) "$1"
}

# settle TREE: one timestamp and predictable permissions for everything in TREE.
settle() {
    chmod -R u=rwX,go=rX "$1"
    find "$1" -exec touch -h -d "@$EPOCH" {} +
}

# pack_cpio TREE FILE: an initramfs archive owned by root that depends on TREE's contents only.
pack_cpio() {
    settle "$1"
    (cd "$1" && find . -print0 | sort -z | cpio --quiet -0 -o -H newc --reproducible -R 0:0) >"$2"
}

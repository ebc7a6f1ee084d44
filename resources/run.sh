#!/usr/bin/env bash
# `make run`: installs what is missing, builds, makes the guest images and boots a guest, on this machine if it has KVM,
# else in the lab. On a terminal it leaves you in the guest's shell; without one it shows the guest and the API, and ends.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck disable=SC2034 # lib.sh reports under this name
readonly PROGRAM=run
# shellcheck source=resources/guest/lib.sh
. resources/guest/lib.sh

command -v cargo >/dev/null || die "Rust is missing: install it with rustup"
require_tools cc:gcc curl:curl ip:iproute2
say "building mayfly (minutes at the first time)"
cargo build --release --locked
resources/guest/build.sh
if [[ -t 0 && -t 1 ]]; then
    mkdir -p build/run
    exec tests/lab/lab.sh --interactive --timeout 0 --share-out build/run -- resources/demo/shell.sh
fi
for try in 1 2 3; do
    code=0
    tests/lab/lab.sh -- resources/demo/tour.sh || code=$?
    # The lab's own failure: an emulated host can die of a fault in the emulation.
    ((code == 125)) || exit "$code"
    say "the emulated host died (try $try of 3)"
done
exit 1

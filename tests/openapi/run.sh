#!/usr/bin/env bash
# Tests the real binary against resources/openapi.yaml: made-up requests by schemathesis, every bad input that follows
# from the schemas, and whether the document has every route. Needs root and some /dev/kvm, else it uses the lab.
#
# usage: run.sh [PYTEST_ARGUMENT...]
# environment: MAYFLY_BIN   the binary (default: the release build)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly PROGRAM=openapi
# shellcheck source=resources/guest/lib.sh
. resources/guest/lib.sh

# prepare: what the lab cannot make, as it has no network and forgets what is written.
prepare() {
    MAYFLY_PYTHON=$(python_environment tests/openapi/requirements.txt)/bin/python
    MAYFLY_TINY_KERNEL=$PWD/build/tiny-kernel
    cargo run --quiet --locked -p mayfly-tests --example tiny-kernel -- "$MAYFLY_TINY_KERNEL"
    export MAYFLY_PYTHON MAYFLY_TINY_KERNEL
    export MAYFLY_BIN=${MAYFLY_BIN:-$PWD/target/x86_64-unknown-linux-gnu/release/mayfly}
    [[ -x $MAYFLY_BIN ]] || die "no binary $MAYFLY_BIN: run \`make build\`, or set MAYFLY_BIN"
}

main() {
    ((EUID == 0)) || die "needs root: the tests make network taps, in a network of their own"
    [[ ${MAYFLY_TINY_KERNEL:-} ]] || prepare
    if ! { : <>/dev/kvm; } 2>/dev/null; then
        say "no /dev/kvm here: using the lab"
        exec tests/lab/lab.sh -- "$0" "$@"
    fi
    # Made-up names of network cards must not meet those of this machine.
    exec unshare --net "$MAYFLY_PYTHON" -B -m pytest -v -p no:cacheprovider --tb=short --show-capture=no \
        tests/openapi "$@"
}

main "$@"

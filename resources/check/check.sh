#!/usr/bin/env bash
# `make check`: everything that needs no guest. Stops at the first step that fails.
# environment: FUZZ_SECONDS   how long each fuzz target runs (default 5)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly PROGRAM=check
# shellcheck source=resources/guest/lib.sh
. resources/guest/lib.sh

# step WHAT COMMAND...
step() {
    local started=$SECONDS
    say "$1"
    "${@:2}" || die "$1: failed"
    say "$1: ok ($((SECONDS - started)) s)"
}

lint_docs() { RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --locked --quiet; }

# unchanged STATUS: nothing above has left a file behind.
unchanged() { [[ -n $1 ]] || [[ -z $(git status --porcelain | tee /dev/stderr) ]]; }

main() {
    local before
    before=$(git status --porcelain)
    # The checks of CI start from what was committed.
    [[ -z ${CI:-} || -z $before ]] || die "the work tree is not clean: $before"
    require_tools cc:gcc git:git
    step "file lengths" resources/check/file-lengths.sh
    step "formatting" cargo fmt --all --check
    step "lints" cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
    step "documentation" lint_docs
    step "unit tests" cargo test --workspace --lib --locked --quiet
    step "examples in the documentation" cargo test --workspace --doc --locked --quiet
    step "fuzz targets" tests/fuzz/run.sh "${FUZZ_SECONDS:-5}"
    step "git status" unchanged "$before"
    say "all checks passed in $SECONDS s"
}

main "$@"

#!/usr/bin/env bash
# Fails if a Rust file has more than 600 lines.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly LIMIT=600

long=$(git ls-files -z --cached --others --exclude-standard '*.rs' | xargs -0 -r wc -l |
    awk -v limit="$LIMIT" '$2 != "total" && $1 > limit { printf "  %s: %d lines\n", $2, $1 }')
[[ -z $long ]] || { printf 'files of more than %d lines (split them):\n%s\n' "$LIMIT" "$long" >&2 && exit 1; }

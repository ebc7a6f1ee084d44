#!/usr/bin/env bash
# Boots a guest and leaves this terminal in its shell. First prints what to try from a second terminal.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# shellcheck source=resources/demo/machine.sh
. resources/demo/machine.sh

# In the lab the socket is out of reach of a second terminal: lab-curl carries requests there through a folder.
hints() {
    local curl="curl --unix-socket $socket"
    [[ -z ${MAYFLY_LAB:-} ]] || curl=resources/demo/lab-curl
    cat <<END

The guest boots on this terminal; \`poweroff\` in its shell ends it. From a second terminal, in $PWD, try:

  $curl http://localhost/
  $curl http://localhost/vm/config
  $curl -X PATCH -d '{"state":"Paused"}' http://localhost/vm
  $curl -X PATCH -d '{"state":"Resumed"}' http://localhost/vm
  $curl -X PUT -d '{"action_type":"PowerButton"}' http://localhost/actions

END
    [[ -z ${MAYFLY_LAB:-} ]] ||
        printf '(This CPU has no vmx or svm, so all of this runs in an emulated host; lab-curl passes the request to curl in it.)\n\n'
}

prepare
socket=/tmp/mayfly.sock
cat >"$work/config.json" <<END
{
  "machine-config": $MACHINE,
  "boot-source": $BOOT_SOURCE,
  "drives": [$DRIVE],
  "network-interfaces": [$NETWORK],
  "entropy": {}
}
END
if [[ ${MAYFLY_LAB:-} ]]; then
    resources/demo/lab-curl --serve "$socket" &
    relay=$!
fi
hints
"$MAYFLY" --api-sock "$socket" --config-file "$work/config.json" --id demo --log-path "$work/log" || {
    code=$?
    tail -n 5 "$work/log" >&2
    exit "$code"
}

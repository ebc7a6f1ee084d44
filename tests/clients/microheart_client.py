"""The package microheart drives Mayfly as it drives Firecracker. Two things of its machines are other here: the guest's
kernel needs an initramfs, and the guest has no SSH: a ping, and Ctrl-Alt-Del by the package's own client of the API,
stand in for the two commands that microheart itself runs over SSH.
"""

import os
import subprocess
import sys
import time

from microheart import api
from microheart.vm import MicroVM


class Guest(MicroVM):
    def config(self, disk):
        config = super().config(disk)
        boot = config["boot-source"]
        boot["initrd_path"] = os.environ["CLIENT_INITRAMFS"]
        boot["boot_args"] += f" quiet mayfly.ip={self.guest_ip}/30 mayfly.gw={self.host_ip}"
        return config

    def ssh(self, command, check=True, timeout=30):
        if command == "reboot":
            api.request(self.sock, "PUT", "/actions", {"action_type": "SendCtrlAltDel"})
        busybox = os.environ["CLIENT_BUSYBOX"]
        return subprocess.run([busybox, "ping", "-q", "-c", "1", "-W", "2", self.guest_ip], check=check)


vm = Guest("mayfly", rootfs=sys.argv[1], key="/dev/null", mem_mib=128)
assert vm.start(wait=180) is not None
assert vm.running()
assert vm.machine_config()["mem_size_mib"] == 128
assert api.request(vm.sock, "GET", "/")["state"] == "Running"
api.request(vm.sock, "PATCH", "/vm", {"state": "Paused"})
assert api.request(vm.sock, "GET", "/")["state"] == "Paused"
assert vm.ssh("true", check=False).returncode != 0, "a paused guest answers"
api.request(vm.sock, "PATCH", "/vm", {"state": "Resumed"})
deadline = time.monotonic() + 60
while vm.ssh("true", check=False).returncode != 0:
    assert time.monotonic() < deadline, "a resumed guest does not answer"
try:
    api.request(vm.sock, "PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 256})
    raise AssertionError("the size of a running machine was changed")
except RuntimeError as refusal:
    assert "not supported after starting" in str(refusal), refusal
vm.clean()
assert not os.path.exists(vm.sock) and not vm.dir.exists()

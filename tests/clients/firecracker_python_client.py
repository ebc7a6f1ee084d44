"""The package firecracker-python drives Mayfly as it drives Firecracker. What it wants of the world outside is not
there: a Docker daemon, which it connects to even where no image is asked for, and its public address. Its packet filter
is left out too: that needs Python bindings of nftables which are not among its requirements.
"""

import json
import os
import subprocess
import sys
import time
from unittest import mock

from firecracker import microvm

# Where its defaults are looked for.
DATA = os.environ["CLIENT_DATA"]
ADDRESS = "172.30.5.2"


def answers():
    busybox = os.environ["CLIENT_BUSYBOX"]
    ping = [busybox, "ping", "-q", "-c", "1", "-W", "2", ADDRESS]
    return subprocess.run(ping, check=False, stdout=subprocess.DEVNULL).returncode == 0


def wait_until_it_answers():
    deadline = time.monotonic() + 180
    while not answers():
        assert time.monotonic() < deadline, "the guest does not answer"


class Config(microvm.MicroVMConfig):
    def __init__(self):
        super().__init__(data_path=DATA, binary_path=os.environ["CLIENT_FIRECRACKER"], snapshot_path=DATA)


class Guest(microvm.MicroVM):
    """Tells the guest images what they ask for, besides the package's own `pci=off` and more."""

    @property
    def _boot_args(self):
        return super()._boot_args + f" quiet root=/dev/vda rw mayfly.ip={ADDRESS}/24"


def main():
    vm = Guest(
        name="mayfly",
        kernel_file=os.environ["CLIENT_KERNEL"],
        initrd_file=os.environ["CLIENT_INITRAMFS"],
        base_rootfs=sys.argv[1],
        vcpu=2,
        memory=160,
        ip_addr=ADDRESS,
        vsock_enabled=True,
        vsock_guest_cid=3,
        level="INFO",
    )
    assert vm.create().endswith("created")
    wait_until_it_answers()
    config = vm.config()
    config = json.loads(config) if isinstance(config, str) else config
    assert config["machine-config"]["mem_size_mib"] == 160, config
    assert config["vsock"]["guest_cid"] == 3, config
    assert vm.pause().endswith("paused successfully")
    assert vm._vmm.get_vmm_state(vm._microvm_id) == "Paused"
    assert not answers(), "a paused guest answers"
    assert vm.resume().endswith("resumed successfully")
    wait_until_it_answers()
    vm._api.network.patch(iface_id=vm._iface_name, tx_rate_limiter={"ops": {"size": 100, "refill_time": 100}})
    assert vm.delete().endswith("is deleted")
    assert not os.path.exists(vm._socket_file)


with (
    mock.patch("docker.from_env"),
    mock.patch("firecracker.microvm.get_public_ip", return_value="192.0.2.1"),
    mock.patch("firecracker.network.NetworkManager.create_masquerade"),
    mock.patch("firecracker.network.NetworkManager.delete_masquerade"),
    mock.patch("firecracker.network.NetworkManager.delete_all_port_forward"),
    mock.patch("firecracker.microvm.MicroVMConfig", Config),
    mock.patch("firecracker.vmm.MicroVMConfig", Config),
    mock.patch("firecracker.process.MicroVMConfig", Config),
):
    main()

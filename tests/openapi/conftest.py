"""The machines that the tests talk to: one before its start, one after it. What tests do to them stays done."""

import os
import shutil
from pathlib import Path

import pytest
from bodies import Maker
from document import operations
from machine import Machine


@pytest.fixture(scope="session")
def new_machine(tmp_path_factory):
    """Makes machines that are not started; with nothing set, or with all that can be set. With `but`, which others may
    need, nothing from that operation on is set."""
    machines = []

    def make(name, configured=False, but=None):
        folder = tmp_path_factory.mktemp(name)
        shutil.copy(os.environ["MAYFLY_TINY_KERNEL"], folder / "kernel")
        machine = Machine(folder)
        machines.append(machine)
        puts = [operation for operation in operations() if operation.configures]
        for operation in puts if configured else []:
            if operation == but:
                break
            body = Maker(operation, folder).good()
            machine.do("PUT", operation.url(body), body)
        return machine

    yield make
    for machine in machines:
        machine.stop()


@pytest.fixture(scope="session")
def machine_before(new_machine):
    """Not started, nothing set."""
    return new_machine("before")


@pytest.fixture(scope="session")
def machine_after(new_machine):
    """Runs a guest that sleeps, and has all that can be set before the start."""
    machine = new_machine("after", configured=True)
    machine.do("PUT", "/actions", {"action_type": "InstanceStart"})
    return machine


@pytest.fixture(params=["before", "after"])
def state(request):
    """The name of a state."""
    return request.param


@pytest.fixture
def machine(state, machine_before, machine_after):
    """The machine in that state; it must live on."""
    machine = {"before": machine_before, "after": machine_after}[state]
    yield machine
    machine.check_alive()


@pytest.fixture(autouse=True)
def in_scratch_folder(tmp_path_factory, monkeypatch):
    """Keeps files of the test tools out of the source tree."""
    monkeypatch.chdir(Path(tmp_path_factory.getbasetemp()))

//! The ways in which a machine with a Linux guest ends: always with exit code 0, and with nothing left behind.

use mayfly_tests::{Result, TestVm, Vm};

fn assert_ends_well(vm: &Vm) -> Result {
    let code = vm.wait_exit()?;
    assert_eq!(code, 0, "{:?}", vm.failure("exit code"));
    assert!(!vm.socket().exists());
    assert!(vm.log().contains("exit_code=0"));
    Ok(())
}

#[test]
fn the_power_button_stops_the_guest_in_order() -> Result {
    let vm = TestVm::new("button").boot()?;
    vm.action("PowerButton")?;
    assert_ends_well(&vm)
}

#[test]
fn the_power_button_works_on_mmio_with_two_processors() -> Result {
    let vm = TestVm::new("button-mmio").mmio().vcpus(2).boot()?;
    vm.action("PowerButton")?;
    assert_ends_well(&vm)
}

#[test]
fn ctrl_alt_del_restarts_the_guest_which_ends_the_machine() -> Result {
    let vm = TestVm::new("keys").boot()?;
    vm.action("SendCtrlAltDel")?;
    assert_ends_well(&vm)
}

#[test]
fn a_reboot_by_the_guest_ends_the_machine() -> Result {
    let vm = TestVm::new("reboot").vcpus(2).boot()?;
    vm.guest().run_last("reboot -f")?;
    assert_ends_well(&vm)
}

#[test]
fn a_poweroff_by_the_guest_ends_the_machine() -> Result {
    let vm = TestVm::new("poweroff").boot()?;
    vm.guest().run_last("poweroff -f")?;
    assert_ends_well(&vm)
}

#[test]
fn a_panic_of_the_guest_ends_the_machine() -> Result {
    let vm = TestVm::new("panic").boot()?;
    vm.guest().run_last("echo c >/proc/sysrq-trigger")?;
    assert_ends_well(&vm)?;
    assert!(
        vm.console().text().contains("Trigger a crash"),
        "{}",
        vm.console().tail()
    );
    Ok(())
}

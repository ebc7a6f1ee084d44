//! The crate fctools drives Mayfly as it drives Firecracker, with its unjailed executor.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use fctools::runtime::tokio::TokioRuntime;
use fctools::vm::VmState;
use fctools::vm::api::VmApi;
use fctools::vm::configuration::InitMethod;
use fctools::vm::models::{UpdateDrive, UpdateMemoryHotplugConfiguration, UpdateNetworkInterface};
use fctools::vm::shutdown::VmShutdownMethod;
use fctools::vmm::arguments::{VmmApiSocket, VmmArguments};
use fctools::vmm::executor::unrestricted::UnrestrictedVmmExecutor;
use fctools::vmm::installation::VmmInstallation;
use fctools::vmm::ownership::VmmOwnershipModel;
use fctools::vmm::resource::{MovedResourceType, ResourceType};
use mayfly_client_tests::Lab;
use mayfly_client_tests::fctools_machine::{ClientVm, boot, limits, resource, shut_down};

async fn start(lab: &Lab, init_method: InitMethod) -> ClientVm<UnrestrictedVmmExecutor> {
    let socket = VmmApiSocket::Enabled(lab.path("api.sock"));
    let executor = UnrestrictedVmmExecutor::new(VmmArguments::new(socket).enable_pci_support());
    boot(
        lab,
        executor,
        VmmOwnershipModel::Shared,
        init_method,
        lab.path(""),
    )
    .await
}

#[tokio::test]
async fn fctools_finds_programs_of_the_version_that_it_wants() {
    let lab = Lab::new("fctools-verify", 9);
    // Mayfly has none, and the crate wants to see all three.
    let editor = lab.path("snapshot-editor");
    fs::write(&editor, "#!/bin/sh\necho snapshot-editor v1.16.1\n").expect("a script");
    fs::set_permissions(&editor, fs::Permissions::from_mode(0o755)).expect("its mode");
    let programs = VmmInstallation::new(lab.path("firecracker"), lab.path("jailer"), editor);
    programs.verify("1.16.1", &TokioRuntime).await.expect("verified");
    assert!(programs.verify("1.16.2", &TokioRuntime).await.is_err());
}

#[tokio::test]
async fn fctools_drives_a_machine_over_the_api() {
    let lab = Lab::new("fctools", 1);
    let mut vm = start(&lab, InitMethod::ViaApiCalls).await;
    assert!(lab.path("vsock").exists());
    assert_eq!(vm.get_info().await.expect("info").app_name, "Mayfly");
    assert_eq!(vm.get_firecracker_version().await.expect("version"), "1.16.1");
    assert_eq!(
        vm.get_machine_configuration().await.expect("machine").vcpu_count,
        2
    );

    vm.pause().await.expect("paused");
    assert!(vm.get_info().await.expect("info").is_paused);
    assert!(!lab.guest_answers());
    vm.resume().await.expect("resumed");
    lab.wait_for_guest(&["log"]);

    let path = lab.path("large.img");
    let kind = ResourceType::Moved(MovedResourceType::Copied);
    let block = resource(vm.get_resource_system_mut(), &path, kind);
    block.start_initialization_with_same_path().expect("started");
    vm.get_resource_system_mut().synchronize().await.expect("there");
    let update = UpdateDrive {
        drive_id: "data".into(),
        block: Some(block),
        rate_limiter: Some(limits()),
    };
    vm.update_drive(update).await.expect("another file and limits");
    let update = UpdateNetworkInterface {
        iface_id: "net".into(),
        rx_rate_limiter: Some(limits()),
        tx_rate_limiter: None,
    };
    vm.update_network_interface(update).await.expect("limits");
    let update = UpdateMemoryHotplugConfiguration {
        requested_size_mib: 128,
    };
    vm.update_memory_hotplug_configuration(update)
        .await
        .expect("more memory");
    let status = vm.get_memory_hotplug_status().await.expect("status");
    assert_eq!((status.total_size_mib, status.requested_size_mib), (256, 128));

    vm.flush_metrics().await.expect("flushed");
    // Not by the crate's own type for metrics: it wants `net.mac_address_updates`, which version 1.16 does not have.
    assert!(lab.metric("metrics", "block", "read_count") > 0);
    assert!(lab.metric("metrics", "net", "tx_packets_count") > 0);

    shut_down(&mut vm, VmShutdownMethod::PauseThenKill).await;
}

#[tokio::test]
async fn fctools_drives_a_machine_by_a_config_file() {
    let lab = Lab::new("fctools-file", 2);
    let mut vm = start(&lab, InitMethod::ViaJsonConfiguration(lab.path("config.json"))).await;
    assert!(!vm.get_info().await.expect("info").is_paused);
    shut_down(&mut vm, VmShutdownMethod::CtrlAltDel).await;
    assert_eq!(vm.get_state(), VmState::Exited);
}

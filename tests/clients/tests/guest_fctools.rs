//! The crate fctools drives Mayfly as it drives Firecracker, with its unjailed executor.

use std::path::Path;
use std::time::Duration;

use fctools::process_spawner::DirectProcessSpawner;
use fctools::runtime::tokio::TokioRuntime;
use fctools::vm::api::VmApi;
use fctools::vm::configuration::{InitMethod, VmConfiguration, VmConfigurationData};
use fctools::vm::models::{
    BootSource, Drive, EntropyDevice, LoggerSystem, MachineConfiguration, MemoryHotplugConfiguration,
    MetricsSystem, NetworkInterface, PmemDevice, RateLimiter, TokenBucket, UpdateDrive,
    UpdateMemoryHotplugConfiguration, UpdateNetworkInterface, VsockDevice,
};
use fctools::vm::shutdown::{VmShutdownAction, VmShutdownMethod};
use fctools::vm::{Vm, VmState};
use fctools::vmm::arguments::{VmmApiSocket, VmmArguments};
use fctools::vmm::executor::unrestricted::UnrestrictedVmmExecutor;
use fctools::vmm::installation::VmmInstallation;
use fctools::vmm::ownership::VmmOwnershipModel;
use fctools::vmm::resource::system::ResourceSystem;
use fctools::vmm::resource::{CreatedResourceType, MovedResourceType, Resource, ResourceType};
use mayfly_client_tests::{GUEST_TIMEOUT, Lab};

type Resources = ResourceSystem<DirectProcessSpawner, TokioRuntime>;
type ClientVm = Vm<UnrestrictedVmmExecutor, DirectProcessSpawner, TokioRuntime>;

fn resource(resources: &mut Resources, path: &Path, kind: ResourceType) -> Resource {
    resources.create_resource(path, kind).expect("a resource")
}

fn drive(id: &str, is_root_device: bool, block: Resource) -> Drive {
    Drive {
        drive_id: id.into(),
        is_root_device,
        cache_type: None,
        partuuid: None,
        is_read_only: None,
        block: Some(block),
        rate_limiter: None,
        io_engine: None,
        socket: None,
    }
}

fn limits() -> RateLimiter {
    let bucket = TokenBucket {
        size: 100 << 20,
        one_time_burst: Some(1 << 20),
        refill_time: 100,
    };
    RateLimiter {
        bandwidth: bucket.clone(),
        ops: bucket,
    }
}

/// A machine with every device that both fctools and Mayfly have.
fn machine(lab: &Lab, resources: &mut Resources) -> VmConfigurationData {
    const FILE: ResourceType = ResourceType::Moved(MovedResourceType::Copied);
    let mut moved = |name| resource(resources, &lab.path(name), FILE);
    let boot_source = BootSource {
        kernel_image: moved("kernel"),
        boot_args: Some(lab.boot_args()),
        initrd: Some(moved("initramfs")),
    };
    let drives = vec![
        drive("root", true, moved("root.ext4")),
        drive("data", false, moved("small.img")),
    ];
    let pmem = moved("large.img");
    let mut created = |name| {
        let kind = ResourceType::Created(CreatedResourceType::File);
        resource(resources, &lab.path(name), kind)
    };
    let (logs, metrics) = (created("log"), created("metrics"));
    VmConfigurationData {
        boot_source,
        drives,
        pmem_devices: vec![PmemDevice {
            id: "pm".into(),
            block: pmem,
            root_device: None,
            read_only: Some(true),
        }],
        machine_configuration: MachineConfiguration {
            vcpu_count: 2,
            mem_size_mib: 160,
            smt: None,
            track_dirty_pages: Some(true),
            huge_pages: None,
        },
        cpu_template: None,
        network_interfaces: vec![NetworkInterface {
            iface_id: "net".into(),
            host_dev_name: lab.tap().into(),
            guest_mac: Some("06:00:ac:1e:00:02".into()),
            rx_rate_limiter: None,
            tx_rate_limiter: Some(limits()),
        }],
        balloon_device: None,
        vsock_device: None,
        logger_system: Some(LoggerSystem {
            logs: Some(logs),
            ..Default::default()
        }),
        metrics_system: Some(MetricsSystem { metrics }),
        memory_hotplug_configuration: Some(MemoryHotplugConfiguration {
            total_size_mib: 256,
            block_size_mib: None,
            slot_size_mib: None,
        }),
        mmds_configuration: None,
        entropy_device: Some(EntropyDevice::default()),
    }
}

/// Starts the machine, and waits until its guest is on the network.
async fn boot(lab: &Lab, init_method: InitMethod) -> ClientVm {
    let mut resources = Resources::new(DirectProcessSpawner, TokioRuntime, VmmOwnershipModel::Shared);
    let mut data = machine(lab, &mut resources);
    if init_method == InitMethod::ViaApiCalls {
        // Only where the process is killed: fctools wants to remove the socket itself, and Mayfly does so when it ends.
        let uds = resource(&mut resources, &lab.path("vsock"), ResourceType::Produced);
        data.vsock_device = Some(VsockDevice { guest_cid: 3, uds });
    }
    let firecracker = lab.path("firecracker");
    // Unjailed and without snapshots, neither of the others is run.
    let installation = VmmInstallation::new(firecracker.clone(), firecracker.clone(), firecracker);
    let socket = VmmApiSocket::Enabled(lab.path("api.sock"));
    let executor = UnrestrictedVmmExecutor::new(VmmArguments::new(socket).enable_pci_support());
    let configuration = VmConfiguration::New { init_method, data };
    let mut vm = ClientVm::prepare(executor, resources, installation, configuration)
        .await
        .expect("prepared");
    vm.start(Duration::from_secs(60)).await.expect("started");
    lab.wait_for_guest(&["log"]);
    vm
}

async fn shut_down(vm: &mut ClientVm, method: VmShutdownMethod) {
    let action = VmShutdownAction {
        method,
        timeout: Some(GUEST_TIMEOUT),
        graceful: true,
    };
    let outcome = vm.shutdown([action]).await.expect("shut down");
    assert!(outcome.errors.is_empty());
    vm.cleanup().await.expect("cleaned up");
}

#[tokio::test(flavor = "multi_thread")]
async fn fctools_drives_a_machine_over_the_api() {
    let lab = Lab::new("fctools", 1);
    let mut vm = boot(&lab, InitMethod::ViaApiCalls).await;
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

#[tokio::test(flavor = "multi_thread")]
async fn fctools_drives_a_machine_by_a_config_file() {
    let lab = Lab::new("fctools-file", 2);
    let mut vm = boot(&lab, InitMethod::ViaJsonConfiguration(lab.path("config.json"))).await;
    assert!(!vm.get_info().await.expect("info").is_paused);
    shut_down(&mut vm, VmShutdownMethod::CtrlAltDel).await;
    assert_eq!(vm.get_state(), VmState::Exited);
}

//! A machine with every device that both the crate fctools and Mayfly have, and its way from start to end.
//!
//! Its tests have a runtime of one thread: with more, the crate's own task can answer that all resources are there before
//! it has taken up the last of them.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fctools::process_spawner::DirectProcessSpawner;
use fctools::runtime::tokio::TokioRuntime;
use fctools::vm::Vm;
use fctools::vm::configuration::{InitMethod, VmConfiguration, VmConfigurationData};
use fctools::vm::models::{
    BootSource, Drive, EntropyDevice, LoggerSystem, MachineConfiguration, MemoryHotplugConfiguration,
    MetricsSystem, NetworkInterface, PmemDevice, RateLimiter, TokenBucket, VsockDevice,
};
use fctools::vm::shutdown::{VmShutdownAction, VmShutdownError, VmShutdownMethod};
use fctools::vmm::executor::VmmExecutor;
use fctools::vmm::installation::VmmInstallation;
use fctools::vmm::ownership::VmmOwnershipModel;
use fctools::vmm::process::{VmmProcessError, VmmProcessState};
use fctools::vmm::resource::system::ResourceSystem;
use fctools::vmm::resource::{CreatedResourceType, MovedResourceType, Resource, ResourceType};

use crate::{GUEST_TIMEOUT, Lab};

pub type Resources = ResourceSystem<DirectProcessSpawner, TokioRuntime>;
pub type ClientVm<E> = Vm<E, DirectProcessSpawner, TokioRuntime>;

/// Something that the crate copies to, or makes, where the machine can use it.
pub fn resource(resources: &mut Resources, path: &Path, kind: ResourceType) -> Resource {
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

/// Limits that nobody notices.
pub fn limits() -> RateLimiter {
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

/// The machine. Files that are made for it are in `folder`, as the machine sees it.
fn machine(lab: &Lab, resources: &mut Resources, folder: &Path) -> VmConfigurationData {
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
    let pmem = moved("pmem.img");
    let mut created = |name| {
        let kind = ResourceType::Created(CreatedResourceType::File);
        resource(resources, &folder.join(name), kind)
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

/// Starts the machine, and waits until its guest is on the network. `folder` is where the machine has its files, as it
/// sees it itself.
pub async fn boot<E: VmmExecutor>(
    lab: &Lab,
    executor: E,
    owner: VmmOwnershipModel,
    init_method: InitMethod,
    folder: PathBuf,
) -> ClientVm<E> {
    let mut resources = Resources::new(DirectProcessSpawner, TokioRuntime, owner);
    let mut data = machine(lab, &mut resources, &folder);
    if init_method == InitMethod::ViaApiCalls {
        // Only where the process is killed: fctools wants to remove the socket itself, and Mayfly does so when it ends.
        let uds = resource(&mut resources, &folder.join("vsock"), ResourceType::Produced);
        data.vsock_device = Some(VsockDevice { guest_cid: 3, uds });
    }
    // Without snapshots, the editor is not run.
    let editor = lab.path("firecracker");
    let installation = VmmInstallation::new(lab.path("firecracker"), lab.path("jailer"), editor);
    let configuration = VmConfiguration::New { init_method, data };
    let mut vm = ClientVm::prepare(executor, resources, installation, configuration)
        .await
        .expect("prepared");
    vm.start(Duration::from_secs(60)).await.expect("started");
    let log = vm.resolve_effective_path(folder.join("log"));
    lab.wait_for_guest(&[log.to_str().expect("UTF-8")]);
    vm
}

/// Ends the machine, and removes what was made for it.
pub async fn shut_down<E: VmmExecutor>(vm: &mut ClientVm<E>, method: VmShutdownMethod) {
    let action = VmShutdownAction {
        method: method.clone(),
        timeout: Some(GUEST_TIMEOUT),
        graceful: true,
    };
    match vm.shutdown([action]).await {
        Ok(outcome) => assert!(outcome.errors.is_empty()),
        // The crate refuses to wait for a process that its signal has ended before it begins to.
        Err(VmShutdownError::WaitForExitError(VmmProcessError::IncorrectState(
            VmmProcessState::Crashed(status),
        ))) if method == VmShutdownMethod::PauseThenKill => {
            assert_eq!(status.signal(), Some(9), "{status}");
        }
        Err(error) => panic!("shut down: {error}"),
    }
    vm.cleanup().await.expect("cleaned up");
}

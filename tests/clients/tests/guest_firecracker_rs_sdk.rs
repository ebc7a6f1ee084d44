//! The crate firecracker-rs-sdk drives Mayfly as it drives Firecracker. It keeps one connection, and speaks HTTP/1.0.

use std::fs;

use firecracker_rs_sdk::firecracker::FirecrackerOption;
use firecracker_rs_sdk::instance::Instance;
use firecracker_rs_sdk::models::{
    ActionType, BootSource, Drive, EntropyDevice, Logger, MachineConfiguration, Metrics, NetworkInterface,
    PartialDrive, PartialNetworkInterface, Vsock,
};
use mayfly_client_tests::Lab;

fn machine_configuration(mem_size_mib: isize) -> MachineConfiguration {
    MachineConfiguration {
        cpu_template: None,
        smt: Some(false),
        mem_size_mib,
        track_dirty_pages: None,
        vcpu_count: 1,
        huge_pages: None,
    }
}

fn drive(lab: &Lab, id: &str, file: &str) -> Drive {
    Drive {
        drive_id: id.into(),
        partuuid: None,
        is_root_device: id == "root",
        cache_type: None,
        is_read_only: false,
        path_on_host: lab.path(file),
        rate_limiter: None,
        io_engine: None,
        socket: None,
    }
}

fn configure(lab: &Lab, instance: &mut Instance) -> firecracker_rs_sdk::Result<()> {
    instance.put_logger(&Logger {
        level: None,
        log_path: lab.path("log"),
        show_level: Some(true),
        show_log_origin: Some(true),
        module: None,
    })?;
    instance.put_metrics(&Metrics {
        metrics_path: lab.path("metrics"),
    })?;
    instance.put_machine_configuration(&machine_configuration(128))?;
    instance.patch_machine_configuration(&machine_configuration(160))?;
    instance.put_guest_boot_source(&BootSource {
        boot_args: Some(lab.boot_args()),
        initrd_path: Some(lab.path("initramfs")),
        kernel_image_path: lab.path("kernel"),
    })?;
    instance.put_guest_drive_by_id(&drive(lab, "root", "root.ext4"))?;
    instance.put_guest_drive_by_id(&drive(lab, "data", "small.img"))?;
    instance.put_guest_network_interface_by_id(&NetworkInterface {
        guest_mac: Some("06:00:ac:1e:00:03".into()),
        host_dev_name: lab.tap().into(),
        iface_id: "net".into(),
        rx_rate_limiter: None,
        tx_rate_limiter: None,
    })?;
    instance.put_guest_vsock(&Vsock {
        guest_cid: 3,
        uds_path: lab.path("vsock"),
        vsock_id: None,
    })?;
    instance.put_entropy_device(&EntropyDevice { rate_limiter: None })?;
    Ok(())
}

/// The state, whose type the crate does not name in public.
fn state(instance: &mut Instance) -> firecracker_rs_sdk::Result<String> {
    Ok(format!("{:?}", instance.describe_instance()?.state))
}

#[test]
fn firecracker_rs_sdk_drives_a_machine() -> firecracker_rs_sdk::Result<()> {
    let lab = Lab::new("rs-sdk", 3);
    let mut instance = FirecrackerOption::new(lab.path("firecracker"))
        .api_sock(lab.path("api.sock"))
        .id("rs-sdk")
        .stdin("/dev/null")
        .stdout(lab.path("console"))
        .stderr(lab.path("errors"))
        .build()?;
    instance.start_vmm()?;
    assert_eq!(instance.get_firecracker_version()?.firecracker_version, "1.16.1");
    assert_eq!(state(&mut instance)?, "NotStarted");
    configure(&lab, &mut instance)?;
    assert_eq!(instance.get_machine_configuration()?.mem_size_mib, 160);
    instance.start()?;
    lab.wait_for_guest(&["console", "errors", "log"]);

    instance.pause()?;
    assert_eq!(state(&mut instance)?, "Paused");
    instance.resume()?;
    instance.patch_guest_drive_by_id(&PartialDrive {
        drive_id: "data".into(),
        path_on_host: Some(lab.path("large.img")),
        rate_limiter: None,
    })?;
    instance.patch_guest_network_interface_by_id(&PartialNetworkInterface {
        iface_id: "net".into(),
        rx_rate_limiter: None,
        tx_rate_limiter: None,
    })?;
    let config = instance.get_export_vm_config()?;
    assert_eq!(config.vsock.map(|vsock| vsock.guest_cid), Some(3));
    instance.create_sync_action(ActionType::FlushMetrics)?;
    assert!(lab.metric("metrics", "net", "tx_packets_count") > 0);
    assert!(fs::read_to_string(lab.path("log"))?.contains("rs-sdk"));

    // Ctrl-Alt-Del, upon which the guest restarts, and so ends the process; that removes its socket.
    instance.stop()?;
    lab.wait_gone("api.sock");
    Ok(())
}

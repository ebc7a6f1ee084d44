//! Bad input: what cannot be read, used or afforded is refused with its name, and nothing is changed or left behind.

use std::path::Path;

use mayfly_tests::{Monitor, MonitorBuilder, Result, Tap, TestVm, TinyKernel, isolation, zeros};
use serde_json::{Value, json};

fn monitor() -> Result<Monitor> {
    MonitorBuilder::new("input")?.start()
}

/// Writes a file into the monitor's folder; its path.
fn file(monitor: &Monitor, name: &str, content: &[u8]) -> Result<String> {
    let path = monitor.dir().join(name);
    std::fs::write(&path, content)?;
    Ok(path.display().to_string())
}

fn boot_source(monitor: &Monitor, kernel: &str) -> Result {
    monitor
        .put("/boot-source", &json!({"kernel_image_path": kernel}))?
        .success()
        .map(drop)
}

fn start(monitor: &Monitor) -> Result<mayfly_tests::Response> {
    monitor.put("/actions", &json!({"action_type": "InstanceStart"}))
}

/// Sets this kernel and starts: one of the two must be refused with these words, and the machine stays unstarted.
#[track_caller]
fn assert_kernel_refused(monitor: &Monitor, kernel: &str, words: &[&str]) -> Result {
    let set = monitor.put("/boot-source", &json!({"kernel_image_path": kernel}))?;
    let refused = if set.status == 204 { start(monitor)? } else { set };
    refused.assert_refused(words);
    assert_eq!(monitor.get("/")?.json()?["state"], "Not started");
    Ok(())
}

fn drive(id: &str, path: &str) -> Value {
    json!({"drive_id": id, "path_on_host": path, "is_root_device": false})
}

#[test]
fn a_kernel_that_cannot_be_read_is_named() -> Result {
    let monitor = monitor()?;
    assert_kernel_refused(
        &monitor,
        "/nonexistent/kernel",
        &["/nonexistent/kernel", "check the path", "No such file"],
    )?;
    assert_kernel_refused(&monitor, "/tmp", &["/tmp", "directory"])?;
    assert_eq!(
        monitor.get("/vm/config")?.json()?["boot-source"]["kernel_image_path"],
        ""
    );
    Ok(())
}

#[test]
fn a_kernel_that_is_none_is_named() -> Result {
    let monitor = monitor()?;
    assert_kernel_refused(
        &monitor,
        &file(&monitor, "empty", b"")?,
        &["empty", "copy or build it again"],
    )?;
    assert_kernel_refused(
        &monitor,
        &file(&monitor, "text", b"Hello, this is no kernel.\n")?,
        &[
            "text",
            "neither an ELF vmlinux nor a bzImage",
            "give one of those",
        ],
    )?;
    let large = file(&monitor, "large", &[b'x'; 100_000])?;
    assert_kernel_refused(&monitor, &large, &["large"])
}

#[test]
fn a_truncated_kernel_is_named() -> Result {
    let monitor = monitor()?;
    let elf = TinyKernel::new().halt().elf();
    let header_only = file(&monitor, "header-only", &elf[..64])?;
    assert_kernel_refused(&monitor, &header_only, &["header-only"])?;
    let half = file(&monitor, "half", &elf[..elf.len() - 3])?;
    assert_kernel_refused(&monitor, &half, &["half"])
}

/// A compressed kernel with the header of a real one, whose code halts; 64 KiB of it come after 20 KiB of setup code.
fn bzimage() -> Vec<u8> {
    const SETUP: usize = 40 * 512;
    const CODE: usize = 64 << 10;
    let mut file = vec![0xcc; SETUP + CODE];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    // Sectors of setup code, size of the rest in units of 16 bytes, end of the header, its name and version.
    put(0x1f1, &[39]);
    put(
        0x1f4,
        &u32::try_from(CODE / 16).expect("it is small").to_le_bytes(),
    );
    put(0x201, &[0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    // The highest address of an initrd, the 64-bit entry, where it wants to be, and the memory that it takes there.
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x236, &[1, 0]);
    put(0x258, &(16_u64 << 20).to_le_bytes());
    put(0x260, &(1_u32 << 20).to_le_bytes());
    // again: cli; hlt; jmp again
    put(SETUP + 0x200, &[0xfa, 0xf4, 0xeb, 0xfc]);
    // The signature that a real one ends with is no part of the kernel.
    file.extend([0xee; 1472]);
    file
}

#[test]
fn a_truncated_bzimage_is_named_and_a_whole_one_starts() -> Result {
    let monitor = monitor()?;
    let whole = bzimage();
    let half = file(&monitor, "half", &whole[..whole.len() / 2])?;
    assert_kernel_refused(&monitor, &half, &["half", "cut short", "86016 are needed"])?;
    boot_source(&monitor, &file(&monitor, "whole", &whole)?)?;
    start(&monitor)?.success()?;
    Ok(())
}

#[test]
fn an_initrd_that_cannot_be_read_is_named() -> Result {
    let monitor = monitor()?;
    let kernel = file(&monitor, "kernel", &TinyKernel::new().halt().elf())?;
    let put = |initrd: &str| {
        monitor.put(
            "/boot-source",
            &json!({"kernel_image_path": kernel, "initrd_path": initrd}),
        )
    };
    put("/nonexistent/initrd")?.assert_refused(&[
        "Boot source error",
        "/nonexistent/initrd",
        "check the path",
    ]);
    put("/tmp")?.assert_refused(&["/tmp", "directory"]);
    Ok(())
}

#[test]
fn an_initrd_larger_than_memory_is_refused_at_start() -> Result {
    let monitor = monitor()?;
    let kernel = file(&monitor, "kernel", &TinyKernel::new().halt().elf())?;
    let initrd = monitor.dir().join("initrd");
    zeros(&initrd, 200 << 20)?;
    monitor
        .put(
            "/boot-source",
            &json!({"kernel_image_path": kernel, "initrd_path": initrd}),
        )?
        .success()?;
    start(&monitor)?.assert_refused(&["Start microvm error", "initrd"]);
    monitor
        .put("/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": 512}))?
        .success()?;
    start(&monitor)?.success()?;
    Ok(())
}

#[test]
fn a_command_line_may_have_2047_bytes_and_not_one_more() -> Result {
    let monitor = monitor()?;
    let kernel = file(&monitor, "kernel", &TinyKernel::new().halt().elf())?;
    let put = |length: usize| {
        monitor.put(
            "/boot-source",
            &json!({"kernel_image_path": kernel, "boot_args": "a".repeat(length)}),
        )
    };
    put(2047)?.success()?;
    put(2048)?.assert_refused(&["Boot source error", "2047"]);
    Ok(())
}

#[test]
fn a_command_line_with_other_than_printable_characters_is_refused_when_it_is_put() -> Result {
    let monitor = monitor()?;
    let kernel = file(&monitor, "kernel", &TinyKernel::new().halt().elf())?;
    let put = |boot_args: &str| {
        monitor.put(
            "/boot-source",
            &json!({"kernel_image_path": kernel, "boot_args": boot_args}),
        )
    };
    put("quiet\tro")?.success()?;
    let before = monitor.get("/vm/config")?;
    put("quiet\0")?.assert_refused(&["Boot source error", "'\\0' at position 5", "boot_args"]);
    put("quiet\n")?.assert_refused(&["Boot source error", "'\\n' at position 5"]);
    put("na\u{ef}ve")?.assert_refused(&["Boot source error", "'\u{ef}' at position 2"]);
    assert_eq!(monitor.get("/vm/config")?, before);
    Ok(())
}

#[test]
fn an_image_that_cannot_be_a_disk_is_named() -> Result {
    let monitor = monitor()?;
    let put = |path: &str| monitor.put("/drives/data", &drive("data", path));
    put("/nonexistent/disk")?.assert_refused(&["Drive config error", "/nonexistent/disk", "No such file"]);
    put("/tmp")?.assert_refused(&["Drive config error", "/tmp"]);
    put(&file(&monitor, "zero-size", b"")?)?.assert_refused(&["Drive config error", "zero-size"]);
    monitor
        .put(
            "/drives/data",
            &json!({"drive_id": "data", "is_root_device": false}),
        )?
        .assert_refused(&["path_on_host"]);
    assert_eq!(monitor.get("/vm/config")?.json()?["drives"], json!([]));
    Ok(())
}

#[test]
fn a_refused_drive_leaves_the_one_before() -> Result {
    let monitor = monitor()?;
    let image = file(&monitor, "image", &[0; 4096])?;
    monitor.put("/drives/data", &drive("data", &image))?.success()?;
    let before = monitor.get("/vm/config")?;
    assert_eq!(
        monitor
            .put("/drives/data", &drive("data", "/nonexistent"))?
            .status,
        400
    );
    assert_eq!(monitor.get("/vm/config")?, before);
    Ok(())
}

#[test]
fn an_image_with_a_tail_is_taken_with_a_warning() -> Result {
    let monitor = MonitorBuilder::new("tail")?.args(["--show-level"]).start()?;
    let kernel = file(&monitor, "kernel", &TinyKernel::new().halt().elf())?;
    let image = file(&monitor, "odd-size", &[0; 4096 + 100])?;
    monitor.put("/drives/data", &drive("data", &image))?.success()?;
    boot_source(&monitor, &kernel)?;
    start(&monitor)?.success()?;
    let log = monitor.log();
    assert!(
        log.lines()
            .any(|line| line.contains(":WARN") && line.contains("odd-size")),
        "{log}"
    );
    Ok(())
}

#[test]
fn a_tap_that_cannot_be_is_named_and_not_left_behind() -> Result {
    let monitor = monitor()?;
    let long = "a-name-of-20-letters";
    let answer = monitor.put(
        "/network-interfaces/net0",
        &json!({"iface_id": "net0", "host_dev_name": long}),
    )?;
    answer.assert_refused(&["Network", long]);
    let odd = monitor.put(
        "/network-interfaces/net0",
        &json!({"iface_id": "net0", "host_dev_name": "mfnone0", "guest_mac": "not a mac"}),
    )?;
    assert_eq!(odd.status, 400, "{odd:?}");
    assert!(!Tap::exists("mfnone0"));
    assert_eq!(
        monitor.get("/vm/config")?.json()?["network-interfaces"],
        json!([])
    );
    Ok(())
}

#[test]
fn more_memory_than_can_be_is_refused_and_less_starts() -> Result {
    let monitor = monitor()?;
    boot_source(
        &monitor,
        &file(&monitor, "kernel", &TinyKernel::new().halt().elf())?,
    )?;
    let too_much = monitor.put(
        "/machine-config",
        &json!({"vcpu_count": 1, "mem_size_mib": 1_u64 << 40}),
    )?;
    let refused = if too_much.status == 204 {
        start(&monitor)?
    } else {
        too_much
    };
    refused.assert_refused(&["mem"]);
    monitor
        .put("/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": 128}))?
        .success()?;
    start(&monitor)?.success()?;
    Ok(())
}

#[test]
fn files_for_lines_that_cannot_be_opened_are_named() -> Result {
    let monitor = monitor()?;
    monitor
        .put("/logger", &json!({"log_path": "/nonexistent/log"}))?
        .assert_refused(&["/nonexistent/log", "check the path"]);
    monitor
        .put("/metrics", &json!({"metrics_path": "/nonexistent/m"}))?
        .assert_refused(&["/nonexistent/m", "check the path"]);
    monitor
        .put("/serial", &json!({"serial_out_path": "/nonexistent/s"}))?
        .assert_refused(&["/nonexistent/s", "check the path"]);
    assert!(monitor.log().contains("/nonexistent/log"));
    Ok(())
}

/// Starts a machine in a monitor; the refusal of one of the requests.
fn refusal_without_kvm(monitor: &Monitor) -> Result<mayfly_tests::Response> {
    boot_source(
        monitor,
        &file(monitor, "kernel", &TinyKernel::new().halt().elf())?,
    )?;
    start(monitor)
}

#[test]
fn without_kvm_a_start_is_refused_with_what_to_do() -> Result {
    let monitor = MonitorBuilder::new("no-kvm")?
        .prepare(isolation::hide_kvm)
        .start()?;
    refusal_without_kvm(&monitor)?.assert_refused(&["Start microvm error", "/dev/kvm"]);
    assert_eq!(monitor.get("/")?.json()?["state"], "Not started");
    Ok(())
}

#[test]
fn a_device_that_is_no_kvm_is_named() -> Result {
    let monitor = MonitorBuilder::new("odd-kvm")?
        .prepare(isolation::replace_kvm)
        .start()?;
    refusal_without_kvm(&monitor)?.assert_refused(&["Start microvm error", "KVM"]);
    Ok(())
}

#[test]
fn without_the_right_to_kvm_a_start_is_refused_with_what_to_do() -> Result {
    let builder = MonitorBuilder::new("no-right")?.open_to_all()?;
    let monitor = builder.prepare(isolation::forbid_kvm).start()?;
    refusal_without_kvm(&monitor)?.assert_refused(&["Start microvm error", "/dev/kvm", "ermission"]);
    Ok(())
}

/// A monitor with this config file, that has ended; its exit code and everything it said.
fn end_of_config_file(content: &str) -> Result<(i32, String)> {
    let builder = MonitorBuilder::new("config")?;
    std::fs::write(builder.dir().join("config.json"), content)?;
    let monitor = builder.args(["--config-file", "config.json"]).spawn()?;
    let code = monitor.wait_exit()?;
    assert!(!monitor.socket().exists());
    Ok((code, format!("{}{}", monitor.stderr().text(), monitor.log())))
}

#[test]
fn a_config_file_that_is_wrong_ends_with_1_and_leaves_no_socket() -> Result {
    let valid = TestVm::new("")
        .kernel(Path::new("/nonexistent/kernel"))
        .config()?;
    let mut unknown = valid.clone();
    unknown["dirves"] = json!([]);
    for (content, word) in [
        ("{", "EOF"),
        ("{}", "missing field `drives`"),
        (unknown.to_string().as_str(), "unknown field `dirves`"),
        (valid.to_string().as_str(), "/nonexistent/kernel"),
    ] {
        let (code, said) = end_of_config_file(content)?;
        assert!(code == 1 && said.contains(word), "{word}: {code} {said}");
    }
    Ok(())
}

#[test]
fn a_config_file_that_cannot_be_read_is_named() -> Result {
    let monitor = MonitorBuilder::new("config")?
        .args(["--config-file", "/nonexistent/config"])
        .spawn()?;
    assert_eq!(monitor.wait_exit()?, 1);
    let said = monitor.stderr().text();
    assert!(
        said.contains("/nonexistent/config") && said.contains("No such file"),
        "{said}"
    );
    assert!(!monitor.socket().exists());
    Ok(())
}

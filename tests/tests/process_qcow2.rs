//! Drives with copy-on-write images: what the API says of them, and many machines on one base.

use std::fs;
use std::time::Instant;

use mayfly_tests::virtio_mmio::{AVAIL, USED};
use mayfly_tests::{
    Drive, HOST_TIMEOUT, Result, Scratch, TestVm, TinyKernel, Vm, check_qcow2, create_encrypted_qcow2,
    create_qcow2, pattern, qemu_img, read_qcow2,
};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;
const CLONES: u32 = 50;

fn machine(scratch: &Scratch, name: &str, drive: Drive) -> Result<TestVm> {
    machine_of(scratch, name, &TinyKernel::new().print("up\n").halt(), drive)
}

fn machine_of(scratch: &Scratch, name: &str, kernel: &TinyKernel, drive: Drive) -> Result<TestVm> {
    Ok(TestVm::new(name)
        .mem_mib(16)
        .kernel(kernel.write(scratch)?)
        .drive(drive))
}

fn started(vm: TestVm) -> Result<Vm> {
    let vm = vm.start()?;
    match vm.console().wait_for("up\n", Instant::now() + HOST_TIMEOUT) {
        true => Ok(vm),
        false => Err(vm.failure("the guest did not start")),
    }
}

fn drives(vm: &Vm) -> Result<Value> {
    Ok(vm.get("/vm/config")?.json()?["drives"].clone())
}

/// Where the guest's queue and the parts of its request are.
const RING: u32 = 0x20_0000;
const HEADER: u32 = 0x30_0000;
const SECTOR: u32 = 0x30_1000;
const ANSWER: u32 = 0x30_2000;
/// The sector that guest 0 writes; the others write those behind it.
const FIRST_WRITTEN: u32 = 1000;

/// A guest that reads the sector of its number, puts the number into it, and writes it elsewhere.
fn copier(number: u32) -> TinyKernel {
    // Descriptors of 16 bytes: address, length, flags (1: another one follows, 2: the device writes it) and the next.
    let kernel = TinyKernel::new()
        .agree()
        .set_queue(0, 4, RING)
        .store(RING, HEADER)
        .store(RING + 8, 16)
        .store(RING + 12, 1 << 16 | 1)
        .store(RING + 16, SECTOR)
        .store(RING + 24, 512)
        .store(RING + 32, ANSWER)
        .store(RING + 40, 1)
        .store(RING + 44, 2)
        .set_driver_ok();
    let kernel = request(kernel, 1, VIRTIO_BLK_T_IN, number).store(SECTOR, number);
    request(kernel, 2, VIRTIO_BLK_T_OUT, FIRST_WRITTEN + number)
        .print("up\n")
        .halt()
}

const VIRTIO_BLK_T_IN: u32 = 0;
const VIRTIO_BLK_T_OUT: u32 = 1;

/// Makes a request, the `count`-th of all, and waits until it has succeeded.
fn request(kernel: TinyKernel, count: u16, kind: u32, sector: u32) -> TinyKernel {
    let flags = if kind == VIRTIO_BLK_T_IN { 3 } else { 1 };
    kernel
        .store(HEADER, kind)
        .store(HEADER + 8, sector)
        .store(RING + 28, 2 << 16 | flags)
        .store(ANSWER, 0xff)
        .store(RING + AVAIL, u32::from(count) << 16)
        .kick(0)
        .wait_for_half(RING + USED + 2, count)
        .wait_for_half(ANSWER, 0)
}

#[test]
fn fifty_machines_read_one_base_and_write_to_clones_of_their_own() -> Result {
    let scratch = Scratch::new("clones")?;
    let content = pattern(4 * MIB);
    let base = scratch.file("base.raw", &content)?;
    let clone = |number: u32| scratch.join(format!("clone-{number}.qcow2"));
    let mut machines = Vec::new();
    for number in 0..CLONES {
        create_qcow2(&clone(number), Some(&base), "")?;
        let drive = Drive::new("root", clone(number))
            .with("format", "qcow2")
            .with("backing_files", vec![base.to_str().unwrap_or_default()]);
        let vm = machine_of(&scratch, &format!("clone-{number}"), &copier(number), drive)?;
        machines.push(started(vm.mmio())?);
    }
    drop(machines);
    for number in 0..CLONES {
        let image = clone(number);
        check_qcow2(&image)?;
        let sector = |number: u32| usize::try_from(number).map(|number| number * 512);
        let mut expected = content.clone();
        let (from, to) = (sector(number)?, sector(FIRST_WRITTEN + number)?);
        expected.copy_within(from..from + 512, to);
        expected[to..to + 4].copy_from_slice(&number.to_le_bytes());
        assert!(read_qcow2(&image)? == expected, "{number}");
        // Two clusters more than an empty one.
        assert!(fs::metadata(&image)?.len() <= 384 << 10, "{number}");
    }
    assert!(fs::read(&base)? == content, "the base was changed");
    Ok(())
}

#[test]
fn the_config_shows_the_fields_only_when_they_are_set() -> Result {
    let scratch = Scratch::new("fields")?;
    let (raw, image) = (scratch.file("raw", pattern(MIB))?, scratch.join("image.qcow2"));
    create_qcow2(&image, None, "4M")?;
    let qcow2 = Drive::new("cow", &image)
        .with("format", "qcow2")
        .with("backing", "deny");
    let vm = started(machine(&scratch, "fields", Drive::new("raw", &raw))?.drive(qcow2))?;
    let drives = drives(&vm)?;
    for field in ["format", "backing", "backing_files"] {
        assert_eq!(drives[0].get(field), None, "{field}");
    }
    assert_eq!(drives[1]["format"], "qcow2");
    assert_eq!(drives[1]["backing"], "deny");
    assert_eq!(drives[1].get("backing_files"), None);
    Ok(())
}

/// Attaches a drive and returns why it is refused.
fn refusal(vm: &Vm, drive: Value) -> Result<String> {
    let answer = vm.put("/drives/new", &drive)?;
    assert_eq!(answer.status, 400, "{drive} was taken");
    Ok(answer.json()?["fault_message"]
        .as_str()
        .unwrap_or_default()
        .to_owned())
}

#[test]
fn what_is_refused_is_told_with_the_remedy_and_changes_nothing() -> Result {
    let scratch = Scratch::new("refused")?;
    let base = scratch.file("base.raw", pattern(MIB))?;
    let other = scratch.file("other.raw", pattern(MIB))?;
    let (clone, secret) = (scratch.join("clone.qcow2"), scratch.join("secret.qcow2"));
    create_qcow2(&clone, Some(&base), "")?;
    create_encrypted_qcow2(&secret)?;
    let vm = started(machine(
        &scratch,
        "refused",
        Drive::new("raw", &base).read_only(),
    )?)?;
    let before = drives(&vm)?;
    let drive = |path: &std::path::Path, more: Value| {
        let mut drive =
            json!({"drive_id": "new", "is_root_device": false, "path_on_host": path, "format": "qcow2"});
        if let (Some(drive), Some(more)) = (drive.as_object_mut(), more.as_object()) {
            drive.extend(more.clone());
        }
        drive
    };
    for (path, more, words) in [
        (&other, json!({}), "has no qcow2 header"),
        (&clone, json!({}), "name it in backing_files, or set backing to"),
        (&clone, json!({"backing_files": []}), "name it in backing_files"),
        (&secret, json!({}), "it is encrypted"),
        (
            &clone,
            json!({"backing": "allow", "backing_files": [base]}),
            "leave one of them out",
        ),
        (
            &other,
            json!({"format": "raw", "backing": "allow"}),
            "a raw image has no backing file",
        ),
        (
            &other,
            json!({"format": "vmdk"}),
            "unknown variant `vmdk`, expected `raw` or `qcow2`",
        ),
    ] {
        let message = refusal(&vm, drive(path, more.clone()))?;
        assert!(message.contains(words), "{more}: {message}");
    }
    assert_eq!(drives(&vm)?, before);
    vm.put("/drives/new", &drive(&clone, json!({"backing": "allow"})))?
        .success()?;
    Ok(())
}

#[test]
fn a_drive_moves_to_another_image_of_its_format() -> Result {
    let scratch = Scratch::new("move")?;
    let base = scratch.file("base.raw", pattern(MIB))?;
    let (plain, clone) = (scratch.join("plain.qcow2"), scratch.join("clone.qcow2"));
    create_qcow2(&plain, None, "2M")?;
    create_qcow2(&clone, Some(&base), "")?;
    let drive = Drive::new("cow", &plain).with("format", "qcow2");
    let vm = started(machine(&scratch, "move", drive)?)?;
    let patch = |body: Value| vm.patch("/drives/cow", &body);
    let to_raw = patch(json!({"drive_id": "cow", "path_on_host": base}))?;
    assert!(to_raw.body.contains("has no qcow2 header"), "{}", to_raw.body);
    let denied = patch(json!({"drive_id": "cow", "path_on_host": clone}))?;
    assert!(
        denied.body.contains("name it in backing_files"),
        "{}",
        denied.body
    );
    let alone = patch(json!({"drive_id": "cow", "backing_files": []}))?;
    assert!(alone.body.contains("give path_on_host too"), "{}", alone.body);
    assert_eq!(drives(&vm)?[0]["path_on_host"], json!(plain));

    patch(json!({"drive_id": "cow", "path_on_host": clone, "backing_files": [base]}))?.success()?;
    assert_eq!(drives(&vm)?[0]["path_on_host"], json!(clone));
    assert_eq!(drives(&vm)?[0]["backing_files"], json!([base]));
    // A new image may stand on the present one, which is then only read.
    let next = scratch.join("next.qcow2");
    let words = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
    let paths = [&clone, &next].map(|path| path.to_str().unwrap_or_default());
    vm.pause()?;
    qemu_img(words.into_iter().chain(paths))?;
    patch(json!({"drive_id": "cow", "path_on_host": next, "backing_files": [clone, base]}))?.success()?;
    vm.resume()?;
    let again = patch(json!({"drive_id": "cow", "path_on_host": next}))?;
    assert!(
        again.body.contains("the drive has it open already"),
        "{}",
        again.body
    );
    // The old image is free again.
    check_qcow2(&plain)?;
    patch(json!({"drive_id": "cow", "path_on_host": plain, "backing_files": []}))?.success()?;
    Ok(())
}

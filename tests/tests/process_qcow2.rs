//! Drives with copy-on-write images: what the API says of them, and many machines on one base.

use std::fs;
use std::time::Instant;

use mayfly_tests::{
    Drive, HOST_TIMEOUT, Result, Scratch, TestVm, TinyKernel, Vm, check_qcow2, create_encrypted_qcow2,
    create_qcow2, pattern, qemu_img,
};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;
const CLONES: usize = 50;

fn machine(scratch: &Scratch, name: &str, drive: Drive) -> Result<TestVm> {
    let kernel = TinyKernel::new().print("up\n").halt();
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

#[test]
fn fifty_machines_run_on_clones_of_one_base() -> Result {
    let scratch = Scratch::new("clones")?;
    let content = pattern(16 * MIB);
    let base = scratch.file("base.raw", &content)?;
    let mut machines = Vec::new();
    for number in 0..CLONES {
        let clone = scratch.join(format!("clone-{number}.qcow2"));
        create_qcow2(&clone, Some(&base), "")?;
        let drive = Drive::new("root", &clone)
            .with("format", "qcow2")
            .with("backing_files", vec![base.to_str().unwrap_or_default()]);
        machines.push(started(machine(&scratch, &format!("clone-{number}"), drive)?)?);
    }
    assert_eq!(machines.len(), CLONES);
    drop(machines);
    for number in 0..CLONES {
        check_qcow2(&scratch.join(format!("clone-{number}.qcow2")))?;
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
            &clone,
            json!({"backing": "allow", "io_engine": "Async"}),
            "no Async engine",
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

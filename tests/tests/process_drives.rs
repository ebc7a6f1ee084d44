//! Images of drives among several machines, and their changes. The guests are a few instructions.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use mayfly_tests::{
    Drive, HOST_TIMEOUT, MonitorBuilder, Response, Result, Scratch, TestVm, TinyKernel, Vm, zeros,
};
use serde_json::{Value, json};

fn machine(name: &str, scratch: &Scratch, drives: &[Drive]) -> Result<Vm> {
    let kernel = TinyKernel::new().print("up\n").halt().write(scratch)?;
    let vm = drives.iter().cloned().fold(TestVm::new(name), TestVm::drive);
    let vm = vm.kernel(kernel).start()?;
    assert!(vm.console().wait_for("up", Instant::now() + HOST_TIMEOUT));
    Ok(vm)
}

fn image(scratch: &Scratch, name: &str) -> Result<PathBuf> {
    let path = scratch.join(name);
    zeros(&path, 1 << 20)?;
    Ok(path)
}

fn body(id: &str, path: &Path, read_only: bool) -> Value {
    json!({"drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": read_only})
}

fn put(vm: &Vm, id: &str, path: &Path, read_only: bool) -> Result<Response> {
    vm.put(&format!("/drives/{id}"), &body(id, path, read_only))
}

fn swap(vm: &Vm, id: &str, path: &Path) -> Result<Response> {
    vm.patch(
        &format!("/drives/{id}"),
        &json!({"drive_id": id, "path_on_host": path}),
    )
}

#[test]
fn an_image_that_a_machine_writes_is_its_own() -> Result {
    let scratch = Scratch::new("drives-own")?;
    let (mine, other) = (image(&scratch, "mine")?, image(&scratch, "other")?);
    let first = machine("drives-own-1", &scratch, &[Drive::new("data", &mine)])?;
    let second = machine("drives-own-2", &scratch, &[Drive::new("data", &other)])?;
    let before = second.get("/vm/config")?;

    let holder = format!("process {} has it", first.pid());
    let name = mine.display().to_string();
    let words = [name.as_str(), holder.as_str(), "use a copy"];
    put(&second, "hot", &mine, false)?.assert_refused(&words);
    put(&second, "hot", &mine, true)?.assert_refused(&words);
    swap(&second, "data", &mine)?.assert_refused(&words);
    assert_eq!(second.get("/vm/config")?, before);

    // Before its start a machine is told so, too.
    let third = MonitorBuilder::new("drives-own-3")?.start()?;
    third
        .put("/drives/data", &body("data", &mine, false))?
        .assert_refused(&words);

    let own = "another device of this machine has it";
    put(&first, "hot", &mine, false)?.assert_refused(&[own]);
    Ok(())
}

#[test]
fn an_image_is_free_when_its_machine_lets_go() -> Result {
    let scratch = Scratch::new("drives-free")?;
    let (one, two) = (image(&scratch, "one")?, image(&scratch, "two")?);
    let first = machine("drives-free-1", &scratch, &[Drive::new("data", &one)])?;
    let second = machine("drives-free-2", &scratch, &[])?;
    // A swap lets the old image go and takes the new one.
    swap(&first, "data", &two)?.success()?;
    put(&second, "hot", &one, false)?.success()?;
    swap(&first, "data", &one)?.assert_refused(&["one"]);
    // So does unplugging.
    second
        .request("DELETE", "/drives/hot", r#"{"force": true}"#)?
        .success()?;
    swap(&first, "data", &one)?.success()?;
    put(&second, "hot", &two, false)?.success()?;
    // And the end of a machine, even a sudden one.
    drop(first);
    put(&second, "again", &one, false)?.success()?;
    Ok(())
}

#[test]
fn machines_share_an_image_that_nobody_writes() -> Result {
    let scratch = Scratch::new("drives-share")?;
    let shared = image(&scratch, "shared")?;
    let drives = [
        Drive::new("one", &shared).read_only(),
        Drive::new("two", &shared).read_only(),
    ];
    let first = machine("drives-share-1", &scratch, &drives)?;
    let second = machine("drives-share-2", &scratch, &drives)?;
    put(&second, "hot", &shared, true)?.success()?;
    put(&second, "writer", &shared, false)?.assert_refused(&["is_read_only (pmem: read_only) everywhere"]);
    drop((first, second));
    Ok(())
}

#[test]
fn memory_in_a_file_is_locked_like_a_disk() -> Result {
    let scratch = Scratch::new("drives-pmem")?;
    let (mine, other) = (image(&scratch, "mine")?, image(&scratch, "other")?);
    // Without a drive: what the filters of system calls allow must do.
    let first = machine("drives-pmem-1", &scratch, &[])?;
    let second = machine("drives-pmem-2", &scratch, &[Drive::new("data", &other)])?;
    let put_pmem = |vm: &Vm, id: &str, path: &Path, read_only: bool| {
        let body = json!({"id": id, "path_on_host": path, "read_only": read_only});
        vm.put(&format!("/pmem/{id}"), &body)
    };
    let remove = |vm: &Vm, path: &str| vm.request("DELETE", path, r#"{"force": true}"#)?.success();

    put_pmem(&first, "mem", &mine, false)?.success()?;
    let before = second.get("/vm/config")?;
    let holder = format!("process {} has it", first.pid());
    let name = mine.display().to_string();
    let words = [name.as_str(), holder.as_str(), "pmem: read_only", "use a copy"];
    put_pmem(&second, "mem", &mine, false)?.assert_refused(&words);
    put(&second, "hot", &mine, false)?.assert_refused(&words);
    swap(&second, "data", &mine)?.assert_refused(&words);
    put_pmem(&second, "mem", &mine, true)?.assert_refused(&["for reading", &holder]);
    assert_eq!(second.get("/vm/config")?, before);
    put(&first, "hot", &mine, false)?.assert_refused(&["another device of this machine has it"]);
    let drive_holder = format!("process {} has it", second.pid());
    put_pmem(&first, "other", &other, false)?.assert_refused(&["other", &drive_holder]);

    // It is free when it is detached, and readers share it.
    remove(&first, "/pmem/mem")?;
    put_pmem(&second, "mem", &mine, true)?.success()?;
    put_pmem(&first, "mem", &mine, true)?.success()?;
    put(&first, "hot", &mine, true)?.success()?;
    put_pmem(&second, "writer", &mine, false)?.assert_refused(&["for writing"]);
    remove(&second, "/pmem/mem")?;
    drop(first);
    put(&second, "hot", &mine, false)?.success()?;
    Ok(())
}

#[test]
fn an_image_that_has_grown_or_shrunk_is_opened_anew_and_stays_locked() -> Result {
    let scratch = Scratch::new("drives-size")?;
    let (mine, other) = (image(&scratch, "mine")?, image(&scratch, "other")?);
    let first = machine("drives-size-1", &scratch, &[Drive::new("data", &mine)])?;
    let second = machine("drives-size-2", &scratch, &[])?;
    let before = first.get("/vm/config")?;
    let file = File::options().write(true).open(&mine)?;
    for size in [3 << 20, 512] {
        file.set_len(size)?;
        swap(&first, "data", &mine)?.success()?;
        put(&second, "hot", &mine, true)?.assert_refused(&["for reading"]);
    }
    assert_eq!(first.get("/vm/config")?, before);

    // What cannot be a disk changes nothing, nor does a bad part beside a good one.
    file.set_len(511)?;
    swap(&first, "data", &mine)?.assert_refused(&["511 bytes", "truncate"]);
    let limit = json!({"ops": {"size": 1, "refill_time": -1}});
    let patch = json!({"drive_id": "data", "path_on_host": other, "rate_limiter": limit});
    first
        .patch("/drives/data", &patch)?
        .assert_refused(&["integer `-1`"]);
    let none = scratch.join("none");
    let limit = json!({"ops": {"size": 1, "refill_time": 1000}});
    let patch = json!({"drive_id": "data", "path_on_host": none, "rate_limiter": limit});
    first.patch("/drives/data", &patch)?.assert_refused(&["none"]);
    assert_eq!(first.get("/vm/config")?, before);
    put(&second, "hot", &mine, true)?.assert_refused(&["for reading"]);
    put(&second, "hot", &other, false)?.success()?;
    Ok(())
}

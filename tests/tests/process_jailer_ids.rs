//! Jails of an ordinary user whose VMs have ids that the system has set aside for the user.

use std::fs;
use std::os::unix::fs::MetadataExt;

use mayfly_tests::jail::{Ended, JAIL_USER, Jail};
use mayfly_tests::{HOST_TIMEOUT, Result, wait_until};

/// The first of the ten ids that the user may have.
const FIRST: u32 = 200_000;
const IDS: [&str; 2] = ["--uid=200003", "--gid=200004"];

#[test]
fn a_users_vm_can_have_ids_that_are_set_aside() -> Result {
    let jail = Jail::with_ids("ids", FIRST)?;
    let vm = jail.start(&IDS)?;
    let pid = jail.pid()?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    for line in [
        "Uid:\t200003\t200003\t200003\t200003",
        "Gid:\t200004\t200004\t200004\t200004",
        "Groups:\t ",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
    ] {
        assert!(status.contains(&format!("{line}\n")), "{line:?}: {status}");
    }
    let jailer = format!("/proc/{}/status", vm.id());
    // CAP_KILL: who waits for a VM with other ids signals it. The VM may be quicker than the jailer, which gives up the rest.
    wait_until("the jailer has CAP_KILL only", HOST_TIMEOUT, || {
        fs::read_to_string(&jailer).is_ok_and(|status| status.contains("CapEff:\t0000000000000020\n"))
    })?;
    let root = fs::metadata(jail.root())?;
    assert_eq!(
        (root.uid(), root.gid(), root.mode() & 0o777),
        (200_003, 200_004, 0o700)
    );

    let in_use = format!("The jail of 'vm1' is in use by process {pid}");
    jail.run(&IDS)?.assert_refused(&in_use);
    jail.clean_up()?.assert_refused(&in_use);

    let said = vm.kill()?.stderr;
    assert!(
        said.contains("the VM runs as uid 200003 and gid 200004"),
        "{said}"
    );
    Ok(())
}

#[test]
fn a_daemon_with_ids_that_are_set_aside_is_known_to_live() -> Result {
    let jail = Jail::with_ids("ids-daemon", FIRST)?;
    let args = [&IDS[..], &["--daemonize", "--", "--api-sock", "/run/api.sock"]].concat();
    assert_eq!(jail.run(&args)?.code, 0);
    let pid = jail.pid()?;
    let in_use = format!("The jail of 'vm1' is in use by process {pid}");
    jail.run(&IDS)?.assert_refused(&in_use);
    jail.clean_up()?.assert_refused(&in_use);
    let user = JAIL_USER.to_string();
    let kill = format!("kill -9 {pid}");
    // Who owns the namespace may signal what is in it.
    let killed = std::process::Command::new("setpriv")
        .args([
            "--reuid",
            &user,
            "--regid",
            &user,
            "--clear-groups",
            "sh",
            "-c",
            &kill,
        ])
        .status()?;
    assert!(killed.success());
    let path = format!("/proc/{pid}");
    wait_until("the VM's end", HOST_TIMEOUT, || {
        !std::path::Path::new(&path).exists()
    })?;
    jail.clean_up()?.assert_success();
    assert!(!jail.folder().exists());
    Ok(())
}

#[test]
fn what_such_a_vm_leaves_is_taken_over_by_the_same_user_only() -> Result {
    let jail = Jail::with_ids("ids-again", FIRST)?;
    jail.start(&IDS)?.kill()?;
    jail.start(&IDS)?.kill()?;
    let message = format!(
        "The path {} is not safe: it belongs to another",
        jail.root().display()
    );
    jail.run(&[])?.assert_refused(&message);
    jail.run(&["--uid=200005", "--gid=200004"])?
        .assert_refused(&message);
    jail.clean_up()?.assert_success();
    assert!(!jail.folder().exists());
    jail.start(&[])?.kill()?;
    jail.start(&IDS)?.kill()?;
    jail.clean_up()?.assert_success();
    Ok(())
}

#[test]
fn ids_that_are_not_set_aside_are_refused() -> Result {
    let jail = Jail::with_ids("ids-refused", FIRST)?;
    let refused = |uid: u32, gid: u32, message: &str| -> Result {
        let ended = jail.run(&[&format!("--uid={uid}"), &format!("--gid={gid}")])?;
        ended.assert_refused(message);
        assert!(!jail.folder().exists());
        Ok(())
    };
    let beyond = FIRST + 10;
    refused(
        beyond,
        FIRST,
        "Failed to give the VM the id 200010 by newuidmap: uid range [200010-200011)",
    )?;
    refused(
        FIRST,
        beyond,
        "Failed to give the VM the id 200010 by newgidmap: gid range [200010-200011)",
    )?;
    refused(
        0,
        0,
        "Failed to give the VM the id 0 by newuidmap: uid range [0-1)",
    )?;
    refused(
        FIRST,
        JAIL_USER,
        "Invalid gid: 54321, without root, --uid and --gid are both",
    )?;
    refused(
        JAIL_USER,
        FIRST,
        "Invalid uid: 54321, without root, --uid and --gid are both",
    )
}

#[test]
fn without_the_helpers_other_ids_are_refused() -> Result {
    let jail = Jail::with_ids("ids-no-helper", FIRST)?;
    let mut command = jail.command(&IDS);
    command.env("PATH", "/nonexistent");
    let ended = Ended::from(command.output()?);
    ended.assert_refused("Failed to give the VM the id 200003 by newuidmap: No such file or directory");
    assert!(ended.stderr.contains("package uidmap"), "{ended:?}");
    assert!(!jail.folder().exists());
    Ok(())
}

#[test]
fn a_config_of_such_a_user_is_imported_by_copies() -> Result {
    let jail = Jail::with_ids("ids-import", FIRST)?;
    let disk = jail.dir().join("disk");
    fs::write(&disk, "of the user")?;
    jail.give(&disk)?;
    fs::write(
        jail.dir().join("vm.json"),
        r#"{"drives": [{"path_on_host": "disk"}]}"#,
    )?;
    let args = [&IDS[..], &["--config-file=vm.json", "--import"]].concat();
    let ended = jail.run(&args)?;
    ended.assert_refused("Failed to read and write ");
    assert!(ended.stderr.contains("uid 200003"), "{ended:?}");
    jail.run(&[&args[..], &["--copy", "--", "--version"]].concat())?;
    let copy = jail.root().join("import/drives-0-path_on_host");
    assert_eq!(
        (fs::metadata(&copy)?.uid(), fs::read_to_string(&copy)?),
        (200_003, "of the user".into())
    );
    jail.clean_up()?.assert_success();
    Ok(())
}

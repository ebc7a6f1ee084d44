//! `resources/check-host` on copies of hosts: a good one, and ones that differ in one thing.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use mayfly_tests::{Result, Scratch};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/check-host");
/// Who the monitors of the test's hosts run as: an ordinary user that every system has.
const USER: &str = "nobody";
/// The number of [`USER`].
const USER_ID: u32 = 65534;

const KVM: &str = "dev/kvm";
const SMT: &str = "sys/devices/system/cpu/smt/active";
const KSM: &str = "sys/kernel/mm/ksm/run";
const SWAPS: &str = "proc/swaps";
const RELEASE: &str = "proc/sys/kernel/osrelease";
const ACTIONS: &str = "proc/sys/kernel/seccomp/actions_avail";
const MELTDOWN: &str = "sys/devices/system/cpu/vulnerabilities/meltdown";
const CGROUP: &str = "sys/fs/cgroup/cgroup.controllers";
const BPF: &str = "proc/sys/kernel/unprivileged_bpf_disabled";
const LSM: &str = "sys/kernel/security/lsm";
const SHMEM: &str = "sys/kernel/mm/transparent_hugepage/shmem_enabled";

fn write(root: &Path, name: &str, content: &str) -> Result {
    let path = root.join(name);
    fs::create_dir_all(path.parent().unwrap_or(root))?;
    fs::write(path, content)?;
    Ok(())
}

/// A copy of a host on which everything is right.
fn good_host() -> Result<Scratch> {
    let host = Scratch::new("host")?;
    host.open_to_all()?;
    for (name, content) in [
        (KVM, ""),
        (SMT, "0\n"),
        (KSM, "0\n"),
        (SWAPS, "Filename Type Size Used Priority\n"),
        (RELEASE, "6.1.0-30-amd64\n"),
        (
            ACTIONS,
            "kill_process kill_thread trap errno user_notif trace log allow\n",
        ),
        (MELTDOWN, "Not affected\n"),
        (CGROUP, "cpu memory pids\n"),
        (BPF, "2\n"),
        (LSM, "lockdown,capability,landlock,yama,apparmor\n"),
        (SHMEM, "always within_size advise [never] deny force\n"),
    ] {
        write(&host, name, content)?;
    }
    chown(host.join(KVM), Some(USER_ID), None)?;
    fs::set_permissions(host.join(KVM), fs::Permissions::from_mode(0o660))?;
    Ok(host)
}

fn check(host: &Scratch, user: &str) -> Result<(i32, String)> {
    let output = Command::new(SCRIPT)
        .args(["--user", user, "--root"])
        .arg(host.as_os_str())
        .output()?;
    let code = output.status.code().unwrap_or(-1);
    Ok((
        code,
        String::from_utf8(output.stdout)? + &String::from_utf8(output.stderr)?,
    ))
}

/// One finding, with a reason and a remedy.
#[track_caller]
fn assert_finding(host: &Scratch, code: i32, words: &[&str]) -> Result {
    let (actual, text) = check(host, USER)?;
    assert_eq!(actual, code, "{text}");
    assert!(
        words.iter().all(|word| text.contains(word)),
        "{words:?} in {text}"
    );
    let kind = if code == 2 { "FAIL " } else { "warn " };
    let lines: Vec<_> = text.lines().collect();
    let findings: Vec<_> = (0..lines.len())
        .filter(|at| lines[*at].starts_with(kind))
        .collect();
    assert_eq!(findings.len(), 1, "{text}");
    assert!(lines[findings[0] + 1].trim().starts_with("why: "), "{text}");
    assert!(lines[findings[0] + 2].trim().starts_with("do:  "), "{text}");
    Ok(())
}

#[test]
fn a_good_host_has_nothing_to_do() -> Result {
    let (code, text) = check(&good_host()?, USER)?;
    assert_eq!(code, 0, "{text}");
    assert!(text.lines().all(|line| line.starts_with("ok    ")), "{text}");
    Ok(())
}

#[test]
fn each_weakness_is_found_and_explained() -> Result {
    for (name, content, words) in [
        (SMT, "1\n", ["SMT is on", "nosmt"]),
        (KSM, "1\n", ["KSM", "ksm/run"]),
        (
            SWAPS,
            "Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n",
            ["/dev/sda2", "swapoff"],
        ),
        (RELEASE, "5.10.0-8-amd64\n", ["5.10.0", "older than 5.12"]),
        (RELEASE, "5.11.22\n", ["5.11.22", "jailer"]),
        (
            LSM,
            "capability,yama\n",
            ["no Landlock", "lsm=landlock,capability,yama"],
        ),
        (LSM, "\n", ["does not tell", "securityfs"]),
        (MELTDOWN, "Vulnerable\n", ["meltdown: Vulnerable", "microcode"]),
        (BPF, "0\n", ["BPF", "sysctl"]),
        (SHMEM, "always never [force]\n", ["shmem_enabled", "2 MiB"]),
    ] {
        let host = good_host()?;
        write(&host, name, content)?;
        assert_finding(&host, 1, &words)?;
    }
    Ok(())
}

#[test]
fn what_keeps_mayfly_from_working_is_a_failure() -> Result {
    for (name, content, words) in [
        (RELEASE, "4.19.0\n", ["4.19.0", "older than 5.10"]),
        (ACTIONS, "\n", ["no system call filters", "CONFIG_SECCOMP_FILTER"]),
    ] {
        let host = good_host()?;
        write(&host, name, content)?;
        assert_finding(&host, 2, &words)?;
    }
    let host = good_host()?;
    fs::remove_file(host.join(KVM))?;
    assert_finding(&host, 2, &["no /dev/kvm", "kvm_intel"])
}

#[test]
fn the_right_to_kvm_is_that_of_the_user_and_of_nobody_else() -> Result {
    let host = good_host()?;
    chown(host.join(KVM), Some(0), Some(0))?;
    assert_finding(&host, 2, &["may not be read", "group"])?;
    fs::set_permissions(host.join(KVM), fs::Permissions::from_mode(0o666))?;
    assert_finding(&host, 1, &["mode 666", "chmod 660"])?;
    let (code, text) = check(&good_host()?, "root")?;
    assert!(code == 1 && text.contains("would run as root"), "{text}");
    Ok(())
}

#[test]
fn old_cgroups_and_none_are_told_apart() -> Result {
    let host = good_host()?;
    fs::remove_file(host.join(CGROUP))?;
    assert_finding(&host, 1, &["no cgroups", "mount -t cgroup2"])?;
    fs::create_dir_all(host.join("sys/fs/cgroup/memory"))?;
    assert_finding(&host, 1, &["cgroup version 1", "unified_cgroup_hierarchy"])
}

#[test]
fn a_call_that_makes_no_sense_is_refused() -> Result {
    let (code, text) = check(&good_host()?, "no-such-user")?;
    assert!(code == 2 && text.contains("no-such-user"), "{text}");
    let output = Command::new(SCRIPT).arg("--fix").output()?;
    assert_eq!(output.status.code(), Some(2));
    Ok(())
}

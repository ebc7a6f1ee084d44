//! What meets a jailer that is up against a hostile jail folder, a host without room, and its own death.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use mayfly_tests::jail::{JAIL_USER, Jail, Starter};
use mayfly_tests::{Client, Failure, Result, steps};

const BOTH: [Starter; 2] = [Starter::Root, Starter::User];

/// A jail that was started once and whose VM has ended, so that everything is there.
fn used(starter: Starter) -> Result<Jail> {
    let jail = Jail::new("used", starter)?;
    jail.start(&[])?.kill()?;
    Ok(jail)
}

/// Something of the host that the jailer must leave alone.
struct Victim {
    path: PathBuf,
    before: (u32, u32, u32, u64, i64),
}

impl Victim {
    fn folder(jail: &Jail) -> Result<Self> {
        let path = jail.dir().join("victim");
        fs::create_dir(&path)?;
        Self::new(path)
    }

    fn file(jail: &Jail) -> Result<Self> {
        let path = jail.dir().join("victim");
        fs::write(&path, "of the host")?;
        Self::new(path)
    }

    fn new(path: PathBuf) -> Result<Self> {
        fs::set_permissions(
            &path,
            fs::Permissions::from_mode(if path.is_dir() { 0o711 } else { 0o640 }),
        )?;
        Ok(Self {
            before: Self::state(&path)?,
            path,
        })
    }

    /// Mode, owner, group, size, and when the content changed.
    fn state(path: &Path) -> Result<(u32, u32, u32, u64, i64)> {
        let stat = fs::metadata(path)?;
        Ok((
            stat.mode(),
            stat.uid(),
            stat.gid(),
            stat.size(),
            stat.mtime_nsec(),
        ))
    }

    #[track_caller]
    fn assert_untouched(&self) -> Result {
        assert_eq!(Self::state(&self.path)?, self.before, "{}", self.path.display());
        Ok(())
    }
}

/// Puts a symbolic link in the place of something, and asserts that the jailer refuses it and touches nothing behind it.
#[track_caller]
fn assert_link_refused(jail: &Jail, path: &Path, victim: &Victim) -> Result {
    let aside = path.with_extension("aside");
    fs::rename(path, &aside)?;
    for target in [
        victim.path.as_path(),
        Path::new("/no/such/target"),
        Path::new("../../.."),
    ] {
        symlink(target, path)?;
        jail.run(&[])?.assert_refused("The path ");
        victim.assert_untouched()?;
        fs::remove_file(path)?;
    }
    fs::rename(&aside, path)?;
    Ok(())
}

#[test]
fn symbolic_links_to_folders_are_refused_at_every_place() -> Result {
    for starter in BOTH {
        let jail = used(starter)?;
        let victim = Victim::folder(&jail)?;
        let (base, root) = (jail.base(), jail.root());
        let program = jail.folder().parent().map(Path::to_owned).unwrap_or_default();
        for path in [
            base,
            program,
            jail.folder(),
            root.clone(),
            root.join("dev"),
            root.join("dev/net"),
            root.join("run"),
        ] {
            assert_link_refused(&jail, &path, &victim)?;
        }
        jail.start(&[])?.kill()?;
    }
    Ok(())
}

#[test]
fn symbolic_links_to_files_are_refused() -> Result {
    for starter in BOTH {
        let jail = used(starter)?;
        let victim = Victim::file(&jail)?;
        for name in ["root/mayfly", "root/dev/kvm", "root/dev/net/tun", "record"] {
            assert_link_refused(&jail, &jail.folder().join(name), &victim)?;
        }
        jail.start(&[])?.kill()?;
    }
    Ok(())
}

#[test]
fn a_symbolic_link_in_place_of_the_pid_file_is_removed() -> Result {
    let jail = used(Starter::Root)?;
    let victim = Victim::file(&jail)?;
    let path = jail.root().join("mayfly.pid");
    fs::remove_file(&path)?;
    symlink(&victim.path, &path)?;

    let vm = jail.start(&[])?;

    victim.assert_untouched()?;
    assert!(fs::symlink_metadata(&path)?.is_file());
    vm.kill().map(drop)
}

#[test]
fn hard_links_are_refused() -> Result {
    let jail = used(Starter::Root)?;
    let victim = Victim::file(&jail)?;
    for name in ["root/mayfly", "record"] {
        let path = jail.folder().join(name);
        fs::remove_file(&path)?;
        fs::hard_link(&victim.path, &path)?;
        let message = format!("Detected hard link at: {}", path.display());
        jail.run(&[])?.assert_refused(&message);
        jail.run(&["--copy"])?.assert_refused(&message);
        victim.assert_untouched()?;
        fs::remove_file(&path)?;
    }
    let device = jail.root().join("dev/kvm");
    fs::hard_link(&device, jail.dir().join("kvm"))?;
    jail.run(&[])?.assert_refused("Detected hard link at: ");
    Ok(())
}

#[test]
fn other_files_in_the_place_of_expected_ones_are_refused() -> Result {
    let jail = used(Starter::Root)?;
    let refused = |path: &Path| -> Result {
        jail.run(&[])?
            .assert_refused(&format!("The path {} is not safe: ", path.display()));
        Ok(())
    };
    let program = jail.root().join("mayfly");
    fs::remove_file(&program)?;
    let name = CString::new(program.as_os_str().as_bytes())?;
    // SAFETY: needed because the standard library makes no pipes with names. The path ends with zero.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    refused(&program)?;
    fs::remove_file(&program)?;
    let kvm = jail.root().join("dev/kvm");
    fs::remove_file(&kvm)?;
    fs::write(&kvm, "no device")?;
    refused(&kvm)?;
    fs::remove_file(&kvm)?;
    let run = jail.root().join("run");
    fs::remove_dir_all(&run)?;
    fs::write(&run, "no folder")?;
    refused(&run)?;
    fs::remove_file(&run)?;
    jail.start(&[])?.kill().map(drop)
}

#[test]
fn folders_that_become_symbolic_links_meanwhile_lead_nowhere() -> Result {
    let jail = used(Starter::Root)?;
    let victim = Victim::folder(&jail)?;
    let (run, link) = (jail.root().join("run"), jail.dir().join("link"));
    symlink(&victim.path, &link)?;
    let name = |path: &Path| CString::new(path.as_os_str().as_bytes());
    let (first, second) = (name(&run)?, name(&link)?);
    let stop = AtomicBool::new(false);
    let exchange = || {
        let (here, exchange) = (libc::AT_FDCWD, libc::RENAME_EXCHANGE);
        // SAFETY: needed because the standard library cannot exchange two names. Both paths end with zero.
        unsafe { libc::renameat2(here, first.as_ptr(), here, second.as_ptr(), exchange) }
    };
    let exchange_on = || {
        let mut done = 0_u64;
        while !stop.load(Ordering::Relaxed) {
            assert_eq!(exchange(), 0, "{}", std::io::Error::last_os_error());
            done += 1;
        }
        done
    };
    let (exchanges, tried) = std::thread::scope(|scope| {
        let exchanger = scope.spawn(exchange_on);
        let tried: Result<Vec<_>> = (0..30).map(|_| jail.run(&["--", "--version"])).collect();
        stop.store(true, Ordering::Relaxed);
        (exchanger.join(), tried)
    });
    victim.assert_untouched()?;
    let exchanges = exchanges.map_err(|_| Failure::new("the names could not be exchanged"))?;
    assert!(exchanges > 0);
    for ended in tried? {
        let refused = ended.code == 1 && ended.stderr.contains("is not safe: ");
        assert!(refused || ended.code == 0, "{ended:?}");
    }
    Ok(())
}

#[test]
fn what_a_vm_has_left_is_removed_and_nothing_else() -> Result {
    for starter in BOTH {
        let jail = used(starter)?;
        let victim = Victim::folder(&jail)?;
        let run = jail.root().join("run");
        symlink(&victim.path, run.join("link"))?;
        fs::write(run.join("file"), "x")?;
        // Deeper than a path can be long, and than files may be open: each folder is moved into the next one.
        let (inner, outer) = (run.join("inner"), run.join("outer"));
        for _ in 0..2000 {
            fs::create_dir(&outer)?;
            jail.give(&outer)?;
            fs::write(outer.join("file"), "x")?;
            if inner.exists() {
                fs::rename(&inner, outer.join("inner"))?;
            }
            fs::rename(&outer, &inner)?;
        }

        jail.clean_up()?.assert_success();

        assert!(!jail.folder().exists());
        victim.assert_untouched()?;
    }
    Ok(())
}

#[test]
fn what_is_no_folder_among_those_to_be_emptied_blocks_no_removal() -> Result {
    for starter in BOTH {
        let jail = used(starter)?;
        let victim = Victim::folder(&jail)?;
        let (file, link) = (jail.folder().join("removing-7"), jail.folder().join("removing-8"));
        fs::write(&file, "x")?;
        symlink(&victim.path, &link)?;
        if starter == Starter::User {
            lchown(&file, Some(JAIL_USER), Some(JAIL_USER))?;
            lchown(&link, Some(JAIL_USER), Some(JAIL_USER))?;
        }
        jail.clean_up()?.assert_success();
        assert!(!jail.folder().exists());
        victim.assert_untouched()?;
    }
    Ok(())
}

#[test]
fn what_is_mounted_in_a_jail_is_unmounted_before_it_is_removed() -> Result {
    let jail = used(Starter::Root)?;
    let treasure = jail.dir().join("treasure");
    fs::create_dir(&treasure)?;
    fs::write(treasure.join("file"), "of the host")?;
    let inside = jail.root().join("with blank");
    fs::create_dir(&inside)?;
    let _mount = Mounted::bind(&treasure, &inside)?;
    assert!(inside.join("file").exists());

    jail.clean_up()?.assert_success();

    assert!(!jail.folder().exists());
    assert_eq!(fs::read_to_string(treasure.join("file"))?, "of the host");
    Ok(())
}

/// A mount that is taken away when the test ends.
struct Mounted(CString);

impl Mounted {
    fn bind(source: &Path, target: &Path) -> Result<Self> {
        Self::new(Some(source), target, None, libc::MS_BIND, "")
    }

    fn tmpfs(target: &Path, options: &str) -> Result<Self> {
        Self::new(None, target, Some(c"tmpfs"), 0, options)
    }

    fn new(
        source: Option<&Path>,
        target: &Path,
        kind: Option<&std::ffi::CStr>,
        flags: libc::c_ulong,
        options: &str,
    ) -> Result<Self> {
        let text = |path: &Path| CString::new(path.as_os_str().as_bytes());
        let source = text(source.unwrap_or(Path::new("none")))?;
        let (target, options) = (text(target)?, CString::new(options)?);
        let kind = kind.map_or(std::ptr::null(), std::ffi::CStr::as_ptr);
        // SAFETY: needed because the standard library knows no mounts. All strings end with zero.
        match unsafe {
            libc::mount(
                source.as_ptr(),
                target.as_ptr(),
                kind,
                flags,
                options.as_ptr().cast(),
            )
        } {
            0 => Ok(Self(target)),
            _ => Err(std::io::Error::last_os_error().into()),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // SAFETY: as above. It may be gone.
        unsafe { libc::umount2(self.0.as_ptr(), libc::MNT_DETACH) };
    }
}

/// What the jailer says to a config of the user that names a file, imported in both ways by root.
fn said_of_import(jail: &Jail, path: &str) -> Result<[String; 2]> {
    let config = jail.dir().join("vm.json");
    fs::write(
        &config,
        format!(r#"{{"drives": [{{"path_on_host": "{path}"}}]}}"#),
    )?;
    let import = ["--config-file=vm.json", "--import"];
    let mounted = jail.run(&import)?;
    let copied = jail.run(&[&import[..], &["--copy"]].concat())?;
    assert_eq!((mounted.code, copied.code), (1, 1), "{mounted:?} {copied:?}");
    assert!(!jail.folder().exists());
    Ok([mounted.stderr, copied.stderr])
}

#[test]
fn a_config_leads_root_to_nothing_that_the_vms_user_cannot_reach() -> Result {
    let jail = Jail::new("secret", Starter::Root)?;
    let secret = jail.dir().join("secret");
    fs::create_dir(&secret)?;
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o700))?;
    fs::write(secret.join("file"), "of root")?;
    for said in said_of_import(&jail, "secret/file")? {
        assert!(
            said.starts_with("Failed to open, as the user of the VM,"),
            "{said}"
        );
    }
    fs::write(jail.dir().join("shadow"), "of root")?;
    fs::set_permissions(jail.dir().join("shadow"), fs::Permissions::from_mode(0o600))?;
    let [mounted, copied] = said_of_import(&jail, "shadow")?;
    assert!(mounted.starts_with("Failed to read and write "), "{mounted}");
    assert!(
        copied.starts_with("Failed to open, as the user of the VM,"),
        "{copied}"
    );
    Ok(())
}

#[test]
fn links_of_proc_lead_a_config_to_nothing() -> Result {
    let jail = Jail::new("magic", Starter::Root)?;
    for said in said_of_import(&jail, "/proc/self/fd/0")? {
        assert!(said.contains("it leads over a link of /proc"), "{said}");
    }
    Ok(())
}

#[test]
fn only_regular_files_are_copied() -> Result {
    let jail = Jail::new("zero", Starter::Root)?;
    fs::write(
        jail.dir().join("vm.json"),
        r#"{"drives": [{"path_on_host": "/dev/zero"}]}"#,
    )?;
    jail.run(&["--config-file=vm.json", "--import", "--copy"])?
        .assert_refused("The path /dev/zero is not safe: only regular files can be copied");
    jail.run(&["--config-file=/dev/zero", "--import"])?
        .assert_refused("The config file /dev/zero cannot be imported: it is no regular file");
    Ok(())
}

#[test]
fn a_full_disk_is_reported_and_leaves_no_jail() -> Result {
    for starter in BOTH {
        let jail = Jail::new("full", starter)?;
        fs::create_dir(jail.base())?;
        let _disk = Mounted::tmpfs(&jail.base(), &format!("size=64k,uid={JAIL_USER}"))?;
        jail.run(&["--copy"])?.assert_refused("Failed to write ");
        assert!(!jail.folder().exists());
        // Mounts need no room.
        jail.start(&[])?.kill()?;
        jail.clean_up()?.assert_success();
    }
    Ok(())
}

#[test]
fn a_disk_without_room_for_names_is_reported() -> Result {
    for inodes in 2..10 {
        let jail = Jail::new("inodes", Starter::Root)?;
        fs::create_dir(jail.base())?;
        let _disk = Mounted::tmpfs(&jail.base(), &format!("nr_inodes={inodes}"))?;
        jail.run(&[])?.assert_refused("Failed to create ");
        assert!(!jail.root().exists(), "{inodes}");
    }
    Ok(())
}

#[test]
fn too_few_descriptors_are_reported_and_block_nothing() -> Result {
    for starter in BOTH {
        let jail = Jail::new("descriptors", starter)?;
        for limit in 3..14 {
            let mut command = jail.command(&["--", "--version"]);
            let lower = move || {
                let limit = libc::rlimit {
                    rlim_cur: limit,
                    rlim_max: limit,
                };
                // SAFETY: needed because the standard library sets no limits. The structure is alive.
                match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            };
            // SAFETY: needed to limit the new process only; the closure makes a system call and nothing else.
            unsafe { command.pre_exec(lower) };
            let ended = mayfly_tests::jail::Ended::from(command.output()?);
            assert!(
                ended.code == 1 && ended.stderr.contains("Too many open files"),
                "{limit}: {ended:?}"
            );
        }
        jail.start(&[])?.kill()?;
        jail.clean_up()?.assert_success();
    }
    Ok(())
}

#[test]
fn cgroups_are_made_set_up_and_removed() -> Result {
    let jail = Jail::new("cgroup", Starter::Root)?;
    jail.run(&["--parent-cgroup=mayfly-test/a", "--cgroup=pids.max=bogus"])?
        .assert_refused("Failed to write bogus to ");
    let vm = jail.start(&["--parent-cgroup=mayfly-test/a", "--cgroup=pids.max=77"])?;
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", jail.pid()?))?;
    assert!(groups.contains(":/mayfly-test/a/vm1\n"), "{groups}");
    let record = fs::read_to_string(jail.folder().join("record"))?;
    let group = record
        .lines()
        .find_map(|line| line.strip_prefix("cgroup "))
        .unwrap_or_default();
    assert_eq!(fs::read_to_string(Path::new(group).join("pids.max"))?, "77\n");
    vm.kill()?;
    jail.clean_up()?.assert_success();
    assert!(!Path::new(group).exists(), "{group}");
    let parent = Path::new(group).parent().unwrap_or(Path::new("/"));
    fs::remove_dir(parent)?;
    Ok(fs::remove_dir(parent.parent().unwrap_or(Path::new("/")))?)
}

#[test]
fn a_cgroup_that_a_user_may_not_make_is_refused() -> Result {
    let jail = Jail::new("user-cgroup", Starter::User)?;
    let ended = jail.run(&["--parent-cgroup=mayfly-user", "--cgroup=pids.max=77"])?;
    ended.assert_refused("Failed to create the cgroup ");
    assert!(ended.stderr.contains("delegated"), "{ended:?}");
    assert!(!jail.folder().exists());
    Ok(())
}

/// Kills the jailer, or the process that it makes, at every one of these calls; then the next start must work. Returns how
/// many there are.
fn assert_survives_kills(jail: &Jail, args: &[&str], calls: &[libc::c_long]) -> Result<usize> {
    let args = [args, &["--", "--version"]].concat();
    for step in 1.. {
        if !kill_at(jail.command(&args), calls, step)? {
            let vm = jail.start(&[])?;
            assert!(Client::connect(&jail.socket()).is_ok());
            vm.kill()?;
            jail.clean_up()?.assert_success();
            return Ok(step - 1);
        }
        let ended = jail.run(&args)?;
        assert!(
            ended.code == 0 && ended.stdout.starts_with("Mayfly v"),
            "step {step}: {ended:?}"
        );
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        assert!(
            !mounts.contains(&jail.base().display().to_string()),
            "step {step}: {mounts}"
        );
    }
    Err(Failure::new("no start has so many steps"))
}

fn kill_at(mut command: Command, calls: &[libc::c_long], step: usize) -> Result<bool> {
    command.stdout(Stdio::null()).stderr(Stdio::null());
    steps::kill_at(&mut command, calls, step)
}

#[test]
fn a_death_of_roots_jailer_at_any_step_blocks_nothing() -> Result {
    let jail = Jail::new("killed", Starter::Root)?;
    let args = ["--cgroup=pids.max=50", "--parent-cgroup=mayfly-kill"];
    let steps = assert_survives_kills(&jail, &args, &steps::CHANGES)?;
    assert!(steps > 40, "{steps} steps are no start of a jail");
    Ok(())
}

#[test]
fn a_death_of_a_users_jailer_at_any_step_blocks_nothing() -> Result {
    let jail = Jail::new("killed", Starter::User)?;
    let steps = assert_survives_kills(&jail, &[], &steps::CHANGES)?;
    assert!(steps > 40, "{steps} steps are no start of a jail");
    Ok(())
}

#[test]
fn a_death_while_the_program_is_copied_blocks_nothing() -> Result {
    let jail = Jail::new("killed-copy", Starter::Root)?;
    let steps = assert_survives_kills(&jail, &["--copy"], &steps::COPYING)?;
    assert!(steps > 2, "{steps} steps copy no file");
    Ok(())
}

#[test]
fn a_death_while_a_jail_is_removed_blocks_nothing() -> Result {
    let jail = Jail::new("killed-cleanup", Starter::Root)?;
    for step in 1.. {
        assert_eq!(jail.run(&["--", "--version"])?.code, 0);
        fs::create_dir_all(jail.root().join("run/a/b"))?;
        fs::write(jail.root().join("run/a/b/file"), "x")?;
        if !kill_at(jail.command(&["--cleanup"]), &steps::CHANGES, step)? {
            assert!(step > 15, "{step} steps remove no jail");
            break;
        }
        if jail.folder().exists() {
            jail.clean_up()?.assert_success();
        }
        assert!(!jail.folder().exists(), "step {step}");
    }
    Ok(())
}

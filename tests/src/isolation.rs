//! Processes that find less than the machine has: no `/dev/kvm`, or one that they may not open. For
//! [`MonitorBuilder::prepare`](crate::MonitorBuilder::prepare); everybody may do this on most machines, root on all.

use std::ffi::CStr;
use std::io;

const KVM: &CStr = c"/dev/kvm";
/// The user `nobody`.
const NOBODY: u32 = 65534;

/// Hides all devices from the process, `/dev/kvm` among them.
pub fn hide_kvm() -> io::Result<()> {
    own_mounts()?;
    mount(c"none", c"/dev", Some(c"tmpfs"), 0, Some(c"mode=0755"))
}

/// Puts a device that is no KVM in the place of `/dev/kvm`.
pub fn replace_kvm() -> io::Result<()> {
    own_mounts()?;
    mount(c"/dev/null", KVM, None, libc::MS_BIND, None)
}

/// Takes the right to open `/dev/kvm` from the process.
pub fn forbid_kvm() -> io::Result<()> {
    hide_kvm()?;
    // SAFETY: needed because this runs between fork and exec, where only system calls may be made; these are, and the
    // string ends with zero.
    unsafe {
        let file = check(libc::open(KVM.as_ptr(), libc::O_CREAT | libc::O_CLOEXEC, 0))?;
        check(libc::close(file))?;
        if libc::geteuid() == 0 {
            check(libc::setgroups(0, std::ptr::null()))?;
            check(libc::setgid(NOBODY))?;
            check(libc::setuid(NOBODY))?;
        }
    }
    Ok(())
}

/// Gives the process mounts of its own, that nobody else sees.
fn own_mounts() -> io::Result<()> {
    // SAFETY: needed because the standard library knows no namespaces; the call takes flags only.
    unsafe {
        let user = if libc::geteuid() == 0 {
            0
        } else {
            libc::CLONE_NEWUSER
        };
        check(libc::unshare(libc::CLONE_NEWNS | user))?;
    }
    mount(c"none", c"/", None, libc::MS_REC | libc::MS_PRIVATE, None)
}

fn mount(
    source: &CStr,
    target: &CStr,
    kind: Option<&CStr>,
    flags: libc::c_ulong,
    data: Option<&CStr>,
) -> io::Result<()> {
    let kind = kind.map_or(std::ptr::null(), CStr::as_ptr);
    let data = data.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: needed because the standard library knows no mounts. All strings end with zero, and null stands for
    // those that the operation has no use for.
    unsafe {
        check(libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind,
            flags,
            data.cast(),
        ))
    }
    .map(drop)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Puts a folder in the place of `/etc`.
pub fn replace_etc(folder: &CStr) -> io::Result<()> {
    own_mounts()?;
    mount(folder, c"/etc", None, libc::MS_BIND, None)
}

/// Makes the process an ordinary user's, who may use KVM and taps: through device nodes of his own, as those of the
/// machine may be root's.
pub fn become_user(user: u32) -> io::Result<()> {
    own_mounts()?;
    let everybody = 0o666;
    for (path, minor) in [(KVM, 232), (c"/dev/net/tun", 200)] {
        let node = c"/dev/shm/mayfly-device";
        mount(c"none", c"/dev/shm", Some(c"tmpfs"), 0, None)?;
        // SAFETY: needed because this runs between fork and exec, where only system calls may be made; these are, and the
        // strings end with zero.
        unsafe {
            check(libc::mknod(
                node.as_ptr(),
                libc::S_IFCHR,
                libc::makedev(10, minor),
            ))?;
            check(libc::chmod(node.as_ptr(), everybody))?;
        }
        mount(node, path, None, libc::MS_BIND, None)?;
    }
    // SAFETY: as above; the calls change the process only.
    unsafe {
        check(libc::setgroups(0, std::ptr::null()))?;
        check(libc::setgid(user))?;
        check(libc::setuid(user))?;
    }
    Ok(())
}

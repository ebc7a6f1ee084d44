//! [`Tap`]: an Ethernet interface of the host whose other end is a file descriptor.
//!
//! Opened on the control thread when the device is built; the io thread then reads and writes it. A tap that did not
//! exist is created non-persistent: the kernel removes it when this process closes it. One that existed stays.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO, TUN_F_USO4, TUN_F_USO6};

use super::backend::{Backend, HEADER_LEN};
use super::{OpenError, feature, inherited};

const DEVICE: &str = "/dev/net/tun";
const TAP_FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// An open tap.
#[derive(Debug)]
pub struct Tap {
    file: File,
    offloads: u64,
}

impl Tap {
    /// Opens the tap `name`, a valid interface name, and creates it when there is none.
    pub fn open(name: &str) -> Result<Self, OpenError> {
        let tap = Self::open_queue(name, TAP_FLAGS)?;
        note_creation(&tap.file, name);
        Ok(tap)
    }

    /// The same with `count` queues, of which each takes a share of what comes.
    pub fn open_queues(name: &str, count: u16) -> Result<Vec<Self>, OpenError> {
        let queue = |_| Self::open_queue(name, TAP_FLAGS | libc::IFF_MULTI_QUEUE);
        let queues: Vec<_> = (0..count).map(queue).collect::<Result<_, _>>()?;
        queues
            .iter()
            .take(1)
            .for_each(|tap| note_creation(&tap.file, name));
        Ok(queues)
    }

    fn open_queue(name: &str, flags: libc::c_int) -> Result<Self, OpenError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(DEVICE)
            .map_err(|source| OpenError::Driver { source })?;
        attach(&file, name, flags).map_err(|source| refusal(name, flags, source))?;
        Self::set_up(file, name)
    }

    /// Uses the tap that is open as descriptor `fd`, which this process inherited. That descriptor stays open and as
    /// it is, so that a start that failed can be tried again, and a card that was detached can come back.
    pub fn inherit(fd: RawFd) -> Result<Self, OpenError> {
        let file = inherited::duplicate(fd).map_err(|what| OpenError::Descriptor { fd, what })?;
        Self::set_up(file, &format!("of host_fd {fd}"))
    }

    /// The open tap.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Sets an attached tap up; errors call it `name`.
    fn set_up(file: File, name: &str) -> Result<Self, OpenError> {
        let host = |op| {
            move |source| OpenError::Host {
                op,
                name: name.to_owned(),
                source,
            }
        };
        set_header_len(&file).map_err(host("set the header size"))?;
        let offloads = probe_offloads(&file).map_err(host("set the offloads"))?;
        Ok(Self { file, offloads })
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Backend for Tap {
    fn offloads(&self) -> u64 {
        self.offloads
    }

    fn set_offloads(&mut self, features: u64) -> io::Result<()> {
        set_offload_flags(&self.file, offload_flags(features))
    }

    fn open_other(&self, name: &str, queues: u16) -> Result<Vec<Self>, OpenError> {
        // An interface that was renamed since answers to its new name.
        let is_this = request(&self.file).is_ok_and(|own| own.ifr_name == interface_name(name));
        match queues {
            _ if is_this => Ok(Vec::new()),
            1 => Ok(vec![Self::open(name)?]),
            _ => Self::open_queues(name, queues),
        }
    }

    fn set_attached(queue: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
        let flag = if attached {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        let mut request = libc::ifreq {
            ifr_name: [0; libc::IFNAMSIZ],
            ifr_ifru: libc::__c_anonymous_ifr_ifru {
                ifru_flags: short(flag),
            },
        };
        // SAFETY: needed as no safe wrapper exists. The kernel reads one `ifreq`, which lives across the call.
        check(unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETQUEUE, &mut request) })
    }
}

/// What it means that the kernel did not attach the tap.
fn refusal(name: &str, flags: libc::c_int, source: io::Error) -> OpenError {
    let (op, name) = ("take hold", name.to_owned());
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => OpenError::Permission { name, source },
        // E2BIG: others have all the queues that a tap may have.
        Some(libc::EBUSY | libc::E2BIG) => OpenError::Busy { name, source },
        Some(libc::EINVAL) if flags & libc::IFF_MULTI_QUEUE != 0 => OpenError::SingleQueue { name, source },
        Some(libc::EINVAL) => OpenError::NotATap { name, source },
        _ => OpenError::Host { op, name, source },
    }
}

/// Turns on all that the kernel has, newest first, and tells which features that makes.
fn probe_offloads(file: &File) -> io::Result<u64> {
    use feature::{
        CSUM, GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, GUEST_UFO, GUEST_USO4, GUEST_USO6, HOST_ECN,
        HOST_TSO4, HOST_TSO6, HOST_UFO, HOST_USO,
    };
    let tso = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN;
    let ufo = tso | HOST_UFO | GUEST_UFO;
    // USO came with Linux 6.2; some kernels between 4.14 and 4.15 know no UFO.
    let uso = ufo | HOST_USO | GUEST_USO4 | GUEST_USO6;
    for features in [uso, ufo] {
        if set_offload_flags(file, offload_flags(features)).is_ok() {
            return Ok(features);
        }
    }
    set_offload_flags(file, offload_flags(tso))?;
    Ok(tso)
}

/// The kernel's flags for what the guest can take. It refuses a flag without the one it builds on.
fn offload_flags(features: u64) -> libc::c_uint {
    let has = |bits: u64| features & bits == bits;
    let when = |condition: bool, flags: libc::c_uint| if condition { flags } else { 0 };
    if !has(feature::GUEST_CSUM) {
        return 0;
    }
    let tso = when(has(feature::GUEST_TSO4), TUN_F_TSO4) | when(has(feature::GUEST_TSO6), TUN_F_TSO6);
    TUN_F_CSUM
        | tso
        | when(tso != 0 && has(feature::GUEST_ECN), TUN_F_TSO_ECN)
        | when(has(feature::GUEST_UFO), TUN_F_UFO)
        | when(
            has(feature::GUEST_USO4 | feature::GUEST_USO6),
            TUN_F_USO4 | TUN_F_USO6,
        )
}

fn short(flags: libc::c_int) -> libc::c_short {
    libc::c_short::try_from(flags).expect("the flags are the low 15 bits")
}

/// Binds the descriptor to the tap `name`.
fn attach(file: &File, name: &str, flags: libc::c_int) -> io::Result<()> {
    let mut request = libc::ifreq {
        ifr_name: interface_name(name),
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: short(flags),
        },
    };
    // SAFETY: needed as no safe wrapper exists. The kernel reads and writes one `ifreq`, which lives across the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) })
}

fn note_creation(file: &File, name: &str) {
    if flags_of(file).is_ok_and(|flags| flags & libc::IFF_PERSIST == 0) {
        log::info!("created the tap '{name}'; it is down, and goes when this process closes it");
    }
}

/// The name as the kernel's requests have it.
fn interface_name(name: &str) -> [libc::c_char; libc::IFNAMSIZ] {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed();
    }
    ifr_name
}

/// The name and the flags of the tap that the descriptor is bound to.
fn request(file: &impl AsRawFd) -> io::Result<libc::ifreq> {
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 },
    };
    // SAFETY: needed as no safe wrapper exists. The kernel writes one `ifreq`, which lives across the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF, &mut request) })?;
    Ok(request)
}

pub(super) fn flags_of(file: &impl AsRawFd) -> io::Result<libc::c_int> {
    let request = request(file)?;
    // SAFETY: needed to read a union; TUNGETIFF has filled this member in, and any bits are valid.
    Ok(unsafe { request.ifr_ifru.ifru_flags }.into())
}

fn set_header_len(file: &File) -> io::Result<()> {
    let len = libc::c_int::try_from(HEADER_LEN).expect("12 fits");
    // SAFETY: needed as no safe wrapper exists. The kernel reads one int, which lives across the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &len) })
}

fn set_offload_flags(file: &File, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: needed as no safe wrapper exists. The argument is a number, passed as the long that the kernel takes.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
}

pub(super) fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

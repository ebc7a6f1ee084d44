//! A tap interface with an address of the host, for the time of a test.

use std::fs::{File, OpenOptions};
use std::io;
use std::mem;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::thread;
use std::time::Duration;

use libc::{c_ulong, ifreq};

use crate::{Failure, Result};

/// How often a tap is tried that is busy, and how long apart.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(20);

/// A persistent tap that is up, with the address given and the netmask 255.255.255.0. It is removed when dropped.
#[derive(Debug)]
pub struct Tap {
    name: String,
    /// [`libc::IFF_MULTI_QUEUE`], or none.
    queues: i32,
}

impl Tap {
    /// Creates it; needs the right to, as root has.
    pub fn create(name: &str, address: Ipv4Addr) -> Result<Self> {
        Self::create_with(name, address, 0)
    }

    /// The same, as `ip tuntap add ... multi_queue` makes it.
    pub fn create_multi_queue(name: &str, address: Ipv4Addr) -> Result<Self> {
        Self::create_with(name, address, libc::IFF_MULTI_QUEUE)
    }

    fn create_with(name: &str, address: Ipv4Addr, queues: i32) -> Result<Self> {
        let failed = |what: &str, e: io::Error| {
            Failure::new(format!(
                "cannot {what} tap {name}: {e} (is this root, and the tun module loaded?)"
            ))
        };
        if Self::exists(name) {
            return Err(Failure::new(format!(
                "there is a network interface {name} already; remove it"
            )));
        }
        set_persistent(name, queues, true).map_err(|e| failed("create", e))?;
        let tap = Self {
            name: name.into(),
            queues,
        };
        configure(name, address).map_err(|e| failed("configure", e))?;
        Ok(tap)
    }

    /// Gives a tap that somebody else has made an address, and puts it up.
    pub fn set_up(name: &str, address: Ipv4Addr) -> Result {
        Ok(configure(name, address)?)
    }

    /// Lets a user without rights attach to it.
    pub fn give_to(&self, user: u32) -> Result {
        let tun = attach(&self.name, self.queues)?;
        // SAFETY: needed because the standard library knows no taps. This request takes a plain number.
        match unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETOWNER, libc::c_ulong::from(user)) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error().into()),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Opens it, as an orchestrator does that passes it on.
    pub fn open(&self) -> Result<File> {
        Ok(patiently(|| attach(&self.name, self.queues))?)
    }

    /// True when there is a network interface of this name.
    pub fn exists(name: &str) -> bool {
        Path::new("/sys/class/net").join(name).exists()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if let Err(error) = patiently(|| set_persistent(&self.name, self.queues, false)) {
            eprintln!("cannot remove tap {}: {error}", self.name);
        }
    }
}

/// Tries again while a process that is dying, or not yet the program that it is to run, still holds the tap.
fn patiently<T>(attempt: impl Fn() -> io::Result<T>) -> io::Result<T> {
    for _ in 0..TRIES {
        match attempt() {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => thread::sleep(PAUSE),
            result => return result,
        }
    }
    attempt()
}

/// Attaches to the tap, which creates it when it is not there.
fn attach(name: &str, queues: i32) -> io::Result<File> {
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut request = request(name)?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(io::Error::other)?;
    ioctl(&tun, libc::TUNSETIFF, &mut request)?;
    Ok(tun)
}

/// Makes the tap stay, for which it is created when it is not there, or go.
fn set_persistent(name: &str, queues: i32, persistent: bool) -> io::Result<()> {
    let tun = attach(name, queues)?;
    // SAFETY: needed because the standard library knows no taps. This request takes a plain number.
    match unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST, i32::from(persistent)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn configure(name: &str, address: Ipv4Addr) -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let mut request = request(name)?;
    request.ifr_ifru.ifru_addr = socket_address(address)?;
    ioctl(&socket, libc::SIOCSIFADDR, &mut request)?;
    request.ifr_ifru.ifru_netmask = socket_address(Ipv4Addr::new(255, 255, 255, 0))?;
    ioctl(&socket, libc::SIOCSIFNETMASK, &mut request)?;
    request.ifr_ifru.ifru_flags =
        i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).map_err(io::Error::other)?;
    ioctl(&socket, libc::SIOCSIFFLAGS, &mut request)
}

fn request(name: &str) -> io::Result<ifreq> {
    // SAFETY: needed because the structure has no other constructor; all zero is a valid value of it.
    let mut request: ifreq = unsafe { mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    Ok(request)
}

fn socket_address(address: Ipv4Addr) -> io::Result<libc::sockaddr> {
    let [a, b, c, d] = address.octets().map(u8::cast_signed);
    let mut data = [0; 14];
    data[2..6].copy_from_slice(&[a, b, c, d]);
    let sa_family = u16::try_from(libc::AF_INET).map_err(io::Error::other)?;
    Ok(libc::sockaddr {
        sa_family,
        sa_data: data,
    })
}

fn ioctl(file: &impl AsRawFd, operation: c_ulong, request: &mut ifreq) -> io::Result<()> {
    // SAFETY: needed because the standard library knows no interfaces. Every operation that callers pass takes a
    // pointer to an `ifreq`, which is valid for the time of the call.
    match unsafe { libc::ioctl(file.as_raw_fd(), operation, std::ptr::from_mut(request)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

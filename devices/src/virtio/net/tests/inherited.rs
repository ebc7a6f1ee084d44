//! Taps that somebody else has opened. They need the host's tap driver and CAP_NET_ADMIN, and fail where they are missing.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use super::super::inherited::check_flags;
use super::super::{OpenError, Tap};
use super::*;

/// The tap driver, open in a descriptor that a child would inherit.
fn driver() -> File {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    let file = file.expect("these tests need /dev/net/tun");
    pass_on(&file);
    file
}

fn pass_on(file: &impl AsRawFd) {
    // SAFETY: needed as std opens nothing that is inherited. The call clears a flag of an open descriptor.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) }, 0);
}

/// An open interface with these flags.
fn opened(name: &str, flags: libc::c_int) -> File {
    let file = driver();
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let ifru_flags = libc::c_short::try_from(flags).unwrap();
    let mut request = libc::ifreq {
        ifr_name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags },
    };
    // SAFETY: needed as no safe wrapper exists. The kernel reads and writes one `ifreq`, which lives across the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) };
    assert_eq!(
        result,
        0,
        "these tests need CAP_NET_ADMIN: {}",
        io::Error::last_os_error()
    );
    file
}

fn refusal(fd: RawFd) -> String {
    Tap::inherit(fd).unwrap_err().to_string()
}

const GOOD: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

#[test]
fn uses_an_inherited_tap_and_leaves_its_descriptor_open() {
    let file = opened("mayflyi0", GOOD);
    let config: Config =
        serde_json::from_str(&format!(r#"{{"iface_id":"a","host_fd":{}}}"#, file.as_raw_fd())).unwrap();
    for _ in 0..2 {
        config.check().unwrap();
        let net = config.build(None).unwrap();
        assert_ne!(net.info().features & GUEST_CSUM, 0);
    }
    let tap = Tap::inherit(file.as_raw_fd()).unwrap();
    assert!(tap.open_other("mayflyi0", 1).unwrap().is_empty());
    let held = Tap::open("mayflyi0").unwrap_err();
    assert!(matches!(held, OpenError::Busy { .. }), "{held}");
}

#[test]
fn says_which_flag_a_tap_lacks() {
    for (name, flags, missing) in [
        (
            "mayflyi1",
            libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR,
            "IFF_TAP",
        ),
        ("mayflyi2", libc::IFF_TAP | libc::IFF_NO_PI, "IFF_VNET_HDR"),
    ] {
        let file = opened(name, flags);
        let error = refusal(file.as_raw_fd());
        assert!(
            error.starts_with("host_fd ") && error.ends_with(missing),
            "{error}"
        );
    }
}

#[test]
fn sees_protocol_information_where_the_kernel_shows_it() {
    let error = check_flags(libc::IFF_TAP | libc::IFF_VNET_HDR).unwrap_err();
    assert!(error.ends_with("IFF_NO_PI"), "{error}");
    assert_eq!(check_flags(GOOD), Ok(()));
}

#[test]
fn refuses_what_is_no_tap_or_not_inherited() {
    let unbound = driver();
    let error = refusal(unbound.as_raw_fd());
    assert!(error.contains("is not bound to a tap"), "{error}");
    let (socket, _far) = UnixDatagram::pair().unwrap();
    let error = refusal(socket.as_raw_fd());
    assert!(error.contains("was not inherited"), "{error}");
    pass_on(&socket);
    let error = refusal(socket.as_raw_fd());
    assert!(error.ends_with("is no tap"), "{error}");
    for fd in [-1, RawFd::MAX] {
        let error = refusal(fd);
        assert!(error.contains("is not open"), "{error}");
    }
}

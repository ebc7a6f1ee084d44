//! [`OpenError`]: why a network device could not be made.

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

use super::ConfigError;

/// Why a network device could not be made; nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The config is wrong by itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The kernel's tap driver cannot be reached.
    #[error("cannot open /dev/net/tun: load the tun module and let this user read and write the file")]
    Driver {
        /// Why not.
        source: io::Error,
    },
    /// The user may not use the tap, or not create it.
    #[error(
        "no permission for the tap '{name}': make it for this user with 'ip tuntap add dev {name} mode tap user USER', or grant CAP_NET_ADMIN"
    )]
    Permission {
        /// The tap.
        name: String,
        /// The kernel's refusal.
        source: io::Error,
    },
    /// Another process holds the tap, or another interface of this machine.
    #[error("the tap '{name}' is in use already: every network interface needs a tap of its own")]
    Busy {
        /// The tap.
        name: String,
        /// The kernel's refusal.
        source: io::Error,
    },
    /// The interface is something else, or is not shared by several queues.
    #[error(
        "'{name}' is not a tap with several queues: make one with 'ip tuntap add dev {name} mode tap multi_queue', or leave out queues"
    )]
    SingleQueue {
        /// The interface.
        name: String,
        /// The kernel's refusal.
        source: io::Error,
    },
    /// The interface is something else, or has several queues.
    #[error(
        "'{name}' is not a single-queue tap: make one with 'ip tuntap add dev {name} mode tap', without multi_queue"
    )]
    NotATap {
        /// The interface.
        name: String,
        /// The kernel's refusal.
        source: io::Error,
    },
    /// An inherited descriptor is no tap, or not one that can be used.
    #[error("host_fd {fd} {what}")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// What is wrong with it, and what to do.
        what: &'static str,
    },
    /// The program that is the guest's network cannot be reached.
    #[error("cannot {op} '{}': is passt running, with --socket and this path?", path.display())]
    Passt {
        /// What was tried.
        op: &'static str,
        /// Its socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kernel's vhost-net cannot be used.
    #[error(
        "cannot use /dev/vhost-net: load it with 'modprobe vhost_net' and let this user read and write the file, or set vhost false"
    )]
    Vhost {
        /// Why not.
        source: vhost::Error,
    },
    /// The host has no descriptor left.
    #[error("cannot make a descriptor for the card")]
    Descriptors {
        /// Why not.
        source: io::Error,
    },
    /// The host has no timer or no random bytes for the metadata service.
    #[error("cannot set up the metadata service")]
    Mmds {
        /// Why not.
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot {op} of the tap '{name}'")]
    Host {
        /// What was tried.
        op: &'static str,
        /// The tap.
        name: String,
        /// Why not.
        source: io::Error,
    },
}

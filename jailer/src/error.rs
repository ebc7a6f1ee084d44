//! Why a jail was not made. Messages that tooling for jailers of this kind knows keep its wording.

use std::io;
use std::path::{Path, PathBuf};

use crate::args::ArgsError;
use crate::plan::User;

/// What went wrong, on which object.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what each is")]
pub enum Error {
    #[error("Failed to parse arguments: {0}")]
    Args(#[from] ArgsError),
    #[error("Invalid instance ID: {0}")]
    InstanceId(String),
    #[error("Failed to canonicalize path {}: {source}", path.display())]
    Canonicalize { path: PathBuf, source: io::Error },
    #[error("{} is not a file", .0.display())]
    NotAFile(PathBuf),
    #[error("Invalid uid: {0}")]
    Uid(String),
    #[error("Invalid gid: {0}")]
    Gid(String),
    #[error("Invalid device: {0}. The devices that can be asked for are vhost-net and userfaultfd")]
    Device(String),
    #[error("Invalid format for resources limits: {0}")]
    LimitFormat(String),
    #[error("Invalid resource argument: {0}")]
    LimitName(String),
    #[error("Invalid limit value for resource: {0}")]
    LimitValue(String),
    #[error(transparent)]
    Cgroup(#[from] crate::cgroup::CgroupError),
    #[error("The path {} is not safe: {reason}", path.display())]
    Unsafe { path: PathBuf, reason: &'static str },
    #[error("Detected hard link at: {}", .0.display())]
    HardLink(PathBuf),
    #[error("The jail of '{id}' is in use by process {pid}. Nothing was changed")]
    Live { id: String, pid: i32 },
    #[error("The jail of '{0}' is being started or removed by another jailer. Nothing was changed")]
    Busy(String),
    #[error("There is no jail of '{id}' in {}", path.display())]
    NoJail { id: String, path: PathBuf },
    #[error("The config file {} cannot be imported: {reason}", path.display())]
    Config { path: PathBuf, reason: String },
    #[error("Failed to {doing} {}: {source}", path.display())]
    Path {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "Failed to {doing} {}: {source}. The VM runs as uid {} and gid {}, who must be allowed to", path.display(), user.uid, user.gid
    )]
    Access {
        doing: &'static str,
        path: PathBuf,
        user: User,
        source: io::Error,
    },
    #[error("Failed to {doing}: {source}")]
    System { doing: &'static str, source: io::Error },
    #[error("Failed to create a user namespace, which starting a jail without root needs: {source}. {hint}")]
    UserNamespace { source: io::Error, hint: &'static str },
    #[error(
        "Failed to give the VM the id {id} by {helper}: {reason}. Without root, a VM runs as you, or by ids that /etc/subuid \
         and /etc/subgid set aside for you; newuidmap and newgidmap (Debian: package uidmap) must be there"
    )]
    Subordinate {
        helper: &'static str,
        id: u32,
        reason: String,
    },
    /// What the process in the jail said, the message and then its details.
    #[error("{message}")]
    Inside { message: String, details: String },
}

impl Error {
    /// A failed action on a path.
    pub fn path(doing: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Path {
            doing,
            path: path.as_ref().into(),
            source,
        }
    }

    /// A failed action on the process itself.
    pub fn system<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System {
            doing,
            source: source.into(),
        }
    }

    /// What follows the message on standard error: `Error: ` and this.
    pub fn details(&self) -> String {
        match self {
            Self::Inside { details, .. } => details.clone(),
            other => format!("{other:?}"),
        }
    }
}

/// A result of this crate.
pub type Result<T = ()> = std::result::Result<T, Error>;

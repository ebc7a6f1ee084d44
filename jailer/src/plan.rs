//! What will be made: plain data, worked out from the command line before anything is changed.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::args::{Args, ArgsError};
use crate::cgroup;
use crate::error::{Error, Result};
use crate::import::{ConfigFile, Imports};

/// Where jails are when the command line does not say.
const DEFAULT_BASE: &str = "/srv/jailer";
/// The folder below the user's runtime folder that has the jails of an ordinary user.
const USER_BASE: &str = "mayfly-jailer";
/// The program that is started when the command line does not say, beside this one.
const DEFAULT_PROGRAM: &str = "mayfly";
/// How many files may be open when the command line does not say.
const DEFAULT_OPEN_FILES: u64 = 2048;
/// The first of the 2^28 user ids that nobody else has, by the conventions of Linux distributions.
const FIRST_OWN_UID: u32 = 0x7000_0000;

/// Where a jail is and whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The name of the VM.
    pub id: String,
    /// The folder that has all jails.
    pub base: PathBuf,
    /// The program to start, without symbolic links.
    pub program: PathBuf,
    /// Its file name.
    pub name: OsString,
    /// True when this is not root: a user namespace is needed, and some things cannot be had.
    pub rootless: bool,
}

/// Whom the VM runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// The user id.
    pub uid: u32,
    /// The group id.
    pub gid: u32,
}

impl User {
    /// Whom this process runs as.
    pub fn own() -> Self {
        Self {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        }
    }
}

/// What the jailer does once the program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// Waits for its end, passes signals on, and ends the same way.
    Wait,
    /// Ends at once.
    Leave,
    /// Ends at once; the program has left the terminal.
    Daemon,
}

/// Which network the jail has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// The jailer's own.
    Same,
    /// That of a file.
    Join(PathBuf),
    /// A new one, with nothing in it.
    None,
}

/// A device node of the jail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// Its path below `/dev`.
    pub path: &'static str,
    /// Its number.
    pub major: u32,
    /// Its number.
    pub minor: u32,
    /// False if the VM starts without it too.
    pub required: bool,
}

impl Device {
    /// True if everybody may use the host's, so that no group is needed for it.
    fn is_for_all(&self) -> bool {
        const EVERYBODY: u32 = 0o006;
        match Path::new("/dev").join(self.path).metadata() {
            Ok(file) => file.mode() & EVERYBODY == EVERYBODY,
            // That it is missing is said when it is mounted.
            Err(_) => true,
        }
    }
}

/// Limits of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a file.
    pub file_size: Option<u64>,
    /// One more than the largest file descriptor.
    pub open_files: u64,
}

/// Everything about a jail that is to be made.
#[derive(Debug)]
#[expect(missing_docs, reason = "the types say what each is")]
pub struct Plan {
    pub place: Place,
    pub user: User,
    /// The VM keeps the groups of whoever starts it.
    pub keeps_groups: bool,
    pub after: After,
    pub network: Network,
    pub devices: Vec<Device>,
    pub limits: Limits,
    pub cgroups: Vec<cgroup::Group>,
    pub imports: Option<Imports>,
    /// Copy files instead of mounting them.
    pub copy: bool,
    /// The program's arguments after those that the jailer adds.
    pub extra: Vec<OsString>,
}

impl Place {
    /// Works out where a jail is. `runtime` is the folder of the user's runtime files.
    pub fn new(args: &Args, runtime: Option<OsString>) -> Result<Self> {
        check_id(&args.id)?;
        let rootless = !rustix::process::geteuid().is_root();
        let given = match &args.exec_file {
            Some(path) => path.clone(),
            None => std::env::current_exe()
                .map_err(Error::system("find this program's own file"))?
                .with_file_name(DEFAULT_PROGRAM),
        };
        let canonicalize = |source| Error::Canonicalize {
            path: given.clone(),
            source,
        };
        let program = given.canonicalize().map_err(canonicalize)?;
        let name = match program.file_name() {
            Some(name) if program.is_file() => name.to_owned(),
            _ => return Err(Error::NotAFile(program)),
        };
        let base = match (&args.chroot_base_dir, rootless, runtime) {
            (Some(path), ..) => path.clone(),
            (None, false, _) => DEFAULT_BASE.into(),
            (None, true, Some(runtime)) => Path::new(&runtime).join(USER_BASE),
            (None, true, None) => return Err(ArgsError::Required("chroot-base-dir").into()),
        };
        let base = std::path::absolute(&base).map_err(Error::path("find", &base))?;
        Ok(Self {
            id: args.id.clone(),
            base,
            program,
            name,
            rootless,
        })
    }

    /// The folder of the jail, which has its root and its record.
    pub fn folder(&self) -> PathBuf {
        self.base.join(&self.name).join(&self.id)
    }

    /// The root of the jail.
    pub fn root(&self) -> PathBuf {
        self.folder().join("root")
    }
}

impl Plan {
    /// True if the VM's ids are neither root's to give nor the user's own: subordinate ones.
    pub fn has_subordinate_user(&self) -> bool {
        self.place.rootless && self.user != User::own()
    }

    /// Works out what is to be made. Nothing is changed, but files may be read.
    pub fn new(args: &Args, runtime: Option<OsString>) -> Result<Self> {
        let place = Place::new(args, runtime)?;
        let config = args.config_file.as_deref().map(ConfigFile::open).transpose()?;
        let user = user(args, &place, config.as_ref())?;
        let imports = config.as_ref().map(Imports::read).transpose()?;
        let taps = imports.as_ref().is_none_or(Imports::has_taps);
        let network = match &args.netns {
            Some(path) => Network::Join(path.clone()),
            None if taps => Network::Same,
            None => Network::None,
        };
        let devices = devices(&args.devices, taps)?;
        Ok(Self {
            keeps_groups: place.rootless && (user == User::own() || !devices.iter().all(Device::is_for_all)),
            after: match (args.daemonize, args.new_pid_ns) {
                (true, _) => After::Daemon,
                (false, true) => After::Leave,
                (false, false) => After::Wait,
            },
            limits: limits(&args.resource_limits)?,
            cgroups: cgroup::plan(&cgroup::Request::new(args, &place)?)?,
            devices,
            copy: args.copy,
            extra: args.extra.clone(),
            place,
            user,
            network,
            imports,
        })
    }
}

fn check_id(id: &str) -> Result {
    let wrong = match id
        .char_indices()
        .find(|(_, c)| !c.is_ascii_alphanumeric() && *c != '-')
    {
        _ if id.is_empty() || id.len() > 64 => {
            let len = id.len();
            format!("Invalid len ({len});  the length must be between 1 and 64")
        }
        Some((at, wrong)) => format!("Invalid char ({wrong}) at position {at}"),
        None => return Ok(()),
    };
    Err(Error::InstanceId(wrong))
}

/// Whom the VM runs as, by the rules that the help text tells.
fn user(args: &Args, place: &Place, config: Option<&ConfigFile>) -> Result<User> {
    let default = match (place.rootless, config) {
        (true, _) => Some(User::own()),
        (false, Some(config)) => Some(owner(config.owner, &place.id)),
        (false, None) => None,
    };
    let uid = match &args.uid {
        Some(text) => id(text).ok_or_else(|| Error::Uid(text.clone()))?,
        None => default.ok_or(ArgsError::Required("uid"))?.uid,
    };
    let gid = match &args.gid {
        Some(text) => id(text).ok_or_else(|| Error::Gid(text.clone()))?,
        None => default.ok_or(ArgsError::Required("gid"))?.gid,
    };
    let user = User { uid, gid };
    let own = default.filter(|own| place.rootless && *own != user);
    let both = "without root, --uid and --gid are both yours or both set aside for you";
    match own {
        // The map has each id once.
        Some(own) if own.uid == uid => Err(Error::Uid(format!("{uid}, {both}"))),
        Some(own) if own.gid == gid => Err(Error::Gid(format!("{gid}, {both}"))),
        _ => Ok(user),
    }
}

/// A user or group id; the largest number stands for none.
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id != u32::MAX)
}

/// The owner of the config file; for root a user made from the VM's name (FNV-1a), which hardly another jail has.
fn owner(of_config: User, vm: &str) -> User {
    if of_config.uid != 0 {
        return of_config;
    }
    let hash = vm.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    let own = FIRST_OWN_UID + (hash >> 4);
    User { uid: own, gid: own }
}

fn limits(given: &[String]) -> Result<Limits> {
    let mut limits = Limits {
        file_size: None,
        open_files: DEFAULT_OPEN_FILES,
    };
    for text in given {
        let (name, value) = text
            .split_once('=')
            .ok_or_else(|| Error::LimitFormat(text.clone()))?;
        let number = || value.parse::<u64>().map_err(|_| Error::LimitValue(value.into()));
        match name {
            "fsize" => limits.file_size = Some(number()?),
            "no-file" => limits.open_files = number()?,
            other => return Err(Error::LimitName(other.into())),
        }
    }
    Ok(limits)
}

fn devices(asked: &[String], taps: bool) -> Result<Vec<Device>> {
    let node = |path, minor, required| Device {
        path,
        major: 10,
        minor,
        required,
    };
    let mut devices = vec![node("kvm", 232, true)];
    devices.extend(taps.then_some(node("net/tun", 200, true)));
    devices.push(Device {
        major: 1,
        ..node("urandom", 9, false)
    });
    for name in asked {
        let device = match name.as_str() {
            "vhost-net" => node("vhost-net", 238, true),
            "userfaultfd" => node("userfaultfd", misc_minor("userfaultfd")?, true),
            other => return Err(Error::Device(other.into())),
        };
        if !devices.contains(&device) {
            devices.push(device);
        }
    }
    Ok(devices)
}

/// The number that this kernel has given a driver.
fn misc_minor(driver: &'static str) -> Result<u32> {
    let path = Path::new("/proc/misc");
    let list = std::fs::read_to_string(path).map_err(Error::path("read", path))?;
    let found = list.lines().find_map(|line| {
        let (minor, name) = line.trim().split_once(' ')?;
        (name == driver).then(|| minor.parse().ok())?
    });
    let missing = || io::Error::new(io::ErrorKind::NotFound, "this kernel does not have the device");
    found.ok_or_else(|| Error::path("use", Path::new("/dev").join(driver))(missing()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn checks_the_name_of_the_vm() {
        assert!(check_id("a-1").is_ok() && check_id(&"a".repeat(64)).is_ok());
        assert_eq!(
            message(check_id("")),
            "Invalid instance ID: Invalid len (0);  the length must be between 1 and 64"
        );
        assert!(message(check_id(&"a".repeat(65))).contains("Invalid len (65)"));
        assert_eq!(
            message(check_id("12_3")),
            "Invalid instance ID: Invalid char (_) at position 2"
        );
        assert!(message(check_id("../x")).contains("Invalid char (.) at position 0"));
        assert!(message(check_id("ä")).contains("Invalid char (ä) at position 0"));
    }

    #[test]
    fn checks_limits() {
        let limits_of = |texts: &[&str]| limits(&texts.iter().map(ToString::to_string).collect::<Vec<_>>());
        let none = limits_of(&[]).unwrap();
        assert_eq!((none.file_size, none.open_files), (None, 2048));
        let both = limits_of(&["fsize=10", "no-file=20"]).unwrap();
        assert_eq!((both.file_size, both.open_files), (Some(10), 20));
        assert_eq!(
            message(limits_of(&["fsize"])),
            "Invalid format for resources limits: fsize"
        );
        assert_eq!(message(limits_of(&["cpu=1"])), "Invalid resource argument: cpu");
        assert_eq!(
            message(limits_of(&["fsize=-1"])),
            "Invalid limit value for resource: -1"
        );
    }

    #[test]
    fn user_ids_are_numbers_below_the_largest() {
        assert_eq!((id("0"), id("4294967294")), (Some(0), Some(4_294_967_294)));
        assert_eq!(
            (id("4294967295"), id("-1"), id("root"), id("")),
            (None, None, None, None)
        );
    }

    #[test]
    fn jails_whose_config_is_roots_have_users_of_their_own() {
        let root = User { uid: 0, gid: 0 };
        let (one, two) = (owner(root, "vm1"), owner(root, "vm2"));
        assert_ne!(one, two);
        assert_eq!(one, owner(root, "vm1"));
        assert!((0x7000_0000..0x8000_0000).contains(&one.uid));
        let other = User { uid: 7, gid: 0 };
        assert_eq!(owner(other, "vm1"), other);
    }

    #[test]
    fn gives_only_the_devices_that_are_needed() {
        let names = |asked: &[&str], taps| {
            let asked: Vec<_> = asked.iter().map(ToString::to_string).collect();
            let devices = devices(&asked, taps)?;
            Ok::<_, Error>(devices.iter().map(|device| device.path).collect::<Vec<_>>())
        };
        assert_eq!(names(&[], false).unwrap(), ["kvm", "urandom"]);
        let all = names(&["vhost-net", "vhost-net"], true).unwrap();
        assert_eq!(all, ["kvm", "net/tun", "urandom", "vhost-net"]);
        assert!(message(names(&["mem"], false)).starts_with("Invalid device: mem."));
    }
}

//! Cgroups: which are wanted, where the host has them, and making them.
//!
//! A jail's group is `<hierarchy>/<parent>/<id>`. Version 1 has a hierarchy per controller, version 2 one for all.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use crate::args::Args;
use crate::fsat;
use crate::plan::Place;

/// Why a cgroup was not made. Each message names what to change.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what each is")]
pub enum CgroupError {
    #[error("{0} is an invalid cgroup version specifier")]
    Version(String),
    #[error("Invalid format for cgroups: {0}")]
    Format(String),
    #[error("Hierarchy not found: No hierarchy found for this cgroup version.")]
    NoHierarchy,
    #[error("Controller {0} is unavailable")]
    Controller(String),
    #[error("Parent cgroup path is invalid. Path should not be absolute or contain '..' or '.'")]
    Parent,
    #[error("Failed to create the cgroup {}: {source}{}", path.display(), hint(*rootless))]
    Create {
        path: PathBuf,
        source: io::Error,
        rootless: bool,
    },
    #[error("Failed to write {value} to {}: {source}", path.display())]
    Write {
        path: PathBuf,
        value: String,
        source: io::Error,
    },
    #[error(
        "Failed to move process to cgroup ({}): {source}.\nHint: the cgroup must exist, take processes (no controller \
         may be enabled for groups below it), and be writable. With a --cgroup option, a new one is made below it",
        path.display()
    )]
    Move { path: PathBuf, source: io::Error },
    #[error("Failed to read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
}

fn hint(rootless: bool) -> &'static str {
    if rootless {
        ".\nHint: a user can only make cgroups below one that was delegated to him, for example by systemd-run --user \
         --scope -p Delegate=yes; name it by --parent-cgroup"
    } else {
        ""
    }
}

type Result<T = ()> = std::result::Result<T, CgroupError>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// A file of a cgroup and what is to be written to it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Setting {
    file: String,
    value: String,
}

impl Setting {
    fn controller(&self) -> &str {
        self.file.split('.').next().unwrap_or_default()
    }
}

/// What the command line asks for.
#[derive(Debug)]
pub struct Request {
    version: Option<Version>,
    settings: Vec<Setting>,
    /// As given.
    parent: Option<PathBuf>,
    default_parent: PathBuf,
    id: String,
    rootless: bool,
}

/// A cgroup that is to hold the jail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Where the hierarchy is mounted.
    mount: PathBuf,
    /// The group.
    path: PathBuf,
    settings: Vec<Setting>,
    /// Controllers to enable above the group (version 2).
    controllers: Vec<String>,
    version: Version,
    /// False if the group is somebody else's and must exist.
    own: bool,
    rootless: bool,
}

impl Request {
    /// Checks the form of what is asked for.
    pub fn new(args: &Args, place: &Place) -> Result<Self> {
        let version = match args.cgroup_version.as_deref() {
            None => None,
            Some("1") => Some(Version::V1),
            Some("2") => Some(Version::V2),
            Some(other) => return Err(CgroupError::Version(other.into())),
        };
        let normal = |part: Component| matches!(part, Component::Normal(_));
        if let Some(parent) = &args.parent_cgroup {
            // Components drop a dot in the middle.
            let dot = parent.as_os_str().as_encoded_bytes().split(|byte| *byte == b'/');
            if !parent.components().all(normal) || dot.into_iter().any(|part| part == b".") {
                return Err(CgroupError::Parent);
            }
        }
        Ok(Self {
            version,
            settings: args
                .cgroups
                .iter()
                .map(|text| setting(text))
                .collect::<Result<_>>()?,
            parent: args.parent_cgroup.clone(),
            default_parent: PathBuf::from(&place.name),
            id: place.id.clone(),
            rootless: place.rootless,
        })
    }

    /// Where the jail's group is below the hierarchy's mount.
    fn below(&self, mount: &Path, own: Option<&Path>) -> PathBuf {
        let parent = match (&self.parent, own) {
            (Some(parent), _) => parent.clone(),
            // A user's groups can only be near the one that the user is in.
            (None, Some(own)) => own.parent().unwrap_or(own).join(&self.default_parent),
            (None, None) => self.default_parent.clone(),
        };
        mount.join(parent).join(&self.id)
    }
}

fn setting(text: &str) -> Result<Setting> {
    let (file, value) = text
        .split_once('=')
        .filter(|(file, value)| {
            file.contains('.') && !file.contains('/') && !file.starts_with('.') && !value.is_empty()
        })
        .ok_or_else(|| CgroupError::Format(text.into()))?;
    Ok(Setting {
        file: file.into(),
        value: value.into(),
    })
}

/// A line of `/proc/mounts` that is a hierarchy.
struct Hierarchy {
    mount: PathBuf,
    version: Version,
    options: String,
}

fn hierarchies(mounts: &str) -> Vec<Hierarchy> {
    let parse = |line: &str| {
        let mut fields = line.split(' ').skip(1);
        let (mount, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
        let version = match kind {
            "cgroup" => Version::V1,
            "cgroup2" => Version::V2,
            _ => return None,
        };
        Some(Hierarchy {
            mount: fsat::listed_path(mount.as_bytes()),
            version,
            options: options.into(),
        })
    };
    mounts.lines().filter_map(parse).collect()
}

/// Finds where the groups are to be. Nothing is changed.
pub fn plan(request: &Request) -> Result<Vec<Group>> {
    if request.settings.is_empty() && request.parent.is_none() {
        return match request.version {
            // Said, and so to be had.
            Some(version) if !hierarchies(&mounts()?).iter().any(|h| h.version == version) => {
                Err(CgroupError::NoHierarchy)
            }
            _ => Ok(Vec::new()),
        };
    }
    let all = hierarchies(&mounts()?);
    let only_v2 = all.iter().all(|hierarchy| hierarchy.version == Version::V2);
    let default = if only_v2 { Version::V2 } else { Version::V1 };
    let version = request.version.unwrap_or(default);
    let candidates: Vec<_> = all.into_iter().filter(|h| h.version == version).collect();
    let first = candidates.first().ok_or(CgroupError::NoHierarchy)?;
    match version {
        Version::V1 => plan_v1(request, &candidates),
        Version::V2 => Ok(vec![plan_v2(request, first)?]),
    }
}

fn mounts() -> Result<String> {
    read(Path::new("/proc/mounts"))
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|source| CgroupError::Read {
        path: path.into(),
        source,
    })
}

fn plan_v1(request: &Request, hierarchies: &[Hierarchy]) -> Result<Vec<Group>> {
    let mut groups: Vec<Group> = Vec::new();
    for setting in &request.settings {
        let controller = setting.controller();
        let has = |h: &&Hierarchy| h.options.split(',').any(|option| option == controller);
        let hierarchy = hierarchies.iter().find(has);
        let hierarchy = hierarchy.ok_or_else(|| CgroupError::Controller(controller.into()))?;
        match groups.iter_mut().find(|group| group.mount == hierarchy.mount) {
            Some(group) => group.settings.push(setting.clone()),
            None => groups.push(Group {
                mount: hierarchy.mount.clone(),
                path: request.below(&hierarchy.mount, None),
                settings: vec![setting.clone()],
                controllers: Vec::new(),
                version: Version::V1,
                own: true,
                rootless: request.rootless,
            }),
        }
    }
    Ok(groups)
}

fn plan_v2(request: &Request, hierarchy: &Hierarchy) -> Result<Group> {
    let available = read(&hierarchy.mount.join("cgroup.controllers"))?;
    let mut controllers: Vec<String> = Vec::new();
    for setting in &request.settings {
        let name = setting.controller();
        // The files of the core are in every group.
        if name == "cgroup" || controllers.iter().any(|known| known == name) {
            continue;
        }
        if !available.split_whitespace().any(|known| known == name) {
            return Err(CgroupError::Controller(name.into()));
        }
        controllers.push(name.into());
    }
    let own = request.rootless.then(own_group).transpose()?;
    let mut path = request.below(&hierarchy.mount, own.as_deref());
    let new = !request.settings.is_empty();
    if !new {
        path.pop();
    }
    Ok(Group {
        mount: hierarchy.mount.clone(),
        path,
        settings: request.settings.clone(),
        controllers,
        version: Version::V2,
        own: new,
        rootless: request.rootless,
    })
}

/// The group of version 2 that this process is in, relative to the hierarchy.
fn own_group() -> Result<PathBuf> {
    let list = read(Path::new("/proc/self/cgroup"))?;
    let path = list.lines().find_map(|line| line.strip_prefix("0::/"));
    Ok(path.unwrap_or_default().into())
}

impl Group {
    /// The path of a group that is made for the jail, and removed with it.
    pub fn own_path(&self) -> Option<&Path> {
        self.own.then_some(&self.path)
    }

    /// Makes the group and sets it up. Doing it again is harmless.
    pub fn create(&self) -> Result {
        if !self.own {
            return Ok(());
        }
        let below = self.path.strip_prefix(&self.mount).unwrap_or(&self.path);
        let mut level = self.mount.clone();
        for part in below.components() {
            self.enable_controllers(&level)?;
            let parent = level.clone();
            level.push(part);
            match fs::create_dir(&level) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(self.cannot_create(&level, e));
                }
                _ => self.inherit_cpuset(&parent, &level)?,
            }
        }
        self.settings.iter().try_for_each(|setting| {
            let path = self.path.join(&setting.file);
            write(&path, &setting.value)
        })
    }

    fn cannot_create(&self, path: &Path, source: io::Error) -> CgroupError {
        CgroupError::Create {
            path: path.into(),
            source,
            rootless: self.rootless,
        }
    }

    /// Makes controllers available to the groups below one (version 2).
    fn enable_controllers(&self, level: &Path) -> Result {
        let path = level.join("cgroup.subtree_control");
        let missing = |enabled: &str, name: &str| !enabled.split_whitespace().any(|known| known == name);
        let enabled = match self.controllers.is_empty() {
            true => return Ok(()),
            false => read(&path)?,
        };
        let wanted = self.controllers.iter().filter(|name| missing(&enabled, name));
        wanted.map(|name| format!("+{name}")).try_for_each(|word| {
            let failed = |source| self.cannot_create(&path, source);
            fs::write(&path, word).map_err(failed)
        })
    }

    /// Gives a new group the CPUs and memory of the one above, without which it takes no process (version 1).
    fn inherit_cpuset(&self, parent: &Path, level: &Path) -> Result {
        let uses_cpuset = self
            .settings
            .iter()
            .any(|setting| setting.controller() == "cpuset");
        if self.version == Version::V2 || !uses_cpuset {
            return Ok(());
        }
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if read(&level.join(file))?.trim().is_empty() {
                write(&level.join(file), read(&parent.join(file))?.trim())?;
            }
        }
        Ok(())
    }

    /// Moves a process into the group.
    pub fn add(&self, pid: i32) -> Result {
        let file = match self.version {
            Version::V1 => "tasks",
            Version::V2 => "cgroup.procs",
        };
        fs::write(self.path.join(file), pid.to_string()).map_err(|source| CgroupError::Move {
            path: self.path.clone(),
            source,
        })
    }
}

fn write(path: &Path, value: &str) -> Result {
    fs::write(path, value).map_err(|source| CgroupError::Write {
        path: path.into(),
        value: value.into(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(settings: &[&str], parent: Option<&str>, rootless: bool) -> Result<Request> {
        let args = Args {
            cgroups: settings.iter().map(ToString::to_string).collect(),
            parent_cgroup: parent.map(PathBuf::from),
            ..Args::default()
        };
        let place = Place {
            id: "vm".into(),
            base: "/srv".into(),
            program: "/bin/mayfly".into(),
            name: "mayfly".into(),
            rootless,
        };
        Request::new(&args, &place)
    }

    const V1: &str = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
        cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0\n\
        cgroup /sys/fs/cgroup/cpuset cgroup rw,relatime,cpuset 0 0\n\
        cgroup2 /sys/fs/cgroup/uni\\040fied cgroup2 rw 0 0\n";

    #[test]
    fn finds_hierarchies_in_the_list_of_mounts() {
        let found: Vec<_> = hierarchies(V1)
            .into_iter()
            .map(|h| (h.version, h.mount))
            .collect();
        assert_eq!(found.len(), 3);
        assert_eq!(found[1], (Version::V1, "/sys/fs/cgroup/cpuset".into()));
        assert_eq!(found[2], (Version::V2, "/sys/fs/cgroup/uni fied".into()));
    }

    #[test]
    fn settings_of_one_hierarchy_share_a_group() {
        let request = request(&["cpu.shares=2", "cpuset.cpus=0", "cpuacct.usage=0"], None, false).unwrap();
        let groups = plan_v1(&request, &hierarchies(V1)).unwrap();
        let paths: Vec<_> = groups.iter().map(|group| group.path.to_str().unwrap()).collect();
        assert_eq!(
            paths,
            [
                "/sys/fs/cgroup/cpu,cpuacct/mayfly/vm",
                "/sys/fs/cgroup/cpuset/mayfly/vm"
            ]
        );
        assert_eq!(groups[0].settings.len(), 2);
    }

    #[test]
    fn names_a_controller_that_is_not_there() {
        let request = request(&["hugetlb.2MB.limit_in_bytes=0"], None, false).unwrap();
        let error = plan_v1(&request, &hierarchies(V1)).unwrap_err();
        assert_eq!(error.to_string(), "Controller hugetlb is unavailable");
    }

    #[test]
    fn refuses_settings_of_another_form() {
        for text in [
            "cpu.shares",
            "shares=1",
            "../cpu.shares=1",
            "a/b.c=1",
            "=1",
            "cpu.shares=",
            ".x=1",
            "",
        ] {
            let error = request(&[text], None, false).unwrap_err();
            assert_eq!(error.to_string(), format!("Invalid format for cgroups: {text}"));
        }
        assert!(request(&["cpu.max=1 2=3"], None, false).is_ok());
    }

    #[test]
    fn refuses_parents_that_lead_elsewhere() {
        for text in ["/a", "../a", "a/../b", "./a", "a/./b", "a/.", ".."] {
            assert!(
                matches!(request(&[], Some(text), false), Err(CgroupError::Parent)),
                "{text}"
            );
        }
        let request = request(&[], Some("a/b"), false).unwrap();
        assert_eq!(request.below(Path::new("/m"), None), Path::new("/m/a/b/vm"));
    }

    #[test]
    fn users_have_their_groups_beside_the_one_they_are_in() {
        let request = request(&[], None, true).unwrap();
        let own = Path::new("user.slice/shell.scope");
        let below = request.below(Path::new("/m"), Some(own));
        assert_eq!(below, Path::new("/m/user.slice/mayfly/vm"));
    }
}

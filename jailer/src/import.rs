//! What a config file names, and how it comes into the jail: each file under `/import`, and the config with those paths.
//! The config is not judged here beyond that; the monitor does it.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::jail::IMPORT_FOLDER;
use crate::plan::User;

/// How something is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A file that is read.
    ReadOnly,
    /// A file that is read and written.
    ReadWrite,
    /// A socket that somebody else listens to.
    Socket,
    /// A file that is written, and made if it is not there.
    Output,
    /// A folder in which the monitor makes sockets.
    Folder,
}

/// Something of the host that the jail gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Import {
    /// Its name in the folder of imports.
    pub name: String,
    /// Where it is on the host.
    pub source: PathBuf,
    /// How it is used.
    pub kind: Kind,
}

impl Import {
    /// Where it is in the jail.
    pub fn path(&self) -> PathBuf {
        Path::new("/").join(IMPORT_FOLDER).join(&self.name)
    }

    /// True if a copy is what comes into the jail. Only what is read can be copied to any use.
    pub fn is_copied(&self, copy: bool) -> bool {
        copy && matches!(self.kind, Kind::ReadOnly | Kind::ReadWrite)
    }
}

/// A config file, opened once: whoever changes its name afterwards does not change whose content it is.
#[derive(Debug)]
pub struct ConfigFile {
    path: PathBuf,
    file: File,
    /// Whose file it is.
    pub owner: User,
}

impl ConfigFile {
    /// Opens it.
    pub fn open(path: &Path) -> Result<Self> {
        let mut options = File::options();
        // A pipe without a writer would keep the jailer waiting.
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let file = options.open(path).map_err(Error::path("read", path))?;
        let stat = file.metadata().map_err(Error::path("examine", path))?;
        let owner = User {
            uid: stat.uid(),
            gid: stat.gid(),
        };
        let path = path.into();
        let this = Self { path, file, owner };
        match stat.is_file() {
            true => Ok(this),
            false => Err(this.wrong("it is no regular file".into())),
        }
    }

    fn wrong(&self, reason: String) -> Error {
        Error::Config {
            path: self.path.clone(),
            reason,
        }
    }
}

/// What a config names.
#[derive(Debug)]
pub struct Imports {
    /// The config with the paths of the jail.
    pub config: Value,
    /// What comes into the jail.
    pub list: Vec<Import>,
    taps: bool,
}

/// Places of paths in a config: section, key, and how it is used.
const SINGLE: [(&str, &str, Kind); 6] = [
    ("boot-source", "kernel_image_path", Kind::ReadOnly),
    ("boot-source", "initrd_path", Kind::ReadOnly),
    ("logger", "log_path", Kind::Output),
    ("metrics", "metrics_path", Kind::Output),
    ("serial", "serial_out_path", Kind::Output),
    ("vsock", "uds_path", Kind::Folder),
];
/// Those of lists, with the key that makes a file read-only; what has none is a socket.
const LISTED: [(&str, &str, Option<&str>); 4] = [
    ("drives", "path_on_host", Some("is_read_only")),
    ("drives", "socket", None),
    ("pmem", "path_on_host", Some("read_only")),
    ("network-interfaces", "socket", None),
];
/// The section that may be the name of a file.
const CPU_TEMPLATE: &str = "cpu-config";

impl Imports {
    /// Reads a config file.
    pub fn read(file: &ConfigFile) -> Result<Self> {
        let mut text = Vec::new();
        let read = (&file.file).read_to_end(&mut text);
        read.map_err(Error::path("read", &file.path))?;
        let wrong = |reason| file.wrong(reason);
        let config = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
        Self::new(config).map_err(wrong)
    }

    fn new(config: Value) -> std::result::Result<Self, String> {
        let taps = config["network-interfaces"].as_array();
        let is_tap = |net: &Value| !net["host_dev_name"].is_null();
        let mut imports = Self {
            taps: taps.is_some_and(|nets| nets.iter().any(is_tap)),
            config,
            list: Vec::new(),
        };
        if !imports.config.is_object() {
            return Err("it is no JSON object".into());
        }
        for (section, key, kind) in SINGLE {
            imports.take(&[section, key], kind)?;
        }
        if imports.config[CPU_TEMPLATE].is_string() {
            imports.take(&[CPU_TEMPLATE], Kind::ReadOnly)?;
        }
        for (section, key, read_only) in LISTED {
            let devices = imports.config[section].as_array().map_or(0, Vec::len);
            for index in 0..devices {
                let device = &imports.config[section][index];
                let kind = match read_only {
                    Some(key) if device[key] == true => Kind::ReadOnly,
                    Some(_) => Kind::ReadWrite,
                    None => Kind::Socket,
                };
                imports.take(&[section, &index.to_string(), key], kind)?;
            }
        }
        imports.take_backing_files()?;
        imports.refuse_descriptors()?;
        imports.refuse_unnamed_files()?;
        Ok(imports)
    }

    /// True if a network card of the config is a tap of the host.
    pub fn has_taps(&self) -> bool {
        self.taps
    }

    /// Takes what images stand on.
    fn take_backing_files(&mut self) -> std::result::Result<(), String> {
        let count = |drive: &Value| drive["backing_files"].as_array().map_or(0, Vec::len);
        let counts: Vec<_> = self.config["drives"]
            .as_array()
            .into_iter()
            .flatten()
            .map(count)
            .collect();
        for (drive, files) in counts.into_iter().enumerate() {
            for file in 0..files {
                let (drive, file) = (drive.to_string(), file.to_string());
                self.take(&["drives", &drive, "backing_files", &file], Kind::ReadOnly)?;
            }
        }
        Ok(())
    }

    /// A jail inherits no descriptor that a network card could use.
    fn refuse_descriptors(&self) -> std::result::Result<(), String> {
        let nets = self.config["network-interfaces"].as_array();
        match nets.is_some_and(|nets| nets.iter().any(|net| !net["host_fd"].is_null())) {
            true => Err(
                "a jail inherits no descriptors: use 'host_dev_name' or 'socket' in place of 'host_fd'"
                    .into(),
            ),
            false => Ok(()),
        }
    }

    /// What only an image names is not in the jail, and who writes the image may not choose what gets there.
    fn refuse_unnamed_files(&self) -> std::result::Result<(), String> {
        let drives = self.config["drives"].as_array().into_iter().flatten();
        let mut allowing = drives.filter(|drive| drive["backing"] == "allow");
        match allowing.next() {
            Some(drive) => Err(format!(
                "drive {} has backing \"allow\", but the files that its image names are not in the jail: \
                 name them in backing_files",
                drive["drive_id"]
            )),
            None => Ok(()),
        }
    }

    /// Replaces the path at a place of the config, if there is one.
    fn take(&mut self, place: &[&str], kind: Kind) -> std::result::Result<(), String> {
        let Some(value) = self.config.pointer_mut(&format!("/{}", place.join("/"))) else {
            return Ok(());
        };
        let text = match value {
            Value::Null => return Ok(()),
            Value::String(text) if !text.is_empty() => text,
            _ => return Err(format!("'{}' is no path", place.join("."))),
        };
        let source = std::path::absolute(&text).map_err(|e| e.to_string())?;
        let mut import = Import {
            name: place.join("-"),
            source,
            kind,
        };
        let mut path = import.path();
        if kind == Kind::Folder {
            let name = import.source.file_name();
            path.push(name.ok_or_else(|| format!("'{}' is no file name", place.join(".")))?);
            import.source.pop();
        }
        *text = path.to_string_lossy().into_owned();
        self.list.push(import);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn names(imports: &Imports) -> Vec<(&str, &str, Kind)> {
        let name = |i: &Import| (i.name.clone(), i.source.display().to_string(), i.kind);
        let owned: Vec<_> = imports.list.iter().map(name).collect();
        let leak = |text: String| &*Box::leak(text.into_boxed_str());
        owned
            .into_iter()
            .map(|(name, path, kind)| (leak(name), leak(path), kind))
            .collect()
    }

    #[test]
    fn takes_every_path_and_gives_it_a_place_in_the_jail() {
        let imports = Imports::new(json!({
            "boot-source": {"kernel_image_path": "/k", "initrd_path": null, "boot_args": "/x"},
            "drives": [
                {"drive_id": "a", "path_on_host": "/a", "is_read_only": true},
                {"drive_id": "b", "path_on_host": "/b", "is_read_only": false},
                {"drive_id": "c", "socket": "/c"},
                {"drive_id": "d", "path_on_host": "/d", "backing_files": ["/e", "/f"]}
            ],
            "pmem": [{"id": "p", "path_on_host": "/p"}],
            "logger": {"log_path": "/l"},
            "metrics": {"metrics_path": "/m"},
            "serial": {"serial_out_path": "/s"},
            "vsock": {"guest_cid": 3, "uds_path": "/v/sock"},
            "cpu-config": "/t"
        }));
        let imports = imports.unwrap();
        assert_eq!(
            names(&imports),
            [
                ("boot-source-kernel_image_path", "/k", Kind::ReadOnly),
                ("logger-log_path", "/l", Kind::Output),
                ("metrics-metrics_path", "/m", Kind::Output),
                ("serial-serial_out_path", "/s", Kind::Output),
                ("vsock-uds_path", "/v", Kind::Folder),
                ("cpu-config", "/t", Kind::ReadOnly),
                ("drives-0-path_on_host", "/a", Kind::ReadOnly),
                ("drives-1-path_on_host", "/b", Kind::ReadWrite),
                ("drives-3-path_on_host", "/d", Kind::ReadWrite),
                ("drives-2-socket", "/c", Kind::Socket),
                ("pmem-0-path_on_host", "/p", Kind::ReadWrite),
                ("drives-3-backing_files-0", "/e", Kind::ReadOnly),
                ("drives-3-backing_files-1", "/f", Kind::ReadOnly),
            ]
        );
        let config = &imports.config;
        assert_eq!(config["boot-source"]["boot_args"], "/x");
        assert_eq!(
            config["drives"][1]["path_on_host"],
            "/import/drives-1-path_on_host"
        );
        assert_eq!(config["vsock"]["uds_path"], "/import/vsock-uds_path/sock");
        assert_eq!(config["cpu-config"], "/import/cpu-config");
    }

    #[test]
    fn knows_whether_taps_are_needed() {
        let taps = |nets| {
            Imports::new(json!({"network-interfaces": nets}))
                .unwrap()
                .has_taps()
        };
        assert!(taps(json!([{"iface_id": "a", "host_dev_name": "tap0"}])));
        assert!(!taps(json!([{"iface_id": "a", "socket": "/s"}])));
        assert!(!taps(json!([])));
    }

    #[test]
    fn leaves_inline_templates_alone() {
        let config = json!({"cpu-config": {"cpuid_modifiers": []}, "drives": []});
        let imports = Imports::new(config.clone()).unwrap();
        assert_eq!((imports.config, imports.list), (config, Vec::new()));
    }

    #[test]
    fn refuses_what_is_no_config_and_no_path() {
        assert!(Imports::new(json!([])).unwrap_err().contains("no JSON object"));
        let kernel = |path| Imports::new(json!({"boot-source": {"kernel_image_path": path}}));
        assert!(
            kernel(json!(5))
                .unwrap_err()
                .contains("'boot-source.kernel_image_path' is no path")
        );
        assert!(kernel(json!("")).is_err());
        assert!(Imports::new(json!({"vsock": {"uds_path": "/"}})).is_err());
        let inherited = Imports::new(json!({"network-interfaces": [{"iface_id": "a", "host_fd": 5}]}));
        assert!(inherited.unwrap_err().contains("host_fd"));
    }

    #[test]
    fn refuses_files_that_only_an_image_names() {
        let backing = |rule| {
            Imports::new(json!({"drives": [{"drive_id": "d", "path_on_host": "/d", "backing": rule}]}))
        };
        let refused = backing("allow").unwrap_err();
        assert!(
            refused.contains("\"d\"") && refused.contains("backing_files"),
            "{refused}"
        );
        assert!(backing("deny").is_ok());
    }

    #[test]
    fn paths_are_relative_to_the_current_folder() {
        let imports = Imports::new(json!({"drives": [{"path_on_host": "a.img"}]})).unwrap();
        assert_eq!(
            imports.list[0].source,
            std::env::current_dir().unwrap().join("a.img")
        );
    }
}

//! Images with others behind them, in real files.

use std::fs;

use serde_json::json;
use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::testing::{self, Recorder};
use crate::virtio::block::{BackingRule, Block, Config, Format};
use crate::virtio::{UpdateError, VirtioDevice, feature};

/// A folder with a raw base of 64 KiB, whose sectors have their numbers.
pub(super) struct Folder(TempDir);

impl Folder {
    pub(super) fn new() -> Self {
        let folder = Self(TempDir::new().unwrap());
        let base: Vec<u8> = (0..128).flat_map(|sector| stamped(sector, 512)).collect();
        folder.write("base", &base);
        folder
    }

    pub(super) fn path(&self, name: &str) -> String {
        self.0.as_path().join(name).to_str().unwrap().into()
    }

    pub(super) fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    pub(super) fn image(&self, name: &str, backing: Option<(&'static str, Option<&'static str>)>) {
        self.write(
            name,
            &Builder {
                backing,
                ..Builder::default()
            }
            .build(),
        );
    }

    pub(super) fn config(&self, name: &str) -> Config {
        let config = json!({"drive_id": "disk", "is_root_device": false, "format": "qcow2"});
        Config {
            path_on_host: Some(self.path(name)),
            ..serde_json::from_value(config).unwrap()
        }
    }

    pub(super) fn allow(&self, name: &str) -> Result<Qcow2, String> {
        self.open(Config {
            backing: Some(BackingRule::Allow),
            ..self.config(name)
        })
    }

    fn open_with(&self, name: &str, files: &[&str]) -> Result<Qcow2, String> {
        self.open(Config {
            backing_files: Some(files.iter().map(|name| self.path(name)).collect()),
            ..self.config(name)
        })
    }

    /// Gives a drive another image over these.
    fn swap(&self, drive: &mut Block, name: &str, files: &[&str]) -> Result<(), UpdateError> {
        let (mem, recorder) = (testing::memory(0x1000), Recorder::default());
        let files: Vec<_> = files.iter().map(|name| self.path(name)).collect();
        let patch = json!({"drive_id": "disk", "path_on_host": self.path(name), "backing_files": files});
        drive.update(patch, &mut testing::io(&mem, &mut [], &recorder, feature::COMMON))
    }

    fn open(&self, config: Config) -> Result<Qcow2, String> {
        assert_eq!((config.format, config.validate()), (Some(Format::Qcow2), Ok(())));
        Qcow2::open(&config, &[]).map_err(|error| error.to_string())
    }
}

#[test]
fn a_clone_reads_its_base_and_keeps_writes_for_itself() {
    let folder = Folder::new();
    folder.image("clone", Some(("base", Some("raw"))));
    let base = fs::read(folder.path("base")).unwrap();
    for open in [Folder::allow, |folder: &Folder, name: &str| {
        folder.open_with(name, &["base"])
    }] {
        let image = open(&folder, "clone").unwrap();
        // The base ends, and the clone goes on with zeros.
        assert_eq!(
            get(&image, 127 * 512, 1024).unwrap(),
            [stamped(127, 512), vec![0; 512]].concat()
        );
        put(&image, 9 * 512, &stamped(777, 512)).unwrap();
        put(&image, (1 << 20) - 512, &stamped(778, 512)).unwrap();
        let expected = [stamped(8, 512), stamped(777, 512), stamped(10, 512)].concat();
        assert_eq!(get(&image, 8 * 512, 3 * 512).unwrap(), expected);
        drop(image);
        assert_eq!(
            Report::of(&fs::read(folder.path("clone")).unwrap()),
            Report::default()
        );
    }
    assert_eq!(fs::read(folder.path("base")).unwrap(), base);
}

#[test]
fn images_stand_behind_images() {
    let folder = Folder::new();
    folder.image("one", Some(("base", Some("raw"))));
    folder.image("two", Some(("one", Some("qcow2"))));
    put(&folder.allow("one").unwrap(), 512, &stamped(501, 512)).unwrap();
    let image = folder.allow("two").unwrap();
    put(&image, 2 * 512, &stamped(502, 512)).unwrap();
    let expected = [
        stamped(0, 512),
        stamped(501, 512),
        stamped(502, 512),
        stamped(3, 512),
    ]
    .concat();
    assert_eq!(get(&image, 0, 2048).unwrap(), expected);
    drop(image);
    let image = folder.open_with("two", &["one", "base"]).unwrap();
    assert_eq!(get(&image, 0, 2048).unwrap(), expected);
}

#[test]
fn a_drive_moves_on_to_an_image_over_its_own_but_not_to_its_own() {
    let folder = Folder::new();
    folder.image("one", None);
    folder.image("two", Some(("one", Some("qcow2"))));
    let one = folder.allow("one").unwrap();
    put(&one, 0, &stamped(7, 4096)).unwrap();
    one.settle().unwrap();
    let again = Qcow2::open(&folder.config("one"), one.locks()).err().unwrap();
    assert!(
        again.to_string().contains("the drive has it open already"),
        "{again}"
    );
    let config = Config {
        backing: Some(BackingRule::Allow),
        ..folder.config("two")
    };
    let two = Qcow2::open(&config, one.locks()).unwrap();
    drop(one);
    assert_eq!(get(&two, 0, 4096).unwrap(), stamped(7, 4096));
}

#[test]
fn opens_no_more_and_no_less_than_the_user_named() {
    let folder = Folder::new();
    folder.image("plain", None);
    folder.image("one", Some(("base", Some("raw"))));
    folder.image("two", Some(("one", Some("qcow2"))));
    let refused = |name, files: &[&str]| folder.open_with(name, files).err().unwrap();
    assert!(refused("two", &[]).contains("has the backing file 'one', and nothing allows"));
    assert!(refused("two", &["one"]).contains("has the backing file 'base', and nothing allows"));
    assert!(refused("one", &["base", "two"]).contains("no backing file, and backing_files names"));
    assert!(refused("plain", &["base"]).contains("no backing file, and backing_files names"));
    assert!(refused("one", &["missing"]).contains("missing' does not exist"));
    assert!(
        folder
            .open(folder.config("one"))
            .err()
            .unwrap()
            .contains("set backing to \"allow\"")
    );
}

#[test]
fn takes_the_format_of_a_backing_file_from_the_image_only() {
    let folder = Folder::new();
    folder.image("silent", Some(("base", None)));
    folder.image("other", Some(("base", Some("vmdk"))));
    folder.image("wrong", Some(("base", Some("qcow2"))));
    assert!(
        folder
            .allow("silent")
            .err()
            .unwrap()
            .contains("qemu-img rebase -u -b 'base' -F raw")
    );
    assert!(
        folder
            .allow("other")
            .err()
            .unwrap()
            .contains("has the format 'vmdk'")
    );
    assert!(folder.allow("wrong").err().unwrap().contains("no qcow2 header"));
}

#[test]
fn refuses_what_is_not_a_file_and_chains_without_end() {
    let folder = Folder::new();
    folder.image("net", Some(("nbd://host/disk", Some("raw"))));
    folder.image("json", Some(("json:{\"driver\":\"raw\"}", Some("raw"))));
    folder.image("folder", Some(("/", Some("raw"))));
    for name in ["net", "json"] {
        assert!(
            folder
                .allow(name)
                .err()
                .unwrap()
                .contains("not a plain file name"),
            "{name}"
        );
    }
    assert!(folder.allow("folder").err().unwrap().contains("is a directory"));
    // Readers share, so a circle of files that are only read has no other end.
    folder.image("a", Some(("b", Some("qcow2"))));
    folder.image("b", Some(("b", Some("qcow2"))));
    assert!(folder.allow("a").err().unwrap().contains("or they form a circle"));
    folder.image("self", Some(("self", Some("qcow2"))));
    assert!(folder.allow("self").is_err());
}

#[test]
fn locks_the_image_for_itself_and_shares_what_is_behind_it() {
    let folder = Folder::new();
    folder.image("one", Some(("base", Some("raw"))));
    folder.image("two", Some(("base", Some("raw"))));
    let one = folder.allow("one").unwrap();
    let two = folder.allow("two").unwrap();
    assert_eq!((one.locks().len(), two.locks().len()), (2, 2));
    assert!(
        folder
            .allow("one")
            .err()
            .unwrap()
            .contains("another device of this machine")
    );
    let config = Config {
        format: None,
        ..folder.config("base")
    };
    assert!(config.build().is_err());
    drop((one, two));
    assert!(config.build().is_ok());
}

#[test]
fn a_drive_that_has_moved_on_shares_the_image_that_it_had() {
    let folder = Folder::new();
    folder.image("one", None);
    for name in ["two", "three"] {
        folder.image(name, Some(("one", Some("qcow2"))));
    }
    let mut drive = folder.config("one").build().unwrap();
    assert!(folder.swap(&mut drive, "two", &["one", "base"]).is_err());
    assert!(folder.open_with("three", &["one"]).is_err());
    folder.swap(&mut drive, "two", &["one"]).unwrap();
    assert!(folder.open_with("three", &["one"]).is_ok());
    assert!(folder.allow("one").is_err() && folder.open_with("two", &["one"]).is_err());
}

//! The wire format, the checks of a config, and images that cannot be used.

use std::error::Error;

use vmm_sys_util::tempdir::TempDir;

use super::super::{BackingRule, ConfigError, Format, OpenError, Patch};
use super::*;

fn parse(json: &str) -> Config {
    serde_json::from_str(json).unwrap()
}

fn refusal(json: &str) -> ConfigError {
    parse(json).validate().unwrap_err()
}

fn open_error(path: &str) -> OpenError {
    let json = serde_json::json!({"drive_id": "a", "is_root_device": false, "path_on_host": path});
    parse(&json.to_string()).build().err().unwrap()
}

#[test]
fn prints_all_fields_with_defaults_in_order() {
    let config = parse(r#"{"drive_id":"a","path_on_host":"/x","is_root_device":true}"#);
    assert_eq!(
        serde_json::to_string(&config).unwrap(),
        r#"{"drive_id":"a","partuuid":null,"is_root_device":true,"cache_type":"Unsafe","is_read_only":false,"path_on_host":"/x","rate_limiter":null,"io_engine":"Sync","socket":null}"#
    );
}

#[test]
fn an_array_needs_no_more_elements_than_clients_know() {
    let array = r#"["a",null,false,"Unsafe",false,"/x",null,"Sync",null]"#;
    let object = r#"{"drive_id":"a","is_root_device":false,"is_read_only":false,"path_on_host":"/x","io_engine":"Sync"}"#;
    assert_eq!(parse(array), parse(object));
    let patch: Patch = serde_json::from_str(r#"["a","/x",null]"#).unwrap();
    assert_eq!(patch.path_on_host.as_deref(), Some("/x"));
}

#[test]
fn names_known_fields_when_one_is_unknown() {
    let error = serde_json::from_str::<Config>(r#"{"nope":1}"#).unwrap_err();
    assert_eq!(
        error.to_string(),
        "unknown field `nope`, expected one of `drive_id`, `partuuid`, `is_root_device`, `cache_type`, \
         `is_read_only`, `path_on_host`, `rate_limiter`, `io_engine`, `socket`, `direct`, `queues`, `format`, `backing`, \
         `backing_files` at line 1 column 7"
    );
    let error = serde_json::from_str::<Patch>(r#"{"nope":1}"#).unwrap_err();
    assert_eq!(
        error.to_string(),
        "unknown field `nope`, expected one of `drive_id`, `path_on_host`, `rate_limiter`, `backing_files` \
         at line 1 column 7"
    );
}

#[test]
fn accepts_both_engines_and_a_limiter_without_effect() {
    let config = parse(
        r#"{"drive_id":"a","path_on_host":"/x","is_root_device":false,"io_engine":"Async",
            "rate_limiter":{"ops":{"size":0,"refill_time":1}}}"#,
    );
    assert_eq!(config.validate(), Ok(()));
    let echo = serde_json::to_value(&config).unwrap();
    assert_eq!(
        (&echo["io_engine"], &echo["rate_limiter"]),
        (&"Async".into(), &().into())
    );
}

#[test]
fn a_drive_with_a_backend_leaves_its_settings_to_that() {
    let with = |more: &str| {
        let json = format!(r#"{{"drive_id":"a","socket":"/s","is_root_device":false{more}}}"#);
        parse(&json).validate()
    };
    assert_eq!(with(""), Ok(()));
    assert_eq!(with(r#","is_read_only":false,"io_engine":"Sync""#), Ok(()));
    for (more, setting) in [
        (r#","is_read_only":true"#, "is_read_only"),
        (
            r#","rate_limiter":{"ops":{"size":1,"refill_time":1}}"#,
            "rate_limiter",
        ),
        (r#","io_engine":"Async""#, "io_engine"),
        (r#","direct":true"#, "direct"),
    ] {
        let drive_id = "a".to_owned();
        assert_eq!(with(more), Err(ConfigError::VhostUser { drive_id, setting }));
    }
}

#[test]
fn wants_either_an_image_or_a_socket() {
    assert!(matches!(
        refusal(r#"{"drive_id":"a","is_root_device":false}"#),
        ConfigError::Backend { .. }
    ));
    assert!(matches!(
        refusal(r#"{"drive_id":"a","path_on_host":"/x","socket":"/s","is_root_device":false}"#),
        ConfigError::Backend { .. }
    ));
}

#[test]
fn lets_only_plain_partition_ids_to_the_command_line() {
    let with = |partuuid: &str| {
        let json = serde_json::json!({
            "drive_id": "a", "path_on_host": "/x", "is_root_device": true, "partuuid": partuuid
        });
        parse(&json.to_string()).validate()
    };
    assert_eq!(with("0eaa91a0-01"), Ok(()));
    assert_eq!(with("f3c8A1de-0001-4e5f-9c3b-0123456789ab"), Ok(()));
    assert!(with("").is_err());
    assert!(with("01 init=/bin/sh").is_err());
    assert!(with(&"0".repeat(37)).is_err());
}

#[test]
fn names_a_missing_image_and_a_missing_folder() {
    let image = open_error("/no-such-image");
    assert!(matches!(image, OpenError::Missing { .. }), "{image:?}");
    assert!(image.to_string().contains("/no-such-image") && image.source().is_some());
    let folder = open_error("/dev/null/image");
    assert!(matches!(folder, OpenError::Missing { .. }), "{folder:?}");
}

#[test]
fn refuses_what_is_not_a_disk_without_opening_it() {
    let dir = TempDir::new().unwrap();
    let fifo = dir.as_path().join("fifo");
    let fifo = fifo.to_str().unwrap();
    assert!(
        std::process::Command::new("mkfifo")
            .arg(fifo)
            .status()
            .unwrap()
            .success()
    );
    let found = |path: &str| match open_error(path) {
        OpenError::NotADisk { found, .. } => found,
        other => panic!("{other:?}"),
    };
    assert_eq!(found(dir.as_path().to_str().unwrap()), "a directory");
    assert_eq!(found(fifo), "a FIFO");
    assert_eq!(found("/dev/null"), "a character device");
}

#[test]
fn refuses_an_image_without_a_whole_sector() {
    assert!(matches!(
        open_error(&path(&image(0))),
        OpenError::TooSmall { size: 0, .. }
    ));
    assert!(matches!(
        open_error(&path(&image(511))),
        OpenError::TooSmall { size: 511, .. }
    ));
}

#[test]
fn opens_an_image_of_one_sector() {
    let device = device(&image(512));
    assert_eq!(device.config_space()[..8], 1u64.to_le_bytes());
}

#[test]
fn hides_the_tail_behind_the_last_whole_sector() {
    let (image, mem) = (image(1000), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    assert_eq!(device.config_space()[..8], 1u64.to_le_bytes());
    let answer = guest.request(&mut device, OUT, 1, &[readable(DATA, 512)]);
    assert_eq!(answer, (IO_ERROR, 1));
    assert_eq!(content(&image).len(), 1000);
}

#[test]
fn tells_the_guest_its_limits() {
    let device = device(&image(3 * 512));
    let space = device.config_space();
    assert_eq!(space.len(), 60);
    assert_eq!(space[12..16], 254u32.to_le_bytes());
    assert_eq!(space[20..24], 512u32.to_le_bytes());
    // One segment each, of 1 GiB and 16 MiB at most, and what is made zero may be deallocated.
    let field = |at| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
    assert_eq!([36, 40, 44].map(field), [1 << 21, 1, 8]);
    assert_eq!([48, 52, 56].map(field), [1 << 15, 1, 1]);
}

#[test]
fn shows_what_is_said_of_the_format_only_when_it_is_said() {
    let plain = r#"{"drive_id":"a","is_root_device":false,"path_on_host":"/a"}"#;
    let config: Config = serde_json::from_str(plain).unwrap();
    let shown = serde_json::to_string(&config).unwrap();
    assert!(shown.ends_with(r#""socket":null}"#), "{shown}");
    let fields = r#""format":"qcow2","backing":"deny","backing_files":["/b"]}"#;
    let config: Config = serde_json::from_str(&plain.replace('}', &format!(",{fields}"))).unwrap();
    let shown = serde_json::to_string(&config).unwrap();
    assert!(shown.ends_with(fields) && config.validate().is_ok(), "{shown}");
}

#[test]
fn refuses_formats_that_do_not_fit_together() {
    let image = image(512);
    let files = || Some(vec!["/b".to_owned()]);
    let qcow2 = || Config {
        format: Some(Format::Qcow2),
        ..config(&image)
    };
    for (config, words) in [
        (
            Config {
                backing: Some(BackingRule::Allow),
                ..config(&image)
            },
            "a raw image has no backing file",
        ),
        (
            Config {
                format: Some(Format::Raw),
                backing_files: files(),
                ..config(&image)
            },
            "a raw image has no backing file",
        ),
        (
            Config {
                backing: Some(BackingRule::Allow),
                backing_files: files(),
                ..qcow2()
            },
            "leave one of them out",
        ),
    ] {
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_patch_keeps_backing_files_unless_it_brings_others() {
    let patch = |json: &str| serde_json::from_str::<Patch>(json).unwrap();
    let mut config = Config {
        format: Some(Format::Qcow2),
        backing_files: Some(vec!["/old".to_owned()]),
        ..config(&image(512))
    };
    config
        .patch(patch(r#"{"drive_id":"a","path_on_host":"/a"}"#))
        .unwrap();
    assert_eq!(config.backing_files, Some(vec!["/old".to_owned()]));
    config
        .patch(patch(
            r#"{"drive_id":"a","path_on_host":"/a","backing_files":[]}"#,
        ))
        .unwrap();
    assert_eq!(config.backing_files, Some(vec![]));
    let alone = patch(r#"{"drive_id":"a","backing_files":[]}"#).validate();
    assert!(alone.unwrap_err().to_string().contains("give path_on_host too"));
}

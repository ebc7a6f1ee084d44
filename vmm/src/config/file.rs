//! Reading a config file.

use std::io;
use std::path::Path;

use super::VmConfig;
use crate::error::remedy;

/// Why a config file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigFileError {
    /// It cannot be read.
    #[error("cannot read the config file '{path}': {}", remedy(source))]
    Open {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// It is not a config.
    #[error("the config file '{path}' is not a machine's config{}", in_section(section.as_deref()))]
    Json {
        /// The file.
        path: String,
        /// The part of it that is wrong.
        section: Option<String>,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A list names one device twice.
    #[error("the config file '{path}' has two devices with the id '{id}' in section '{section}': rename one")]
    Twice {
        /// The file.
        path: String,
        /// The list.
        section: &'static str,
        /// The id.
        id: String,
    },
}

fn in_section(section: Option<&str>) -> String {
    section
        .map(|name| format!(", in section '{name}'"))
        .unwrap_or_default()
}

/// Reads a config file.
pub fn read_config_file(path: &Path) -> Result<VmConfig, ConfigFileError> {
    let name = || path.display().to_string();
    let file = std::fs::File::open(path).map_err(|source| ConfigFileError::Open { path: name(), source })?;
    let text = io::read_to_string(file).map_err(|source| ConfigFileError::Open { path: name(), source })?;
    let config: VmConfig = serde_json::from_str(&text).map_err(|source| ConfigFileError::Json {
        path: name(),
        section: section_at(&text, source.line(), source.column()),
        source,
    })?;
    let devices: Vec<_> = config
        .devices()
        .iter()
        .map(|d| (d.kind(), d.id().to_owned()))
        .collect();
    let twice = (1..devices.len()).find(|&i| devices[..i].contains(&devices[i]));
    match twice.map(|i| devices[i].clone()) {
        None => Ok(config),
        // A second request for a device replaces the first one; in one file it is a slip.
        Some((kind, id)) => Err(ConfigFileError::Twice {
            path: name(),
            section: super::section(kind),
            id,
        }),
    }
}

/// The top-level key whose value is at this place, as serde_json counts lines and columns.
fn section_at(text: &str, line: usize, column: usize) -> Option<String> {
    let before = text
        .split_inclusive('\n')
        .take(line.checked_sub(1)?)
        .map(str::len);
    let end = before.sum::<usize>() + column;
    let (mut depth, mut string, mut escaped) = (0u32, None, false);
    let (mut last, mut section) = (None, None);
    for (at, byte) in text.bytes().enumerate().take(end) {
        match (string, byte) {
            (Some(_), _) if escaped => escaped = false,
            (Some(_), b'\\') => escaped = true,
            (Some(start), b'"') => (last, string) = (text.get(start..at), None),
            (Some(_), _) => {}
            (None, b'"') => string = Some(at + 1),
            (None, b'{' | b'[') => depth += 1,
            (None, b'}' | b']') if depth <= 1 => (depth, section) = (0, None),
            (None, b'}' | b']') => depth -= 1,
            (None, b':') if depth == 1 => section = last,
            // The next key, or what stands in place of one, belongs to no section.
            (None, b',') if depth == 1 => section = None,
            _ => {}
        }
    }
    section.map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    fn read(text: &str) -> Result<VmConfig, String> {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("config.json");
        std::fs::write(&path, text).unwrap();
        read_config_file(&path).map_err(|error| crate::error::chain(&error))
    }

    #[test]
    fn names_the_section_that_is_wrong() {
        let error = read(
            "{\n \"boot-source\": {\"kernel_image_path\": \"a{[\\\"\"},\n \"drives\": [],\n \
             \"machine-config\": {\"vcpu_count\": \"1\"}}",
        );
        let error = error.unwrap_err();
        assert!(
            error.contains("in section 'machine-config': invalid type"),
            "{error}"
        );
        let error = read(r#"{"drives": [{"drive_id": 1}], "boot-source": {"kernel_image_path": "k"}}"#);
        let error = error.unwrap_err();
        assert!(error.contains("in section 'drives': invalid type"), "{error}");
    }

    #[test]
    fn names_an_unknown_and_a_missing_section() {
        let error = read(r#"{"drive": []}"#).unwrap_err();
        assert!(error.contains("unknown field `drive`"), "{error}");
        let error = read(r#"{"drives": [], "bot-source": {}}"#).unwrap_err();
        assert!(error.contains("config: unknown field `bot-source`"), "{error}");
        let error = read("{}").unwrap_err();
        assert!(
            error.contains("config: missing field `drives` at line 1 column 2"),
            "{error}"
        );
        let error = read(r#"{"boot-source": {"kernel_image_path": "k"}}"#).unwrap_err();
        assert!(error.contains("config: missing field `drives`"), "{error}");
        let error = read(r#"{"drives": [], "boot-source": {"kernel_image_path": "k"}} x"#).unwrap_err();
        assert!(error.contains("config: trailing characters"), "{error}");
        let error = read("").unwrap_err();
        assert!(error.contains("EOF while parsing a value"), "{error}");
    }

    #[test]
    fn refuses_a_device_that_is_there_twice() {
        let drive = r#"{"drive_id": "a", "path_on_host": "p", "is_root_device": false}"#;
        let error = read(&format!(
            r#"{{"boot-source": {{"kernel_image_path": "k"}}, "drives": [{drive}, {drive}]}}"#
        ));
        let error = error.unwrap_err();
        assert!(error.contains("the id 'a' in section 'drives'"), "{error}");
    }
}

//! A folder of its own for each test, gone when the test ends.

use std::fs;
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::Result;

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A temporary folder; dereferences to its path.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new folder whose name begins with `name`; short, because unix socket paths are.
    pub fn new(name: &str) -> Result<Self> {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("mayfly-{name:.40}-{}-{number}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    /// Lets every user create files in it.
    pub fn open_to_all(&self) -> Result {
        Ok(fs::set_permissions(&self.0, fs::Permissions::from_mode(0o777))?)
    }

    /// Writes a file into it.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> Result<PathBuf> {
        let path = self.0.join(name);
        fs::write(&path, content)?;
        Ok(path)
    }
}

impl Deref for Scratch {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_gone_when_dropped_with_what_it_holds() {
        let scratch = Scratch::new("gone").unwrap();
        let file = scratch.file("a", "content").unwrap();
        assert!(file.exists());

        drop(scratch);

        assert!(!file.parent().unwrap().exists());
    }

    #[test]
    fn two_of_one_name_differ() {
        assert_ne!(*Scratch::new("same").unwrap(), *Scratch::new("same").unwrap());
    }
}

use std::path::{Path, PathBuf};

use crate::Result;

const RESERVED: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const TRANSPARENT: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// A setting of the host that is put back when dropped.
pub struct HostSetting {
    path: PathBuf,
    old: String,
}

impl HostSetting {
    fn new(path: &str, old: String, value: &str) -> Result<Self> {
        std::fs::write(path, value)?;
        let path = Path::new(path).to_owned();
        Ok(Self { path, old })
    }

    /// Sets this many huge pages of 2 MiB aside, beyond those that are already.
    pub fn reserve_huge_pages(count: u64) -> Result<Self> {
        let reserved = || -> Result<u64> { Ok(std::fs::read_to_string(RESERVED)?.trim().parse()?) };
        let old = reserved()?;
        let setting = Self::new(RESERVED, old.to_string(), &(old + count).to_string())?;
        assert_eq!(reserved()?, old + count, "the host has no memory for huge pages");
        Ok(setting)
    }

    /// Gives transparent huge pages to those who ask for them only.
    pub fn transparent_huge_pages_on_request() -> Result<Self> {
        // The choice in force is in brackets.
        let choices = std::fs::read_to_string(TRANSPARENT)?;
        let old = choices.split(['[', ']']).nth(1).unwrap_or_default().to_owned();
        Self::new(TRANSPARENT, old, "madvise")
    }
}

impl Drop for HostSetting {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(&self.path, &self.old) {
            eprintln!("cannot put {} back: {error}", self.path.display());
        }
    }
}

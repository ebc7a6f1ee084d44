//! The devices of a test machine, as the API names their settings.

use std::path::Path;

use serde_json::{Value, json};

use crate::{GuestImage, Result, Tap};

/// The serial number of the disk of [`Drive::tools`].
pub(crate) const TOOLS: &str = "tools";

/// A disk.
#[derive(Debug, Clone)]
pub struct Drive(Value);

impl Drive {
    /// A writable data disk.
    pub fn new(id: &str, image: impl AsRef<Path>) -> Self {
        let path = image.as_ref().display().to_string();
        Self(json!({"drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": false}))
    }

    /// The disk of Debian's programs, for [`Guest::mount_tools`](crate::Guest::mount_tools).
    pub fn tools() -> Result<Self> {
        Ok(Self::new(TOOLS, GuestImage::Tools.path()?).read_only())
    }

    /// A disk as the API has it.
    pub fn from_json(drive: Value) -> Self {
        Self(drive)
    }

    /// Makes it the root disk.
    pub fn root(self) -> Self {
        self.with("is_root_device", true)
    }

    /// The guest may not write to it.
    pub fn read_only(self) -> Self {
        self.with("is_read_only", true)
    }

    /// The guest's flushes reach the host's disk.
    pub fn writeback(self) -> Self {
        self.with("cache_type", "Writeback")
    }

    /// Any other setting.
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.0[key] = value.into();
        self
    }

    /// Its settings, as the body of a request.
    pub fn into_json(self) -> Value {
        self.0
    }
}

/// A file as memory.
#[derive(Debug, Clone)]
pub struct Pmem(Value);

impl Pmem {
    /// A writable device.
    pub fn new(id: &str, file: impl AsRef<Path>) -> Self {
        let path = file.as_ref().display().to_string();
        Self(json!({"id": id, "path_on_host": path}))
    }

    /// Makes it the root device.
    pub fn root(mut self) -> Self {
        self.0["root_device"] = true.into();
        self
    }

    /// The guest's writes do not reach the file.
    pub fn read_only(mut self) -> Self {
        self.0["read_only"] = true.into();
        self
    }

    pub(crate) fn into_json(self) -> Value {
        self.0
    }
}

/// A network card.
#[derive(Debug, Clone)]
pub struct Net(Value);

impl Net {
    /// A card on this tap.
    pub fn new(id: &str, tap: &Tap) -> Self {
        Self::on(id, tap.name())
    }

    /// A card on the tap of this name.
    pub fn on(id: &str, tap: &str) -> Self {
        Self(json!({"iface_id": id, "host_dev_name": tap}))
    }

    /// A card without a tap that has a name; other settings say what it is connected to.
    pub fn unnamed(id: &str) -> Self {
        Self(json!({"iface_id": id}))
    }

    /// Any other setting.
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.0[key] = value.into();
        self
    }

    /// Its settings, as the body of a request.
    pub fn into_json(self) -> Value {
        self.0
    }
}

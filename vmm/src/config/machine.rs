//! Size and shape of the machine.

use serde::{Deserialize, Serialize};

use super::{ConfigError, MAX_IO_THREADS, MAX_VCPUS, MIN_MEMORY_MIB};

/// Size and shape of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpu_count: u8,
    /// Guest memory, in MiB.
    pub mem_size_mib: usize,
    /// Whether two vCPUs share a core in the guest's topology.
    #[serde(default)]
    pub smt: bool,
    /// A named CPU template; deprecated in favour of [`super::CpuConfig`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// Whether KVM notes which pages the guest writes, so that a snapshot may hold only those.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Page size behind guest memory.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// Threads that run the devices, 1 to [`MAX_IO_THREADS`]. Absent is 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_threads: Option<u8>,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
            io_threads: None,
        }
    }
}

/// Named CPU templates of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the API's")]
pub enum CpuTemplate {
    C3,
    T2,
    T2S,
    None,
    T2CL,
    T2A,
}

/// Kinds of pages behind guest memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// Ordinary pages, and whatever the host's policy makes of them.
    #[default]
    None,
    /// Huge pages where and when the host has them.
    Transparent,
    /// Pages of 2 MiB that the host has set aside, all of them at start.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// The body of `PATCH /machine-config`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, expecting = "struct MachineConfigUpdate")]
#[expect(missing_docs, reason = "as in MachineConfig")]
pub struct MachinePatch {
    pub vcpu_count: Option<u8>,
    pub mem_size_mib: Option<usize>,
    pub smt: Option<bool>,
    pub cpu_template: Option<CpuTemplate>,
    pub track_dirty_pages: Option<bool>,
    pub huge_pages: Option<HugePages>,
    #[serde(default)]
    pub io_threads: Option<u8>,
}

impl MachinePatch {
    /// True when nothing is to be changed.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl MachineConfig {
    /// This config with the patch's values in place of its own.
    pub fn patched(&self, patch: &MachinePatch) -> Self {
        Self {
            vcpu_count: patch.vcpu_count.unwrap_or(self.vcpu_count),
            mem_size_mib: patch.mem_size_mib.unwrap_or(self.mem_size_mib),
            smt: patch.smt.unwrap_or(self.smt),
            cpu_template: patch.cpu_template.or(self.cpu_template),
            track_dirty_pages: patch.track_dirty_pages.unwrap_or(self.track_dirty_pages),
            huge_pages: patch.huge_pages.unwrap_or(self.huge_pages),
            io_threads: patch.io_threads.or(self.io_threads),
        }
    }

    /// Checks the values.
    pub fn validated(self) -> Result<Self, ConfigError> {
        let odd = self.smt && self.vcpu_count > 1 && !self.vcpu_count.is_multiple_of(2);
        if self.vcpu_count == 0 || self.vcpu_count > MAX_VCPUS || odd {
            return Err(ConfigError::VcpuCount(self.vcpu_count));
        }
        if self.mem_size_mib < MIN_MEMORY_MIB {
            return Err(ConfigError::MemorySize(self.mem_size_mib));
        }
        if self.huge_pages != HugePages::None && !self.mem_size_mib.is_multiple_of(2) {
            return Err(ConfigError::HugePages(self.mem_size_mib));
        }
        if let Some(count) = self.io_threads
            && !(1..=MAX_IO_THREADS).contains(&count)
        {
            return Err(ConfigError::IoThreads(count));
        }
        Ok(self)
    }
}

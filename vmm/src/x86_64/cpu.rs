//! What all vCPUs of a machine have in common: their CPUID, but for its numbers, and the registers of a template. Made
//! once by the control thread while it builds a machine.

use std::borrow::Cow;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{Kvm, VcpuFd};

use super::cpuid::{self, Topology};
use super::template::{self, TemplateError};
use super::{VcpuStateError, msrs};
use crate::config::{CpuConfig, MachineConfig};
use crate::kvm::{self, KvmError};

/// The CPU of a machine.
pub struct Cpu<'a> {
    cpuid: Vec<kvm_cpuid_entry2>,
    topology: Topology,
    template: Cow<'a, CpuConfig>,
}

/// Guests cannot have the CPU that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// KVM does not tell what it can do.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The template does not fit this host.
    #[error(transparent)]
    Template(#[from] TemplateError),
}

impl<'a> Cpu<'a> {
    /// The CPU of a machine: this host's, changed by the `custom` template, or else by the one that `machine` names.
    pub fn new(
        kvm: &Kvm,
        vm: &kvm::Vm,
        machine: &MachineConfig,
        custom: Option<Cow<'a, CpuConfig>>,
    ) -> Result<Self, CpuError> {
        let mut cpuid = cpuid::baseline(&kvm::supported_cpuid(kvm)?, vm.has_tsc_deadline());
        let template = match (custom, machine.cpu_template) {
            (Some(custom), _) => custom,
            (None, Some(name)) => Cow::Owned(template::named(name, &cpuid)?),
            (None, None) => Cow::default(),
        };
        template::apply_to_cpuid(&template.cpuid_modifiers, &mut cpuid)?;
        Ok(Self {
            cpuid,
            topology: Topology::new(machine.vcpu_count, machine.smt),
            template,
        })
    }

    /// Makes a vCPU such a CPU, with the APIC id `id`.
    pub fn set_up(&self, vcpu: &VcpuFd, id: u8) -> Result<(), VcpuStateError> {
        // CPUID first: it decides which registers there are.
        vcpu.set_cpuid2(&cpuid::for_vcpu(&self.cpuid, id, self.topology))
            .map_err(VcpuStateError::kvm("set the CPUID"))?;
        msrs::set_boot_msrs(vcpu)?;
        template::apply_to_msrs(&self.template.msr_modifiers, vcpu)
    }
}

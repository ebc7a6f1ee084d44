//! Everything that is particular to x86_64: where things lie in the guest's address space, and the state in which a
//! vCPU starts. Called by the control thread while it builds a machine; the vCPU threads only run what was set here.

pub mod cpu;
pub mod cpuid;
pub mod layout;
pub mod msrs;
pub mod registers;
pub mod template;

/// KVM refused the state that a vCPU is to start with.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// An ioctl on the vCPU failed.
    #[error("cannot {operation} of the vCPU")]
    Kvm {
        /// What was attempted: a verb and an object.
        operation: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM took only some of the model specific registers.
    #[error("KVM does not accept the model specific register {index:#x}")]
    Msr {
        /// The first register that was refused.
        index: u32,
    },
    /// A template's registers do not fit this host.
    #[error(transparent)]
    Template(#[from] template::TemplateError),
    /// The descriptor table or the page tables do not fit into guest memory.
    #[error("cannot write the boot descriptor and page tables into guest memory")]
    Memory {
        /// Why.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// The host's time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: needed because the instruction is only offered as an intrinsic; every x86_64 CPU has it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

impl VcpuStateError {
    pub(crate) fn kvm(operation: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VcpuStateError {
        move |source| VcpuStateError::Kvm { operation, source }
    }
}

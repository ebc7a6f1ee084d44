//! The virtual machine as KVM holds it: memory slots, interrupt routes, notification descriptors and vCPUs.
//!
//! All `unsafe` that KVM needs is here. The control thread builds with it; the vCPU threads route MSIs through it
//! when the guest programs them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use devices::GuestMemory;
use devices::pci::MsiMessage;
use kvm_bindings::{
    CpuId, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
    KVM_PIT_SPEAKER_DUMMY, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KvmIrqRouting, kvm_clock_data,
    kvm_device_attr, kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::config::Capability;
use crate::memory::GuestRegion;
use crate::x86_64::layout;

/// The KVM interface version that every kernel since 2.6.22 has.
const API_VERSION: i32 = 12;

/// KVM has 4096 routes; the I/O APIC's lines come first.
const MSI_GSI_END: u32 = 1024;
/// `_IOW(KVMIO, 0xe2, struct kvm_device_attr)`.
const GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;
/// `_IOW(KVMIO, 0xe1, struct kvm_device_attr)`.
const SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;

/// A failure of the kernel's virtualization interface.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` could not be opened.
    #[error("cannot open /dev/kvm: {remedy}")]
    Open {
        /// What to do.
        remedy: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The kernel's KVM lacks something that Mayfly cannot do without.
    #[error("this kernel's KVM has no {what}; Mayfly needs Linux 5.10 or later on x86_64")]
    Missing {
        /// The capability.
        what: &'static str,
    },
    /// The kernel's KVM lacks something that a CPU template asks for.
    #[error("this kernel's KVM has no capability {number} (linux/kvm.h), which the CPU template requires")]
    Capability {
        /// Its number.
        number: u32,
    },
    /// An operation failed.
    #[error("KVM cannot {op}")]
    Operation {
        /// What was tried.
        op: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// All interrupt numbers are taken.
    #[error("no interrupt number is left for another device; detach one first")]
    NoGsi,
    /// All memory slots are taken.
    #[error("all {0} memory slots of this host's KVM are taken; use fewer or larger ones")]
    NoMemorySlot(u32),
}

/// Turns a KVM failure into an error that names the operation.
fn failed(op: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Operation {
        op,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}

/// What Mayfly cannot do without.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::Irqchip, "in-kernel interrupt controller"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::IoeventfdNoLength, "ioeventfd of any length"),
    (Cap::UserMemory, "user memory"),
    (Cap::ReadonlyMem, "read-only memory"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::Pit2, "timer"),
    (Cap::SignalMsi, "message signalled interrupts"),
];

/// The capabilities to be checked, by number and, where Mayfly needs it, name.
fn needed(asked: &[Capability]) -> impl Iterator<Item = (u32, Option<&'static str>)> {
    let own = NEEDED.iter().map(|(cap, what)| (*cap as u32, Some(*what)));
    let own = own.filter(|(number, _)| !asked.contains(&Capability::Waived(*number)));
    let more = asked.iter().filter_map(|capability| match capability {
        Capability::Required(number) => Some((*number, None)),
        Capability::Waived(_) => None,
    });
    own.chain(more)
}

/// Opens `/dev/kvm` and checks what it can do: what every machine needs, changed by the `asked` of a CPU template.
pub fn open(asked: &[Capability]) -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|error| {
        let source = io::Error::from_raw_os_error(error.errno());
        let remedy = match source.kind() {
            io::ErrorKind::NotFound => {
                "load the kvm_intel or kvm_amd module, or enable nested virtualization when this host is itself a VM"
            }
            io::ErrorKind::PermissionDenied => "add the user to the 'kvm' group, or run as root",
            _ => "check that the kernel's KVM works",
        };
        KvmError::Open { remedy, source }
    })?;
    if kvm.get_api_version() != API_VERSION {
        return Err(KvmError::Missing {
            what: "interface version 12",
        });
    }
    match needed(asked).find(|(number, _)| kvm.check_extension_raw(libc::c_ulong::from(*number)) <= 0) {
        Some((_, Some(what))) => Err(KvmError::Missing { what }),
        Some((number, None)) => Err(KvmError::Capability { number }),
        None => Ok(kvm),
    }
}

/// A machine with nothing in it. The kernel gives up when work waits for this thread, such as what io_uring has to tell it
/// of a drive; that is done by the time of the next try.
fn create(kvm: &Kvm) -> Result<VmFd, KvmError> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(failed("create a virtual machine")),
        }
    }
}

/// What CPUs a guest can have here.
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, KvmError> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("read the supported CPUID"))
}

#[derive(Default)]
struct Routes {
    /// Routes of the MSI vectors; a GSI that is taken but not yet routed holds none.
    msi: BTreeMap<u32, Option<MsiMessage>>,
}

/// A virtual machine.
pub struct Vm {
    fd: VmFd,
    routes: Mutex<Routes>,
    slots: Mutex<SlotNumbers>,
    slot_limit: u32,
    track_dirty_pages: bool,
}

/// Which numbers memory slots have.
#[derive(Default)]
struct SlotNumbers {
    /// Those that were given back.
    free: Vec<u32>,
    /// The first that was never used.
    next: u32,
}

impl SlotNumbers {
    /// A number below `limit` that no slot has.
    fn take(&mut self, limit: u32) -> Option<u32> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        let slot = Some(self.next).filter(|slot| *slot < limit)?;
        self.next += 1;
        Some(slot)
    }
}

impl Vm {
    /// Makes a machine with the in-kernel interrupt controllers and timer, and gives it `memory`. With
    /// `track_dirty_pages` KVM notes which pages the guest writes, in this memory and in what is added later.
    ///
    /// The order matters: the TSS address before any vCPU, the interrupt controller before the timer, both before
    /// the first vCPU.
    pub fn new(kvm: &Kvm, memory: &GuestMemory, track_dirty_pages: bool) -> Result<Self, KvmError> {
        let fd = create(kvm)?;
        fd.set_tss_address(layout::KVM_TSS)
            .map_err(failed("set the TSS address"))?;
        fd.create_irq_chip()
            .map_err(failed("create the interrupt controllers"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit).map_err(failed("create the timer"))?;
        let vm = Self {
            // Asked now: io threads, which add memory too, may not ask.
            slot_limit: u32::try_from(fd.check_extension_int(Cap::NrMemslots)).unwrap_or(0),
            fd,
            routes: Mutex::default(),
            slots: Mutex::default(),
            track_dirty_pages,
        };
        for region in memory.iter() {
            vm.set_memory_slot(region, false)?;
        }
        Ok(vm)
    }

    /// Gives the guest `region` until the returned value is dropped. With `read_only` its writes there are treated as
    /// accesses to a place without memory.
    pub fn add_memory(
        self: &Arc<Self>,
        region: Arc<GuestRegion>,
        read_only: bool,
    ) -> Result<MemorySlot, KvmError> {
        let slot = self.set_memory_slot(&region, read_only)?;
        let vm = Arc::clone(self);
        Ok(MemorySlot { vm, slot, region })
    }

    /// How many memory slots there can be, those of RAM included.
    pub fn memory_slot_limit(&self) -> u32 {
        self.slot_limit
    }

    /// Makes a memory slot of `region` and gives its number.
    fn set_memory_slot(&self, region: &GuestRegion, read_only: bool) -> Result<u32, KvmError> {
        let flags = match (read_only, self.track_dirty_pages) {
            (true, _) => KVM_MEM_READONLY,
            (false, true) => KVM_MEM_LOG_DIRTY_PAGES,
            (false, false) => 0,
        };
        let limit = self.slot_limit;
        let slot = self
            .lock_slots()
            .take(limit)
            .ok_or(KvmError::NoMemorySlot(limit))?;
        let host = region.get_host_address(MemoryRegionAddress(0));
        let description = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: host.expect("a mapped region has an address") as u64,
        };
        // SAFETY: needed to give the guest memory. The region is a live mapping of that length, and outlives the slot:
        // a `MemorySlot` keeps it, and `vm::Vm` drops this value before the RAM.
        let set = unsafe { self.fd.set_user_memory_region(description) };
        if set.is_err() {
            self.lock_slots().free.push(slot);
        }
        set.map_err(failed("map the guest's memory"))?;
        Ok(slot)
    }

    /// Makes a vCPU and a switch to get it out of guest code.
    pub fn create_vcpu(&self, id: u8) -> Result<(VcpuFd, ImmediateExit), KvmError> {
        let mut vcpu = self
            .fd
            .create_vcpu(u64::from(id))
            .map_err(failed("create a vCPU"))?;
        let flag = std::ptr::from_mut(&mut vcpu.get_kvm_run().immediate_exit);
        Ok((vcpu, ImmediateExit(flag.cast())))
    }

    /// Lets a write to `fd` raise `gsi`.
    pub fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.fd
            .register_irqfd(fd, gsi)
            .map_err(failed("bind an interrupt"))
    }

    /// Undoes [`Vm::register_irqfd`].
    pub fn unregister_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.fd
            .unregister_irqfd(fd, gsi)
            .map_err(failed("unbind an interrupt"))
    }

    /// Lets any write to `port` signal `fd` without leaving the kernel.
    pub fn register_ioevent_port(&self, fd: &EventFd, port: u16) -> Result<(), KvmError> {
        let address = IoEventAddress::Pio(u64::from(port));
        self.fd
            .register_ioevent(fd, &address, NoDatamatch)
            .map_err(failed("bind a queue notification"))
    }

    /// Lets a 32-bit write of `value` to `address` signal `fd` without an exit.
    pub fn register_ioevent_value(&self, fd: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        let address = IoEventAddress::Mmio(address);
        self.fd
            .register_ioevent(fd, &address, value)
            .map_err(failed("bind a register of a device"))
    }

    /// Undoes [`Vm::register_ioevent_port`].
    pub fn unregister_ioevent_port(&self, fd: &EventFd, port: u16) -> Result<(), KvmError> {
        let address = IoEventAddress::Pio(u64::from(port));
        self.fd
            .unregister_ioevent(fd, &address, NoDatamatch)
            .map_err(failed("unbind a queue notification"))
    }

    /// Drives an interrupt line of the I/O APIC.
    pub fn set_irq_line(&self, gsi: u32, active: bool) -> Result<(), KvmError> {
        self.fd
            .set_irq_line(gsi, active)
            .map_err(failed("drive an interrupt line"))
    }

    /// Takes a GSI for a message signalled interrupt.
    pub fn allocate_msi(&self) -> Result<u32, KvmError> {
        let msi = &mut self.lock_routes().msi;
        let free = (layout::IOAPIC_LINES..MSI_GSI_END).find(|gsi| !msi.contains_key(gsi));
        let gsi = free.ok_or(KvmError::NoGsi)?;
        msi.insert(gsi, None);
        Ok(gsi)
    }

    /// Gives a GSI back.
    pub fn free_msi(&self, gsi: u32) {
        self.lock_routes().msi.remove(&gsi);
    }

    /// Sends `gsi` as `message` from now on. The kernel takes the whole table each time, so call it only for news.
    pub fn route_msi(&self, gsi: u32, message: MsiMessage) -> Result<(), KvmError> {
        let mut routes = self.lock_routes();
        let before = routes.msi.insert(gsi, Some(message));
        let messages = routes
            .msi
            .iter()
            .filter_map(|(gsi, message)| message.map(|m| msi_route(*gsi, m)));
        let entries: Vec<_> = irqchip_routes().chain(messages).collect();
        let table = KvmIrqRouting::from_entries(&entries).expect("the count of GSIs bounds the table");
        self.fd.set_gsi_routing(&table).map_err(|error| {
            // The next table must not have what this one was refused for.
            routes.msi.insert(gsi, before.flatten());
            failed("route interrupts")(error)
        })
    }

    /// The guest's kvmclock, in nanoseconds.
    pub fn clock(&self) -> Result<u64, KvmError> {
        Ok(self
            .fd
            .get_clock()
            .map_err(failed("read the guest's clock"))?
            .clock)
    }

    /// Sets the guest's kvmclock, in nanoseconds.
    pub fn set_clock(&self, clock: u64) -> Result<(), KvmError> {
        let data = kvm_clock_data {
            clock,
            ..Default::default()
        };
        self.fd.set_clock(&data).map_err(failed("set the guest's clock"))
    }

    /// Whether the local APIC timer can work by TSC deadline.
    pub fn has_tsc_deadline(&self) -> bool {
        self.fd.check_extension(Cap::TscDeadlineTimer)
    }

    fn lock_slots(&self) -> std::sync::MutexGuard<'_, SlotNumbers> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_routes(&self) -> std::sync::MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory that the guest has beside its RAM. Dropping it takes it away.
pub struct MemorySlot {
    vm: Arc<Vm>,
    slot: u32,
    region: Arc<GuestRegion>,
}

impl Drop for MemorySlot {
    fn drop(&mut self) {
        let nothing = kvm_userspace_memory_region {
            slot: self.slot,
            ..Default::default()
        };
        // SAFETY: needed to take memory from the guest. A slot without a size is deleted; no address is used.
        match unsafe { self.vm.fd.set_user_memory_region(nothing) } {
            Ok(()) => self.vm.lock_slots().free.push(self.slot),
            Err(error) => {
                log::error!("KVM keeps memory slot {}: {error}", self.slot);
                // The guest still reaches the memory, so it must never be unmapped.
                std::mem::forget(Arc::clone(&self.region));
            }
        }
    }
}

fn msi_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    let [a0, a1, a2, a3, h0, h1, h2, h3] = message.address.to_le_bytes();
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: u32::from_le_bytes([a0, a1, a2, a3]),
        address_hi: u32::from_le_bytes([h0, h1, h2, h3]),
        data: message.data,
        ..Default::default()
    };
    entry
}

/// The routes that the kernel sets up by itself, which a new table must repeat: 24 I/O APIC pins, 16 PIC pins.
fn irqchip_routes() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let pin = |gsi, irqchip, pin| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
        entry
    };
    let ioapic = (0..layout::IOAPIC_LINES).map(move |gsi| {
        // The timer's line arrives at pin 2 (as on every PC); pin 0 is the PIC's.
        pin(gsi, KVM_IRQCHIP_IOAPIC, if gsi == 0 { 2 } else { gsi })
    });
    let master = (0..8).map(move |gsi| pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi));
    let slave = (8..16).map(move |gsi| pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8));
    ioapic.chain(master).chain(slave)
}

/// The switch in the memory shared with KVM that makes `KVM_RUN` return at once. It must not be used after the vCPU
/// it came with is dropped.
pub struct ImmediateExit(*const AtomicU8);

// SAFETY: the pointer goes to a byte of a shared mapping and is only used through an atomic; the mapping is not bound
// to a thread.
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    /// Makes the next (or current, with a signal) `KVM_RUN` return, until cleared by the vCPU's own thread.
    pub fn set(&self) {
        // SAFETY: needed because KVM shares this flag as plain memory. The vCPU is alive: `VcpuHandle` keeps it in
        // the join handle of its thread for as long as it keeps this value.
        unsafe { &*self.0 }.store(1, Ordering::SeqCst);
    }
}

/// Sets the guest's TSC on this vCPU back by `ticks` (KVM_VCPU_TSC_CTRL, Linux 5.16 and later).
pub fn shift_tsc(vcpu: &VcpuFd, ticks: u64) -> Result<(), KvmError> {
    let mut offset = 0u64;
    let place = std::ptr::from_mut(&mut offset);
    let attr = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: place as u64,
        flags: 0,
    };
    let attribute = |request, op| {
        // SAFETY: needed because the wrapper has no calls for a vCPU's attributes on x86_64. The kernel reads or writes
        // one u64 at `offset`, which lives over the call.
        match unsafe { libc::ioctl(vcpu.as_raw_fd(), request, std::ptr::from_ref(&attr)) } {
            0 => Ok(()),
            _ => Err(KvmError::Operation {
                op,
                source: io::Error::last_os_error(),
            }),
        }
    };
    attribute(GET_DEVICE_ATTR, "read a vCPU's TSC offset")?;
    // SAFETY: needed because the kernel has changed the value behind the compiler's back; it is ours and initialized.
    unsafe { place.write_volatile(place.read_volatile().wrapping_sub(ticks)) };
    attribute(SET_DEVICE_ATTR, "set a vCPU's TSC offset")
}

/// Sends the vCPU kick signal to a thread.
pub fn kick_thread(thread: libc::pthread_t) {
    // SAFETY: needed to interrupt KVM_RUN. The thread has not been joined: its handle keeps it.
    unsafe { libc::pthread_kill(thread, kick_signal()) };
}

/// The signal that interrupts `KVM_RUN`.
pub fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Installs the empty handler of the kick signal, without restarting system calls.
pub fn install_kick_handler() -> io::Result<()> {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    vmm_sys_util::signal::register_signal_handler(kick_signal(), ignore)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_numbers_of_memory_slots_out_again_up_to_the_limit() {
        let mut numbers = SlotNumbers::default();
        assert_eq!([numbers.take(2), numbers.take(2)], [Some(0), Some(1)]);
        assert_eq!(numbers.take(2), None);
        numbers.free.push(0);
        assert_eq!([numbers.take(2), numbers.take(2)], [Some(0), None]);
    }

    #[test]
    fn repeats_the_kernels_own_routes() {
        let routes: Vec<_> = irqchip_routes().collect();
        assert_eq!(routes.len(), 40);
        assert!(routes.iter().all(|route| route.gsi < 24));
    }

    #[test]
    fn a_template_adds_and_removes_checks() {
        let numbers = |asked: &[Capability]| needed(asked).map(|(number, _)| number).collect::<Vec<_>>();
        let usual = numbers(&[]);
        let asked = numbers(&[Capability::Required(121), Capability::Waived(Cap::Pit2 as u32)]);
        assert!(usual.contains(&(Cap::Pit2 as u32)) && !usual.contains(&121));
        assert!(!asked.contains(&(Cap::Pit2 as u32)) && asked.contains(&121));
        assert_eq!(asked.len(), usual.len());
    }

    #[test]
    fn splits_an_msi_address() {
        let entry = msi_route(
            24,
            MsiMessage {
                address: 0x1_fee0_1000,
                data: 7,
            },
        );
        // SAFETY: the entry was made as an MSI route, so this is the live field.
        let msi = unsafe { entry.u.msi };
        assert_eq!((msi.address_lo, msi.address_hi, msi.data), (0xfee0_1000, 1, 7));
    }
}

//! vCPU threads: they run guest code and serve the exits that no eventfd took.
//!
//! The control thread holds a [`VcpuHandle`] per vCPU and asks it to pause, to resume or to end. A vCPU that is asked
//! leaves `KVM_RUN` (immediate exit and a signal), answers, and parks.

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use devices::bus::Bus;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;

use crate::kvm::{self, ImmediateExit};
use crate::logger::{self, FATAL};
use crate::metrics::VcpuMetrics;
use crate::seccomp::{self, Filters};
use crate::x86_64::tsc;

/// How often a vCPU is kicked that does not park.
const KICK_PERIOD: Duration = Duration::from_millis(10);

/// Why a vCPU stopped the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The guest reset the machine by a triple fault.
    Reset,
    /// KVM could not go on; the log has the reason.
    Failed,
}

/// What all vCPU threads of a machine share.
pub struct VcpuShared {
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Signalled when a vCPU ends the machine.
    pub ended: EventFd,
    /// Why, set before the signal.
    pub reason: Mutex<Option<Ended>>,
    /// What the threads may do.
    pub filters: Filters,
}

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Wish {
    Run,
    Pause,
    End,
}

#[derive(Default)]
struct Gate {
    /// Read on every exit without the lock below; changed with it held.
    wish: AtomicU8,
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    /// It runs no guest code, and will not before the next wish.
    parked: bool,
    /// TSC ticks to take back when the vCPU runs again, so that the guest's clock does not see the pause.
    hidden_ticks: u64,
}

/// The control thread's end of a vCPU.
pub struct VcpuHandle {
    gate: Arc<Gate>,
    metrics: Arc<VcpuMetrics>,
    exit: ImmediateExit,
    /// Gives the vCPU back when joined: until then the memory that `exit` points to stays mapped.
    thread: Option<JoinHandle<VcpuFd>>,
}

impl VcpuHandle {
    /// Starts the thread of a vCPU; it waits parked for the first [`VcpuHandle::resume`].
    pub fn spawn(id: u8, vcpu: VcpuFd, exit: ImmediateExit, shared: Arc<VcpuShared>) -> io::Result<Self> {
        let gate = Arc::new(Gate {
            wish: AtomicU8::new(Wish::Pause as u8),
            ..Gate::default()
        });
        let metrics = Arc::<VcpuMetrics>::default();
        let runner = Runner {
            id,
            vcpu,
            gate: Arc::clone(&gate),
            metrics: Arc::clone(&metrics),
            shared,
        };
        let builder = thread::Builder::new()
            .name(format!("vcpu {id}"))
            .stack_size(256 << 10);
        let thread = builder.spawn(move || {
            runner.shared.filters.confine_or_die(seccomp::Thread::Vcpu);
            logger::limit_this_thread();
            runner.work()
        })?;
        Ok(Self {
            gate,
            metrics,
            exit,
            thread: Some(thread),
        })
    }

    /// Its counters.
    pub fn metrics(&self) -> &VcpuMetrics {
        &self.metrics
    }

    /// Asks the vCPU to leave guest code and park. Returns at once; see [`VcpuHandle::wait_parked`].
    pub fn pause(&self) {
        self.wish(Wish::Pause, 0);
    }

    /// Waits until the vCPU is parked, after it was asked.
    pub fn wait_parked(&self) {
        let mut state = self.gate.lock();
        while !state.parked {
            state = self
                .gate
                .changed
                .wait_timeout(state, KICK_PERIOD)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            if !state.parked {
                self.kick();
            }
        }
    }

    /// Has the vCPU leave guest code, or a write of the console that nobody reads. A kick that comes just before that
    /// write begins is lost.
    fn kick(&self) {
        if let Some(thread) = &self.thread {
            self.exit.set();
            kvm::kick_thread(thread.as_pthread_t());
        }
    }

    /// Lets the vCPU run; `hidden_ticks` host TSC ticks have not happened for the guest.
    pub fn resume(&self, hidden_ticks: u64) {
        self.wish(Wish::Run, hidden_ticks);
    }

    fn wish(&self, wish: Wish, hidden_ticks: u64) {
        let mut state = self.gate.lock();
        self.gate.wish.store(wish as u8, Ordering::SeqCst);
        state.hidden_ticks += hidden_ticks;
        drop(state);
        self.gate.changed.notify_all();
        if wish != Wish::Run {
            self.kick();
        }
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        self.wish(Wish::End, 0);
        self.wait_parked();
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has ended the process already.
            drop(thread.join());
        }
    }
}

impl Gate {
    fn wish(&self) -> Wish {
        match self.wish.load(Ordering::Acquire) {
            0 => Wish::Run,
            1 => Wish::Pause,
            _ => Wish::End,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Runner {
    id: u8,
    vcpu: VcpuFd,
    gate: Arc<Gate>,
    metrics: Arc<VcpuMetrics>,
    shared: Arc<VcpuShared>,
}

impl Runner {
    fn work(mut self) -> VcpuFd {
        self.wait();
        loop {
            match self.gate.wish() {
                Wish::Run => {}
                Wish::Pause => {
                    self.park();
                    // The next wish may have come, and its kick been lost, before the flag was cleared.
                    continue;
                }
                Wish::End => break,
            }
            if let Some(ended) = self.run() {
                *self.shared.reason.lock().unwrap_or_else(PoisonError::into_inner) = Some(ended);
                // Only a full counter refuses, and then the control thread is awake already.
                let _ = self.shared.ended.write(1);
                self.park_ended();
            }
        }
        self.gate.lock().parked = true;
        self.gate.changed.notify_all();
        self.vcpu
    }

    /// Leaves the guest alone, which has run, until the wish is another one than to pause.
    fn park(&mut self) {
        // The guest must not take the pause for a soft lockup. Guests without kvmclock refuse this, rightly.
        if self.vcpu.kvmclock_ctrl().is_err() {
            self.metrics.kvmclock_ctrl_fails.add(1);
        }
        self.wait();
    }

    /// Waits until the wish is another one than to pause.
    fn wait(&mut self) {
        let gate = Arc::clone(&self.gate);
        let mut state = gate.lock();
        state.parked = true;
        gate.changed.notify_all();
        let waiting = |_: &mut GateState| gate.wish() == Wish::Pause;
        state = gate
            .changed
            .wait_while(state, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        state.parked = false;
        let ticks = std::mem::take(&mut state.hidden_ticks);
        drop(state);
        self.hide_ticks(ticks);
        self.vcpu.set_kvm_immediate_exit(0);
    }

    /// Waits to be joined, answering pauses, after this vCPU has ended the machine.
    fn park_ended(&mut self) {
        let mut state = self.gate.lock();
        state.parked = true;
        self.gate.changed.notify_all();
        let waiting = |_: &mut GateState| self.gate.wish() != Wish::End;
        drop(
            self.gate
                .changed
                .wait_while(state, waiting)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Sets the guest's TSC back by `ticks`. Kernels before 5.16 cannot; there the TSC goes on during a pause.
    fn hide_ticks(&self, ticks: u64) {
        if ticks == 0 {
            return;
        }
        if let Err(error) = kvm::shift_tsc(&self.vcpu, ticks) {
            log::debug!(
                "vCPU {}: the guest's TSC goes on over the pause: {error}",
                self.id
            );
        }
    }

    /// Runs guest code up to one exit.
    fn run(&mut self) -> Option<Ended> {
        let (shared, metrics) = (&self.shared, &self.metrics);
        let exit = self.vcpu.run();
        let start = tsc();
        match exit {
            Ok(VcpuExit::IoIn(port, data)) => {
                metrics.exit_io_in.begin();
                shared.pio.read(u64::from(port), data);
                metrics.exit_io_in.end(start);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                metrics.exit_io_out.begin();
                shared.pio.write(u64::from(port), data);
                metrics.exit_io_out.end(start);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                metrics.exit_mmio_read.begin();
                shared.mmio.read(address, data);
                metrics.exit_mmio_read.end(start);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                metrics.exit_mmio_write.begin();
                shared.mmio.write(address, data);
                metrics.exit_mmio_write.end(start);
            }
            // With the in-kernel interrupt controller these ask for nothing.
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => {}
            Ok(VcpuExit::Shutdown) => return Some(Ended::Reset),
            Ok(exit) => {
                let what = format!("{exit:?}");
                return Some(self.failed(&what));
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                // The flag stays set while a wish is pending; a stray signal must not make the loop spin.
                if self.gate.wish() == Wish::Run {
                    self.vcpu.set_kvm_immediate_exit(0);
                }
            }
            Err(error) => {
                let text = error.to_string();
                return Some(self.failed(&text));
            }
        }
        None
    }

    fn failed(&self, what: &str) -> Ended {
        self.metrics.failures.add(1);
        log::error!(target: FATAL, "vCPU {} cannot go on: {what}", self.id);
        Ended::Failed
    }
}

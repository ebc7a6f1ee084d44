//! The machine's legacy devices, wired to the port bus: serial port, i8042, RTC, and the ACPI event device.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use devices::acpi::ged::{self, Ged};
use devices::bus::{Bus, BusError, SharedDevice};
use devices::legacy::i8042::{self, CtrlAltDelError, I8042};
use devices::legacy::rtc::{self, Rtc};
use devices::legacy::serial::{self, Output, Serial};
use devices::timer::HostClock;
use serde_json::{Map, Value, json};
use vmm_sys_util::eventfd::EventFd;

use crate::config::SerialConfig;
use crate::error::remedy;
use crate::interrupt_lines::Level;
use crate::kvm::{self, KvmError};
use crate::metrics::add_to_sum;
use crate::x86_64::layout;

/// Why the legacy devices could not be made.
#[derive(Debug, thiserror::Error)]
pub enum LegacyError {
    /// The host has no descriptor left.
    #[error("cannot make an event descriptor")]
    EventFd(#[source] io::Error),
    /// The console's file.
    #[error("cannot open '{path}' for the serial port's output: {}", remedy(source))]
    Output {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// An interrupt.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The port map.
    #[error(transparent)]
    Bus(#[from] BusError),
}

/// The devices, as the control thread holds them.
pub struct Legacy {
    serial: Arc<Mutex<Serial>>,
    uart: Arc<serial::Counters>,
    i8042: Arc<Mutex<I8042>>,
    ged: Arc<Mutex<Ged>>,
    /// Kept for the descriptor that the control thread waits for.
    reset: EventFd,
    power_off: EventFd,
    room: EventFd,
    on_stdio: bool,
}

impl Legacy {
    /// Makes the devices and puts them on the bus.
    pub fn new(vm: &Arc<kvm::Vm>, pio: &Bus, config: Option<&SerialConfig>) -> Result<Self, LegacyError> {
        let path = config.and_then(|config| config.serial_out_path.as_ref());
        let output = match path {
            Some(path) => crate::logger::open_sink(path).map_err(|source| {
                let path = path.display().to_string();
                LegacyError::Output { path, source }
            })?,
            None => stdout().map_err(LegacyError::EventFd)?,
        };
        let (reset, power_off) = (event()?, event()?);
        let serial = Serial::new(Box::new(output) as Output, irq(vm, layout::SERIAL_GSI)?);
        let mut serial = serial.map_err(LegacyError::EventFd)?;
        if let Some(bucket) = config.and_then(|config| config.rate_limiter.as_ref()) {
            serial.limit(bucket, Box::new(HostClock));
        }
        let (room, uart) = (clone(serial.room())?, serial.counters());
        let i8042 = I8042::new(clone(&reset)?, irq(vm, layout::I8042_GSI)?);
        let line = Level::new(Arc::clone(vm), layout::GED_GSI);
        let ged = Ged::new(Box::new(line), clone(&power_off)?);

        let (serial, i8042) = (Arc::new(Mutex::new(serial)), Arc::new(Mutex::new(i8042)));
        let ged = Arc::new(Mutex::new(ged));
        let rtc: SharedDevice = Arc::new(Mutex::new(Rtc::new()));
        pio.insert(layout::SERIAL_PORT.into(), serial::PORTS, serial.clone())?;
        pio.insert(layout::I8042_DATA_PORT.into(), i8042::PORTS, i8042.clone())?;
        pio.insert(layout::RTC_PORT.into(), rtc::PORTS, rtc)?;
        pio.insert(layout::GED_PORT.into(), ged::PORTS, ged.clone())?;
        Ok(Self {
            serial,
            uart,
            i8042,
            ged,
            reset,
            power_off,
            room,
            on_stdio: path.is_none(),
        })
    }

    /// Signalled when the guest resets the machine.
    pub fn reset_event(&self) -> RawFd {
        self.reset.as_raw_fd()
    }

    /// Signalled when the guest powers the machine off.
    pub fn power_off_event(&self) -> RawFd {
        self.power_off.as_raw_fd()
    }

    /// Signalled when the serial port can take input again.
    pub fn console_room_event(&self) -> RawFd {
        self.room.as_raw_fd()
    }

    /// Whether the console is this process's standard input and output.
    pub fn console_is_stdio(&self) -> bool {
        self.on_stdio
    }

    /// Gives input to the serial port; returns how many bytes it took. None when a vCPU is at the port, maybe for long: it
    /// waits while standard output takes nothing.
    pub fn console_input(&self, bytes: &[u8]) -> Option<usize> {
        // Whatever room was offered is used now; the descriptor must not stay readable. Fails only when it is not.
        let _ = self.room.read();
        let mut serial = match self.serial.try_lock() {
            Ok(serial) => serial,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(serial.enqueue(bytes))
    }

    /// Presses Ctrl-Alt-Del on the guest's keyboard.
    pub fn ctrl_alt_del(&self) -> Result<(), CtrlAltDelError> {
        lock(&self.i8042).trigger_ctrl_alt_del()
    }

    /// The event device.
    pub fn event_device(&self) -> Arc<Mutex<Ged>> {
        Arc::clone(&self.ged)
    }

    /// Presses the guest's power button.
    pub fn power_button(&self) {
        lock(&self.ged).raise(ged::Event::PowerButton);
    }

    /// Adds the devices' counters to a metrics line.
    pub fn collect_metrics(&self, line: &mut Map<String, Value>) {
        let groups = json!({"uart": self.uart.metrics(), "i8042": lock(&self.i8042).metrics()});
        add_to_sum(line, &groups);
    }
}

fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

fn event() -> Result<EventFd, LegacyError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(LegacyError::EventFd)
}

fn clone(fd: &EventFd) -> Result<EventFd, LegacyError> {
    fd.try_clone().map_err(LegacyError::EventFd)
}

/// A descriptor that raises `gsi`.
fn irq(vm: &kvm::Vm, gsi: u32) -> Result<EventFd, LegacyError> {
    let fd = event()?;
    vm.register_irqfd(&fd, gsi)?;
    Ok(fd)
}

/// Standard output without a buffer: the guest's console shows every byte at once.
fn stdout() -> io::Result<File> {
    io::stdout().as_fd().try_clone_to_owned().map(File::from)
}

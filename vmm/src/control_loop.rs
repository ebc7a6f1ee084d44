//! The control thread's event loop: API requests, the guest's ways to end the machine, the console's input, signals,
//! and the timer of the metrics. With nothing to do it sleeps without a time-out.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use devices::virtio::DeviceKind;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::api::{self, Action, Call, Reply, Rest};
use crate::controller::Controller;
use crate::events::Event;
use crate::signals::Termination;
use crate::terminal;
use crate::unplug::Unplugs;
use crate::vcpu::Ended;

/// How often a metrics line is due.
const METRICS_PERIOD: Duration = Duration::from_secs(60);
/// How long input waits when a vCPU is at the serial port.
const CONSOLE_RETRY_MS: i32 = 1;

/// An action on its way to the control thread, with the way back.
pub struct Request {
    /// What to do.
    pub action: Action,
    /// Whom to answer.
    pub call: Call,
}

/// The sending end of the control thread's inbox.
pub struct Inbox {
    requests: Sender<Request>,
    wake: Arc<EventFd>,
}

impl Inbox {
    /// Hands a request over. While the process ends nobody takes it; the client then gets a fault.
    pub fn send(&self, request: Request) {
        if self.requests.send(request).is_ok() {
            // Only a full counter refuses, and 2^64 requests do not wait.
            let _ = self.wake.write(1);
        }
    }
}

/// How the process is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// With this exit code.
    Code(u8),
    /// By this signal.
    Signal(i32),
}

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum Source {
    Requests,
    Signal,
    VcpuEnded,
    Reset,
    PowerOff,
    Console,
    ConsoleRoom,
    Metrics,
    Ejection,
    UnplugTimer,
}

const SOURCES: [Source; 10] = [
    Source::Requests,
    Source::Signal,
    Source::VcpuEnded,
    Source::Reset,
    Source::PowerOff,
    Source::Console,
    Source::ConsoleRoom,
    Source::Metrics,
    Source::Ejection,
    Source::UnplugTimer,
];

/// The loop.
pub struct ControlLoop {
    epoll: Epoll,
    controller: Controller,
    requests: Receiver<Request>,
    /// Counts the requests that wait.
    wake: Arc<EventFd>,
    termination: Termination,
    timer: TimerFd,
    /// Set once the machine's descriptors are watched.
    machine_watched: bool,
    timer_armed: bool,
    unplugs: Unplugs,
    /// Standard input, once it is the console's.
    stdin: Option<File>,
    /// Input that the serial port had no room for.
    unread: Vec<u8>,
    /// While there is some of it, standard input is not watched.
    stdin_rests: bool,
    /// The serial port could not be reached, so that input is offered again soon.
    console_busy: bool,
}

impl ControlLoop {
    /// A loop for `controller`, and the inbox that reaches it.
    pub fn new(controller: Controller, termination: Termination) -> io::Result<(Self, Inbox)> {
        let (sender, requests) = std::sync::mpsc::channel();
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC | libc::EFD_SEMAPHORE)?;
        let wake = Arc::new(wake);
        let inbox = Inbox {
            requests: sender,
            wake: Arc::clone(&wake),
        };
        let this = Self {
            epoll: Epoll::new()?,
            controller,
            requests,
            wake,
            termination,
            timer: TimerFd::new().map_err(|e| io::Error::from_raw_os_error(e.errno()))?,
            machine_watched: false,
            timer_armed: false,
            unplugs: Unplugs::new()?,
            stdin: None,
            unread: Vec::new(),
            stdin_rests: false,
            console_busy: false,
        };
        this.watch(this.wake.as_raw_fd(), Source::Requests)?;
        this.watch(this.termination.as_raw_fd(), Source::Signal)?;
        this.watch(this.timer.as_raw_fd(), Source::Metrics)?;
        this.watch(this.unplugs.timer(), Source::UnplugTimer)?;
        Ok((this, inbox))
    }

    /// The controller, for what happens before the loop.
    pub fn controller(&mut self) -> &mut Controller {
        &mut self.controller
    }

    /// Works until the process is to end. What must happen in order at the end is done then.
    pub fn run(&mut self) -> io::Result<Exit> {
        let mut events = [EpollEvent::default(); 8];
        loop {
            self.follow_up()?;
            let timeout = if self.console_busy { CONSOLE_RETRY_MS } else { -1 };
            let count = match self.epoll.wait(timeout, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(error),
            };
            if self.console_busy {
                self.feed_console();
            }
            for event in &events[..count] {
                let source = SOURCES.into_iter().find(|source| *source as u64 == event.data());
                if let Some(exit) = source.and_then(|source| self.on_event(source)) {
                    self.finish();
                    return Ok(exit);
                }
            }
        }
    }

    fn on_event(&mut self, source: Source) -> Option<Exit> {
        match source {
            Source::Requests => self.serve_request(),
            Source::Signal => return self.termination.read().map(Exit::Signal),
            Source::Reset => return Some(self.ended("reset", &Event::GuestReset)),
            Source::PowerOff => return Some(self.ended("powered off", &Event::GuestPowerOff)),
            Source::VcpuEnded => {
                let reason = self.controller.running().and_then(|vm| vm.ended());
                if reason == Some(Ended::Reset) {
                    return Some(self.ended("reset by a triple fault", &Event::GuestReset));
                }
                self.ended("stopped because a vCPU failed", &Event::VcpuFailed);
                return Some(Exit::Code(1));
            }
            Source::Console => self.read_console(),
            Source::ConsoleRoom => self.feed_console(),
            Source::Metrics => {
                let _ = self.timer.wait();
                self.write_metrics();
            }
            Source::Ejection => self.answer_ejected(),
            Source::UnplugTimer => self.expire_unplugs(),
        }
        None
    }

    fn ended(&self, how: &str, event: &Event<'_>) -> Exit {
        log::info!("The guest has {how}.");
        self.controller.events().publish(event);
        Exit::Code(0)
    }

    /// Serves one request; others have their turn when signals and the guest have had theirs.
    fn serve_request(&mut self) {
        let _ = self.wake.read();
        let Ok(Request { action, call }) = self.requests.try_recv() else {
            return;
        };
        let gone = match &action {
            Action::DeleteDevice { kind, id, .. } => Some((*kind, id.clone())),
            _ => None,
        };
        let result = self.controller.handle(action);
        let done = matches!(result, Ok(Reply::Done));
        match api::answer(call, result) {
            Rest::Answered => {}
            Rest::Stream(stream) => self.controller.subscribe(stream),
            Rest::Wait(unplug, call) => self.unplugs.add(unplug, call),
        }
        // Others may be waiting for a device that was taken away now.
        if let (true, Some(gone)) = (done, gone) {
            self.answer_unplugs(&[gone]);
        }
    }

    /// Answers all who wait for these devices to go.
    fn answer_unplugs(&mut self, gone: &[(DeviceKind, String)]) {
        for (kind, id) in gone {
            for call in self.unplugs.finish(*kind, id) {
                api::answer(call, Ok(Reply::Done));
            }
        }
    }

    /// Answers all who wait for what the guest has let go of.
    fn answer_ejected(&mut self) {
        let gone = self.controller.take_ejected();
        self.answer_unplugs(&gone);
    }

    fn expire_unplugs(&mut self) {
        // What the guest has let go of at the last moment was in time.
        self.answer_ejected();
        for (unplug, call) in self.unplugs.expired() {
            api::answer(call, self.controller.expire(&unplug));
        }
    }

    /// Watches what became there: a machine, a path for metrics.
    fn follow_up(&mut self) -> io::Result<()> {
        if !self.timer_armed && self.controller.has_metrics() {
            let failed = |e: vmm_sys_util::errno::Error| io::Error::from_raw_os_error(e.errno());
            self.timer
                .reset(METRICS_PERIOD, Some(METRICS_PERIOD))
                .map_err(failed)?;
            self.timer_armed = true;
        }
        if self.machine_watched {
            return Ok(());
        }
        let Some(vm) = self.controller.running() else {
            return Ok(());
        };
        let events = vm.events();
        let sources = [
            (events.vcpu_ended, Source::VcpuEnded),
            (events.reset, Source::Reset),
            (events.power_off, Source::PowerOff),
            (events.console_room, Source::ConsoleRoom),
        ];
        for (fd, source) in sources {
            self.watch(fd, source)?;
        }
        if let Some(fd) = events.ejection {
            self.watch(fd, Source::Ejection)?;
        }
        self.machine_watched = true;
        self.connect_console()
    }

    /// Connects standard input, when it is a terminal or pipe that this process may read.
    fn connect_console(&mut self) -> io::Result<()> {
        if !self.controller.running().is_some_and(|vm| vm.console_is_stdio()) {
            return Ok(());
        }
        if terminal::is_ours() {
            terminal::set_raw()?;
        } else if io::IsTerminal::is_terminal(&io::stdin()) {
            return Ok(());
        }
        // Not `io::stdin`, whose buffer would hide input from epoll.
        self.stdin = Some(File::from(io::stdin().as_fd().try_clone_to_owned()?));
        // A regular file or /dev/null cannot be waited for, and holds nothing that somebody types.
        let _ = self.watch(0, Source::Console);
        Ok(())
    }

    fn read_console(&mut self) {
        if !self.unread.is_empty() {
            return;
        }
        let mut bytes = [0; 256];
        let Some(stdin) = &mut self.stdin else { return };
        match stdin.read(&mut bytes) {
            Ok(0) => self.unwatch_console(),
            Ok(count) => {
                self.unread.extend_from_slice(&bytes[..count]);
                self.feed_console();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => self.unwatch_console(),
        }
    }

    /// Gives the serial port what it has room for; standard input rests until it has taken everything.
    fn feed_console(&mut self) {
        let Some(vm) = self.controller.running() else {
            return;
        };
        let taken = vm.console_input(&self.unread);
        self.console_busy = taken.is_none();
        self.unread.drain(..taken.unwrap_or(0));
        match (self.unread.is_empty(), self.stdin_rests) {
            // Watched for nothing, a pipe would still be told of when its other end is closed.
            (false, false) => self.unwatch_console(),
            // It was watched before, so it can be.
            (true, true) => drop(self.watch(0, Source::Console)),
            _ => {}
        }
        self.stdin_rests = !self.unread.is_empty();
    }

    fn unwatch_console(&self) {
        let _ = self.epoll.ctl(ControlOperation::Delete, 0, EpollEvent::default());
    }

    fn watch(&self, fd: RawFd, source: Source) -> io::Result<()> {
        self.epoll.ctl(
            ControlOperation::Add,
            fd,
            EpollEvent::new(EventSet::IN, source as u64),
        )
    }

    fn write_metrics(&mut self) {
        if let Err(error) = self.controller.write_metrics() {
            log::error!("Cannot write a line of metrics: {error}");
        }
    }

    fn finish(&mut self) {
        self.write_metrics();
        terminal::restore();
    }
}

//! The process `mayfly`: one VM. It reads the command line, opens the log and the API socket, starts the `api` thread
//! and becomes the control thread.

#![no_main]

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use api_server::{Request, Responder, Server, ServerConfig, SocketFile, Stopper};
use vmm::api::{self, Call, RequestMetrics};
use vmm::args::{self, Args, ArgsError, Command, Seccomp};
use vmm::config::{self, MetricsConfig};
use vmm::control_loop::{self, ControlLoop, Exit, Inbox};
use vmm::controller::{self, Controller, Instance};
use vmm::error::chain;
use vmm::events::{Event, EventBus};
use vmm::landlock;
use vmm::logger::LOGGER;
use vmm::seccomp::{self, Filters};
use vmm::signals::{self, Termination};
use vmm::vm::Settings;

/// Exit codes that orchestrators know.
const GENERIC_ERROR: u8 = 1;
const BAD_CONFIGURATION: u8 = 152;
const BAD_ARGUMENTS: u8 = 153;

/// Where the C library enters, see [`vmm::start`].
// SAFETY: the name and the type are what the C library calls, once, with its own arguments.
#[unsafe(no_mangle)]
extern "C" fn main(_: libc::c_int, _: *const *const libc::c_char) -> libc::c_int {
    vmm::start::prepare();
    std::process::exit(mayfly().into())
}

/// What `--version` prints. Clients that look for Firecracker run what has this name, and read the first line.
fn version() -> String {
    let (mayfly, level) = (env!("CARGO_PKG_VERSION"), controller::API_VERSION);
    let program = std::env::args_os().next().unwrap_or_default();
    if Path::new(&program).ends_with("firecracker") {
        format!("Firecracker v{level}\nMayfly v{mayfly}\n")
    } else {
        format!("Mayfly v{mayfly} (Firecracker API v{level})\n")
    }
}

fn mayfly() -> u8 {
    let args = match args::parse(std::env::args_os().skip(1)) {
        Ok(Command::Run(args)) => args,
        Ok(Command::Check(path, args)) => return check(&path, &args),
        Ok(Command::CompileFilters(path)) => return compile_filters(&path),
        Ok(Command::Help) => {
            print!("{}", args::HELP);
            return 0;
        }
        Ok(Command::Version) => {
            print!("{}", version());
            return 0;
        }
        Err(error) => {
            eprintln!("mayfly: {error}\nFor more information try --help.");
            let bad_level = matches!(error, ArgsError::Level(_));
            return if bad_level {
                BAD_CONFIGURATION
            } else {
                BAD_ARGUMENTS
            };
        }
    };
    let exit = run(&args);
    log::logger().flush();
    match exit {
        Ok(Exit::Code(code)) => {
            log::info!(
                "Mayfly exiting {}. exit_code={code}",
                if code == 0 { "successfully" } else { "with error" }
            );
            code
        }
        Ok(Exit::Signal(signal)) => {
            log::info!("Mayfly exiting after signal {signal}.");
            signals::die_by(signal)
        }
        Err(error) => {
            vmm::terminal::restore();
            let text = chain(&*error);
            log::error!("{text}");
            eprintln!("mayfly: {text}");
            log::info!("Mayfly exiting with error. exit_code={GENERIC_ERROR}");
            GENERIC_ERROR
        }
    }
}

/// Checks a config file; nothing is started, and nothing left behind.
fn check(path: &Path, args: &Args) -> u8 {
    let checked = config::read_config_file(path)
        .map_err(Fatal::from)
        .and_then(|config| {
            let files = (args.logger.log_path.clone(), args.metrics_path.clone());
            controller(args, Filters::none(), Arc::default())?.check(config, files)
        });
    match checked {
        Ok(()) => {
            println!("The config file '{}' can be used.", path.display());
            0
        }
        Err(error) => {
            eprintln!("mayfly: {}", chain(&*error));
            GENERIC_ERROR
        }
    }
}

/// Writes compiled system call filters to standard output.
fn compile_filters(path: &Path) -> u8 {
    let compiled = seccomp::compile_file(path).map_err(Fatal::from);
    match compiled.and_then(|image| Ok(io::stdout().write_all(&image)?)) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("mayfly: {}", chain(&*error));
            GENERIC_ERROR
        }
    }
}

type Fatal = Box<dyn std::error::Error>;

fn run(args: &Args) -> Result<Exit, Fatal> {
    LOGGER.install(&args.id);
    controller::configure_logger(&args.logger)?;
    signals::on_panic();
    let termination = signals::install()?;
    vmm::kvm::install_kick_handler()?;
    log::info!("Running Mayfly v{}", env!("CARGO_PKG_VERSION"));

    let filters = filters(args)?;
    let requests = Arc::new(RequestMetrics::default());
    let controller = controller(args, filters.clone(), Arc::clone(&requests))?;
    let (mut control, inbox) = control_loop(args, controller, termination)?;
    let api = args
        .api_sock
        .as_ref()
        .map(|path| Api::start(path, args, &filters, (inbox, requests)))
        .transpose()?;
    // Behind the start of the `api` thread, which is not to inherit it, and before anything that users wrote is read.
    filters.confine(seccomp::Thread::Control)?;
    let result = boot_and_run(&mut control, args);
    let (code, signal) = match &result {
        Ok(Exit::Code(code)) => (Some(*code), None),
        Ok(Exit::Signal(signal)) => (None, Some(*signal)),
        Err(_) => (Some(GENERIC_ERROR), None),
    };
    control
        .controller()
        .events()
        .publish(&Event::Exit { code, signal });
    // Nobody serves requests any more: those that wait are refused, and then every answer is written.
    drop(control);
    drop(api);
    result
}

fn boot_and_run(control: &mut ControlLoop, args: &Args) -> Result<Exit, Fatal> {
    if let Some(path) = &args.config_file {
        let config = config::read_config_file(path)?;
        control.controller().start_from(config)?;
        log::info!("Successfully started microvm that was configured from one single json");
        if args.api_sock.is_none() && args.seccomp != Seccomp::Off {
            settle(control.controller())?;
        }
    }
    Ok(control.run()?)
}

/// Gives up what a machine that runs and takes no requests needs no more.
fn settle(controller: &mut Controller) -> Result<(), Fatal> {
    if !landlock::restrict()? {
        log::info!("This kernel has no Landlock: the process keeps the right to open files.");
    }
    // Behind Landlock, whose calls end with it.
    Ok(controller.running().map_or(Ok(()), |vm| vm.settle())?)
}

/// The filters for all threads; from here on only they keep the process from starting programs with more rights.
fn filters(args: &Args) -> Result<Filters, Fatal> {
    let filters = match &args.seccomp {
        Seccomp::Off => return Ok(Filters::none()),
        Seccomp::BuiltIn => Filters::built_in(),
        Seccomp::File(path) => Filters::from_file(path)?,
    };
    seccomp::give_up_new_privileges()?;
    vmm::logger::load_time_zone();
    let of_helpers = filters.clone();
    devices::threads::begin_with(move || of_helpers.confine_or_die(seccomp::Thread::Flush));
    Ok(filters)
}

fn controller(args: &Args, filters: Filters, requests: Arc<RequestMetrics>) -> Result<Controller, Fatal> {
    let metadata = config::read_metadata(args.metadata.as_deref(), args.max_metadata)?;
    let settings = Settings {
        pci: args.pci,
        boot_timer: args.boot_timer.then(vmm::clock::now_us),
        events: EventBus::default(),
        filters,
        api: args.api_sock.is_some(),
        metadata: Arc::new(metadata),
    };
    let startup_us = (vmm::clock::since_us(args.start_time_us), vmm::clock::cpu_us(args));
    let instance = Instance {
        id: args.id.clone(),
        settings,
        startup_us,
    };
    Ok(Controller::new(instance, requests))
}

fn control_loop(
    args: &Args,
    mut controller: Controller,
    termination: Termination,
) -> Result<(ControlLoop, Inbox), Fatal> {
    if let Some(path) = &args.metrics_path {
        controller.set_metrics(MetricsConfig {
            metrics_path: path.clone(),
            emit_id: false,
            properties: None,
        })?;
    }
    Ok(ControlLoop::new(controller, termination)?)
}

/// The `api` thread, with its socket. Both are gone when this is dropped, after the answers that are due.
struct Api {
    _socket: SocketFile,
    stopper: Stopper,
    thread: Option<JoinHandle<()>>,
}

impl Api {
    fn start(
        path: &Path,
        args: &Args,
        filters: &Filters,
        (inbox, metrics): (Inbox, Arc<RequestMetrics>),
    ) -> Result<Self, Fatal> {
        let (listener, socket) = SocketFile::bind(path)?;
        signals::remove_on_fault(path);
        let config = ServerConfig {
            max_body: args.max_payload,
            ..ServerConfig::default()
        };
        let server = Server::from_listener(listener, config)?;
        Ok(Self {
            _socket: socket,
            stopper: server.stopper(),
            thread: Some(serve(server, filters.clone(), inbox, metrics)?),
        })
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.stopper.stop();
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has ended the process already.
            drop(thread.join());
        }
    }
}

/// Starts the `api` thread: it parses requests and hands actions to the control thread.
fn serve(
    mut server: Server,
    filters: Filters,
    inbox: Inbox,
    metrics: Arc<RequestMetrics>,
) -> io::Result<JoinHandle<()>> {
    let mut handler = move |request: Request, responder: Responder| {
        let call = Call::begin(&request, responder, &metrics);
        match api::route(&request) {
            Ok(api::Routed { action, deprecated }) => {
                let call = call.deprecated(deprecated);
                inbox.send(control_loop::Request { action, call });
            }
            Err(error) => call.answer(api_server::Response::fault(400, &error.to_string())),
        }
    };
    let work = move || {
        filters.confine_or_die(seccomp::Thread::Api);
        if let Err(error) = server.run(&mut handler) {
            log::error!("The API server has stopped: {}", chain(&error));
        }
    };
    std::thread::Builder::new()
        .name("api".into())
        .stack_size(256 << 10)
        .spawn(work)
}

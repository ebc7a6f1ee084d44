//! The command line of `mayfly`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use lexopt::Arg::{Long, Short, Value};

use crate::config::{LogLevel, LoggerConfig};

/// Where the API socket is when the command line does not say.
pub const DEFAULT_API_SOCKET: &str = "/run/firecracker.socket";
/// The largest request body when the command line does not say, in bytes.
pub const DEFAULT_PAYLOAD_SIZE: usize = 51_200;
/// The instance id when the command line does not say.
pub const DEFAULT_ID: &str = "anonymous-instance";

/// The text of `--help`.
pub const HELP: &str = "\
mayfly: a minimal microVM monitor. One process is one VM.

Usage: mayfly [OPTIONS]            (both `--option value` and `--option=value` work)

  --api-sock PATH                  listen for API requests on this unix socket [/run/firecracker.socket]
  --config-file PATH               build and boot the VM from this JSON file
  --check-config PATH              check a config file without starting anything: exit code 0 or 1
  --no-api                         run without an API socket (needs --config-file)
  --id ID                          name of the instance, 1 to 64 letters, digits and '-' [anonymous-instance]
  --no-pci                         virtio devices on MMIO instead of PCI
  --enable-pci                     accepted and without effect: PCI is the default
  --boot-timer                     log how long the guest took to boot, when it signals its init
  --http-api-max-payload-size N    largest request body in bytes [51200]
  --metadata PATH                  give guests the JSON in this file over MMDS
  --mmds-size-limit N              largest JSON for MMDS in bytes [as --http-api-max-payload-size]

  --log-path PATH                  log to this file or FIFO instead of standard output
  --level LEVEL                    Off, Error, Warn, Info, Debug or Trace [Info]
  --module MODULE                  log only this module
  --show-level                     show the level in every line
  --show-log-origin                show file and line of origin in every line
  --metrics-path PATH              write metrics to this file or FIFO

  --no-seccomp                     let every thread make every system call
  --seccomp-filter PATH            system call filters of your own, as JSON or compiled
  --compile-seccomp PATH           compile filters and write them to standard output
  --start-time-us N                when the process was asked for, in us of the monotonic clock
  --start-time-cpu-us N            CPU time used until then
  --parent-cpu-time-us N           CPU time used by the parent until then

  -h, --help                       show this text
  -V, --version                    show the version
";

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Be a VM.
    Run(Box<Args>),
    /// Check a config file for a VM that would be started so.
    Check(PathBuf, Box<Args>),
    /// Compile system call filters.
    CompileFilters(PathBuf),
    /// Print the help text.
    Help,
    /// Print the version.
    Version,
}

/// The options.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "HELP describes them")]
pub struct Args {
    pub api_sock: Option<PathBuf>,
    pub config_file: Option<PathBuf>,
    pub id: String,
    pub pci: bool,
    pub boot_timer: bool,
    pub max_payload: usize,
    pub metadata: Option<PathBuf>,
    pub max_metadata: usize,
    pub logger: LoggerConfig,
    pub metrics_path: Option<PathBuf>,
    pub seccomp: Seccomp,
    pub start_time_us: Option<u64>,
    pub start_time_cpu_us: Option<u64>,
    pub parent_cpu_time_us: Option<u64>,
}

/// Which system call filters to install.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seccomp {
    /// Those that Mayfly is built with.
    BuiltIn,
    /// Those in this file.
    File(PathBuf),
    /// None.
    Off,
}

/// Why a command line was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ArgsError {
    /// An unknown option or a stray word.
    #[error("Found argument '{0}' which wasn't expected, or isn't valid in this context.")]
    Unexpected(String),
    /// An option that takes a value has none.
    #[error("The argument '{0}' requires a value, but none was supplied.")]
    MissingValue(String),
    /// An option that takes no value has one.
    #[error("The argument '{0}' takes no value: leave out what follows it with '='.")]
    NeedlessValue(&'static str),
    /// An option of Firecracker's for what Mayfly has not.
    #[error(
        "The argument '{0}' is about snapshots, which this version of Mayfly does not have: leave it out."
    )]
    NoSnapshots(&'static str),
    /// An option was given twice.
    #[error("The argument '{0}' was provided more than once.")]
    Twice(&'static str),
    /// An option needs another one.
    #[error("Argument '{0}' required, but not found.")]
    Required(&'static str),
    /// Two options exclude each other.
    #[error("Argument '{0}' cannot be used together with argument '{1}'.")]
    Conflict(&'static str, &'static str),
    /// A value is not valid.
    #[error("The value '{value}' of argument '{argument}' is not valid: {expected}.")]
    Value {
        /// Which option.
        argument: &'static str,
        /// What was given.
        value: String,
        /// What it must be.
        expected: String,
    },
    /// The log level is none.
    #[error("{0}")]
    Level(String),
}

/// All options with a value, and all without.
const VALUED: [&str; 17] = [
    "api-sock",
    "check-config",
    "config-file",
    "id",
    "http-api-max-payload-size",
    "log-path",
    "level",
    "module",
    "metrics-path",
    "seccomp-filter",
    "compile-seccomp",
    "start-time-us",
    "start-time-cpu-us",
    "parent-cpu-time-us",
    "metadata",
    "mmds-size-limit",
    "describe-snapshot",
];
const FLAGS: [&str; 8] = [
    "no-api",
    "no-pci",
    "enable-pci",
    "boot-timer",
    "show-level",
    "show-log-origin",
    "no-seccomp",
    "snapshot-version",
];

/// The raw options: each at most once.
#[derive(Default)]
struct Options(Vec<(&'static str, Option<OsString>)>);

impl Options {
    fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(known, _)| *known == name)
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.0
            .iter()
            .find(|(known, _)| *known == name)?
            .1
            .clone()
            .map(PathBuf::from)
    }

    fn parsed<T: FromStr>(&self, name: &'static str, expected: &str) -> Result<Option<T>, ArgsError> {
        let Some(value) = self
            .0
            .iter()
            .find(|(known, _)| *known == name)
            .and_then(|(_, value)| value.as_ref())
        else {
            return Ok(None);
        };
        let invalid = || ArgsError::Value {
            argument: name,
            value: value.to_string_lossy().into_owned(),
            expected: expected.into(),
        };
        value
            .to_str()
            .and_then(|text| text.parse().ok())
            .map(Some)
            .ok_or_else(invalid)
    }
}

/// Parses the command line, without the program's own name.
pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Command, ArgsError> {
    let mut parser = lexopt::Parser::from_args(words);
    let mut options = Options::default();
    while let Some(word) = parser.next().map_err(|e| ArgsError::Unexpected(e.to_string()))? {
        let name = match word {
            Short('h') => return Ok(Command::Help),
            Short('V') => return Ok(Command::Version),
            Long("help") => return Ok(Command::Help),
            Long("version") => return Ok(Command::Version),
            Long(name) => name.to_owned(),
            Short(letter) => return Err(ArgsError::Unexpected(letter.to_string())),
            Value(value) => return Err(ArgsError::Unexpected(value.to_string_lossy().into_owned())),
        };
        let (name, value) = match VALUED.iter().find(|known| **known == name) {
            Some(known) => (*known, Some(value_of(&mut parser, known)?)),
            None => match FLAGS.iter().find(|known| **known == name) {
                Some(known) if parser.optional_value().is_none() => (*known, None),
                Some(known) => return Err(ArgsError::NeedlessValue(known)),
                None => return Err(ArgsError::Unexpected(name)),
            },
        };
        if options.has(name) {
            return Err(ArgsError::Twice(name));
        }
        options.0.push((name, value));
    }
    if let Some(path) = options.path("compile-seccomp") {
        return Ok(Command::CompileFilters(path));
    }
    let args = Box::new(Args::new(&options)?);
    Ok(match options.path("check-config") {
        Some(path) => Command::Check(path, args),
        None => Command::Run(args),
    })
}

/// A value, which may not look like an option unless it is joined by `=`.
fn value_of(parser: &mut lexopt::Parser, name: &str) -> Result<OsString, ArgsError> {
    if let Some(value) = parser.optional_value() {
        return Ok(value);
    }
    let missing = || ArgsError::MissingValue(name.to_owned());
    let mut rest = parser.try_raw_args().ok_or_else(missing)?;
    let value = rest.next_if(|word| !word.to_string_lossy().starts_with("--"));
    value.filter(|value| !value.is_empty()).ok_or_else(missing)
}

impl Args {
    fn new(options: &Options) -> Result<Self, ArgsError> {
        for name in ["describe-snapshot", "snapshot-version"] {
            if options.has(name) {
                return Err(ArgsError::NoSnapshots(name));
            }
        }
        let config_file = options.path("config-file");
        if options.has("check-config") && config_file.is_some() {
            return Err(ArgsError::Conflict("check-config", "config-file"));
        }
        if options.has("no-api") && config_file.is_none() {
            return Err(ArgsError::Required("config-file"));
        }
        if options.has("no-api") && options.has("api-sock") {
            return Err(ArgsError::Conflict("api-sock", "no-api"));
        }
        if options.has("no-pci") && options.has("enable-pci") {
            return Err(ArgsError::Conflict("no-pci", "enable-pci"));
        }
        let api_sock = options
            .path("api-sock")
            .unwrap_or_else(|| DEFAULT_API_SOCKET.into());
        let micros = "a count of microseconds";
        let bytes = "a count of bytes";
        let max_payload = options.parsed("http-api-max-payload-size", bytes)?;
        let max_payload = max_payload.unwrap_or(DEFAULT_PAYLOAD_SIZE);
        Ok(Self {
            api_sock: (!options.has("no-api")).then_some(api_sock),
            config_file,
            id: instance_id(options)?,
            pci: !options.has("no-pci"),
            boot_timer: options.has("boot-timer"),
            max_payload,
            metadata: options.path("metadata"),
            max_metadata: options.parsed("mmds-size-limit", bytes)?.unwrap_or(max_payload),
            logger: logger_config(options)?,
            metrics_path: options.path("metrics-path"),
            seccomp: seccomp(options)?,
            start_time_us: options.parsed("start-time-us", micros)?,
            start_time_cpu_us: options.parsed("start-time-cpu-us", micros)?,
            parent_cpu_time_us: options.parsed("parent-cpu-time-us", micros)?,
        })
    }
}

fn seccomp(options: &Options) -> Result<Seccomp, ArgsError> {
    match (options.path("seccomp-filter"), options.has("no-seccomp")) {
        (Some(_), true) => Err(ArgsError::Conflict("seccomp-filter", "no-seccomp")),
        (Some(path), false) => Ok(Seccomp::File(path)),
        (None, true) => Ok(Seccomp::Off),
        (None, false) => Ok(Seccomp::BuiltIn),
    }
}

fn instance_id(options: &Options) -> Result<String, ArgsError> {
    let expected = "1 to 64 letters, digits and '-'";
    let id = options
        .parsed::<String>("id", expected)?
        .unwrap_or_else(|| DEFAULT_ID.into());
    let valid = (1..=64).contains(&id.len()) && id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    let invalid = ArgsError::Value {
        argument: "id",
        value: id.clone(),
        expected: expected.into(),
    };
    if valid { Ok(id) } else { Err(invalid) }
}

fn logger_config(options: &Options) -> Result<LoggerConfig, ArgsError> {
    let level = options.parsed::<String>("level", "a log level")?;
    Ok(LoggerConfig {
        log_path: options.path("log-path"),
        level: level
            .map(|text| text.parse::<LogLevel>())
            .transpose()
            .map_err(ArgsError::Level)?,
        show_level: options.has("show-level").then_some(true),
        show_log_origin: options.has("show-log-origin").then_some(true),
        module: options.parsed("module", "the name of a module")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(words: &[&str]) -> Result<Command, ArgsError> {
        parse(words.iter().map(OsString::from))
    }

    fn args(words: &[&str]) -> Args {
        match run(words).unwrap() {
            Command::Run(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn has_the_documented_defaults() {
        let args = args(&[]);
        assert_eq!(args.api_sock, Some(DEFAULT_API_SOCKET.into()));
        assert_eq!(
            (args.id.as_str(), args.pci, args.max_payload, args.max_metadata),
            (DEFAULT_ID, true, 51_200, 51_200)
        );
    }

    #[test]
    fn takes_values_as_next_word_and_joined() {
        assert_eq!(args(&["--id", "a-1"]).id, "a-1");
        assert_eq!(args(&["--id=a-1"]).id, "a-1");
        assert_eq!(args(&["--api-sock=--odd"]).api_sock, Some("--odd".into()));
    }

    #[test]
    fn answers_help_and_version_in_both_forms() {
        assert_eq!(run(&["-h"]), Ok(Command::Help));
        assert_eq!(run(&["--help"]), Ok(Command::Help));
        assert_eq!(run(&["-V"]), Ok(Command::Version));
        assert_eq!(run(&["--version"]), Ok(Command::Version));
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        assert_eq!(run(&["--foo"]), Err(ArgsError::Unexpected("foo".into())));
        assert_eq!(run(&["foo"]), Err(ArgsError::Unexpected("foo".into())));
        assert_eq!(run(&["-x"]), Err(ArgsError::Unexpected("x".into())));
    }

    #[test]
    fn refuses_the_value_of_a_flag_and_what_is_about_snapshots() {
        for (words, message) in [
            (
                "--boot-timer=1",
                "The argument 'boot-timer' takes no value: leave out what follows it with '='.",
            ),
            (
                "--describe-snapshot=f",
                "The argument 'describe-snapshot' is about snapshots, which this version of Mayfly does not have: \
                 leave it out.",
            ),
        ] {
            assert_eq!(run(&[words]).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn refuses_a_missing_value_and_a_second_one() {
        assert_eq!(
            run(&["--api-sock"]),
            Err(ArgsError::MissingValue("api-sock".into()))
        );
        assert_eq!(
            run(&["--api-sock", "--no-pci"]),
            Err(ArgsError::MissingValue("api-sock".into()))
        );
        assert_eq!(run(&["--id=a", "--id=b"]), Err(ArgsError::Twice("id")));
        assert_eq!(run(&["--no-pci", "--no-pci"]), Err(ArgsError::Twice("no-pci")));
    }

    #[test]
    fn checks_a_config_file_for_the_options_beside() {
        match run(&["--check-config", "f", "--no-pci"]).unwrap() {
            Command::Check(path, args) => assert_eq!((path, args.pci), ("f".into(), false)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn installs_filters_unless_told_otherwise() {
        assert_eq!(args(&[]).seccomp, Seccomp::BuiltIn);
        assert_eq!(args(&["--no-seccomp"]).seccomp, Seccomp::Off);
        assert_eq!(
            args(&["--seccomp-filter", "f"]).seccomp,
            Seccomp::File("f".into())
        );
        assert_eq!(
            run(&["--compile-seccomp", "f"]),
            Ok(Command::CompileFilters("f".into()))
        );
    }

    #[test]
    fn refuses_contradictions() {
        assert_eq!(
            run(&["--check-config", "f", "--config-file", "g"]),
            Err(ArgsError::Conflict("check-config", "config-file"))
        );
        assert_eq!(run(&["--no-api"]), Err(ArgsError::Required("config-file")));
        assert_eq!(
            run(&["--no-seccomp", "--seccomp-filter", "x"]),
            Err(ArgsError::Conflict("seccomp-filter", "no-seccomp"))
        );
        assert_eq!(
            run(&["--no-pci", "--enable-pci"]),
            Err(ArgsError::Conflict("no-pci", "enable-pci"))
        );
    }

    #[test]
    fn refuses_invalid_values() {
        for words in [
            ["--id", "a_b"],
            ["--start-time-us", "x"],
            ["--http-api-max-payload-size", "-1"],
        ] {
            assert!(matches!(run(&words), Err(ArgsError::Value { .. })), "{words:?}");
        }
        let long = "a".repeat(65);
        assert!(matches!(run(&["--id", &long]), Err(ArgsError::Value { .. })));
        assert!(matches!(run(&["--level", "loud"]), Err(ArgsError::Level(_))));
    }
}

//! The command line of `mayfly-jailer`: words to [`Args`], which is checked in form only. What the values mean is found
//! out by [`crate::plan`].

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::Arg::{Long, Short, Value};

/// The text of `--help`.
pub const HELP: &str = "\
mayfly-jailer: starts mayfly in a jail. One jail is one VM.

Usage: mayfly-jailer --id ID [OPTIONS] [-- MAYFLY'S OPTIONS]   (both `--option value` and `--option=value` work)

  --id ID                     name of the VM, 1 to 64 letters, digits and '-'
  --exec-file PATH            the static program to start [mayfly beside this program]
  --uid UID, --gid GID        whom it runs as; root must say (see --import). For others: themselves, or ids that /etc/subuid
                              and /etc/subgid set aside for them [themselves]
  --chroot-base-dir PATH      jails are PATH/<name of the program>/ID [/srv/jailer; for others than root
                              $XDG_RUNTIME_DIR/mayfly-jailer]

  --config-file PATH          with --import: the VM's config. Without --uid, root runs the VM as the file's owner, or, if
                              that is root, as a user whose id is a hash of the VM's name
  --import                    mount what the config names into the jail, and give mayfly a config with the new paths
  --copy                      copy the program and what is imported instead of mounting it
  --device NAME               also give the jail /dev/NAME: vhost-net or userfaultfd; repeatable

  --cgroup FILE=VALUE         write VALUE to FILE of a new cgroup, like cpu.max=50000 100000; repeatable
  --cgroup-version 1|2        the hierarchy to use [2 where the host has only that, else 1]
  --parent-cgroup PATH        where the new cgroup is, relative to the hierarchy [name of the program]
  --resource-limit NAME=N     fsize (bytes of a file) or no-file (open files) [no-file=2048]; repeatable
  --netns PATH                join this network namespace
  --daemonize                 leave the terminal: a session of its own, /dev/null for standard streams
  --new-pid-ns                do not wait for mayfly (its PID namespace is always new)

  --cleanup                   remove what is left of the jail of a VM that has ended
  -h, --help                  show this text
  -V, --version               show the version
";

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Start a jail.
    Run(Box<Args>),
    /// Remove a dead one.
    Cleanup(Box<Args>),
    /// Print the help text.
    Help,
    /// Print the version.
    Version,
}

/// The options, as they were given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "HELP describes them")]
pub struct Args {
    pub id: String,
    pub exec_file: Option<PathBuf>,
    pub uid: Option<String>,
    pub gid: Option<String>,
    pub chroot_base_dir: Option<PathBuf>,
    pub config_file: Option<PathBuf>,
    pub import: bool,
    pub copy: bool,
    pub devices: Vec<String>,
    pub cgroups: Vec<String>,
    pub cgroup_version: Option<String>,
    pub parent_cgroup: Option<PathBuf>,
    pub resource_limits: Vec<String>,
    pub netns: Option<PathBuf>,
    pub daemonize: bool,
    pub new_pid_ns: bool,
    /// What follows `--`.
    pub extra: Vec<OsString>,
}

/// Why a command line was refused; the wording is what tooling for jailers of this kind knows.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ArgsError {
    /// An unknown option or a stray word.
    #[error("Found argument '{0}' which wasn't expected, or isn't valid in this context.")]
    Unexpected(String),
    /// An option that takes a value has none.
    #[error("The argument '{0}' requires a value, but none was supplied.")]
    MissingValue(&'static str),
    /// An option was given twice.
    #[error("The argument '{0}' was provided more than once.")]
    Twice(&'static str),
    /// An option is needed.
    #[error("Argument '{0}' required, but not found.")]
    Required(&'static str),
    /// Two options exclude each other.
    #[error("Argument '{0}' cannot be used together with argument '{1}'.")]
    Conflict(&'static str, &'static str),
    /// A value is not UTF-8.
    #[error("The value of argument '{0}' is not valid: it must be UTF-8.")]
    Encoding(&'static str),
}

const VALUED: [&str; 12] = [
    "id",
    "exec-file",
    "uid",
    "gid",
    "chroot-base-dir",
    "config-file",
    "device",
    "cgroup",
    "cgroup-version",
    "parent-cgroup",
    "resource-limit",
    "netns",
];
const REPEATABLE: [&str; 3] = ["cgroup", "device", "resource-limit"];
const FLAGS: [&str; 5] = ["import", "copy", "daemonize", "new-pid-ns", "cleanup"];

/// The options in the order given.
#[derive(Default)]
struct Options(Vec<(&'static str, OsString)>);

impl Options {
    fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(known, _)| *known == name)
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        let found = self.0.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| value.into())
    }

    fn texts(&self, name: &'static str) -> Result<Vec<String>, ArgsError> {
        let found = self.0.iter().filter(|(known, _)| *known == name);
        found
            .map(|(_, value)| {
                let text = value.to_str().ok_or(ArgsError::Encoding(name))?;
                Ok(text.to_owned())
            })
            .collect()
    }

    fn text(&self, name: &'static str) -> Result<Option<String>, ArgsError> {
        Ok(self.texts(name)?.pop())
    }
}

/// Parses the command line, without the program's own name.
pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Command, ArgsError> {
    let mut words: Vec<OsString> = words.into_iter().collect();
    let mut extra = Vec::new();
    if let Some(end) = words.iter().position(|word| word == "--") {
        extra = words.split_off(end);
        extra.remove(0);
    }
    let mut parser = lexopt::Parser::from_args(words);
    let mut options = Options::default();
    while let Some(word) = parser.next().map_err(|e| ArgsError::Unexpected(e.to_string()))? {
        let name = match word {
            Short('h') | Long("help") => return Ok(Command::Help),
            Short('V') | Long("version") => return Ok(Command::Version),
            Long(name) => name.to_owned(),
            Short(letter) => return Err(ArgsError::Unexpected(letter.to_string())),
            Value(value) => return Err(ArgsError::Unexpected(value.to_string_lossy().into_owned())),
        };
        let (name, value) = option(&mut parser, &name)?;
        if options.has(name) && !REPEATABLE.contains(&name) {
            return Err(ArgsError::Twice(name));
        }
        options.0.push((name, value));
    }
    command(&options, extra)
}

/// An option by its name, and its value, which is empty for those that take none.
fn option(parser: &mut lexopt::Parser, name: &str) -> Result<(&'static str, OsString), ArgsError> {
    if let Some(known) = VALUED.iter().find(|known| **known == name) {
        return Ok((known, value_of(parser, known)?));
    }
    match FLAGS.iter().find(|known| **known == name) {
        Some(known) if parser.optional_value().is_none() => Ok((known, OsString::new())),
        _ => Err(ArgsError::Unexpected(name.to_owned())),
    }
}

/// A value, which may not look like an option unless it is joined by `=`.
fn value_of(parser: &mut lexopt::Parser, name: &'static str) -> Result<OsString, ArgsError> {
    if let Some(value) = parser.optional_value() {
        return Ok(value);
    }
    let missing = || ArgsError::MissingValue(name);
    let mut rest = parser.try_raw_args().ok_or_else(missing)?;
    rest.next_if(|word| !word.as_encoded_bytes().starts_with(b"--"))
        .ok_or_else(missing)
}

fn command(options: &Options, extra: Vec<OsString>) -> Result<Command, ArgsError> {
    let args = Box::new(Args {
        id: options.text("id")?.ok_or(ArgsError::Required("id"))?,
        exec_file: options.path("exec-file"),
        uid: options.text("uid")?,
        gid: options.text("gid")?,
        chroot_base_dir: options.path("chroot-base-dir"),
        config_file: options.path("config-file"),
        import: options.has("import"),
        copy: options.has("copy"),
        devices: options.texts("device")?,
        cgroups: options.texts("cgroup")?,
        cgroup_version: options.text("cgroup-version")?,
        parent_cgroup: options.path("parent-cgroup"),
        resource_limits: options.texts("resource-limit")?,
        netns: options.path("netns"),
        daemonize: options.has("daemonize"),
        new_pid_ns: options.has("new-pid-ns"),
        extra,
    });
    if options.has("cleanup") {
        let other = ["import", "daemonize", "new-pid-ns"];
        return match other.into_iter().find(|name| options.has(name)) {
            Some(name) => Err(ArgsError::Conflict("cleanup", name)),
            None => Ok(Command::Cleanup(args)),
        };
    }
    match (args.import, &args.config_file) {
        (true, None) => Err(ArgsError::Required("config-file")),
        (false, Some(_)) => Err(ArgsError::Required("import")),
        _ => Ok(Command::Run(args)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(words: &[&str]) -> Result<Command, ArgsError> {
        parse(words.iter().map(OsString::from))
    }

    fn args(words: &[&str]) -> Args {
        match run(words) {
            Ok(Command::Run(args)) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn takes_values_as_next_word_and_joined() {
        assert_eq!(args(&["--id", "a", "--uid=5"]), args(&["--id=a", "--uid", "5"]));
        assert_eq!(args(&["--id=a", "--netns=--odd"]).netns, Some("--odd".into()));
        assert_eq!(
            args(&["--id=a", "--cgroup", "cpu.max=1 2"]).cgroups,
            ["cpu.max=1 2"]
        );
    }

    #[test]
    fn leaves_what_follows_two_dashes_alone() {
        let args = args(&["--id", "a", "--", "--id", "b", "--", "-V"]);
        assert_eq!(args.extra, ["--id", "b", "--", "-V"]);
        assert_eq!(args.id, "a");
    }

    #[test]
    fn answers_help_and_version_in_both_forms() {
        assert_eq!(run(&["-h"]), Ok(Command::Help));
        assert_eq!(run(&["--help"]), Ok(Command::Help));
        assert_eq!(run(&["-V"]), Ok(Command::Version));
        assert_eq!(run(&["--id=a", "--version"]), Ok(Command::Version));
    }

    #[test]
    fn help_names_every_option() {
        let options = VALUED.iter().chain(&FLAGS);
        let missing: Vec<_> = options
            .filter(|name| !HELP.contains(&format!("--{name}")))
            .collect();
        assert!(missing.is_empty(), "{missing:?}");
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        assert_eq!(run(&["--foo"]), Err(ArgsError::Unexpected("foo".into())));
        assert_eq!(run(&["foo"]), Err(ArgsError::Unexpected("foo".into())));
        assert_eq!(run(&["-x"]), Err(ArgsError::Unexpected("x".into())));
        assert_eq!(
            run(&["--daemonize=1"]),
            Err(ArgsError::Unexpected("daemonize".into()))
        );
    }

    #[test]
    fn refuses_a_missing_value_and_a_second_one() {
        assert_eq!(run(&["--id"]), Err(ArgsError::MissingValue("id")));
        assert_eq!(run(&["--id", "--uid"]), Err(ArgsError::MissingValue("id")));
        assert_eq!(run(&["--id=a", "--id=b"]), Err(ArgsError::Twice("id")));
        assert_eq!(
            run(&["--id=a", "--copy", "--copy"]),
            Err(ArgsError::Twice("copy"))
        );
    }

    #[test]
    fn takes_repeatable_options_in_their_order() {
        let args = args(&[
            "--id=a",
            "--resource-limit=no-file=9",
            "--resource-limit",
            "fsize=1",
        ]);
        assert_eq!(args.resource_limits, ["no-file=9", "fsize=1"]);
    }

    #[test]
    fn refuses_contradictions() {
        assert_eq!(run(&[]), Err(ArgsError::Required("id")));
        assert_eq!(
            run(&["--id=a", "--import"]),
            Err(ArgsError::Required("config-file"))
        );
        assert_eq!(
            run(&["--id=a", "--config-file=c"]),
            Err(ArgsError::Required("import"))
        );
        assert_eq!(
            run(&["--id=a", "--cleanup", "--daemonize"]),
            Err(ArgsError::Conflict("cleanup", "daemonize"))
        );
    }
}

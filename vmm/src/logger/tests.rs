use log::Level;
use vmm_sys_util::tempdir::TempDir;

use super::limit::BURST;
use super::*;
use crate::config::LogLevel;

/// A logger that writes to a file.
struct Logged {
    logger: Logger,
    folder: TempDir,
}

fn logged(config: LoggerConfig) -> Logged {
    let folder = TempDir::new().unwrap();
    let logger = Logger::new();
    logger.change(|settings| settings.id = "vm-1".into());
    let log_path = Some(folder.as_path().join("log"));
    logger.configure(&LoggerConfig { log_path, ..config }).unwrap();
    Logged { logger, folder }
}

impl Logged {
    fn log(&self, target: &str, module: &str, message: &str) {
        self.logger.log(
            &Record::builder()
                .level(Level::Warn)
                .target(target)
                .module_path(Some(module))
                .file(Some("vmm/src/a.rs"))
                .line(Some(7))
                .args(format_args!("{message}"))
                .build(),
        );
    }

    /// The lines without their times.
    fn lines(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.folder.as_path().join("log")).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'));
        text.lines()
            .map(|line| line.split_once(' ').unwrap().1.to_owned())
            .collect()
    }
}

/// On a thread of its own, whose name lines show.
fn on_thread(name: &str, work: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name(name.into());
        builder.spawn_scoped(scope, work).unwrap().join().unwrap();
    });
}

#[test]
fn a_line_has_instance_thread_and_message() {
    let logged = logged(LoggerConfig::default());
    on_thread("io 0", || logged.log("vmm::a", "vmm::a", "hello"));
    assert_eq!(logged.lines(), ["[vm-1:io 0] hello"]);
}

#[test]
fn a_line_has_level_and_origin_when_asked_for() {
    let logged = logged(LoggerConfig {
        show_level: Some(true),
        show_log_origin: Some(true),
        ..LoggerConfig::default()
    });
    on_thread("api", || logged.log("vmm::a", "vmm::a", "hello"));
    assert_eq!(logged.lines(), ["[vm-1:api:WARN:vmm/src/a.rs:7] hello"]);
}

#[test]
fn a_message_stays_one_line() {
    let logged = logged(LoggerConfig::default());
    on_thread("api", || logged.log("vmm", "vmm", "a\n2026 [x] forged"));
    assert_eq!(logged.lines(), ["[vm-1:api] a\\n2026 [x] forged"]);
}

#[test]
fn a_module_is_chosen_by_its_path() {
    let logged = logged(LoggerConfig {
        module: Some("vmm::api".into()),
        ..LoggerConfig::default()
    });
    on_thread("api", || {
        logged.log("vmm::api::call", "vmm::api::call", "yes");
        logged.log("vmm::vm", "vmm::vm", "no");
        logged.log(FATAL, "vmm::api", "fatal");
    });
    assert_eq!(logged.lines(), ["[vm-1:api] yes", "[vm-1:api] fatal"]);
}

#[test]
fn a_config_without_a_level_means_info() {
    let logged = logged(LoggerConfig {
        level: Some(LogLevel(LevelFilter::Trace)),
        ..LoggerConfig::default()
    });
    logged.logger.configure(&LoggerConfig::default()).unwrap();
    assert_eq!(log::max_level(), LevelFilter::Info);
}

#[test]
fn a_config_that_cannot_be_applied_changes_nothing() {
    let logged = logged(LoggerConfig::default());
    let bad = LoggerConfig {
        log_path: Some("/nonexistent/log".into()),
        show_level: Some(true),
        ..LoggerConfig::default()
    };
    assert!(logged.logger.configure(&bad).is_err());
    on_thread("api", || logged.log("vmm", "vmm", "hello"));
    assert_eq!(logged.lines(), ["[vm-1:api] hello"]);
}

#[test]
fn a_guest_cannot_flood_the_log() {
    let logged = logged(LoggerConfig::default());
    on_thread("vcpu 0", || {
        limit_this_thread();
        (0..100).for_each(|_| logged.log("vmm", "vmm", "again"));
        logged.log(FATAL, "vmm", "the end");
    });
    let lines = logged.lines();
    assert_eq!(lines.len(), BURST as usize + 1);
    assert_eq!(lines.last().unwrap(), "[vm-1:vcpu 0] the end");
    assert_eq!(logged.logger.rate_limited(), 90);
}

#[test]
fn the_operator_is_not_limited() {
    let logged = logged(LoggerConfig::default());
    (0..100).for_each(|_| logged.log("vmm", "vmm", "again"));
    assert_eq!((logged.lines().len(), logged.logger.rate_limited()), (100, 0));
}

#[test]
fn lines_of_many_threads_stay_whole_whatever_their_length() {
    let logged = logged(LoggerConfig::default());
    let long = "x".repeat(3000);
    std::thread::scope(|scope| {
        for message in ["short", &long, "other", &long] {
            scope.spawn(|| (0..50).for_each(|_| logged.log("vmm", "vmm", message)));
        }
    });
    let lines = logged.lines();
    let whole = |line: &&String| {
        ["short", "other", long.as_str()]
            .iter()
            .any(|m| line.ends_with(&format!("] {m}")))
    };
    assert_eq!((lines.len(), lines.iter().filter(whole).count()), (200, 200));
}

#[test]
fn a_line_that_cannot_be_written_is_counted() {
    let logger = Logger::new();
    let config = LoggerConfig {
        log_path: Some("/dev/full".into()),
        ..LoggerConfig::default()
    };
    logger.configure(&config).unwrap();
    let record = Record::builder().args(format_args!("lost")).build();
    logger.log(&record);
    assert_eq!(logger.missed(), 1);
}

#[test]
fn tells_whether_a_file_could_be_opened_and_makes_none() {
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().join("log");
    check_sink(&path).unwrap();
    assert!(!path.exists());
    std::fs::write(&path, "").unwrap();
    check_sink(&path).unwrap();
    let refused = |path: &Path| check_sink(path).unwrap_err().raw_os_error();
    assert_eq!(refused(folder.as_path()), Some(libc::EISDIR));
    assert_eq!(refused(&folder.as_path().join("no/log")), Some(libc::ENOENT));
    assert_eq!(refused(&path.join("log")), Some(libc::ENOTDIR));
}

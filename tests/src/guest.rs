//! A booted Linux guest: commands go to its agent over the serial console.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::agent::{Collector, Line, Progress, run_line};
use crate::devices::TOOLS;
use crate::{Failure, GUEST_TIMEOUT, Monitor, Result};

/// How long the rest of an answer may take after its beginning before it is asked for again.
const QUIET: Duration = Duration::from_secs(20);
/// How often an answer is asked for again.
const RETRIES: u32 = 4;

/// How far the console was read, and how many scripts were run.
#[derive(Debug, Default)]
pub(crate) struct Dialogue {
    position: usize,
    scripts: u32,
}

/// What a script did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit code.
    pub code: i32,
    /// What it wrote to its standard output and standard error, in order.
    pub stdout: String,
}

/// A view of the guest of a machine.
#[derive(Debug, Clone, Copy)]
pub struct Guest<'a> {
    monitor: &'a Monitor,
    dialogue: &'a Mutex<Dialogue>,
}

impl<'a> Guest<'a> {
    pub(crate) fn new(monitor: &'a Monitor, dialogue: &'a Mutex<Dialogue>) -> Self {
        Self { monitor, dialogue }
    }

    /// Runs a script by the guest's shell, and returns what it did.
    pub fn run(&self, script: &str) -> Result<Output> {
        let mut dialogue = self.lock();
        dialogue.scripts += 1;
        let id = dialogue.scripts.to_string();
        self.monitor.type_in(run_line(&id, script).as_bytes())?;
        let answer = self.collect(&mut dialogue, &id);
        answer.map_err(|failure| {
            self.monitor
                .failure(&format!("in the guest, `{script}`: {failure}"))
        })
    }

    /// Runs a script that must succeed, and returns its output without the white space around it.
    pub fn check(&self, script: &str) -> Result<String> {
        let output = self.run(script)?;
        if output.code == 0 {
            return Ok(output.stdout.trim().to_owned());
        }
        let Output { code, stdout } = output;
        Err(self.monitor.failure(&format!(
            "in the guest, `{script}` ended with {code} and said: {stdout}"
        )))
    }

    /// Waits for the disk with this serial number, which is its drive's id, and returns its name.
    pub fn disk(&self, serial: &str) -> Result<String> {
        let path = self.check(&format!(
            "n=0; until grep -lsx {serial} /sys/block/*/serial; do n=$((n + 1)); [ $n -lt 300 ] || exit 1; sleep 0.1; done"
        ))?;
        path.split('/')
            .nth(3)
            .map(str::to_owned)
            .ok_or_else(|| Failure::new(format!("no disk {serial} but {path:?}")))
    }

    /// The feature bits that driver and device have agreed on; the device has this path.
    pub fn features(&self, device: &str) -> Result<Vec<usize>> {
        let bits = self.check(&format!("cat {device}/features"))?;
        Ok(bits.match_indices('1').map(|(bit, _)| bit).collect())
    }

    /// Makes the programs of [`Drive::tools`](crate::Drive::tools) available in `/tools`.
    pub fn mount_tools(&self) -> Result {
        let disk = self.disk(TOOLS)?;
        self.check(&format!("mkdir /tools && mount -t ext4 -o ro /dev/{disk} /tools"))
            .map(drop)
    }

    /// The guest's kernel has met no error of a disk, and no stop.
    pub fn assert_no_complaints(&self) -> Result {
        let complaints = self.run("dmesg | grep -E 'I/O error|EXT4-fs error|stall|lockup|BUG:'")?;
        assert_eq!(complaints.stdout, "");
        Ok(())
    }

    /// Runs a script that ends the machine, so that no answer is awaited.
    pub fn run_last(&self, script: &str) -> Result {
        self.monitor.type_in(run_line("last", script).as_bytes())
    }

    /// Waits until the agent is there.
    pub(crate) fn wait_ready(&self) -> Result {
        let deadline = Instant::now() + GUEST_TIMEOUT;
        let mut dialogue = self.lock();
        while let Some(line) = self.monitor.console().next_line(&mut dialogue.position, deadline) {
            if Line::parse(&line) == Line::Ready {
                return Ok(());
            }
        }
        Err(self.monitor.failure("the guest did not boot"))
    }

    fn collect(&self, dialogue: &mut Dialogue, id: &str) -> Result<Output> {
        let mut collector = Collector::new(id);
        let mut retries = 0;
        let deadline = Instant::now() + GUEST_TIMEOUT;
        loop {
            let quiet = if collector.has_begun() {
                deadline.min(Instant::now() + QUIET)
            } else {
                deadline
            };
            let progress = match self.monitor.console().next_line(&mut dialogue.position, quiet) {
                Some(line) => collector.take(Line::parse(&line)),
                None if collector.has_begun() && Instant::now() < deadline => Progress::Damaged,
                None => return Err(Failure::new(format!("no answer in {GUEST_TIMEOUT:?}"))),
            };
            match progress {
                Progress::Pending => {}
                Progress::Complete(code, output) => {
                    return Ok(Output {
                        code,
                        stdout: String::from_utf8_lossy(&output).into_owned(),
                    });
                }
                Progress::Damaged if retries < RETRIES => {
                    retries += 1;
                    collector = Collector::new(id);
                    self.monitor.type_in(format!("AGAIN {id}\n").as_bytes())?;
                }
                Progress::Damaged => return Err(Failure::new("the answer came damaged again and again")),
                Progress::Failed(why) => return Err(Failure::new(why)),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'a, Dialogue> {
        self.dialogue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

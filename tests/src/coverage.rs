//! Holds traced system calls against the filters: a trace is what `strace -f -n -Y -X raw -e raw=all` writes.

use std::collections::{BTreeMap, BTreeSet};

use vmm::seccomp::compiler::{self, Call, Rule, Source};

/// A thread has its own filter from this call on; by then it has its name. Until then it has that of the control thread.
const SECCOMP: u32 = 317;

/// What traces have shown so far.
pub struct Coverage<'a> {
    source: &'a Source,
    /// The first thread of the trace.
    control: u32,
    /// Threads of the trace that have installed their filter.
    confined: BTreeSet<u32>,
    calls: u64,
    /// Rules that a call needed, by address.
    used: BTreeSet<*const Rule>,
    refused: BTreeMap<String, u64>,
}

impl<'a> Coverage<'a> {
    /// Nothing yet, of these filters.
    pub fn new(source: &'a Source) -> Self {
        Self {
            source,
            control: 0,
            confined: BTreeSet::new(),
            calls: 0,
            used: BTreeSet::new(),
            refused: BTreeMap::new(),
        }
    }

    /// Takes in a trace: one process.
    pub fn trace(&mut self, text: &str) {
        self.confined.clear();
        self.control = 0;
        text.lines().for_each(|line| self.read(line));
    }

    /// Takes in a line: `PID<THREAD> [NUMBER] NAME(ARGUMENTS) = RESULT`. Ends of interrupted calls have no number.
    fn read(&mut self, line: &str) {
        let Some(traced) = Traced::parse(line) else { return };
        if self.control == 0 {
            self.control = traced.id;
        }
        let kind = match self.confined.contains(&traced.id) {
            true => traced.kind,
            false if self.confined.contains(&self.control) => "control",
            false => {
                self.note_filter(&traced);
                return;
            }
        };
        self.note_filter(&traced);
        self.calls += 1;
        let rules = self.source.rules(kind);
        let mut matching = rules
            .map(|(_, rule)| rule)
            .filter(|rule| rule.matches(&traced.call))
            .peekable();
        if matching.peek().is_none() {
            *self.refused.entry(traced.shown(kind)).or_default() += 1;
        }
        // An io thread may be without a group, so that the next one with such a rule is needed.
        let needed = if kind == "io" { usize::MAX } else { 1 };
        self.used.extend(matching.take(needed).map(std::ptr::from_ref));
    }

    fn note_filter(&mut self, traced: &Traced<'_>) {
        if traced.call.number == SECCOMP {
            self.confined.insert(traced.id);
        }
    }

    /// Prints what was found; false when a filter has refused something and, with `all_used`, when there are rules that no
    /// call needed and that do not say that they are rare.
    pub fn report(&self, all_used: bool) -> bool {
        let mut rules = 0;
        let mut unused = Vec::new();
        for (group, rule) in self.source.groups.iter().flat_map(|(group, rules)| {
            let group = group.as_str();
            rules.iter().map(move |rule| (group, rule))
        }) {
            rules += 1;
            let name = compiler::name(rule.syscall.0).unwrap_or("?");
            let comments: Vec<_> = rule.args.iter().filter_map(|c| c.comment.as_deref()).collect();
            match (self.used.contains(&std::ptr::from_ref(rule)), &rule.rare) {
                (false, None) => unused.push(format!("{group}: {name} {}", comments.join(", "))),
                (true, Some(_)) => println!("used although it is said to be rare: {group}: {name}"),
                _ => {}
            }
        }
        println!(
            "{} calls of filtered threads, {} of {rules} rules used",
            self.calls,
            self.used.len()
        );
        for (call, count) in &self.refused {
            println!("not allowed ({count} times): {call}");
        }
        for rule in &unused {
            println!("nothing used: {rule}");
        }
        self.calls > 0 && self.refused.is_empty() && (unused.is_empty() || !all_used)
    }
}

/// A system call of a trace.
struct Traced<'a> {
    id: u32,
    kind: &'static str,
    name: &'a str,
    call: Call,
}

impl<'a> Traced<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (id, rest) = line.split_once('<')?;
        let (thread, rest) = rest.split_once("> [")?;
        let (number, rest) = rest.split_once(']')?;
        let (name, rest) = rest.trim_start().split_once('(')?;
        let end = rest.find([')', '<']).unwrap_or(rest.len());
        let mut args = [0; 6];
        for (arg, text) in args.iter_mut().zip(rest[..end].split(", ")) {
            *arg = value(text.trim())?;
        }
        Some(Self {
            id: id.trim().parse().ok()?,
            kind: kind(thread),
            name,
            call: Call {
                number: number.trim().parse().ok()?,
                args,
                pid: own_pid(name, &args),
            },
        })
    }

    fn shown(&self, kind: &str) -> String {
        let [a, b, c, d, ..] = self.call.args;
        // Addresses and descriptors differ from call to call.
        let shown = [a, b, c, d].map(|arg| {
            if arg > 0xffff_ffff {
                "..".into()
            } else {
                format!("{arg:#x}")
            }
        });
        format!("{kind} {}({})", self.name, shown.join(", "))
    }
}

/// A monitor signals nobody else; a trace in a container has other numbers than the process itself sees.
fn own_pid(name: &str, args: &[u64; 6]) -> u32 {
    if name == "tgkill" {
        u32::try_from(args[0]).unwrap_or(0)
    } else {
        0
    }
}

/// The kind of a thread by its name; the first thread has that of the program.
fn kind(thread: &str) -> &'static str {
    match thread.split(' ').next() {
        Some("api") => "api",
        Some("io") => "io",
        Some("vcpu") => "vcpu",
        Some("flush") => "flush",
        _ => "control",
    }
}

fn value(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None if text.is_empty() => Some(0),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILTERS: &str = r#"{
        "threads": {"control": ["g"], "api": [], "io": ["g"], "vcpu": [], "flush": []},
        "groups": {"g": [
            {"syscall": "read"},
            {"syscall": "seccomp"},
            {"syscall": "ioctl", "args": [{"index": 1, "val": "0xae80"}]}
        ]}
    }"#;

    fn covered(lines: &[&str]) -> (u64, usize, Vec<String>, bool) {
        let source = compiler::parse(FILTERS.as_bytes()).unwrap();
        let mut coverage = Coverage::new(&source);
        coverage.trace(&lines.join("\n"));
        let refused = coverage.refused.keys().cloned().collect();
        (
            coverage.calls,
            coverage.used.len(),
            refused,
            coverage.report(true),
        )
    }

    #[test]
    fn counts_what_a_thread_calls_after_its_filter() {
        let lines = [
            "7<mayfly> [  59] execve(0x7ffd0, 0x1, 0) = 0",
            "7<mayfly> [ 317] seccomp(0x1, 0, 0x7f) = 0",
            "9<mayfly> [  16] ioctl(0x3, 0xae80, 0) = 0",
            "9<io 0> [ 317] seccomp(0x1, 0, 0x7f) = 0",
            "9<io 0> [   0] read(0x3, 0x7f, 0x8 <unfinished ...>",
            "9<io 0> <... read resumed>) = 0x8",
            "9<io 0> [  16] ioctl(0x3, 0xae80, 0) = 0",
        ];
        assert_eq!(covered(&lines), (4, 3, vec![], true));
    }

    #[test]
    fn finds_calls_outside_and_rules_that_nothing_uses() {
        let lines = [
            "9<io 0> [ 317] seccomp(0x1, 0, 0x7f) = 0",
            "9<io 0> [  16] ioctl(0x3, 0xae01, 0x7f00112233) = 0",
            "9<io 0> [  0] read(0x3, 0x7f, 0x8) = 0x8",
        ];
        let refused = vec!["io ioctl(0x3, 0xae01, .., 0x0)".to_owned()];
        assert_eq!(covered(&lines), (2, 1, refused, false));
    }

    #[test]
    fn nothing_traced_is_no_success() {
        assert_eq!(covered(&[]), (0, 0, vec![], false));
    }
}

//! The text form of filters: JSON that names threads, groups of rules, and rules.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer, de};

use super::names;

/// Filters for all kinds of threads.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// What happens at a system call that no rule allows.
    #[serde(default)]
    pub mismatch_action: Mismatch,
    /// The groups that each kind of thread has, in the order in which they are tried.
    pub threads: BTreeMap<String, Vec<String>>,
    /// Rules by group.
    pub groups: BTreeMap<String, Vec<Rule>>,
}

/// What happens at a system call that no rule allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mismatch {
    /// The process ends in order, and says which call it was.
    #[default]
    Trap,
    /// The kernel writes the call to its audit log and carries it out.
    Log,
    /// The kernel ends the process at once.
    KillProcess,
}

/// Allows a system call, when all conditions hold.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Which one.
    pub syscall: Syscall,
    /// Conditions on its arguments; without any every call is meant.
    #[serde(default)]
    pub args: Vec<Condition>,
    /// Fail with this number instead, without carrying the call out.
    pub errno: Option<u16>,
    /// Why no test makes this call.
    pub rare: Option<String>,
    /// For readers.
    pub comment: Option<String>,
}

/// A system call by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Syscall(pub u32);

/// A condition on one argument.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Condition {
    /// Which argument, from 0.
    pub index: u8,
    /// How much of it the kernel looks at.
    #[serde(default, rename = "type")]
    pub width: Width,
    /// How it is compared.
    #[serde(default)]
    pub op: Op,
    /// With what.
    pub val: Value,
    /// For readers.
    pub comment: Option<String>,
}

/// The size of an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Width {
    /// The low 32 bits.
    #[default]
    Dword,
    /// All 64 bits.
    Qword,
}

/// A comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// Equal to the value.
    #[default]
    Eq,
    /// Equal to the value in the bits of this mask.
    MaskedEq(u64),
}

/// What an argument is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value {
    /// A number; in the text also a string like `"0xae80"`.
    Number(u64),
    /// `"pid"`: the number of the process itself, known when the filter is installed.
    OwnPid,
}

impl<'de> Deserialize<'de> for Syscall {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        let number = names::number(&name);
        let number = number.ok_or_else(|| de::Error::custom(format!("x86_64 has no system call '{name}'")));
        number.map(Self)
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number, a string of one in hexadecimal like \"0xae80\", or \"pid\"")
            }

            fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
                Ok(Value::Number(number))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Value, E> {
                if text == "pid" {
                    return Ok(Value::OwnPid);
                }
                let digits = text.strip_prefix("0x");
                let number = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
                let unexpected = || E::invalid_value(de::Unexpected::Str(text), &self);
                number.map(Value::Number).ok_or_else(unexpected)
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

/// A system call as a filter sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Its number.
    pub number: u32,
    /// Its arguments.
    pub args: [u64; 6],
    /// The process that makes it.
    pub pid: u32,
}

impl Rule {
    /// Whether this rule is about the call.
    pub fn matches(&self, call: &Call) -> bool {
        self.syscall.0 == call.number && self.args.iter().all(|condition| condition.holds(call))
    }
}

impl Condition {
    fn holds(&self, call: &Call) -> bool {
        let value = match self.val {
            Value::Number(number) => number,
            Value::OwnPid => call.pid.into(),
        };
        let mask = match self.op {
            Op::Eq => u64::MAX,
            Op::MaskedEq(mask) => mask,
        };
        let mask = match self.width {
            Width::Dword => mask & u64::from(u32::MAX),
            Width::Qword => mask,
        };
        let argument = call.args.get(usize::from(self.index)).copied().unwrap_or(0);
        argument & mask == value & mask
    }
}

impl Source {
    /// The rules of a kind of thread, with their groups, in the order in which they are tried.
    pub fn rules<'a>(&'a self, thread: &str) -> impl Iterator<Item = (&'a str, &'a Rule)> {
        let groups = self.threads.get(thread).map_or(&[][..], Vec::as_slice);
        groups.iter().flat_map(|group| {
            let rules = self.groups.get(group).map_or(&[][..], Vec::as_slice);
            rules.iter().map(|rule| (group.as_str(), rule))
        })
    }
}

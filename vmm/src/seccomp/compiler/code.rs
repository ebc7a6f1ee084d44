//! Rules to classic BPF.
//!
//! A program is the code of a thread's groups, one after the other, between a head and a tail. Each group begins by
//! loading the number of the system call, ends by falling through to the next one, and returns when one of its rules
//! allows the call. Rules are tried in the order in which they are written: put those of hot paths first. (For system
//! calls that are allowed without conditions Linux 5.11 and later keeps a bitmap and runs no program at all.)

use super::rules::{Op, Rule, Syscall, Value, Width};

/// An instruction: `struct sock_filter` of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// The operation.
    pub code: u16,
    /// Instructions to skip when a comparison holds.
    pub jt: u8,
    /// Instructions to skip when it does not.
    pub jf: u8,
    /// The operand.
    pub k: u32,
}

/// `BPF_LD | BPF_W | BPF_ABS`: loads 32 bits of `struct seccomp_data`.
pub(super) const LOAD: u16 = 0x20;
/// `BPF_ALU | BPF_AND | BPF_K`.
pub(super) const AND: u16 = 0x54;
/// `BPF_JMP | BPF_JA`.
pub(super) const JUMP: u16 = 0x05;
/// `BPF_JMP | BPF_JEQ | BPF_K`.
pub(super) const JUMP_EQUAL: u16 = 0x15;
/// `BPF_RET | BPF_K`.
pub(super) const RETURN: u16 = 0x06;

/// Places in `struct seccomp_data`.
pub(super) const NUMBER: u32 = 0;
pub(super) const ARCH: u32 = 4;
pub(super) const ARGS: u32 = 16;

/// `AUDIT_ARCH_X86_64`.
pub(super) const X86_64: u32 = 0xc000_003e;

/// `SECCOMP_RET_*`.
pub(super) const ALLOW: u32 = 0x7fff_0000;
pub(super) const TRAP: u32 = 0x0003_0000;
pub(super) const LOG: u32 = 0x7ffc_0000;
pub(super) const KILL_PROCESS: u32 = 0x8000_0000;
pub(super) const ERRNO: u32 = 0x0005_0000;

/// The code of a group.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Fragment {
    /// Its instructions.
    pub code: Vec<Instruction>,
    /// Which of them compare with the number of the process.
    pub pid_places: Vec<u16>,
}

/// Why rules have no code.
#[derive(Debug, thiserror::Error)]
pub enum CodeError {
    /// A system call has six arguments.
    #[error("argument {0} does not exist: a system call has those from 0 to 5")]
    Argument(u8),
    /// The kernel takes 4096 instructions.
    #[error("there are too many rules for one group")]
    TooLong,
    /// The number of the process is put in when the filter is installed, as a whole.
    #[error("\"pid\" can only be compared by \"eq\"")]
    MaskedPid,
    /// A rule behind one without conditions is never reached.
    #[error("rule {0} cannot be reached: an earlier one has no conditions")]
    Unreachable(usize),
}

pub(super) fn statement(code: u16, k: u32) -> Instruction {
    Instruction {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

/// Translates the rules of a group. Those of one system call are tried together, at the place of the first.
pub(super) fn compile(rules: &[Rule]) -> Result<Fragment, CodeError> {
    let mut fragment = Fragment::default();
    let mut exits = Vec::new();
    fragment.code.push(statement(LOAD, NUMBER));
    for (index, rule) in rules.iter().enumerate() {
        if rules[..index]
            .iter()
            .any(|earlier| earlier.syscall == rule.syscall)
        {
            continue;
        }
        let same = rules
            .iter()
            .enumerate()
            .filter(|(_, r)| r.syscall == rule.syscall);
        exits.extend(fragment.push_syscall(rule.syscall, same)?);
    }
    // What has failed after an argument was loaded leaves the group.
    let end = fragment.code.len();
    for exit in exits {
        fragment.code[exit].k = u32::try_from(end - exit - 1).map_err(|_| CodeError::TooLong)?;
    }
    Ok(fragment)
}

impl Fragment {
    /// Adds the rules of one system call; gives the place of the jump out of the group, if they need one.
    fn push_syscall<'a>(
        &mut self,
        syscall: Syscall,
        rules: impl Iterator<Item = (usize, &'a Rule)>,
    ) -> Result<Option<usize>, CodeError> {
        let mut body = Self::default();
        let mut always = false;
        // The argument that is in the accumulator where a rule begins.
        let mut loaded = None;
        for (index, rule) in rules {
            if always {
                return Err(CodeError::Unreachable(index));
            }
            always = rule.args.is_empty();
            body.push_rule(rule, &mut loaded)?;
        }
        if !always {
            body.code.push(statement(JUMP, 0));
        }
        let skip = body.code.len();
        match u8::try_from(skip) {
            Ok(skip) => self.code.push(Instruction {
                jf: skip,
                ..statement(JUMP_EQUAL, syscall.0)
            }),
            Err(_) => {
                let skip = u32::try_from(skip).map_err(|_| CodeError::TooLong)?;
                self.code.push(Instruction {
                    jt: 1,
                    ..statement(JUMP_EQUAL, syscall.0)
                });
                self.code.push(statement(JUMP, skip));
            }
        }
        let start = u16::try_from(self.code.len()).map_err(|_| CodeError::TooLong)?;
        self.pid_places
            .extend(body.pid_places.iter().map(|place| start + place));
        self.code.extend(body.code);
        Ok((!always).then(|| self.code.len() - 1))
    }

    /// Adds a rule, which ends with its verdict or falls through to what is behind it.
    fn push_rule(&mut self, rule: &Rule, loaded: &mut Option<u32>) -> Result<(), CodeError> {
        let start = self.code.len();
        for condition in &rule.args {
            if condition.index > 5 {
                return Err(CodeError::Argument(condition.index));
            }
            let mask = match condition.op {
                Op::Eq => u64::MAX,
                Op::MaskedEq(_) if condition.val == Value::OwnPid => return Err(CodeError::MaskedPid),
                Op::MaskedEq(mask) => mask,
            };
            let place = ARGS + 8 * u32::from(condition.index);
            let (low_mask, high_mask) = halves(mask);
            let (low, high) = match condition.val {
                Value::Number(number) => halves(number),
                Value::OwnPid => (0, 0),
            };
            self.push_comparison(place, low_mask, low, loaded);
            if condition.val == Value::OwnPid {
                let at = u16::try_from(self.code.len() - 1).map_err(|_| CodeError::TooLong)?;
                self.pid_places.push(at);
            }
            if condition.width == Width::Qword {
                self.push_comparison(place + 4, high_mask, high, loaded);
            }
        }
        let verdict = rule.errno.map_or(ALLOW, |errno| ERRNO | u32::from(errno));
        self.code.push(statement(RETURN, verdict));
        let end = self.code.len();
        let mut comparisons = 0;
        for at in start..end {
            if self.code[at].code == JUMP_EQUAL {
                self.code[at].jf = u8::try_from(end - at - 1).map_err(|_| CodeError::TooLong)?;
                comparisons += 1;
            }
        }
        if comparisons != 1 {
            // The next rule may be reached from several places.
            *loaded = None;
        }
        Ok(())
    }

    fn push_comparison(&mut self, place: u32, mask: u32, value: u32, loaded: &mut Option<u32>) {
        if *loaded != Some(place) {
            self.code.push(statement(LOAD, place));
        }
        *loaded = Some(place);
        if mask != u32::MAX {
            self.code.push(statement(AND, mask));
            *loaded = None;
        }
        self.code.push(statement(JUMP_EQUAL, value & mask));
    }
}

fn halves(number: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = number.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

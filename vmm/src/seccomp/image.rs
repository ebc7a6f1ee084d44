//! The compiled form of filters: bytes that hold the code of each group, and the groups of each kind of thread.
//!
//! All numbers are little endian. The head is [`MAGIC`], the result of a program that allows nothing (u32) and the
//! number of groups (u16). A group is the length of its name (u8), the name, the count of instructions (u16), the count
//! of those that compare with the number of the process (u16), the places of these (u16 each), and the instructions
//! (8 bytes each). Then, for each of [`THREADS`], come the count of its groups (u16) and their numbers (u16 each).

use std::collections::BTreeMap;

use super::compiler::{Fragment, Instruction};

/// How a compiled file begins; the last byte is the version.
pub const MAGIC: &[u8; 8] = b"MAYFLYS\x01";

/// The kinds of threads.
pub const THREADS: [&str; 5] = ["control", "api", "io", "vcpu", "flush"];

/// Puts an image together; `None` when something does not fit its field.
pub fn write(
    mismatch: u32,
    fragments: &[(&str, Fragment)],
    threads: &BTreeMap<String, Vec<String>>,
) -> Option<Vec<u8>> {
    let mut out = MAGIC.to_vec();
    out.extend(mismatch.to_le_bytes());
    put_count(&mut out, fragments.len())?;
    for (name, fragment) in fragments {
        out.push(u8::try_from(name.len()).ok()?);
        out.extend(name.as_bytes());
        put_count(&mut out, fragment.code.len())?;
        put_count(&mut out, fragment.pid_places.len())?;
        fragment
            .pid_places
            .iter()
            .for_each(|place| out.extend(place.to_le_bytes()));
        for instruction in &fragment.code {
            out.extend(instruction.code.to_le_bytes());
            out.extend([instruction.jt, instruction.jf]);
            out.extend(instruction.k.to_le_bytes());
        }
    }
    for thread in THREADS {
        let groups = threads.get(thread)?;
        put_count(&mut out, groups.len())?;
        for group in groups {
            put_count(&mut out, fragments.iter().position(|(name, _)| name == group)?)?;
        }
    }
    Some(out)
}

fn put_count(out: &mut Vec<u8>, count: usize) -> Option<()> {
    out.extend(u16::try_from(count).ok()?.to_le_bytes());
    Some(())
}

/// A group in an image.
#[derive(Debug, Clone, Copy)]
pub struct Group<'a> {
    /// Its name.
    pub name: &'a str,
    pid_places: &'a [u8],
    code: &'a [u8],
}

impl<'a> Group<'a> {
    /// Its code in the process `pid`.
    pub fn code(self, pid: u32) -> impl Iterator<Item = Instruction> + 'a {
        let places = self.pid_places.as_chunks().0.iter().copied();
        let places = places.map(u16::from_le_bytes);
        self.code
            .as_chunks()
            .0
            .iter()
            .enumerate()
            .map(move |(at, bytes)| {
                let [c0, c1, jt, jf, k0, k1, k2, k3] = *bytes;
                let k = u32::from_le_bytes([k0, k1, k2, k3]);
                let is_pid = places.clone().any(|place| usize::from(place) == at);
                Instruction {
                    code: u16::from_le_bytes([c0, c1]),
                    jt,
                    jf,
                    k: if is_pid { pid } else { k },
                }
            })
    }
}

/// Reads an image front to back; `None` means that it is too short or not of this form.
pub struct Reader<'a> {
    rest: &'a [u8],
    /// What a program returns that allows nothing.
    pub mismatch: u32,
    /// All groups.
    pub groups: Vec<Group<'a>>,
}

impl<'a> Reader<'a> {
    /// Reads head and groups.
    pub fn new(image: &'a [u8]) -> Option<Self> {
        let mut reader = Self {
            rest: image.strip_prefix(MAGIC)?,
            mismatch: 0,
            groups: Vec::new(),
        };
        reader.mismatch = u32::from_le_bytes(*reader.take(4)?.as_array()?);
        for _ in 0..reader.count()? {
            let length = *reader.take(1)?.first()?;
            let name = std::str::from_utf8(reader.take(length.into())?).ok()?;
            let (instructions, pids) = (reader.count()?, reader.count()?);
            let (pid_places, code) = (reader.take(pids * 2)?, reader.take(instructions * 8)?);
            reader.groups.push(Group {
                name,
                pid_places,
                code,
            });
        }
        Some(reader)
    }

    /// The groups of a thread.
    pub fn thread(mut self, thread: &str) -> Option<Vec<Group<'a>>> {
        for known in THREADS {
            let count = self.count()?;
            let mut groups = Vec::with_capacity(count);
            for _ in 0..count {
                let index = self.count()?;
                groups.push(*self.groups.get(index)?);
            }
            if known == thread {
                return Some(groups);
            }
        }
        None
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        Some(taken)
    }

    fn count(&mut self) -> Option<usize> {
        Some(u16::from_le_bytes(*self.take(2)?.as_array()?).into())
    }
}

//! From the text of filters to the bytes that a process loads. The build compiles `resources/seccomp/x86_64.json` with
//! it; the program compiles the filters of its user with it.

mod code;
mod names;
mod rules;

use super::image;

pub use code::{Fragment, Instruction};
pub use names::name;
pub use rules::{Call, Mismatch, Rule, Source};

/// Why a text is no filter.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// It is not of the right form.
    #[error("it is no JSON of filters: {0}")]
    Json(#[from] serde_json::Error),
    /// A rule cannot be translated.
    #[error("group '{group}': {source}")]
    Code {
        /// Where.
        group: String,
        /// Why.
        source: code::CodeError,
    },
    /// A thread has a group that is not there.
    #[error("thread '{thread}' has the group '{group}', which is not there")]
    NoGroup {
        /// Of the thread.
        thread: String,
        /// The missing one.
        group: String,
    },
    /// A kind of thread would have no filter.
    #[error("there is no filter for the thread '{0}'")]
    NoThread(&'static str),
    /// There is no such kind of thread.
    #[error("there is no thread '{0}'")]
    UnknownThread(String),
    /// There is a limit for everything.
    #[error("the filters are too large")]
    TooLarge,
}

/// Reads the text form.
pub fn parse(text: &[u8]) -> Result<Source, CompileError> {
    let source: Source = serde_json::from_slice(text)?;
    for (thread, groups) in &source.threads {
        if !image::THREADS.contains(&thread.as_str()) {
            return Err(CompileError::UnknownThread(thread.clone()));
        }
        if let Some(group) = groups.iter().find(|group| !source.groups.contains_key(*group)) {
            return Err(CompileError::NoGroup {
                thread: thread.clone(),
                group: group.clone(),
            });
        }
    }
    let missing = image::THREADS
        .into_iter()
        .find(|thread| !source.threads.contains_key(*thread));
    missing.map_or(Ok(source), |thread| Err(CompileError::NoThread(thread)))
}

/// Compiles the text form.
pub fn compile(text: &[u8]) -> Result<Vec<u8>, CompileError> {
    let source = parse(text)?;
    let mut fragments = Vec::new();
    for (group, rules) in &source.groups {
        let compiled = code::compile(rules).map_err(|source| CompileError::Code {
            group: group.clone(),
            source,
        })?;
        fragments.push((group.as_str(), compiled));
    }
    let mismatch = match source.mismatch_action {
        Mismatch::Trap => code::TRAP,
        Mismatch::Log => code::LOG,
        Mismatch::KillProcess => code::KILL_PROCESS,
    };
    image::write(mismatch, &fragments, &source.threads).ok_or(CompileError::TooLarge)
}

/// What stands around the groups of a program.
pub fn frame(mismatch: u32) -> ([Instruction; 3], Instruction) {
    let foreign = Instruction {
        jt: 1,
        ..code::statement(code::JUMP_EQUAL, code::X86_64)
    };
    let mismatch = code::statement(code::RETURN, mismatch);
    (
        [code::statement(code::LOAD, code::ARCH), foreign, mismatch],
        mismatch,
    )
}

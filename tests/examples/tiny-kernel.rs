//! Writes a kernel that halts at once to the file named by the argument, for tests in other languages.

use std::process::ExitCode;

use mayfly_tests::TinyKernel;

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: tiny-kernel FILE");
        return ExitCode::FAILURE;
    };
    match std::fs::write(&path, TinyKernel::new().halt().elf()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cannot write {}: {error}", path.display());
            ExitCode::FAILURE
        }
    }
}

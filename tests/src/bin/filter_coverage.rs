//! `filter_coverage [--all-used] FILTERS TRACE...`: see `tests/seccomp/coverage.sh`, which makes the traces.

use std::process::ExitCode;
use std::{env, fs};

use mayfly_tests::Failure;
use mayfly_tests::coverage::Coverage;
use vmm::seccomp::compiler;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(failure) => {
            eprintln!("filter_coverage: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool, Failure> {
    let (options, files): (Vec<_>, Vec<_>) = env::args().skip(1).partition(|word| word.starts_with("--"));
    let usage = || Failure::new("usage: filter_coverage [--all-used] FILTERS TRACE...");
    let (filters, traces) = files.split_first().ok_or_else(usage)?;
    let source = compiler::parse(&fs::read(filters)?)?;
    let mut coverage = Coverage::new(&source);
    for trace in traces {
        coverage.trace(&String::from_utf8_lossy(&fs::read(trace)?));
    }
    Ok(coverage.report(options.iter().any(|option| option == "--all-used")))
}

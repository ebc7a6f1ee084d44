//! `mayfly-jailer`: will confine a `mayfly` process. It exists so that packaging and paths are settled;
//! it refuses to run, because a jail that does not confine is worse than none.

use std::process::ExitCode;

fn main() -> ExitCode {
    eprintln!("mayfly-jailer: not built yet; start `mayfly` directly, inside a sandbox of your own");
    ExitCode::from(1)
}

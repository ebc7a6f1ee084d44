//! Compiles the system call filters.

use std::path::Path;
use std::{env, fs};

#[path = "src/seccomp"]
#[expect(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "these are modules of the library, which uses the rest of them"
)]
mod seccomp {
    pub(crate) mod compiler;
    pub(crate) mod image;
}

const FILTERS: &str = "../resources/seccomp/x86_64.json";

fn main() {
    println!("cargo:rerun-if-changed={FILTERS}");
    println!("cargo:rerun-if-changed=src/seccomp");
    let text = fs::read(FILTERS).unwrap_or_else(|error| panic!("{FILTERS}: {error}"));
    let image = seccomp::compiler::compile(&text).unwrap_or_else(|error| panic!("{FILTERS}: {error}"));
    let out = env::var_os("OUT_DIR").expect("cargo says where");
    fs::write(Path::new(&out).join("seccomp"), image).expect("cargo's folder can be written");
}

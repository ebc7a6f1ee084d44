//! The `mayfly` process.
fn main() {}

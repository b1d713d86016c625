//! The `nacre` command line.
fn main() {}

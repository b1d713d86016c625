//! Compares the software processor with the host's on random instructions.

#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

#[path = "difftest/check.rs"]
mod check;
#[path = "difftest/coverage.rs"]
mod coverage;
#[path = "difftest/mod.rs"]
mod difftest;

#[test]
fn instructions_do_what_the_host_does() {
    check::check(1_500_000, false);
}

//! Compares the software processor with the host's on random instructions, all 64-bit code translated to machine code.

#![cfg(all(target_arch = "x86_64", target_os = "linux", feature = "native"))]

#[path = "difftest/check.rs"]
mod check;
#[path = "difftest/mod.rs"]
mod difftest;

#[test]
fn translated_instructions_do_what_the_host_does() {
    check::check(500_000, true);
}

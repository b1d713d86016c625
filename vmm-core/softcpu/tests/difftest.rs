//! Compares the software processor with the host's on random instructions.
//!
//! `NACRE_DIFF_CASES` and `NACRE_DIFF_SEED` set the number of cases and the seed. The harness installs
//! signal handlers, so it has a process of its own; `examples/difftest.rs` runs it for longer.

#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

#[path = "difftest/mod.rs"]
mod difftest;

#[test]
fn instructions_do_what_the_host_does() {
    let number = |name| {
        std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
    };
    let options = difftest::Options {
        cases: number("NACRE_DIFF_CASES").unwrap_or(1_500_000),
        seed: number("NACRE_DIFF_SEED").unwrap_or(1),
        mode: None,
        only: std::env::var("NACRE_DIFF_ONLY").ok(),
    };
    let summary = difftest::run(&options);
    println!("{summary}");
    assert!(summary.mismatches.is_empty(), "{} mnemonics differ", summary.mismatches.len());
}

//! The differential test as a cargo test.
//!
//! `NACRE_DIFF_CASES` and `NACRE_DIFF_SEED` set the number of cases and the seed, `NACRE_DIFF_ONLY` a mnemonic; with
//! `NACRE_DIFF_KVM` single instructions run in a machine of KVM as well. The harness installs signal handlers and uses
//! fixed addresses, so each test has a process of its own; `examples/difftest.rs` runs them for longer.

use crate::difftest::{Options, run};

/// Runs `cases` cases unless the environment says otherwise, and fails if any differs.
pub fn check(cases: u64, translate: bool) {
    let number = |name| {
        std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
    };
    let options = Options {
        cases: number("NACRE_DIFF_CASES").unwrap_or(cases),
        seed: number("NACRE_DIFF_SEED").unwrap_or(1),
        mode: None,
        only: std::env::var("NACRE_DIFF_ONLY").ok(),
        kvm: std::env::var_os("NACRE_DIFF_KVM").is_some(),
        translate,
    };
    let summary = run(&options);
    println!("{summary}");
    let (mismatches, missed) = (summary.mismatches.len(), summary.missed.len());
    assert!(summary.passed(), "{mismatches} mnemonics differ, {missed} forms were not tested");
}

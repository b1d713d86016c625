//! Compares the software processor with the host's on random instructions.
//!
//! `NACRE_DIFF_CASES` and `NACRE_DIFF_SEED` set the number of cases and the seed; with `NACRE_DIFF_KVM` single
//! instructions run in a machine of KVM as well. The harness installs
//! signal handlers, so it has a process of its own; `examples/difftest.rs` runs it for longer.

#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

#[path = "difftest/mod.rs"]
mod difftest;

#[test]
fn instructions_do_what_the_host_does() {
    compare(false, 1_500_000);
}

/// The same with all code translated.
#[cfg(feature = "native")]
#[test]
fn translated_instructions_do_what_the_host_does() {
    compare(true, 500_000);
}

fn compare(translate: bool, cases: u64) {
    // One at a time: the harness uses fixed addresses.
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let number = |name| {
        std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
    };
    let options = difftest::Options {
        cases: number("NACRE_DIFF_CASES").unwrap_or(cases),
        seed: number("NACRE_DIFF_SEED").unwrap_or(1),
        mode: None,
        only: std::env::var("NACRE_DIFF_ONLY").ok(),
        kvm: std::env::var_os("NACRE_DIFF_KVM").is_some(),
        translate,
    };
    let summary = difftest::run(&options);
    println!("{summary}");
    assert!(summary.passed(), "{} mnemonics differ", summary.mismatches.len());
}

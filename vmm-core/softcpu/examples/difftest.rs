//! The long run of the differential test against the host's processor:
//! `difftest [--cases N] [--seed S] [--bits 64|32|16] [--only MNEMONIC] [--jobs J] [--kvm yes]
//! [--translate yes]`.
//!
//! With `--kvm yes` single instructions run in a machine of KVM as well, as a third opinion; with `--translate yes` all 64-bit code is
//! translated to machine code first (feature `native`).
//! Jobs are processes with consecutive seeds that share the cases. Exits with 1 if anything differs.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[path = "../tests/difftest/mod.rs"]
mod difftest;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn main() -> std::process::ExitCode {
    let mut options = difftest::Options {
        cases: 10_000_000,
        seed: 1,
        mode: None,
        only: None,
        kvm: false,
        translate: false,
    };
    let mut jobs = 1;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().unwrap_or_else(|| panic!("{argument} needs a value"));
        let number = || value.parse().unwrap_or_else(|_| panic!("{value} is not a number"));
        match argument.as_str() {
            "--cases" => options.cases = number(),
            "--seed" => options.seed = number(),
            "--jobs" => jobs = number(),
            "--bits" => {
                options.mode = Some(match number() {
                    64 => difftest::Mode::Long,
                    32 => difftest::Mode::Compat,
                    16 => difftest::Mode::Sixteen,
                    bits => panic!("no {bits}-bit mode"),
                });
            }
            "--kvm" => options.kvm = value == "yes",
            "--translate" => options.translate = value == "yes",
            "--only" => options.only = Some(value.to_lowercase()),
            _ => panic!("unknown option {argument}"),
        }
    }
    let ok = if jobs > 1 { spawn(&options, jobs) } else { single(&options) };
    if ok { std::process::ExitCode::SUCCESS } else { std::process::ExitCode::FAILURE }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn single(options: &difftest::Options) -> bool {
    let start = std::time::Instant::now();
    let summary = difftest::run(options);
    println!("{summary}");
    println!("seed {}: {:.1} s", options.seed, start.elapsed().as_secs_f64());
    summary.passed()
}

/// The harness uses fixed addresses, so parallel runs are processes.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn spawn(options: &difftest::Options, jobs: u64) -> bool {
    let program = std::env::current_exe().expect("own path");
    let children: Vec<_> = (0..jobs)
        .map(|job| {
            let mut command = std::process::Command::new(&program);
            command.arg("--cases").arg((options.cases / jobs).to_string());
            command.arg("--seed").arg((options.seed + job).to_string());
            if let Some(mode) = options.mode {
                command.arg("--bits").arg(mode.bits().to_string());
            }
            if let Some(only) = &options.only {
                command.arg("--only").arg(only);
            }
            if options.translate {
                command.args(["--translate", "yes"]);
            }
            if options.kvm {
                command.args(["--kvm", "yes"]);
            }
            command.spawn().expect("child")
        })
        .collect();
    let mut ok = true;
    for mut child in children {
        ok &= child.wait().expect("child").success();
    }
    ok
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn main() {
    eprintln!("The differential test needs an x86-64 Linux host");
}

//! Runs a command in a fresh machine with limits of time and memory, and returns its output and exit status:
//! `sandbox IMAGES SECONDS MIB COMMAND`. The machine has no disk and no network, and ends with the command.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use examples::{Output, script_guest};
use nacre_engine::vmm_core::machine::{StopReason, Vm};

/// How a command ended.
enum Outcome {
    Exited(u8),
    TimedOut,
    /// The kernel killed it, or the guest as a whole failed: mostly for want of memory.
    Died(StopReason),
}

fn run(images: &Path, limit: Duration, mib: u64, command: &str) -> Result<(String, Outcome)> {
    let work = std::env::temp_dir().join(format!("sandbox-{}", std::process::id()));
    std::fs::create_dir_all(&work)?;
    // The command is quoted for the shell, so that it stays one word whatever it holds.
    let quoted = command.replace('\'', r"'\''");
    let script = format!("echo BEGIN; sh -c '{quoted}'; echo \"END $?\"");
    let built = script_guest(images, &work, "sandbox", &script).and_then(|mut config| {
        config.memory.size = mib << 20;
        config.boot.command_line += " panic=-1 sysctl.vm.panic_on_oom=1";
        let output = Output::default();
        Ok((Vm::builder(config).serial_output(output.sink()).build()?, output))
    });
    std::fs::remove_dir_all(&work)?;
    let (vm, output) = built?;

    let deadline = Instant::now() + limit;
    vm.start()?;
    let reason = vm.wait_timeout(deadline - Instant::now());
    drop(vm); // ends the guest if it still runs
    let text = output.text();
    let body = text.split_once("BEGIN\n").map_or("", |(_, rest)| rest);
    // The kernel may say a last word after the command's status.
    let (body, status) = match body.rsplit_once("END ") {
        Some((body, rest)) => (body, rest.lines().next().and_then(|status| status.parse().ok())),
        None => (body, None),
    };
    let outcome = match (reason, status) {
        (None, _) => Outcome::TimedOut,
        (Some(StopReason::PowerOff), Some(status)) => Outcome::Exited(status),
        (Some(reason), _) => Outcome::Died(reason),
    };
    Ok((body.to_owned(), outcome))
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [images, seconds, mib, command] = arguments.as_slice() else {
        bail!("usage: sandbox IMAGES SECONDS MIB COMMAND");
    };
    let seconds = Duration::from_secs(seconds.parse().context("SECONDS must be a number")?);
    let mib = mib.parse().context("MIB must be a number")?;
    let (output, outcome) = run(images.as_ref(), seconds, mib, command)?;
    print!("{output}");
    match outcome {
        Outcome::Exited(0) => Ok(()),
        Outcome::Exited(status) => std::process::exit(status.into()),
        // The codes of timeout(1) and of what runs containers.
        Outcome::TimedOut => {
            eprintln!("sandbox: the command did not end within {} s", seconds.as_secs());
            std::process::exit(124)
        }
        Outcome::Died(reason) => {
            eprintln!("sandbox: the command's machine ended early: {reason:?}");
            std::process::exit(125)
        }
    }
}

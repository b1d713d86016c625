//! `nacre accel`.

use std::process::ExitCode;

use clap::Parser;
use vmm_core::accel::kvm::KvmFeatures;
use vmm_core::accel::probe::{self, Probed};

/// Say which accelerators work here, how fast they run kernel and user code, and why one was rejected.
#[derive(Parser)]
#[command(
    after_help = "Exit status: 0 when an accelerator works, 1 otherwise.\n\nExample:\n  nacre accel --json"
)]
pub struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let report = probe::probe();
    if args.json {
        daemons::outln!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        for probed in &report.accelerators {
            daemons::outln!("{}", line(probed, report.chosen == Some(probed.kind)));
        }
    }
    Ok(if report.chosen.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn line(probed: &Probed, chosen: bool) -> String {
    let name = probed.kind.to_string();
    let speed = |mips: Option<f64>| mips.map_or("-".into(), |m| format!("{m:.0}"));
    let state = match (chosen, probed.usable) {
        (true, _) => "chosen",
        (false, true) => "usable",
        (false, false) => "rejected",
    };
    let mut text = format!(
        "{name:<5} {state:<9} kernel {:>6} Minstr/s, user {:>6} Minstr/s",
        speed(probed.kernel_mips),
        speed(probed.user_mips)
    );
    if let Some(reason) = &probed.reason {
        text += &format!("\n      {reason}");
    }
    if let Some(kvm) = &probed.kvm {
        text += &format!("\n      offers {}", features(kvm));
    }
    text
}

fn features(kvm: &KvmFeatures) -> String {
    let mut offers = vec![format!("{} vCPUs", kvm.vcpus)];
    if let Some(entries) = kvm.dirty_ring {
        let unused = if kvm.software { " (not used: they may overflow)" } else { "" };
        offers.push(format!("dirty rings of {entries} entries{unused}"));
    }
    if kvm.coalesced_io {
        offers.push("coalesced I/O".into());
    }
    if kvm.guest_memfd {
        let private = if kvm.private_memory { "with" } else { "without" };
        let shared = if kvm.guest_memfd_shared { "mappable" } else { "not mappable" };
        offers.push(format!("guest_memfd ({shared}, {private} private memory; not used)"));
    }
    offers.join(", ")
}

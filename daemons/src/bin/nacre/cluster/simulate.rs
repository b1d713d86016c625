//! `nacre cluster simulate`.

use std::process::ExitCode;

use ::cluster::sim::{Schedule, run as simulate, shrink, trace};
use clap::Parser;

/// Run random fault schedules against simulated clusters and check that nothing runs twice.
#[derive(Parser)]
#[command(after_help = "\
Each schedule is 600 virtual seconds of 4 or 5 hosts with six faults; the same seed gives the same run.

Exit status: 0 when all invariants hold, 1 when one is broken.

Examples:
  nacre cluster simulate --schedules 1000
  nacre cluster simulate --trace 42")]
pub struct Args {
    /// How many schedules to run.
    #[arg(long, default_value_t = 1000)]
    schedules: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Tell what happens in the schedule with this seed instead.
    #[arg(long, value_name = "SEED")]
    trace: Option<u64>,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if let Some(seed) = args.trace {
        let schedule = Schedule::random(seed);
        daemons::outln!("{schedule}");
        for line in trace(&schedule, None) {
            daemons::outln!("{line}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let (mut starts, mut fenced) = (0, 0);
    for seed in args.first..args.first.saturating_add(args.schedules) {
        let schedule = Schedule::random(seed);
        let outcome = simulate(&schedule, None);
        starts += outcome.starts;
        fenced += outcome.fenced;
        if let Some((at, violation)) = outcome.violation {
            daemons::outln!(
                "FAILED at {:.3} s: {violation}\n{}",
                at as f64 / 1000.0,
                shrink(&schedule, None)
            );
            return Ok(ExitCode::FAILURE);
        }
    }
    daemons::outln!("{} schedules hold: {starts} VM starts, {fenced} hosts fenced", args.schedules);
    Ok(ExitCode::SUCCESS)
}

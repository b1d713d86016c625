//! Runs random fault schedules against whole simulated clusters; see `--help`.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use cluster::mutants::Mutant;
use cluster::sim::{Schedule, run, shrink, trace};

/// Run random fault schedules against simulated clusters and check that no invariant is broken.
#[derive(Parser)]
#[command(after_help = "\
Each schedule is 600 virtual seconds of 4 or 5 hosts with six faults; the same seed gives the same run.

Exit status: 0 when all invariants hold (with --mutants: when every planted bug is found), 1 otherwise.

Examples:
  simulate --schedules 100000                    seeds 0 to 99,999, as in CI
  simulate --first 100000 --schedules 100000     seeds nobody has looked at yet
  simulate --seed 4815                           run one schedule; shrink it if it fails
  simulate --trace 4815                          tell what happens in one schedule
  simulate --mutants                             how many schedules it takes to find each planted bug
  simulate --mutants --explain                   the same, with a small schedule that shows each bug")]
struct Args {
    /// How many schedules to run (with --mutants: at most, for each planted bug).
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    schedules: u64,
    /// The first seed.
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    first: u64,
    /// Run the schedule with this seed instead; if it fails, leave out faults while it still does.
    #[arg(long, value_name = "SEED", conflicts_with_all = ["first", "schedules"])]
    seed: Option<u64>,
    /// Tell what happens in the schedule with this seed instead (shrunk, if it fails).
    #[arg(long, value_name = "SEED", conflicts_with_all = ["first", "schedules", "seed"])]
    trace: Option<u64>,
    /// Plant one bug after the other and look for each of them.
    #[arg(long, conflicts_with_all = ["seed", "trace"])]
    mutants: bool,
    /// Show a small schedule in which each planted bug breaks an invariant.
    #[arg(long, requires = "mutants")]
    explain: bool,
}

/// Runs one schedule and shrinks it if it fails; gives whether it holds.
fn explain(seed: u64, mutant: Option<Mutant>) -> bool {
    let small = shrink(&Schedule::random(seed), mutant);
    match run(&small, mutant).violation {
        Some((at, v)) => {
            println!("FAILED at {:.3} s: {v}\n{small}", at as f64 / 1000.0);
            false
        }
        None => {
            println!("seed {seed} holds");
            true
        }
    }
}

/// Runs seeds from `first` on all cores until `count` are done or one fails; gives the lowest failing seed, how
/// many were run, and the sums of their events, VM starts, fenced hosts, live moves and digests.
fn sweep(first: u64, count: u64, mutant: Option<Mutant>) -> (Option<u64>, u64, [u64; 5]) {
    let (next, failed, stop) = (AtomicU64::new(0), AtomicU64::new(u64::MAX), AtomicBool::new(false));
    let totals: [AtomicU64; 5] = Default::default();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|s| {
        for _ in 0..threads {
            s.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= count {
                        break;
                    }
                    let o = run(&Schedule::random(first + i), mutant);
                    for (t, v) in totals.iter().zip([o.events, o.starts, o.fenced, o.moves, o.digest]) {
                        t.fetch_add(v, Ordering::Relaxed);
                    }
                    if o.violation.is_some() {
                        failed.fetch_min(first + i, Ordering::Relaxed);
                        stop.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner();
    let ran = next.into_inner().min(count);
    ((failed != u64::MAX).then_some(failed), ran, totals.map(AtomicU64::into_inner))
}

/// Looks for every planted bug; gives how many were not found.
fn find_mutants(args: &Args) -> usize {
    let mut missed = 0;
    for mutant in Mutant::CLUSTER {
        let (failed, ran, _) = sweep(args.first, args.schedules, Some(mutant));
        match failed {
            Some(seed) => {
                println!("{mutant:?}: found after {ran} schedules");
                if args.explain {
                    explain(seed, Some(mutant));
                }
            }
            None => {
                println!("{mutant:?}: NOT FOUND in {ran} schedules");
                missed += 1;
            }
        }
    }
    missed
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(seed) = args.trace {
        let schedule = shrink(&Schedule::random(seed), None);
        println!("{schedule}");
        for line in trace(&schedule, None) {
            println!("{line}");
        }
        return ExitCode::SUCCESS;
    }
    if let Some(seed) = args.seed {
        return ExitCode::from(u8::from(!explain(seed, None)));
    }
    if args.mutants {
        return ExitCode::from(u8::from(find_mutants(&args) > 0));
    }
    let start = Instant::now();
    let (failed, ran, [events, starts, fenced, moves, digest]) = sweep(args.first, args.schedules, None);
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{ran} schedules of 600 virtual seconds in {seconds:.1} s ({:.0} a minute); {events} events, {starts} VM starts, {fenced} hosts fenced, {moves} live moves; digest {digest:016x}",
        ran as f64 * 60.0 / seconds,
    );
    match failed {
        Some(seed) => {
            explain(seed, None);
            ExitCode::FAILURE
        }
        None => {
            println!("all invariants hold");
            ExitCode::SUCCESS
        }
    }
}

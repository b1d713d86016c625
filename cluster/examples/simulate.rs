//! Runs random fault schedules against whole simulated clusters.
//!
//! `cargo run --release -p cluster --example simulate -- --schedules 100000` runs seeds 0 to 99,999 and
//! exits with 1 if one breaks an invariant; `--seed N` runs, shrinks and explains one; `--trace N`
//! prints its events; `--mutants` shows for each planted bug how many schedules it takes to find it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use cluster::mutants::Mutant;
use cluster::sim::{Schedule, run, shrink, trace};

fn explain(seed: u64, mutant: Option<Mutant>) {
    let small = shrink(&Schedule::random(seed), mutant);
    match run(&small, mutant).violation {
        Some((at, v)) => println!("FAILED at {:.3} s: {v}\n{small}", at as f64 / 1000.0),
        None => println!("seed {seed} holds"),
    }
}

/// Runs seeds from `first` on all cores until `count` are done or one fails; gives the lowest failing seed.
fn sweep(first: u64, count: u64, mutant: Option<Mutant>) -> (Option<u64>, u64, [u64; 4]) {
    let (next, failed, stop) = (AtomicU64::new(0), AtomicU64::new(u64::MAX), AtomicBool::new(false));
    let totals: [AtomicU64; 4] = Default::default();
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
                    for (t, v) in totals.iter().zip([o.events, o.starts, o.fenced, o.moves]) {
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

fn main() -> std::process::ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let number = |name: &str| {
        let at = args.iter().position(|a| a == name)?;
        args.get(at + 1)?.parse::<u64>().ok()
    };
    let count = number("--schedules").unwrap_or(10_000);
    if let Some(seed) = number("--trace") {
        for line in trace(&shrink(&Schedule::random(seed), None), None) {
            println!("{line}");
        }
        return std::process::ExitCode::SUCCESS;
    }
    if let Some(seed) = number("--seed") {
        explain(seed, None);
        return std::process::ExitCode::SUCCESS;
    }
    if args.iter().any(|a| a == "--mutants") {
        let mut missed = 0;
        for mutant in Mutant::ALL {
            let (failed, ran, _) = sweep(0, count, Some(mutant));
            match failed {
                Some(seed) => {
                    println!("{mutant:?}: found after {ran} schedules");
                    if args.iter().any(|a| a == "--explain") {
                        explain(seed, Some(mutant));
                    }
                }
                None => {
                    println!("{mutant:?}: NOT FOUND in {ran} schedules");
                    missed += 1;
                }
            }
        }
        return std::process::ExitCode::from(u8::from(missed > 0));
    }
    let start = Instant::now();
    let (failed, ran, [events, starts, fenced, moves]) = sweep(number("--first").unwrap_or(0), count, None);
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{ran} schedules of 600 virtual seconds in {seconds:.1} s ({:.0} a minute); {} events, {starts} VM starts, {fenced} hosts fenced, {moves} live moves",
        ran as f64 * 60.0 / seconds,
        events
    );
    match failed {
        Some(seed) => {
            explain(seed, None);
            std::process::ExitCode::FAILURE
        }
        None => {
            println!("all invariants hold");
            std::process::ExitCode::SUCCESS
        }
    }
}

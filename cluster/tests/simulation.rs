//! Random fault schedules against whole simulated clusters, and proof that the simulator finds bugs.

use std::sync::atomic::{AtomicUsize, Ordering};

use cluster::mutants::Mutant;
use cluster::sim::{Schedule, run, shrink};

/// Seeds that broke an invariant once; all but the last did so when there were fewer kinds of faults and they stood
/// for other schedules.
const REGRESSIONS: &[u64] = &[91, 305, 487, 841, 4815, 62_592, 66_548, 76_012, 9270];

fn check(seed: u64) {
    let schedule = Schedule::random(seed);
    if let Some((at, violation)) = run(&schedule, None).violation {
        panic!("{violation} at {at} ms\n{}", shrink(&schedule, None));
    }
}

#[test]
fn regressions_hold() {
    REGRESSIONS.iter().copied().for_each(check);
}

#[test]
fn random_schedules_hold() {
    // NACRE_SCHEDULES asks for another number of schedules.
    let count = match std::env::var("NACRE_SCHEDULES") {
        Ok(n) => n.parse().expect("NACRE_SCHEDULES is a number"),
        Err(_) => 2000,
    };
    std::thread::scope(|s| {
        for half in 0..2 {
            s.spawn(move || (half..count).step_by(2).for_each(check));
        }
    });
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let schedule = Schedule::random(4242);
    let first = run(&schedule, None);
    assert_eq!(first, run(&schedule, None));
    assert!(first.events > 10_000 && first.starts >= 6);
}

#[test]
fn planted_bugs_are_found() {
    // Far more schedules than any of them needs, so that a change of the schedules does not fail the test.
    const SCHEDULES: u64 = 10_000;
    let next = AtomicUsize::new(0);
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                while let Some(mutant) = Mutant::CLUSTER.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let fails = |seed: &u64| run(&Schedule::random(*seed), Some(*mutant)).violation.is_some();
                    assert!((0..SCHEDULES).any(|seed| fails(&seed)), "{mutant:?} was not found");
                }
            });
        }
    });
}

//! Random fault schedules against whole simulated clusters, and proof that the simulator finds bugs.

use cluster::mutants::Mutant;
use cluster::sim::{Schedule, run, shrink};

/// Schedules that broke an invariant once.
const REGRESSIONS: &[u64] = &[91, 305, 487, 841, 4815];

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
    let found = |mutant: Mutant| {
        (0..600).find(|seed| run(&Schedule::random(*seed), Some(mutant)).violation.is_some())
    };
    let quick = [
        Mutant::RenewalCountedFromCompletion,
        Mutant::OwnerLivenessIgnored,
        Mutant::TargetRunsBeforeHandOver,
        Mutant::CoordinatorNeverStepsDown,
        Mutant::FenceWithoutQuorum,
        Mutant::DeadTimeWithoutWatchdog,
        Mutant::FenceTrustsExitStatus,
        Mutant::AdmissionIgnoresReserve,
        Mutant::NoRestartLimit,
        Mutant::FailureIgnored,
    ];
    for mutant in quick {
        assert!(found(mutant).is_some(), "{mutant:?} was not found");
    }
    // These need a rare coincidence: schedules known to show it.
    let rare = [
        (Mutant::DeadTimeWithoutWatchdogDevice, 227),
        (Mutant::GenerationNotRaised, 732),
        (Mutant::WriteWithoutToken, 810),
        (Mutant::NoKillOnExpiry, 1039),
        (Mutant::WatchdogAlwaysFed, 1127),
    ];
    for (mutant, seed) in rare {
        let schedule = Schedule::random(seed);
        assert!(run(&schedule, Some(mutant)).violation.is_some(), "{mutant:?} was not found");
    }
    // The other planted bugs are found by the lock's own tests.
}

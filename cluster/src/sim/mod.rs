//! A deterministic simulator of a whole cluster.
//!
//! It drives real [`Node`](crate::node::Node)s under virtual time with a seeded event heap: the same seed
//! gives the same run, event for event. A [`Schedule`] is a seed and a list of faults; a run checks the
//! cluster's invariants after every event that could break one, and a failing schedule is shrunk by
//! leaving out faults while it still fails.

mod check;
mod exec;
mod faults;
mod guests;
mod hosts;
mod queue;
mod schedule;
mod state;
mod world;

pub use check::Violation;
pub use schedule::{Fault, FaultKind, Schedule};

use crate::mutants::{self, Mutant};

/// What a run ended with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The first violated invariant, if any.
    pub violation: Option<(u64, Violation)>,
    /// How many events were carried out.
    pub events: u64,
    /// How many VM processes were started.
    pub starts: u64,
    /// How many hosts were fenced by power.
    pub fenced: u64,
    /// How many locks were handed over by a live migration.
    pub moves: u64,
    /// A digest of all events: equal digests mean equal runs.
    pub digest: u64,
}

/// Runs one schedule, with a planted bug if one is given.
pub fn run(schedule: &Schedule, mutant: Option<Mutant>) -> Outcome {
    mutants::plant(mutant);
    let outcome = world::World::new(schedule).run();
    mutants::plant(None);
    outcome
}

/// Runs one schedule and tells what every host asked for and announced, one line an event.
pub fn trace(schedule: &Schedule, mutant: Option<Mutant>) -> Vec<String> {
    mutants::plant(mutant);
    let mut world = world::World::new(schedule);
    world.trace = Some(Vec::new());
    let lines = world.run_traced();
    mutants::plant(None);
    lines
}

/// Leaves out faults of a failing schedule while it still fails, and gives the smallest one found. A schedule
/// that holds is given back as it is.
pub fn shrink(schedule: &Schedule, mutant: Option<Mutant>) -> Schedule {
    let mut best = schedule.clone();
    if run(schedule, mutant).violation.is_none() {
        return best;
    }
    loop {
        let smaller = (0..best.faults.len()).find_map(|i| {
            let mut candidate = best.clone();
            candidate.faults.remove(i);
            run(&candidate, mutant).violation.is_some().then_some(candidate)
        });
        match smaller {
            Some(s) => best = s,
            None => return best,
        }
    }
}

//! Bugs planted on purpose, so that the simulator can show that it finds them.
//!
//! Without the `mutants` feature (and outside of the crate's own tests) the switch is a constant `false`
//! and nothing of this is compiled in.

/// A planted bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// The lease is counted from the completion of a renewal instead of its submission.
    RenewalCountedFromCompletion,
    /// A restarted host keeps the generation of its former life.
    GenerationNotRaised,
    /// A taker counts the dead-time without the watchdog's share.
    DeadTimeWithoutWatchdog,
    /// A taker trusts the dead-time of a host that has no watchdog.
    DeadTimeWithoutWatchdogDevice,
    /// The watchdog is fed although a lease with users has expired.
    WatchdogAlwaysFed,
    /// An expired lease does not kill the VMs on its volume, and the watchdog is fed on.
    NoKillOnExpiry,
    /// The fencer believes the exit status of "off" without looking at the power state.
    FenceTrustsExitStatus,
    /// A lock is taken although its owner is alive.
    OwnerLivenessIgnored,
    /// Disk Paxos skips the check of higher ballots after its second phase.
    NoSecondPhaseCheck,
    /// A chosen value of another host is overwritten with our own.
    BallotIgnoresAccepted,
    /// A lock is not released on its block, only on the leader.
    NoReleasedFlag,
    /// A migration target starts before the lease is its own.
    TargetRunsBeforeHandOver,
    /// A failed hand-over resumes the source although the outcome is unknown.
    SourceResumesWhenUncertain,
    /// A host without quorum may fence.
    FenceWithoutQuorum,
    /// The coordinator keeps its role after its key's lease has run out.
    CoordinatorNeverStepsDown,
    /// State is written without the coordinator's token.
    WriteWithoutToken,
    /// Admission ignores the reserve for failed hosts.
    AdmissionIgnoresReserve,
    /// Restarts have neither a limit nor a back-off.
    NoRestartLimit,
    /// Failed hosts are never fenced nor their VMs restarted.
    FailureIgnored,
    /// A host that comes back counts as isolated since its former life was.
    IsolationOutlivesReboot,
    /// VMs are started although the cluster is shut down.
    HaltIgnored,
    /// A guest that has stopped sending heartbeats is left alone.
    HeartbeatLossIgnored,
    /// A VM whose disks complete nothing is left alone.
    StallIgnored,
    /// A guest that sends no heartbeats counts as failed although its disks complete requests.
    ProgressIgnored,
    /// The time in which an agent was stopped counts as silence of its guests.
    ObserverPauseCounts,
    /// The lock manager grants a conversion although other hosts have modes in its way.
    ConversionIgnoresOthers,
    /// A claim to master a name is kept although a lower host claims it too.
    ClaimNeverYields,
    /// Messages of a former view are believed.
    OldViewAccepted,
    /// A value block counts as valid although its last writer may have died.
    ValueOfTheDeadTrusted,
    /// The first part of what a host tells in a new view is taken for all of it.
    HalfRecoveryUsed,
}

impl Mutant {
    /// The planted bugs of the distributed lock manager, which has a simulator of its own.
    pub const DLM: [Mutant; 5] = [
        Mutant::ConversionIgnoresOthers,
        Mutant::ClaimNeverYields,
        Mutant::OldViewAccepted,
        Mutant::ValueOfTheDeadTrusted,
        Mutant::HalfRecoveryUsed,
    ];

    /// The planted bugs of the lock that only a storm of contending hosts shows; the lock's own tests find them.
    pub const LOCK: [Mutant; 4] = [
        Mutant::NoSecondPhaseCheck,
        Mutant::BallotIgnoresAccepted,
        Mutant::NoReleasedFlag,
        Mutant::SourceResumesWhenUncertain,
    ];

    /// The planted bugs that the simulator of whole clusters finds.
    pub const CLUSTER: [Mutant; 21] = [
        Mutant::RenewalCountedFromCompletion,
        Mutant::GenerationNotRaised,
        Mutant::DeadTimeWithoutWatchdog,
        Mutant::DeadTimeWithoutWatchdogDevice,
        Mutant::WatchdogAlwaysFed,
        Mutant::NoKillOnExpiry,
        Mutant::FenceTrustsExitStatus,
        Mutant::OwnerLivenessIgnored,
        Mutant::TargetRunsBeforeHandOver,
        Mutant::FenceWithoutQuorum,
        Mutant::CoordinatorNeverStepsDown,
        Mutant::WriteWithoutToken,
        Mutant::AdmissionIgnoresReserve,
        Mutant::NoRestartLimit,
        Mutant::FailureIgnored,
        Mutant::IsolationOutlivesReboot,
        Mutant::HaltIgnored,
        Mutant::HeartbeatLossIgnored,
        Mutant::StallIgnored,
        Mutant::ProgressIgnored,
        Mutant::ObserverPauseCounts,
    ];
}

#[cfg(any(test, feature = "mutants"))]
mod switch {
    use super::Mutant;
    use core::cell::Cell;

    thread_local! {
        static ACTIVE: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    /// Plants `mutant` in the current thread's state machines (or none).
    pub fn plant(mutant: Option<Mutant>) {
        ACTIVE.set(mutant);
    }

    pub(crate) fn active(mutant: Mutant) -> bool {
        ACTIVE.get() == Some(mutant)
    }
}

#[cfg(any(test, feature = "mutants"))]
pub(crate) use switch::active;
#[cfg(any(test, feature = "mutants"))]
pub use switch::plant;

/// Without the feature `mutants` nothing can be planted.
#[cfg(all(feature = "sim", not(any(test, feature = "mutants"))))]
pub(crate) fn plant(mutant: Option<Mutant>) {
    assert!(mutant.is_none(), "planting a bug needs the feature mutants");
}

#[cfg(not(any(test, feature = "mutants")))]
#[inline(always)]
pub(crate) const fn active(_: Mutant) -> bool {
    false
}

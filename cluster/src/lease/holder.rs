//! The host's own delta lease: taking, renewing, losing and releasing it.

use super::{DeltaRecord, IoFailed, OpId, Timing};
use crate::mutants::{self, Mutant};
use crate::ondisk::Name;
use crate::types::{Generation, HostId, Time};

/// Who holds the lease, and its timers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseConfig {
    /// The host's number: it selects the sector.
    pub host: HostId,
    /// The host's name: a sector that carries it is ours from a former life.
    pub name: Name,
    /// The timers.
    pub timing: Timing,
}

/// What happens to a [`LeaseHolder`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseInput {
    /// Take the lease.
    Acquire,
    /// Give the lease back; only when nothing depends on it any more.
    Release,
    /// Time has passed.
    Tick,
    /// A read of the own sector ended.
    Read {
        /// The request.
        op: OpId,
        /// What the sector holds.
        result: Result<DeltaRecord, IoFailed>,
    },
    /// A write of the own sector ended.
    Wrote {
        /// The request.
        op: OpId,
        /// Whether it is on disk.
        result: Result<(), IoFailed>,
    },
}

/// Why a lease is not, or no longer, held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LossReason {
    /// Another, living host uses the number.
    #[error("Another host uses this host number; give each host its own")]
    NumberInUse,
    /// No renewal succeeded in time.
    #[error("The lease expired because the volume did not answer in time")]
    Expired,
}

/// What a [`LeaseHolder`] asks for or announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseOutput {
    /// Read the own sector.
    Read {
        /// Names the request.
        op: OpId,
    },
    /// Write the own sector.
    Write {
        /// Names the request.
        op: OpId,
        /// What to write.
        record: DeltaRecord,
    },
    /// The lease is held from now on.
    Acquired {
        /// The generation of this life.
        generation: Generation,
    },
    /// The lease was renewed.
    Renewed,
    /// No renewal succeeded for `6 * io_timeout`.
    Warning,
    /// The lease is gone: stop everything that depends on it. The holder takes the lease anew by itself.
    Lost(LossReason),
    /// The lease was given back.
    Released,
    /// Call with [`LeaseInput::Tick`] at this time at the latest.
    WakeAt(Time),
}

/// What the rest of the host asks about its lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LeaseStatus {
    /// Not held.
    #[default]
    None,
    /// Held.
    Held {
        /// The generation of this life.
        generation: Generation,
        /// When the lease expires unless it is renewed before.
        expires: Time,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    /// Reading the sector for the first time, or again after a failure.
    Inspect,
    /// A stranger holds the number: wait to see whether its sector changes.
    Watch {
        seen: DeltaRecord,
        until: Time,
    },
    /// Claim written at `submitted`; not yet confirmed.
    Claim {
        record: DeltaRecord,
        submitted: Time,
    },
    /// Claim on disk; wait for rivals and late writes, then read it back.
    Settle {
        record: DeltaRecord,
        submitted: Time,
        until: Time,
    },
    Held(Held),
    Releasing {
        record: DeltaRecord,
        retry_at: Time,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    record: DeltaRecord,
    /// Submission of the last write that succeeded.
    last_ok: Time,
    /// Start of the last attempt to renew.
    last_try: Time,
    warned: bool,
    /// Submission of the write in flight.
    submitted: Time,
}

/// Holds one host's delta lease in one lockspace.
#[derive(Clone, Debug)]
pub struct LeaseHolder {
    config: LeaseConfig,
    phase: Phase,
    op: OpId,
    /// A request is in flight since then.
    pending: Option<Time>,
    /// The highest generation ever seen or used in the own sector.
    top_generation: Generation,
    /// After a lost lease: take it again.
    wanted: bool,
}

impl LeaseHolder {
    /// A holder without a lease.
    pub fn new(config: LeaseConfig) -> Self {
        LeaseHolder { config, phase: Phase::Idle, op: 0, pending: None, top_generation: 0, wanted: false }
    }

    /// Whether the lease is held, and until when.
    pub fn status(&self) -> LeaseStatus {
        match self.phase {
            Phase::Held(h) => LeaseStatus::Held {
                generation: h.record.generation,
                expires: h.last_ok + self.config.timing.fail(),
            },
            _ => LeaseStatus::None,
        }
    }

    /// Whether the lease is held and far enough from expiry to act on it.
    pub fn is_fresh(&self, now: Time) -> bool {
        match self.status() {
            LeaseStatus::Held { expires, .. } => now < expires - self.config.timing.margin(),
            LeaseStatus::None => false,
        }
    }

    /// Advances the lease by one input.
    pub fn step(&mut self, now: Time, input: LeaseInput, out: &mut Vec<LeaseOutput>) {
        match input {
            LeaseInput::Acquire => {
                self.wanted = true;
                if self.phase == Phase::Idle {
                    self.inspect(now, out);
                }
            }
            LeaseInput::Release => self.release(now, out),
            LeaseInput::Read { op, result } if op == self.op && self.pending.is_some() => {
                self.pending = None;
                self.on_read(now, result, out);
            }
            LeaseInput::Wrote { op, result } if op == self.op && self.pending.is_some() => {
                self.pending = None;
                self.on_wrote(now, result, out);
            }
            // Completions of requests that were given up.
            LeaseInput::Read { .. } | LeaseInput::Wrote { .. } => {}
            LeaseInput::Tick => {}
        }
        self.on_time(now, out);
        if let Some(at) = self.next_wake() {
            out.push(LeaseOutput::WakeAt(at));
        }
    }

    fn read(&mut self, now: Time, out: &mut Vec<LeaseOutput>) {
        self.op += 1;
        self.pending = Some(now);
        out.push(LeaseOutput::Read { op: self.op });
    }

    fn write(&mut self, now: Time, record: DeltaRecord, out: &mut Vec<LeaseOutput>) {
        self.op += 1;
        self.pending = Some(now);
        out.push(LeaseOutput::Write { op: self.op, record });
    }

    fn inspect(&mut self, now: Time, out: &mut Vec<LeaseOutput>) {
        self.phase = Phase::Inspect;
        self.read(now, out);
    }

    fn stamp(&self, now: Time, generation: Generation) -> DeltaRecord {
        DeltaRecord {
            owner: self.config.host,
            generation,
            timestamp: (now.0 / 1000).max(1),
            name: self.config.name,
            io_timeout: self.config.timing.io_timeout,
        }
    }

    fn claim(&mut self, now: Time, out: &mut Vec<LeaseOutput>) {
        let rise = u64::from(!mutants::active(Mutant::GenerationNotRaised) || self.top_generation == 0);
        self.top_generation += rise;
        let record = self.stamp(now, self.top_generation);
        self.phase = Phase::Claim { record, submitted: now };
        self.write(now, record, out);
    }

    fn on_read(&mut self, now: Time, result: Result<DeltaRecord, IoFailed>, out: &mut Vec<LeaseOutput>) {
        let Ok(seen) = result else { return self.io_failed(now, out) };
        let ours = seen.owner == self.config.host && seen.name == self.config.name;
        match self.phase {
            Phase::Inspect => {
                self.top_generation = self.top_generation.max(seen.generation);
                if seen.is_free() || ours {
                    self.claim(now, out);
                } else {
                    let timing = Timing { io_timeout: seen.io_timeout.max(1), ..self.config.timing };
                    let wait = timing.dead().max(timing.fail());
                    self.phase = Phase::Watch { seen, until: now + wait };
                }
            }
            Phase::Watch { seen: before, .. } => {
                self.top_generation = self.top_generation.max(seen.generation);
                if seen == before || seen.is_free() {
                    self.claim(now, out);
                } else {
                    out.push(LeaseOutput::Lost(LossReason::NumberInUse));
                    self.wanted = false;
                    self.phase = Phase::Idle;
                }
            }
            Phase::Settle { record, submitted, .. } => {
                if seen == record {
                    self.phase = Phase::Held(Held {
                        record,
                        last_ok: submitted,
                        last_try: submitted,
                        warned: false,
                        submitted,
                    });
                    out.push(LeaseOutput::Acquired { generation: record.generation });
                } else {
                    // A rival, or a late write of our former life: look again.
                    self.inspect(now, out);
                }
            }
            Phase::Held(mut held) => {
                if !ours && !seen.is_free() {
                    self.lose(LossReason::NumberInUse, now, out);
                    self.wanted = false;
                    return;
                }
                // A late write of a former life or a former renewal may have landed: write ours over it.
                let record = self.stamp(now, held.record.generation);
                held.submitted = now;
                self.phase = Phase::Held(held);
                self.write(now, record, out);
            }
            Phase::Idle | Phase::Claim { .. } | Phase::Releasing { .. } => {}
        }
    }

    fn on_wrote(&mut self, now: Time, result: Result<(), IoFailed>, out: &mut Vec<LeaseOutput>) {
        if result.is_err() {
            return self.io_failed(now, out);
        }
        match self.phase {
            Phase::Claim { record, submitted } => {
                self.phase =
                    Phase::Settle { record, submitted, until: submitted + self.config.timing.drain() };
            }
            Phase::Held(mut held) => {
                held.last_ok = held.submitted;
                if mutants::active(Mutant::RenewalCountedFromCompletion) {
                    held.last_ok = now;
                }
                held.warned = false;
                held.record.timestamp = (held.submitted.0 / 1000).max(1);
                self.phase = Phase::Held(held);
                out.push(LeaseOutput::Renewed);
            }
            Phase::Releasing { .. } => {
                self.phase = Phase::Idle;
                out.push(LeaseOutput::Released);
            }
            Phase::Idle | Phase::Inspect | Phase::Watch { .. } | Phase::Settle { .. } => {}
        }
    }

    /// A request failed or took too long. A write may still land, so a claim starts over from a read.
    fn io_failed(&mut self, now: Time, _out: &mut Vec<LeaseOutput>) {
        self.pending = None;
        match self.phase {
            Phase::Held(mut held) => {
                // Try again soon rather than a whole renewal interval later.
                held.last_try = (now + self.config.timing.io() / 2) - self.config.timing.renew();
                self.phase = Phase::Held(held);
            }
            Phase::Releasing { record, .. } => {
                self.phase = Phase::Releasing { record, retry_at: now + self.config.timing.io() / 2 };
            }
            Phase::Watch { seen, until } => {
                self.phase = Phase::Watch { seen, until: until.max(now + self.config.timing.io() / 2) };
            }
            Phase::Claim { submitted, .. } | Phase::Settle { submitted, .. } => {
                // Wait until the lost write can no longer land, then look again.
                let until = (submitted + self.config.timing.drain()).max(now);
                self.phase = Phase::Settle { record: DeltaRecord::default(), submitted, until };
            }
            Phase::Inspect | Phase::Idle => {}
        }
    }

    fn lose(&mut self, reason: LossReason, _now: Time, out: &mut Vec<LeaseOutput>) {
        out.push(LeaseOutput::Lost(reason));
        self.pending = None;
        self.phase = Phase::Idle;
    }

    fn release(&mut self, now: Time, out: &mut Vec<LeaseOutput>) {
        self.wanted = false;
        match self.phase {
            Phase::Held(held) => {
                let record = DeltaRecord { timestamp: 0, ..held.record };
                self.phase = Phase::Releasing { record, retry_at: Time(u64::MAX) };
                self.write(now, record, out);
            }
            Phase::Releasing { .. } => {}
            _ => {
                self.pending = None;
                self.phase = Phase::Idle;
                out.push(LeaseOutput::Released);
            }
        }
    }

    fn on_time(&mut self, now: Time, out: &mut Vec<LeaseOutput>) {
        let timing = self.config.timing;
        if self.pending.is_some_and(|since| now >= since + timing.io()) {
            self.io_failed(now, out);
        }
        if let Phase::Held(mut held) = self.phase {
            if now >= held.last_ok + timing.fail() - timing.margin() {
                self.lose(LossReason::Expired, now, out);
            } else if now >= held.last_ok + timing.warn() && !held.warned {
                held.warned = true;
                self.phase = Phase::Held(held);
                out.push(LeaseOutput::Warning);
            }
        }
        if self.pending.is_some() {
            return;
        }
        match self.phase {
            // A lost lease is retaken by `Acquire`, once nothing of the former generation is left.
            Phase::Idle => {}
            Phase::Inspect => self.read(now, out),
            Phase::Watch { until, .. } | Phase::Settle { until, .. } if now >= until => self.read(now, out),
            Phase::Watch { .. } | Phase::Settle { .. } | Phase::Claim { .. } => {}
            Phase::Held(mut held) => {
                if now >= held.last_try + timing.renew() {
                    held.last_try = now;
                    self.phase = Phase::Held(held);
                    self.read(now, out);
                }
            }
            Phase::Releasing { record, retry_at } => {
                if now >= retry_at {
                    self.write(now, record, out);
                }
            }
        }
    }

    fn next_wake(&self) -> Option<Time> {
        let timing = self.config.timing;
        let io = self.pending.map(|since| since + timing.io());
        let phase = match self.phase {
            Phase::Idle | Phase::Inspect | Phase::Claim { .. } => None,
            Phase::Watch { until, .. } | Phase::Settle { until, .. } => {
                if self.pending.is_some() {
                    None
                } else {
                    Some(until)
                }
            }
            Phase::Held(h) => {
                let expiry = h.last_ok + timing.fail() - timing.margin();
                let warn = if h.warned { expiry } else { (h.last_ok + timing.warn()).min(expiry) };
                Some(if self.pending.is_some() { warn } else { warn.min(h.last_try + timing.renew()) })
            }
            Phase::Releasing { retry_at, .. } => (self.pending.is_none()).then_some(retry_at),
        };
        match (io, phase) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Whether a lost lease is waiting for [`LeaseInput::Acquire`].
    pub fn is_idle(&self) -> bool {
        self.phase == Phase::Idle
    }

    /// Whether the lease was asked for and not given back.
    pub fn is_wanted(&self) -> bool {
        self.wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(host: u16, name: &str) -> LeaseHolder {
        let timing = Timing { io_timeout: 10, watchdog: 60 };
        LeaseHolder::new(LeaseConfig { host: HostId(host), name: Name::new(name).unwrap(), timing })
    }

    /// Drives a holder against a one-sector disk until `end`, answering each request at once.
    fn run(h: &mut LeaseHolder, disk: &mut DeltaRecord, from: u64, end: u64, ok: bool) -> Vec<LeaseOutput> {
        let mut seen = Vec::new();
        for s in from..end {
            let now = Time(s * 1000);
            let mut queue = vec![LeaseInput::Tick];
            while let Some(input) = queue.pop() {
                let mut out = Vec::new();
                h.step(now, input, &mut out);
                for o in out {
                    match o {
                        LeaseOutput::Read { op } => queue.push(LeaseInput::Read {
                            op,
                            result: if ok { Ok(*disk) } else { Err(IoFailed) },
                        }),
                        LeaseOutput::Write { op, record } => {
                            if ok {
                                *disk = record;
                            }
                            queue.push(LeaseInput::Wrote {
                                op,
                                result: if ok { Ok(()) } else { Err(IoFailed) },
                            });
                        }
                        LeaseOutput::WakeAt(_) => {}
                        other => seen.push(other),
                    }
                }
            }
        }
        seen
    }

    #[test]
    fn a_free_sector_is_taken_in_two_io_timeouts_renewed_and_released() {
        let (mut h, mut disk) = (holder(3, "a"), DeltaRecord::default());
        let mut out = Vec::new();
        h.step(Time(1000), LeaseInput::Acquire, &mut out);
        let events = run(&mut h, &mut disk, 1, 1, true);
        assert!(events.is_empty());
        // The first read was asked for by Acquire.
        h.step(Time(1000), LeaseInput::Read { op: 1, result: Ok(disk) }, &mut out);
        let Some(LeaseOutput::Write { op, record }) =
            out.iter().copied().find(|o| matches!(o, LeaseOutput::Write { .. }))
        else {
            panic!("no claim")
        };
        disk = record;
        h.step(Time(1000), LeaseInput::Wrote { op, result: Ok(()) }, &mut out);
        let events = run(&mut h, &mut disk, 1, 21, true);
        assert_eq!(events, []);
        let events = run(&mut h, &mut disk, 21, 100, true);
        assert_eq!(events[0], LeaseOutput::Acquired { generation: 1 });
        assert!(events.iter().filter(|e| **e == LeaseOutput::Renewed).count() >= 3);
        h.step(Time(100_000), LeaseInput::Release, &mut out);
        h.step(Time(100_000), LeaseInput::Wrote { op: h.op, result: Ok(()) }, &mut out);
        assert!(out.contains(&LeaseOutput::Released));
    }

    fn acquired(name: &str, disk: &mut DeltaRecord) -> LeaseHolder {
        let mut h = holder(3, name);
        h.wanted = true;
        h.phase = Phase::Inspect;
        let events = run(&mut h, disk, 1, 23, true);
        assert!(matches!(events[0], LeaseOutput::Acquired { .. }), "{events:?}");
        h
    }

    #[test]
    fn a_volume_that_fails_warns_and_then_expires_the_lease_before_eight_io_timeouts() {
        let mut disk = DeltaRecord::default();
        let mut h = acquired("a", &mut disk);
        let LeaseStatus::Held { expires, .. } = h.status() else { panic!("not held") };
        let events = run(&mut h, &mut disk, 23, expires.0 / 1000, false);
        assert_eq!(events, [LeaseOutput::Warning, LeaseOutput::Lost(LossReason::Expired)]);
        assert_eq!(h.status(), LeaseStatus::None);
    }

    #[test]
    fn a_restarted_host_takes_its_sector_at_once_with_a_higher_generation() {
        let mut disk = DeltaRecord::default();
        acquired("a", &mut disk);
        let h = acquired("a", &mut disk);
        assert!(matches!(h.status(), LeaseStatus::Held { generation: 2, .. }));
    }

    #[test]
    fn a_strangers_sector_is_taken_only_after_the_dead_time_and_never_while_it_lives() {
        let mut disk = DeltaRecord::default();
        acquired("a", &mut disk);
        let mut h = holder(3, "b");
        h.phase = Phase::Inspect;
        assert_eq!(run(&mut h, &mut disk, 1, 140, true), []);
        assert_eq!(run(&mut h, &mut disk, 140, 163, true)[0], LeaseOutput::Acquired { generation: 2 });

        let mut c = holder(3, "c");
        c.phase = Phase::Inspect;
        run(&mut c, &mut disk, 1, 2, true);
        run(&mut h, &mut disk, 163, 190, true);
        assert_eq!(run(&mut c, &mut disk, 2, 150, true), [LeaseOutput::Lost(LossReason::NumberInUse)]);
    }
}

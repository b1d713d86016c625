//! The locker against an in-memory area, several hosts interleaved.

use super::*;
use crate::lease::{IoFailed, Timing};
use crate::ondisk::HostBlock;
use crate::types::{Time, Token};
use proptest::prelude::*;
use std::collections::HashSet;

/// Everything one test host believes.
#[derive(Clone, Default)]
struct Ctx {
    generation: Generation,
    gone: HashSet<Incarnation>,
}

impl LockContext for Ctx {
    fn owner(&self, owner: Incarnation) -> OwnerState {
        if self.gone.contains(&owner) { OwnerState::Gone } else { OwnerState::Alive }
    }
    fn fresh_generation(&self) -> Option<Generation> {
        (self.generation > 0).then_some(self.generation)
    }
}

struct Area {
    leader: Leader,
    blocks: Vec<HostBlock>,
}

struct Host {
    id: HostId,
    locker: Locker,
    ctx: Ctx,
    todo: Vec<LockOutput>,
    events: Vec<LockOutput>,
}

impl Host {
    fn new(id: u16) -> Self {
        let timing = Timing::default();
        Host {
            id: HostId(id),
            locker: Locker::new(HostId(id), timing),
            ctx: Ctx { generation: 1, ..Ctx::default() },
            todo: vec![],
            events: vec![],
        }
    }

    fn input(&mut self, now: u64, input: LockInput) {
        let mut out = Vec::new();
        self.locker.step(Time(now), input, &self.ctx, &mut out);
        for o in out {
            match o {
                LockOutput::WakeAt(_) => {}
                LockOutput::Acquired(_)
                | LockOutput::Denied(_)
                | LockOutput::Released
                | LockOutput::HandedOver(_)
                | LockOutput::HandOverFailed { .. } => self.events.push(o),
                io => self.todo.push(io),
            }
        }
    }

    /// Serves the oldest request.
    fn serve(&mut self, now: u64, area: &mut Area) -> bool {
        if self.todo.is_empty() {
            return false;
        }
        let input = match self.todo.remove(0) {
            LockOutput::ReadLeader { op } => LockInput::LeaderRead { op, result: Ok(area.leader) },
            LockOutput::ReadBlocks { op } => LockInput::BlocksRead { op, result: Ok(area.blocks.clone()) },
            LockOutput::WriteBlock { op, block } => {
                area.blocks[usize::from(self.id.0) - 1] = block;
                LockInput::Wrote { op, result: Ok(()) }
            }
            LockOutput::WriteLeader { op, leader } => {
                area.leader = leader;
                LockInput::Wrote { op, result: Ok(()) }
            }
            other => panic!("not a request: {other:?}"),
        };
        self.input(now, input);
        true
    }

    fn finish(&mut self, now: u64, area: &mut Area) -> LockOutput {
        for t in now.. {
            self.input(t, LockInput::Tick);
            while self.serve(t, area) {}
            if let Some(e) = self.events.pop() {
                return e;
            }
        }
        unreachable!()
    }
}

fn area() -> Area {
    Area { leader: Leader::default(), blocks: vec![HostBlock::default(); 4] }
}

fn token(o: LockOutput) -> Token {
    match o {
        LockOutput::Acquired(t) | LockOutput::HandedOver(t) => t,
        other => panic!("no token: {other:?}"),
    }
}

#[test]
fn take_deny_release_take() {
    let (mut a, mut b, mut disk) = (Host::new(1), Host::new(2), area());
    a.input(0, LockInput::Acquire(LockMode::Exclusive));
    let first = token(a.finish(0, &mut disk));
    assert_eq!(first.lver, 1);
    b.input(0, LockInput::Acquire(LockMode::Exclusive));
    assert_eq!(b.finish(0, &mut disk), LockOutput::Denied(DenyReason::Held(first.owner)));
    a.input(1, LockInput::Release);
    assert_eq!(a.finish(1, &mut disk), LockOutput::Released);
    b.input(2, LockInput::Acquire(LockMode::Exclusive));
    assert!(token(b.finish(2, &mut disk)) > first);
}

#[test]
fn a_gone_owner_is_replaced_and_a_late_leader_write_does_no_harm() {
    use crate::mutants::{Mutant, plant};
    assert!(late_leader_write_is_harmless());
    plant(Some(Mutant::NoReleasedFlag));
    let harmless = late_leader_write_is_harmless();
    plant(None);
    assert!(!harmless, "NoReleasedFlag was not found");
}

/// Whether a released lock can be taken although an old leader record landed on the new one.
fn late_leader_write_is_harmless() -> bool {
    let (mut a, mut b, mut c, mut disk) = (Host::new(1), Host::new(2), Host::new(3), area());
    a.input(0, LockInput::Acquire(LockMode::Exclusive));
    let first = token(a.finish(0, &mut disk));
    let stale = disk.leader;
    b.ctx.gone.insert(first.owner);
    c.ctx.gone.insert(first.owner);
    b.input(1, LockInput::Acquire(LockMode::Exclusive));
    let second = token(b.finish(1, &mut disk));
    assert!(second > first);
    disk.leader = stale;
    c.input(2, LockInput::Acquire(LockMode::Exclusive));
    assert_eq!(c.finish(2, &mut disk), LockOutput::Denied(DenyReason::Held(second.owner)));
    b.input(3, LockInput::Release);
    b.finish(3, &mut disk);
    disk.leader = stale;
    c.input(4, LockInput::Acquire(LockMode::Exclusive));
    matches!(c.finish(4, &mut disk), LockOutput::Acquired(t) if t > second)
}

#[test]
fn shared_and_exclusive_exclude_each_other() {
    let (mut a, mut b, mut c, mut disk) = (Host::new(1), Host::new(2), Host::new(3), area());
    for h in [&mut a, &mut b] {
        h.input(0, LockInput::Acquire(LockMode::Shared));
        token(h.finish(0, &mut disk));
    }
    c.input(1, LockInput::Acquire(LockMode::Exclusive));
    assert!(matches!(c.finish(1, &mut disk), LockOutput::Denied(DenyReason::HeldShared(_))));
    a.input(2, LockInput::Release);
    assert_eq!(a.finish(2, &mut disk), LockOutput::Released);
    c.ctx.gone.insert(Incarnation { host: HostId(2), generation: 1 });
    c.input(3, LockInput::Acquire(LockMode::Exclusive));
    token(c.finish(3, &mut disk));
    a.input(4, LockInput::Acquire(LockMode::Shared));
    assert!(matches!(a.finish(4, &mut disk), LockOutput::Denied(DenyReason::Held(_))));
}

#[test]
fn a_hand_over_moves_the_lock_without_a_gap() {
    let (mut a, mut b, mut c, mut disk) = (Host::new(1), Host::new(2), Host::new(3), area());
    a.input(0, LockInput::Acquire(LockMode::Exclusive));
    let first = token(a.finish(0, &mut disk));
    let to = Incarnation { host: HostId(2), generation: 1 };
    a.input(1, LockInput::HandOver(to));
    let second = token(a.finish(1, &mut disk));
    assert!(second > first && second.owner == to);
    c.input(2, LockInput::Acquire(LockMode::Exclusive));
    assert_eq!(c.finish(2, &mut disk), LockOutput::Denied(DenyReason::Held(to)));
    b.input(3, LockInput::Acquire(LockMode::Exclusive));
    assert!(token(b.finish(3, &mut disk)) > second);
}

#[test]
fn a_hand_over_leaves_the_lock_only_before_its_first_write() {
    for (served, still_ours) in [(0, true), (1, false), (2, false), (3, false), (4, false), (5, false)] {
        let (mut a, mut disk) = (Host::new(1), area());
        a.input(0, LockInput::Acquire(LockMode::Exclusive));
        a.finish(0, &mut disk);
        a.input(1, LockInput::HandOver(Incarnation { host: HostId(2), generation: 1 }));
        for _ in 0..served {
            a.serve(1, &mut disk);
        }
        let input = match a.todo.remove(0) {
            LockOutput::WriteBlock { op, .. } | LockOutput::WriteLeader { op, .. } => {
                LockInput::Wrote { op, result: Err(IoFailed) }
            }
            LockOutput::ReadBlocks { op } => LockInput::BlocksRead { op, result: Err(IoFailed) },
            other => panic!("expected I/O: {other:?}"),
        };
        a.input(2, input);
        assert_eq!(a.events.pop(), Some(LockOutput::HandOverFailed { still_ours }));
        assert_eq!(a.locker.held().is_some(), still_ours);
    }
}

/// A host that read the leader record before the owner took the lock may vote for the version that the
/// owner's hand-over opens; the owner must then not resume.
#[test]
fn a_contender_with_an_old_leader_record_never_shares_a_lock_with_a_failed_hand_over() {
    let (mut a, mut b, mut disk) = (Host::new(1), Host::new(2), area());
    b.input(0, LockInput::Acquire(LockMode::Exclusive));
    b.serve(0, &mut disk);
    a.input(0, LockInput::Acquire(LockMode::Exclusive));
    a.finish(0, &mut disk);
    a.input(1, LockInput::HandOver(Incarnation { host: HostId(2), generation: 1 }));
    a.serve(1, &mut disk);
    a.serve(1, &mut disk);
    b.serve(1, &mut disk);
    b.serve(1, &mut disk);
    assert_eq!(a.finish(1, &mut disk), LockOutput::HandOverFailed { still_ours: false });
    token(b.finish(1, &mut disk));
    assert!(b.locker.held().is_some() && a.locker.held().is_none());
}

#[test]
fn nothing_is_written_without_a_fresh_lease_or_while_a_lost_write_may_land() {
    let (mut a, mut disk) = (Host::new(1), area());
    a.ctx.generation = 0;
    a.input(0, LockInput::Acquire(LockMode::Exclusive));
    assert_eq!(a.events.pop(), Some(LockOutput::Denied(DenyReason::NoLease)));
    a.ctx.generation = 1;
    a.input(0, LockInput::Acquire(LockMode::Exclusive));
    a.serve(0, &mut disk);
    a.serve(0, &mut disk);
    a.ctx.generation = 0;
    a.serve(0, &mut disk);
    a.serve(0, &mut disk);
    assert_eq!(a.events.pop(), Some(LockOutput::Denied(DenyReason::NoLease)));
    a.ctx.generation = 2;
    a.input(0, LockInput::Acquire(LockMode::Exclusive));
    a.serve(0, &mut disk);
    a.serve(0, &mut disk);
    let Some(LockOutput::WriteBlock { op, .. }) = a.todo.pop() else { panic!("no write") };
    a.input(5, LockInput::Wrote { op, result: Err(IoFailed) });
    assert_eq!(a.events.pop(), Some(LockOutput::Denied(DenyReason::Io)));
    a.input(6, LockInput::Acquire(LockMode::Exclusive));
    assert!(a.todo.is_empty());
    a.input(5 + Timing::default().drain(), LockInput::Tick);
    assert_eq!(a.todo.len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// Any interleaving of four hosts' I/O has at most one owner, and versions rise.
    #[test]
    fn contenders_never_share_a_lock(schedule in proptest::collection::vec((0usize..4, any::<u8>()), 50..400)) {
        let mut disk = area();
        let mut hosts: Vec<_> = (1..=4).map(Host::new).collect();
        let mut last = 0;
        for (i, (who, what)) in schedule.into_iter().enumerate() {
            let now = i as u64 * 50;
            let h = &mut hosts[who];
            if !h.serve(now, &mut disk) {
                if h.locker.held().is_some() {
                    if what < 100 { h.input(now, LockInput::Release); }
                } else if h.locker.is_idle() {
                    h.input(now, LockInput::Acquire(LockMode::Exclusive));
                } else {
                    h.input(now, LockInput::Tick);
                }
            }
            for e in hosts[who].events.drain(..) {
                if let LockOutput::Acquired(t) = e {
                    prop_assert!(t.lver > last, "{} after {last}", t.lver);
                    last = t.lver;
                }
            }
            prop_assert!(hosts.iter().filter(|h| h.locker.held().is_some()).count() <= 1);
        }
    }
}

/// A storm of four hosts over one lock: interleaved I/O, writes whose completion is lost or that land late
/// (even after the host's end), hosts that end and come back. True when two hosts held the lock at once or
/// a token did not rise.
fn storm(seed: u64) -> bool {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = move |n: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % n
    };
    let mut disk = area();
    let mut hosts: Vec<_> = (1..=4).map(Host::new).collect();
    let mut late: Vec<(u64, HostId, LockOutput)> = Vec::new();
    let mut using: [Option<Token>; 4] = [None; 4];
    let mut last = 0;
    for step in 0..1500u64 {
        let now = step * 100;
        late.retain(|(at, host, write)| {
            let due = *at <= now;
            match *write {
                LockOutput::WriteBlock { block, .. } if due => disk.blocks[usize::from(host.0) - 1] = block,
                LockOutput::WriteLeader { leader, .. } if due => disk.leader = leader,
                _ => {}
            }
            !due
        });
        let i = random(4) as usize;
        match random(100) {
            // The host ends; everyone learns of it once its late writes have drained.
            0 if late.is_empty() => {
                let ended = Incarnation { host: hosts[i].id, generation: hosts[i].ctx.generation };
                if let Some(w @ (LockOutput::WriteLeader { .. } | LockOutput::WriteBlock { .. })) =
                    hosts[i].todo.first()
                {
                    let after = if matches!(w, LockOutput::WriteLeader { .. }) { 20_000 } else { 0 };
                    late.push((now + random(after + 1), hosts[i].id, *w));
                }
                let mut fresh = Host::new(hosts[i].id.0);
                fresh.ctx.generation = ended.generation + 1;
                fresh.ctx.gone = hosts[i].ctx.gone.clone();
                hosts[i] = fresh;
                using[i] = None;
                for h in &mut hosts {
                    h.ctx.gone.insert(ended);
                }
                continue;
            }
            // A write's completion is lost.
            1..=3 => {
                if let Some(w @ (LockOutput::WriteLeader { op, .. } | LockOutput::WriteBlock { op, .. })) =
                    hosts[i].todo.first().copied()
                {
                    hosts[i].todo.remove(0);
                    late.push((now + random(Timing::default().drain()), hosts[i].id, w));
                    hosts[i].input(now, LockInput::Wrote { op, result: Err(IoFailed) });
                }
            }
            _ => {
                if !hosts[i].serve(now, &mut disk) {
                    let idle = hosts[i].locker.is_idle();
                    let input = if hosts[i].locker.held().is_some() {
                        match random(10) {
                            0 => LockInput::Release,
                            1 => {
                                let to = random(4) as usize;
                                using[i] = None;
                                let generation = hosts[to].ctx.generation;
                                LockInput::HandOver(Incarnation { host: hosts[to].id, generation })
                            }
                            _ => continue,
                        }
                    } else if idle {
                        LockInput::Acquire(LockMode::Exclusive)
                    } else {
                        LockInput::Tick
                    };
                    if input == LockInput::Release {
                        using[i] = None;
                    }
                    hosts[i].input(now, input);
                }
            }
        }
        for e in hosts[i].events.drain(..) {
            match e {
                LockOutput::Acquired(t) => {
                    if t.lver <= last {
                        return true;
                    }
                    last = t.lver;
                    using[i] = Some(t);
                }
                // The source goes on with what it had.
                LockOutput::HandOverFailed { still_ours: true } => using[i] = Some(Token::default()),
                _ => {}
            }
        }
        if using.iter().flatten().count() > 1 {
            return true;
        }
    }
    false
}

#[test]
fn storms_hold_and_planted_bugs_are_found() {
    use crate::mutants::{Mutant, plant};
    for seed in 0..1500 {
        assert!(!storm(seed), "seed {seed}");
    }
    for mutant in [
        Mutant::NoSecondPhaseCheck,
        Mutant::BallotIgnoresAccepted,
        Mutant::SourceResumesWhenUncertain,
        Mutant::OwnerLivenessIgnored,
    ] {
        plant(Some(mutant));
        let found = (0..1500).any(storm);
        plant(None);
        assert!(found, "{mutant:?} was not found");
    }
}

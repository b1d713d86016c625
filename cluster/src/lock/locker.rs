//! One resource lease as one host sees it.

use super::ballot::{self, Verdict};
use super::io::{DenyReason, LockInput, LockMode, LockOutput};
use super::{Leader, LockContext, OwnerState};
use crate::lease::{IoFailed, OpId, Timing};
use crate::mutants::{self, Mutant};
use crate::ondisk::{DBlock, HostBlock, ModeBlock};
use crate::types::{Generation, HostId, Incarnation, Time, Token};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Goal {
    Acquire(LockMode),
    /// Once `opened`, the own block no longer proves the ownership of `held` and others may vote for its
    /// successor: there is no way back.
    HandOver {
        to: Incarnation,
        opened: bool,
        held: Token,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    Idle,
    /// Wait (quarantine or a lost ballot), then read the leader.
    Wait {
        goal: Goal,
        until: Time,
    },
    Leader {
        goal: Goal,
    },
    Blocks {
        goal: Goal,
        leader: Leader,
    },
    FirstWrite {
        goal: Goal,
        mine: DBlock,
    },
    FirstRead {
        goal: Goal,
        mine: DBlock,
    },
    SecondWrite {
        goal: Goal,
        mine: DBlock,
    },
    SecondRead {
        goal: Goal,
        mine: DBlock,
    },
    Commit {
        goal: Goal,
        mine: DBlock,
        shared_by: Option<Incarnation>,
    },
    /// Marking the own block shared.
    Mark {
        token: Token,
    },
    /// Freeing the leader after marking.
    Free {
        token: Token,
    },
    Held {
        mode: LockMode,
        token: Token,
    },
    ReleaseBlock {
        token: Token,
        mode: LockMode,
        then: AfterRelease,
    },
    ReleaseLeader {
        token: Token,
        then: AfterRelease,
    },
    /// A release failed; try again.
    ReleaseWait {
        token: Token,
        mode: LockMode,
        then: AfterRelease,
        until: Time,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum AfterRelease {
    Report,
    Deny(Incarnation),
}

/// Takes, hands over and releases one resource lease for one host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Locker {
    host: HostId,
    timing: Timing,
    phase: Phase,
    op: OpId,
    pending: Option<Time>,
    /// The own block as last written.
    own: DBlock,
    /// Until then a write whose outcome is unknown may still land: write nothing else.
    quarantine: Time,
    /// Lost ballots in a row, for the back-off.
    losses: u32,
    /// The generation that the operation runs under.
    generation: Generation,
}

impl Locker {
    /// A locker of `host` that holds nothing.
    pub fn new(host: HostId, timing: Timing) -> Self {
        Locker {
            host,
            timing,
            phase: Phase::Idle,
            op: 0,
            pending: None,
            own: DBlock::default(),
            quarantine: Time(0),
            losses: 0,
            generation: 0,
        }
    }

    /// The token and mode of the lock while it is held.
    pub fn held(&self) -> Option<(LockMode, Token)> {
        match self.phase {
            Phase::Held { mode, token } => Some((mode, token)),
            _ => None,
        }
    }

    /// Whether nothing is held and nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.phase == Phase::Idle
    }

    /// Advances the lock by one input.
    pub fn step(&mut self, now: Time, input: LockInput, ctx: &dyn LockContext, out: &mut Vec<LockOutput>) {
        match input {
            LockInput::Acquire(mode) => {
                if !self.is_idle() {
                    out.push(LockOutput::Denied(DenyReason::Busy));
                } else if let Some(generation) = ctx.fresh_generation() {
                    self.generation = generation;
                    self.losses = 0;
                    self.phase = Phase::Wait { goal: Goal::Acquire(mode), until: self.quarantine };
                } else {
                    out.push(LockOutput::Denied(DenyReason::NoLease));
                }
            }
            LockInput::HandOver(to) => match self.phase {
                Phase::Held { mode: LockMode::Exclusive, token } => {
                    let goal = Goal::HandOver { to, opened: false, held: token };
                    let leader = Leader { owner: token.owner, lver: token.lver, ..Leader::default() };
                    self.phase = Phase::Blocks { goal, leader };
                    self.read_blocks(now, out);
                }
                _ => out.push(LockOutput::HandOverFailed { still_ours: false }),
            },
            LockInput::Release => match self.phase {
                Phase::Held { mode, token } => {
                    self.begin_release(now, token, mode, AfterRelease::Report, ctx, out);
                }
                Phase::Idle => out.push(LockOutput::Released),
                // The lock is not ours yet: give up on it.
                Phase::Wait { .. } | Phase::Leader { .. } | Phase::Blocks { .. } => {
                    self.pending = None;
                    self.phase = Phase::Idle;
                    out.push(LockOutput::Released);
                }
                _ => out.push(LockOutput::Denied(DenyReason::Busy)),
            },
            LockInput::Abandon => {
                if self.pending.is_some() {
                    self.quarantine = now + self.timing.drain();
                }
                self.pending = None;
                match self.phase {
                    Phase::Idle | Phase::Held { .. } => self.phase = Phase::Idle,
                    Phase::ReleaseBlock { .. }
                    | Phase::ReleaseLeader { .. }
                    | Phase::ReleaseWait { .. }
                    | Phase::Mark { .. }
                    | Phase::Free { .. } => {
                        self.phase = Phase::Idle;
                        out.push(LockOutput::Denied(DenyReason::NoLease));
                    }
                    _ => {
                        self.fail(DenyReason::NoLease, out);
                        // Whatever a hand-over left of it: without a lease there is no lock.
                        self.phase = Phase::Idle;
                    }
                }
            }
            LockInput::LeaderRead { op, result } if self.answers(op) => match result {
                Ok(leader) => self.on_leader(now, leader, ctx, out),
                Err(IoFailed) => self.io_failed(now, out),
            },
            LockInput::BlocksRead { op, result } if self.answers(op) => match result {
                Ok(blocks) => self.on_blocks(now, &blocks, ctx, out),
                Err(IoFailed) => self.io_failed(now, out),
            },
            LockInput::Wrote { op, result } if self.answers(op) => match result {
                Ok(()) => self.on_wrote(now, ctx, out),
                Err(IoFailed) => self.io_failed(now, out),
            },
            LockInput::LeaderRead { .. } | LockInput::BlocksRead { .. } | LockInput::Wrote { .. } => {}
            LockInput::Tick => {}
        }
        self.on_time(now, ctx, out);
    }

    fn answers(&mut self, op: OpId) -> bool {
        let yes = op == self.op && self.pending.is_some();
        if yes {
            self.pending = None;
        }
        yes
    }

    fn request(&mut self, now: Time) -> OpId {
        self.op += 1;
        self.pending = Some(now);
        self.op
    }

    fn read_blocks(&mut self, now: Time, out: &mut Vec<LockOutput>) {
        let op = self.request(now);
        out.push(LockOutput::ReadBlocks { op });
    }

    /// Writes the own block if the own lease allows it; otherwise gives up.
    fn write_block(
        &mut self,
        now: Time,
        paxos: DBlock,
        mode: ModeBlock,
        ctx: &dyn LockContext,
        out: &mut Vec<LockOutput>,
    ) -> bool {
        if ctx.fresh_generation() != Some(self.generation) {
            self.fail(DenyReason::NoLease, out);
            return false;
        }
        let op = self.request(now);
        self.own = paxos;
        out.push(LockOutput::WriteBlock { op, block: HostBlock { paxos, mode } });
        true
    }

    fn write_leader(&mut self, now: Time, leader: Leader, ctx: &dyn LockContext, out: &mut Vec<LockOutput>) {
        if ctx.fresh_generation() != Some(self.generation) {
            return self.fail(DenyReason::NoLease, out);
        }
        let op = self.request(now);
        out.push(LockOutput::WriteLeader { op, leader });
    }

    fn me(&self) -> Incarnation {
        Incarnation { host: self.host, generation: self.generation }
    }

    fn on_leader(&mut self, now: Time, leader: Leader, ctx: &dyn LockContext, out: &mut Vec<LockOutput>) {
        let Phase::Leader { goal } = self.phase else { return };
        let handing = matches!(goal, Goal::HandOver { .. });
        let ours = leader.owner.host == self.host;
        if leader.is_free() || ours || handing || mutants::active(Mutant::OwnerLivenessIgnored) {
            // A record that names us proves nothing (a late write may have put it there): vote anew.
        } else if ctx.owner(leader.owner) == OwnerState::Alive {
            return self.fail(DenyReason::Held(leader.owner), out);
        }
        self.phase = Phase::Blocks { goal, leader };
        self.read_blocks(now, out);
    }

    fn on_blocks(
        &mut self,
        now: Time,
        blocks: &[HostBlock],
        ctx: &dyn LockContext,
        out: &mut Vec<LockOutput>,
    ) {
        match self.phase {
            Phase::Blocks { goal, leader } => {
                let lver = ballot::target_version(leader.lver, blocks);
                let mine = ballot::open(self.host, lver, blocks);
                self.phase = Phase::FirstWrite { goal, mine };
                if self.write_block(now, mine, ModeBlock::default(), ctx, out)
                    && let Goal::HandOver { to, held, .. } = goal
                {
                    self.phase = Phase::FirstWrite { goal: Goal::HandOver { to, held, opened: true }, mine };
                }
            }
            Phase::FirstRead { goal, mine } => {
                let wish = match goal {
                    Goal::Acquire(_) => self.me(),
                    Goal::HandOver { to, .. } => to,
                };
                let stamp = (now.0 / 1000).max(1);
                match ballot::after_first(self.host, mine, wish, stamp, blocks) {
                    Verdict::Write(mine) => {
                        self.phase = Phase::SecondWrite { goal, mine };
                        self.write_block(now, mine, ModeBlock::default(), ctx, out);
                    }
                    _ => self.lost_ballot(now, goal, out),
                }
            }
            Phase::SecondRead { goal, mine } => match ballot::after_second(self.host, mine, blocks) {
                Verdict::Chosen(mine) => {
                    let shared_by = self.shared_by(blocks, ctx);
                    self.phase = Phase::Commit { goal, mine, shared_by };
                    let short_hold = goal == Goal::Acquire(LockMode::Shared);
                    let leader = Leader {
                        owner: mine.input,
                        lver: mine.lver,
                        timestamp: mine.input_timestamp.max(1),
                        short_hold,
                        writer: self.me(),
                    };
                    self.write_leader(now, leader, ctx, out);
                }
                _ => self.lost_ballot(now, goal, out),
            },
            _ => {}
        }
    }

    fn shared_by(&self, blocks: &[HostBlock], ctx: &dyn LockContext) -> Option<Incarnation> {
        (1u16..).zip(blocks).find_map(|(n, b)| {
            let user = Incarnation { host: HostId(n), generation: b.mode.generation };
            (b.mode.shared && user.host != self.host && ctx.owner(user) == OwnerState::Alive).then_some(user)
        })
    }

    fn on_wrote(&mut self, now: Time, ctx: &dyn LockContext, out: &mut Vec<LockOutput>) {
        match self.phase {
            Phase::FirstWrite { goal, mine } => {
                self.phase = Phase::FirstRead { goal, mine };
                self.read_blocks(now, out);
            }
            Phase::SecondWrite { goal, mine } => {
                self.phase = Phase::SecondRead { goal, mine };
                self.read_blocks(now, out);
            }
            Phase::Commit { goal, mine, shared_by } => self.committed(now, goal, mine, shared_by, ctx, out),
            Phase::Mark { token } => {
                self.phase = Phase::Free { token };
                let leader =
                    Leader { owner: token.owner, lver: token.lver, writer: token.owner, ..Leader::default() };
                self.write_leader(now, leader, ctx, out);
            }
            Phase::Free { token } => self.hold(LockMode::Shared, token, ctx, out),
            Phase::ReleaseBlock { token, mode: LockMode::Exclusive, then } => {
                self.phase = Phase::ReleaseLeader { token, then };
                let leader =
                    Leader { owner: token.owner, lver: token.lver, writer: token.owner, ..Leader::default() };
                self.write_leader(now, leader, ctx, out);
            }
            Phase::ReleaseBlock { then, .. } | Phase::ReleaseLeader { then, .. } => {
                self.phase = Phase::Idle;
                out.push(match then {
                    AfterRelease::Report => LockOutput::Released,
                    AfterRelease::Deny(user) => LockOutput::Denied(DenyReason::HeldShared(user)),
                });
            }
            _ => {}
        }
    }

    fn committed(
        &mut self,
        now: Time,
        goal: Goal,
        mine: DBlock,
        shared_by: Option<Incarnation>,
        ctx: &dyn LockContext,
        out: &mut Vec<LockOutput>,
    ) {
        let token = Token { lver: mine.lver, owner: mine.input };
        match goal {
            Goal::Acquire(mode) if mine.input == self.me() => match (mode, shared_by) {
                (LockMode::Exclusive, Some(user)) => {
                    self.begin_release(now, token, LockMode::Exclusive, AfterRelease::Deny(user), ctx, out);
                }
                (LockMode::Exclusive, None) => self.hold(mode, token, ctx, out),
                (LockMode::Shared, _) => {
                    self.phase = Phase::Mark { token };
                    let marked = ModeBlock { shared: true, generation: self.generation };
                    self.write_block(now, DBlock { released: true, ..mine }, marked, ctx, out);
                }
            },
            // We finished another host's ballot: it is the owner now.
            Goal::Acquire(_) => self.phase = Phase::Wait { goal, until: now },
            Goal::HandOver { to, .. } if mine.input == to => {
                self.phase = Phase::Idle;
                out.push(LockOutput::HandedOver(token));
            }
            Goal::HandOver { .. } => {
                self.phase = Phase::Idle;
                out.push(LockOutput::HandOverFailed { still_ours: false });
            }
        }
    }

    fn hold(&mut self, mode: LockMode, token: Token, ctx: &dyn LockContext, out: &mut Vec<LockOutput>) {
        if ctx.fresh_generation() != Some(self.generation) {
            return self.fail(DenyReason::NoLease, out);
        }
        self.phase = Phase::Held { mode, token };
        out.push(LockOutput::Acquired(token));
    }

    fn begin_release(
        &mut self,
        now: Time,
        token: Token,
        mode: LockMode,
        then: AfterRelease,
        ctx: &dyn LockContext,
        out: &mut Vec<LockOutput>,
    ) {
        self.phase = Phase::ReleaseBlock { token, mode, then };
        let released = !mutants::active(Mutant::NoReleasedFlag);
        self.write_block(now, DBlock { released, ..self.own }, ModeBlock::default(), ctx, out);
    }

    /// Another host is ahead: wait a little, longer each time and different on each host.
    fn lost_ballot(&mut self, now: Time, goal: Goal, out: &mut Vec<LockOutput>) {
        if let Goal::HandOver { opened, held, .. } = goal {
            return self.hand_over_failed(opened, held, out);
        }
        self.losses += 1;
        if self.losses > 20 {
            return self.fail(DenyReason::Busy, out);
        }
        let spread = u64::from(self.host.0 % 16 + 1) * u64::from(self.losses) * 20;
        self.phase = Phase::Wait { goal, until: now + spread };
    }

    fn hand_over_failed(&mut self, opened: bool, held: Token, out: &mut Vec<LockOutput>) {
        let still_ours = !opened || mutants::active(Mutant::SourceResumesWhenUncertain);
        self.phase =
            if still_ours { Phase::Held { mode: LockMode::Exclusive, token: held } } else { Phase::Idle };
        out.push(LockOutput::HandOverFailed { still_ours });
    }

    fn fail(&mut self, reason: DenyReason, out: &mut Vec<LockOutput>) {
        let goal = match self.phase {
            Phase::Wait { goal, .. }
            | Phase::Leader { goal }
            | Phase::Blocks { goal, .. }
            | Phase::FirstWrite { goal, .. }
            | Phase::FirstRead { goal, .. }
            | Phase::SecondWrite { goal, .. }
            | Phase::SecondRead { goal, .. }
            | Phase::Commit { goal, .. } => goal,
            _ => Goal::Acquire(LockMode::Exclusive),
        };
        if let Goal::HandOver { opened, held, .. } = goal {
            return self.hand_over_failed(opened, held, out);
        }
        self.phase = Phase::Idle;
        out.push(LockOutput::Denied(reason));
    }

    fn io_failed(&mut self, now: Time, out: &mut Vec<LockOutput>) {
        // A failed write may still land; reads cannot hurt, but waiting for them too keeps this simple.
        self.quarantine = now + self.timing.drain();
        let until = self.quarantine;
        match self.phase {
            Phase::ReleaseBlock { token, mode, then } => {
                self.phase = Phase::ReleaseWait { token, mode, then, until };
            }
            Phase::ReleaseLeader { token, then } => {
                self.phase = Phase::ReleaseWait { token, mode: LockMode::Exclusive, then, until };
            }
            _ => self.fail(DenyReason::Io, out),
        }
    }

    fn on_time(&mut self, now: Time, ctx: &dyn LockContext, out: &mut Vec<LockOutput>) {
        if let Some(since) = self.pending {
            if now < since + self.timing.io() {
                out.push(LockOutput::WakeAt(since + self.timing.io()));
                return;
            }
            self.pending = None;
            self.io_failed(now, out);
        }
        match self.phase {
            Phase::Wait { goal, until } if now >= until => {
                self.phase = Phase::Leader { goal };
                let op = self.request(now);
                out.push(LockOutput::ReadLeader { op });
                out.push(LockOutput::WakeAt(now + self.timing.io()));
            }
            Phase::ReleaseWait { token, mode, then, until } if now >= until => {
                self.begin_release(now, token, mode, then, ctx, out);
                out.push(LockOutput::WakeAt(now + self.timing.io()));
            }
            Phase::Wait { until, .. } | Phase::ReleaseWait { until, .. } => {
                out.push(LockOutput::WakeAt(until));
            }
            _ => {}
        }
    }
}

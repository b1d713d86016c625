//! Election of the coordinator over a store with expiring keys.
//!
//! The key's creation revision is the fencing token: the store refuses every state write that does not
//! carry the token of the key that exists. The lease of the key only says who *may* coordinate; it says
//! nothing about who is dead.

use crate::lease::OpId;
use crate::mutants::{self, Mutant};
use crate::types::{Incarnation, Millis, Time};

/// The timers of the election.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CoordinatorConfig {
    /// The own host.
    pub me: Incarnation,
    /// How long the key outlives its last renewal.
    pub ttl: Millis,
    /// How long one store request may take.
    pub deadline: Millis,
}

impl CoordinatorConfig {
    /// 10 s and 1 s.
    pub fn new(me: Incarnation) -> Self {
        CoordinatorConfig { me, ttl: 10_000, deadline: 1000 }
    }
}

/// The store did not answer, or the outcome is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Store did not answer in time; look at its members")]
pub struct StoreUnavailable;

/// Who holds the coordinator key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyHolder {
    /// The coordinator.
    pub host: Incarnation,
    /// Its fencing token: the revision that created the key.
    pub token: u64,
    /// The store lease that the key hangs on.
    pub lease: u64,
}

/// What happens to a [`Coordinator`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CoordInput {
    /// Time has passed.
    Tick,
    /// Whether this host may coordinate: it is a healthy member of a quorate partition.
    Eligible(bool),
    /// The key was read, or the campaign ended; both tell who holds it now.
    Holder {
        /// The request.
        op: OpId,
        /// The holder, if any.
        result: Result<Option<KeyHolder>, StoreUnavailable>,
    },
    /// A store lease was granted.
    Granted {
        /// The request.
        op: OpId,
        /// The lease.
        result: Result<u64, StoreUnavailable>,
    },
    /// A renewal ended.
    Renewed {
        /// The request.
        op: OpId,
        /// Whether the lease still existed.
        result: Result<bool, StoreUnavailable>,
    },
}

/// What a [`Coordinator`] asks for or announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CoordOutput {
    /// Read the key.
    Observe {
        /// Names the request.
        op: OpId,
    },
    /// Grant a store lease of the configured time.
    Grant {
        /// Names the request.
        op: OpId,
        /// Its time to live.
        ttl: Millis,
    },
    /// Create the key with this lease if it does not exist, and tell who holds it.
    Campaign {
        /// Names the request.
        op: OpId,
        /// The lease.
        lease: u64,
    },
    /// Renew the lease.
    Renew {
        /// Names the request.
        op: OpId,
        /// The lease.
        lease: u64,
    },
    /// Revoke the lease, and the key with it.
    Resign {
        /// The lease.
        lease: u64,
    },
    /// This host coordinates from now on, with this token.
    Elected {
        /// The fencing token.
        token: u64,
    },
    /// This host no longer coordinates.
    SteppedDown,
    /// Another host coordinates (or none).
    Following(Option<KeyHolder>),
    /// Call with [`CoordInput::Tick`] at this time at the latest.
    WakeAt(Time),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Follow,
    Observing,
    Granting,
    Campaigning { lease: u64 },
    Lead { token: u64, lease: u64, valid: Time, renewing: bool },
}

/// Campaigns for, keeps and gives up the coordinator's role for one host.
#[derive(Clone, Debug)]
pub struct Coordinator {
    config: CoordinatorConfig,
    stage: Stage,
    eligible: bool,
    op: OpId,
    asked: Time,
    next: Time,
    holder: Option<KeyHolder>,
}

impl Coordinator {
    /// A follower.
    pub fn new(now: Time, config: CoordinatorConfig) -> Self {
        Coordinator {
            config,
            stage: Stage::Follow,
            eligible: false,
            op: 0,
            asked: now,
            next: now,
            holder: None,
        }
    }

    /// The fencing token while this host coordinates.
    pub fn token(&self) -> Option<u64> {
        match self.stage {
            Stage::Lead { token, .. } => Some(token),
            _ => None,
        }
    }

    /// The last known holder of the key.
    pub fn holder(&self) -> Option<KeyHolder> {
        self.holder
    }

    /// Advances the election by one input.
    pub fn step(&mut self, now: Time, input: CoordInput, out: &mut Vec<CoordOutput>) {
        match input {
            CoordInput::Tick => {}
            CoordInput::Eligible(eligible) => self.eligible = eligible,
            CoordInput::Holder { op, result } if op == self.op => self.on_holder(now, result, out),
            CoordInput::Granted { op, result } if op == self.op && self.stage == Stage::Granting => {
                match result {
                    Ok(lease) => {
                        self.stage = Stage::Campaigning { lease };
                        let op = self.ask(now);
                        out.push(CoordOutput::Campaign { op, lease });
                    }
                    Err(StoreUnavailable) => self.retry(now),
                }
            }
            CoordInput::Renewed { op, result } if op == self.op => self.on_renewed(now, result, out),
            CoordInput::Holder { .. } | CoordInput::Granted { .. } | CoordInput::Renewed { .. } => {}
        }
        self.on_time(now, out);
        out.push(CoordOutput::WakeAt(self.wake()));
    }

    fn ask(&mut self, now: Time) -> OpId {
        self.op += 1;
        self.asked = now;
        self.op
    }

    fn retry(&mut self, now: Time) {
        self.stage = Stage::Follow;
        self.next = now + self.config.deadline;
    }

    fn on_holder(
        &mut self,
        now: Time,
        result: Result<Option<KeyHolder>, StoreUnavailable>,
        out: &mut Vec<CoordOutput>,
    ) {
        let Ok(holder) = result else {
            // A campaign whose outcome is unknown is read back by the next observation.
            if matches!(self.stage, Stage::Observing | Stage::Campaigning { .. }) {
                self.retry(now);
            }
            return;
        };
        match self.stage {
            Stage::Observing if holder.is_none() && self.eligible => {
                self.stage = Stage::Granting;
                let op = self.ask(now);
                out.push(CoordOutput::Grant { op, ttl: self.config.ttl });
            }
            Stage::Observing | Stage::Campaigning { .. } => {
                let campaign = self.stage;
                self.stage = Stage::Follow;
                self.next = now + self.config.ttl / 2;
                if self.holder != holder {
                    self.holder = holder;
                    out.push(CoordOutput::Following(holder));
                }
                let Some(h) = holder.filter(|h| h.host == self.config.me) else { return };
                match campaign {
                    Stage::Campaigning { lease } if lease == h.lease && self.eligible => {
                        self.stage = Stage::Lead {
                            token: h.token,
                            lease,
                            valid: self.asked + self.config.ttl,
                            renewing: false,
                        };
                        self.next = self.asked + self.config.ttl / 3;
                        out.push(CoordOutput::Elected { token: h.token });
                    }
                    // A key of ours from a campaign whose answer was lost: start over with a new token.
                    _ => {
                        out.push(CoordOutput::Resign { lease: h.lease });
                        self.next = now + self.config.deadline;
                    }
                }
            }
            _ => {}
        }
    }

    fn on_renewed(&mut self, now: Time, result: Result<bool, StoreUnavailable>, out: &mut Vec<CoordOutput>) {
        let Stage::Lead { token, lease, valid, .. } = self.stage else { return };
        match result {
            Ok(true) => {
                let valid = self.asked + self.config.ttl;
                self.stage = Stage::Lead { token, lease, valid, renewing: false };
                self.next = self.asked + self.config.ttl / 3;
            }
            Ok(false) => self.step_down(now, out),
            Err(StoreUnavailable) => {
                self.stage = Stage::Lead { token, lease, valid, renewing: false };
                self.next = now + self.config.deadline / 2;
            }
        }
    }

    fn step_down(&mut self, now: Time, out: &mut Vec<CoordOutput>) {
        if mutants::active(Mutant::CoordinatorNeverStepsDown) {
            return;
        }
        self.stage = Stage::Follow;
        self.next = now + self.config.deadline;
        self.holder = None;
        out.push(CoordOutput::SteppedDown);
    }

    fn on_time(&mut self, now: Time, out: &mut Vec<CoordOutput>) {
        if let Stage::Lead { lease, valid, .. } = self.stage {
            if !self.eligible {
                out.push(CoordOutput::Resign { lease });
                self.step_down(now, out);
            } else if now >= valid - self.config.ttl / 10 {
                self.step_down(now, out);
            }
        }
        let overdue = now >= self.asked + self.config.deadline;
        match self.stage {
            Stage::Follow if now >= self.next => {
                self.stage = Stage::Observing;
                let op = self.ask(now);
                out.push(CoordOutput::Observe { op });
            }
            Stage::Observing | Stage::Granting | Stage::Campaigning { .. } if overdue => self.retry(now),
            Stage::Lead { token, lease, valid, renewing } => {
                if renewing && overdue {
                    self.stage = Stage::Lead { token, lease, valid, renewing: false };
                    self.next = now;
                }
                if now >= self.next && (!renewing || overdue) {
                    self.stage = Stage::Lead { token, lease, valid, renewing: true };
                    let op = self.ask(now);
                    out.push(CoordOutput::Renew { op, lease });
                }
            }
            _ => {}
        }
    }

    fn wake(&self) -> Time {
        let deadline = self.asked + self.config.deadline;
        match self.stage {
            Stage::Follow => self.next,
            Stage::Observing | Stage::Granting | Stage::Campaigning { .. } => deadline,
            Stage::Lead { valid, renewing, .. } => {
                let next = if renewing { deadline } else { self.next };
                next.min(valid - self.config.ttl / 10)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::HostId;

    fn me() -> Incarnation {
        Incarnation { host: HostId(1), generation: 1 }
    }

    fn step(c: &mut Coordinator, now: u64, input: CoordInput) -> Vec<CoordOutput> {
        let mut out = Vec::new();
        c.step(Time(now), input, &mut out);
        out.retain(|o| !matches!(o, CoordOutput::WakeAt(_)));
        out
    }

    fn elected() -> Coordinator {
        let mut c = Coordinator::new(Time(0), CoordinatorConfig::new(me()));
        assert_eq!(step(&mut c, 0, CoordInput::Eligible(true)), [CoordOutput::Observe { op: 1 }]);
        assert_eq!(
            step(&mut c, 1, CoordInput::Holder { op: 1, result: Ok(None) }),
            [CoordOutput::Grant { op: 2, ttl: 10_000 }]
        );
        assert_eq!(
            step(&mut c, 2, CoordInput::Granted { op: 2, result: Ok(7) }),
            [CoordOutput::Campaign { op: 3, lease: 7 }]
        );
        let holder = KeyHolder { host: me(), token: 42, lease: 7 };
        let out = step(&mut c, 3, CoordInput::Holder { op: 3, result: Ok(Some(holder)) });
        assert!(out.contains(&CoordOutput::Elected { token: 42 }));
        c
    }

    #[test]
    fn it_is_elected_renews_and_steps_down_before_its_lease_ends() {
        let mut c = elected();
        assert_eq!(step(&mut c, 3400, CoordInput::Tick), [CoordOutput::Renew { op: 4, lease: 7 }]);
        step(&mut c, 3450, CoordInput::Renewed { op: 4, result: Ok(true) });
        let mut now = 3450;
        while c.token().is_some() {
            now += 50;
            step(&mut c, now, CoordInput::Tick);
        }
        assert_eq!(now, 3400 + 9000);
    }

    #[test]
    fn it_resigns_when_not_eligible_and_stops_when_its_lease_is_gone() {
        let mut c = elected();
        let out = step(&mut c, 100, CoordInput::Eligible(false));
        assert_eq!(out, [CoordOutput::Resign { lease: 7 }, CoordOutput::SteppedDown]);
        let mut c = elected();
        step(&mut c, 3400, CoordInput::Tick);
        assert!(
            step(&mut c, 3401, CoordInput::Renewed { op: 4, result: Ok(false) })
                .contains(&CoordOutput::SteppedDown)
        );
    }

    #[test]
    fn a_campaign_whose_answer_was_lost_does_not_lead_with_an_unknown_token() {
        let mut c = Coordinator::new(Time(0), CoordinatorConfig::new(me()));
        step(&mut c, 0, CoordInput::Eligible(true));
        step(&mut c, 1, CoordInput::Holder { op: 1, result: Ok(None) });
        step(&mut c, 2, CoordInput::Granted { op: 2, result: Ok(7) });
        step(&mut c, 3, CoordInput::Holder { op: 3, result: Err(StoreUnavailable) });
        assert_eq!(step(&mut c, 1003, CoordInput::Tick), [CoordOutput::Observe { op: 4 }]);
        let holder = KeyHolder { host: me(), token: 42, lease: 7 };
        let out = step(&mut c, 1004, CoordInput::Holder { op: 4, result: Ok(Some(holder)) });
        assert!(out.contains(&CoordOutput::Resign { lease: 7 }) && c.token().is_none());
    }
}

//! Fencing one life of one host, level by level.
//!
//! A level succeeds only when the *observed* power state of each of its devices is off. Beside all
//! levels, the dead-time of a host with a watchdog counts, so a power controller that lost power together
//! with its host blocks nothing for ever.

use crate::lease::OpId;
use crate::mutants::{self, Mutant};
use crate::types::{Incarnation, Millis, Time};

/// A fence device by its place in the configuration.
pub type DeviceId = u16;

/// What a fence agent is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FenceAction {
    /// Tell the power state.
    Status,
    /// Power off.
    Off,
    /// Power on.
    On,
}

/// What a fence agent answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentReply {
    /// The action was accepted; it proves nothing.
    Accepted,
    /// The power is on.
    PowerOn,
    /// The power is off.
    PowerOff,
}

/// The agent failed or took too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Fence agent failed; check its device and credentials")]
pub struct AgentFailed;

/// Timers and levels of a host's fencing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FenceConfig {
    /// Levels in order; every device of a level must report off (two power supplies, for example).
    pub levels: Vec<Vec<DeviceId>>,
    /// How long one call of an agent may take.
    pub deadline: Millis,
    /// How often the power state is looked at after "off".
    pub poll: Millis,
    /// How long the power may take to go off.
    pub confirm: Millis,
    /// How often a level is tried before the next one.
    pub attempts: u32,
    /// How long to wait before the levels start over.
    pub pause: Millis,
}

impl Default for FenceConfig {
    fn default() -> Self {
        FenceConfig {
            levels: Vec::new(),
            deadline: 20_000,
            poll: 2000,
            confirm: 20_000,
            attempts: 2,
            pause: 30_000,
        }
    }
}

/// Why a host counts as fenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// Its power was seen off.
    PowerOff,
    /// Its dead-time passed and it has a watchdog.
    DeadTime,
    /// An operator said so.
    Operator,
}

/// What happens to a [`Fencer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FenceInput {
    /// Time has passed.
    Tick,
    /// A call of an agent ended.
    Done {
        /// The call.
        op: OpId,
        /// Its answer.
        result: Result<AgentReply, AgentFailed>,
    },
    /// The target's dead-time has passed and it is known to have a watchdog.
    DeadTimePassed,
    /// An operator confirms that the host is off.
    Confirmed,
}

/// What a [`Fencer`] asks for or announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FenceOutput {
    /// Call the agent of a device.
    Run {
        /// Names the call.
        op: OpId,
        /// The device.
        device: DeviceId,
        /// What to do.
        action: FenceAction,
    },
    /// The target cannot write any more.
    Fenced(Evidence),
    /// A level failed as often as allowed.
    LevelFailed {
        /// The level, from 0.
        level: usize,
    },
    /// Every level failed; only the dead-time or an operator can help until the next round.
    Exhausted,
    /// Call with [`FenceInput::Tick`] at this time at the latest.
    WakeAt(Time),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The first look: "already off" is success.
    Look,
    Off,
    Confirm {
        until: Time,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Working { level: usize, device: usize, attempt: u32, stage: Stage },
    Resting { until: Time },
    Done,
}

/// Fences one life of one host.
#[derive(Clone, Debug)]
pub struct Fencer {
    config: FenceConfig,
    target: Incarnation,
    state: State,
    op: OpId,
    /// A call is under way since then.
    pending: Option<Time>,
    /// The next call is not made before this.
    not_before: Time,
}

impl Fencer {
    /// A fencer that starts with the first level at its first input.
    pub fn new(now: Time, target: Incarnation, config: FenceConfig) -> Self {
        let state = State::Working { level: 0, device: 0, attempt: 1, stage: Stage::Look };
        Fencer { config, target, state, op: 0, pending: None, not_before: now }
    }

    /// Whom it fences.
    pub fn target(&self) -> Incarnation {
        self.target
    }

    /// Whether the target is fenced.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Advances the fencing by one input.
    pub fn step(&mut self, now: Time, input: FenceInput, out: &mut Vec<FenceOutput>) {
        if self.is_done() {
            return;
        }
        match input {
            FenceInput::Tick => {}
            FenceInput::Done { op, result } if op == self.op && self.pending.is_some() => {
                self.pending = None;
                self.on_done(now, result, out);
            }
            FenceInput::Done { .. } => {}
            FenceInput::DeadTimePassed => self.finish(Evidence::DeadTime, out),
            FenceInput::Confirmed => self.finish(Evidence::Operator, out),
        }
        if self.pending.is_some_and(|since| now >= since + self.config.deadline) {
            self.pending = None;
            self.on_done(now, Err(AgentFailed), out);
        }
        self.proceed(now, out);
    }

    fn finish(&mut self, evidence: Evidence, out: &mut Vec<FenceOutput>) {
        self.state = State::Done;
        out.push(FenceOutput::Fenced(evidence));
    }

    fn on_done(&mut self, now: Time, result: Result<AgentReply, AgentFailed>, out: &mut Vec<FenceOutput>) {
        let State::Working { level, device, attempt, stage } = self.state else { return };
        let go = |stage| State::Working { level, device, attempt, stage };
        match (stage, result) {
            (Stage::Look | Stage::Confirm { .. }, Ok(AgentReply::PowerOff)) => {
                self.device_off(level, device, attempt, out);
            }
            // The state cannot be read: try to switch off all the same.
            (Stage::Look, _) => self.state = go(Stage::Off),
            (Stage::Off, Ok(_)) if mutants::active(Mutant::FenceTrustsExitStatus) => {
                self.device_off(level, device, attempt, out);
            }
            // Even a call that failed may have worked: look.
            (Stage::Off, _) => self.state = go(Stage::Confirm { until: now + self.config.confirm }),
            (Stage::Confirm { until }, _) if now < until => self.not_before = now + self.config.poll,
            (Stage::Confirm { .. }, _) if attempt < self.config.attempts => {
                self.state = State::Working { level, device: 0, attempt: attempt + 1, stage: Stage::Look };
            }
            (Stage::Confirm { .. }, _) => {
                out.push(FenceOutput::LevelFailed { level });
                self.state = State::Working { level: level + 1, device: 0, attempt: 1, stage: Stage::Look };
            }
        }
    }

    fn device_off(&mut self, level: usize, device: usize, attempt: u32, out: &mut Vec<FenceOutput>) {
        if self.config.levels.get(level).is_some_and(|l| device + 1 < l.len()) {
            self.state = State::Working { level, device: device + 1, attempt, stage: Stage::Look };
        } else {
            self.finish(Evidence::PowerOff, out);
        }
    }

    fn proceed(&mut self, now: Time, out: &mut Vec<FenceOutput>) {
        if let State::Resting { until } = self.state {
            if now < until {
                out.push(FenceOutput::WakeAt(until));
                return;
            }
            self.state = State::Working { level: 0, device: 0, attempt: 1, stage: Stage::Look };
        }
        let State::Working { level, device, stage, .. } = self.state else { return };
        if let Some(since) = self.pending {
            out.push(FenceOutput::WakeAt(since + self.config.deadline));
            return;
        }
        let Some(devices) = self.config.levels.get(level) else {
            out.push(FenceOutput::Exhausted);
            let until = now + self.config.pause;
            self.state = State::Resting { until };
            out.push(FenceOutput::WakeAt(until));
            return;
        };
        let Some(id) = devices.get(device).copied() else {
            // A level without devices proves nothing.
            self.state = State::Working { level: level + 1, device: 0, attempt: 1, stage: Stage::Look };
            return self.proceed(now, out);
        };
        if now < self.not_before {
            out.push(FenceOutput::WakeAt(self.not_before));
            return;
        }
        let action = if stage == Stage::Off { FenceAction::Off } else { FenceAction::Status };
        self.op += 1;
        self.pending = Some(now);
        out.push(FenceOutput::Run { op: self.op, device: id, action });
        out.push(FenceOutput::WakeAt(now + self.config.deadline));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::HostId;

    /// Drives a fencer against `agent` until it is done or `until`; gives the evidence and the calls.
    fn drive(
        levels: &[&[DeviceId]],
        until: u64,
        mut agent: impl FnMut(DeviceId, FenceAction) -> Option<Result<AgentReply, AgentFailed>>,
    ) -> (Option<Evidence>, Vec<(DeviceId, FenceAction)>) {
        let config =
            FenceConfig { levels: levels.iter().map(|l| l.to_vec()).collect(), ..FenceConfig::default() };
        let target = Incarnation { host: HostId(2), generation: 1 };
        let mut f = Fencer::new(Time(0), target, config);
        let (mut calls, mut evidence) = (vec![], None);
        for s in 0..until {
            let mut queue = vec![FenceInput::Tick];
            while let Some(input) = queue.pop() {
                let mut out = vec![];
                f.step(Time(s * 1000), input, &mut out);
                for o in out {
                    match o {
                        FenceOutput::Run { op, device, action } => {
                            calls.push((device, action));
                            if let Some(result) = agent(device, action) {
                                queue.push(FenceInput::Done { op, result });
                            }
                        }
                        FenceOutput::Fenced(e) => evidence = Some(e),
                        _ => {}
                    }
                }
            }
        }
        (evidence, calls)
    }

    #[test]
    fn already_off_is_success_without_a_power_action() {
        let (e, calls) = drive(&[&[1]], 1, |_, _| Some(Ok(AgentReply::PowerOff)));
        assert_eq!((e, calls), (Some(Evidence::PowerOff), vec![(1, FenceAction::Status)]));
    }

    #[test]
    fn an_accepted_off_is_not_believed() {
        let lying =
            |_, a| Some(Ok(if a == FenceAction::Off { AgentReply::Accepted } else { AgentReply::PowerOn }));
        let (e, calls) = drive(&[&[1]], 200, lying);
        assert_eq!(e, None);
        assert!(calls.iter().filter(|c| c.1 == FenceAction::Off).count() >= 2);
    }

    #[test]
    fn every_device_of_a_level_must_be_off_and_the_next_level_follows_a_failed_one() {
        let mut off = [false; 4];
        let (e, _) = drive(&[&[1, 2]], 30, |d, a| {
            if a == FenceAction::Off {
                off[usize::from(d)] = true;
            }
            Some(Ok(if off[usize::from(d)] { AgentReply::PowerOff } else { AgentReply::PowerOn }))
        });
        assert_eq!((e, off), (Some(Evidence::PowerOff), [false, true, true, false]));
        let (e, _) = drive(&[&[1], &[3]], 200, |d, _| {
            Some(if d == 1 { Err(AgentFailed) } else { Ok(AgentReply::PowerOff) })
        });
        assert_eq!(e, Some(Evidence::PowerOff));
    }

    #[test]
    fn a_hanging_agent_is_given_up_and_the_dead_time_ends_the_wait() {
        let (e, calls) = drive(&[&[1]], 400, |_, _| None);
        assert_eq!(e, None);
        assert!(calls.len() > 4);
        let mut f = Fencer::new(Time(0), Incarnation::default(), FenceConfig::default());
        let mut out = vec![];
        f.step(Time(0), FenceInput::Tick, &mut out);
        assert!(out.contains(&FenceOutput::Exhausted));
        f.step(Time(1), FenceInput::DeadTimePassed, &mut out);
        assert!(out.contains(&FenceOutput::Fenced(Evidence::DeadTime)) && f.is_done());
    }
}

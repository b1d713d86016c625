//! Heartbeats, verdicts and quorum.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::lease::DiskLife;
use crate::types::{Generation, HostId, HostSet, Incarnation, Millis, Time};

/// Who the members are, and the timers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MembershipConfig {
    /// The own number.
    pub host: HostId,
    /// Every configured member, the own host included.
    pub members: Vec<HostId>,
    /// A heartbeat is sent this often.
    pub interval: Millis,
    /// A host is lost after this many intervals without a heartbeat.
    pub misses: u32,
    /// How long a lost quorum may return before the losing side starts to stop its VMs.
    pub settle: Millis,
    /// How long the losing side may take to stop its VMs before it resets itself.
    pub stop: Millis,
}

impl MembershipConfig {
    /// The default timers: 3 s x 10 heartbeats, 20 s + 126 s of arbitration.
    pub fn new(host: HostId, members: Vec<HostId>) -> Self {
        MembershipConfig { host, members, interval: 3000, misses: 10, settle: 20_000, stop: 126_000 }
    }

    /// How long a silent host counts as heard.
    pub fn timeout(&self) -> Millis {
        self.interval.saturating_mul(self.misses.into())
    }
}

/// What hosts tell each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// The sender.
    pub from: Incarnation,
    /// Rises with each heartbeat of one life; older and repeated ones are ignored.
    pub seq: u64,
    /// Whom the sender hears.
    pub heard: HostSet,
    /// The sender holds the tie-break witness.
    pub witness: bool,
    /// The sender has a working hardware watchdog.
    pub watchdog: bool,
    /// The sender leaves on purpose.
    pub leaving: bool,
}

/// What is known of a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Too early to tell.
    #[default]
    Unknown,
    /// It is heard.
    Online,
    /// It is not heard, but renews its lease: it lost the network.
    Isolated,
    /// It is not heard, and its lease says nothing (yet).
    Suspect,
    /// It is not heard and its dead-time has passed.
    Dead,
    /// It gave its lease back, or said that it leaves.
    Left,
}

/// What happens to a [`Membership`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MembershipInput {
    /// Time has passed.
    Tick,
    /// A heartbeat arrived (on any link).
    Heard(Arc<Heartbeat>),
    /// The own host took or lost the tie-break witness.
    Witness(bool),
}

/// What a [`Membership`] asks for or announces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MembershipOutput {
    /// Send this to every member on every link.
    Send(Arc<Heartbeat>),
    /// The verdict on a host changed.
    Changed {
        /// The host.
        host: HostId,
        /// The new verdict.
        verdict: Verdict,
    },
    /// Quorum was won or lost.
    Quorum(bool),
    /// The hosts we hear are exactly half: try to take the tie-break witness (or let go of it).
    WantWitness(bool),
    /// Quorum did not return in time: stop the VMs.
    StopVms,
    /// The time to stop the VMs is over: reset the host unless they are gone.
    StopOverdue,
    /// Call with [`MembershipInput::Tick`] at this time at the latest.
    WakeAt(Time),
}

#[derive(Clone, Debug, Default)]
struct Peer {
    heard_at: Option<Time>,
    generation: Generation,
    seq: u64,
    hears_us: bool,
    witness: bool,
    watchdog: bool,
    leaving: bool,
    verdict: Verdict,
}

/// Judges the other hosts and the own partition.
#[derive(Clone, Debug)]
pub struct Membership {
    config: MembershipConfig,
    me: Incarnation,
    peers: Vec<Peer>,
    started: Time,
    next_send: Time,
    seq: u64,
    watchdog: bool,
    witness: bool,
    wants_witness: bool,
    quorate: bool,
    lost_at: Option<Time>,
    stop_sent: bool,
    overdue_sent: bool,
    leaving: bool,
}

impl Membership {
    /// A member that starts at `now`; `watchdog` says whether the host has a working watchdog.
    pub fn new(now: Time, config: MembershipConfig, generation: Generation, watchdog: bool) -> Self {
        let size = config.members.iter().map(|h| usize::from(h.0)).max().unwrap_or(0) + 1;
        Membership {
            me: Incarnation { host: config.host, generation },
            peers: vec![Peer::default(); size],
            started: now,
            next_send: now,
            seq: 0,
            watchdog,
            witness: false,
            wants_witness: false,
            quorate: false,
            lost_at: Some(now),
            stop_sent: false,
            overdue_sent: false,
            leaving: false,
            config,
        }
    }

    /// The verdict on a host.
    pub fn verdict(&self, host: HostId) -> Verdict {
        if host == self.me.host {
            return Verdict::Online;
        }
        self.peers.get(usize::from(host.0)).map_or(Verdict::Unknown, |p| p.verdict)
    }

    /// The highest generation that a host's heartbeats named.
    pub fn generation(&self, host: HostId) -> Generation {
        if host == self.me.host {
            return self.me.generation;
        }
        self.peers.get(usize::from(host.0)).map_or(0, |p| p.generation)
    }

    /// Whether a host is heard and says that it hears us: only then do commands reach it.
    pub fn is_mutual(&self, host: HostId) -> bool {
        host == self.me.host
            || self.peers.get(usize::from(host.0)).is_some_and(|p| p.verdict == Verdict::Online && p.hears_us)
    }

    /// Whether a host said that it has a working watchdog.
    pub fn has_watchdog(&self, host: HostId) -> bool {
        self.peers.get(usize::from(host.0)).is_some_and(|p| p.watchdog)
    }

    /// Whether the own partition has a majority (or half and the witness).
    pub fn is_quorate(&self) -> bool {
        self.quorate
    }

    /// Says in the next heartbeats that this host leaves.
    pub fn leave(&mut self) {
        self.leaving = true;
    }

    /// The delta lease was taken anew: heartbeats carry the new generation from now on.
    pub fn set_generation(&mut self, generation: Generation) {
        self.me.generation = generation;
    }

    /// Advances by one input. `disk` tells what a host's sector says about it.
    pub fn step(
        &mut self,
        now: Time,
        input: MembershipInput,
        disk: &dyn Fn(HostId) -> DiskLife,
        out: &mut Vec<MembershipOutput>,
    ) {
        match input {
            MembershipInput::Tick => {}
            MembershipInput::Heard(beat) => self.on_beat(now, &beat),
            MembershipInput::Witness(held) => self.witness = held,
        }
        self.judge(now, disk, out);
        if now >= self.next_send {
            self.next_send = now + self.config.interval;
            self.seq += 1;
            let heard = self.config.members.iter().copied().filter(|h| self.hears(now, *h)).collect();
            out.push(MembershipOutput::Send(Arc::new(Heartbeat {
                from: self.me,
                seq: self.seq,
                heard,
                witness: self.witness,
                watchdog: self.watchdog,
                leaving: self.leaving,
            })));
        }
        out.push(MembershipOutput::WakeAt(self.next_send));
    }

    fn on_beat(&mut self, now: Time, beat: &Heartbeat) {
        let me = self.me.host;
        if beat.from.host == me || !self.config.members.contains(&beat.from.host) {
            return;
        }
        let Some(peer) = self.peers.get_mut(usize::from(beat.from.host.0)) else { return };
        if (beat.from.generation, beat.seq) <= (peer.generation, peer.seq) {
            return;
        }
        peer.generation = beat.from.generation;
        peer.seq = beat.seq;
        peer.heard_at = Some(now);
        peer.hears_us = beat.heard.contains(me);
        peer.witness = beat.witness;
        peer.watchdog = beat.watchdog;
        peer.leaving = beat.leaving;
    }

    fn hears(&self, now: Time, host: HostId) -> bool {
        let timeout = self.config.timeout();
        self.peers.get(usize::from(host.0)).and_then(|p| p.heard_at).is_some_and(|at| now.since(at) < timeout)
    }

    fn judge(&mut self, now: Time, disk: &dyn Fn(HostId) -> DiskLife, out: &mut Vec<MembershipOutput>) {
        let timeout = self.config.timeout();
        let (mut expected, mut mutual, mut witness, mut lowest) = (1, 1, self.witness, true);
        for i in 0..self.config.members.len() {
            let host = self.config.members[i];
            if host == self.me.host {
                continue;
            }
            let heard = self.hears(now, host);
            let peer = &mut self.peers[usize::from(host.0)];
            let verdict = if heard {
                if peer.leaving { Verdict::Left } else { Verdict::Online }
            } else {
                match disk(host) {
                    DiskLife::Free => Verdict::Left,
                    DiskLife::Dead => Verdict::Dead,
                    DiskLife::Live if now.since(self.started) >= timeout => Verdict::Isolated,
                    _ if now.since(self.started) >= timeout => Verdict::Suspect,
                    _ => Verdict::Unknown,
                }
            };
            if verdict != Verdict::Left {
                expected += 1;
            }
            if heard && peer.hears_us && verdict == Verdict::Online {
                mutual += 1;
                witness |= peer.witness;
                lowest &= host > self.me.host;
            }
            if verdict != peer.verdict {
                peer.verdict = verdict;
                out.push(MembershipOutput::Changed { host, verdict });
            }
        }
        let tie = 2 * mutual == expected;
        let want = tie && lowest;
        if want != self.wants_witness {
            self.wants_witness = want;
            out.push(MembershipOutput::WantWitness(want));
        }
        let quorate = 2 * mutual > expected || (tie && witness);
        if quorate != self.quorate {
            self.quorate = quorate;
            out.push(MembershipOutput::Quorum(quorate));
            self.lost_at = (!quorate).then_some(now);
            self.stop_sent = false;
            self.overdue_sent = false;
        }
        if let Some(lost) = self.lost_at {
            if !self.stop_sent && now >= lost + self.config.settle {
                self.stop_sent = true;
                out.push(MembershipOutput::StopVms);
            }
            if !self.overdue_sent && now >= lost + self.config.settle + self.config.stop {
                self.overdue_sent = true;
                out.push(MembershipOutput::StopOverdue);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(from: u16, seq: u64, heard: &[u16]) -> Arc<Heartbeat> {
        Arc::new(Heartbeat {
            from: Incarnation { host: HostId(from), generation: 1 },
            seq,
            heard: heard.iter().map(|h| HostId(*h)).collect(),
            witness: false,
            watchdog: true,
            leaving: false,
        })
    }

    fn member(hosts: u16) -> Membership {
        let config = MembershipConfig::new(HostId(1), (1..=hosts).map(HostId).collect());
        Membership::new(Time(0), config, 1, true)
    }

    fn step(m: &mut Membership, now: u64, input: MembershipInput, life: DiskLife) -> Vec<MembershipOutput> {
        let mut out = Vec::new();
        m.step(Time(now), input, &|_| life, &mut out);
        out.retain(|o| !matches!(o, MembershipOutput::WakeAt(_) | MembershipOutput::Send(_)));
        out
    }

    #[test]
    fn a_silent_host_is_isolated_while_its_lease_moves_and_dead_after_the_dead_time() {
        let mut m = member(3);
        step(&mut m, 0, MembershipInput::Heard(beat(2, 1, &[1])), DiskLife::Unknown);
        assert_eq!(m.verdict(HostId(2)), Verdict::Online);
        assert!(m.is_quorate());
        let out = step(&mut m, 30_000, MembershipInput::Tick, DiskLife::Live);
        assert_eq!(m.verdict(HostId(2)), Verdict::Isolated);
        assert!(out.contains(&MembershipOutput::Quorum(false)));
        step(&mut m, 31_000, MembershipInput::Tick, DiskLife::Failing);
        assert_eq!(m.verdict(HostId(2)), Verdict::Suspect);
        step(&mut m, 31_000, MembershipInput::Tick, DiskLife::Dead);
        assert_eq!(m.verdict(HostId(2)), Verdict::Dead);
        // A replayed heartbeat revives nobody.
        step(&mut m, 31_000, MembershipInput::Heard(beat(2, 1, &[1])), DiskLife::Dead);
        assert_eq!(m.verdict(HostId(2)), Verdict::Dead);
    }

    #[test]
    fn patience_of_any_length_is_no_overflow() {
        let mut config = MembershipConfig::new(HostId(1), vec![HostId(1)]);
        config.interval = u64::MAX;
        assert_eq!(config.timeout(), u64::MAX);
    }

    #[test]
    fn a_one_way_link_does_not_count_for_quorum() {
        let mut m = member(3);
        step(&mut m, 0, MembershipInput::Heard(beat(2, 1, &[3])), DiskLife::Unknown);
        assert!(!m.is_quorate());
        assert_eq!((m.verdict(HostId(2)), m.is_mutual(HostId(2))), (Verdict::Online, false));
        step(&mut m, 1, MembershipInput::Heard(beat(2, 2, &[1, 3])), DiskLife::Unknown);
        assert!(m.is_quorate() && m.is_mutual(HostId(2)));
    }

    #[test]
    fn the_losing_side_stops_after_20_s_and_is_overdue_126_s_later() {
        let mut m = member(3);
        step(&mut m, 0, MembershipInput::Heard(beat(2, 1, &[1])), DiskLife::Unknown);
        step(&mut m, 30_000, MembershipInput::Tick, DiskLife::Live);
        assert_eq!(step(&mut m, 49_999, MembershipInput::Tick, DiskLife::Live), []);
        assert_eq!(step(&mut m, 50_000, MembershipInput::Tick, DiskLife::Live), [MembershipOutput::StopVms]);
        assert_eq!(
            step(&mut m, 176_000, MembershipInput::Tick, DiskLife::Live),
            [MembershipOutput::StopOverdue]
        );
    }

    #[test]
    fn a_tie_is_decided_by_the_witness() {
        let mut m = member(2);
        let out = step(&mut m, 1, MembershipInput::Tick, DiskLife::Live);
        assert!(out.contains(&MembershipOutput::WantWitness(true)) && !m.is_quorate());
        step(&mut m, 2, MembershipInput::Witness(true), DiskLife::Live);
        assert!(m.is_quorate());
        let mut alone = member(2);
        step(&mut alone, 1, MembershipInput::Tick, DiskLife::Free);
        assert!(alone.is_quorate(), "the other host left cleanly");
    }
}

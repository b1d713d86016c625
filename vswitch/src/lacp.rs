//! LACP (IEEE 802.1AX) of one member of a bond: receive, periodic, selection and mux machines on the switch's clock.

use crate::clock::{Nanos, SECOND};

/// Destination of LACP frames.
pub(crate) const SLOW_PROTOCOLS: u64 = 0x0180_c200_0002;
/// EtherType of LACP frames.
pub(crate) const ETH_SLOW: u16 = 0x8809;

const ACTIVITY: u8 = 0x01;
const SHORT_TIMEOUT: u8 = 0x02;
const AGGREGATION: u8 = 0x04;
const SYNC: u8 = 0x08;
const COLLECTING: u8 = 0x10;
const DISTRIBUTING: u8 = 0x20;
const DEFAULTED: u8 = 0x40;
const EXPIRED: u8 = 0x80;

const FAST: Nanos = SECOND;
const SLOW: Nanos = 30 * SECOND;

/// Who a bond is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct System {
    /// Address.
    pub mac: [u8; 6],
    /// Key: members with the same key may be aggregated.
    pub key: u16,
}

/// One side's information as a frame carries it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Info {
    system_priority: u16,
    mac: [u8; 6],
    key: u16,
    port_priority: u16,
    port: u16,
    state: u8,
}

impl Info {
    fn parse(b: &[u8]) -> Option<Self> {
        let word = |i: usize| Some(u16::from_be_bytes([*b.get(i)?, *b.get(i + 1)?]));
        Some(Self {
            system_priority: word(0)?,
            mac: *b.get(2..)?.first_chunk()?,
            key: word(8)?,
            port_priority: word(10)?,
            port: word(12)?,
            state: *b.get(14)?,
        })
    }

    fn encode(&self, kind: u8, out: &mut Vec<u8>) {
        out.extend_from_slice(&[kind, 20]);
        out.extend_from_slice(&self.system_priority.to_be_bytes());
        out.extend_from_slice(&self.mac);
        out.extend_from_slice(&self.key.to_be_bytes());
        out.extend_from_slice(&self.port_priority.to_be_bytes());
        out.extend_from_slice(&self.port.to_be_bytes());
        out.extend_from_slice(&[self.state, 0, 0, 0]);
    }

    /// Whether two sides' views of one port agree, timers and progress aside.
    fn same_port(&self, other: &Info) -> bool {
        (self.mac, self.key, self.port) == (other.mac, other.key, other.port)
            && self.state & AGGREGATION == other.state & AGGREGATION
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Member {
    actor: Info,
    partner: Info,
    selected: bool,
    /// When the partner's information runs out.
    expires: Nanos,
    next_send: Nanos,
    /// Whether a frame is due because something changed.
    need_to_send: bool,
}

impl Member {
    pub fn new(system: System, port: u16) -> Self {
        let actor = Info {
            system_priority: 0x8000,
            mac: system.mac,
            key: system.key,
            port_priority: 0x8000,
            port,
            state: ACTIVITY | SHORT_TIMEOUT | AGGREGATION | DEFAULTED,
        };
        Self {
            actor,
            partner: Info::default(),
            selected: false,
            expires: 0,
            next_send: 0,
            need_to_send: true,
        }
    }

    /// The partner's system and key, once it has spoken.
    pub fn partner(&self) -> Option<([u8; 6], u16)> {
        (self.actor.state & (DEFAULTED | EXPIRED) == 0).then_some((self.partner.mac, self.partner.key))
    }

    /// Whether frames may be sent and received.
    pub fn is_distributing(&self) -> bool {
        self.actor.state & DISTRIBUTING != 0
    }

    /// Takes a frame; `false` when it is not LACP.
    pub fn input(&mut self, frame: &[u8], now: Nanos) -> bool {
        // Subtype 1, version, then the sender's information and what it knows of us.
        let body = frame.get(14..).unwrap_or_default();
        let ([1, _, 1, 20, rest @ ..], Some(told)) = (body, body.get(22..24)) else { return false };
        let (Some(partner), [2, 20]) = (Info::parse(rest), told) else { return false };
        let Some(ours) = body.get(24..).and_then(Info::parse) else { return false };
        if partner.mac == self.actor.mac && partner.port == self.actor.port {
            // Our own frame: a loop.
            return false;
        }
        self.partner = partner;
        // What the partner says of its synchronisation counts only if it speaks of us as we are.
        let agreed = ours.same_port(&self.actor) || partner.state & AGGREGATION == 0;
        if !agreed {
            self.partner.state &= !SYNC;
        }
        self.set(EXPIRED | DEFAULTED, false);
        self.expires = now + 3 * FAST;
        // The partner must know our present state.
        self.need_to_send |= ours.state & (ACTIVITY | SHORT_TIMEOUT | AGGREGATION | SYNC)
            != self.actor.state & (ACTIVITY | SHORT_TIMEOUT | AGGREGATION | SYNC)
            || !agreed;
        true
    }

    /// Selection: whether the member belongs to the aggregate. Runs the mux machine.
    pub fn set_selected(&mut self, selected: bool) {
        self.selected = selected;
        let before = self.actor.state;
        self.set(SYNC, selected);
        let partner_ready = selected && self.partner.state & SYNC != 0;
        self.set(COLLECTING, partner_ready);
        self.set(DISTRIBUTING, partner_ready && self.partner.state & COLLECTING != 0);
        self.need_to_send |= before != self.actor.state;
    }

    fn set(&mut self, bits: u8, on: bool) {
        self.actor.state = (self.actor.state & !bits) | if on { bits } else { 0 };
    }

    /// Runs the timers; returns a frame when one is due.
    pub fn tick(&mut self, link_up: bool, now: Nanos) -> Option<Vec<u8>> {
        if !link_up {
            self.partner = Info::default();
            self.set(DEFAULTED, true);
            self.set(EXPIRED, false);
            self.next_send = 0;
            return None;
        }
        if self.actor.state & DEFAULTED == 0 && now >= self.expires {
            if self.actor.state & EXPIRED != 0 {
                self.partner = Info::default();
                self.set(EXPIRED, false);
                self.set(DEFAULTED, true);
            } else {
                self.set(EXPIRED, true);
                self.partner.state = (self.partner.state & !SYNC) | SHORT_TIMEOUT;
                self.expires = now + 3 * FAST;
            }
        }
        if now < self.next_send && !self.need_to_send {
            return None;
        }
        self.need_to_send = false;
        let quick = self.partner.state & SHORT_TIMEOUT != 0 || self.actor.state & (DEFAULTED | EXPIRED) != 0;
        self.next_send = now + if quick { FAST } else { SLOW };
        Some(self.frame())
    }

    fn frame(&self) -> Vec<u8> {
        let mut f = crate::packet::key::mac_bytes(SLOW_PROTOCOLS).to_vec();
        f.extend_from_slice(&self.actor.mac);
        f.extend_from_slice(&ETH_SLOW.to_be_bytes());
        f.extend_from_slice(&[1, 1]);
        self.actor.encode(1, &mut f);
        self.partner.encode(2, &mut f);
        // Collector information with no delay, then the terminator.
        f.extend_from_slice(&[3, 16, 0, 0]);
        f.resize(124, 0);
        f
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(n: u8) -> Member {
        Member::new(System { mac: [2, 0, 0, 0, 0, n], key: n.into() }, n.into())
    }

    /// Lets both sides talk for some seconds.
    fn talk(a: &mut Member, b: &mut Member, from: Nanos, seconds: u64) {
        for i in 0..seconds * 10 {
            let now = from + i * SECOND / 10;
            let (fa, fb) = (a.tick(true, now), b.tick(true, now));
            if let Some(f) = fb {
                a.input(&f, now);
            }
            if let Some(f) = fa {
                b.input(&f, now);
            }
            for m in [&mut *a, &mut *b] {
                let selected = m.partner().is_some();
                m.set_selected(selected);
            }
        }
    }

    #[test]
    fn two_sides_come_up_and_notice_silence() {
        let (mut a, mut b) = (member(1), member(2));
        talk(&mut a, &mut b, 0, 3);
        assert!(a.is_distributing() && b.is_distributing());
        assert_eq!(a.partner(), Some(([2, 0, 0, 0, 0, 2], 2)));
        for i in 0..80 {
            a.tick(true, (30 + i) * SECOND / 10);
            let selected = a.partner().is_some();
            a.set_selected(selected);
        }
        assert!(!a.is_distributing(), "three seconds of silence end it");
        talk(&mut a, &mut b, 20 * SECOND, 3);
        assert!(a.is_distributing());
        a.tick(false, 30 * SECOND);
        a.set_selected(false);
        assert!(!a.is_distributing());
    }

    #[test]
    fn a_loop_and_garbage_are_ignored() {
        let mut a = member(1);
        let own = a.tick(true, 0).unwrap();
        assert!(!a.input(&own, 0));
        for n in 0..own.len() {
            member(2).input(&own[..n], 0);
        }
        assert!(a.partner().is_none());
    }
}

//! What controllers are told unasked: packets, removed rules, port changes.

use super::fields::{put_match_nx, put_match13};
use super::match10;
use super::ports::{put_port_10, put_port_13};
use super::session::{Role, Roles, Session, kind, nxt};
use super::wire::{NO_BUFFER, OfError, Put, Reader, Result, Version, port_to_16};
use crate::clock::{Nanos, SECOND};
use crate::event::Event;
use crate::packet::key::{Field, FlowKey};
use crate::pipeline::{FlowSpec, Match};
use crate::switch::{PortInfo, Switch};

/// Output beyond which a session is told no more: it does not read.
const OUTPUT_MAX: usize = 4 << 20;

/// Which messages a controller wants, one bit a reason; first as master or equal, second as slave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AsyncMasks {
    packet_in: [u32; 2],
    port_status: [u32; 2],
    flow_removed: [u32; 2],
}

impl Default for AsyncMasks {
    fn default() -> Self {
        // As the specification says: a slave is told of ports only. Packets whose time to live ran out (reason 2) are
        // not told.
        Self { packet_in: [0b011, 0], port_status: [0b111, 0b111], flow_removed: [0b1111, 0] }
    }
}

impl AsyncMasks {
    pub fn decode(mut r: Reader<'_>) -> Result<Self> {
        let mut pair = || Ok([r.u32()?, r.u32()?]);
        let masks = Self { packet_in: pair()?, port_status: pair()?, flow_removed: pair()? };
        r.end().map(|()| masks).map_err(|_| OfError::BAD_LEN)
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut b = Vec::new();
        for m in [self.packet_in, self.port_status, self.flow_removed].iter().flatten() {
            b.put32(*m);
        }
        b
    }
}

fn wants(masks: [u32; 2], role: Role, reason: u8) -> bool {
    masks[usize::from(role == Role::Slave)] >> (reason & 31) & 1 != 0
}

/// Seconds and the nanoseconds beyond.
pub(super) fn split_time(t: Nanos) -> (u32, u32) {
    ((t / SECOND) as u32, (t % SECOND) as u32)
}

impl Session {
    /// Tells the peer of an event, if it wants to know.
    pub fn notify(&mut self, switch: &Switch, roles: &Roles, event: &Event) {
        if !self.is_open() || self.output.len() > OUTPUT_MAX {
            return;
        }
        let role = self.role(roles);
        let silent = self.miss_send_len == 0;
        match event {
            Event::PacketIn { reason, .. } => {
                if !silent && wants(self.masks.packet_in, role, *reason) {
                    self.packet_in(event);
                }
            }
            Event::FlowRemoved { spec, reason, counts, duration } => {
                if !silent && wants(self.masks.flow_removed, role, *reason) {
                    self.flow_removed(spec, *reason, *counts, *duration);
                }
            }
            Event::PortAdded(id) => self.port_status(switch, role, 0, *id),
            Event::PortRemoved(id) => self.port_status(switch, role, 1, *id),
            Event::PortChanged(id) => self.port_status(switch, role, 2, *id),
        }
    }

    fn packet_in(&mut self, event: &Event) {
        let Event::PacketIn { in_port, reason, table, cookie, length, frame, key } = event else { return };
        let data = &frame[..frame.len().min(60_000)];
        let mut b = Vec::new();
        b.put32(NO_BUFFER);
        b.put16((*length).min(0xffff) as u16);
        match (self.version(), self.nicira_packets) {
            (Version::V10, false) => {
                b.put16(port_to_16(*in_port));
                b.put8(*reason);
                b.put8(0);
                b.extend_from_slice(data);
                self.send(kind::PACKET_IN, 0, &b);
            }
            (version, nicira) => {
                b.put8(*reason);
                b.put8(*table);
                b.put64(*cookie);
                let m = metadata(key, *in_port);
                if nicira {
                    let at = b.len();
                    b.put16(0);
                    b.zeros(6);
                    let len = put_match_nx(&mut b, &m);
                    b[at..at + 2].copy_from_slice(&len.to_be_bytes());
                } else {
                    put_match13(&mut b, &m);
                }
                b.put16(0);
                b.extend_from_slice(data);
                if nicira && version == Version::V10 {
                    self.send_nicira(nxt::PACKET_IN, 0, &b);
                } else {
                    self.send(kind::PACKET_IN, 0, &b);
                }
            }
        }
    }

    fn flow_removed(&mut self, s: &FlowSpec, reason: u8, (packets, bytes): (u64, u64), duration: Nanos) {
        let (seconds, nanos) = split_time(duration);
        let mut b = Vec::new();
        let v10 = self.version() == Version::V10;
        if v10 && !self.nicira_rules {
            match10::put(&mut b, &s.matches);
        }
        b.put64(s.cookie);
        b.put16(s.priority);
        b.put8(reason);
        b.put8(match (v10, self.nicira_rules) {
            (true, false) => 0,
            // Nicira's format counts tables from one, zero stands for unknown.
            (true, true) => s.table.wrapping_add(1),
            _ => s.table,
        });
        b.put32(seconds);
        b.put32(nanos);
        b.put16(s.idle_timeout);
        if !v10 {
            b.put16(s.hard_timeout);
        }
        let length_at = b.len();
        if v10 {
            b.put16(0);
        }
        b.put64(packets);
        b.put64(bytes);
        if v10 && self.nicira_rules {
            let len = put_match_nx(&mut b, &s.matches);
            b[length_at..length_at + 2].copy_from_slice(&len.to_be_bytes());
            self.send_nicira(nxt::FLOW_REMOVED, 0, &b);
        } else {
            if !v10 {
                put_match13(&mut b, &s.matches);
            }
            self.send(kind::FLOW_REMOVED, 0, &b);
        }
    }

    fn port_status(&mut self, switch: &Switch, role: Role, reason: u8, id: u32) {
        if self.miss_send_len == 0 || !wants(self.masks.port_status, role, reason) {
            return;
        }
        let port = switch.ports().into_iter().find(|p| p.id == id);
        // Of a port that is gone only the number is known.
        let port = port.unwrap_or_else(|| PortInfo {
            id,
            name: String::new(),
            kind: "",
            link_up: false,
            config: Default::default(),
            stats: Default::default(),
        });
        let mut b = Vec::new();
        b.put8(reason);
        b.zeros(7);
        if self.version() == Version::V10 {
            put_port_10(&mut b, &port)
        } else {
            put_port_13(&mut b, &port)
        }
        self.send(kind::PORT_STATUS, 0, &b);
    }
}

/// The fields of a packet's key that are not in the packet.
fn metadata(key: &FlowKey, in_port: u32) -> Match {
    let mut m = Match::default().field(Field::InPort, in_port.into());
    let fields =
        [Field::TunId, Field::Metadata, Field::CtState, Field::CtZone, Field::CtMark, Field::CtLabel];
    for f in fields.into_iter().chain((0..8).map(Field::Reg)) {
        if key.get(f) != 0 {
            m = m.field(f, key.get(f));
        }
    }
    m
}

//! Actions and instructions as OpenFlow 1.0 and 1.3 and Nicira's extensions write them: writing.

use super::actions::{
    LEARN_BITS, LEARN_IMMEDIATE, LEARN_LOAD, LEARN_OUTPUT, REASON_ACTION, REASON_MISS, WHOLE, instruction,
    kind, nx,
};
use super::fields::{Dialect, WireField, field_for};
use super::wire::{NICIRA, Put, Version, port_to_16, reserved};
use crate::packet::key::Field;
use crate::packet::vlan::PRESENT;
use crate::pipeline::{Action, ConntrackAction, Instructions, LearnSpec, LearnStep, Location, Match};
use crate::port::PortId;

/// Writes actions in one version, for rules with a given match.
pub(crate) struct Encoder<'a> {
    version: Version,
    context: &'a Match,
    /// Whether the rule is the one for packets that no other matches.
    is_miss: bool,
    out: &'a mut Vec<u8>,
}

impl<'a> Encoder<'a> {
    pub fn new(version: Version, context: &'a Match, out: &'a mut Vec<u8>) -> Self {
        Self { version, context, is_miss: false, out }
    }

    /// Says whether the actions are those of the rule for packets that no other matches.
    pub fn of_miss(self, is_miss: bool) -> Self {
        Self { is_miss, ..self }
    }

    fn dialect(&self) -> Dialect {
        if self.version == Version::V10 { Dialect::Nxm } else { Dialect::Oxm }
    }

    /// Appends one action, padded, with its length filled in.
    fn action(&mut self, kind: u16, body: impl FnOnce(&mut Self)) {
        let start = self.out.len();
        self.out.put16(kind);
        self.out.put16(0);
        body(self);
        self.out.pad8(start);
        self.out.put_len(start + 2, start);
    }

    fn nicira(&mut self, subtype: u16, body: impl FnOnce(&mut Self)) {
        self.action(kind::EXPERIMENTER, |e| {
            e.out.put32(NICIRA);
            e.out.put16(subtype);
            body(e);
        });
    }

    /// Appends a list.
    pub fn actions(&mut self, list: &[Action]) {
        list.iter().for_each(|a| self.one(a));
    }

    fn output(&mut self, port: PortId, max_len: u16) {
        let v10 = self.version == Version::V10;
        self.action(kind::OUTPUT, |e| {
            if v10 {
                e.out.put16(port_to_16(port))
            } else {
                e.out.put32(port)
            }
            e.out.put16(max_len);
        });
    }

    fn one(&mut self, a: &Action) {
        let v10 = self.version == Version::V10;
        match a {
            Action::Output(p) => self.output(*p, 0),
            Action::InPort => self.output(reserved::IN_PORT, 0),
            Action::All => self.output(reserved::ALL, 0),
            Action::Flood => self.output(reserved::FLOOD, 0),
            Action::Normal => self.output(reserved::NORMAL, 0),
            // The rule for packets that no other matches says why by its place.
            Action::Controller { max_len, reason: REASON_MISS } if self.is_miss => {
                self.output(reserved::CONTROLLER, *max_len);
            }
            Action::Controller { max_len, reason: REASON_ACTION } => {
                self.output(reserved::CONTROLLER, *max_len)
            }
            Action::Controller { max_len, reason } => self.nicira(nx::CONTROLLER, |e| {
                e.out.put16(*max_len);
                e.out.put16(0);
                e.out.put8(*reason);
            }),
            Action::OutputField(l) => {
                let name = self.name(l);
                self.nicira(nx::OUTPUT_REG, |e| {
                    e.out.put16(offset_and_bits(l, name));
                    put_name(e.out, name);
                    e.out.put16(WHOLE);
                });
            }
            // Before 1.3 the tag is made by setting its VLAN.
            Action::PushVlan(_) if v10 => {}
            Action::PushVlan(tpid) => self.action(kind::PUSH_VLAN, |e| e.out.put16(*tpid)),
            Action::PopVlan => self.action(if v10 { kind::STRIP_VLAN } else { kind::POP_VLAN }, |_| ()),
            Action::SetField { field, value, mask } => self.set_field(*field, *value, *mask),
            Action::Move { from, to } => {
                let (a, b) = (self.name(from), self.name(to));
                self.nicira(nx::REG_MOVE, |e| {
                    e.out.put16(from.bits as u16);
                    e.out.put16(wire_offset(from, a));
                    e.out.put16(wire_offset(to, b));
                    put_name(e.out, a);
                    put_name(e.out, b);
                });
            }
            Action::DecTtl if v10 => self.nicira(nx::DEC_TTL, |_| ()),
            Action::DecTtl => self.action(kind::DEC_NW_TTL, |_| ()),
            Action::Group(id) => self.action(kind::GROUP, |e| e.out.put32(*id)),
            // An instruction, not an action, in 1.3; the pipeline allows it anywhere.
            Action::Meter(_) => {}
            Action::Resubmit { table: None, in_port } => self.nicira(nx::RESUBMIT, |e| {
                e.out.put16(port_to_16(in_port.unwrap_or(reserved::IN_PORT)));
            }),
            Action::Resubmit { table: Some(t), in_port } => self.nicira(nx::RESUBMIT_TABLE, |e| {
                e.out.put16(port_to_16(in_port.unwrap_or(reserved::IN_PORT)));
                e.out.put8(*t);
            }),
            Action::Conntrack(c) => self.conntrack(c),
            Action::Learn(l) => self.learn(l),
        }
    }

    fn name(&self, l: &Location) -> Option<&'static WireField> {
        field_for(l, self.context, self.dialect())
    }

    fn set_field(&mut self, field: Field, value: u128, mask: u128) {
        if mask == 0 {
            return;
        }
        let low = mask.trailing_zeros();
        let at = Location { field, offset: low, bits: 128 - mask.leading_zeros() - low };
        let whole_vlan = field == Field::Vlan && mask & 0xfff == 0xfff && mask & 0xe000 == 0;
        if self.version == Version::V10 && self.set_field_10(field, value, mask) {
            return;
        }
        let Some(w) = self.name(&at) else { return };
        if whole_vlan && self.version == Version::V13 {
            return self.action(kind::SET_FIELD, |e| w.put(e.out, value | u128::from(PRESENT), None));
        }
        if w.is_whole(mask) && self.version == Version::V13 {
            return self.action(kind::SET_FIELD, |e| w.put(e.out, value, None));
        }
        let contiguous = at.mask() == mask;
        if contiguous && at.bits <= 64 {
            return self.nicira(nx::REG_LOAD, |e| {
                e.out.put16(offset_and_bits(&at, Some(w)));
                put_name(e.out, Some(w));
                e.out.put64((value >> low) as u64);
            });
        }
        let partial = !w.is_whole(mask);
        self.nicira(nx::REG_LOAD2, |e| w.put(e.out, value, partial.then_some(mask)));
    }

    /// The actions that OpenFlow 1.0 has for single fields.
    fn set_field_10(&mut self, field: Field, value: u128, mask: u128) -> bool {
        let whole = mask == field.ones();
        let ip4 = mask == u128::from(u32::MAX);
        match field {
            Field::Vlan if mask & 0xefff == 0xfff => {
                self.action(kind::SET_VLAN_VID, |e| e.out.put16(value as u16 & 0xfff))
            }
            Field::Vlan if mask == 0xe000 => {
                self.action(kind::SET_VLAN_PCP, |e| e.out.put8((value >> 13) as u8))
            }
            Field::EthSrc if whole => self.action(kind::SET_DL_SRC, |e| e.out.put_number(value, 6)),
            Field::EthDst if whole => self.action(kind::SET_DL_DST, |e| e.out.put_number(value, 6)),
            Field::IpSrc if ip4 => self.action(kind::SET_NW_SRC, |e| e.out.put32(value as u32)),
            Field::IpDst if ip4 => self.action(kind::SET_NW_DST, |e| e.out.put32(value as u32)),
            Field::IpTos if mask == 0xfc => self.action(kind::SET_NW_TOS, |e| e.out.put8(value as u8)),
            Field::TpSrc if whole => self.action(kind::SET_TP_SRC, |e| e.out.put16(value as u16)),
            Field::TpDst if whole => self.action(kind::SET_TP_DST, |e| e.out.put16(value as u16)),
            _ => return false,
        }
        true
    }

    fn conntrack(&mut self, c: &ConntrackAction) {
        self.nicira(nx::CT, |e| {
            e.out.put16(u16::from(c.commit));
            e.out.put32(0);
            e.out.put16(c.zone);
            e.out.put8(c.table.unwrap_or(255));
            e.out.zeros(3);
            e.out.put16(0);
            if let Some((v, m)) = c.mark {
                e.set_field(Field::CtMark, v.into(), m.into());
            }
            if let Some((v, m)) = c.label {
                e.set_field(Field::CtLabel, v, m);
            }
        });
    }

    fn learn(&mut self, l: &LearnSpec) {
        self.nicira(nx::LEARN, |e| {
            let b = &l.base;
            e.out.put16(b.idle_timeout);
            e.out.put16(b.hard_timeout);
            e.out.put16(b.priority);
            e.out.put64(b.cookie);
            e.out.put16(u16::from(b.notify_removal));
            e.out.put8(b.table);
            e.out.put8(0);
            e.out.put32(0);
            l.steps.iter().for_each(|s| e.learn_step(s));
        });
    }

    fn learn_step(&mut self, s: &LearnStep) {
        let (flags, from, value, to) = match s {
            LearnStep::Match { from, to } => (0, Some(from), 0, Some(to)),
            LearnStep::MatchValue { value, to } => (LEARN_IMMEDIATE, None, *value, Some(to)),
            LearnStep::Load { from, to } => (LEARN_LOAD, Some(from), 0, Some(to)),
            LearnStep::LoadValue { value, to } => (LEARN_LOAD | LEARN_IMMEDIATE, None, *value, Some(to)),
            LearnStep::Output(from) => (LEARN_OUTPUT, Some(from), 0, None),
        };
        let bits = from.or(to).map_or(0, |l| l.bits) as u16;
        self.out.put16(flags | (bits & LEARN_BITS));
        match from {
            Some(l) => self.place(l),
            None => self.out.put_number(value, usize::from(bits).div_ceil(16) * 2),
        }
        if let Some(l) = to {
            self.place(l);
        }
    }

    fn place(&mut self, l: &Location) {
        let w = self.name(l);
        put_name(self.out, w);
        self.out.put16(wire_offset(l, w));
    }

    /// Appends OpenFlow 1.3's instructions.
    pub fn instructions(&mut self, i: &Instructions) {
        // The pipeline runs a meter first wherever the rule names it in front.
        let (meter, apply) = match (i.meter, i.apply.split_first()) {
            (None, Some((Action::Meter(m), rest))) => (Some(*m), rest),
            (m, _) => (m, &i.apply[..]),
        };
        if let Some(m) = meter {
            self.action(instruction::METER, |e| e.out.put32(m));
        }
        if !apply.is_empty() {
            self.action(instruction::APPLY_ACTIONS, |e| {
                e.out.put32(0);
                e.actions(apply);
            });
        }
        if i.clear {
            self.action(instruction::CLEAR_ACTIONS, |_| ());
        }
        if !i.write.is_empty() {
            self.action(instruction::WRITE_ACTIONS, |e| {
                e.out.put32(0);
                e.actions(&i.write);
            });
        }
        if let Some((value, mask)) = i.metadata {
            self.action(instruction::WRITE_METADATA, |e| {
                e.out.put32(0);
                e.out.put64(value);
                e.out.put64(mask);
            });
        }
        if let Some(t) = i.goto {
            self.action(instruction::GOTO_TABLE, |e| e.out.put8(t));
        }
    }

    /// Appends instructions as OpenFlow 1.0 can say them, as one list of actions.
    pub fn instructions_10(&mut self, i: &Instructions) {
        self.actions(&i.apply);
        self.actions(&i.write);
        if let Some((value, mask)) = i.metadata {
            self.nicira(nx::WRITE_METADATA, |e| {
                e.out.zeros(6);
                e.out.put64(value);
                e.out.put64(mask);
            });
        }
        if let Some(t) = i.goto {
            self.one(&Action::Resubmit { table: Some(t), in_port: None });
        }
    }
}

fn put_name(out: &mut Vec<u8>, w: Option<&WireField>) {
    match w {
        Some(w) => w.put_name(out),
        None => out.put32(0),
    }
}

/// Where a part of a field begins, counted on the wire.
fn wire_offset(l: &Location, w: Option<&WireField>) -> u16 {
    w.map_or(0, |w| w.wire_offset(l)) as u16
}

fn offset_and_bits(l: &Location, w: Option<&WireField>) -> u16 {
    wire_offset(l, w) << 6 | (l.bits.saturating_sub(1) as u16 & 0x3f)
}

//! Actions and instructions as OpenFlow 1.0 and 1.3 and Nicira's extensions write them: reading.
//! [`super::actions_out`] writes them.

use super::fields::{self, WireField};
use super::wire::{NICIRA, OfError, Reader, Result, Version, port_from_16, reserved};
use crate::packet::key::{Field, mac_u64};
use crate::pipeline::{
    Action, ConntrackAction, FlowSpec, Instructions, LearnSpec, LearnStep, Location, Match,
};
use crate::port::{PORT_MAX, PortId};

/// Most actions in one list.
const ACTIONS_MAX: usize = 4096;
/// The frame whole, in the actions that give it to controllers.
pub(super) const WHOLE: u16 = u16::MAX;
/// Reason "a rule did it" of packets given to controllers (`OFPR_ACTION`).
pub(super) const REASON_ACTION: u8 = 1;
/// Reason "no rule matched" (`OFPR_NO_MATCH`): the rule of lowest priority that matches everything did it.
pub(super) const REASON_MISS: u8 = 0;
const PCP: u128 = 0xe000;
const VID: u128 = 0x0fff;

/// OpenFlow's own action numbers.
pub(super) mod kind {
    pub const OUTPUT: u16 = 0;
    pub const EXPERIMENTER: u16 = 0xffff;
    /// 1.0.
    pub const SET_VLAN_VID: u16 = 1;
    pub const SET_VLAN_PCP: u16 = 2;
    pub const STRIP_VLAN: u16 = 3;
    pub const SET_DL_SRC: u16 = 4;
    pub const SET_DL_DST: u16 = 5;
    pub const SET_NW_SRC: u16 = 6;
    pub const SET_NW_DST: u16 = 7;
    pub const SET_NW_TOS: u16 = 8;
    pub const SET_TP_SRC: u16 = 9;
    pub const SET_TP_DST: u16 = 10;
    pub const ENQUEUE: u16 = 11;
    /// 1.3.
    pub const PUSH_VLAN: u16 = 17;
    pub const POP_VLAN: u16 = 18;
    pub const SET_QUEUE: u16 = 21;
    pub const GROUP: u16 = 22;
    pub const SET_NW_TTL: u16 = 23;
    pub const DEC_NW_TTL: u16 = 24;
    pub const SET_FIELD: u16 = 25;
}

/// Nicira's action numbers.
pub(super) mod nx {
    pub const RESUBMIT: u16 = 1;
    pub const SET_TUNNEL: u16 = 2;
    pub const SET_QUEUE: u16 = 4;
    pub const REG_MOVE: u16 = 6;
    pub const REG_LOAD: u16 = 7;
    pub const NOTE: u16 = 8;
    pub const SET_TUNNEL64: u16 = 9;
    pub const RESUBMIT_TABLE: u16 = 14;
    pub const OUTPUT_REG: u16 = 15;
    pub const LEARN: u16 = 16;
    pub const DEC_TTL: u16 = 18;
    pub const CONTROLLER: u16 = 20;
    pub const DEC_TTL_CNT_IDS: u16 = 21;
    pub const WRITE_METADATA: u16 = 22;
    pub const OUTPUT_REG2: u16 = 32;
    pub const REG_LOAD2: u16 = 33;
    pub const CT: u16 = 35;
}

/// Learn: where a step's value comes from and goes to.
pub(super) const LEARN_IMMEDIATE: u16 = 1 << 13;
pub(super) const LEARN_LOAD: u16 = 1 << 11;
pub(super) const LEARN_OUTPUT: u16 = 2 << 11;
pub(super) const LEARN_DST: u16 = 3 << 11;
pub(super) const LEARN_BITS: u16 = (1 << 11) - 1;

/// What actions are checked against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context<'a> {
    pub version: Version,
    /// What the packets are known to be; `None`: nothing is checked (a packet that a controller sends, a bucket).
    pub matches: Option<&'a Match>,
}

fn bad_argument<T>() -> Result<T> {
    Err(OfError::ACTION_ARGUMENT)
}

/// The action that sends to a port.
pub(crate) fn output(port: PortId, max_len: u16) -> Result<Action> {
    Ok(match port {
        reserved::IN_PORT => Action::InPort,
        reserved::TABLE => Action::Resubmit { table: Some(0), in_port: None },
        reserved::NORMAL => Action::Normal,
        reserved::FLOOD => Action::Flood,
        reserved::ALL => Action::All,
        reserved::CONTROLLER => Action::Controller { max_len, reason: REASON_ACTION },
        reserved::LOCAL | 1..=PORT_MAX => Action::Output(port),
        _ => return Err(OfError::ACTION_OUT_PORT),
    })
}

/// Reads a list of actions that fills `r`.
pub(crate) fn take_actions(mut r: Reader<'_>, context: Context<'_>) -> Result<Vec<Action>> {
    let mut list = Vec::new();
    while !r.is_empty() {
        let (kind, len) = (r.u16()?, usize::from(r.u16()?));
        if len < 8 || len % 8 != 0 {
            return Err(OfError::ACTION_LEN);
        }
        let body = r.sub(len - 4)?.failing(OfError::ACTION_LEN);
        if let Some(a) = take_action(kind, body, context)? {
            list.push(a);
        }
        if list.len() > ACTIONS_MAX {
            return Err(OfError::ACTION_TOO_MANY);
        }
    }
    Ok(list)
}

fn take_action(kind: u16, mut r: Reader<'_>, c: Context<'_>) -> Result<Option<Action>> {
    if kind == kind::EXPERIMENTER {
        return take_experimenter(r, c);
    }
    let set = |field, value: u128, mask: u128| Action::SetField { field, value, mask };
    let action = match (c.version, kind) {
        (Version::V10, kind::OUTPUT) => output(port_from_16(r.u16()?), r.u16()?)?,
        (Version::V10, kind::SET_VLAN_VID) => set(Field::Vlan, u128::from(r.u16()?) & VID, VID),
        (Version::V10, kind::SET_VLAN_PCP) => set(Field::Vlan, u128::from(r.u8()? & 7) << 13, PCP),
        (Version::V10, kind::STRIP_VLAN) => Action::PopVlan,
        (Version::V10, kind::SET_DL_SRC) => {
            set(Field::EthSrc, mac_u64(r.bytes(6)?).into(), Field::EthSrc.ones())
        }
        (Version::V10, kind::SET_DL_DST) => {
            set(Field::EthDst, mac_u64(r.bytes(6)?).into(), Field::EthDst.ones())
        }
        (Version::V10, kind::SET_NW_SRC) => set(Field::IpSrc, r.u32()?.into(), u32::MAX.into()),
        (Version::V10, kind::SET_NW_DST) => set(Field::IpDst, r.u32()?.into(), u32::MAX.into()),
        (Version::V10, kind::SET_NW_TOS) => set(Field::IpTos, u128::from(r.u8()? & 0xfc), 0xfc),
        (Version::V10, kind::SET_TP_SRC) => set(Field::TpSrc, r.u16()?.into(), 0xffff),
        (Version::V10, kind::SET_TP_DST) => set(Field::TpDst, r.u16()?.into(), 0xffff),
        // There are no queues to choose from, so only the port matters.
        (Version::V10, kind::ENQUEUE) => output(port_from_16(r.u16()?), 0)?,
        (Version::V13, kind::OUTPUT) => output(r.u32()?, r.u16()?)?,
        (Version::V13, kind::PUSH_VLAN) => match r.u16()? {
            tpid @ (0x8100 | 0x88a8) => Action::PushVlan(tpid),
            _ => return bad_argument(),
        },
        (Version::V13, kind::POP_VLAN) => Action::PopVlan,
        (Version::V13, kind::GROUP) => Action::Group(r.u32()?),
        (Version::V13, kind::SET_NW_TTL) => set(Field::IpTtl, r.u8()?.into(), 0xff),
        (Version::V13, kind::DEC_NW_TTL) => Action::DecTtl,
        (Version::V13, kind::SET_FIELD) => take_set_field(&mut r, c)?,
        (Version::V13, kind::SET_QUEUE) => return Err(OfError::ACTION_QUEUE),
        _ => return Err(OfError::ACTION_TYPE),
    };
    Ok(Some(action))
}

/// Names errors of the fields that actions hold.
fn in_action(e: OfError) -> OfError {
    match e {
        OfError::MATCH_FIELD => OfError::ACTION_SET_TYPE,
        OfError::MATCH_LEN => OfError::ACTION_SET_LEN,
        OfError::MATCH_VALUE | OfError::MATCH_MASK => OfError::ACTION_SET_ARGUMENT,
        e => e,
    }
}

/// Whether actions may write the field.
fn check_writable(w: &WireField, at: &Location, c: Context<'_>) -> Result<()> {
    if matches!(at.field, Field::CtState | Field::CtZone | Field::Frag | Field::EthType) {
        return Err(OfError::ACTION_SET_ARGUMENT);
    }
    // Tags are pushed by the list itself, so that a match need not know of them.
    let met = at.field == Field::Vlan || c.matches.is_none_or(|m| w.needs.met(m));
    if met { Ok(()) } else { Err(OfError::ACTION_MATCH_INCONSISTENT) }
}

fn take_set_field(r: &mut Reader<'_>, c: Context<'_>) -> Result<Action> {
    let e = fields::take_entry(r).map_err(in_action)?;
    let at = e.wire.location();
    check_writable(e.wire, &at, c)?;
    let (value, mask) = match at.field {
        // The "tagged" mark comes with the VLAN number and is no bit of the tag.
        Field::Vlan => (e.value & !0x1000, e.mask & !0x1000),
        _ => (e.value & e.mask, e.mask),
    };
    Ok(Action::SetField { field: at.field, value, mask })
}

fn part(w: &WireField, offset: u16, bits: u16) -> Result<Location> {
    w.part(offset.into(), bits.into()).ok_or(OfError::ACTION_ARGUMENT)
}

/// Reads "offset << 6 | bits - 1".
fn offset_and_bits(v: u16) -> (u16, u16) {
    (v >> 6, (v & 0x3f) + 1)
}

fn resubmit_port(port: u16) -> Option<PortId> {
    Some(port_from_16(port)).filter(|p| *p != reserved::IN_PORT)
}

fn take_experimenter(mut r: Reader<'_>, c: Context<'_>) -> Result<Option<Action>> {
    if r.u32()? != NICIRA {
        return Err(OfError::ACTION_EXPERIMENTER);
    }
    let name = |r: &mut Reader<'_>| fields::take_name(r).map_err(in_action);
    let action = match r.u16()? {
        nx::RESUBMIT => Action::Resubmit { table: None, in_port: resubmit_port(r.u16()?) },
        nx::RESUBMIT_TABLE => {
            let in_port = resubmit_port(r.u16()?);
            Action::Resubmit { table: Some(r.u8()?).filter(|t| *t != 255), in_port }
        }
        nx::SET_TUNNEL => {
            r.skip(2)?;
            Action::SetField { field: Field::TunId, value: r.u32()?.into(), mask: Field::TunId.ones() }
        }
        nx::SET_TUNNEL64 => {
            r.skip(6)?;
            Action::SetField { field: Field::TunId, value: r.u64()?.into(), mask: Field::TunId.ones() }
        }
        nx::SET_QUEUE => return Err(OfError::ACTION_QUEUE),
        nx::REG_MOVE => {
            let (bits, from_offset, to_offset) = (r.u16()?, r.u16()?, r.u16()?);
            let (from, to_field) = (name(&mut r)?, name(&mut r)?);
            let (from, to) = (part(from, from_offset, bits)?, part(to_field, to_offset, bits)?);
            check_writable(to_field, &to, c)?;
            if from.bits != to.bits {
                return bad_argument();
            }
            Action::Move { from, to }
        }
        nx::REG_LOAD => {
            let (offset, bits) = offset_and_bits(r.u16()?);
            let w = name(&mut r)?;
            let value = r.u64()?;
            let at = part(w, offset, bits)?;
            check_writable(w, &at, c)?;
            if bits < 64 && value >> bits != 0 {
                return bad_argument();
            }
            Action::SetField { field: at.field, value: at.place(value.into()), mask: at.mask() }
        }
        nx::REG_LOAD2 => take_set_field(&mut r, c)?,
        nx::WRITE_METADATA => {
            r.skip(6)?;
            let (value, mask) = (r.u64()?, r.u64()?);
            Action::SetField { field: Field::Metadata, value: (value & mask).into(), mask: mask.into() }
        }
        // A comment.
        nx::NOTE => return Ok(None),
        nx::OUTPUT_REG => {
            let (offset, bits) = offset_and_bits(r.u16()?);
            let w = name(&mut r)?;
            Action::OutputField(part(w, offset, bits)?)
        }
        nx::OUTPUT_REG2 => {
            let (offset, bits) = offset_and_bits(r.u16()?);
            r.skip(2)?;
            let w = name(&mut r)?;
            Action::OutputField(part(w, offset, bits)?)
        }
        nx::LEARN => take_learn(&mut r)?,
        nx::DEC_TTL | nx::DEC_TTL_CNT_IDS => Action::DecTtl,
        nx::CONTROLLER => {
            let (max_len, _id, reason) = (r.u16()?, r.u16()?, r.u8()?);
            Action::Controller { max_len, reason }
        }
        nx::CT => take_conntrack(&mut r, c)?,
        _ => return Err(OfError::ACTION_EXP_TYPE),
    };
    Ok(Some(action))
}

fn take_conntrack(r: &mut Reader<'_>, c: Context<'_>) -> Result<Action> {
    const COMMIT: u16 = 1;
    const FORCE: u16 = 2;
    let (flags, zone_field, zone, table) = (r.u16()?, r.u32()?, r.u16()?, r.u8()?);
    r.skip(3)?;
    let helper = r.u16()?;
    if zone_field != 0 || helper != 0 || flags & !(COMMIT | FORCE) != 0 {
        return bad_argument();
    }
    let commit = flags & COMMIT != 0;
    let mut ct =
        ConntrackAction { zone, commit, table: Some(table).filter(|t| *t != 255), ..Default::default() };
    let mut rest = r.clone();
    // The nested list may end in padding.
    while rest.len() >= 8 {
        let mut peek = rest.clone();
        let (kind, len) = (peek.u16()?, usize::from(peek.u16()?));
        if kind == 0 && len == 0 {
            break;
        }
        if len < 8 {
            return Err(OfError::ACTION_LEN);
        }
        for a in take_actions(rest.sub(len)?, Context { matches: None, ..c })? {
            let join = |old: Option<(u128, u128)>, value: u128, mask: u128| {
                let (v, m) = old.unwrap_or_default();
                ((v & !mask) | (value & mask), m | mask)
            };
            match a {
                Action::SetField { field: Field::CtMark, value, mask } if commit => {
                    let old = ct.mark.map(|(v, m)| (v.into(), m.into()));
                    let (v, m) = join(old, value, mask);
                    ct.mark = Some((v as u32, m as u32));
                }
                Action::SetField { field: Field::CtLabel, value, mask } if commit => {
                    ct.label = Some(join(ct.label, value, mask));
                }
                _ => return bad_argument(),
            }
        }
    }
    Ok(Action::Conntrack(ct))
}

fn take_learn(r: &mut Reader<'_>) -> Result<Action> {
    const SEND_FLOW_REMOVED: u16 = 1;
    let (idle, hard, priority, cookie) = (r.u16()?, r.u16()?, r.u16()?, r.u64()?);
    let (flags, table) = (r.u16()?, r.u8()?);
    r.skip(1)?;
    let fin = (r.u16()?, r.u16()?);
    if flags & !SEND_FLOW_REMOVED != 0 || fin != (0, 0) || table == 255 {
        return bad_argument();
    }
    let mut spec = LearnSpec {
        base: FlowSpec {
            table,
            priority,
            cookie,
            idle_timeout: idle,
            hard_timeout: hard,
            notify_removal: flags & SEND_FLOW_REMOVED != 0,
            ..FlowSpec::default()
        },
        steps: Vec::new(),
    };
    while r.len() >= 2 {
        let head = r.u16()?;
        if head == 0 {
            break;
        }
        spec.steps.push(take_learn_step(r, head)?);
    }
    Ok(Action::Learn(Box::new(spec)))
}

fn take_learn_step(r: &mut Reader<'_>, head: u16) -> Result<LearnStep> {
    let bits = head & LEARN_BITS;
    let place = |r: &mut Reader<'_>| {
        let w = fields::take_name(r).map_err(in_action)?;
        part(w, r.u16()?, bits)
    };
    let immediate = head & LEARN_IMMEDIATE != 0;
    let value = if immediate {
        let bytes = usize::from(bits).div_ceil(16) * 2;
        // Longer than any field.
        if bytes > 16 {
            return bad_argument();
        }
        r.number(bytes)?
    } else {
        0
    };
    let from = if immediate { None } else { Some(place(r)?) };
    let same = |from: &Location, to: &Location| if from.bits == to.bits { Ok(()) } else { bad_argument() };
    Ok(match (head & LEARN_DST, from) {
        (0, Some(from)) => {
            let to = place(r)?;
            same(&from, &to)?;
            LearnStep::Match { from, to }
        }
        (0, None) => LearnStep::MatchValue { value, to: place(r)? },
        (LEARN_LOAD, Some(from)) => {
            let to = place(r)?;
            same(&from, &to)?;
            LearnStep::Load { from, to }
        }
        (LEARN_LOAD, None) => LearnStep::LoadValue { value, to: place(r)? },
        (LEARN_OUTPUT, Some(from)) => LearnStep::Output(from),
        _ => return bad_argument(),
    })
}

/// OpenFlow 1.3's instruction numbers.
pub(super) mod instruction {
    pub const GOTO_TABLE: u16 = 1;
    pub const WRITE_METADATA: u16 = 2;
    pub const WRITE_ACTIONS: u16 = 3;
    pub const APPLY_ACTIONS: u16 = 4;
    pub const CLEAR_ACTIONS: u16 = 5;
    pub const METER: u16 = 6;
}

/// Reads the instructions of OpenFlow 1.3 that fill `r`, for a rule in `table`.
pub(crate) fn take_instructions(mut r: Reader<'_>, table: u8, m: &Match) -> Result<Instructions> {
    let mut i = Instructions::default();
    let context = Context { version: Version::V13, matches: Some(m) };
    while !r.is_empty() {
        let (kind, len) = (r.u16()?, usize::from(r.u16()?));
        if len < 8 || len % 8 != 0 {
            return Err(OfError::INSTRUCTION_LEN);
        }
        let mut b = r.sub(len - 4)?.failing(OfError::INSTRUCTION_LEN);
        match kind {
            instruction::GOTO_TABLE => match b.u8()? {
                next if next > table && next != 255 => i.goto = Some(next),
                _ => return Err(OfError::INSTRUCTION_TABLE),
            },
            instruction::WRITE_METADATA => {
                b.skip(4)?;
                let (value, mask) = (b.u64()?, b.u64()?);
                i.metadata = Some((value & mask, mask));
            }
            instruction::WRITE_ACTIONS => {
                b.skip(4)?;
                i.write = take_actions(b.failing(OfError::ACTION_LEN), context)?;
            }
            instruction::APPLY_ACTIONS => {
                b.skip(4)?;
                i.apply = take_actions(b.failing(OfError::ACTION_LEN), context)?;
            }
            instruction::CLEAR_ACTIONS => i.clear = true,
            instruction::METER => i.meter = Some(b.u32()?),
            _ => return Err(OfError::INSTRUCTION_UNKNOWN),
        }
    }
    Ok(i)
}

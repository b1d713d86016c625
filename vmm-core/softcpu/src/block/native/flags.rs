//! What instructions do with the status flags, and whether somebody looks at them.

use iced_x86::{Instruction, Mnemonic as M, OpKind, RflagsBits};

use super::step::Step;

const STATUS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// How an instruction changes the status flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Not at all.
    None,
    /// All of them get values that do not depend on what they were, but for the carry that [`Need::Condition`] tells.
    All,
    /// Some keep their value, always or under some condition.
    Some,
}

/// What an instruction reads of the status flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    Nothing,
    /// One condition, by the encoding of Jcc: the instruction can do with a byte that holds it.
    Condition(u8),
    /// CF, as a flag.
    Carry,
    /// Any of them.
    Flags,
}

/// The condition code that CF is.
pub(super) const CARRY: u8 = 2;

impl Need {
    /// The condition code that a saved byte has to hold.
    pub fn condition(self) -> Option<u8> {
        match self {
            Self::Condition(condition) => Some(condition),
            Self::Carry => Some(CARRY),
            Self::Nothing | Self::Flags => None,
        }
    }
}

pub(super) fn effect(i: &Instruction) -> Effect {
    if i.rflags_modified() & STATUS == 0 {
        return Effect::None;
    }
    match i.mnemonic() {
        M::Shl | M::Sal | M::Shr | M::Sar if counts(i, 1) => Effect::All,
        M::Shld | M::Shrd if counts(i, 2) => Effect::All,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Shld | M::Shrd => Effect::Some,
        M::Rol | M::Ror | M::Rcl | M::Rcr | M::Inc | M::Dec => Effect::Some,
        M::Bt | M::Bts | M::Btr | M::Btc | M::Clc | M::Stc | M::Cmc => Effect::Some,
        _ if i.rflags_modified() & STATUS == STATUS => Effect::All,
        _ => Effect::Some,
    }
}

/// Whether operand `n` is an immediate count that is not zero.
fn counts(i: &Instruction, n: u32) -> bool {
    count(i, n).is_some_and(|count| count != 0)
}

/// The count of a shift if operand `n` is an immediate, as the processor masks it.
pub(super) fn count(i: &Instruction, n: u32) -> Option<u8> {
    let wide = match i.op0_kind() {
        OpKind::Memory => i.memory_size().size() == 8,
        _ => i.op0_register().size() == 8,
    };
    (i.op_kind(n) == OpKind::Immediate8).then(|| i.immediate8() & if wide { 63 } else { 31 })
}

pub(super) fn need(i: &Instruction) -> Need {
    match i.mnemonic() {
        // The last two keep CF.
        M::Adc | M::Sbb | M::Inc | M::Dec => return Need::Carry,
        _ => {}
    }
    let condition = i.condition_code();
    if condition != iced_x86::ConditionCode::None
        && !matches!(i.mnemonic(), M::Loope | M::Loopne)
        && i.rflags_read() & STATUS != 0
    {
        return Need::Condition(condition as u8 - 1);
    }
    if i.rflags_read() & STATUS != 0 || effect(i) == Effect::Some { Need::Flags } else { Need::Nothing }
}

/// Whether the flags after step `n` can be seen in the record: by an exception, by the interpreter or by the next block.
pub(super) fn recorded(steps: &[Step], n: usize) -> bool {
    for step in &steps[n + 1..] {
        if step.observes() {
            return true;
        }
        if step.effect == Effect::All {
            return false;
        }
    }
    true
}

/// Whether nobody looks at the flags after step `n` at all.
pub(super) fn dead(steps: &[Step], n: usize) -> bool {
    for step in &steps[n + 1..] {
        if step.observes() || step.need != Need::Nothing {
            return false;
        }
        if step.effect == Effect::All {
            return true;
        }
    }
    false
}

/// The conditions that steps from `n` on read of the flags as they are before it, without the bit that inverts them.
pub(super) fn conditions(steps: &[Step], n: usize) -> Vec<u8> {
    let mut found = Vec::new();
    for step in &steps[n..] {
        if let Some(condition) = step.need.condition()
            && !found.contains(&(condition & !1))
        {
            found.push(condition & !1);
        }
        if step.effect != Effect::None {
            break;
        }
    }
    found
}

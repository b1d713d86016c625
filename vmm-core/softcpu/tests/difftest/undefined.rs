//! What the architecture leaves undefined, by instruction and input.

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

use super::state::State;

pub const CF: u64 = 1 << 0;
pub const PF: u64 = 1 << 2;
pub const AF: u64 = 1 << 4;
pub const ZF: u64 = 1 << 6;
pub const SF: u64 = 1 << 7;
pub const OF: u64 = 1 << 11;

/// RFLAGS bits that are undefined after the instruction with some input.
pub fn any_flags(instruction: &Instruction) -> u64 {
    match instruction.mnemonic() {
        M::Shl | M::Sal | M::Shr => AF | OF | CF,
        M::Sar => AF | OF,
        M::Rol | M::Ror | M::Rcl | M::Rcr => OF,
        _ => flags(instruction, &State::default()),
    }
}

/// Whether the instruction leaves all flags as they are for some inputs: shifts and rotates by zero.
pub fn may_keep_flags(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr)
}

/// RFLAGS bits that are undefined after the instruction completes with this input.
pub fn flags(instruction: &Instruction, input: &State) -> u64 {
    match instruction.mnemonic() {
        M::And | M::Or | M::Xor | M::Test => AF,
        M::Mul | M::Imul => SF | ZF | AF | PF,
        M::Div | M::Idiv => CF | PF | AF | ZF | SF | OF,
        M::Bsf | M::Bsr | M::Tzcnt | M::Lzcnt => CF | PF | AF | SF | OF,
        M::Bt | M::Bts | M::Btr | M::Btc => OF | SF | AF | PF,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Shld | M::Shrd | M::Rol | M::Ror | M::Rcl | M::Rcr => {
            shift_flags(instruction, input)
        }
        M::Aaa | M::Aas => OF | SF | ZF | PF,
        M::Aam | M::Aad => OF | AF | CF,
        M::Daa | M::Das => OF,
        _ => 0,
    }
}

fn shift_flags(instruction: &Instruction, input: &State) -> u64 {
    let count = shift_count(instruction, input);
    if count == 0 {
        return 0;
    }
    let width = operand_size(instruction) * 8;
    let overflow = if count == 1 { 0 } else { OF };
    match instruction.mnemonic() {
        M::Rol | M::Ror | M::Rcl | M::Rcr => overflow,
        M::Shld | M::Shrd if count > width => CF | PF | AF | ZF | SF | OF,
        M::Shld | M::Shrd => AF | overflow,
        M::Sar => AF | overflow,
        _ => AF | overflow | if count >= width { CF } else { 0 },
    }
}

fn shift_count(instruction: &Instruction, input: &State) -> u64 {
    let last = instruction.op_count() - 1;
    let count = match instruction.op_kind(last) {
        OpKind::Register => input.gpr[1] & 0xff,
        _ => instruction.immediate(last),
    };
    count & if operand_size(instruction) == 8 { 63 } else { 31 }
}

/// The size of the first operand in bytes.
fn operand_size(instruction: &Instruction) -> u64 {
    match instruction.op0_kind() {
        OpKind::Register => instruction.op0_register().size() as u64,
        _ => instruction.memory_size().size() as u64,
    }
}

/// Whether the value of the first operand is undefined.
pub fn result(instruction: &Instruction, input: &State) -> bool {
    matches!(instruction.mnemonic(), M::Shld | M::Shrd)
        && shift_count(instruction, input) > operand_size(instruction) * 8
}

/// First and end offsets within the memory operand that hold undefined bytes after the instruction: the result of a double
/// shift by too much, and the pointers and reserved fields of x87 save areas.
pub fn memory(instruction: &Instruction, input: &State) -> Vec<(u64, u64)> {
    match instruction.mnemonic() {
        M::Fnstenv | M::Fnsave if matches!(instruction.memory_size().size(), 28 | 108) => vec![(12, 28)],
        M::Fnstenv | M::Fnsave => vec![(6, 14)],
        // FOP, FIP, FDP; MXCSR_MASK.
        M::Fxsave | M::Fxsave64 => vec![(6, 24), (28, 32)],
        _ if result(instruction, input) => vec![(0, operand_size(instruction))],
        _ => Vec::new(),
    }
}

/// The general register that the first operand is, by number.
pub fn first_register(instruction: &Instruction) -> Option<usize> {
    let register = instruction.op0_register();
    (instruction.op0_kind() == OpKind::Register && register != Register::None && register.is_gpr())
        .then(|| register.full_register().number())
}

/// MXCSR flags that are undefined when the instruction raises `#XM`: with underflow or overflow unmasked
/// the processor does not say whether the result is also inexact, and dot products stop half-way.
pub fn mxcsr_flags(instruction: &Instruction, input: &State) -> u32 {
    const MASKS_OM_UM: u32 = 3 << 10;
    match instruction.mnemonic() {
        M::Dppd | M::Dpps => 0x3f,
        _ if input.fx.mxcsr & MASKS_OM_UM != MASKS_OM_UM => 1 << 5,
        _ => 0,
    }
}

//! Which status flags of a block nobody can see.

use iced_x86::{Instruction, Mnemonic as M, OpKind, RflagsBits};

const STATUS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// Bit n: whatever instruction n leaves in the status flags is overwritten by a following instruction of the block
/// before anything can look at it, be it the handler of a fault.
pub(super) fn overwritten_flags(instructions: &[Instruction]) -> u64 {
    let (mut result, mut dead) = (0, false);
    for (n, i) in instructions.iter().enumerate().rev() {
        result |= u64::from(dead) << n;
        dead = is_simple(i) && i.rflags_read() & STATUS == 0 && (dead || sets_all(i));
    }
    result
}

/// Whether the instruction works on registers only and cannot fault.
fn is_simple(i: &Instruction) -> bool {
    let registers = (0..i.op_count()).all(|n| match i.op_kind(n) {
        OpKind::Register => i.op_register(n).is_gpr(),
        OpKind::Memory => i.mnemonic() == M::Lea,
        _ => true,
    });
    registers && (sets_all(i) || is_move(i))
}

fn is_move(i: &Instruction) -> bool {
    matches!(
        i.mnemonic(),
        M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Lea
            | M::Nop
            | M::Endbr64
            | M::Not
            | M::Bswap
            | M::Cbw
            | M::Cwde
            | M::Cdqe
            | M::Cwd
            | M::Cdq
            | M::Cqo
    ) && i.rflags_modified() & STATUS == 0
}

/// Whether the instruction gives all status flags a value that does not depend on what they were.
fn sets_all(i: &Instruction) -> bool {
    match i.mnemonic() {
        M::Add | M::Sub | M::And | M::Or | M::Xor | M::Cmp | M::Test | M::Neg => true,
        M::Imul => i.op_count() > 1,
        M::Shl | M::Sal | M::Shr | M::Sar => {
            let mask = if i.op_count() > 0 && i.op0_register().size() == 8 { 63 } else { 31 };
            i.op1_kind() == OpKind::Immediate8 && i.immediate8() & mask != 0
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    fn overwritten(bytes: &[u8]) -> u64 {
        overwritten_flags(&Decoder::new(64, bytes, DecoderOptions::NONE).into_iter().collect::<Vec<_>>())
    }

    #[test]
    fn flags_that_are_overwritten_at_once_are_dead() {
        // add eax, ecx; mov edx, eax; cmp eax, ecx
        assert_eq!(overwritten(&[0x01, 0xc8, 0x89, 0xc2, 0x39, 0xc8]), 0b011);
        // add eax, ecx; adc edx, 0; cmp eax, ecx
        assert_eq!(overwritten(&[0x01, 0xc8, 0x83, 0xd2, 0, 0x39, 0xc8]), 0b010);
        // add eax, ecx; inc edx; cmp eax, ecx: INC keeps CF, but nobody reads it
        assert_eq!(overwritten(&[0x01, 0xc8, 0xff, 0xc2, 0x39, 0xc8]) & 0b010, 0b010);
    }

    #[test]
    fn a_fault_in_between_shows_the_flags() {
        // add eax, ecx; mov edx, [rbx]; cmp eax, ecx
        assert_eq!(overwritten(&[0x01, 0xc8, 0x8b, 0x13, 0x39, 0xc8]), 0b010);
        // add eax, ecx; cmp eax, [rbx]
        assert_eq!(overwritten(&[0x01, 0xc8, 0x3b, 0x03]), 0);
    }

    #[test]
    fn a_shift_by_nothing_overwrites_nothing() {
        // add eax, ecx; shl eax, 32
        assert_eq!(overwritten(&[0x01, 0xc8, 0xc1, 0xe0, 0x20]), 0);
        // add eax, ecx; shl rax, 32
        assert_eq!(overwritten(&[0x01, 0xc8, 0x48, 0xc1, 0xe0, 0x20]), 1);
        // add eax, ecx; shl eax, cl
        assert_eq!(overwritten(&[0x01, 0xc8, 0xd3, 0xe0]), 0);
    }
}

//! In what processors of other vendors differ from AMD's, whose behaviour the software processor has.
//!
//! On a host of another vendor such instructions are left out, and what they leave behind when they fault half-way is not
//! compared.

use std::sync::OnceLock;

use iced_x86::{Code, Instruction, Mnemonic as M, OpKind, Register};

use super::layout::Mode;

/// Whether the host's processor is AMD's, or made after them.
pub fn host_is_amd() -> bool {
    static AMD: OnceLock<bool> = OnceLock::new();
    *AMD.get_or_init(|| {
        let leaf = std::arch::x86_64::__cpuid(0);
        let name = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
        matches!(&name[..], b"AuthenticAMD" | b"HygonGenuine")
    })
}

/// Whether the host's processor executes the instruction as AMD's do.
pub fn executes_alike(mode: Mode, instruction: &Instruction) -> bool {
    if host_is_amd() {
        return true;
    }
    let operand = |kind| (0..instruction.op_count()).any(|i| instruction.op_kind(i) == kind);
    let memory = operand(OpKind::Memory);
    let segment =
        || instruction.op0_kind() == OpKind::Register && instruction.op0_register().is_segment_register();
    match instruction.mnemonic() {
        // With an operand-size prefix, AMD's near branches go to 16 bits in 64-bit code, too.
        _ if mode == Mode::Long && operand(OpKind::NearBranch16) => false,
        M::Ret => mode != Mode::Long || !matches!(instruction.code(), Code::Retnw | Code::Retnw_imm16),
        M::Call | M::Jmp if matches!(instruction.code(), Code::Call_rm16 | Code::Jmp_rm16) => {
            mode != Mode::Long
        }
        // Others ask for alignment.
        M::Sha1msg1
        | M::Sha1msg2
        | M::Sha1nexte
        | M::Sha1rnds4
        | M::Sha256msg1
        | M::Sha256msg2
        | M::Sha256rnds2 => !memory,
        // PREFETCHW with a register for its memory operand.
        M::Reservednop => !matches!(
            instruction.code(),
            Code::Reservednop_rm16_r16_0F0D
                | Code::Reservednop_rm32_r32_0F0D
                | Code::Reservednop_rm64_r64_0F0D
        ),
        // Others write only two bytes of what they push.
        M::Push => !segment(),
        // With LOCK, it is CR0 for others.
        M::Mov => !(0..instruction.op_count()).any(|i| {
            instruction.op_kind(i) == OpKind::Register && instruction.op_register(i) == Register::CR8
        }),
        // Whether the upper half of RCX is cleared where ECX counts.
        _ if instruction.is_string_instruction()
            && (instruction.has_rep_prefix() || instruction.has_repne_prefix()) =>
        {
            mode != Mode::Long || !(operand(OpKind::MemorySegESI) || operand(OpKind::MemoryESEDI))
        }
        _ => true,
    }
}

/// Whether the instruction leaves the same behind as on AMD's processors when it faults.
pub fn faults_alike(instruction: &Instruction) -> bool {
    let to_memory = instruction.op_count() > 0 && instruction.op0_kind() == OpKind::Memory;
    let string = instruction.is_string_instruction();
    let mmx = (0..instruction.op_count())
        .any(|i| instruction.op_kind(i) == OpKind::Register && instruction.op_register(i).is_mm());
    // Stores of the x87 unit write in parts and look at the value first or at the page.
    let x87 = to_memory && format!("{:?}", instruction.mnemonic()).starts_with('F');
    let known = matches!(instruction.mnemonic(), M::Bound | M::Maskmovq | M::Maskmovdqu);
    host_is_amd() || !(string || x87 || mmx || known)
}

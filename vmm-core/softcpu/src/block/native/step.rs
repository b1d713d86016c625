//! How each instruction of a block is translated.

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic as M, OpKind, Register};

use super::super::translate::unit::without_hint;
use super::flags::{self, Effect, Need};
use crate::hostop::{StubCache, depends_on_mxcsr, may_be_misaligned};
use crate::ops::operand::address_size;

/// The way in which an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// It does nothing.
    Nop,
    /// The same instruction on other registers.
    Plain,
    /// The same instruction on memory of the host.
    Memory,
    Lea,
    Push,
    Pop,
    Leave,
    /// SSE, with or without memory.
    Vector,
    /// The interpreter executes it.
    Call,
    /// A near branch at the end of the block.
    Branch,
    /// The interpreter goes on here, at the end of the block.
    Last,
}

/// One instruction of a block.
pub(super) struct Step {
    pub instruction: Instruction,
    pub form: Form,
    pub effect: Effect,
    pub need: Need,
}

impl Step {
    pub fn new(instruction: &Instruction, ends: bool, stubs: &StubCache) -> Self {
        let instruction = without_hint(instruction);
        let form = match ends {
            true if is_near_branch(&instruction) => Form::Branch,
            true => Form::Last,
            false => form(&instruction, stubs),
        };
        let (effect, need) = (flags::effect(&instruction), flags::need(&instruction));
        Self { instruction, form, effect, need }
    }

    /// Whether the flags have to be recorded before the instruction: it can leave generated code.
    pub fn observes(&self) -> bool {
        !matches!(self.form, Form::Nop | Form::Plain | Form::Lea)
    }
}

fn form(i: &Instruction, stubs: &StubCache) -> Form {
    let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    if memory && !can_address(i) {
        return Form::Call;
    }
    match i.mnemonic() {
        M::Nop
        | M::Endbr64
        | M::Endbr32
        | M::Prefetchw
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchnta => return Form::Nop,
        M::Lea => return if i.op0_register().size() >= 4 { Form::Lea } else { Form::Call },
        M::Push => return if can_push(i) { Form::Push } else { Form::Call },
        M::Pop => {
            let simple = i.op0_register().is_gpr64() && i.op0_register() != Register::RSP;
            return if simple { Form::Pop } else { Form::Call };
        }
        M::Leave => return if i.code() == Code::Leaveq { Form::Leave } else { Form::Call },
        _ => {}
    }
    if is_vector(i, stubs) {
        return Form::Vector;
    }
    if !is_general(i) || !general_operands(i, memory) {
        return Form::Call;
    }
    if memory { Form::Memory } else { Form::Plain }
}

/// Whether the memory operand is addressed with 64 bits, at an offset that fits an instruction.
fn can_address(i: &Instruction) -> bool {
    let known = matches!(i.memory_base(), Register::None | Register::RIP) || i.memory_base().is_gpr64();
    let index = i.memory_index() == Register::None || i.memory_index().is_gpr64();
    known && index && address_size(i) == 8 && i32::try_from(i.memory_displacement64() as i64).is_ok()
}

fn can_push(i: &Instruction) -> bool {
    i.op0_kind() == OpKind::Register && i.op0_register().is_gpr64()
        || matches!(i.code(), Code::Pushq_imm8 | Code::Pushq_imm32)
}

/// Instructions on general registers whose results, flags and implicit operands the host produces as it is.
fn is_general(i: &Instruction) -> bool {
    let mnemonic = matches!(
        i.mnemonic(),
        M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Add
            | M::Or
            | M::Adc
            | M::Sbb
            | M::And
            | M::Sub
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Shl
            | M::Sal
            | M::Shr
            | M::Sar
            | M::Rol
            | M::Ror
            | M::Rcl
            | M::Rcr
            | M::Shld
            | M::Shrd
            | M::Imul
            | M::Mul
            | M::Bswap
            | M::Bt
            | M::Bts
            | M::Btr
            | M::Btc
            | M::Bsf
            | M::Bsr
            | M::Cbw
            | M::Cwde
            | M::Cdqe
            | M::Cwd
            | M::Cdq
            | M::Cqo
            | M::Xchg
            | M::Xadd
            | M::Cmpxchg
    );
    let conditional = i.condition_code() != iced_x86::ConditionCode::None
        && i.flow_control() == iced_x86::FlowControl::Next
        && !i.is_string_instruction();
    mnemonic || conditional
}

fn general_operands(i: &Instruction, memory: bool) -> bool {
    let mut any_high = false;
    let mut wide = memory;
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Register => {
                let register = i.op_register(n);
                if !register.is_gpr() {
                    return false;
                }
                any_high |= is_high(register);
                wide |= register.full_register() == Register::RSP;
            }
            OpKind::Memory => {
                // A bit number in a register reaches beyond the operand.
                let bits = matches!(i.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc);
                if bits && i.op1_kind() == OpKind::Register {
                    return false;
                }
            }
            OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => {}
            _ => return false,
        }
    }
    // These registers cannot be named beside the host's upper eight.
    if any_high && wide {
        return false;
    }
    // Moves with an absolute 64-bit address have another encoding.
    !matches!(
        i.code(),
        Code::Mov_AL_moffs8
            | Code::Mov_AX_moffs16
            | Code::Mov_EAX_moffs32
            | Code::Mov_RAX_moffs64
            | Code::Mov_moffs8_AL
            | Code::Mov_moffs16_AX
            | Code::Mov_moffs32_EAX
            | Code::Mov_moffs64_RAX
    )
}

fn is_vector(i: &Instruction, stubs: &StubCache) -> bool {
    let xmm = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_xmm());
    let operands = (0..i.op_count()).all(|n| match i.op_kind(n) {
        OpKind::Register => i.op_register(n).is_xmm() || i.op_register(n).is_gpr(),
        OpKind::Memory | OpKind::Immediate8 => true,
        _ => false,
    });
    let known = i.cpuid_features().iter().all(|&f| {
        matches!(
            f,
            CpuidFeature::SSE
                | CpuidFeature::SSE2
                | CpuidFeature::SSE3
                | CpuidFeature::SSSE3
                | CpuidFeature::SSE4_1
                | CpuidFeature::SSE4_2
        ) && stubs.has(f)
    });
    // They have implicit operands.
    let special = matches!(
        i.mnemonic(),
        M::Blendvps
            | M::Blendvpd
            | M::Pblendvb
            | M::Pcmpestri
            | M::Pcmpestri64
            | M::Pcmpestrm
            | M::Pcmpestrm64
            | M::Pcmpistri
            | M::Pcmpistrm
    );
    xmm && operands && known && !special && i.encoding() == EncodingKind::Legacy && i.op_count() <= 3
}

/// AH, CH, DH or BH.
pub(super) fn is_high(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// Whether the host refuses a memory operand that is not aligned to 16 bytes.
pub(super) fn must_be_aligned(i: &Instruction) -> bool {
    i.memory_size().size() == 16 && !may_be_misaligned(i.mnemonic())
}

/// Whether MXCSR takes part.
pub(super) fn is_float(i: &Instruction) -> bool {
    depends_on_mxcsr(i.mnemonic())
}

fn is_near_branch(i: &Instruction) -> bool {
    match i.mnemonic() {
        M::Jmp | M::Call => match i.op0_kind() {
            OpKind::NearBranch64 => true,
            OpKind::Register => i.op0_register().is_gpr64(),
            OpKind::Memory => matches!(i.code(), Code::Jmp_rm64 | Code::Call_rm64) && can_address(i),
            _ => false,
        },
        M::Ret => matches!(i.code(), Code::Retnq | Code::Retnq_imm16),
        _ => i.is_jcc_short_or_near() && i.op0_kind() == OpKind::NearBranch64,
    }
}

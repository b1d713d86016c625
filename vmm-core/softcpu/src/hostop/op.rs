//! Classification: which unit runs an instruction and what it does with memory.

use iced_x86::{
    CodeSize, CpuidFeature as F, Encoder, EncodingKind, Instruction, Mnemonic as M, OpKind, Register,
    RflagsBits,
};

use super::control::Control;
use super::stub::{Slot, Stub, StubCache, canonical, is_x87};
use crate::cpu::{Cpu, Fault};

/// How the memory operand is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    None,
    Load,
    Store,
}

/// The unit that runs an instruction; decides what must be switched to the guest's state around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// General registers only (`POPCNT`, `CRC32`).
    Integer,
    /// XMM registers, independent of MXCSR.
    Sse,
    /// XMM registers, depends on MXCSR.
    SseFloat,
    /// MMX registers.
    Mmx,
    /// MMX registers, depends on MXCSR.
    MmxFloat,
    /// The x87 stack.
    X87,
}

/// The lanes of an XMM result that can be tiny. With underflow unmasked a tiny result raises `#XM` even if
/// it is exact, which the flags of a masked run do not show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tiny {
    None,
    Single { lanes: usize },
    Double { lanes: usize },
}

impl Tiny {
    fn of(mnemonic: M) -> Self {
        match mnemonic {
            M::Addss | M::Subss | M::Mulss | M::Divss | M::Cvtsd2ss => Self::Single { lanes: 1 },
            M::Addps
            | M::Subps
            | M::Mulps
            | M::Divps
            | M::Addsubps
            | M::Haddps
            | M::Hsubps
            | M::Dpps
            | M::Cvtpd2ps => Self::Single { lanes: 4 },
            M::Addsd | M::Subsd | M::Mulsd | M::Divsd => Self::Double { lanes: 1 },
            M::Addpd | M::Subpd | M::Mulpd | M::Divpd | M::Addsubpd | M::Haddpd | M::Hsubpd | M::Dppd => {
                Self::Double { lanes: 2 }
            }
            _ => Self::None,
        }
    }

    /// Whether a lane of the result is denormal.
    pub(super) fn occurs(self, result: &[u8; 16]) -> bool {
        match self {
            Self::None => false,
            Self::Single { lanes } => {
                result.as_chunks().0.iter().take(lanes).any(|&lane| f32::from_le_bytes(lane).is_subnormal())
            }
            Self::Double { lanes } => {
                result.as_chunks().0.iter().take(lanes).any(|&lane| f64::from_le_bytes(lane).is_subnormal())
            }
        }
    }
}

/// How an x87 instruction relates to the state around the register stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum X87 {
    /// Delivers a pending exception first, then records its address and opcode.
    Waiting,
    /// Writes an environment (`FNSTENV`, `FNSAVE`); does not look at pending exceptions.
    StoreEnvironment,
    /// Reads an environment (`FLDENV`, `FRSTOR`).
    LoadEnvironment,
}

impl X87 {
    fn of(mnemonic: M) -> Self {
        match mnemonic {
            M::Fnstenv | M::Fnsave => Self::StoreEnvironment,
            M::Fldenv | M::Frstor => Self::LoadEnvironment,
            _ => Self::Waiting,
        }
    }
}

impl Unit {
    pub(super) fn is_mmx(self) -> bool {
        matches!(self, Self::Mmx | Self::MmxFloat)
    }
}

/// What a [`HostOp`] runs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Body {
    /// A generated function.
    Stub(Stub),
    /// An instruction on control state, written in Rust.
    Control(Control),
}

/// Executes a translated instruction with the linear address of its memory operand.
pub(crate) type Run = fn(&mut Cpu, &HostOp, u64) -> Result<(), Fault>;

/// A translated instruction. The caller computes the linear address of the memory operand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostOp {
    pub(crate) run: Run,
    pub(super) body: Body,
    pub(super) unit: Unit,
    pub(super) first: Slot,
    pub(super) second: Slot,
    pub(super) memory: Memory,
    /// Size of the memory operand in bytes.
    pub(super) length: u16,
    /// Where the general-register result goes.
    pub(super) result: Slot,
    /// Which lanes of the result can underflow.
    pub(super) tiny: Tiny,
    /// How an x87 instruction treats pending exceptions and the environment.
    pub(super) x87: X87,
    /// The memory operand must be aligned to 16 bytes.
    pub(super) aligned: bool,
    /// RFLAGS bits that the instruction writes.
    pub(super) rflags: u16,
    /// The instruction looks at RFLAGS.
    pub(super) reads_rflags: bool,
    /// Segment and address size of an operand at rDI (`MASKMOVQ`, `MASKMOVDQU`).
    pub(super) implicit: Option<(u8, u8)>,
    /// Offset of the instruction in its block.
    pub(super) offset: u16,
    /// The x87 opcode as FOP stores it.
    pub(super) fop: u16,
}

/// Translates an instruction of the SSE to SSE4.2, AES, PCLMULQDQ, SHA, MMX and x87 sets, `POPCNT` and
/// `CRC32`, whose address is relative to its block. `None` for everything else, and for what the guest's
/// processor does not announce or the host does not have.
pub(crate) fn translate(instruction: &Instruction, stubs: &mut StubCache) -> Option<HostOp> {
    let mut op = describe(instruction, stubs)?;
    op.run = super::cpu::pick(&op);
    Some(op)
}

fn describe(instruction: &Instruction, stubs: &mut StubCache) -> Option<HostOp> {
    let unit = unit(instruction, stubs)?;
    let memory_operand = (0..instruction.op_count()).find(|&i| instruction.op_kind(i) == OpKind::Memory);
    let mut op = HostOp {
        run: |cpu, op, address| op.execute(cpu, address),
        body: Body::Control(Control::Nop),
        unit,
        first: Slot::None,
        second: Slot::None,
        memory: Memory::None,
        length: instruction.memory_size().size() as u16,
        result: Slot::None,
        tiny: Tiny::of(instruction.mnemonic()),
        x87: X87::of(instruction.mnemonic()),
        aligned: false,
        rflags: rflags_written(instruction),
        reads_rflags: instruction.rflags_read() != 0,
        implicit: implicit(instruction),
        offset: instruction.ip() as u16,
        fop: if unit == Unit::X87 { x87_opcode(instruction) } else { 0 },
    };
    if let Some(control) = Control::classify(instruction) {
        op.body = Body::Control(control);
        (op.memory, op.length, op.aligned) = control.memory();
        return Some(op);
    }
    let (body, first, second) = canonical(instruction)?;
    let stub = stubs.get(&body)?;
    op.body = Body::Stub(stub);
    (op.first, op.second) = (first, second);
    op.result = match (instruction.mnemonic(), first) {
        (M::Pcmpestri | M::Pcmpestri64 | M::Pcmpistri, _) => Slot::Gpr { number: 1, bytes: 4 },
        (_, Slot::Gpr { .. }) => first,
        _ => Slot::None,
    };
    if let Some(operand) = memory_operand {
        let store = if unit == Unit::X87 { x87_stores(instruction.mnemonic()) } else { operand == 0 };
        op.memory = if store { Memory::Store } else { Memory::Load };
        op.aligned = op.length == 16 && !may_be_misaligned(instruction.mnemonic());
    }
    Some(op)
}

fn unit(instruction: &Instruction, stubs: &StubCache) -> Option<Unit> {
    if instruction.mnemonic() == M::Fisttp && !stubs.has(F::SSE3) {
        return None;
    }
    if is_x87(instruction) || instruction.mnemonic() == M::Wait {
        return Some(Unit::X87);
    }
    let mnemonic = instruction.mnemonic();
    if matches!(mnemonic, M::Sfence | M::Lfence | M::Mfence | M::Clflush | M::Pause | M::Movnti) {
        return None;
    }
    let supported = instruction.cpuid_features().iter().all(|&feature| stubs.has(feature));
    if !supported || instruction.encoding() != EncodingKind::Legacy {
        return None;
    }
    let uses = |test: fn(Register) -> bool| {
        (0..instruction.op_count())
            .any(|i| instruction.op_kind(i) == OpKind::Register && test(instruction.op_register(i)))
    };
    Some(if uses(Register::is_mm) || mnemonic == M::Emms {
        if depends_on_mxcsr(mnemonic) { Unit::MmxFloat } else { Unit::Mmx }
    } else if depends_on_mxcsr(mnemonic) {
        Unit::SseFloat
    } else if uses(Register::is_xmm) || matches!(mnemonic, M::Ldmxcsr | M::Stmxcsr) {
        Unit::Sse
    } else {
        Unit::Integer
    })
}

/// Whether rounding, denormal handling or exception bits of MXCSR take part.
pub(crate) fn depends_on_mxcsr(mnemonic: M) -> bool {
    matches!(
        mnemonic,
        M::Addps
            | M::Addpd
            | M::Addss
            | M::Addsd
            | M::Subps
            | M::Subpd
            | M::Subss
            | M::Subsd
            | M::Mulps
            | M::Mulpd
            | M::Mulss
            | M::Mulsd
            | M::Divps
            | M::Divpd
            | M::Divss
            | M::Divsd
            | M::Sqrtps
            | M::Sqrtpd
            | M::Sqrtss
            | M::Sqrtsd
            | M::Rcpps
            | M::Rcpss
            | M::Rsqrtps
            | M::Rsqrtss
            | M::Minps
            | M::Minpd
            | M::Minss
            | M::Minsd
            | M::Maxps
            | M::Maxpd
            | M::Maxss
            | M::Maxsd
            | M::Cmpps
            | M::Cmppd
            | M::Cmpss
            | M::Cmpsd
            | M::Comiss
            | M::Comisd
            | M::Ucomiss
            | M::Ucomisd
            | M::Addsubps
            | M::Addsubpd
            | M::Haddps
            | M::Haddpd
            | M::Hsubps
            | M::Hsubpd
            | M::Dpps
            | M::Dppd
            | M::Roundps
            | M::Roundpd
            | M::Roundss
            | M::Roundsd
            | M::Cvtps2pd
            | M::Cvtpd2ps
            | M::Cvtss2sd
            | M::Cvtsd2ss
            | M::Cvtdq2ps
            | M::Cvtps2dq
            | M::Cvttps2dq
            | M::Cvtpd2dq
            | M::Cvttpd2dq
            | M::Cvtsi2ss
            | M::Cvtsi2sd
            | M::Cvtss2si
            | M::Cvtsd2si
            | M::Cvttss2si
            | M::Cvttsd2si
            | M::Cvtpi2ps
            | M::Cvtpi2pd
            | M::Cvtps2pi
            | M::Cvtpd2pi
            | M::Cvttps2pi
            | M::Cvttpd2pi
    )
}

/// Whether a memory operand of 16 bytes may be at any address.
pub(crate) fn may_be_misaligned(mnemonic: M) -> bool {
    matches!(
        mnemonic,
        // As on AMD processors.
        M::Sha1msg1
            | M::Sha1msg2
            | M::Sha1nexte
            | M::Sha1rnds4
            | M::Sha256msg1
            | M::Sha256msg2
            | M::Sha256rnds2
            | M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Lddqu
            | M::Pcmpestri
            | M::Pcmpestri64
            | M::Pcmpestrm
            | M::Pcmpestrm64
            | M::Pcmpistri
            | M::Pcmpistrm
    )
}

fn x87_stores(mnemonic: M) -> bool {
    matches!(mnemonic, M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp | M::Fnstenv | M::Fnsave)
}

fn implicit(instruction: &Instruction) -> Option<(u8, u8)> {
    let bytes = match instruction.op0_kind() {
        OpKind::MemorySegRDI => 8,
        OpKind::MemorySegEDI => 4,
        OpKind::MemorySegDI => 2,
        _ => return None,
    };
    let segment = match instruction.memory_segment() {
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::FS => 4,
        Register::GS => 5,
        _ => 3,
    };
    Some((segment, bytes))
}

/// The RFLAGS bits that an instruction writes, clears or leaves undefined.
fn rflags_written(instruction: &Instruction) -> u16 {
    let modified = instruction.rflags_modified();
    [
        (RflagsBits::CF, 1 << 0),
        (RflagsBits::PF, 1 << 2),
        (RflagsBits::AF, 1 << 4),
        (RflagsBits::ZF, 1 << 6),
        (RflagsBits::SF, 1 << 7),
        (RflagsBits::OF, 1 << 11),
    ]
    .into_iter()
    .filter(|&(bit, _)| modified & bit != 0)
    .fold(0, |mask, (_, flag)| mask | flag)
}

/// The low three bits of the opcode byte and the ModRM byte, as the FOP register stores them.
fn x87_opcode(instruction: &Instruction) -> u16 {
    let mut encoder = Encoder::new(if instruction.code_size() == CodeSize::Code64 { 64 } else { 32 });
    if encoder.encode(instruction, instruction.ip()).is_err() {
        return 0;
    }
    let bytes = encoder.take_buffer();
    let escape = bytes.iter().position(|byte| byte & 0xf8 == 0xd8);
    match escape.and_then(|at| bytes.get(at..at + 2)) {
        Some(&[escape, modrm]) => u16::from(escape & 7) << 8 | u16::from(modrm),
        _ => 0,
    }
}

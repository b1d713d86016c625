//! Stub generation: one guest instruction between loads and stores of the guest's registers.

use std::collections::HashMap;
use std::io;
use std::ptr::NonNull;

use iced_x86::{
    Code, CpuidFeature, Encoder, Instruction, InstructionInfoFactory, MemoryOperand, Mnemonic, OpAccess,
    OpKind, Register,
};

use super::arena::Arena;
use super::fpu::XMM_OFFSET;
use crate::state::FpuState;

/// What a stub leaves in RAX and RDX: the general-register result and RFLAGS.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Output {
    pub(crate) value: u64,
    pub(crate) rflags: u64,
}

/// Generated code. RDI and RSI point to the first and second operand (a register of the guest or
/// memory), RDX to the image that holds XMM0; RCX, R8 and R9 hold the guest's RAX, RDX, RFLAGS.
pub(crate) type Stub = unsafe extern "sysv64" fn(*mut u8, *const u8, *mut FpuState, u64, u64, u64) -> Output;

/// Where an operand lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// No such operand.
    None,
    /// An XMM register.
    Xmm(u8),
    /// An MMX register.
    Mm(u8),
    /// The low `bytes` bytes of a general register.
    Gpr { number: u8, bytes: u8 },
    /// AH, CH, DH or BH, by the number of the full register.
    High(u8),
    /// The memory operand.
    Memory,
}

/// The instruction set extensions of the guest's processor.
#[derive(Debug, Default)]
struct Extensions {
    function_1_ecx: u32,
    function_7_ebx: u32,
}

impl Extensions {
    fn has(&self, feature: CpuidFeature) -> bool {
        use CpuidFeature as F;
        let (one, seven) = (self.function_1_ecx, self.function_7_ebx);
        match feature {
            // Every 64-bit processor has them.
            F::MMX | F::SSE | F::SSE2 | F::FXSR => true,
            F::SSE3 => one & 1 != 0 && is_x86_feature_detected!("sse3"),
            F::PCLMULQDQ => one & 1 << 1 != 0 && is_x86_feature_detected!("pclmulqdq"),
            F::SSSE3 => one & 1 << 9 != 0 && is_x86_feature_detected!("ssse3"),
            F::SSE4_1 => one & 1 << 19 != 0 && is_x86_feature_detected!("sse4.1"),
            F::SSE4_2 => one & 1 << 20 != 0 && is_x86_feature_detected!("sse4.2"),
            F::CMPXCHG16B => one & 1 << 13 != 0,
            F::MOVBE => one & 1 << 22 != 0,
            F::POPCNT => one & 1 << 23 != 0,
            F::RDRAND => one & 1 << 30 != 0,
            F::RDSEED => seven & 1 << 18 != 0,
            F::CLFLUSHOPT => seven & 1 << 23 != 0,
            F::CLWB => seven & 1 << 24 != 0,
            F::AES => one & 1 << 25 != 0 && is_x86_feature_detected!("aes"),
            F::SHA => seven & 1 << 29 != 0 && is_x86_feature_detected!("sha"),
            // The host does not execute prefetches.
            F::PREFETCHW => true,
            _ => false,
        }
    }
}

/// Stubs by the bytes of the canonical instruction that they run.
#[derive(Debug, Default)]
pub(crate) struct StubCache {
    /// Made when the first instruction needs it.
    arena: Option<Arena>,
    stubs: HashMap<Vec<u8>, Stub>,
    extensions: Extensions,
}

impl StubCache {
    /// Sets what the guest's processor announces: CPUID function 1, ECX, and function 7, EBX.
    pub(crate) fn announce(&mut self, function_1_ecx: u32, function_7_ebx: u32) {
        self.extensions = Extensions { function_1_ecx, function_7_ebx };
    }

    /// Whether the guest's processor announces the extension and, if it is executed by the host, the host has it.
    pub(crate) fn has(&self, feature: CpuidFeature) -> bool {
        self.extensions.has(feature)
    }

    /// The stub for `body`, an instruction rewritten by [`canonical`]. `None` when the encoder refuses it or
    /// the host refuses memory for code.
    pub(crate) fn get(&mut self, body: &Instruction) -> Option<Stub> {
        let mut key = Assembler::new();
        key.add(body)?;
        let key = key.finish();
        if let Some(&stub) = self.stubs.get(&key) {
            return Some(stub);
        }
        let code = generate(body)?;
        let address = match self.append(&code) {
            Ok(address) => address,
            Err(error) => {
                tracing::error!(%error, "No executable memory for SIMD instructions");
                return None;
            }
        };
        // SAFETY: `generate` returns a complete function with the calling convention of `Stub`.
        let stub: Stub = unsafe { std::mem::transmute(address.as_ptr()) };
        self.stubs.insert(key, stub);
        Some(stub)
    }

    fn append(&mut self, code: &[u8]) -> io::Result<NonNull<u8>> {
        match &mut self.arena {
            Some(arena) => arena.append(code),
            none => none.insert(Arena::new()?).append(code),
        }
    }
}

/// Rewrites the operands to the fixed registers of the stub convention and returns where the
/// guest's first and second operand live.
pub(crate) fn canonical(instruction: &Instruction) -> Option<(Instruction, Slot, Slot)> {
    let mut body = *instruction;
    body.set_segment_prefix(Register::None);
    body.set_has_lock_prefix(false);
    body.set_has_rep_prefix(false);
    body.set_has_repne_prefix(false);
    let mut slots = [Slot::None; 2];
    for operand in 0..body.op_count() {
        let slot = match body.op_kind(operand) {
            OpKind::Register => {
                let register = body.op_register(operand);
                let (slot, replacement) = canonical_register(register, operand)?;
                body.set_op_register(operand, replacement);
                slot
            }
            OpKind::Memory => {
                // The only operand of an x87 instruction is addressed by RSI like a source.
                let first = operand == 0 && !is_x87(instruction);
                body.set_memory_base(if first { Register::RDI } else { Register::RSI });
                body.set_memory_index(Register::None);
                body.set_memory_index_scale(1);
                body.set_memory_displacement64(0);
                body.set_memory_displ_size(0);
                Slot::Memory
            }
            OpKind::Immediate8 => continue,
            _ => return None,
        };
        if slot != Slot::None {
            *slots.get_mut(operand as usize)? = slot;
        }
    }
    Some((body, slots[0], slots[1]))
}

fn canonical_register(register: Register, operand: u32) -> Option<(Slot, Register)> {
    if register.is_st() {
        return Some((Slot::None, register));
    }
    let number = register.number() as u8;
    let pick = |first, second| if operand == 0 { first } else { second };
    if register.is_xmm() {
        return Some((Slot::Xmm(number), pick(Register::XMM1, Register::XMM2)));
    }
    if register.is_mm() {
        return Some((Slot::Mm(number), pick(Register::MM1, Register::MM2)));
    }
    let slot = match register {
        Register::AH | Register::CH | Register::DH | Register::BH => {
            Slot::High(register.full_register().number() as u8)
        }
        _ if register.is_gpr() => {
            Slot::Gpr { number: register.full_register().number() as u8, bytes: register.size() as u8 }
        }
        _ => return None,
    };
    let replacement = match register.size() {
        1 => pick(Register::AL, Register::CL),
        2 => pick(Register::AX, Register::CX),
        4 => pick(Register::EAX, Register::ECX),
        _ => pick(Register::RAX, Register::RCX),
    };
    Some((slot, replacement))
}

/// Whether the instruction belongs to the x87 unit (opcodes D8 to DF, or `WAIT`).
pub(crate) fn is_x87(instruction: &Instruction) -> bool {
    use iced_x86::CpuidFeature as F;
    instruction.cpuid_features().iter().any(|feature| {
        matches!(feature, F::FPU | F::FPU287 | F::FPU287XL_ONLY | F::FPU387 | F::FPU387SL_ONLY)
    })
}

/// The whole function around `body`.
fn generate(body: &Instruction) -> Option<Vec<u8>> {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(body);
    let first = access(body, info.op_access(0), 0);
    let second = access(body, info.op_access(1), 1);
    let (mut reads_xmm0, mut writes_xmm0) = (false, false);
    for used in info.used_registers().iter().filter(|used| used.register() == Register::XMM0) {
        let (read, write) = directions(used.access());
        reads_xmm0 |= read;
        writes_xmm0 |= write;
    }
    let mnemonic = body.mnemonic();
    let rflags_read = body.rflags_read() != 0;
    let rflags_written = body.rflags_modified() != 0;
    let explicit_lengths = matches!(
        mnemonic,
        Mnemonic::Pcmpestri | Mnemonic::Pcmpestri64 | Mnemonic::Pcmpestrm | Mnemonic::Pcmpestrm64
    );
    let index_in_rcx = matches!(mnemonic, Mnemonic::Pcmpestri | Mnemonic::Pcmpestri64 | Mnemonic::Pcmpistri);

    let image_xmm0 = |base| MemoryOperand::with_base_displ(base, XMM_OFFSET as i64);
    let mut image = Register::RDX;
    let mut code = Assembler::new();
    if rflags_read {
        code.two(Code::Mov_r64_rm64, Register::RAX, Register::R9)?;
        code.add(&Instruction::with1(Code::Push_r64, Register::RAX).ok()?)?;
        code.add(&Instruction::with(Code::Popfq))?;
    }
    if reads_xmm0 {
        code.load(Code::Movups_xmm_xmmm128, Register::XMM0, image_xmm0(image))?;
    }
    if explicit_lengths {
        image = Register::R9;
        code.two(Code::Mov_r64_rm64, Register::R9, Register::RDX)?;
        code.two(Code::Mov_r64_rm64, Register::RAX, Register::RCX)?;
        code.two(Code::Mov_r64_rm64, Register::RDX, Register::R8)?;
    }
    for (operand, base) in [(first, Register::RDI), (second, Register::RSI)] {
        if operand.read
            && let Some(load) = operand.load
        {
            code.load(load, operand.register, MemoryOperand::with_base(base))?;
        }
    }
    code.add(body)?;
    let mut uses_mm = false;
    for (operand, base) in [(first, Register::RDI), (second, Register::RSI)] {
        uses_mm |= operand.register.is_mm();
        if operand.write
            && let Some(store) = operand.store
        {
            let memory = MemoryOperand::with_base(base);
            code.add(&Instruction::with2(store, memory, operand.register).ok()?)?;
        }
    }
    if writes_xmm0 {
        let memory = image_xmm0(image);
        code.add(&Instruction::with2(Code::Movups_xmmm128_xmm, memory, Register::XMM0).ok()?)?;
    }
    if uses_mm {
        code.add(&Instruction::with(Code::Emms))?;
    }
    if rflags_written && clears_overflow(mnemonic) {
        // Faster than PUSHFQ; OF, which is not in AH, becomes 0 as it has to.
        code.add(&Instruction::with(Code::Lahf))?;
        code.two(Code::Movzx_r32_rm8, Register::EDX, Register::AH)?;
    } else if rflags_written {
        code.add(&Instruction::with(Code::Pushfq))?;
        code.add(&Instruction::with1(Code::Pop_r64, Register::RDX).ok()?)?;
    }
    if index_in_rcx {
        code.two(Code::Mov_r64_rm64, Register::RAX, Register::RCX)?;
    }
    code.add(&Instruction::with(Code::Retnq))?;
    Some(code.finish())
}

/// Instructions without a general-register result that write all status flags and clear OF.
fn clears_overflow(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Comiss | Mnemonic::Comisd | Mnemonic::Ucomiss | Mnemonic::Ucomisd | Mnemonic::Ptest
    )
}

/// How the stub brings one operand in and out.
#[derive(Clone, Copy)]
struct Access {
    register: Register,
    read: bool,
    write: bool,
    load: Option<Code>,
    store: Option<Code>,
}

fn access(body: &Instruction, access: OpAccess, operand: u32) -> Access {
    let register = if operand < body.op_count() && body.op_kind(operand) == OpKind::Register {
        body.op_register(operand)
    } else {
        Register::None
    };
    let (read, write) = directions(access);
    let (load, store, register) = if register.is_xmm() {
        (Some(Code::Movups_xmm_xmmm128), Some(Code::Movups_xmmm128_xmm), register)
    } else if register.is_mm() {
        (Some(Code::Movq_mm_mmm64), Some(Code::Movq_mmm64_mm), register)
    } else if register.is_gpr() {
        // A general-register result stays in RAX.
        (Some(Code::Mov_r64_rm64), None, register.full_register())
    } else {
        (None, None, register)
    };
    // A register that is written in part (conditionally, or by a merge) must be loaded first.
    let partial = write && register.is_gpr() && body.op_register(operand).size() < 4;
    Access { register, read: read || partial, write, load, store }
}

/// Whether an access reads and whether it writes; a conditional write needs the old value too.
pub(crate) fn directions(access: OpAccess) -> (bool, bool) {
    match access {
        OpAccess::Read | OpAccess::CondRead => (true, false),
        OpAccess::Write => (false, true),
        OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => (true, true),
        OpAccess::None | OpAccess::NoMemAccess => (false, false),
    }
}

/// Encodes instructions one after another.
struct Assembler(Encoder);

impl Assembler {
    fn new() -> Self {
        Self(Encoder::new(64))
    }

    fn add(&mut self, instruction: &Instruction) -> Option<()> {
        self.0.encode(instruction, 0).ok().map(drop)
    }

    fn two(&mut self, code: Code, to: Register, from: Register) -> Option<()> {
        self.add(&Instruction::with2(code, to, from).ok()?)
    }

    fn load(&mut self, code: Code, to: Register, from: MemoryOperand) -> Option<()> {
        self.add(&Instruction::with2(code, to, from).ok()?)
    }

    fn finish(mut self) -> Vec<u8> {
        self.0.take_buffer()
    }
}

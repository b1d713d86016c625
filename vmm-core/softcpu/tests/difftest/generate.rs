//! Random encodings of a form, and random inputs for an encoding.

use iced_x86::{
    ConstantOffsets, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic as M, OpKind, Register,
};

use super::forms::{Form, Template, is_testable, uses_fpu};
use super::layout::{CODE, CODE_LENGTH, DATA, DATA_LENGTH, DATA_WRITABLE, GS_BASE, INSTRUCTION, Mode, PAGE};
use super::random::Random;
use super::state::State;
use super::vendor;
use softcpu::FpuState;

const RSP: usize = 4;
const RBP: usize = 5;
const RSI: usize = 6;
const RDI: usize = 7;

/// Bytes to place in the data window before a case.
pub type Patches = Vec<(u64, Vec<u8>)>;

/// An encoded instruction.
pub struct Encoding {
    pub mode: Mode,
    pub bytes: Vec<u8>,
    pub instruction: Instruction,
    pub fpu: bool,
}

impl Encoding {
    /// What the host shall execute: `TZCNT` and `LZCNT` are `BSF` and `BSR` to a processor that does not
    /// announce them, so their prefix gives way to one without effect.
    pub fn native_bytes(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        if matches!(self.instruction.mnemonic(), M::Tzcnt | M::Lzcnt) {
            let opcode = bytes.iter().position(|&byte| byte == 0x0f).unwrap_or(0);
            bytes[..opcode].iter_mut().filter(|byte| **byte == 0xf3).for_each(|byte| *byte = 0x3e);
        }
        bytes
    }
}

/// A random encoding of the form; `None` if this attempt is not usable.
pub fn encoding(mode: Mode, form: &Form, random: &mut Random) -> Option<Encoding> {
    encoding_at(mode, form, INSTRUCTION, Addressing::Any, random)
}

/// How memory operands of an encoding are addressed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Addressing {
    /// Every form of address.
    Any,
    /// By constants, or by RBX and a displacement of eight bits.
    Limited,
}

/// The same for an instruction that will be at `address`.
pub fn encoding_at(
    mode: Mode,
    form: &Form,
    address: u64,
    addressing: Addressing,
    random: &mut Random,
) -> Option<Encoding> {
    let template = random.pick(&form.templates);
    let mut bytes = encode(mode, &template, addressing, random);
    let options = DecoderOptions::AMD;
    let mut decoder = Decoder::with_ip(mode.bits(), &bytes, address, options);
    let instruction = decoder.decode();
    if instruction.is_invalid() {
        return None;
    }
    let offsets = decoder.get_constant_offsets(&instruction);
    bytes.truncate(instruction.len());
    patch_constants(mode, &mut bytes, &instruction, offsets, addressing, random);
    let instruction = Decoder::with_ip(mode.bits(), &bytes, address, options).decode();
    let fits =
        is_testable(&instruction) && vendor::executes_alike(mode, &instruction) && is_safe(&instruction);
    if instruction.is_invalid() || !fits {
        return None;
    }
    Some(Encoding { mode, fpu: uses_fpu(&instruction), bytes, instruction })
}

fn encode(mode: Mode, template: &Template, addressing: Addressing, random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(24);
    let memory = template.modrm.is_some_and(|modrm| modrm < 0xc0);
    let limited = addressing == Addressing::Limited;
    let percent = if limited {
        0
    } else if memory && mode == Mode::Long {
        12
    } else {
        3
    };
    if random.percent(percent) {
        bytes.push(0x67);
    }
    if !limited && random.percent(6) {
        bytes.push(random.pick(&[0x2e, 0x3e, 0x26, 0x36, 0x65]));
    }
    if template.operand_size {
        bytes.push(0x66);
    }
    if memory && random.percent(8) {
        bytes.push(0xf0);
    }
    if template.repeat != 0 {
        bytes.push(template.repeat);
    }
    // In 32-bit code the REX prefixes are INC and DEC.
    let mut rex = 0x40 | u8::from(template.wide) << 3;
    if mode == Mode::Long && random.percent(50) {
        rex |= random.below(8) as u8;
        if limited && memory {
            rex &= !3;
        }
    }
    if rex != 0x40 || mode == Mode::Long && random.percent(5) {
        bytes.push(rex);
    }
    template.push_opcode(&mut bytes);
    match template.modrm {
        // RBX and a displacement, or a displacement only.
        Some(modrm) if memory && limited => bytes.push(modrm & 0x38 | random.pick(&[0x43, 0x05])),
        Some(modrm) if memory => push_address(modrm, &mut bytes, random),
        modrm => bytes.extend(modrm),
    }
    // Displacement and immediate.
    for _ in 0..2 {
        bytes.extend(random.integer().to_le_bytes());
    }
    bytes.truncate(15);
    bytes
}

fn push_address(modrm: u8, bytes: &mut Vec<u8>, random: &mut Random) {
    let reg = modrm & 0x38;
    let mode = random.pick(&[0u8, 0, 1, 1, 2]);
    let rm = random.below(8) as u8;
    bytes.push(mode << 6 | reg | rm);
    if rm == 4 {
        bytes.push(random.next() as u8);
    }
    if mode == 1 {
        bytes.push(random.next() as u8);
    } else if mode == 2 {
        bytes.extend(((random.below(0x2000) as i32) - 0x1000).to_le_bytes());
    }
}

/// Replaces displacements and branch targets that would lead out of the windows.
fn patch_constants(
    mode: Mode,
    bytes: &mut [u8],
    instruction: &Instruction,
    offsets: ConstantOffsets,
    addressing: Addressing,
    random: &mut Random,
) {
    let mut put = |offset: usize, size: usize, value: u64| {
        bytes[offset..offset + size].copy_from_slice(&value.to_le_bytes()[..size]);
    };
    let next = instruction.next_ip();
    if is_relative_branch(instruction) {
        let size = offsets.immediate_size();
        let displacement = match size {
            1 => random.pick(&[0u64, 40, 100, 127, (-40i64) as u64, (-128i64) as u64]),
            _ => branch_target(random).wrapping_sub(next),
        };
        put(offsets.immediate_offset(), size, displacement);
        return;
    }
    let memory = (0..instruction.op_count()).any(|i| instruction.op_kind(i) == OpKind::Memory);
    if !memory || !offsets.has_displacement() {
        return;
    }
    let segment = segment_base(mode, instruction);
    let inside = DATA + 64 + random.below(DATA_WRITABLE - 1024);
    let target = match addressing {
        _ if instruction.flow_control() != FlowControl::Next => inside,
        Addressing::Any => data_target(random, 16),
        // Most sequences shall run to their end.
        Addressing::Limited if random.percent(2) => DATA + DATA_LENGTH - random.below(32),
        Addressing::Limited => inside & !15,
    };
    let target = target.wrapping_sub(segment);
    let size = offsets.displacement_size();
    match (instruction.memory_base(), instruction.memory_index()) {
        (Register::RIP | Register::EIP, _) => {
            put(offsets.displacement_offset(), size, target.wrapping_sub(next))
        }
        (Register::None, Register::None) => put(offsets.displacement_offset(), size, target),
        (Register::None, _) => put(offsets.displacement_offset(), size, target.wrapping_sub(256)),
        _ => {}
    }
}

/// Linear address of offset 0 in the segment of the memory operand.
fn segment_base(mode: Mode, instruction: &Instruction) -> u64 {
    let gs = mode == Mode::Long && instruction.memory_segment() == Register::GS;
    if gs { GS_BASE } else { mode.data_base() }
}

/// Rejects encodings whose addresses cannot be kept within the windows.
fn is_safe(instruction: &Instruction) -> bool {
    let memory = (0..instruction.op_count()).any(|i| instruction.op_kind(i) == OpKind::Memory);
    let base = instruction.memory_base().full_register();
    let index = instruction.memory_index().full_register();
    if memory && (instruction.segment_prefix() == Register::FS || base != Register::None && base == index) {
        return false;
    }
    let register = |operand: u32| {
        (operand < instruction.op_count() && instruction.op_kind(operand) == OpKind::Register)
            .then(|| instruction.op_register(operand).full_register())
    };
    match instruction.mnemonic() {
        // The bit offset moves the address; it must be free.
        M::Bt | M::Bts | M::Btr | M::Btc if memory => {
            register(1).is_none_or(|bits| bits != base && bits != index)
        }
        // A 16-bit code segment has no targets in it.
        M::Jmp | M::Call if memory && instruction.segment_prefix() == Register::CS => false,
        M::Jmp | M::Call => register(0) != Some(Register::RSP),
        // AMD processors let a repeat prefix override which value of ZF ends the loop.
        M::Loope | M::Loopne => !instruction.has_rep_prefix() && !instruction.has_repne_prefix(),
        // `native_bytes` puts another segment prefix in.
        M::Tzcnt | M::Lzcnt => instruction.segment_prefix() == Register::None,
        // With REX.B it is XCHG, which the decoder does not see.
        M::Pause => instruction.len() == 2,
        _ => true,
    }
}

fn is_relative_branch(instruction: &Instruction) -> bool {
    matches!(instruction.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
        && instruction.op_count() > 0
}

/// An address in the code window away from the instruction.
fn branch_target(random: &mut Random) -> u64 {
    let half = CODE_LENGTH / 2 - 64;
    if random.percent(50) { CODE + random.below(half) } else { INSTRUCTION + 64 + random.below(half) }
}

/// An address for `size` bytes of data: mostly valid, sometimes not.
fn data_target(random: &mut Random, size: u64) -> u64 {
    let inside = DATA + 64 + random.below(DATA_WRITABLE - 256);
    match random.below(100) {
        0..50 => inside & !15,
        50..75 => inside,
        75..84 => DATA + PAGE - random.below(size.max(2)),
        84..88 => DATA + DATA_WRITABLE - random.below(size.max(2)),
        88..92 => DATA + DATA_WRITABLE + (random.below(PAGE - 64) & !15),
        92..95 => DATA + DATA_LENGTH - random.below(size.max(2) + 1),
        95..97 => DATA + DATA_LENGTH + random.below(64) * 16,
        97..98 => DATA - random.below(size.max(2) + 8),
        _ => non_canonical(random),
    }
}

fn non_canonical(random: &mut Random) -> u64 {
    match random.below(3) {
        0 => 0x0000_8000_0000_0000 + random.below(4096),
        1 => 0xffff_7fff_ffff_ffff - random.below(4096),
        _ => 0x5a5a_0000_0000_0000 | random.below(1 << 40),
    }
}

/// Random registers.
pub fn registers(with_fpu: bool, random: &mut Random) -> State {
    State {
        gpr: std::array::from_fn(|_| random.integer()),
        rflags: 0x202 | random.next() & 0x8d5 | if random.percent(25) { 1 << 10 } else { 0 },
        rip: INSTRUCTION,
        fx: if with_fpu { fpu(random) } else { FpuState::default() },
    }
}

/// A random input for the encoding.
pub fn input(encoding: &Encoding, random: &mut Random, patches: &mut Patches) -> State {
    let instruction = &encoding.instruction;
    let mut state = registers(encoding.fpu, random);
    patches.clear();
    stack(encoding, &mut state, random, patches);
    implicit_addresses(encoding, &mut state, random);
    let size = (instruction.memory_size().size() as u64).max(1);
    match instruction.mnemonic() {
        M::Div | M::Idiv if random.percent(70) => {
            state.gpr[2] = random.pick(&[0, 0, 1, u64::MAX, 5, 0xffff_ffff]);
        }
        // An underflow in the middle does not show in the result.
        M::Dppd | M::Dpps => state.fx.mxcsr |= 0x1f80,
        M::Bt | M::Bts | M::Btr | M::Btc
            if instruction.op0_kind() == OpKind::Memory && instruction.op1_kind() == OpKind::Register =>
        {
            let number = instruction.op1_register().full_register().number();
            state.gpr[number] = bit_offset(instruction, random);
        }
        _ => {}
    }
    if let Some(address) = explicit_address(encoding, &mut state, random, size) {
        let content = match (instruction.mnemonic(), instruction.flow_control()) {
            (_, FlowControl::IndirectBranch | FlowControl::IndirectCall) => {
                (branch_target(random) - encoding.mode.code_base()).to_le_bytes().to_vec()
            }
            (M::Ldmxcsr, _) if random.percent(80) => mxcsr(random).to_le_bytes().to_vec(),
            (M::Fxrstor | M::Fxrstor64, _) => fpu_area(random),
            _ if size == 10 => random.extended().to_le_bytes()[..10].to_vec(),
            _ => random.vector().to_le_bytes().to_vec(),
        };
        patches.push((address, content));
    }
    if instruction.op0_kind() == OpKind::Register
        && matches!(instruction.flow_control(), FlowControl::IndirectBranch | FlowControl::IndirectCall)
    {
        let number = instruction.op0_register().full_register().number();
        state.gpr[number] = branch_target(random) - encoding.mode.code_base();
    }
    for register in &mut state.gpr {
        *register &= encoding.mode.mask();
    }
    // Strings of zeros and equal bytes make comparisons run on.
    if instruction.is_string_instruction() && random.percent(50) {
        for register in [RSI, RDI] {
            patches.push((state.gpr[register] & !63, vec![0x20; 128]));
        }
    }
    state
}

/// RSP, RBP and what the stack's top holds.
fn stack(encoding: &Encoding, state: &mut State, random: &mut Random, patches: &mut Patches) {
    let (instruction, mode) = (&encoding.instruction, encoding.mode);
    let returns = instruction.flow_control() == FlowControl::Return;
    let flags = matches!(instruction.mnemonic(), M::Popf | M::Popfd | M::Popfq);
    let middle = DATA + 1024 + random.below(DATA_WRITABLE - 2048);
    let aligned = if random.percent(80) { middle & !7 } else { middle };
    state.gpr[RSP] = if returns || flags || random.percent(90) {
        aligned
    } else {
        random.pick(&[
            DATA,
            DATA + 4,
            DATA + DATA_WRITABLE,
            DATA + DATA_WRITABLE + 4,
            DATA + DATA_LENGTH - 4,
            DATA + DATA_LENGTH,
        ])
    };
    if matches!(instruction.mnemonic(), M::Enter | M::Leave) {
        state.gpr[RBP] = DATA + 1024 + random.below(DATA_WRITABLE - 2048) - mode.data_base();
    }
    let top = if returns {
        branch_target(random) - mode.code_base()
    } else if flags {
        // TF and AC would hit the code that follows; NT is the kernel's business.
        random.next() & !(1 << 8 | 1 << 18 | 1 << 14)
    } else {
        random.integer()
    };
    patches.push((state.gpr[RSP], top.to_le_bytes().to_vec()));
    state.gpr[RSP] -= mode.data_base();
}

/// RSI, RDI, RBX and RCX of instructions that address memory through them.
fn implicit_addresses(encoding: &Encoding, state: &mut State, random: &mut Random) {
    let (instruction, mode) = (&encoding.instruction, encoding.mode);
    let size = (instruction.memory_size().size() as u64).max(1);
    let mut short = false;
    let mut bits16 = false;
    for operand in 0..instruction.op_count() {
        let register = match instruction.op_kind(operand) {
            OpKind::MemorySegRSI => RSI,
            OpKind::MemorySegRDI | OpKind::MemoryESRDI => RDI,
            OpKind::MemorySegESI => {
                short = true;
                RSI
            }
            OpKind::MemorySegEDI | OpKind::MemoryESEDI => {
                short = true;
                RDI
            }
            OpKind::MemorySegSI => {
                bits16 = true;
                RSI
            }
            OpKind::MemorySegDI | OpKind::MemoryESDI => {
                bits16 = true;
                RDI
            }
            _ => continue,
        };
        let mut target = data_target(random, size);
        let base = if register == RSI { segment_base(mode, instruction) } else { mode.data_base() };
        target = target.wrapping_sub(base);
        state.gpr[register] = if bits16 {
            target & 0xffff | random.next() << 16
        } else if short {
            short_address(mode, target, random)
        } else {
            target
        };
    }
    if instruction.is_string_instruction() {
        let count = match random.below(10) {
            0..6 => random.below(6),
            6..9 => random.below(200),
            _ => random.integer(),
        };
        state.gpr[1] = if bits16 {
            count & 0xffff | random.next() << 16
        } else if short {
            count & 0xffff_ffff | random.next() << 32
        } else {
            count
        };
    }
}

/// A register value of which 32-bit addressing uses the low half.
fn short_address(mode: Mode, target: u64, random: &mut Random) -> u64 {
    let inside = DATA + random.below(PAGE) - mode.data_base();
    let target = if target >> 32 == 0 { target } else { inside };
    target | random.integer() << 32
}

fn bit_offset(instruction: &Instruction, random: &mut Random) -> u64 {
    let near = random.below(0x4000).wrapping_sub(0x2000);
    match instruction.op1_register().size() {
        2 => near & 0xffff | random.next() << 16,
        4 => near & 0xffff_ffff | random.next() << 32,
        _ => near,
    }
}

/// Sets the base register so that the memory operand lies in the data window, and returns its address.
fn explicit_address(encoding: &Encoding, state: &mut State, random: &mut Random, size: u64) -> Option<u64> {
    let (instruction, mode) = (&encoding.instruction, encoding.mode);
    (0..instruction.op_count()).find(|&i| instruction.op_kind(i) == OpKind::Memory)?;
    let (base, index) = (instruction.memory_base(), instruction.memory_index());
    let branch = instruction.flow_control() != FlowControl::Next;
    let mut target = data_target(random, size);
    // The processor also checks the address before a bit offset is added, near the limits of the address space.
    let bits = matches!(instruction.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc);
    if branch || instruction.mnemonic() == M::Xlatb || bits && target >> 32 != 0 {
        target = DATA + 64 + random.below(DATA_WRITABLE - 512);
    }
    let segment = segment_base(mode, instruction);
    let short = matches!(base.size(), 2 | 4) && base != Register::EIP || matches!(index.size(), 2 | 4);
    if index != Register::None && base == Register::None {
        let value = random.below(64);
        let garbage = if index.size() == 4 { random.next() << 32 } else { 0 };
        state.gpr[index.full_register().number()] = value | garbage;
    }
    let displacement = instruction.memory_displacement64();
    if matches!(base, Register::RIP | Register::EIP) {
        return Some(displacement.wrapping_add(segment));
    }
    let index_value = if index == Register::None {
        0
    } else {
        let full = state.gpr[index.full_register().number()];
        match index.size() {
            1 => full & 0xff,
            2 => full & 0xffff,
            4 => full & 0xffff_ffff,
            _ => full,
        }
    };
    let offset =
        displacement.wrapping_add(index_value.wrapping_mul(u64::from(instruction.memory_index_scale())));
    if base == Register::None {
        return Some(offset.wrapping_add(segment));
    }
    if short && target >> 32 != 0 {
        target = DATA + random.below(PAGE);
    }
    let wanted = target.wrapping_sub(segment).wrapping_sub(offset);
    let register = base.full_register().number();
    state.gpr[register] = if short { wanted & 0xffff_ffff | random.integer() << 32 } else { wanted };
    Some(target)
}

fn mxcsr(random: &mut Random) -> u32 {
    let bits = random.next() as u32;
    let masks = if random.percent(60) { 0x1f80 } else { bits & 0x1f80 };
    masks | bits & 0xe07f
}

/// Random x87 and SSE state.
fn fpu(random: &mut Random) -> FpuState {
    let mut fpu = FpuState::default();
    for register in &mut fpu.xmm {
        *register = random.vector();
    }
    for register in &mut fpu.st {
        *register = random.extended();
    }
    if random.percent(40) {
        fpu.mxcsr = mxcsr(random);
    }
    fpu.ftw = if random.percent(50) { 0xff } else { random.next() as u8 };
    fpu.fsw = (random.next() as u16) & 0x7f00;
    if random.percent(30) {
        let bits = random.next() as u16;
        fpu.fcw = 0x40 | bits & 0xf00 | if random.percent(60) { 0x3f } else { bits & 0x3f };
        fpu.fsw |= (random.next() as u16) & 0x7f;
        if fpu.fsw & !fpu.fcw & 0x3f != 0 {
            fpu.fsw |= 0x8080;
        }
    }
    fpu
}

/// A valid operand of `FXRSTOR`, rarely one with reserved MXCSR bits.
fn fpu_area(random: &mut Random) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..64).flat_map(|_| random.integer().to_le_bytes()).collect();
    if random.percent(90) {
        let value = mxcsr(random).to_le_bytes();
        bytes[24..28].copy_from_slice(&value);
    }
    bytes
}

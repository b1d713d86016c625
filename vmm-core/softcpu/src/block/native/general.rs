//! Instructions on general registers and memory.

use iced_x86::code_asm::*;
use iced_x86::{Code, Instruction, InstructionInfoFactory, MemoryOperand, Mnemonic as M, OpKind, Register};

use super::address::Access;
use super::emit::{Emitted, Emitter, KIND, OPERAND, RESULT, Refused, field, held, sized};
use super::flags::{self, Effect, Need};
use super::step::{Form, Step, is_high, must_be_aligned};
use crate::cpu::flags::Kind;
use crate::hostop::directions;

/// The instruction with the host's operands, and what has to be done around it.
pub(super) struct Rewritten {
    pub body: Instruction,
    /// Registers of the guest that stand in for others, where, and whether they are read and written.
    temporaries: Vec<(usize, Register, bool, bool)>,
}

/// The access to the memory operand.
pub(super) fn memory_access(i: &Instruction) -> Access {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(i);
    let write = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory && directions(info.op_access(n)).1);
    Access { size: i.memory_size().size(), write, aligned: must_be_aligned(i) }
}

pub(super) fn set_memory(body: &mut Instruction, operand: &MemoryOperand) {
    body.set_memory_base(operand.base);
    body.set_memory_index(operand.index);
    body.set_memory_index_scale(operand.scale);
    body.set_memory_displacement64(operand.displacement as u64);
    body.set_memory_displ_size(operand.displ_size);
    body.set_segment_prefix(Register::None);
}

impl Rewritten {
    /// Replaces the general registers of an instruction. `free` are registers for those that the host does not hold.
    pub fn new(i: &Instruction, free: &[Register]) -> Result<Self, Refused> {
        let mut body = *i;
        body.set_segment_prefix(Register::None);
        // What is left of them are hints.
        body.set_has_rep_prefix(false);
        body.set_has_repne_prefix(false);
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(i);
        let mut temporaries: Vec<(usize, Register, bool, bool)> = Vec::new();
        for n in 0..i.op_count() {
            if i.op_kind(n) != OpKind::Register || !i.op_register(n).is_gpr() {
                continue;
            }
            let register = i.op_register(n);
            if is_high(register) {
                continue;
            }
            let number = register.full_register().number();
            let host = match held(number) {
                Some(host) => host,
                None => {
                    let (read, write) = directions(info.op_access(n));
                    let read = read || write && register.size() < 4;
                    match temporaries.iter_mut().find(|t| t.0 == number) {
                        Some(known) => {
                            known.2 |= read;
                            known.3 |= write;
                            known.1
                        }
                        None => {
                            let &host = free.get(temporaries.len()).ok_or(Refused)?;
                            temporaries.push((number, host, read, write));
                            host
                        }
                    }
                }
            };
            body.set_op_register(n, sized(host, register.size()));
        }
        Ok(Self { body, temporaries })
    }

    pub fn load(&self, e: &mut Emitter<'_>) -> Emitted {
        self.temporaries.iter().filter(|t| t.2).try_for_each(|t| e.load_guest(t.1, t.0))
    }

    pub fn store(&self, e: &mut Emitter<'_>) -> Emitted {
        self.temporaries.iter().filter(|t| t.3).try_for_each(|t| e.store_guest(t.0, t.1))
    }
}

/// Operations whose flags follow from what is recorded cheaply.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Simple {
    Add,
    Sub,
    Cmp,
    Logic,
    Test,
}

fn simple(i: &Instruction) -> Option<Simple> {
    let any_high = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && is_high(i.op_register(n)));
    if any_high || i.op0_kind() == OpKind::Memory && !matches!(i.mnemonic(), M::Cmp | M::Test) {
        return None;
    }
    Some(match i.mnemonic() {
        M::Add => Simple::Add,
        M::Sub => Simple::Sub,
        M::Cmp => Simple::Cmp,
        M::And | M::Or | M::Xor => Simple::Logic,
        M::Test => Simple::Test,
        _ => return None,
    })
}

impl Emitter<'_> {
    pub fn general(&mut self, steps: &[Step], n: usize) -> Emitted {
        let step = &steps[n];
        let i = &step.instruction;
        let changes = step.effect != Effect::None;
        let record = changes && flags::recorded(steps, n);
        if !self.can_do(steps, n) {
            let counts = matches!(i.mnemonic(), M::Inc | M::Dec) && record;
            return if counts { self.count(step) } else { self.call_alone(step) };
        }
        if record && let Some(simple) = simple(i) {
            return self.recorded(step, simple);
        }
        let mut resume = None;
        let free: &[Register] =
            if step.form == Form::Memory { &[Register::R14] } else { &[Register::R14, Register::R13] };
        let mut rewritten = Rewritten::new(i, free)?;
        if step.form == Form::Memory {
            let (slow, label) = self.cold_call(changes);
            let operand = self.host_operand(i, memory_access(i), !rewritten.temporaries.is_empty(), slow)?;
            set_memory(&mut rewritten.body, &operand);
            resume = Some(label);
        }
        rewritten.load(self)?;
        self.prepare_flags(step, &mut rewritten.body)?;
        self.add(rewritten.body)?;
        rewritten.store(self)?;
        if changes {
            // Of an instruction that keeps flags which nobody had, the flags are worth nothing.
            let known = step.effect == Effect::All || !flags::dead(steps, n);
            if record {
                self.record(i, &rewritten.body)?;
            }
            self.flags_changed(known, record);
        }
        match &mut resume {
            Some(label) => self.place(label),
            None => Ok(()),
        }
    }

    /// Records the flags that an instruction left in the host's register.
    fn record(&mut self, i: &Instruction, body: &Instruction) -> Emitted {
        let size = i.op0_register().size();
        let partial = match i.mnemonic() {
            _ if i.op0_kind() != OpKind::Register || is_high(i.op0_register()) => None,
            M::Shl | M::Sal | M::Shr | M::Sar => flags::count(i, 1).map(|count| count == 1),
            M::Imul if i.op_count() > 1 => Some(true),
            _ => None,
        };
        match partial {
            Some(overflow) => self.record_partial(body.op0_register().full_register(), size, overflow),
            None => self.record_known(),
        }
    }

    /// INC or DEC when CF is in the record only. Where the record holds it as a bit, it stays there.
    fn count(&mut self, step: &Step) -> Emitted {
        let i = &step.instruction;
        const AS_BIT: u32 = 1 << Kind::Known as u32
            | 1 << Kind::Inc as u32
            | 1 << Kind::Dec as u32
            | 1 << Kind::Partial as u32;
        let (slow, mut resume) = self.cold_call(true);
        self.a.movzx(r14d, byte_ptr(r15 + KIND))?;
        self.a.mov(r13d, AS_BIT)?;
        self.a.bt(r13d, r14d)?;
        self.a.jae(slow)?;
        let mut rewritten = Rewritten::new(i, &[Register::R14])?;
        if step.form == Form::Memory {
            let operand = self.host_operand(i, memory_access(i), false, slow)?;
            set_memory(&mut rewritten.body, &operand);
        }
        rewritten.load(self)?;
        self.a.bt(dword_ptr(r15 + OPERAND), 0)?;
        self.add(rewritten.body)?;
        rewritten.store(self)?;
        let register = rewritten.body.op0_register();
        if step.form == Form::Memory || is_high(register) {
            self.record_known()?;
        } else {
            self.store(Code::Mov_rm64_r64, field(RESULT), register.full_register())?;
            let kind = if i.mnemonic() == M::Inc { Kind::Inc } else { Kind::Dec };
            self.record_kind(kind, register.size())?;
        }
        self.flags_changed(true, true);
        self.place(&mut resume)
    }

    /// Whether the flags that an instruction needs are there, or nobody will see what becomes of them.
    fn can_do(&self, steps: &[Step], n: usize) -> bool {
        let step = &steps[n];
        if self.flags_in_host() || step.need == Need::Nothing {
            return true;
        }
        let reads = matches!(step.instruction.mnemonic(), M::Rcl | M::Rcr);
        if step.effect == Effect::Some && !reads && flags::dead(steps, n) {
            return true;
        }
        step.need.condition().is_some_and(|condition| self.has_saved(condition))
    }

    /// Brings back the flags that the instruction reads, if the host's register does not have them.
    fn prepare_flags(&mut self, step: &Step, body: &mut Instruction) -> Emitted {
        if self.flags_in_host() {
            return Ok(());
        }
        match step.need {
            Need::Condition(condition) if self.test_saved(condition)? => {
                let inverted = condition & 1 != 0;
                body.set_code(with_condition(body.code(), inverted)?);
            }
            Need::Carry => {
                self.restore_carry()?;
            }
            _ => {}
        }
        Ok(())
    }

    /// ADD, SUB, CMP, AND, OR, XOR and TEST whose flags have to be recorded.
    fn recorded(&mut self, step: &Step, simple: Simple) -> Emitted {
        let i = &step.instruction;
        let size = match i.op0_kind() {
            OpKind::Memory => i.memory_size().size(),
            _ => i.op0_register().size(),
        };
        let mut resume = None;
        // The two operands in registers, or the second as an immediate.
        let memory = (0..2).find(|&n| i.op_kind(n) == OpKind::Memory);
        if memory.is_some() {
            let (slow, label) = self.cold_call(true);
            let operand = self.host_operand(i, memory_access(i), false, slow)?;
            let load = match size {
                1 => Code::Movzx_r32_rm8,
                2 => Code::Movzx_r32_rm16,
                4 => Code::Mov_r32_rm32,
                _ => Code::Mov_r64_rm64,
            };
            self.load(load, if size == 8 { Register::R14 } else { Register::R14D }, operand)?;
            resume = Some(label);
        }
        // R14 is taken by a memory operand.
        let other = if memory.is_some() { Register::R13 } else { Register::R14 };
        let mut first = Register::R14;
        let mut stored = None;
        if memory != Some(0) {
            let number = i.op0_register().full_register().number();
            first = match held(number) {
                Some(host) => host,
                None => {
                    self.load_guest(other, number)?;
                    stored = Some(number);
                    other
                }
            };
        }
        let second = match i.op1_kind() {
            OpKind::Memory => Some(Register::R14),
            OpKind::Register => {
                let number = i.op1_register().full_register().number();
                Some(match held(number) {
                    Some(host) => host,
                    None if stored == Some(number) => first,
                    None => {
                        self.load_guest(Register::R13, number)?;
                        Register::R13
                    }
                })
            }
            _ => None,
        };
        let immediate = if second.is_none() { i.immediate(1) as i32 } else { 0 };
        if matches!(simple, Simple::Add | Simple::Sub | Simple::Cmp) {
            match second {
                Some(second) => self.store(Code::Mov_rm64_r64, field(OPERAND), second)?,
                None => self.add(Instruction::with2(Code::Mov_rm64_imm32, field(OPERAND), immediate)?)?,
            }
        }
        // Where the result goes: comparisons have no register for it.
        let mut target = first;
        let keeps = matches!(simple, Simple::Cmp | Simple::Test);
        let same = simple == Simple::Test && second == Some(first);
        if keeps && !same && stored.is_none() && memory != Some(0) {
            // The other one may hold the second operand.
            target = if second == Some(Register::R14) { Register::R13 } else { Register::R14 };
            self.add(Instruction::with2(Code::Mov_r64_rm64, target, first)?)?;
        }
        // TEST of a register with itself must not change its upper half.
        let (with_register, with_immediate) = codes(i.mnemonic(), size, same);
        let to = sized(target, size);
        match second {
            Some(second) => {
                self.add(Instruction::with2(with_register, to, sized(second, size))?)?;
            }
            None => self.add(immediate_operation(with_immediate, to, immediate)?)?,
        }
        if let Some(number) = stored
            && !keeps
        {
            self.store_guest(number, first)?;
        }
        self.store(Code::Mov_rm64_r64, field(RESULT), target)?;
        let kind = match simple {
            Simple::Add => Kind::Add,
            Simple::Sub | Simple::Cmp => Kind::Sub,
            Simple::Logic | Simple::Test => Kind::Logic,
        };
        self.record_kind(kind, size)?;
        self.flags_changed(true, true);
        match &mut resume {
            Some(label) => self.place(label),
            None => Ok(()),
        }
    }
}

fn immediate_operation(code: Code, to: Register, immediate: i32) -> Result<Instruction, Refused> {
    Ok(match to.size() {
        1 => Instruction::with2(code, to, i32::from(immediate as i8))?,
        2 => Instruction::with2(code, to, i32::from(immediate as i16))?,
        _ => Instruction::with2(code, to, immediate)?,
    })
}

/// The forms of an operation on a register and a register, and on a register and an immediate; comparisons as the
/// operation that keeps the result, unless `test` asks for TEST itself.
fn codes(mnemonic: M, size: usize, test: bool) -> (Code, Code) {
    macro_rules! by_size {
        ($r8:ident $r16:ident $r32:ident $r64:ident $i8:ident $i16:ident $i32:ident $i64:ident) => {
            match size {
                1 => (Code::$r8, Code::$i8),
                2 => (Code::$r16, Code::$i16),
                4 => (Code::$r32, Code::$i32),
                _ => (Code::$r64, Code::$i64),
            }
        };
    }
    match mnemonic {
        M::Add => by_size!(Add_rm8_r8 Add_rm16_r16 Add_rm32_r32 Add_rm64_r64
                           Add_rm8_imm8 Add_rm16_imm16 Add_rm32_imm32 Add_rm64_imm32),
        M::Or => by_size!(Or_rm8_r8 Or_rm16_r16 Or_rm32_r32 Or_rm64_r64
                          Or_rm8_imm8 Or_rm16_imm16 Or_rm32_imm32 Or_rm64_imm32),
        M::Xor => by_size!(Xor_rm8_r8 Xor_rm16_r16 Xor_rm32_r32 Xor_rm64_r64
                           Xor_rm8_imm8 Xor_rm16_imm16 Xor_rm32_imm32 Xor_rm64_imm32),
        M::Test if test => by_size!(Test_rm8_r8 Test_rm16_r16 Test_rm32_r32 Test_rm64_r64
                                    Test_rm8_imm8 Test_rm16_imm16 Test_rm32_imm32 Test_rm64_imm32),
        M::And | M::Test => by_size!(And_rm8_r8 And_rm16_r16 And_rm32_r32 And_rm64_r64
                                     And_rm8_imm8 And_rm16_imm16 And_rm32_imm32 And_rm64_imm32),
        _ => by_size!(Sub_rm8_r8 Sub_rm16_r16 Sub_rm32_r32 Sub_rm64_r64
                      Sub_rm8_imm8 Sub_rm16_imm16 Sub_rm32_imm32 Sub_rm64_imm32),
    }
}

/// SETcc or CMOVcc on ZF, which is clear if the condition without its inverting bit holds.
fn with_condition(code: Code, inverted: bool) -> Result<Code, Refused> {
    let pick = |set, clear| if inverted { clear } else { set };
    Ok(match code {
        c if (Code::Seto_rm8..=Code::Setg_rm8).contains(&c) => pick(Code::Setne_rm8, Code::Sete_rm8),
        c if is_one_of(c, Code::Cmovo_r16_rm16) => pick(Code::Cmovne_r16_rm16, Code::Cmove_r16_rm16),
        c if is_one_of(c, Code::Cmovo_r32_rm32) => pick(Code::Cmovne_r32_rm32, Code::Cmove_r32_rm32),
        c if is_one_of(c, Code::Cmovo_r64_rm64) => pick(Code::Cmovne_r64_rm64, Code::Cmove_r64_rm64),
        _ => return Err(Refused),
    })
}

/// Whether `code` is a CMOVcc of the size of `first`, whose condition is the first.
fn is_one_of(code: Code, first: Code) -> bool {
    let distance = (code as usize).wrapping_sub(first as usize);
    // Three sizes of each condition follow each other.
    distance < 48 && distance.is_multiple_of(3)
}

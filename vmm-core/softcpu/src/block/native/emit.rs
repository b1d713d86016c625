//! Emitting code for the instructions of a block.

use std::mem::offset_of;

use iced_x86::code_asm::*;
use iced_x86::{Code, Encoder, IcedError, Instruction, MemoryOperand, Register};

use super::flags::{self, Effect};
use super::glue::{CONDITIONS, Glue, OP_SIZE, register};
use super::step::{Form, Step};
use crate::cpu::Cpu;
use crate::cpu::flags::{Kind, Lazy};

const LAZY: i32 = offset_of!(Cpu, lazy) as i32;
pub(super) const RESULT: i32 = LAZY + offset_of!(Lazy, result) as i32;
pub(super) const OPERAND: i32 = LAZY + offset_of!(Lazy, operand) as i32;
pub(super) const KIND: i32 = LAZY + offset_of!(Lazy, kind) as i32;
const _: () = assert!(offset_of!(Lazy, shift) == offset_of!(Lazy, kind) + 1);

/// Why no code comes out; the block stays with the interpreter.
#[derive(Debug)]
pub(super) struct Refused;

impl From<IcedError> for Refused {
    fn from(_: IcedError) -> Self {
        Self
    }
}

pub(super) type Emitted = Result<(), Refused>;

/// Where the guest's status flags are.
#[derive(Clone, Copy, Debug, Default)]
struct Flags {
    /// In the host's register.
    host: bool,
    /// In the record.
    record: bool,
    /// Conditions in [`CONDITIONS`].
    saved: [Option<u8>; 2],
}

/// Code that is seldom executed, behind the rest.
pub(super) enum Cold {
    /// Lets the interpreter execute an operation, then resumes.
    Call { start: CodeLabel, op: u64, flags: bool, resume: CodeLabel },
    /// Leaves with an operation.
    Leave { start: CodeLabel, op: u64 },
    /// The budget does not suffice for the block with this first operation.
    NotEntered { start: CodeLabel, first: u64 },
}

/// The operations of the interpreter that belong to a block.
#[derive(Clone, Copy)]
pub(super) struct Ops {
    /// The block's own, the counter first.
    pub block: u64,
    /// For each instruction one that stands alone, and one that returns to generated code.
    pub alone: u64,
}

/// Collects code.
pub(super) struct Emitter<'a> {
    pub a: CodeAssembler,
    pub glue: &'a Glue,
    pub cold: Vec<Cold>,
    flags: Flags,
    /// SSE instructions are enabled; somebody looked already.
    pub vectors_ready: bool,
    /// Operation of the current instruction, alone.
    pub alone: u64,
    check: Encoder,
}

/// The register of the host that holds a register of the guest.
pub(super) fn held(number: usize) -> Option<Register> {
    match number {
        4 => Some(Register::R12),
        0..=11 => Some(Register::RAX + number as u32),
        _ => None,
    }
}

/// The part of a 64-bit register that an operand of `size` bytes is.
pub(super) fn sized(full: Register, size: usize) -> Register {
    let n = full.number() as u32;
    match size {
        1 if n < 4 => Register::AL + n,
        1 => Register::SPL + (n - 4),
        2 => Register::AX + n,
        4 => Register::EAX + n,
        _ => full,
    }
}

/// A field of the processor.
pub(super) fn field(offset: i32) -> MemoryOperand {
    MemoryOperand::with_base_displ(Register::R15, offset.into())
}

pub(super) fn quad(offset: i32) -> AsmMemoryOperand {
    qword_ptr(r15 + offset)
}

impl<'a> Emitter<'a> {
    pub fn new(glue: &'a Glue) -> Result<Self, Refused> {
        Ok(Self {
            a: CodeAssembler::new(64)?,
            glue,
            cold: Vec::new(),
            flags: Flags::default(),
            vectors_ready: false,
            alone: 0,
            check: Encoder::new(64),
        })
    }

    /// Adds an instruction if it can be encoded.
    pub fn add(&mut self, instruction: Instruction) -> Emitted {
        self.check.encode(&instruction, 0)?;
        drop(self.check.take_buffer());
        Ok(self.a.add_instruction(instruction)?)
    }

    /// Adds a move or the like of a register and memory.
    pub fn load(&mut self, code: Code, to: Register, from: MemoryOperand) -> Emitted {
        self.add(Instruction::with2(code, to, from)?)
    }

    pub fn store(&mut self, code: Code, to: MemoryOperand, from: Register) -> Emitted {
        self.add(Instruction::with2(code, to, from)?)
    }

    /// Loads a register of the guest that the host does not hold.
    pub fn load_guest(&mut self, to: Register, number: usize) -> Emitted {
        self.load(Code::Mov_r64_rm64, to, field(register(number as u8)))
    }

    pub fn store_guest(&mut self, number: usize, from: Register) -> Emitted {
        self.store(Code::Mov_rm64_r64, field(register(number as u8)), from)
    }

    /// A label at this place; other labels may follow.
    pub fn place(&mut self, label: &mut CodeLabel) -> Emitted {
        self.a.set_label(label)?;
        Ok(self.a.zero_bytes()?)
    }

    /// Emits the instructions of a block, but not its end if that is a branch. The flags are in the record then.
    pub fn steps(&mut self, steps: &[Step], ops: Ops) -> Emitted {
        self.flags = Flags { record: true, ..Flags::default() };
        self.vectors_ready = false;
        for (n, step) in steps.iter().enumerate() {
            self.alone = ops.alone + 2 * OP_SIZE * n as u64;
            if step.observes() {
                // They use the host's flags before they do anything else.
                self.before_observer(steps, n)?;
            }
            match step.form {
                Form::Nop => {}
                Form::Plain | Form::Memory => self.general(steps, n)?,
                Form::Lea => self.lea(&step.instruction)?,
                Form::Push => self.push(&step.instruction)?,
                Form::Pop => self.pop(&step.instruction)?,
                Form::Leave => self.leave_frame()?,
                Form::Vector => self.vector(steps, n)?,
                Form::Call => self.call_alone(step)?,
                Form::Branch | Form::Last => return Ok(()),
            }
        }
        // The block just goes on.
        if self.flags.record { Ok(()) } else { Err(Refused) }
    }

    /// Sees to it that the flags are recorded, and that conditions which later instructions read are saved: the
    /// host's flags get lost.
    fn before_observer(&mut self, steps: &[Step], n: usize) -> Emitted {
        if !self.flags.record {
            return Err(Refused);
        }
        let at_branch = matches!(steps[n].form, Form::Branch);
        if self.flags.host && !at_branch {
            for (slot, condition) in flags::conditions(steps, n).into_iter().take(2).enumerate() {
                let byte = MemoryOperand::with_base_displ(Register::R15, i64::from(CONDITIONS) + slot as i64);
                self.add(Instruction::with1(SETCC[usize::from(condition)], byte)?)?;
                self.flags.saved[slot] = Some(condition);
            }
            self.flags.host = false;
        }
        Ok(())
    }

    /// The host's flags are the guest's.
    pub fn flags_in_host(&self) -> bool {
        self.flags.host
    }

    /// The guest's flags changed, or will before anybody looks.
    pub fn flags_changed(&mut self, host: bool, record: bool) {
        self.flags = Flags { host, record, saved: [None; 2] };
    }

    /// Whether a condition was saved.
    pub fn has_saved(&self, condition: u8) -> bool {
        self.saved(condition).is_some()
    }

    /// Makes ZF clear if a saved condition (without the inverting bit) holds.
    pub fn test_saved(&mut self, condition: u8) -> Result<bool, Refused> {
        let Some(slot) = self.saved(condition) else { return Ok(false) };
        self.a.cmp(byte_ptr(r15 + (CONDITIONS + slot)), 0)?;
        Ok(true)
    }

    /// Moves a saved carry to CF.
    pub fn restore_carry(&mut self) -> Result<bool, Refused> {
        let Some(slot) = self.saved(flags::CARRY) else { return Ok(false) };
        self.a.bt(dword_ptr(r15 + CONDITIONS), slot * 8)?;
        Ok(true)
    }

    fn saved(&self, condition: u8) -> Option<i32> {
        self.flags.saved.iter().position(|&s| s == Some(condition & !1)).map(|slot| slot as i32)
    }

    /// The interpreter executes the current instruction.
    pub fn call_alone(&mut self, step: &Step) -> Emitted {
        if !self.flags.record {
            return Err(Refused);
        }
        self.a.mov(r14, self.alone)?;
        self.a.call(self.glue.call_op)?;
        if step.effect == Effect::None {
            self.flags.host = false;
        } else {
            self.flags_changed(false, true);
        }
        Ok(())
    }

    /// Where the current instruction goes on when the interpreter has executed it.
    pub fn cold_call(&mut self, flags: bool) -> (CodeLabel, CodeLabel) {
        let (start, resume) = (self.a.create_label(), self.a.create_label());
        self.cold.push(Cold::Call { start, op: self.alone, flags, resume });
        (start, resume)
    }

    /// Records all flags as they are in the host's register.
    pub fn record_known(&mut self) -> Emitted {
        self.a.pushfq()?;
        self.a.pop(r14)?;
        self.a.mov(quad(OPERAND), r14)?;
        self.record_kind(Kind::Known, 8)
    }

    /// Records the flags of a shift or multiplication whose result of `size` bytes is in a register: CF and, if it is
    /// defined, OF as they are in the host's register.
    pub fn record_partial(&mut self, result: Register, size: usize, overflow: bool) -> Emitted {
        self.store(Code::Mov_rm64_r64, field(RESULT), result)?;
        self.a.setb(r14b)?;
        self.a.movzx(r14d, r14b)?;
        self.a.mov(quad(OPERAND), r14)?;
        if overflow {
            // OF is bit 11.
            self.a.seto(r14b)?;
            self.a.movzx(r14d, r14b)?;
            self.a.lea(r14d, dword_ptr(r14 * 8))?;
            self.a.mov(byte_ptr(r15 + (OPERAND + 1)), r14b)?;
        }
        self.record_kind(Kind::Partial, size)
    }

    /// Records how the flags follow from the recorded result and operand of `size` bytes.
    pub fn record_kind(&mut self, kind: Kind, size: usize) -> Emitted {
        let shift = if kind == Kind::Known { 0 } else { 64 - 8 * size as u32 };
        Ok(self.a.mov(word_ptr(r15 + KIND), (shift << 8) | kind as u32)?)
    }

    /// Emits what was put off.
    pub fn finish(&mut self) -> Emitted {
        for cold in std::mem::take(&mut self.cold) {
            match cold {
                Cold::Call { mut start, op, flags, resume } => {
                    self.a.set_label(&mut start)?;
                    self.a.mov(r14, op)?;
                    self.a.call(if flags { self.glue.call_op_flags } else { self.glue.call_op })?;
                    self.a.jmp(resume)?;
                }
                Cold::Leave { mut start, op } => {
                    self.a.set_label(&mut start)?;
                    self.a.mov(r14, op)?;
                    self.a.jmp(self.glue.leave)?;
                }
                Cold::NotEntered { mut start, first } => {
                    self.a.set_label(&mut start)?;
                    self.a.mov(r14, first)?;
                    self.a.jmp(self.glue.not_entered)?;
                }
            }
        }
        Ok(())
    }
}

/// SETcc of memory, by condition code.
const SETCC: [Code; 16] = [
    Code::Seto_rm8,
    Code::Setno_rm8,
    Code::Setb_rm8,
    Code::Setae_rm8,
    Code::Sete_rm8,
    Code::Setne_rm8,
    Code::Setbe_rm8,
    Code::Seta_rm8,
    Code::Sets_rm8,
    Code::Setns_rm8,
    Code::Setp_rm8,
    Code::Setnp_rm8,
    Code::Setl_rm8,
    Code::Setge_rm8,
    Code::Setle_rm8,
    Code::Setg_rm8,
];

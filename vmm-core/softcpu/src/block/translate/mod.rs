//! From decoded instructions to operations.

mod branch;
mod general;
mod select;
pub(super) mod unit;

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

use super::op::{FS_BASE, GS_BASE, Handler, Op, RIP, X_ADDR16, X_ADDR32, X_STACK, ZERO};
use super::slow::slow_handler;
use super::{Owned, Slow, SlowOp};
use crate::cpu::mode;
use crate::hostop::StubCache;
use crate::ops::operand::{address_size, encode, segment_number};
use crate::ops::{flow, host, mov, stack};

/// Collects the operations of one block.
pub(crate) struct Builder<'a> {
    mode: u16,
    ops: Vec<Op>,
    owned: Owned,
    stubs: &'a mut StubCache,
    previous: Option<Instruction>,
    /// The previous instruction is the second one of a pair.
    paired: bool,
    /// Nobody sees the status flags that the current instruction sets.
    quiet: bool,
}

/// An operation under construction: the handler, and whether it ends the block.
type Chosen = (Handler, bool);

impl<'a> Builder<'a> {
    pub fn new(mode: u16, stubs: &'a mut StubCache) -> Self {
        Self {
            mode,
            ops: Vec::new(),
            owned: Owned::default(),
            stubs,
            previous: None,
            paired: false,
            quiet: false,
        }
    }

    pub fn finish(self) -> (Vec<Op>, Owned) {
        (self.ops, self.owned)
    }

    fn code64(&self) -> bool {
        self.mode & mode::CODE64 != 0
    }

    /// Adds an instruction; `left` counts it and those that follow, `quiet` says that nobody sees the status flags that
    /// it leaves.
    pub fn instruction(&mut self, instruction: &Instruction, left: u8, quiet: bool) {
        let last = left == 1;
        self.quiet = quiet;
        let mut op =
            Op { len: instruction.len() as u8, left, off: instruction.ip() as u16, ..Op::bare(mov::nop) };
        let (handler, ends) = self.choose(instruction, &mut op);
        op.handler.set(handler);
        if last && !ends && instruction.is_jcc_short_or_near() {
            self.fuse(instruction.condition_code() as u8 - 1);
        }
        let paired = !self.paired && self.pair(instruction);
        self.paired = paired;
        self.previous = Some(*instruction);
        self.ops.push(op);
        if last && !ends {
            self.go_on(instruction.next_ip());
        }
    }

    /// Lets the operation of the previous PUSH or POP of a register execute this one as well. Returns whether it does.
    fn pair(&mut self, instruction: &Instruction) -> bool {
        let (Some(previous), Some(op)) = (self.previous, self.ops.last()) else { return false };
        let register = |i: &Instruction| i.op0_kind() == OpKind::Register && i.op0_register().is_gpr64();
        // Not those whose operand is the stack pointer.
        let simple = |i: &Instruction| register(i) && i.op0_register() != Register::RSP;
        if previous.mnemonic() != instruction.mnemonic() || !simple(&previous) || !simple(instruction) {
            return false;
        }
        match instruction.mnemonic() {
            M::Push => op.handler.set(stack::push64_pair),
            M::Pop => op.handler.set(stack::pop64_pair),
            _ => return false,
        }
        true
    }

    /// Ends the block with a jump to the instruction that follows it.
    fn go_on(&mut self, next: u64) {
        let (disp, handler) = match (next < 4096, self.code64()) {
            (true, _) => (next as i32, flow::jump_near as Handler),
            (false, true) => (0, flow::jump_far::<u64> as Handler),
            (false, false) => (0, flow::jump_far::<u32> as Handler),
        };
        self.ops.push(Op { disp, off: next as u16, ..Op::bare(handler) });
    }

    /// Fills the memory operand in. Returns whether it is addressed as 64-bit code does, or `None` if the
    /// displacement does not fit.
    fn memory(&self, i: &Instruction, op: &mut Op) -> Option<bool> {
        let register = |r: Register| match r {
            Register::None => ZERO,
            Register::RIP | Register::EIP => RIP,
            r => encode(r),
        };
        op.base = register(i.memory_base());
        op.index = register(i.memory_index());
        op.scale = i.memory_index_scale().trailing_zeros() as u8;
        let segment = i.memory_segment();
        let stack = if self.code64() {
            // Overrides other than FS and GS are ignored here too.
            !matches!(segment, Register::FS | Register::GS)
                && matches!(i.memory_base().full_register(), Register::RSP | Register::RBP)
        } else {
            segment == Register::SS
        };
        if stack {
            op.x |= X_STACK;
        }
        let displacement = i.memory_displacement64();
        match address_size(i) {
            8 if self.code64() => {
                op.seg = match segment {
                    Register::FS => FS_BASE,
                    Register::GS => GS_BASE,
                    _ => ZERO,
                };
                op.disp = match i32::try_from(displacement as i64) {
                    Ok(fits) => fits,
                    Err(_) if slow_handler(i).is_some() || i.mnemonic() == M::Mov => 0,
                    Err(_) => return None,
                };
                Some(true)
            }
            size => {
                op.seg = segment_number(segment) as u8;
                op.x |= if size == 2 { X_ADDR16 } else { X_ADDR32 };
                op.disp = displacement as i32;
                Some(false)
            }
        }
    }

    /// Whether the guest's processor has the instruction; for those that need neither the host's help nor a bit of CR4.
    fn announced(&self, i: &Instruction) -> bool {
        use iced_x86::CpuidFeature as F;
        match i.mnemonic() {
            M::Cmpxchg16b => self.stubs.has(F::CMPXCHG16B),
            M::Movbe => self.stubs.has(F::MOVBE),
            M::Popcnt => self.stubs.has(F::POPCNT),
            M::Rdrand => self.stubs.has(F::RDRAND),
            M::Rdseed => self.stubs.has(F::RDSEED),
            M::Clflushopt => self.stubs.has(F::CLFLUSHOPT),
            M::Clwb => self.stubs.has(F::CLWB),
            _ => true,
        }
    }

    fn slow(&mut self, i: &Instruction, op: &mut Op, run: Slow, goes_on: bool) -> Chosen {
        op.imm.set(self.owned.slow(SlowOp { run, instruction: *i }));
        if goes_on { (host::slow_next, false) } else { (host::slow_last, true) }
    }
}

fn has_memory(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory)
}

fn is_immediate(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

//! From decoded instructions to operations.

use std::cell::Cell;

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

use super::op::{FS_BASE, GS_BASE, Handler, Op, RIP, X_ADDR16, X_ADDR32, X_STACK, ZERO};
use super::slow::slow_handler;
use super::{Slow, SlowOp};
use crate::cpu::mode;
use crate::hostop::{self, HostOp, StubCache};
use crate::ops::ea::{Base, Legacy, Long};
use crate::ops::host::Unit;
use crate::ops::operand::{address_size, encode, segment_number, size_of};
use crate::ops::{alu, bits, flow, fused, host, mov, muldiv, rmw, shift, stack, system};

/// The instance of a handler for an operand size: `by_size!(size, module::handler, <more generics>)`.
macro_rules! by_size {
    ($size:expr, $($f:ident)::+ $(, $g:ty)*) => {
        match $size {
            1 => $($f)::+::<u8 $(, $g)*> as Handler,
            2 => $($f)::+::<u16 $(, $g)*> as Handler,
            4 => $($f)::+::<u32 $(, $g)*> as Handler,
            _ => $($f)::+::<u64 $(, $g)*> as Handler,
        }
    };
}

/// The same for handlers with a memory operand that are worth a variant for simple addresses.
macro_rules! by_size_hot {
    ($op:expr, $long:expr, $size:expr, $($f:ident)::+ $(, $g:ty)*) => {
        if $long && $op.index == ZERO && $op.seg == ZERO {
            by_size!($size, $($f)::+, Base $(, $g)*)
        } else {
            by_size_mem!($long, $size, $($f)::+ $(, $g)*)
        }
    };
}

/// The same for handlers with a memory operand.
macro_rules! by_size_mem {
    ($long:expr, $size:expr, $($f:ident)::+ $(, $g:ty)*) => {
        if $long {
            by_size!($size, $($f)::+, Long $(, $g)*)
        } else {
            by_size!($size, $($f)::+, Legacy $(, $g)*)
        }
    };
}

/// Evaluates an expression with a constant condition code.
macro_rules! by_condition {
    ($c:expr, $C:ident => $e:expr) => {
        by_condition!(@ $c, $C => $e; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $c:expr, $C:ident => $e:expr; $($n:literal)+) => {
        match $c {
            $($n => {
                const $C: u8 = $n;
                $e
            })+
            _ => unreachable!("other condition codes were excluded"),
        }
    };
}

/// Collects the operations of one block.
pub(crate) struct Builder<'a> {
    mode: u16,
    /// Offset of the block in its page.
    page_offset: u64,
    ops: Vec<Op>,
    slow: Vec<Box<SlowOp>>,
    host: Vec<Box<HostOp>>,
    stubs: &'a mut StubCache,
    previous: Option<Instruction>,
}

/// An operation under construction: the handler, and whether it ends the block.
type Chosen = (Handler, bool);

impl<'a> Builder<'a> {
    pub fn new(mode: u16, page_offset: u64, stubs: &'a mut StubCache) -> Self {
        let (ops, slow, host) = (Vec::new(), Vec::new(), Vec::new());
        Self { mode, page_offset, ops, slow, host, stubs, previous: None }
    }

    pub fn finish(self) -> (Vec<Op>, Vec<Box<SlowOp>>, Vec<Box<HostOp>>) {
        (self.ops, self.slow, self.host)
    }

    fn code64(&self) -> bool {
        self.mode & mode::CODE64 != 0
    }

    /// Adds an instruction; `left` counts it and those that follow, `last` says that none follows.
    pub fn instruction(&mut self, instruction: &Instruction, left: u8, last: bool) {
        let mut op = Op {
            handler: mov::nop,
            imm: Cell::new(0),
            disp: 0,
            r1: 0,
            r2: 0,
            base: ZERO,
            index: ZERO,
            scale: 0,
            seg: ZERO,
            len: instruction.len() as u8,
            left,
            off: instruction.ip() as u16,
            x: 0,
        };
        let (handler, ends) = self.choose(instruction, &mut op);
        op.handler = handler;
        if last && !ends && instruction.is_jcc_short_or_near() {
            self.fuse(instruction.condition_code() as u8 - 1);
        }
        self.previous = Some(*instruction);
        self.ops.push(op);
        if last && !ends {
            self.go_on(instruction.next_ip());
        }
    }

    /// Lets a comparison at the end of `ops` execute the conditional jump that follows.
    fn fuse(&mut self, condition: u8) {
        let (Some(i), Some(op)) = (self.previous, self.ops.last_mut()) else { return };
        if self.mode & mode::CODE64 == 0 || !fused::can_fuse(condition) {
            return;
        }
        let (k0, k1) = (i.op0_kind(), i.op1_kind());
        let memory = has_memory(&i);
        if size_of(&i, 0) == 2 || memory && address_size(&i) != 8 {
            return;
        }
        let simple = op.index == ZERO && op.seg == ZERO;
        macro_rules! fused {
            ($s:ty, $o:ty) => {
                by_condition!(@ condition, C => match size_of(&i, 0) {
                    1 => fused::fused::<u8, $s, $o, C> as Handler,
                    4 => fused::fused::<u32, $s, $o, C>,
                    _ => fused::fused::<u64, $s, $o, C>,
                }; 2 3 4 5 6 7 8 9 12 13 14 15)
            };
        }
        op.handler = match (i.mnemonic(), k0 == OpKind::Memory, k1 == OpKind::Memory, is_immediate(k1)) {
            (M::Cmp, false, false, false) => fused!(fused::RegReg, fused::Cmp),
            (M::Cmp, false, false, true) => fused!(fused::RegImm, fused::Cmp),
            (M::Cmp, true, _, true) if simple => fused!(fused::MemImm<Base>, fused::Cmp),
            (M::Cmp, true, _, true) => fused!(fused::MemImm<Long>, fused::Cmp),
            (M::Cmp, true, _, false) => fused!(fused::MemReg<Long>, fused::Cmp),
            (M::Cmp, false, true, _) => fused!(fused::RegMem<Long>, fused::Cmp),
            (M::Test, false, false, false) => fused!(fused::RegReg, fused::Test),
            (M::Test, false, false, true) => fused!(fused::RegImm, fused::Test),
            (M::Test, true, _, true) => fused!(fused::MemImm<Long>, fused::Test),
            _ => return,
        };
    }

    /// Ends the block with a jump to the instruction that follows it.
    fn go_on(&mut self, next: u64) {
        let near = self.page_offset + next < 4096;
        let (disp, handler) = match (near, self.code64()) {
            (true, true) => (next as i32, flow::jump_near::<u64> as Handler),
            (true, false) => (next as i32, flow::jump_near::<u32> as Handler),
            (false, true) => (0, flow::jump_far::<u64> as Handler),
            (false, false) => (0, flow::jump_far::<u32> as Handler),
        };
        self.ops.push(Op {
            handler,
            imm: Cell::new(0),
            disp,
            r1: 0,
            r2: 0,
            base: ZERO,
            index: ZERO,
            scale: 0,
            seg: ZERO,
            len: 0,
            left: 0,
            off: next as u16,
            x: 0,
        });
    }

    /// Chooses a handler and fills the operands in.
    fn choose(&mut self, i: &Instruction, op: &mut Op) -> Chosen {
        let mut long = self.code64();
        if has_memory(i) {
            match self.memory(i, op) {
                Some(is_long) => long = is_long,
                None => return self.slow(i, op, system::unimplemented, false),
            }
        }
        let memory0 = i.op0_kind() == OpKind::Memory;
        let memory1 = i.op1_kind() == OpKind::Memory;
        if i.op0_kind() == OpKind::Register {
            op.r1 = encode(i.op0_register());
        }
        if i.op_count() > 1 && i.op1_kind() == OpKind::Register {
            op.r2 = encode(i.op1_register());
        }
        if let Some((run, goes_on)) = slow_handler(i) {
            return self.slow(i, op, run, goes_on);
        }
        let size = if i.op_count() > 0 { size_of(i, 0) } else { 0 };
        let locked = i.has_lock_prefix();
        macro_rules! modify {
            ($m:ty) => {
                match (memory0, locked) {
                    (false, _) => by_size!(size, rmw::reg, $m),
                    (true, false) => by_size_hot!(op, long, size, rmw::mem, $m),
                    (true, true) => by_size_mem!(long, size, rmw::locked, $m),
                }
            };
        }
        macro_rules! binary {
            ($o:ty) => {{
                if is_immediate(i.op1_kind()) {
                    op.imm.set(i.immediate(1));
                    modify!(alu::WithImm<$o>)
                } else if memory1 {
                    by_size_hot!(op, long, size, alu::reg_mem, $o)
                } else {
                    modify!(alu::WithReg<$o>)
                }
            }};
        }
        macro_rules! compare {
            ($o:ty) => {{
                if is_immediate(i.op1_kind()) {
                    op.imm.set(i.immediate(1));
                    if memory0 {
                        by_size_hot!(op, long, size, alu::test_mem_imm, $o)
                    } else {
                        by_size!(size, alu::test_reg_imm, $o)
                    }
                } else if memory1 {
                    by_size_hot!(op, long, size, alu::test_reg_mem, $o)
                } else if memory0 {
                    by_size_hot!(op, long, size, alu::test_mem_reg, $o)
                } else {
                    by_size!(size, alu::test_reg_reg, $o)
                }
            }};
        }
        macro_rules! shifted {
            ($s:ty) => {{
                if i.op1_kind() == OpKind::Register {
                    modify!(shift::ByCl<$s>)
                } else {
                    op.imm.set(i.immediate(1));
                    modify!(shift::ByImm<$s>)
                }
            }};
        }
        macro_rules! bit {
            ($b:ty) => {{
                if is_immediate(i.op1_kind()) {
                    op.imm.set(i.immediate(1));
                    modify!(bits::Bit<$b, false>)
                } else if !memory0 {
                    by_size!(size, rmw::reg, bits::Bit<$b, true>)
                } else {
                    match (long, locked) {
                        (true, false) => by_bits!(size, Long, $b, false),
                        (true, true) => by_bits!(size, Long, $b, true),
                        (false, false) => by_bits!(size, Legacy, $b, false),
                        (false, true) => by_bits!(size, Legacy, $b, true),
                    }
                }
            }};
        }
        macro_rules! by_bits {
            ($size:expr, $e:ty, $b:ty, $lock:literal) => {
                match $size {
                    2 => bits::change_string::<u16, $e, $b, $lock> as Handler,
                    4 => bits::change_string::<u32, $e, $b, $lock> as Handler,
                    _ => bits::change_string::<u64, $e, $b, $lock> as Handler,
                }
            };
        }
        macro_rules! scan {
            ($s:ty) => {
                if memory1 {
                    by_size_mem!(long, size, bits::scan_mem, $s)
                } else {
                    by_size!(size, bits::scan_reg, $s)
                }
            };
        }
        macro_rules! pair {
            ($p:ty) => {
                if memory0 {
                    by_size_mem!(long, size, muldiv::pair_mem, $p)
                } else {
                    by_size!(size, muldiv::pair_reg, $p)
                }
            };
        }
        let handler = match i.mnemonic() {
            M::Add => binary!(alu::Add),
            M::Or => binary!(alu::Or),
            M::Adc => binary!(alu::Adc),
            M::Sbb => binary!(alu::Sbb),
            M::And => binary!(alu::And),
            M::Sub => binary!(alu::Sub),
            M::Xor => binary!(alu::Xor),
            M::Cmp => compare!(alu::Sub),
            M::Test => compare!(alu::And),
            M::Inc => modify!(alu::Inc),
            M::Dec => modify!(alu::Dec),
            M::Neg => modify!(alu::Neg),
            M::Not => modify!(alu::Not),
            M::Xadd => modify!(alu::Xadd),
            M::Xchg if memory1 => {
                op.r2 = op.r1;
                by_size_mem!(long, size, rmw::locked, alu::Xchg)
            }
            M::Xchg if memory0 => by_size_mem!(long, size, rmw::locked, alu::Xchg),
            M::Xchg => by_size!(size, mov::xchg_reg_reg),
            M::Shl | M::Sal => shifted!(shift::Shl),
            M::Shr => shifted!(shift::Shr),
            M::Sar => shifted!(shift::Sar),
            M::Rol => shifted!(shift::Rol),
            M::Ror => shifted!(shift::Ror),
            M::Rcl => shifted!(shift::Rcl),
            M::Rcr => shifted!(shift::Rcr),
            M::Shld if i.op2_kind() == OpKind::Register => modify!(shift::DoubleLeft<true>),
            M::Shrd if i.op2_kind() == OpKind::Register => modify!(shift::DoubleRight<true>),
            M::Shld => {
                op.imm.set(i.immediate(2));
                modify!(shift::DoubleLeft<false>)
            }
            M::Shrd => {
                op.imm.set(i.immediate(2));
                modify!(shift::DoubleRight<false>)
            }
            M::Bt if is_immediate(i.op1_kind()) && memory0 => {
                op.imm.set(i.immediate(1));
                by_size_mem!(long, size, bits::test_mem_imm)
            }
            M::Bt if memory0 => by_size_mem!(long, size, bits::test_string),
            M::Bt => {
                if is_immediate(i.op1_kind()) {
                    op.imm.set(i.immediate(1));
                    by_size!(size, bits::test_reg, bits::Bit<bits::Test, false>)
                } else {
                    by_size!(size, bits::test_reg, bits::Bit<bits::Test, true>)
                }
            }
            M::Bts => bit!(bits::Set),
            M::Btr => bit!(bits::Reset),
            M::Btc => bit!(bits::Complement),
            // Without BMI these are BSF and BSR with a prefix that has no meaning.
            M::Bsf | M::Tzcnt => scan!(bits::Bsf),
            M::Bsr | M::Lzcnt => scan!(bits::Bsr),
            M::Popcnt => scan!(bits::Popcnt),
            M::Bswap => by_size!(size, rmw::reg, bits::Bswap),
            M::Mul => pair!(muldiv::Mul),
            M::Div => pair!(muldiv::Div),
            M::Idiv => pair!(muldiv::Idiv),
            M::Imul if i.op_count() == 1 => pair!(muldiv::Imul),
            M::Imul if i.op_count() == 2 && memory1 => by_size_mem!(long, size, muldiv::imul_mem),
            M::Imul if i.op_count() == 2 => by_size!(size, muldiv::imul_reg),
            M::Imul => {
                op.imm.set(i.immediate(2));
                if memory1 {
                    by_size_mem!(long, size, muldiv::imul_mem_imm)
                } else {
                    by_size!(size, muldiv::imul_reg_imm)
                }
            }
            M::Mov => return self.mov(i, op, long, size),
            M::Movnti => by_size_hot!(op, long, size, mov::store_reg),
            M::Movzx | M::Movsx | M::Movsxd => extend(i, long, op.index == ZERO && op.seg == ZERO),
            M::Lea if long => by_size!(size, mov::lea_long),
            M::Lea => by_size!(size, mov::lea_legacy),
            M::Cbw => mov::extend_accumulator::<u16, u8>,
            M::Cwde => mov::extend_accumulator::<u32, u16>,
            M::Cdqe => mov::extend_accumulator::<u64, u32>,
            M::Cwd => mov::sign_to_dx::<u16>,
            M::Cdq => mov::sign_to_dx::<u32>,
            M::Cqo => mov::sign_to_dx::<u64>,
            M::Nop
            | M::Endbr64
            | M::Endbr32
            | M::Pause
            | M::Prefetchw
            | M::Prefetch
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchnta
            | M::Reservednop => mov::nop,
            M::Mfence | M::Lfence | M::Sfence => mov::fence,
            M::Lahf => mov::lahf,
            M::Sahf => mov::sahf,
            M::Clc | M::Stc | M::Cmc => {
                op.imm.set(match i.mnemonic() {
                    M::Clc => 0,
                    M::Stc => 1,
                    _ => 2,
                });
                mov::set_carry
            }
            M::Cld | M::Std => {
                op.imm.set(u64::from(i.mnemonic() == M::Std));
                mov::set_direction
            }
            M::Cli => host::cli,
            M::Sti => host::sti,
            M::Cmpxchg if memory0 => by_size_mem!(long, size, mov::cmpxchg_mem),
            M::Cmpxchg => by_size!(size, mov::cmpxchg_reg),
            M::Push => return (self.push(i, op, long), false),
            M::Pop => return (self.pop(i, op, long), false),
            M::Pushf | M::Pushfd | M::Pushfq => {
                op.x |= X_STACK;
                by_size!(stack_size(i), stack::push_flags)
            }
            M::Popf | M::Popfd | M::Popfq => {
                op.x |= X_STACK;
                by_size!(stack_size(i), stack::pop_flags)
            }
            M::Leave => {
                op.x |= X_STACK;
                match i.code() {
                    iced_x86::Code::Leavew => stack::leave_frame::<u16>,
                    iced_x86::Code::Leaved => stack::leave_frame::<u32>,
                    _ => stack::leave_frame::<u64>,
                }
            }
            M::Jmp => return (self.jump(i, op, long), true),
            M::Call => return (self.call(i, op, long), true),
            M::Ret => {
                op.x |= X_STACK;
                op.imm.set(if i.op_count() == 1 { u64::from(i.immediate16()) } else { 0 });
                let handler = match i.code() {
                    iced_x86::Code::Retnq | iced_x86::Code::Retnq_imm16 => flow::ret64 as Handler,
                    iced_x86::Code::Retnd | iced_x86::Code::Retnd_imm16 => flow::ret_legacy::<u32>,
                    _ => flow::ret_legacy::<u16>,
                };
                return (handler, true);
            }
            M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => {
                return (self.count_jump(i, op), true);
            }
            _ if i.is_jcc_short_or_near() => return (self.jcc(i, op), false),
            _ if is_cmov(i) => {
                let c = i.condition_code() as u8 - 1;
                by_condition!(condition(c), C => match (memory1, long, size) {
                    (false, _, 2) => mov::cmov_reg::<u16, C> as Handler,
                    (false, _, 4) => mov::cmov_reg::<u32, C>,
                    (false, _, _) => mov::cmov_reg::<u64, C>,
                    (true, true, 2) => mov::cmov_mem::<u16, Long, C>,
                    (true, true, 4) => mov::cmov_mem::<u32, Long, C>,
                    (true, true, _) => mov::cmov_mem::<u64, Long, C>,
                    (true, false, 2) => mov::cmov_mem::<u16, Legacy, C>,
                    (true, false, 4) => mov::cmov_mem::<u32, Legacy, C>,
                    (true, false, _) => mov::cmov_mem::<u64, Legacy, C>,
                })
            }
            _ if is_setcc(i) => {
                let c = i.condition_code() as u8 - 1;
                by_condition!(condition(c), C => match (memory0, long) {
                    (false, _) => mov::set_reg::<C> as Handler,
                    (true, true) => mov::set_mem::<Long, C>,
                    (true, false) => mov::set_mem::<Legacy, C>,
                })
            }
            _ => return self.host(i, op, long),
        };
        (handler, false)
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

    fn slow(&mut self, i: &Instruction, op: &mut Op, run: Slow, goes_on: bool) -> Chosen {
        let boxed = Box::new(SlowOp { run, instruction: *i });
        op.imm.set((&raw const *boxed) as usize as u64);
        self.slow.push(boxed);
        if goes_on { (host::slow_next, false) } else { (host::slow_last, true) }
    }

    fn mov(&mut self, i: &Instruction, op: &mut Op, long: bool, size: u64) -> Chosen {
        let (k0, k1) = (i.op0_kind(), i.op1_kind());
        let absolute = (k0 == OpKind::Memory || k1 == OpKind::Memory)
            && long
            && i32::try_from(i.memory_displacement64() as i64).is_err();
        if absolute {
            return self.slow(i, op, system::mov_generic, true);
        }
        let handler = match (k0, k1) {
            (OpKind::Register, OpKind::Register) if i.op1_register().is_segment_register() => {
                op.r2 = segment_number(i.op1_register()) as u8;
                by_size!(size, mov::mov_reg_seg)
            }
            (OpKind::Register, OpKind::Register) => by_size!(size, mov::mov_reg_reg),
            (OpKind::Register, OpKind::Memory) => by_size_hot!(op, long, size, mov::load),
            (OpKind::Memory, OpKind::Register) => by_size_hot!(op, long, size, mov::store_reg),
            (OpKind::Memory, _) => {
                op.imm.set(i.immediate(1));
                by_size_hot!(op, long, size, mov::store_imm)
            }
            _ => {
                op.imm.set(i.immediate(1));
                by_size!(size, mov::mov_reg_imm)
            }
        };
        (handler, false)
    }

    fn push(&mut self, i: &Instruction, op: &mut Op, long: bool) -> Handler {
        if !has_memory(i) {
            op.x |= X_STACK;
        }
        let size = stack_size(i);
        match i.op0_kind() {
            OpKind::Register if i.op0_register().is_segment_register() => {
                op.r1 = segment_number(i.op0_register()) as u8;
                by_size!(size, stack::push_seg)
            }
            OpKind::Register if size == 8 => stack::push64_reg,
            OpKind::Register => by_size!(size, stack::push_reg),
            OpKind::Memory => by_size_mem!(long, size, stack::push_mem),
            _ => {
                op.imm.set(i.immediate(0));
                by_size!(size, stack::push_imm)
            }
        }
    }

    fn pop(&mut self, i: &Instruction, op: &mut Op, long: bool) -> Handler {
        if !has_memory(i) {
            op.x |= X_STACK;
        }
        let size = stack_size(i);
        match i.op0_kind() {
            OpKind::Register if size == 8 => stack::pop64_reg,
            OpKind::Register => by_size!(size, stack::pop_reg),
            _ => by_size_mem!(long, size, stack::pop_mem),
        }
    }

    /// Sets where a near branch leads: relative to the block (`near`), or to the next instruction.
    fn target(&self, i: &Instruction, op: &mut Op) -> (bool, u64) {
        let (target, size) = match i.op0_kind() {
            OpKind::NearBranch16 => (i.near_branch16() as i16 as i64, 2),
            OpKind::NearBranch32 => (i.near_branch32() as i32 as i64, 4),
            _ => (i.near_branch64() as i64, 8),
        };
        let near = size != 2 && (0..4096).contains(&(self.page_offset as i64 + target));
        op.disp = if near { target as i32 } else { (target - i.next_ip() as i64) as i32 };
        (near, size)
    }

    fn jump(&mut self, i: &Instruction, op: &mut Op, long: bool) -> Handler {
        match i.op0_kind() {
            OpKind::Register => match i.op0_register().size() {
                2 => flow::jump_reg::<u16>,
                4 => flow::jump_reg::<u32>,
                _ => flow::jump_reg::<u64>,
            },
            OpKind::Memory => by_size_mem!(long, size_of(i, 0), flow::jump_mem),
            _ => match self.target(i, op) {
                (true, 8) => flow::jump_near::<u64>,
                (true, _) => flow::jump_near::<u32>,
                (false, 8) => flow::jump_far::<u64>,
                (false, 4) => flow::jump_far::<u32>,
                (false, _) => flow::jump_far::<u16>,
            },
        }
    }

    fn call(&mut self, i: &Instruction, op: &mut Op, long: bool) -> Handler {
        op.x |= X_STACK;
        match i.op0_kind() {
            OpKind::Register => match i.op0_register().size() {
                2 => flow::call_reg::<u16>,
                4 => flow::call_reg::<u32>,
                _ => flow::call_reg::<u64>,
            },
            OpKind::Memory => by_size_mem!(long, size_of(i, 0), flow::call_mem),
            _ => match self.target(i, op) {
                (true, 8) => flow::call64_near,
                (false, 8) => flow::call64_far,
                (true, _) => flow::call_near::<u32>,
                (false, 4) => flow::call_far::<u32>,
                (false, _) => flow::call_far::<u16>,
            },
        }
    }

    fn jcc(&mut self, i: &Instruction, op: &mut Op) -> Handler {
        let target = self.target(i, op);
        by_condition!(condition(i.condition_code() as u8 - 1), C => match target {
            (true, 8) => flow::jcc_near::<u64, C> as Handler,
            (true, _) => flow::jcc_near::<u32, C>,
            (false, 8) => flow::jcc_far::<u64, C>,
            (false, 4) => flow::jcc_far::<u32, C>,
            (false, _) => flow::jcc_far::<u16, C>,
        })
    }

    fn count_jump(&mut self, i: &Instruction, op: &mut Op) -> Handler {
        use iced_x86::Code as C;
        let (_, size) = self.target(i, op);
        op.disp = match i.op0_kind() {
            OpKind::NearBranch16 => i32::from(i.near_branch16() as i16),
            OpKind::NearBranch32 => i.near_branch32() as i32,
            _ => i.near_branch64() as i32,
        };
        op.r1 = match i.mnemonic() {
            M::Loop => 0,
            M::Loope => 1,
            M::Loopne => 2,
            _ => 3,
        };
        op.r2 = match i.code() {
            C::Jcxz_rel8_16
            | C::Jcxz_rel8_32
            | C::Loop_rel8_16_CX
            | C::Loop_rel8_32_CX
            | C::Loope_rel8_16_CX
            | C::Loope_rel8_32_CX
            | C::Loopne_rel8_16_CX
            | C::Loopne_rel8_32_CX => 2,
            C::Jrcxz_rel8_16
            | C::Jrcxz_rel8_64
            | C::Loop_rel8_16_RCX
            | C::Loop_rel8_64_RCX
            | C::Loope_rel8_16_RCX
            | C::Loope_rel8_64_RCX
            | C::Loopne_rel8_16_RCX
            | C::Loopne_rel8_64_RCX => 8,
            _ => 4,
        };
        op.scale = size as u8;
        flow::count_jump
    }

    /// x87, MMX and SSE instructions, and whatever is left.
    fn host(&mut self, i: &Instruction, op: &mut Op, long: bool) -> Chosen {
        let Some(host) = hostop::translate(&without_hint(i), self.stubs) else {
            return self.slow(i, op, system::unimplemented, false);
        };
        let boxed = Box::new(host);
        op.imm.set((&raw const *boxed) as usize as u64);
        let chosen = hostop::choose(i, &boxed, op, long);
        self.host.push(boxed);
        if let Some(handler) = chosen {
            return (handler, false);
        }
        op.r1 = unit(i) as u8;
        op.r2 = 0;
        if has_memory(i) {
            op.r2 = if writes_memory(i) { 2 } else { 1 };
            op.x |= (i.memory_size().size().min(128) as u16) << 8;
        }
        (if long || !has_memory(i) { host::host::<true> } else { host::host::<false> }, false)
    }
}

/// Replaces a non-temporal move by the ordinary one: on the way through host registers the hint costs far more
/// than it could save.
fn without_hint(i: &Instruction) -> Instruction {
    use iced_x86::Code as C;
    let mut plain = *i;
    match i.code() {
        C::Movntdq_m128_xmm => plain.set_code(C::Movdqa_xmmm128_xmm),
        C::Movntps_m128_xmm => plain.set_code(C::Movaps_xmmm128_xmm),
        C::Movntpd_m128_xmm => plain.set_code(C::Movapd_xmmm128_xmm),
        C::Movntdqa_xmm_m128 => plain.set_code(C::Movdqa_xmm_xmmm128),
        C::Movntq_m64_mm => plain.set_code(C::Movq_mmm64_mm),
        _ => {}
    }
    plain
}

fn has_memory(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory)
}

fn writes_memory(i: &Instruction) -> bool {
    use iced_x86::OpAccess::{CondWrite, ReadCondWrite, ReadWrite, Write};
    let mut factory = iced_x86::InstructionInfoFactory::new();
    let info = factory.info(i);
    info.used_memory().iter().any(|m| matches!(m.access(), Write | CondWrite | ReadWrite | ReadCondWrite))
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

/// Bytes by which an instruction moves the stack pointer.
fn stack_size(i: &Instruction) -> u64 {
    u64::from(i.stack_pointer_increment().unsigned_abs())
}

/// The condition code as instructions encode it, from iced's order (which is the same).
fn condition(c: u8) -> u8 {
    c & 15
}

fn is_cmov(i: &Instruction) -> bool {
    i.condition_code() != iced_x86::ConditionCode::None && i.op_count() == 2 && !i.is_vsib()
}

fn is_setcc(i: &Instruction) -> bool {
    i.condition_code() != iced_x86::ConditionCode::None && i.op_count() == 1
}

/// MOVZX, MOVSX and MOVSXD.
fn extend(i: &Instruction, long: bool, simple: bool) -> Handler {
    let destination = size_of(i, 0);
    let source = size_of(i, 1);
    let memory = i.op1_kind() == OpKind::Memory;
    macro_rules! from {
        ($reg:ident, $mem:ident, $s:ty) => {
            match (memory, long, destination) {
                (true, true, 4) if simple => mov::$mem::<u32, $s, Base>,
                (true, true, 8) if simple => mov::$mem::<u64, $s, Base>,
                (false, _, 2) => mov::$reg::<u16, $s> as Handler,
                (false, _, 4) => mov::$reg::<u32, $s>,
                (false, _, _) => mov::$reg::<u64, $s>,
                (true, true, 2) => mov::$mem::<u16, $s, Long>,
                (true, true, 4) => mov::$mem::<u32, $s, Long>,
                (true, true, _) => mov::$mem::<u64, $s, Long>,
                (true, false, 2) => mov::$mem::<u16, $s, Legacy>,
                (true, false, 4) => mov::$mem::<u32, $s, Legacy>,
                (true, false, _) => mov::$mem::<u64, $s, Legacy>,
            }
        };
    }
    match (i.mnemonic(), source) {
        (M::Movzx, 1) => from!(zero_extend_reg, zero_extend_mem, u8),
        (M::Movzx, _) => from!(zero_extend_reg, zero_extend_mem, u16),
        (_, 1) => from!(sign_extend_reg, sign_extend_mem, u8),
        (_, 2) => from!(sign_extend_reg, sign_extend_mem, u16),
        _ => from!(sign_extend_reg, sign_extend_mem, u32),
    }
}

/// Which unit an x87, MMX or SSE instruction needs.
fn unit(i: &Instruction) -> Unit {
    use iced_x86::CpuidFeature as F;
    match i.mnemonic() {
        M::Wait => return Unit::Wait,
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => return Unit::Fxsr,
        M::Fninit
        | M::Fnstcw
        | M::Fnstsw
        | M::Fnclex
        | M::Fnstenv
        | M::Fnsave
        | M::Fneni
        | M::Fndisi
        | M::Fnsetpm => return Unit::X87Control,
        _ => {}
    }
    let features = i.cpuid_features();
    let x87 = features.iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387 | F::FPU287XL_ONLY))
        || matches!(
            i.mnemonic(),
            M::Fcmovb
                | M::Fcmove
                | M::Fcmovbe
                | M::Fcmovu
                | M::Fcmovnb
                | M::Fcmovne
                | M::Fcmovnbe
                | M::Fcmovnu
                | M::Fcomi
                | M::Fcomip
                | M::Fucomi
                | M::Fucomip
                | M::Fisttp
        );
    let uses_mm = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm());
    if x87 {
        Unit::X87
    } else if uses_mm || i.mnemonic() == M::Emms {
        Unit::Mmx
    } else {
        Unit::Sse
    }
}

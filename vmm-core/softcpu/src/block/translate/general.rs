//! General-purpose instructions.

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use super::super::op::{Handler, Op, X_STACK, ZERO};
use super::super::slow::slow_handler;
use super::select::{by_condition, by_size, by_size_hot, by_size_mem, by_wide};
use super::{Builder, Chosen, has_memory, is_immediate};
use crate::mmu::Fast;
use crate::ops::alu::Quiet;
use crate::ops::ea::{Base, Indexed, Legacy, Long};
use crate::ops::operand::{encode, segment_number, size_of};
use crate::ops::{alu, bits, flow, host, mov, muldiv, rmw, shift, stack, system};

impl Builder<'_> {
    /// Chooses a handler and fills the operands in.
    pub(super) fn choose(&mut self, i: &Instruction, op: &mut Op) -> Chosen {
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
        if !self.announced(i) {
            return self.slow(i, op, system::ud, false);
        }
        if let Some((run, goes_on)) = slow_handler(i) {
            return self.slow(i, op, run, goes_on);
        }
        let size = if i.op_count() > 0 { size_of(i, 0) } else { 0 };
        let locked = i.has_lock_prefix();
        // Only the hottest forms are worth a variant that leaves the flags alone.
        let quiet = self.quiet && size >= 4 && !memory0;
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
                    by_size_hot!(op, long, size, alu::reg_mem, $o, Fast)
                } else {
                    modify!(alu::WithReg<$o>)
                }
            }};
        }
        macro_rules! quiet_binary {
            ($o:ty) => {{
                if !quiet || memory1 && (!long || op.seg != ZERO) {
                    binary!($o)
                } else if is_immediate(i.op1_kind()) {
                    op.imm.set(i.immediate(1));
                    by_wide!(size, rmw::reg, alu::WithImm<Quiet<$o>>)
                } else if memory1 {
                    by_wide!(size, alu::reg_mem, Indexed, Quiet<$o>, Fast)
                } else {
                    by_wide!(size, rmw::reg, alu::WithReg<Quiet<$o>>)
                }
            }};
        }
        macro_rules! compare {
            ($o:ty) => {{
                if is_immediate(i.op1_kind()) {
                    op.imm.set(i.immediate(1));
                    if memory0 {
                        by_size_hot!(op, long, size, alu::test_mem_imm, $o, Fast)
                    } else {
                        by_size!(size, alu::test_reg_imm, $o)
                    }
                } else if memory1 {
                    by_size_hot!(op, long, size, alu::test_reg_mem, $o, Fast)
                } else if memory0 {
                    by_size_hot!(op, long, size, alu::test_mem_reg, $o, Fast)
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
        macro_rules! quiet_shifted {
            ($s:ty) => {{
                if quiet && i.op1_kind() != OpKind::Register {
                    op.imm.set(i.immediate(1));
                    by_wide!(size, rmw::reg, shift::ByImm<Quiet<$s>>)
                } else {
                    shifted!($s)
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
            M::Add => quiet_binary!(alu::Add),
            M::Or => quiet_binary!(alu::Or),
            M::Adc => binary!(alu::Adc),
            M::Sbb => binary!(alu::Sbb),
            M::And => quiet_binary!(alu::And),
            M::Sub => quiet_binary!(alu::Sub),
            M::Xor => quiet_binary!(alu::Xor),
            M::Cmp => compare!(alu::Sub),
            M::Test => compare!(alu::And),
            M::Inc if quiet => {
                op.imm.set(1);
                by_wide!(size, rmw::reg, alu::WithImm<Quiet<alu::Add>>)
            }
            M::Dec if quiet => {
                op.imm.set(1);
                by_wide!(size, rmw::reg, alu::WithImm<Quiet<alu::Sub>>)
            }
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
            M::Shl | M::Sal => quiet_shifted!(shift::Shl),
            M::Shr => quiet_shifted!(shift::Shr),
            M::Sar => quiet_shifted!(shift::Sar),
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
            M::Movnti => by_size_hot!(op, long, size, mov::store_reg, Fast),
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
            | M::Prefetchw
            | M::Prefetch
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchnta
            | M::Reservednop => mov::nop,
            M::Pause => host::pause,
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
                    iced_x86::Code::Retnq | iced_x86::Code::Retnq_imm16 => flow::ret64::<Fast> as Handler,
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
                by_condition!(c, C => match (memory1, long, size) {
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
                by_condition!(c, C => match (memory0, long) {
                    (false, _) => mov::set_reg::<C> as Handler,
                    (true, true) => mov::set_mem::<Long, C>,
                    (true, false) => mov::set_mem::<Legacy, C>,
                })
            }
            _ => return self.host(i, op, long),
        };
        (handler, false)
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
            (OpKind::Register, OpKind::Memory) => by_size_hot!(op, long, size, mov::load, Fast),
            (OpKind::Memory, OpKind::Register) => by_size_hot!(op, long, size, mov::store_reg, Fast),
            (OpKind::Memory, _) => {
                op.imm.set(i.immediate(1));
                by_size_hot!(op, long, size, mov::store_imm, Fast)
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
            OpKind::Register if size == 8 => stack::push64_reg::<Fast>,
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
            OpKind::Register if size == 8 => stack::pop64_reg::<Fast>,
            OpKind::Register => by_size!(size, stack::pop_reg),
            _ => by_size_mem!(long, size, stack::pop_mem),
        }
    }
}

/// Bytes by which an instruction moves the stack pointer.
fn stack_size(i: &Instruction) -> u64 {
    u64::from(i.stack_pointer_increment().unsigned_abs())
}

fn is_cmov(i: &Instruction) -> bool {
    i.condition_code() != iced_x86::ConditionCode::None && i.op_count() == 2
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
                (true, true, 4) if simple => mov::$mem::<u32, $s, Base, Fast>,
                (true, true, 8) if simple => mov::$mem::<u64, $s, Base, Fast>,
                (false, _, 2) => mov::$reg::<u16, $s> as Handler,
                (false, _, 4) => mov::$reg::<u32, $s>,
                (false, _, _) => mov::$reg::<u64, $s>,
                (true, true, 2) => mov::$mem::<u16, $s, Long, Fast>,
                (true, true, 4) => mov::$mem::<u32, $s, Long, Fast>,
                (true, true, _) => mov::$mem::<u64, $s, Long, Fast>,
                (true, false, 2) => mov::$mem::<u16, $s, Legacy, Fast>,
                (true, false, 4) => mov::$mem::<u32, $s, Legacy, Fast>,
                (true, false, _) => mov::$mem::<u64, $s, Legacy, Fast>,
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

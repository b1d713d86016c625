//! Near branches, and comparisons that are fused with them.

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use super::super::op::{Handler, Op, X_STACK, ZERO};
use super::select::{by_condition, by_size, by_size_mem};
use super::{Builder, has_memory, is_immediate};
use crate::cpu::mode;
use crate::mmu::Fast;
use crate::ops::ea::{Base, Indexed, Legacy, Long};
use crate::ops::operand::{address_size, size_of};
use crate::ops::{flow, fused};

impl Builder<'_> {
    /// Lets a comparison at the end of `ops` execute the conditional jump that follows.
    pub(super) fn fuse(&mut self, condition: u8) {
        let (Some(i), Some(op)) = (self.previous, self.ops.last_mut()) else { return };
        if self.mode & mode::CODE64 == 0 || !fused::can_fuse(condition) {
            return;
        }
        let (k0, k1) = (i.op0_kind(), i.op1_kind());
        let memory = has_memory(&i);
        if size_of(&i, 0) == 2 || memory && address_size(&i) != 8 {
            return;
        }
        if memory && op.seg != ZERO {
            return;
        }
        let simple = op.index == ZERO;
        macro_rules! fused {
            ($s:ty, $o:ty) => {
                by_condition!(@ condition, C => match size_of(&i, 0) {
                    1 => fused::fused::<u8, $s, $o, C> as Handler,
                    4 => fused::fused::<u32, $s, $o, C>,
                    _ => fused::fused::<u64, $s, $o, C>,
                }; 2 3 4 5 6 7 8 9 12 13 14 15)
            };
        }
        op.handler.set(match (i.mnemonic(), k0 == OpKind::Memory, k1 == OpKind::Memory, is_immediate(k1)) {
            (M::Cmp, false, false, false) => fused!(fused::RegReg, fused::Cmp),
            (M::Cmp, false, false, true) => fused!(fused::RegImm, fused::Cmp),
            (M::Cmp, true, _, true) if simple => fused!(fused::MemImm<Base>, fused::Cmp),
            (M::Cmp, true, _, true) => fused!(fused::MemImm<Indexed>, fused::Cmp),
            (M::Cmp, true, _, false) => fused!(fused::MemReg<Indexed>, fused::Cmp),
            (M::Cmp, false, true, _) => fused!(fused::RegMem<Indexed>, fused::Cmp),
            (M::Test, false, false, false) => fused!(fused::RegReg, fused::Test),
            (M::Test, false, false, true) => fused!(fused::RegImm, fused::Test),
            (M::Test, true, _, true) => fused!(fused::MemImm<Indexed>, fused::Test),
            _ => return,
        });
    }

    /// Sets where a near branch leads: relative to the page (`near`), or to the next instruction.
    fn target(&self, i: &Instruction, op: &mut Op) -> (bool, u64) {
        let (target, size) = match i.op0_kind() {
            OpKind::NearBranch16 => (i.near_branch16() as i16 as i64, 2),
            OpKind::NearBranch32 => (i.near_branch32() as i32 as i64, 4),
            _ => (i.near_branch64() as i64, 8),
        };
        let near = size != 2 && (0..4096).contains(&target);
        op.disp = if near { target as i32 } else { (target - i.next_ip() as i64) as i32 };
        (near, size)
    }

    pub(super) fn jump(&mut self, i: &Instruction, op: &mut Op, long: bool) -> Handler {
        match i.op0_kind() {
            OpKind::Register => match i.op0_register().size() {
                2 => flow::jump_reg::<u16>,
                4 => flow::jump_reg::<u32>,
                _ => flow::jump_reg::<u64>,
            },
            OpKind::Memory => by_size_mem!(long, size_of(i, 0), flow::jump_mem, Fast),
            _ => match self.target(i, op) {
                (true, _) => flow::jump_near,
                (false, 8) => flow::jump_far::<u64>,
                (false, 4) => flow::jump_far::<u32>,
                (false, _) => flow::jump_far::<u16>,
            },
        }
    }

    pub(super) fn call(&mut self, i: &Instruction, op: &mut Op, long: bool) -> Handler {
        op.x |= X_STACK;
        match i.op0_kind() {
            OpKind::Register => match i.op0_register().size() {
                2 => flow::call_reg::<u16>,
                4 => flow::call_reg::<u32>,
                _ => flow::call64_reg::<Fast>,
            },
            OpKind::Memory => by_size_mem!(long, size_of(i, 0), flow::call_mem),
            _ => match self.target(i, op) {
                (true, 8) => flow::call64_near::<Fast>,
                (false, 8) => flow::call64_far::<Fast>,
                (true, _) => flow::call_near::<u32>,
                (false, 4) => flow::call_far::<u32>,
                (false, _) => flow::call_far::<u16>,
            },
        }
    }

    pub(super) fn jcc(&mut self, i: &Instruction, op: &mut Op) -> Handler {
        let target = self.target(i, op);
        by_condition!(i.condition_code() as u8 - 1, C => match target {
            (true, _) => flow::jcc_near::<C> as Handler,
            (false, 8) => flow::jcc_far::<u64, C>,
            (false, 4) => flow::jcc_far::<u32, C>,
            (false, _) => flow::jcc_far::<u16, C>,
        })
    }

    pub(super) fn count_jump(&mut self, i: &Instruction, op: &mut Op) -> Handler {
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
}

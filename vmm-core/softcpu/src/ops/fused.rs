//! CMP and TEST together with the conditional jump that follows them.
//!
//! The jump keeps its own operation behind the fused one: it holds the link, and it is executed on its own
//! until it has one.

use std::marker::PhantomData;

use super::alu::{self, Binary};
use super::ea::Ea;
use super::width::Width;
use crate::block::op::{OpPtr, apart, enter, enter_apart, go};
use crate::cpu::Cpu;
use crate::cpu::flags::Kind;
use crate::mmu::{General, host};

/// Where the two operands come from.
pub(crate) trait Operands: 'static {
    /// The operands, if the TLB knows where they are.
    fn get<T: Width>(cpu: &mut Cpu, op: OpPtr) -> Option<(u64, u64)>;
    /// Executes the comparison alone; the jump follows.
    fn alone<T: Width, O: Binary>(cpu: &mut Cpu, op: OpPtr) -> OpPtr;
}

pub(crate) struct RegReg;
pub(crate) struct RegImm;
pub(crate) struct RegMem<E>(PhantomData<E>);
pub(crate) struct MemReg<E>(PhantomData<E>);
pub(crate) struct MemImm<E>(PhantomData<E>);

#[inline(always)]
fn load<T: Width, E: Ea>(cpu: &mut Cpu, op: OpPtr) -> Option<u64> {
    let address = E::linear::<T>(cpu, op, false).ok()?;
    // SAFETY: the TLB holds translations of mapped regions only.
    cpu.read_host::<T>(address).map(|at| unsafe { host::load(at, T::BYTES) })
}

impl Operands for RegReg {
    #[inline(always)]
    fn get<T: Width>(cpu: &mut Cpu, op: OpPtr) -> Option<(u64, u64)> {
        Some((T::get(cpu, op.r1), T::get(cpu, op.r2)))
    }
    #[inline(always)]
    fn alone<T: Width, O: Binary>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
        alu::test_reg_reg::<T, O>(cpu, op)
    }
}

impl Operands for RegImm {
    #[inline(always)]
    fn get<T: Width>(cpu: &mut Cpu, op: OpPtr) -> Option<(u64, u64)> {
        Some((T::get(cpu, op.r1), T::zx(op.imm.get())))
    }
    #[inline(always)]
    fn alone<T: Width, O: Binary>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
        alu::test_reg_imm::<T, O>(cpu, op)
    }
}

impl<E: Ea> Operands for RegMem<E> {
    #[inline(always)]
    fn get<T: Width>(cpu: &mut Cpu, op: OpPtr) -> Option<(u64, u64)> {
        let b = load::<T, E>(cpu, op)?;
        Some((T::get(cpu, op.r1), b))
    }
    #[inline(always)]
    fn alone<T: Width, O: Binary>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
        alu::test_reg_mem::<T, E, O, General>(cpu, op)
    }
}

impl<E: Ea> Operands for MemReg<E> {
    #[inline(always)]
    fn get<T: Width>(cpu: &mut Cpu, op: OpPtr) -> Option<(u64, u64)> {
        let a = load::<T, E>(cpu, op)?;
        Some((a, T::get(cpu, op.r2)))
    }
    #[inline(always)]
    fn alone<T: Width, O: Binary>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
        alu::test_mem_reg::<T, E, O, General>(cpu, op)
    }
}

impl<E: Ea> Operands for MemImm<E> {
    #[inline(always)]
    fn get<T: Width>(cpu: &mut Cpu, op: OpPtr) -> Option<(u64, u64)> {
        let a = load::<T, E>(cpu, op)?;
        Some((a, T::zx(op.imm.get())))
    }
    #[inline(always)]
    fn alone<T: Width, O: Binary>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
        alu::test_mem_imm::<T, E, O, General>(cpu, op)
    }
}

/// The comparison: sets the flags and evaluates a condition.
pub(crate) trait Comparison: 'static {
    /// What sets the flags.
    type Operation: Binary;
    fn run<T: Width, const C: u8>(cpu: &mut Cpu, a: u64, b: u64) -> bool;
}

pub(crate) struct Cmp;
pub(crate) struct Test;

/// Conditions that [`fused`] is made for: all but those on OF and PF.
pub(crate) fn can_fuse(condition: u8) -> bool {
    !matches!(condition >> 1, 0 | 5)
}

impl Comparison for Cmp {
    type Operation = alu::Sub;
    #[inline(always)]
    fn run<T: Width, const C: u8>(cpu: &mut Cpu, a: u64, b: u64) -> bool {
        let result = a.wrapping_sub(b);
        cpu.set_lazy::<T>(Kind::Sub, result, b);
        let value = match C >> 1 {
            1 => a < b,
            2 => a == b,
            3 => a <= b,
            4 => T::msb(result),
            6 => T::sx(a) < T::sx(b),
            _ => T::sx(a) <= T::sx(b),
        };
        value ^ (C & 1 != 0)
    }
}

impl Comparison for Test {
    type Operation = alu::And;
    #[inline(always)]
    fn run<T: Width, const C: u8>(cpu: &mut Cpu, a: u64, b: u64) -> bool {
        let result = a & b;
        cpu.set_lazy::<T>(Kind::Logic, result, 0);
        let value = match C >> 1 {
            1 => false,
            2 | 3 => result == 0,
            4 | 6 => T::msb(result),
            _ => T::sx(result) <= 0,
        };
        value ^ (C & 1 != 0)
    }
}

/// Compares, then jumps or goes on; both ways are within the page. A way that is not linked yet is left to the jump's
/// own operation.
pub(crate) fn fused<T: Width, S: Operands, O: Comparison, const C: u8>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let Some((a, b)) = S::get::<T>(cpu, op) else { return apart(S::alone::<T, O::Operation>)(cpu, op) };
    let jump = op.following();
    if O::run::<T, C>(cpu, a, b) {
        let link = jump.imm.get();
        if link == 0 {
            go!(cpu, jump);
        }
        enter!(cpu, OpPtr::from_link(link))
    }
    let link = jump.following().imm.get();
    if link == 0 {
        go!(cpu, jump);
    }
    enter_apart!(cpu, OpPtr::from_link(link))
}

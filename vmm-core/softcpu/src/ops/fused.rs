//! CMP and TEST together with the conditional jump that follows them.
//!
//! The jump keeps its own operation behind the fused one: it holds the link, and it is executed on its own
//! until it has one.

use std::marker::PhantomData;

use super::ea::Ea;
use super::width::Width;
use crate::block::op::{OpPtr, check, enter, go};
use crate::cpu::flags::Kind;
use crate::cpu::{Cpu, Fault};

/// Where the two operands come from.
pub(crate) trait Operands: 'static {
    fn get<T: Width>(cpu: &mut Cpu, op: OpPtr) -> Result<(u64, u64), Fault>;
}

pub(crate) struct RegReg;
pub(crate) struct RegImm;
pub(crate) struct RegMem<E>(PhantomData<E>);
pub(crate) struct MemReg<E>(PhantomData<E>);
pub(crate) struct MemImm<E>(PhantomData<E>);

impl Operands for RegReg {
    #[inline(always)]
    fn get<T: Width>(cpu: &mut Cpu, op: OpPtr) -> Result<(u64, u64), Fault> {
        Ok((T::get(cpu, op.r1), T::get(cpu, op.r2)))
    }
}

impl Operands for RegImm {
    #[inline(always)]
    fn get<T: Width>(cpu: &mut Cpu, op: OpPtr) -> Result<(u64, u64), Fault> {
        Ok((T::get(cpu, op.r1), T::zx(op.imm.get())))
    }
}

impl<E: Ea> Operands for RegMem<E> {
    #[inline(always)]
    fn get<T: Width>(cpu: &mut Cpu, op: OpPtr) -> Result<(u64, u64), Fault> {
        let address = E::linear::<T>(cpu, op, false)?;
        let b = cpu.ld::<T>(address)?;
        Ok((T::get(cpu, op.r1), b))
    }
}

impl<E: Ea> Operands for MemReg<E> {
    #[inline(always)]
    fn get<T: Width>(cpu: &mut Cpu, op: OpPtr) -> Result<(u64, u64), Fault> {
        let address = E::linear::<T>(cpu, op, false)?;
        let a = cpu.ld::<T>(address)?;
        Ok((a, T::get(cpu, op.r2)))
    }
}

impl<E: Ea> Operands for MemImm<E> {
    #[inline(always)]
    fn get<T: Width>(cpu: &mut Cpu, op: OpPtr) -> Result<(u64, u64), Fault> {
        let address = E::linear::<T>(cpu, op, false)?;
        let a = cpu.ld::<T>(address)?;
        Ok((a, T::zx(op.imm.get())))
    }
}

/// The comparison: sets the flags and evaluates a condition.
pub(crate) trait Comparison: 'static {
    fn run<T: Width, const C: u8>(cpu: &mut Cpu, a: u64, b: u64) -> bool;
}

pub(crate) struct Cmp;
pub(crate) struct Test;

/// Conditions that [`fused`] is made for: all but those on OF and PF.
pub(crate) fn can_fuse(condition: u8) -> bool {
    !matches!(condition >> 1, 0 | 5)
}

impl Comparison for Cmp {
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

/// Goes one way of the jump, or executes it on its own if it is not linked.
macro_rules! take {
    ($cpu:expr, $jump:expr, $way:expr) => {{
        let way = $way;
        let link = way.imm.get();
        if link == 0 {
            go!($cpu, $jump);
        }
        let rip = &mut $cpu.regs[usize::from(crate::block::op::RIP)];
        *rip = rip.wrapping_add(way.disp as i64 as u64) & $cpu.rip_mask;
        enter!($cpu, OpPtr::from_link(link))
    }};
}

/// Compares, then jumps or goes on; both ways are within the page.
pub(crate) fn fused<T: Width, S: Operands, O: Comparison, const C: u8>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let (a, b) = check!(cpu, op, S::get::<T>(cpu, op));
    let jump = op.following();
    if O::run::<T, C>(cpu, a, b) {
        take!(cpu, jump, jump)
    }
    // Without this the compiler would select the way first, and jump at one place for both.
    std::hint::black_box(());
    take!(cpu, jump, jump.following())
}

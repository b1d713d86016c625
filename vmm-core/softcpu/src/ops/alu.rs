//! Addition, subtraction and logic.

use std::marker::PhantomData;

use super::ea::Ea;
use super::rmw::Modify;
use super::width::Width;
use crate::block::op::{OpPtr, check, next};
use crate::cpu::Cpu;
use crate::cpu::flags::{AF, CF, Kind, OF};
use crate::mmu::{General, Reach, reach};

/// A binary operation that sets the status flags.
pub(crate) trait Binary: 'static {
    fn run<T: Width>(cpu: &mut Cpu, a: u64, b: u64) -> u64;
}

/// One whose result does not depend on the flags.
pub(crate) trait Pure: 'static {
    fn value(a: u64, b: u64) -> u64;
}

/// The same operation when nobody sees the flags that it would set.
pub(crate) struct Quiet<O>(PhantomData<O>);

impl<O: Pure> Binary for Quiet<O> {
    #[inline(always)]
    fn run<T: Width>(_cpu: &mut Cpu, a: u64, b: u64) -> u64 {
        O::value(a, b)
    }
}

pub(crate) struct Add;
pub(crate) struct Sub;
pub(crate) struct And;
pub(crate) struct Or;
pub(crate) struct Xor;
pub(crate) struct Adc;
pub(crate) struct Sbb;

impl Pure for Add {
    #[inline(always)]
    fn value(a: u64, b: u64) -> u64 {
        a.wrapping_add(b)
    }
}

impl Pure for Sub {
    #[inline(always)]
    fn value(a: u64, b: u64) -> u64 {
        a.wrapping_sub(b)
    }
}

impl Binary for Add {
    #[inline(always)]
    fn run<T: Width>(cpu: &mut Cpu, a: u64, b: u64) -> u64 {
        let r = a.wrapping_add(b);
        cpu.set_lazy::<T>(Kind::Add, r, b);
        r
    }
}

impl Binary for Sub {
    #[inline(always)]
    fn run<T: Width>(cpu: &mut Cpu, a: u64, b: u64) -> u64 {
        let r = a.wrapping_sub(b);
        cpu.set_lazy::<T>(Kind::Sub, r, b);
        r
    }
}

macro_rules! logic {
    ($name:ident, $op:tt) => {
        impl Pure for $name {
            #[inline(always)]
            fn value(a: u64, b: u64) -> u64 {
                a $op b
            }
        }

        impl Binary for $name {
            #[inline(always)]
            fn run<T: Width>(cpu: &mut Cpu, a: u64, b: u64) -> u64 {
                let r = a $op b;
                cpu.set_lazy::<T>(Kind::Logic, r, 0);
                r
            }
        }
    };
}
logic!(And, &);
logic!(Or, |);
logic!(Xor, ^);

/// CF, AF and OF from the carries out of each bit.
#[inline(always)]
fn carries<T: Width>(cpu: &mut Cpu, result: u64, carry: u64) {
    let top = carry >> (T::BITS - 1) & 1;
    let overflow = ((carry >> (T::BITS - 1)) ^ (carry >> (T::BITS - 2))) & 1;
    let partial = (top * CF) | ((carry >> 3 & 1) * AF) | (overflow * OF);
    cpu.set_lazy::<T>(Kind::Partial, result, partial);
}

impl Binary for Adc {
    #[inline(always)]
    fn run<T: Width>(cpu: &mut Cpu, a: u64, b: u64) -> u64 {
        let r = a.wrapping_add(b).wrapping_add(u64::from(cpu.lazy.cf()));
        carries::<T>(cpu, r, a & b | (a | b) & !r);
        r
    }
}

impl Binary for Sbb {
    #[inline(always)]
    fn run<T: Width>(cpu: &mut Cpu, a: u64, b: u64) -> u64 {
        let r = a.wrapping_sub(b).wrapping_sub(u64::from(cpu.lazy.cf()));
        carries::<T>(cpu, r, !a & b | (!a | b) & r);
        r
    }
}

/// `operand = operand O register`.
pub(crate) struct WithReg<O>(PhantomData<O>);
/// `operand = operand O immediate`.
pub(crate) struct WithImm<O>(PhantomData<O>);

impl<O: Binary> Modify for WithReg<O> {
    #[inline(always)]
    fn apply<T: Width>(cpu: &mut Cpu, op: OpPtr, old: u64) -> u64 {
        let b = T::get(cpu, op.r2);
        O::run::<T>(cpu, old, b)
    }
}

impl<O: Binary> Modify for WithImm<O> {
    #[inline(always)]
    fn apply<T: Width>(cpu: &mut Cpu, op: OpPtr, old: u64) -> u64 {
        O::run::<T>(cpu, old, T::zx(op.imm.get()))
    }
}

/// `register = register O memory`.
pub(crate) fn reg_mem<T: Width, E: Ea, O: Binary, R: Reach>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, false));
    let b = reach!(R, cpu, op, R::ld::<T>(cpu, address), reg_mem::<T, E, O, General>);
    let a = T::get(cpu, op.r1);
    let r = O::run::<T>(cpu, a, b);
    T::set(cpu, op.r1, r);
    next!(cpu, op)
}

/// CMP and TEST of two registers.
pub(crate) fn test_reg_reg<T: Width, O: Binary>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let (a, b) = (T::get(cpu, op.r1), T::get(cpu, op.r2));
    O::run::<T>(cpu, a, b);
    next!(cpu, op)
}

/// CMP and TEST of a register with an immediate.
pub(crate) fn test_reg_imm<T: Width, O: Binary>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let a = T::get(cpu, op.r1);
    O::run::<T>(cpu, a, T::zx(op.imm.get()));
    next!(cpu, op)
}

/// CMP of a register with memory.
pub(crate) fn test_reg_mem<T: Width, E: Ea, O: Binary, R: Reach>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, false));
    let b = reach!(R, cpu, op, R::ld::<T>(cpu, address), test_reg_mem::<T, E, O, General>);
    let a = T::get(cpu, op.r1);
    O::run::<T>(cpu, a, b);
    next!(cpu, op)
}

/// CMP and TEST of memory with a register.
pub(crate) fn test_mem_reg<T: Width, E: Ea, O: Binary, R: Reach>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, false));
    let a = reach!(R, cpu, op, R::ld::<T>(cpu, address), test_mem_reg::<T, E, O, General>);
    let b = T::get(cpu, op.r2);
    O::run::<T>(cpu, a, b);
    next!(cpu, op)
}

/// CMP and TEST of memory with an immediate.
pub(crate) fn test_mem_imm<T: Width, E: Ea, O: Binary, R: Reach>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, false));
    let a = reach!(R, cpu, op, R::ld::<T>(cpu, address), test_mem_imm::<T, E, O, General>);
    O::run::<T>(cpu, a, T::zx(op.imm.get()));
    next!(cpu, op)
}

pub(crate) struct Inc;
pub(crate) struct Dec;
pub(crate) struct Neg;
pub(crate) struct Not;
/// XADD: the register gets the old value.
pub(crate) struct Xadd;
/// XCHG with memory.
pub(crate) struct Xchg;

impl Modify for Inc {
    #[inline(always)]
    fn apply<T: Width>(cpu: &mut Cpu, _op: OpPtr, old: u64) -> u64 {
        let (r, cf) = (old.wrapping_add(1), u64::from(cpu.lazy.cf()));
        cpu.set_lazy::<T>(Kind::Inc, r, cf);
        r
    }
}

impl Modify for Dec {
    #[inline(always)]
    fn apply<T: Width>(cpu: &mut Cpu, _op: OpPtr, old: u64) -> u64 {
        let (r, cf) = (old.wrapping_sub(1), u64::from(cpu.lazy.cf()));
        cpu.set_lazy::<T>(Kind::Dec, r, cf);
        r
    }
}

impl Modify for Neg {
    #[inline(always)]
    fn apply<T: Width>(cpu: &mut Cpu, _op: OpPtr, old: u64) -> u64 {
        Sub::run::<T>(cpu, 0, old)
    }
}

impl Modify for Not {
    #[inline(always)]
    fn apply<T: Width>(_cpu: &mut Cpu, _op: OpPtr, old: u64) -> u64 {
        !old
    }
}

impl Modify for Xadd {
    #[inline(always)]
    fn apply<T: Width>(cpu: &mut Cpu, op: OpPtr, old: u64) -> u64 {
        let b = T::get(cpu, op.r2);
        T::set(cpu, op.r2, old);
        Add::run::<T>(cpu, old, b)
    }
}

impl Modify for Xchg {
    #[inline(always)]
    fn apply<T: Width>(cpu: &mut Cpu, op: OpPtr, old: u64) -> u64 {
        let b = T::get(cpu, op.r2);
        T::set(cpu, op.r2, old);
        b
    }
}

//! Multiplication and division.

use super::ea::Ea;
use super::width::Width;
use crate::block::op::{OpPtr, check, fault, next};
use crate::cpu::flags::{CF, Kind, OF};
use crate::cpu::{Cpu, Fault, vector};

/// CF and OF say whether the upper half matters.
#[inline(always)]
fn flags<T: Width>(cpu: &mut Cpu, low: u64, overflow: bool) {
    cpu.set_lazy::<T>(Kind::Partial, low, if overflow { CF | OF } else { 0 });
}

/// An instruction on the accumulator pair (AX, or DX:AX and wider) and one source.
pub(crate) trait Pair: 'static {
    fn run<T: Width>(cpu: &mut Cpu, source: u64) -> Result<(), Fault>;
}

fn set_pair<T: Width>(cpu: &mut Cpu, low: u64, high: u64) {
    if T::BITS == 8 {
        u16::set(cpu, 0, low & 0xff | (high & 0xff) << 8);
    } else {
        T::set(cpu, 0, low);
        T::set(cpu, 2, high);
    }
}

#[inline(always)]
fn pair<T: Width>(cpu: &Cpu) -> u128 {
    if T::BITS == 8 {
        u128::from(u16::get(cpu, 0))
    } else {
        u128::from(T::get(cpu, 2)) << T::BITS | u128::from(T::get(cpu, 0))
    }
}

pub(crate) struct Mul;
pub(crate) struct Imul;
pub(crate) struct Div;
pub(crate) struct Idiv;

impl Pair for Mul {
    #[inline(always)]
    fn run<T: Width>(cpu: &mut Cpu, source: u64) -> Result<(), Fault> {
        let product = u128::from(T::get(cpu, 0)) * u128::from(source);
        let (low, high) = (T::zx(product as u64), (product >> T::BITS) as u64);
        set_pair::<T>(cpu, low, high);
        flags::<T>(cpu, low, high != 0);
        Ok(())
    }
}

impl Pair for Imul {
    #[inline(always)]
    fn run<T: Width>(cpu: &mut Cpu, source: u64) -> Result<(), Fault> {
        let product = i128::from(T::sx(T::get(cpu, 0))) * i128::from(T::sx(source));
        let low = product as u64;
        set_pair::<T>(cpu, low, (product >> T::BITS) as u64);
        flags::<T>(cpu, low, i128::from(T::sx(low)) != product);
        Ok(())
    }
}

impl Pair for Div {
    #[inline(always)]
    fn run<T: Width>(cpu: &mut Cpu, source: u64) -> Result<(), Fault> {
        let dividend = pair::<T>(cpu);
        if source == 0 || dividend >> T::BITS >= u128::from(source) {
            return Err(cpu.raise(vector::DE, None));
        }
        // The quotient fits; a 64-bit division is much faster than a 128-bit one.
        let (quotient, remainder) = if dividend >> 64 == 0 {
            (dividend as u64 / source, dividend as u64 % source)
        } else {
            let source = u128::from(source);
            ((dividend / source) as u64, (dividend % source) as u64)
        };
        set_pair::<T>(cpu, quotient, remainder);
        Ok(())
    }
}

impl Pair for Idiv {
    #[inline(always)]
    fn run<T: Width>(cpu: &mut Cpu, source: u64) -> Result<(), Fault> {
        let shift = 128 - if T::BITS == 8 { 16 } else { 2 * T::BITS };
        let dividend = (pair::<T>(cpu) << shift) as i128 >> shift;
        let divisor = i128::from(T::sx(source));
        let quotient = if divisor == 0 { None } else { dividend.checked_div(divisor) };
        match quotient {
            Some(q) if i128::from(T::sx(q as u64)) == q => {
                let remainder = dividend % divisor;
                set_pair::<T>(cpu, q as u64, remainder as u64);
                Ok(())
            }
            _ => Err(cpu.raise(vector::DE, None)),
        }
    }
}

pub(crate) fn pair_reg<T: Width, P: Pair>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let source = T::get(cpu, op.r1);
    match P::run::<T>(cpu, source) {
        Ok(()) => next!(cpu, op),
        Err(Fault) => fault(cpu, op),
    }
}

pub(crate) fn pair_mem<T: Width, E: Ea, P: Pair>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, false));
    let source = check!(cpu, op, cpu.ld::<T>(address));
    match P::run::<T>(cpu, source) {
        Ok(()) => next!(cpu, op),
        Err(Fault) => fault(cpu, op),
    }
}

#[inline(always)]
fn truncated<T: Width>(cpu: &mut Cpu, a: u64, b: u64) -> u64 {
    if T::BITS == 64 {
        let (r, overflow) = (a as i64).overflowing_mul(b as i64);
        flags::<T>(cpu, r as u64, overflow);
        return r as u64;
    }
    let product = T::sx(a) * T::sx(b);
    flags::<T>(cpu, product as u64, T::sx(product as u64) != product);
    product as u64
}

/// IMUL of two registers.
pub(crate) fn imul_reg<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let (a, b) = (T::get(cpu, op.r1), T::get(cpu, op.r2));
    let r = truncated::<T>(cpu, a, b);
    T::set(cpu, op.r1, r);
    next!(cpu, op)
}

/// IMUL of a register with memory.
pub(crate) fn imul_mem<T: Width, E: Ea>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, false));
    let b = check!(cpu, op, cpu.ld::<T>(address));
    let a = T::get(cpu, op.r1);
    let r = truncated::<T>(cpu, a, b);
    T::set(cpu, op.r1, r);
    next!(cpu, op)
}

/// IMUL of a register with an immediate into another.
pub(crate) fn imul_reg_imm<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let b = T::get(cpu, op.r2);
    let r = truncated::<T>(cpu, op.imm.get(), b);
    T::set(cpu, op.r1, r);
    next!(cpu, op)
}

/// IMUL of memory with an immediate.
pub(crate) fn imul_mem_imm<T: Width, E: Ea>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, false));
    let b = check!(cpu, op, cpu.ld::<T>(address));
    let r = truncated::<T>(cpu, op.imm.get(), b);
    T::set(cpu, op.r1, r);
    next!(cpu, op)
}

//! Shifts and rotations.

use std::marker::PhantomData;

use super::alu::Quiet;
use super::rmw::Modify;
use super::width::Width;
use crate::block::op::OpPtr;
use crate::cpu::Cpu;
use crate::cpu::flags::{CF, Kind, OF};

/// A shift by a count that is already masked to 5 or 6 bits and not zero.
pub(crate) trait Shift: 'static {
    fn run<T: Width>(cpu: &mut Cpu, value: u64, count: u32) -> u64;
}

impl Shift for Quiet<Shl> {
    #[inline(always)]
    fn run<T: Width>(_cpu: &mut Cpu, value: u64, count: u32) -> u64 {
        value << count
    }
}

impl Shift for Quiet<Shr> {
    #[inline(always)]
    fn run<T: Width>(_cpu: &mut Cpu, value: u64, count: u32) -> u64 {
        value >> count
    }
}

impl Shift for Quiet<Sar> {
    #[inline(always)]
    fn run<T: Width>(_cpu: &mut Cpu, value: u64, count: u32) -> u64 {
        (T::sx(value) >> count) as u64
    }
}

/// The count is the immediate.
pub(crate) struct ByImm<S>(PhantomData<S>);
/// The count is CL.
pub(crate) struct ByCl<S>(PhantomData<S>);

#[inline(always)]
fn apply<T: Width, S: Shift>(cpu: &mut Cpu, old: u64, count: u64) -> u64 {
    let count = count as u32 & if T::BITS == 64 { 63 } else { 31 };
    if count == 0 { old } else { S::run::<T>(cpu, old, count) }
}

impl<S: Shift> Modify for ByImm<S> {
    #[inline(always)]
    fn apply<T: Width>(cpu: &mut Cpu, op: OpPtr, old: u64) -> u64 {
        apply::<T, S>(cpu, old, op.imm.get())
    }
}

impl<S: Shift> Modify for ByCl<S> {
    #[inline(always)]
    fn apply<T: Width>(cpu: &mut Cpu, _op: OpPtr, old: u64) -> u64 {
        let count = cpu.regs[1];
        apply::<T, S>(cpu, old, count)
    }
}

/// Sets PF, ZF and SF from the result, CF and OF as given, and clears AF.
#[inline(always)]
fn flags<T: Width>(cpu: &mut Cpu, result: u64, carry: bool, overflow: bool) {
    let partial = if carry { CF } else { 0 } | if overflow { OF } else { 0 };
    cpu.set_lazy::<T>(Kind::Partial, result, partial);
}

/// Sets CF and OF and keeps the other flags.
#[inline(always)]
fn rotate_flags(cpu: &mut Cpu, carry: bool, overflow: bool) {
    let others = cpu.status_flags() & !(CF | OF);
    let new = if carry { CF } else { 0 } | if overflow { OF } else { 0 };
    cpu.set_status_flags(others | new);
}

pub(crate) struct Shl;
pub(crate) struct Shr;
pub(crate) struct Sar;
pub(crate) struct Rol;
pub(crate) struct Ror;
pub(crate) struct Rcl;
pub(crate) struct Rcr;

impl Shift for Shl {
    #[inline(always)]
    fn run<T: Width>(cpu: &mut Cpu, value: u64, count: u32) -> u64 {
        let carry = count <= T::BITS && value >> (T::BITS.wrapping_sub(count) & 63) & 1 != 0;
        let result = value << count;
        flags::<T>(cpu, result, carry, T::msb(result) ^ carry);
        result
    }
}

impl Shift for Shr {
    #[inline(always)]
    fn run<T: Width>(cpu: &mut Cpu, value: u64, count: u32) -> u64 {
        let before = value >> (count - 1);
        flags::<T>(cpu, before >> 1, before & 1 != 0, T::msb(before));
        before >> 1
    }
}

impl Shift for Sar {
    #[inline(always)]
    fn run<T: Width>(cpu: &mut Cpu, value: u64, count: u32) -> u64 {
        let before = T::sx(value) >> (count - 1);
        flags::<T>(cpu, (before >> 1) as u64, before & 1 != 0, false);
        (before >> 1) as u64
    }
}

impl Shift for Rol {
    #[inline(always)]
    fn run<T: Width>(cpu: &mut Cpu, value: u64, count: u32) -> u64 {
        let n = count % T::BITS;
        let result = if n == 0 { value } else { value << n | value >> (T::BITS - n) };
        let carry = result & 1 != 0;
        rotate_flags(cpu, carry, T::msb(result) ^ carry);
        result
    }
}

impl Shift for Ror {
    #[inline(always)]
    fn run<T: Width>(cpu: &mut Cpu, value: u64, count: u32) -> u64 {
        let n = count % T::BITS;
        let result = if n == 0 { value } else { value >> n | value << (T::BITS - n) };
        let carry = T::msb(result);
        rotate_flags(cpu, carry, carry ^ (result >> (T::BITS - 2) & 1 != 0));
        result
    }
}

impl Shift for Rcl {
    #[inline]
    fn run<T: Width>(cpu: &mut Cpu, value: u64, count: u32) -> u64 {
        let n = count % (T::BITS + 1);
        if n == 0 {
            return value;
        }
        let wide = u128::from(cpu.lazy.cf()) << T::BITS | u128::from(value);
        let turned = wide << n | wide >> (T::BITS + 1 - n);
        let (result, carry) = (turned as u64, turned >> T::BITS & 1 != 0);
        rotate_flags(cpu, carry, T::msb(result) ^ carry);
        result
    }
}

impl Shift for Rcr {
    #[inline]
    fn run<T: Width>(cpu: &mut Cpu, value: u64, count: u32) -> u64 {
        let n = count % (T::BITS + 1);
        if n == 0 {
            return value;
        }
        let wide = u128::from(cpu.lazy.cf()) << T::BITS | u128::from(value);
        let turned = wide >> n | wide << (T::BITS + 1 - n);
        let (result, carry) = (turned as u64, turned >> T::BITS & 1 != 0);
        rotate_flags(cpu, carry, T::msb(result) ^ (result >> (T::BITS - 2) & 1 != 0));
        result
    }
}

/// SHLD and SHRD; the register is `op.r2`.
pub(crate) struct DoubleLeft<const CL: bool>;
pub(crate) struct DoubleRight<const CL: bool>;

#[inline]
fn double_count<T: Width, const CL: bool>(cpu: &Cpu, op: OpPtr) -> u32 {
    let count = if CL { cpu.regs[1] } else { op.imm.get() };
    count as u32 & if T::BITS == 64 { 63 } else { 31 }
}

impl<const CL: bool> Modify for DoubleLeft<CL> {
    fn apply<T: Width>(cpu: &mut Cpu, op: OpPtr, old: u64) -> u64 {
        let count = double_count::<T, CL>(cpu, op);
        if count == 0 {
            return old;
        }
        let low = T::get(cpu, op.r2);
        // 16-bit operands with counts above 16 rotate in the destination again, as processors do.
        let mut wide = u128::from(old) << T::BITS | u128::from(low);
        if T::BITS == 16 {
            wide = wide << 16 | u128::from(old);
            wide <<= count;
            let result = (wide >> 32) as u64;
            let carry = wide >> 48 & 1 != 0;
            flags::<T>(cpu, result, carry, T::msb(result ^ old));
            return result;
        }
        let result = (wide << count >> T::BITS) as u64;
        let carry = old >> (T::BITS - count) & 1 != 0;
        flags::<T>(cpu, result, carry, T::msb(result ^ old));
        result
    }
}

impl<const CL: bool> Modify for DoubleRight<CL> {
    fn apply<T: Width>(cpu: &mut Cpu, op: OpPtr, old: u64) -> u64 {
        let count = double_count::<T, CL>(cpu, op);
        if count == 0 {
            return old;
        }
        let high = T::get(cpu, op.r2);
        let mut wide = u128::from(high) << T::BITS | u128::from(old);
        if T::BITS == 16 {
            wide |= u128::from(old) << 32;
        }
        let before = wide >> (count - 1);
        let result = (before >> 1) as u64;
        flags::<T>(cpu, result, before & 1 != 0, T::msb(result ^ old));
        result
    }
}

//! Bit tests, bit scans and the like.

use super::ea::Ea;
use super::rmw::Modify;
use super::width::Width;
use crate::block::op::{OpPtr, check, next};
use crate::cpu::Cpu;
use crate::cpu::flags::{CF, ZF};

/// What BT, BTS, BTR and BTC do to the bit.
pub(crate) trait BitOp: 'static {
    fn change(value: u64, bit: u64) -> u64;
}

pub(crate) struct Test;
pub(crate) struct Set;
pub(crate) struct Reset;
pub(crate) struct Complement;

impl BitOp for Test {
    #[inline(always)]
    fn change(value: u64, _bit: u64) -> u64 {
        value
    }
}
impl BitOp for Set {
    #[inline(always)]
    fn change(value: u64, bit: u64) -> u64 {
        value | bit
    }
}
impl BitOp for Reset {
    #[inline(always)]
    fn change(value: u64, bit: u64) -> u64 {
        value & !bit
    }
}
impl BitOp for Complement {
    #[inline(always)]
    fn change(value: u64, bit: u64) -> u64 {
        value ^ bit
    }
}

/// The bit number is `op.r2` (`REG`) or the immediate, modulo the operand size.
pub(crate) struct Bit<B, const REG: bool>(std::marker::PhantomData<B>);

impl<B: BitOp, const REG: bool> Modify for Bit<B, REG> {
    #[inline(always)]
    fn apply<T: Width>(cpu: &mut Cpu, op: OpPtr, old: u64) -> u64 {
        let number = if REG { cpu.regs[usize::from(op.r2)] } else { op.imm.get() };
        let number = number & u64::from(T::BITS - 1);
        cpu.set_one_flag(CF, old >> number & 1 != 0);
        B::change(old, 1 << number)
    }
}

/// BT of a register, which stays as it is.
pub(crate) fn test_reg<T: Width, B: Modify>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let value = T::get(cpu, op.r1);
    B::apply::<T>(cpu, op, value);
    next!(cpu, op)
}

/// The element of a bit string in memory that the register `op.r2` selects.
#[inline(always)]
fn element<T: Width>(cpu: &Cpu, op: OpPtr) -> u64 {
    let number = T::sx(T::get(cpu, op.r2));
    ((number >> T::BITS.trailing_zeros()) * (T::BYTES as i64)) as u64
}

/// BT of a bit string in memory.
pub(crate) fn test_string<T: Width, E: Ea>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, string_address::<T, E>(cpu, op, false));
    let value = check!(cpu, op, cpu.ld::<T>(address));
    Bit::<Test, true>::apply::<T>(cpu, op, value);
    next!(cpu, op)
}

/// BT of a memory operand with an immediate.
pub(crate) fn test_mem_imm<T: Width, E: Ea>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, false));
    let value = check!(cpu, op, cpu.ld::<T>(address));
    Bit::<Test, false>::apply::<T>(cpu, op, value);
    next!(cpu, op)
}

#[inline(always)]
fn string_address<T: Width, E: Ea>(cpu: &mut Cpu, op: OpPtr, write: bool) -> Result<u64, crate::cpu::Fault> {
    let offset = element::<T>(cpu, op);
    if cpu.code64 && op.x & (crate::block::op::X_ADDR16 | crate::block::op::X_ADDR32) == 0 {
        return Ok(E::linear::<T>(cpu, op, write)?.wrapping_add(offset));
    }
    let mask = if op.x & crate::block::op::X_ADDR16 != 0 { 0xffff } else { 0xffff_ffff };
    let offset = cpu.legacy_offset(op).wrapping_add(offset) & mask;
    cpu.segment_address(usize::from(op.seg), offset, T::BYTES, write)
}

/// BTS, BTR and BTC of a bit string in memory; `LOCK` makes them atomic.
pub(crate) fn change_string<T: Width, E: Ea, B: BitOp, const LOCK: bool>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, string_address::<T, E>(cpu, op, true));
    let found = check!(cpu, op, cpu.atomic_host(address, T::BYTES));
    match found {
        Some(at) => loop {
            // SAFETY: a translation of a mapped region, just made.
            let old = unsafe { crate::mmu::host::load(at, T::BYTES) };
            let new = Bit::<B, true>::apply::<T>(cpu, op, old);
            if !LOCK {
                // SAFETY: as above.
                unsafe { crate::mmu::host::store(at, T::BYTES, new) };
                break;
            }
            // SAFETY: as above.
            if unsafe { crate::mmu::host::compare_exchange(at, T::BYTES, old, T::zx(new)) }.is_ok() {
                break;
            }
        },
        None if LOCK => {
            let changed = cpu.alone(|cpu| change_slow::<T, B>(cpu, op, address));
            check!(cpu, op, changed);
        }
        None => check!(cpu, op, change_slow::<T, B>(cpu, op, address)),
    }
    next!(cpu, op)
}

#[cold]
fn change_slow<T: Width, B: BitOp>(cpu: &mut Cpu, op: OpPtr, address: u64) -> Result<(), crate::cpu::Fault> {
    let saved = cpu.lazy;
    let old = cpu.ld::<T>(address)?;
    let new = Bit::<B, true>::apply::<T>(cpu, op, old);
    let result = cpu.st::<T>(address, new);
    if result.is_err() {
        cpu.lazy = saved;
    }
    result
}

/// A function of one source that may leave the destination alone.
pub(crate) trait Scan: 'static {
    /// The new value of the destination, or `None` to keep it; sets the flags.
    fn run<T: Width>(cpu: &mut Cpu, value: u64) -> Option<u64>;
}

pub(crate) struct Bsf;
pub(crate) struct Bsr;
pub(crate) struct Popcnt;

impl Scan for Bsf {
    #[inline(always)]
    fn run<T: Width>(cpu: &mut Cpu, value: u64) -> Option<u64> {
        cpu.set_one_flag(ZF, value == 0);
        (value != 0).then(|| u64::from(value.trailing_zeros()))
    }
}

impl Scan for Bsr {
    #[inline(always)]
    fn run<T: Width>(cpu: &mut Cpu, value: u64) -> Option<u64> {
        cpu.set_one_flag(ZF, value == 0);
        (value != 0).then(|| u64::from(63 - value.leading_zeros()))
    }
}

impl Scan for Popcnt {
    #[inline(always)]
    fn run<T: Width>(cpu: &mut Cpu, value: u64) -> Option<u64> {
        cpu.set_status_flags(if value == 0 { ZF } else { 0 });
        Some(u64::from(value.count_ones()))
    }
}

pub(crate) fn scan_reg<T: Width, S: Scan>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let value = T::get(cpu, op.r2);
    if let Some(result) = S::run::<T>(cpu, value) {
        T::set(cpu, op.r1, result);
    }
    next!(cpu, op)
}

pub(crate) fn scan_mem<T: Width, E: Ea, S: Scan>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, false));
    let value = check!(cpu, op, cpu.ld::<T>(address));
    if let Some(result) = S::run::<T>(cpu, value) {
        T::set(cpu, op.r1, result);
    }
    next!(cpu, op)
}

/// BSWAP; with a 16-bit operand the result is zero.
pub(crate) struct Bswap;

impl Modify for Bswap {
    #[inline(always)]
    fn apply<T: Width>(_cpu: &mut Cpu, _op: OpPtr, old: u64) -> u64 {
        match T::BITS {
            64 => old.swap_bytes(),
            32 => u64::from((old as u32).swap_bytes()),
            _ => 0,
        }
    }
}

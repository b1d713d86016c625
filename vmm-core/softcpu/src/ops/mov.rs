//! Data movement.

use super::ea::Ea;
use super::width::Width;
use crate::block::op::{OpPtr, check, next};
use crate::cpu::Cpu;
use crate::cpu::flags::Kind;
use crate::mmu::{General, Reach, host, reach};

pub(crate) fn mov_reg_reg<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let value = T::get(cpu, op.r2);
    T::set(cpu, op.r1, value);
    next!(cpu, op)
}

pub(crate) fn mov_reg_imm<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    T::set(cpu, op.r1, op.imm.get());
    next!(cpu, op)
}

pub(crate) fn load<T: Width, E: Ea, R: Reach>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, false));
    let value = reach!(R, cpu, op, R::ld::<T>(cpu, address), load::<T, E, General>);
    T::set(cpu, op.r1, value);
    next!(cpu, op)
}

pub(crate) fn store_reg<T: Width, E: Ea, R: Reach>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, true));
    let value = T::get(cpu, op.r2);
    reach!(R, cpu, op, R::st::<T>(cpu, address, value), store_reg::<T, E, General>);
    next!(cpu, op)
}

pub(crate) fn store_imm<T: Width, E: Ea, R: Reach>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, true));
    reach!(R, cpu, op, R::st::<T>(cpu, address, op.imm.get()), store_imm::<T, E, General>);
    next!(cpu, op)
}

/// MOVZX.
pub(crate) fn zero_extend_reg<D: Width, S: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let value = S::get(cpu, op.r2);
    D::set(cpu, op.r1, value);
    next!(cpu, op)
}

pub(crate) fn zero_extend_mem<D: Width, S: Width, E: Ea, R: Reach>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<S>(cpu, op, false));
    let value = reach!(R, cpu, op, R::ld::<S>(cpu, address), zero_extend_mem::<D, S, E, General>);
    D::set(cpu, op.r1, value);
    next!(cpu, op)
}

/// MOVSX and MOVSXD.
pub(crate) fn sign_extend_reg<D: Width, S: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let value = S::sx(S::get(cpu, op.r2)) as u64;
    D::set(cpu, op.r1, value);
    next!(cpu, op)
}

pub(crate) fn sign_extend_mem<D: Width, S: Width, E: Ea, R: Reach>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<S>(cpu, op, false));
    let value = reach!(R, cpu, op, R::ld::<S>(cpu, address), sign_extend_mem::<D, S, E, General>);
    D::set(cpu, op.r1, S::sx(value) as u64);
    next!(cpu, op)
}

/// LEA with a 64-bit address.
pub(crate) fn lea_long<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let value = cpu.regs[usize::from(op.base)]
        .wrapping_add(cpu.regs[usize::from(op.index)] << (op.scale & 3))
        .wrapping_add(op.disp as i64 as u64);
    T::set(cpu, op.r1, value);
    next!(cpu, op)
}

/// LEA with a shorter address.
pub(crate) fn lea_legacy<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let value = cpu.legacy_offset(op);
    T::set(cpu, op.r1, value);
    next!(cpu, op)
}

/// XCHG of two registers.
pub(crate) fn xchg_reg_reg<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let (a, b) = (T::get(cpu, op.r1), T::get(cpu, op.r2));
    T::set(cpu, op.r1, b);
    T::set(cpu, op.r2, a);
    next!(cpu, op)
}

/// CBW, CWDE, CDQE.
pub(crate) fn extend_accumulator<D: Width, S: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let value = S::sx(S::get(cpu, 0)) as u64;
    D::set(cpu, 0, value);
    next!(cpu, op)
}

/// CWD, CDQ, CQO.
pub(crate) fn sign_to_dx<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let sign = (T::sx(T::get(cpu, 0)) >> 63) as u64;
    T::set(cpu, 2, sign);
    next!(cpu, op)
}

pub(crate) fn nop(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    next!(cpu, op)
}

/// A fence: other processors see earlier stores before later loads.
pub(crate) fn fence(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    next!(cpu, op)
}

/// CMOVcc; the destination's upper half is cleared also if the condition is false.
pub(crate) fn cmov_reg<T: Width, const C: u8>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let source = if cpu.lazy.condition::<C>() { op.r2 } else { op.r1 };
    let value = T::get(cpu, source);
    T::set(cpu, op.r1, value);
    next!(cpu, op)
}

pub(crate) fn cmov_mem<T: Width, E: Ea, const C: u8>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, false));
    let loaded = check!(cpu, op, cpu.ld::<T>(address));
    let value = if cpu.lazy.condition::<C>() { loaded } else { T::get(cpu, op.r1) };
    T::set(cpu, op.r1, value);
    next!(cpu, op)
}

pub(crate) fn set_reg<const C: u8>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let value = u64::from(cpu.lazy.condition::<C>());
    u8::set(cpu, op.r1, value);
    next!(cpu, op)
}

pub(crate) fn set_mem<E: Ea, const C: u8>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<u8>(cpu, op, true));
    let value = u64::from(cpu.lazy.condition::<C>());
    check!(cpu, op, cpu.st::<u8>(address, value));
    next!(cpu, op)
}

/// CMPXCHG with a register destination.
pub(crate) fn cmpxchg_reg<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let (old, expected) = (T::get(cpu, op.r1), T::get(cpu, 0));
    cpu.set_lazy::<T>(Kind::Sub, expected.wrapping_sub(old), old);
    if old == expected {
        let new = T::get(cpu, op.r2);
        T::set(cpu, op.r1, new);
    } else {
        T::set(cpu, 0, old);
    }
    next!(cpu, op)
}

/// CMPXCHG with a memory destination, atomic with or without LOCK.
pub(crate) fn cmpxchg_mem<T: Width, E: Ea>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, true));
    let found = match cpu.write_host::<T>(address) {
        Some(at) => Some(at),
        None => check!(cpu, op, cpu.atomic_host(address, T::BYTES)),
    };
    let expected = T::get(cpu, 0);
    let new = T::get(cpu, op.r2);
    let old = match found {
        // SAFETY: a translation of a mapped region.
        Some(at) => match unsafe { host::compare_exchange(at, T::BYTES, expected, new) } {
            Ok(()) => expected,
            Err(old) => old,
        },
        None => check!(cpu, op, cpu.exchange_alone(address, T::BYTES, expected, new)),
    };
    cpu.set_lazy::<T>(Kind::Sub, expected.wrapping_sub(old), old);
    if old != expected {
        T::set(cpu, 0, old);
    }
    next!(cpu, op)
}

/// MOV from a segment register to a register.
pub(crate) fn mov_reg_seg<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let value = u64::from(cpu.segs[usize::from(op.r2)].selector);
    T::set(cpu, op.r1, value);
    next!(cpu, op)
}

/// LAHF.
pub(crate) fn lahf(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let value = cpu.status_flags() & 0xd5 | 2;
    u8::set(cpu, 16, value);
    next!(cpu, op)
}

/// SAHF.
pub(crate) fn sahf(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let value = u8::get(cpu, 16) & 0xd5 | cpu.status_flags() & crate::cpu::flags::OF;
    cpu.set_status_flags(value);
    next!(cpu, op)
}

/// CLC, STC, CMC: `imm` is 0, 1 or 2.
pub(crate) fn set_carry(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let carry = match op.imm.get() {
        2 => !cpu.lazy.cf(),
        n => n != 0,
    };
    cpu.set_one_flag(crate::cpu::flags::CF, carry);
    next!(cpu, op)
}

/// CLD, STD: `imm` is 0 or 1.
pub(crate) fn set_direction(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let df = crate::cpu::flags::DF;
    cpu.flags = cpu.flags & !df | if op.imm.get() != 0 { df } else { 0 };
    next!(cpu, op)
}

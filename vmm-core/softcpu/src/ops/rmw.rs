//! Instructions that read, modify and write one operand: in a register, in memory, or locked in memory.

use super::ea::Ea;
use super::width::Width;
use crate::block::op::{OpPtr, check, next};
use crate::cpu::{Cpu, Fault};
use crate::mmu::host;

/// What happens to the operand. May change the status flags and the register `op.r2`, but nothing else:
/// both are restored if the write fails or has to be repeated.
pub(crate) trait Modify: 'static {
    fn apply<T: Width>(cpu: &mut Cpu, op: OpPtr, old: u64) -> u64;
}

/// The operand is the register `op.r1`.
pub(crate) fn reg<T: Width, M: Modify>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let old = T::get(cpu, op.r1);
    let new = M::apply::<T>(cpu, op, old);
    T::set(cpu, op.r1, new);
    next!(cpu, op)
}

/// The operand is in memory.
pub(crate) fn mem<T: Width, E: Ea, M: Modify>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, true));
    let Some(at) = cpu.write_host::<T>(address) else { return mem_slow::<T, E, M>(cpu, op) };
    // SAFETY: the TLB holds translations of mapped regions only.
    let old = unsafe { host::load(at, T::BYTES) };
    let new = M::apply::<T>(cpu, op, old);
    // SAFETY: as above; `apply` does not change mappings.
    unsafe { host::store(at, T::BYTES, new) };
    next!(cpu, op)
}

#[cold]
#[inline(never)]
fn mem_slow<T: Width, E: Ea, M: Modify>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, true));
    check!(cpu, op, slow::<T, M>(cpu, op, address));
    next!(cpu, op)
}

#[cold]
#[inline(never)]
fn slow<T: Width, M: Modify>(cpu: &mut Cpu, op: OpPtr, address: u64) -> Result<(), Fault> {
    cpu.probe_write(address, T::BYTES)?;
    let old = cpu.ld::<T>(address)?;
    let saved = (cpu.lazy, cpu.regs[usize::from(op.r2)]);
    let new = M::apply::<T>(cpu, op, old);
    let result = cpu.st::<T>(address, new);
    if result.is_err() {
        (cpu.lazy, cpu.regs[usize::from(op.r2)]) = saved;
    }
    result
}

/// The operand is in memory and the change is atomic.
pub(crate) fn locked<T: Width, E: Ea, M: Modify>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, true));
    let found = match cpu.write_host::<T>(address) {
        Some(at) => Some(at),
        None => check!(cpu, op, cpu.atomic_host(address, T::BYTES)),
    };
    let Some(at) = found else {
        let changed = cpu.alone(|cpu| slow::<T, M>(cpu, op, address));
        check!(cpu, op, changed);
        next!(cpu, op)
    };
    let saved = (cpu.lazy, cpu.regs[usize::from(op.r2)]);
    // SAFETY: the translation is of a mapped region.
    let mut old = unsafe { host::load(at, T::BYTES) };
    loop {
        let new = M::apply::<T>(cpu, op, old);
        // SAFETY: as above.
        match unsafe { host::compare_exchange(at, T::BYTES, old, T::zx(new)) } {
            Ok(()) => break,
            Err(found) => {
                old = found;
                (cpu.lazy, cpu.regs[usize::from(op.r2)]) = saved;
            }
        }
    }
    next!(cpu, op)
}

//! PUSH, POP and their relatives.

use super::ea::Ea;
use super::width::Width;
use crate::block::op::{OpPtr, apart, check, fault, leave, next};
use crate::cpu::flags::{AC, DF, ID, IF, IOPL, NT, STATUS, TF};
use crate::cpu::{Cpu, Fault, seg};
use crate::mmu::{General, Reach, host, reach};

impl Cpu {
    /// Mask of the stack pointer.
    #[inline(always)]
    pub(crate) fn stack_mask(&self) -> u64 {
        if self.code64 {
            u64::MAX
        } else if self.segs[seg::SS].attributes.big() {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    #[inline(always)]
    pub(crate) fn set_sp(&mut self, sp: u64) {
        match self.stack_mask() {
            0xffff => self.regs[4] = self.regs[4] & !0xffff | sp & 0xffff,
            mask => self.regs[4] = sp & mask,
        }
    }

    /// Pushes a value of size `T`.
    #[inline(always)]
    pub(crate) fn push<T: Width>(&mut self, value: u64) -> Result<(), Fault> {
        if self.code64 {
            let sp = self.regs[4].wrapping_sub(T::BYTES);
            self.st::<T>(sp, value)?;
            self.regs[4] = sp;
            return Ok(());
        }
        let sp = self.regs[4].wrapping_sub(T::BYTES);
        let address = self.segment_address(seg::SS, sp & self.stack_mask(), T::BYTES, true)?;
        self.st::<T>(address, value)?;
        self.set_sp(sp);
        Ok(())
    }

    /// Reads the value of size `T` on top of the stack.
    #[inline(always)]
    pub(crate) fn peek_stack<T: Width>(&mut self) -> Result<u64, Fault> {
        if self.code64 {
            return self.ld::<T>(self.regs[4]);
        }
        let address = self.segment_address(seg::SS, self.regs[4] & self.stack_mask(), T::BYTES, false)?;
        self.ld::<T>(address)
    }

    /// Pops a value of size `T`.
    #[inline(always)]
    pub(crate) fn pop<T: Width>(&mut self) -> Result<u64, Fault> {
        let value = self.peek_stack::<T>()?;
        self.set_sp(self.regs[4].wrapping_add(T::BYTES));
        Ok(value)
    }
}

/// PUSH of a 64-bit register in 64-bit mode.
pub(crate) fn push64_reg<R: Reach>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let sp = cpu.regs[4].wrapping_sub(8);
    let value = cpu.regs[usize::from(op.r1)];
    reach!(R, cpu, op, R::st::<u64>(cpu, sp, value), push64_reg::<General>);
    cpu.regs[4] = sp;
    next!(cpu, op)
}

/// POP of a 64-bit register in 64-bit mode.
pub(crate) fn pop64_reg<R: Reach>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let sp = cpu.regs[4];
    let value = reach!(R, cpu, op, R::ld::<u64>(cpu, sp), pop64_reg::<General>);
    cpu.regs[4] = sp.wrapping_add(8);
    cpu.regs[usize::from(op.r1)] = value;
    next!(cpu, op)
}

/// Two of PUSH at once, if the TLB knows where.
pub(crate) fn push64_pair(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let second = op.following();
    let sp = cpu.regs[4].wrapping_sub(16);
    let Some(at) = cpu.pair_host(sp, true) else { return apart(push64_reg::<General>)(cpu, op) };
    let (high, low) = (cpu.regs[usize::from(op.r1)], cpu.regs[usize::from(second.r1)]);
    // SAFETY: the TLB holds translations of mapped regions only.
    unsafe {
        host::store(at + 8, 8, high);
        host::store(at, 8, low);
    }
    cpu.regs[4] = sp;
    next!(cpu, second)
}

/// Two of POP at once, if the TLB knows where.
pub(crate) fn pop64_pair(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let second = op.following();
    let sp = cpu.regs[4];
    let Some(at) = cpu.pair_host(sp, false) else { return apart(pop64_reg::<General>)(cpu, op) };
    // SAFETY: the TLB holds translations of mapped regions only.
    let (low, high) = unsafe { (host::load(at, 8), host::load(at + 8, 8)) };
    cpu.regs[4] = sp.wrapping_add(16);
    cpu.regs[usize::from(op.r1)] = low;
    cpu.regs[usize::from(second.r1)] = high;
    next!(cpu, second)
}

pub(crate) fn push_reg<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let value = T::get(cpu, op.r1);
    check!(cpu, op, cpu.push::<T>(value));
    next!(cpu, op)
}

pub(crate) fn push_imm<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    check!(cpu, op, cpu.push::<T>(op.imm.get()));
    next!(cpu, op)
}

pub(crate) fn push_mem<T: Width, E: Ea>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, false));
    let value = check!(cpu, op, cpu.ld::<T>(address));
    if cpu.push::<T>(value).is_err() {
        cpu.stack_fault(true);
        return fault(cpu, op);
    }
    next!(cpu, op)
}

/// PUSH of a segment register.
pub(crate) fn push_seg<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let value = u64::from(cpu.segs[usize::from(op.r1)].selector);
    check!(cpu, op, cpu.push::<T>(value));
    next!(cpu, op)
}

pub(crate) fn pop_reg<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let value = check!(cpu, op, cpu.pop::<T>());
    T::set(cpu, op.r1, value);
    next!(cpu, op)
}

/// POP to memory: the address is computed with the stack pointer after the pop.
pub(crate) fn pop_mem<T: Width, E: Ea>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let old = cpu.regs[4];
    let Ok(value) = cpu.pop::<T>() else {
        cpu.stack_fault(true);
        return fault(cpu, op);
    };
    let result = match E::linear::<T>(cpu, op, true) {
        Ok(address) => cpu.st::<T>(address, value),
        Err(fault) => Err(fault),
    };
    if result.is_err() {
        cpu.regs[4] = old;
        return fault(cpu, op);
    }
    next!(cpu, op)
}

/// LEAVE.
pub(crate) fn leave_frame<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let old = cpu.regs[4];
    let frame = cpu.regs[5];
    cpu.set_sp(frame);
    let popped = cpu.pop::<T>();
    if popped.is_err() {
        cpu.regs[4] = old;
    }
    let value = check!(cpu, op, popped);
    T::set(cpu, 5, value);
    next!(cpu, op)
}

/// PUSHF.
pub(crate) fn push_flags<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let value = cpu.rflags() & !(crate::cpu::flags::RF | crate::cpu::flags::VM);
    check!(cpu, op, cpu.push::<T>(value));
    next!(cpu, op)
}

/// POPF.
pub(crate) fn pop_flags<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let value = check!(cpu, op, cpu.pop::<T>());
    let mut mask = STATUS | TF | DF | NT;
    if T::BITS > 16 {
        mask |= AC | ID;
    }
    if cpu.cpl == 0 {
        mask |= IOPL;
    }
    if !cpu.protected() || u64::from(cpu.cpl) <= (cpu.flags & IOPL) >> 12 {
        mask |= IF;
    }
    let before = cpu.flags;
    cpu.write_flags(value, mask);
    let enabled = !before & cpu.flags & IF != 0;
    if cpu.flags & TF != 0 || enabled && (cpu.ask_local || cpu.handle.peek() != 0) {
        return leave(cpu, op);
    }
    next!(cpu, op)
}

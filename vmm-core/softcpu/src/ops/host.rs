//! Instructions that `hostop` or a generic function executes.

use super::ea::{Ea, Long};
use crate::block::SlowOp;
use crate::block::op::{OpPtr, RIP, check, fault, leave, next};
use crate::cpu::{CR0_EM, CR0_MP, CR0_TS, CR4_OSFXSR, Cpu, Fault, vector};
use crate::hostop::HostOp;

/// What has to be enabled for an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    X87 = 0,
    /// FWAIT: `#NM` needs both MP and TS.
    Wait = 1,
    Mmx = 2,
    Sse = 3,
    /// FXSAVE, FXRSTOR: no pending x87 exceptions are reported.
    Fxsr = 4,
    /// An x87 instruction that does not report pending exceptions (FNSTSW, FNINIT and the like).
    X87Control = 5,
}

/// `#UD`, `#NM` and `#MF` that come before the instruction itself.
#[inline(always)]
pub(crate) fn available(cpu: &mut Cpu, unit: u8) -> Result<(), Fault> {
    const X87: u8 = Unit::X87 as u8;
    const WAIT: u8 = Unit::Wait as u8;
    const MMX: u8 = Unit::Mmx as u8;
    const SSE: u8 = Unit::Sse as u8;
    const FXSR: u8 = Unit::Fxsr as u8;
    let cr0 = cpu.cr0;
    match unit {
        SSE if cr0 & CR0_EM != 0 || cpu.cr4 & CR4_OSFXSR == 0 => return Err(cpu.ud()),
        MMX if cr0 & CR0_EM != 0 => return Err(cpu.ud()),
        WAIT if cr0 & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS => return Err(cpu.raise(vector::NM, None)),
        SSE | MMX if cr0 & CR0_TS != 0 => return Err(cpu.raise(vector::NM, None)),
        WAIT => {}
        _ if cr0 & (CR0_EM | CR0_TS) != 0 => return Err(cpu.raise(vector::NM, None)),
        _ => {}
    }
    // An unmasked x87 exception is waiting: the error summary bit is set.
    if matches!(unit, X87 | WAIT | MMX) && unit != FXSR && cpu.fpu.fsw & 0x80 != 0 {
        return Err(cpu.raise(vector::MF, None));
    }
    Ok(())
}

/// An instruction of `hostop`. `r1` is its [`Unit`]; `r2` is 1 if it has a memory operand of `x >> 8` bytes.
pub(crate) fn host<const LONG: bool>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    check!(cpu, op, available(cpu, op.r1));
    let address = if op.r2 != 0 {
        if LONG {
            check!(cpu, op, Long::linear::<u8>(cpu, op, false))
        } else {
            let offset = cpu.legacy_offset(op);
            let (size, write) = (u64::from(op.x >> 8).max(1), op.r2 == 2);
            check!(cpu, op, cpu.segment_address(usize::from(op.seg), offset, size, write))
        }
    } else {
        0
    };
    // SAFETY: the block owns the boxed instruction, and the block is live.
    let instruction = unsafe { &*(op.imm.get() as usize as *const HostOp) };
    check!(cpu, op, (instruction.run)(cpu, instruction, address));
    next!(cpu, op)
}

/// Executes a generic instruction with RIP behind it.
#[inline(always)]
fn run_slow(cpu: &mut Cpu, op: OpPtr) -> Result<(), Fault> {
    // SAFETY: the block owns the boxed instruction, and the block is live.
    let slow = unsafe { &*(op.imm.get() as usize as *const SlowOp) };
    let start = cpu.regs[usize::from(RIP)];
    let behind = start.wrapping_add(u64::from(op.off) + u64::from(op.len)) & cpu.rip_mask;
    cpu.regs[usize::from(RIP)] = behind;
    cpu.block_start = start;
    // It may call out of the processor.
    cpu.resident.settle(&mut cpu.fpu);
    cpu.ahead = u64::from(op.left) - 1;
    let result = (slow.run)(cpu, &slow.instruction);
    cpu.ahead = 0;
    if result.is_err() {
        cpu.regs[usize::from(RIP)] = start;
    }
    result
}

/// A generic instruction after which the run loop looks around.
pub(crate) fn slow_last(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    match run_slow(cpu, op) {
        Ok(()) => {
            cpu.fuel += i64::from(op.left) - 1;
            OpPtr::NULL
        }
        Err(Fault) => fault(cpu, op),
    }
}

/// A generic instruction that does not change where the next one is found.
pub(crate) fn slow_next(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    match run_slow(cpu, op) {
        Ok(()) => {
            cpu.regs[usize::from(RIP)] = cpu.block_start;
            next!(cpu, op)
        }
        Err(Fault) => fault(cpu, op),
    }
}

/// PAUSE: now and then lets the host run the processor that this one waits for.
pub(crate) fn pause(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    cpu.pauses = cpu.pauses.wrapping_add(1);
    if cpu.pauses.is_multiple_of(64) {
        std::thread::yield_now();
    }
    next!(cpu, op)
}

/// CLI.
pub(crate) fn cli(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    check!(cpu, op, cpu.check_interrupt_privilege());
    cpu.flags &= !crate::cpu::flags::IF;
    next!(cpu, op)
}

/// STI: no interrupt before the next instruction has executed.
pub(crate) fn sti(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    check!(cpu, op, cpu.check_interrupt_privilege());
    let before = cpu.flags;
    cpu.flags |= crate::cpu::flags::IF;
    let opened = before & crate::cpu::flags::IF == 0;
    if opened && (op.left == 1 || cpu.ask_local || cpu.handle.peek() != 0) {
        cpu.shadow = true;
        return leave(cpu, op);
    }
    next!(cpu, op)
}

//! Operations of a block for the SSE forms that programs use most: with their operands in registers or at a
//! 64-bit address, they skip what the general way through [`HostOp::execute`] has to decide at run time.

use iced_x86::{Code, Instruction, Mnemonic as M};

use super::op::{Body, HostOp, Memory, Unit, X87};
use super::stub::{Output, Slot};
use crate::block::op::{Handler, Op, OpPtr, RIP, check, next};
use crate::cpu::{CR0_EM, CR0_TS, CR4_OSFXSR, Cpu, Fault};
use crate::mmu::host;
use crate::ops::ea::{Ea, Long};
use crate::ops::host::{Unit as Needs, available};

/// The handler for an operation if it has one, with the operands' numbers in `op`. `long` says that a memory
/// operand has a 64-bit address.
pub(crate) fn choose(instruction: &Instruction, host: &HostOp, op: &mut Op, long: bool) -> Option<Handler> {
    if host.memory != Memory::None && !long {
        return None;
    }
    if host.unit == Unit::X87 {
        return pick_x87(host);
    }
    if !matches!(host.unit, Unit::Sse | Unit::SseFloat) {
        return None;
    }
    // They take string lengths from RAX and RDX.
    if matches!(instruction.mnemonic(), M::Pcmpestrm | M::Pcmpestrm64 | M::Pcmpestri | M::Pcmpestri64) {
        return None;
    }
    let float = host.unit == Unit::SseFloat;
    let handler = match pick_move(instruction.code(), host.memory) {
        Some(handler) => handler,
        None if !matches!(host.body, Body::Stub(_)) => return None,
        None => pick(host, float)?,
    };
    op.r1 = number(host.first);
    op.r2 = number(host.second);
    Some(handler)
}

fn number(slot: Slot) -> u8 {
    match slot {
        Slot::Xmm(number) | Slot::Gpr { number, .. } => number & 15,
        _ => 0,
    }
}

fn pick(host: &HostOp, float: bool) -> Option<Handler> {
    let by_float = |plain: Handler, float_handler: Handler| if float { float_handler } else { plain };
    let quiet = host.rflags == 0 && host.result == Slot::None;
    Some(match (host.first, host.second, host.memory) {
        (Slot::Xmm(_), Slot::Xmm(_) | Slot::None, Memory::None) if quiet => {
            by_float(registers::<false>, registers::<true>)
        }
        (Slot::Xmm(_), Slot::Memory, Memory::Load) if quiet => by_float(load::<false>, load::<true>),
        (Slot::Xmm(_), Slot::Gpr { bytes: 4 | 8, .. }, Memory::None) if quiet => {
            by_float(from_general::<false>, from_general::<true>)
        }
        (Slot::Gpr { bytes: 4 | 8, .. }, Slot::Xmm(_), Memory::None) if host.rflags == 0 => {
            by_float(to_general::<false>, to_general::<true>)
        }
        (Slot::Xmm(_), Slot::Xmm(_), Memory::None) if host.result == Slot::None && host.rflags == STATUS => {
            by_float(to_flags::<false>, to_flags::<true>)
        }
        _ => return None,
    })
}

fn pick_x87(host: &HostOp) -> Option<Handler> {
    let plain = matches!(host.body, Body::Stub(_)) && host.x87 == X87::Waiting;
    if !plain || host.rflags != 0 || host.reads_rflags {
        return None;
    }
    Some(match host.memory {
        Memory::None => x87_registers,
        Memory::Load => x87_load,
        Memory::Store => x87_store,
    })
}

fn pick_move(code: Code, memory: Memory) -> Option<Handler> {
    use Code as C;
    Some(match (code, memory) {
        (C::Movups_xmm_xmmm128 | C::Movupd_xmm_xmmm128 | C::Movdqu_xmm_xmmm128, Memory::Load) => {
            load_vector::<false>
        }
        (C::Movaps_xmm_xmmm128 | C::Movapd_xmm_xmmm128 | C::Movdqa_xmm_xmmm128, Memory::Load) => {
            load_vector::<true>
        }
        (C::Movups_xmmm128_xmm | C::Movupd_xmmm128_xmm | C::Movdqu_xmmm128_xmm, Memory::Store) => {
            store_vector::<false>
        }
        (C::Movaps_xmmm128_xmm | C::Movapd_xmmm128_xmm | C::Movdqa_xmmm128_xmm, Memory::Store) => {
            store_vector::<true>
        }
        (
            C::Movups_xmm_xmmm128
            | C::Movupd_xmm_xmmm128
            | C::Movdqu_xmm_xmmm128
            | C::Movaps_xmm_xmmm128
            | C::Movapd_xmm_xmmm128
            | C::Movdqa_xmm_xmmm128,
            Memory::None,
        ) => copy_vector,
        (C::Movq_xmm_xmmm64 | C::Movq_xmm_rm64 | C::Movsd_xmm_xmmm64, Memory::Load) => load_zeroed::<u64>,
        (C::Movd_xmm_rm32 | C::Movss_xmm_xmmm32, Memory::Load) => load_zeroed::<u32>,
        (C::Movq_xmmm64_xmm | C::Movq_rm64_xmm | C::Movsd_xmmm64_xmm, Memory::Store) => store_low::<u64>,
        (C::Movd_rm32_xmm | C::Movss_xmmm32_xmm, Memory::Store) => store_low::<u32>,
        _ => return None,
    })
}

/// CF, PF, AF, ZF, SF and OF.
const STATUS: u16 = 0x8d5;

/// `#UD` and `#NM` that come before an SSE instruction.
#[inline(always)]
fn ready(cpu: &mut Cpu) -> Result<(), Fault> {
    if cpu.cr0 & (CR0_EM | CR0_TS) != 0 || cpu.cr4 & CR4_OSFXSR == 0 {
        return available(cpu, Needs::Sse as u8);
    }
    Ok(())
}

#[inline(always)]
fn host_op<'a>(op: OpPtr) -> &'a HostOp {
    // SAFETY: the block owns the boxed instruction, and it outlives the execution of the operation.
    unsafe { &*(op.imm.get() as usize as *const HostOp) }
}

#[inline(always)]
fn xmm(cpu: &mut Cpu, number: u8) -> *mut u128 {
    &raw mut cpu.fpu.xmm[usize::from(number & 15)]
}

#[inline(always)]
fn general(cpu: &mut Cpu, number: u8) -> *mut u64 {
    &raw mut cpu.regs[usize::from(number & 15)]
}

/// Calls the stub with MXCSR resident if it matters; `None` if an exception is not masked.
#[inline(always)]
fn call<const FLOAT: bool>(
    cpu: &mut Cpu,
    host: &HostOp,
    first: *mut u8,
    second: *const u8,
) -> Option<Output> {
    let Body::Stub(stub) = host.body else { return None };
    if FLOAT && !cpu.resident.enter_mxcsr(&cpu.fpu) {
        return None;
    }
    // SAFETY: callers pass registers of the processor, or readable memory of the operand's size for the
    // second; the stubs that `pick` accepts use no other input than XMM0 in the image.
    Some(unsafe { stub(first, second, &raw mut cpu.fpu, 0, 0, 0) })
}

fn registers<const FLOAT: bool>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    check!(cpu, op, ready(cpu));
    let (first, second) = (xmm(cpu, op.r1), xmm(cpu, op.r2));
    if call::<FLOAT>(cpu, host_op(op), first.cast(), second.cast()).is_none() {
        check!(cpu, op, host_op(op).execute(cpu, 0));
    }
    next!(cpu, op)
}

fn load<const FLOAT: bool>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    check!(cpu, op, ready(cpu));
    let address = check!(cpu, op, Long::linear::<u8>(cpu, op, false));
    let host = host_op(op);
    // The general way faults, or copies for instructions that the host may want to be aligned.
    let misaligned = host.length == 16 && address & 15 != 0;
    let found = cpu.host_range(address, u64::from(host.length), false).filter(|_| !misaligned);
    let first = xmm(cpu, op.r1);
    // The host address is aligned as the guest's is.
    if found.and_then(|at| call::<FLOAT>(cpu, host, first.cast(), at as usize as *const u8)).is_none() {
        check!(cpu, op, host.execute(cpu, address));
    }
    next!(cpu, op)
}

/// A general register is the source (`MOVD`, `CVTSI2SD`).
fn from_general<const FLOAT: bool>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    check!(cpu, op, ready(cpu));
    let (first, second) = (xmm(cpu, op.r1), general(cpu, op.r2));
    if call::<FLOAT>(cpu, host_op(op), first.cast(), second.cast()).is_none() {
        check!(cpu, op, host_op(op).execute(cpu, 0));
    }
    next!(cpu, op)
}

/// A general register is the destination (`PMOVMSKB`, `CVTTSD2SI`).
fn to_general<const FLOAT: bool>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    check!(cpu, op, ready(cpu));
    let (first, second) = (general(cpu, op.r1), xmm(cpu, op.r2));
    match call::<FLOAT>(cpu, host_op(op), first.cast(), second.cast()) {
        // SAFETY: a register of the processor. A result of 32 bits is zero-extended in RAX.
        Some(output) => unsafe { first.write(output.value) },
        None => check!(cpu, op, host_op(op).execute(cpu, 0)),
    }
    next!(cpu, op)
}

/// The result is in the flags (`UCOMISD`, `PTEST`).
fn to_flags<const FLOAT: bool>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    check!(cpu, op, ready(cpu));
    let (first, second) = (xmm(cpu, op.r1), xmm(cpu, op.r2));
    match call::<FLOAT>(cpu, host_op(op), first.cast(), second.cast()) {
        Some(output) => cpu.set_status_flags(output.rflags & u64::from(STATUS)),
        None => check!(cpu, op, host_op(op).execute(cpu, 0)),
    }
    next!(cpu, op)
}

fn copy_vector(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    check!(cpu, op, ready(cpu));
    let (first, second) = (xmm(cpu, op.r1), xmm(cpu, op.r2));
    // SAFETY: both point to registers of the processor.
    unsafe { first.write(second.read()) };
    next!(cpu, op)
}

fn load_vector<const ALIGNED: bool>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    check!(cpu, op, ready(cpu));
    let address = check!(cpu, op, Long::linear::<u8>(cpu, op, false));
    if ALIGNED && address & 15 != 0 {
        check!(cpu, op, Err::<(), _>(cpu.gp()));
    }
    let value = match cpu.host_range(address, 16, false) {
        // SAFETY: `host_range` found 16 readable bytes.
        Some(at) => unsafe { host::load_16(at) },
        None => u128::from_le_bytes(check!(cpu, op, cpu.read_bytes(address))),
    };
    // SAFETY: a register of the processor.
    unsafe { xmm(cpu, op.r1).write(value) };
    next!(cpu, op)
}

fn store_vector<const ALIGNED: bool>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    check!(cpu, op, ready(cpu));
    let address = check!(cpu, op, Long::linear::<u8>(cpu, op, true));
    if ALIGNED && address & 15 != 0 {
        check!(cpu, op, Err::<(), _>(cpu.gp()));
    }
    // SAFETY: a register of the processor.
    let value = unsafe { xmm(cpu, op.r2).read() };
    match cpu.host_range(address, 16, true) {
        // SAFETY: `host_range` found 16 writable bytes.
        Some(at) => unsafe { host::store_16(at, value) },
        None => check!(cpu, op, cpu.write_bytes(address, value.to_le_bytes())),
    }
    next!(cpu, op)
}

/// Loads the low part of a register and clears the rest.
fn load_zeroed<T: crate::ops::width::Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    check!(cpu, op, ready(cpu));
    let address = check!(cpu, op, Long::linear::<T>(cpu, op, false));
    let value = check!(cpu, op, cpu.ld::<T>(address));
    // SAFETY: a register of the processor.
    unsafe { xmm(cpu, op.r1).write(u128::from(value)) };
    next!(cpu, op)
}

fn store_low<T: crate::ops::width::Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    check!(cpu, op, ready(cpu));
    let address = check!(cpu, op, Long::linear::<T>(cpu, op, true));
    // SAFETY: a register of the processor.
    let value = unsafe { xmm(cpu, op.r2).read() } as u64;
    check!(cpu, op, cpu.st::<T>(address, value));
    next!(cpu, op)
}

/// Calls the stub of an x87 instruction with the guest's stack resident; `false` if an exception is not masked.
#[inline(always)]
fn call_x87(cpu: &mut Cpu, host: &HostOp, memory: *mut u8) -> bool {
    let Body::Stub(stub) = host.body else { return false };
    if !cpu.resident.enter_x87(&mut cpu.fpu) {
        return false;
    }
    cpu.fpu.fop = host.fop;
    cpu.fpu.fip = cpu.regs[usize::from(RIP)].wrapping_add(u64::from(host.offset));
    // SAFETY: the guest's stack is in the host's unit; callers pass memory of the operand's size.
    unsafe { stub(memory, memory, &raw mut cpu.fpu, 0, 0, 0) };
    true
}

fn x87_registers(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    check!(cpu, op, available(cpu, Needs::X87 as u8));
    if !call_x87(cpu, host_op(op), std::ptr::null_mut()) {
        check!(cpu, op, host_op(op).execute(cpu, 0));
    }
    next!(cpu, op)
}

#[inline(always)]
fn x87_memory<const WRITE: bool>(cpu: &mut Cpu, op: OpPtr) -> Result<(), Fault> {
    available(cpu, Needs::X87 as u8)?;
    let address = Long::linear::<u8>(cpu, op, WRITE)?;
    let host = host_op(op);
    match cpu.host_range(address, u64::from(host.length), WRITE) {
        Some(at) if call_x87(cpu, host, at as usize as *mut u8) => cpu.fpu.fdp = address,
        _ => host.execute(cpu, address)?,
    }
    Ok(())
}

fn x87_load(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    check!(cpu, op, x87_memory::<false>(cpu, op));
    next!(cpu, op)
}

fn x87_store(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    check!(cpu, op, x87_memory::<true>(cpu, op));
    next!(cpu, op)
}

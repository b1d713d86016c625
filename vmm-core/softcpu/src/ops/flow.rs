//! Near transfers of control.

use super::ea::Ea;
use super::width::Width;
use crate::block::op::{OpPtr, RIP, check, dispatch, enter, go};
use crate::cpu::segment::canonical;
use crate::cpu::{Cpu, seg};
use crate::mmu::{General, Reach, reach};

/// Goes to a block in the same page: directly if the operation is linked already.
macro_rules! follow {
    ($cpu:expr, $op:expr) => {{
        let link = $op.imm.get();
        if link != 0 {
            enter!($cpu, OpPtr::from_link(link));
        }
        return find_link($cpu, $op);
    }};
}

/// Goes to the instruction after a conditional jump.
macro_rules! not_taken {
    ($cpu:expr, $op:expr) => {{
        let other = $op.following();
        let link = other.imm.get();
        if link != 0 {
            advance($cpu, other.disp as i64 as u64, $cpu.rip_mask);
            enter!($cpu, OpPtr::from_link(link));
        }
        go!($cpu, other)
    }};
}

/// Links an operation to the block at RIP if that is known, and goes there.
#[inline(never)]
fn find_link(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    match cpu.cached_block() {
        Some(block) => {
            op.imm.set(block.first().as_link());
            enter!(cpu, block.first())
        }
        None => OpPtr::NULL,
    }
}

#[inline(always)]
fn advance(cpu: &mut Cpu, by: u64, mask: u64) {
    cpu.regs[usize::from(RIP)] = cpu.regs[usize::from(RIP)].wrapping_add(by) & mask;
}

/// Mask of the instruction pointer: by operand size outside of 64-bit mode.
#[inline(always)]
const fn mask<T: Width>() -> u64 {
    T::MASK
}

/// JMP, and the end of a block that just goes on: to the same page.
pub(crate) fn jump_near<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    advance(cpu, op.disp as i64 as u64, mask::<T>());
    follow!(cpu, op)
}

/// JMP to another page: `disp` is relative to the following instruction.
pub(crate) fn jump_far<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let target = return_address(cpu, op).wrapping_add(op.disp as i64 as u64) & mask::<T>();
    if out_of_reach::<T>(cpu, target) {
        return not_canonical(cpu, op);
    }
    cpu.regs[usize::from(RIP)] = target;
    dispatch!(cpu)
}

/// Jcc. `disp` leads to the target; the following operation is the jump to the next instruction.
pub(crate) fn jcc_near<T: Width, const C: u8>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    if cpu.lazy.condition::<C>() {
        advance(cpu, op.disp as i64 as u64, mask::<T>());
        follow!(cpu, op)
    }
    not_taken!(cpu, op)
}

pub(crate) fn jcc_far<T: Width, const C: u8>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    if cpu.lazy.condition::<C>() {
        return jump_far::<T>(cpu, op);
    }
    not_taken!(cpu, op)
}

#[cold]
#[inline(never)]
fn not_canonical(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    cpu.gp();
    crate::block::op::fault(cpu, op)
}

/// Whether a near branch to `target` faults: the address is not canonical, or beyond the limit of CS.
#[inline(always)]
fn out_of_reach<T: Width>(cpu: &Cpu, target: u64) -> bool {
    if T::BITS == 64 {
        !canonical(target)
    } else {
        !cpu.code64 && target > u64::from(cpu.segs[seg::CS].limit)
    }
}

#[inline(always)]
fn return_address(cpu: &Cpu, op: OpPtr) -> u64 {
    cpu.regs[usize::from(RIP)].wrapping_add(u64::from(op.off) + u64::from(op.len))
}

/// CALL in 64-bit mode to the same page.
pub(crate) fn call64_near<R: Reach>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let sp = cpu.regs[4].wrapping_sub(8);
    let back = return_address(cpu, op);
    reach!(R, cpu, op, R::st::<u64>(cpu, sp, back), call64_near::<General>);
    cpu.regs[4] = sp;
    advance(cpu, op.disp as i64 as u64, u64::MAX);
    follow!(cpu, op)
}

/// CALL in 64-bit mode to another page.
pub(crate) fn call64_far<R: Reach>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let target = return_address(cpu, op).wrapping_add(op.disp as i64 as u64);
    let sp = cpu.regs[4].wrapping_sub(8);
    let back = return_address(cpu, op);
    if !canonical(target) {
        return not_canonical(cpu, op);
    }
    reach!(R, cpu, op, R::st::<u64>(cpu, sp, back), call64_far::<General>);
    cpu.regs[4] = sp;
    cpu.regs[usize::from(RIP)] = target;
    dispatch!(cpu)
}

/// CALL outside of 64-bit mode to the same page.
pub(crate) fn call_near<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let back = return_address(cpu, op);
    check!(cpu, op, cpu.push::<T>(back));
    advance(cpu, op.disp as i64 as u64, mask::<T>());
    follow!(cpu, op)
}

/// CALL outside of 64-bit mode to another page, or with a 16-bit operand.
pub(crate) fn call_far<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let back = return_address(cpu, op);
    check!(cpu, op, cpu.push::<T>(back));
    cpu.regs[usize::from(RIP)] = back.wrapping_add(op.disp as i64 as u64) & mask::<T>();
    dispatch!(cpu)
}

/// RET in 64-bit mode; `imm` is the number of bytes to release.
pub(crate) fn ret64<R: Reach>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let sp = cpu.regs[4];
    let target = reach!(R, cpu, op, R::ld::<u64>(cpu, sp), ret64::<General>);
    if !canonical(target) {
        return not_canonical(cpu, op);
    }
    cpu.regs[4] = sp.wrapping_add(8).wrapping_add(op.imm.get());
    cpu.regs[usize::from(RIP)] = target;
    dispatch!(cpu)
}

/// RET otherwise.
pub(crate) fn ret_legacy<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let before = cpu.regs[4];
    let target = check!(cpu, op, cpu.pop::<T>());
    if out_of_reach::<T>(cpu, target) {
        cpu.regs[4] = before;
        return not_canonical(cpu, op);
    }
    let sp = cpu.regs[4].wrapping_add(op.imm.get());
    cpu.set_sp(sp);
    cpu.regs[usize::from(RIP)] = target;
    dispatch!(cpu)
}

/// JMP to an address in a register.
pub(crate) fn jump_reg<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let target = T::get(cpu, op.r1);
    if out_of_reach::<T>(cpu, target) {
        return not_canonical(cpu, op);
    }
    cpu.regs[usize::from(RIP)] = target;
    dispatch!(cpu)
}

/// JMP to an address in memory.
pub(crate) fn jump_mem<T: Width, E: Ea>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, false));
    let target = check!(cpu, op, cpu.ld::<T>(address));
    if out_of_reach::<T>(cpu, target) {
        return not_canonical(cpu, op);
    }
    cpu.regs[usize::from(RIP)] = target;
    dispatch!(cpu)
}

/// CALL to an address in a register.
pub(crate) fn call_reg<T: Width>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let target = T::get(cpu, op.r1);
    let back = return_address(cpu, op);
    if out_of_reach::<T>(cpu, target) {
        return not_canonical(cpu, op);
    }
    check!(cpu, op, cpu.push::<T>(back));
    cpu.regs[usize::from(RIP)] = target;
    dispatch!(cpu)
}

/// CALL to an address in memory.
pub(crate) fn call_mem<T: Width, E: Ea>(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let address = check!(cpu, op, E::linear::<T>(cpu, op, false));
    let target = check!(cpu, op, cpu.ld::<T>(address));
    let back = return_address(cpu, op);
    if out_of_reach::<T>(cpu, target) {
        return not_canonical(cpu, op);
    }
    check!(cpu, op, cpu.push::<T>(back));
    cpu.regs[usize::from(RIP)] = target;
    dispatch!(cpu)
}

/// LOOP, LOOPE, LOOPNE and JCXZ. `r1` selects which, `r2` is the address size in bytes; `disp` is relative
/// to the block, `scale` holds the operand size in bytes.
pub(crate) fn count_jump(cpu: &mut Cpu, op: OpPtr) -> OpPtr {
    let mask = u64::MAX >> (64 - 8 * u32::from(op.r2));
    let mut count = cpu.regs[1] & mask;
    if op.r1 < 3 {
        count = count.wrapping_sub(1) & mask;
        cpu.regs[1] = if op.r2 == 2 { cpu.regs[1] & !mask | count } else { count };
    }
    let taken = match op.r1 {
        0 => count != 0,
        1 => count != 0 && cpu.lazy.zf(),
        2 => count != 0 && !cpu.lazy.zf(),
        _ => count == 0,
    };
    if taken {
        advance(cpu, op.disp as i64 as u64, u64::MAX >> (64 - 8 * u32::from(op.scale)));
    } else {
        let by = u64::from(op.off) + u64::from(op.len);
        advance(cpu, by, cpu.rip_mask);
    }
    dispatch!(cpu)
}

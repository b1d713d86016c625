//! Instructions of older modes: BCD, BOUND, ENTER, far pointers.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::operand::{segment_number, size_of};
use super::width::Width;
use crate::cpu::flags::{AF, CF, OF, PF, SF, ZF};
use crate::cpu::{Cpu, Fault, seg, vector};

/// PF, ZF and SF of a byte.
fn byte_flags(value: u8) -> u64 {
    let mut flags = 0;
    if value == 0 {
        flags |= ZF;
    }
    if value & 0x80 != 0 {
        flags |= SF;
    }
    if value.count_ones() & 1 == 0 {
        flags |= PF;
    }
    flags
}

/// DAA and DAS.
pub(crate) fn decimal_adjust(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let subtract = instruction.mnemonic() == Mnemonic::Das;
    let old = u8::get(cpu, 0) as u8;
    let flags = cpu.status_flags();
    let (mut al, mut new) = (old, 0);
    let adjust = |al: u8, by: u8| if subtract { al.wrapping_sub(by) } else { al.wrapping_add(by) };
    if old & 15 > 9 || flags & AF != 0 {
        let borrow = subtract && old < 6 || !subtract && old > 0xf9;
        al = adjust(al, 6);
        new |= AF | if borrow { CF } else { 0 };
    }
    if old > 0x99 || flags & CF != 0 {
        al = adjust(al, 0x60);
        new |= CF;
    }
    new |= flags & CF & if subtract { 0 } else { CF };
    u8::set(cpu, 0, u64::from(al));
    cpu.set_status_flags(new | byte_flags(al));
    Ok(())
}

/// AAA and AAS.
pub(crate) fn ascii_adjust(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let mut ax = u16::get(cpu, 0) as u16;
    let mut flags = 0;
    if ax & 15 > 9 || cpu.status_flags() & AF != 0 {
        ax = if instruction.mnemonic() == Mnemonic::Aaa {
            ax.wrapping_add(0x106)
        } else {
            ax.wrapping_sub(0x106)
        };
        flags = AF | CF;
    }
    ax &= 0xff0f;
    u16::set(cpu, 0, u64::from(ax));
    cpu.set_status_flags(flags | byte_flags(ax as u8));
    Ok(())
}

/// AAM.
pub(crate) fn aam(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let base = instruction.immediate8();
    if base == 0 {
        return Err(cpu.raise(vector::DE, None));
    }
    let al = u8::get(cpu, 0) as u8;
    u16::set(cpu, 0, u64::from(al / base) << 8 | u64::from(al % base));
    cpu.set_status_flags(byte_flags(al % base));
    Ok(())
}

/// AAD.
pub(crate) fn aad(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let (al, ah) = (u8::get(cpu, 0) as u8, u8::get(cpu, 16) as u8);
    let result = al.wrapping_add(ah.wrapping_mul(instruction.immediate8()));
    u16::set(cpu, 0, u64::from(result));
    cpu.set_status_flags(byte_flags(result));
    Ok(())
}

/// SALC.
pub(crate) fn salc(cpu: &mut Cpu, _: &Instruction) -> Result<(), Fault> {
    let value = if cpu.lazy.cf() { 0xff } else { 0 };
    u8::set(cpu, 0, value);
    Ok(())
}

/// BOUND.
pub(crate) fn bound(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let size = size_of(instruction, 0);
    let address = cpu.memory_address(instruction, 0, 2 * size, false)?;
    let extend = |v: u64| if size == 2 { u16::sx(v) } else { u32::sx(v) };
    let low = extend(cpu.load(address, size)?);
    let high = extend(cpu.load(address + size, size)?);
    let index = extend(cpu.operand(instruction, 0)?);
    if index < low || index > high { Err(cpu.raise(vector::BR, None)) } else { Ok(()) }
}

/// ARPL.
pub(crate) fn arpl(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    if !cpu.protected() {
        return Err(cpu.ud());
    }
    let destination = cpu.operand(instruction, 0)? & 0xffff;
    let rpl = cpu.operand(instruction, 1)? & 3;
    let raise = destination & 3 < rpl;
    if raise {
        let value = destination & !3 | rpl;
        if instruction.op0_kind() == OpKind::Register {
            // Only 16 bits are written, whatever the operand size.
            u16::set(cpu, instruction.op0_register().number() as u8, value);
        } else {
            cpu.set_operand(instruction, 0, value)?;
        }
    }
    cpu.set_one_flag(ZF, raise);
    Ok(())
}

/// ENTER.
pub(crate) fn enter(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let size = match instruction.code() {
        Code::Enterw_imm16_imm8 => 2,
        Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let (allocate, level) = (u64::from(instruction.immediate16()), instruction.immediate8_2nd() & 31);
    let saved = cpu.regs[4];
    let result = enter_frame(cpu, size, allocate, level);
    if result.is_err() {
        cpu.regs[4] = saved;
    }
    result
}

fn push_sized(cpu: &mut Cpu, size: u64, value: u64) -> Result<(), Fault> {
    match size {
        2 => cpu.push::<u16>(value),
        4 => cpu.push::<u32>(value),
        _ => cpu.push::<u64>(value),
    }
}

fn enter_frame(cpu: &mut Cpu, size: u64, allocate: u64, level: u8) -> Result<(), Fault> {
    let mut frame_pointer = cpu.regs[5];
    push_sized(cpu, size, frame_pointer)?;
    let frame = cpu.regs[4];
    for _ in 1..level {
        frame_pointer = frame_pointer.wrapping_sub(size);
        let address = cpu.segment_address(seg::SS, frame_pointer & cpu.stack_mask(), size, false)?;
        let value = cpu.load(address, size)?;
        push_sized(cpu, size, value)?;
    }
    if level > 0 {
        push_sized(cpu, size, frame)?;
    }
    let sp = cpu.regs[4].wrapping_sub(allocate);
    let top = cpu.segment_address(seg::SS, sp & cpu.stack_mask(), size, true)?;
    cpu.probe_write(top, size)?;
    cpu.set_sp(sp);
    match size {
        2 => u16::set(cpu, 5, frame),
        4 => u32::set(cpu, 5, frame),
        _ => u64::set(cpu, 5, frame),
    }
    Ok(())
}

/// PUSHA.
pub(crate) fn pusha(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let size = if instruction.mnemonic() == Mnemonic::Pushad { 4 } else { 2 };
    let saved = cpu.regs[4];
    for register in 0..8 {
        let value = if register == 4 { saved } else { cpu.regs[register] };
        if let Err(fault) = push_sized(cpu, size, value) {
            cpu.regs[4] = saved;
            return Err(fault);
        }
    }
    Ok(())
}

/// POPA.
pub(crate) fn popa(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let wide = instruction.mnemonic() == Mnemonic::Popad;
    let saved = cpu.regs[4];
    let mut values = [0; 8];
    for value in values.iter_mut().rev() {
        let popped = if wide { cpu.pop::<u32>() } else { cpu.pop::<u16>() };
        match popped {
            Ok(v) => *value = v,
            Err(fault) => {
                cpu.regs[4] = saved;
                return Err(fault);
            }
        }
    }
    for (register, value) in values.into_iter().enumerate().filter(|(r, _)| *r != 4) {
        if wide { u32::set(cpu, register as u8, value) } else { u16::set(cpu, register as u8, value) }
    }
    Ok(())
}

/// LDS, LES, LFS, LGS, LSS.
pub(crate) fn load_far_pointer(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let register = match instruction.mnemonic() {
        Mnemonic::Lds => seg::DS,
        Mnemonic::Les => seg::ES,
        Mnemonic::Lfs => seg::FS,
        Mnemonic::Lgs => seg::GS,
        _ => seg::SS,
    };
    let size = size_of(instruction, 0);
    let address = cpu.memory_address(instruction, 0, size + 2, false)?;
    let offset = cpu.load(address, size)?;
    let selector = cpu.load(address.wrapping_add(size), 2)?;
    cpu.load_segment(register, selector as u16)?;
    cpu.set_register(instruction.op0_register(), offset);
    cpu.shadow |= register == seg::SS;
    Ok(())
}

/// XLAT.
pub(crate) fn xlat(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let mask = match instruction.memory_base() {
        iced_x86::Register::BX => 0xffff,
        iced_x86::Register::EBX => 0xffff_ffff,
        _ => u64::MAX,
    };
    let offset = cpu.regs[3].wrapping_add(u8::get(cpu, 0)) & mask;
    let segment = segment_number(instruction.memory_segment());
    let address = cpu.segment_address(segment, offset, 1, false)?;
    let value = cpu.ld::<u8>(address)?;
    u8::set(cpu, 0, value);
    Ok(())
}

/// INTO.
pub(crate) fn into(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    if cpu.status_flags() & OF == 0 {
        return Ok(());
    }
    super::system::software_interrupt(cpu, instruction, vector::OF)
}

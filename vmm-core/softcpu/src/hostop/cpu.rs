//! Translated instructions on the processor, with short cuts for the common forms.

use iced_x86::{Code, Instruction};

use super::exec::{Guest, Trap};
use super::op::{Body, HostOp, Memory, Run, Unit};
use super::resident::Resident;
use super::stub::Slot;
use crate::block::op::RIP;
use crate::cpu::{Cpu, Fault, vector};
use crate::mmu::host;
use crate::state::FpuState;

impl Guest for Cpu {
    type Fault = Fault;

    fn raise_trap(&mut self, trap: Trap) -> Fault {
        match trap {
            Trap::InvalidOpcode => self.ud(),
            Trap::GeneralProtection => self.gp(),
            Trap::Simd => self.raise(vector::XM, None),
        }
    }

    #[cold]
    fn misaligned(&mut self, address: u64) -> Fault {
        self.non_canonical = self.long_mode() && (address as i64) << 16 >> 16 != address as i64;
        self.gp()
    }

    #[inline(always)]
    fn units(&mut self) -> (&mut Resident, &mut FpuState) {
        (&mut self.resident, &mut self.fpu)
    }

    #[inline(always)]
    fn gpr_address(&mut self, number: u8) -> *mut u64 {
        &raw mut self.regs[usize::from(number & 15)]
    }

    fn status_flags(&mut self) -> u64 {
        Cpu::status_flags(self)
    }

    fn set_status_flags(&mut self, value: u64) {
        Cpu::set_status_flags(self, value);
    }

    fn cr4(&self) -> u64 {
        self.cr4
    }

    fn block_start(&self) -> u64 {
        self.regs[usize::from(RIP)]
    }

    fn read(&mut self, address: u64, data: &mut [u8]) -> Result<(), Fault> {
        macro_rules! sizes {
            ($($size:literal)*) => {
                match data.len() {
                    $($size => data.copy_from_slice(&self.read_bytes::<$size>(address)?),)*
                    _ => return Err(self.ud()),
                }
            };
        }
        sizes!(1 2 4 8 10 14 16 28 94 108 512);
        Ok(())
    }

    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), Fault> {
        macro_rules! sizes {
            ($($size:literal)*) => {
                match data.len() {
                    $($size => match data.first_chunk::<$size>() {
                        Some(&data) => self.write_bytes(address, data),
                        None => Ok(()),
                    },)*
                    _ => Err(self.ud()),
                }
            };
        }
        sizes!(1 2 4 8 10 14 16 28 94 108 288 416)
    }

    fn probe_write(&mut self, address: u64, length: usize) -> Result<(), Fault> {
        Cpu::probe_write(self, address, length as u64)
    }
}

/// The fastest function that can execute the operation.
pub(super) fn pick(instruction: &Instruction, op: &HostOp) -> Run {
    if let Some(run) = pick_move(instruction.code(), op) {
        return run;
    }
    if op.implicit.is_some() {
        return at_rdi;
    }
    let plain = matches!(op.body, Body::Stub(_)) && op.rflags == 0 && op.result == Slot::None;
    match (op.unit, op.first, op.second, op.memory) {
        (Unit::Sse, Slot::Xmm(_), Slot::Xmm(_), Memory::None) if plain => registers::<false>,
        (Unit::SseFloat, Slot::Xmm(_), Slot::Xmm(_), Memory::None) if plain => registers::<true>,
        (Unit::Sse, Slot::Xmm(_), Slot::Memory, Memory::Load) if plain => load::<false>,
        (Unit::SseFloat, Slot::Xmm(_), Slot::Memory, Memory::Load) if plain => load::<true>,
        _ => generic,
    }
}

fn pick_move(code: Code, op: &HostOp) -> Option<Run> {
    Some(match (code, op.memory) {
        (
            Code::Movups_xmm_xmmm128
            | Code::Movupd_xmm_xmmm128
            | Code::Movdqu_xmm_xmmm128
            | Code::Movaps_xmm_xmmm128
            | Code::Movapd_xmm_xmmm128
            | Code::Movdqa_xmm_xmmm128,
            Memory::Load,
        ) => load_vector,
        (
            Code::Movups_xmmm128_xmm
            | Code::Movupd_xmmm128_xmm
            | Code::Movdqu_xmmm128_xmm
            | Code::Movaps_xmmm128_xmm
            | Code::Movapd_xmmm128_xmm
            | Code::Movdqa_xmmm128_xmm,
            Memory::Store,
        ) => store_vector,
        (
            Code::Movups_xmm_xmmm128
            | Code::Movupd_xmm_xmmm128
            | Code::Movdqu_xmm_xmmm128
            | Code::Movaps_xmm_xmmm128
            | Code::Movapd_xmm_xmmm128
            | Code::Movdqa_xmm_xmmm128,
            Memory::None,
        ) => copy_vector,
        (Code::Movq_xmm_xmmm64 | Code::Movq_xmm_rm64 | Code::Movsd_xmm_xmmm64, Memory::Load) => {
            load_zeroed::<8>
        }
        (Code::Movd_xmm_rm32 | Code::Movss_xmm_xmmm32, Memory::Load) => load_zeroed::<4>,
        (Code::Movq_xmmm64_xmm | Code::Movq_rm64_xmm | Code::Movsd_xmmm64_xmm, Memory::Store) => {
            store_low::<8>
        }
        (Code::Movd_rm32_xmm | Code::Movss_xmmm32_xmm, Memory::Store) => store_low::<4>,
        _ => return None,
    })
}

fn generic(cpu: &mut Cpu, op: &HostOp, address: u64) -> Result<(), Fault> {
    op.execute(cpu, address)
}

/// An instruction whose memory operand is at rDI; the decoder reports no memory operand for it.
fn at_rdi(cpu: &mut Cpu, op: &HostOp, _address: u64) -> Result<(), Fault> {
    let Some((segment, bytes)) = op.implicit else { return Err(cpu.ud()) };
    let offset = Cpu::gpr(cpu, 7) & (u64::MAX >> (64 - 8 * u32::from(bytes)));
    match cpu.segment_address(usize::from(segment), offset, u64::from(op.length), true) {
        Ok(address) => op.execute(cpu, address),
        Err(fault) => {
            if op.unit.is_mmx() {
                cpu.resident.settle(&mut cpu.fpu);
                cpu.fpu.enter_mmx();
            }
            Err(fault)
        }
    }
}

fn xmm(cpu: &mut Cpu, slot: Slot) -> *mut u128 {
    let number = if let Slot::Xmm(number) = slot { number } else { 0 };
    &raw mut cpu.fpu.xmm[usize::from(number & 15)]
}

fn registers<const FLOAT: bool>(cpu: &mut Cpu, op: &HostOp, address: u64) -> Result<(), Fault> {
    let Body::Stub(stub) = op.body else { return generic(cpu, op, address) };
    if FLOAT && !cpu.resident.enter_mxcsr(&cpu.fpu) {
        return generic(cpu, op, address);
    }
    let (first, second) = (xmm(cpu, op.first), xmm(cpu, op.second));
    // SAFETY: both operands are registers, and the stub uses no other input than XMM0 in the image.
    unsafe { stub(first.cast(), second.cast(), &raw mut cpu.fpu, 0, 0, 0) };
    Ok(())
}

fn load<const FLOAT: bool>(cpu: &mut Cpu, op: &HostOp, address: u64) -> Result<(), Fault> {
    let Body::Stub(stub) = op.body else { return generic(cpu, op, address) };
    let misaligned = op.aligned && address & 15 != 0;
    let Some(host) = cpu.host_range(address, u64::from(op.length), false).filter(|_| !misaligned) else {
        return generic(cpu, op, address);
    };
    if FLOAT && !cpu.resident.enter_mxcsr(&cpu.fpu) {
        return generic(cpu, op, address);
    }
    let first = xmm(cpu, op.first);
    // SAFETY: `host_range` found `length` readable bytes, which is what the instruction reads; they are
    // aligned as the guest's address is.
    unsafe { stub(first.cast(), host as usize as *const u8, &raw mut cpu.fpu, 0, 0, 0) };
    Ok(())
}

fn copy_vector(cpu: &mut Cpu, op: &HostOp, _address: u64) -> Result<(), Fault> {
    let (first, second) = (xmm(cpu, op.first), xmm(cpu, op.second));
    // SAFETY: both point to registers of the processor.
    unsafe { first.write(second.read()) };
    Ok(())
}

fn load_vector(cpu: &mut Cpu, op: &HostOp, address: u64) -> Result<(), Fault> {
    if op.aligned && address & 15 != 0 {
        return Err(cpu.gp());
    }
    let value = match cpu.host_range(address, 16, false) {
        // SAFETY: `host_range` found 16 readable bytes.
        Some(at) => unsafe { u128::from(host::load(at, 8)) | u128::from(host::load(at + 8, 8)) << 64 },
        None => u128::from_le_bytes(cpu.read_bytes(address)?),
    };
    // SAFETY: a register of the processor.
    unsafe { xmm(cpu, op.first).write(value) };
    Ok(())
}

fn store_vector(cpu: &mut Cpu, op: &HostOp, address: u64) -> Result<(), Fault> {
    if op.aligned && address & 15 != 0 {
        return Err(cpu.gp());
    }
    // SAFETY: a register of the processor.
    let value = unsafe { xmm(cpu, op.second).read() };
    match cpu.host_range(address, 16, true) {
        // SAFETY: `host_range` found 16 writable bytes.
        Some(at) => unsafe {
            host::store(at, 8, value as u64);
            host::store(at + 8, 8, (value >> 64) as u64);
        },
        None => cpu.write_bytes(address, value.to_le_bytes())?,
    }
    Ok(())
}

/// Loads the low part of a register and clears the rest.
fn load_zeroed<const SIZE: u64>(cpu: &mut Cpu, op: &HostOp, address: u64) -> Result<(), Fault> {
    let value = if SIZE == 8 { cpu.ld::<u64>(address)? } else { cpu.ld::<u32>(address)? };
    // SAFETY: a register of the processor.
    unsafe { xmm(cpu, op.first).write(u128::from(value)) };
    Ok(())
}

fn store_low<const SIZE: u64>(cpu: &mut Cpu, op: &HostOp, address: u64) -> Result<(), Fault> {
    // SAFETY: a register of the processor.
    let value = unsafe { xmm(cpu, op.second).read() } as u64;
    if SIZE == 8 { cpu.st::<u64>(address, value) } else { cpu.st::<u32>(address, value) }
}

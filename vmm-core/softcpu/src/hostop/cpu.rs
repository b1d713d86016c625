//! Translated instructions on the processor.

use super::exec::{Guest, Trap};
use super::op::{HostOp, Run};
use super::resident::Resident;
use crate::block::op::RIP;
use crate::cpu::{Cpu, Fault, vector};
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

/// The function that executes the operation.
pub(super) fn pick(op: &HostOp) -> Run {
    if op.implicit.is_some() { at_rdi } else { |cpu, op, address| op.execute(cpu, address) }
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

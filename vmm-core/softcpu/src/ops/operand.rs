//! Operands of instructions that are executed from their decoded form.

use iced_x86::{Instruction, OpKind, Register};

use super::width::Width;
use crate::cpu::{Cpu, Fault};

/// The number by which operations name a general-purpose register: bit 4 marks AH to BH.
pub(crate) fn encode(register: Register) -> u8 {
    let n = register.number() as u8;
    if register.size() == 1 {
        match n {
            0..=3 => n,
            4..=7 => (n - 4) | 16,
            _ => n - 4,
        }
    } else {
        n
    }
}

/// Size of an operand in bytes.
pub(crate) fn size_of(instruction: &Instruction, operand: u32) -> u64 {
    match instruction.op_kind(operand) {
        OpKind::Register => instruction.op_register(operand).size() as u64,
        OpKind::Memory => instruction.memory_size().size() as u64,
        OpKind::Immediate8 => 1,
        OpKind::Immediate16 | OpKind::Immediate8to16 => 2,
        OpKind::Immediate32 | OpKind::Immediate8to32 => 4,
        _ => 8,
    }
}

/// The segment register number of an iced segment register.
pub(crate) fn segment_number(register: Register) -> usize {
    register.number()
}

impl Cpu {
    /// Reads a general-purpose register of any size.
    pub(crate) fn register(&self, register: Register) -> u64 {
        let n = encode(register);
        match register.size() {
            1 => u8::get(self, n),
            2 => u16::get(self, n),
            4 => u32::get(self, n),
            _ => u64::get(self, n),
        }
    }

    /// Writes a general-purpose register of any size.
    pub(crate) fn set_register(&mut self, register: Register, value: u64) {
        let n = encode(register);
        match register.size() {
            1 => u8::set(self, n, value),
            2 => u16::set(self, n, value),
            4 => u32::set(self, n, value),
            _ => u64::set(self, n, value),
        }
    }

    /// Offset of the memory operand in its segment.
    pub(crate) fn memory_offset(&self, instruction: &Instruction) -> u64 {
        let part = |register: Register| match register {
            Register::None => 0,
            Register::RIP | Register::EIP => self.block_start,
            r => self.register(r),
        };
        let base = instruction.memory_base();
        let index = instruction.memory_index();
        let offset = part(base)
            .wrapping_add(part(index).wrapping_mul(u64::from(instruction.memory_index_scale())))
            .wrapping_add(instruction.memory_displacement64());
        match address_size(instruction) {
            2 => offset & 0xffff,
            4 => offset & 0xffff_ffff,
            _ => offset,
        }
    }

    /// Linear address of `size` bytes at `offset` bytes from the memory operand.
    pub(crate) fn memory_address(
        &mut self,
        instruction: &Instruction,
        offset: u64,
        size: u64,
        write: bool,
    ) -> Result<u64, Fault> {
        let at = self.memory_offset(instruction).wrapping_add(offset);
        self.segment_address(segment_number(instruction.memory_segment()), at, size, write)
    }

    /// Loads one to eight bytes at a linear address.
    pub(crate) fn load(&mut self, address: u64, size: u64) -> Result<u64, Fault> {
        match size {
            1 => self.ld::<u8>(address),
            2 => self.ld::<u16>(address),
            4 => self.ld::<u32>(address),
            8 => self.ld::<u64>(address),
            _ => self.load_slow(address, size, self.user != 0),
        }
    }

    /// Stores one to eight bytes at a linear address.
    pub(crate) fn store(&mut self, address: u64, size: u64, value: u64) -> Result<(), Fault> {
        match size {
            1 => self.st::<u8>(address, value),
            2 => self.st::<u16>(address, value),
            4 => self.st::<u32>(address, value),
            8 => self.st::<u64>(address, value),
            _ => self.store_slow(address, size, value, self.user != 0),
        }
    }

    /// Reads an operand.
    pub(crate) fn operand(&mut self, instruction: &Instruction, n: u32) -> Result<u64, Fault> {
        match instruction.op_kind(n) {
            OpKind::Register if instruction.op_register(n).is_segment_register() => {
                Ok(u64::from(self.segs[segment_number(instruction.op_register(n))].selector))
            }
            OpKind::Register => Ok(self.register(instruction.op_register(n))),
            OpKind::Memory => {
                let size = size_of(instruction, n);
                let address = self.memory_address(instruction, 0, size, false)?;
                self.load(address, size)
            }
            _ => Ok(instruction.immediate(n)),
        }
    }

    /// Writes an operand.
    pub(crate) fn set_operand(&mut self, instruction: &Instruction, n: u32, value: u64) -> Result<(), Fault> {
        if instruction.op_kind(n) == OpKind::Register {
            self.set_register(instruction.op_register(n), value);
            return Ok(());
        }
        let size = size_of(instruction, n);
        let address = self.memory_address(instruction, 0, size, true)?;
        self.store(address, size, value)
    }
}

/// Size of the address of the memory operand.
pub(crate) fn address_size(instruction: &Instruction) -> u64 {
    let base = instruction.memory_base();
    let index = instruction.memory_index();
    let register = if base == Register::None { index } else { base };
    if register != Register::None {
        return register.size() as u64;
    }
    match instruction.memory_displ_size() {
        2 => 2,
        8 => 8,
        _ => 4,
    }
}

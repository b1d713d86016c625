//! IN and OUT.

use iced_x86::Instruction;

use super::operand::size_of;
use crate::cpu::{Cpu, Fault};

impl Cpu {
    pub(crate) fn port_read(&mut self, port: u16, size: u64) -> u64 {
        self.watch_port(port, size);
        let (bus, index) = (self.bus.clone(), self.config.index);
        let mut data = [0xff; 8];
        self.outside(|| bus.io_read(index, port, &mut data[..size as usize]));
        u64::from_le_bytes(data) & (u64::MAX >> (64 - 8 * size))
    }

    pub(crate) fn port_write(&mut self, port: u16, size: u64, value: u64) {
        self.watch_port(port, size);
        let (bus, index) = (self.bus.clone(), self.config.index);
        self.outside(|| bus.io_write(index, port, &value.to_le_bytes()[..size as usize]));
    }
}

pub(crate) fn input(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let port = cpu.operand(instruction, 1)? as u16;
    let size = size_of(instruction, 0);
    cpu.check_io(port, size)?;
    let value = cpu.port_read(port, size);
    cpu.set_operand(instruction, 0, value)
}

pub(crate) fn output(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let port = cpu.operand(instruction, 0)? as u16;
    let size = size_of(instruction, 1);
    cpu.check_io(port, size)?;
    let value = cpu.operand(instruction, 1)?;
    cpu.port_write(port, size, value);
    Ok(())
}

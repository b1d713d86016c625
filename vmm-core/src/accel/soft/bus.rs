//! What the processors reach beside RAM: the interrupt controllers here, and the machine's devices.

use std::sync::Arc;

use softcpu::Bus;

use super::lapic::Apics;
use super::pit::Pit;
use crate::accel::IoBus;

const IOAPIC: u64 = crate::acpi::IOAPIC_ADDRESS as u64;
const IOAPIC_SIZE: u64 = 0x1000;

/// Answers accesses to the interrupt controllers and the timer, and passes the others on.
pub(super) struct SoftBus {
    devices: Arc<dyn IoBus>,
    apics: Arc<Apics>,
    pit: Arc<Pit>,
}

/// Whose a port is.
enum Port {
    Pic,
    Pit,
    Device,
}

fn owner(port: u16) -> Port {
    match port {
        0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => Port::Pic,
        0x40..=0x43 | 0x61 => Port::Pit,
        _ => Port::Device,
    }
}

impl SoftBus {
    pub(super) fn new(devices: Arc<dyn IoBus>, apics: Arc<Apics>, pit: Arc<Pit>) -> Self {
        Self { devices, apics, pit }
    }
}

impl Bus for SoftBus {
    fn mmio_read(&self, _vcpu: u32, gpa: u64, data: &mut [u8]) {
        match gpa.wrapping_sub(IOAPIC) {
            offset @ 0..IOAPIC_SIZE => self.apics.ioapic.read(offset, data),
            _ => self.devices.mmio_read(gpa, data),
        }
    }

    fn mmio_write(&self, _vcpu: u32, gpa: u64, data: &[u8]) {
        match gpa.wrapping_sub(IOAPIC) {
            offset @ 0..IOAPIC_SIZE => self.apics.ioapic.write(offset, data),
            _ => self.devices.mmio_write(gpa, data),
        }
    }

    fn io_read(&self, _vcpu: u32, port: u16, data: &mut [u8]) {
        match owner(port) {
            Port::Device => self.devices.port_read(port, data),
            Port::Pic => (port..).zip(data).for_each(|(port, byte)| *byte = self.apics.pic.read(port)),
            Port::Pit => (port..).zip(data).for_each(|(port, byte)| *byte = self.pit.read(port)),
        }
    }

    fn io_write(&self, _vcpu: u32, port: u16, data: &[u8]) {
        match owner(port) {
            Port::Device => self.devices.port_write(port, data),
            Port::Pic => (port..).zip(data).for_each(|(port, &byte)| self.apics.pic.write(port, byte)),
            Port::Pit => (port..).zip(data).for_each(|(port, &byte)| self.pit.write(port, byte)),
        }
    }
}

//! pvpanic: the guest's kernel tells that it crashed.

use super::{PowerEvent, PowerSink};
use crate::bus::BusDevice;

/// The I/O port that QEMU's ISA variant has.
pub const PVPANIC_PORT: u16 = 0x505;

const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 2;

/// The pvpanic device: one byte; a read returns the events that it supports.
pub struct Pvpanic {
    power: PowerSink,
}

impl Pvpanic {
    /// A device that reports to `power`.
    pub fn new(power: PowerSink) -> Self {
        Self { power }
    }
}

impl BusDevice for Pvpanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        data[0] = PANICKED | CRASH_LOADED;
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data[0] & PANICKED != 0 {
            (self.power)(PowerEvent::Panicked);
        } else if data[0] & CRASH_LOADED != 0 {
            (self.power)(PowerEvent::CrashLoaded);
        }
    }
}

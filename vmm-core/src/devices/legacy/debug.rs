//! Ports for test guests.

use super::{PowerEvent, PowerSink, SerialOutput};
use crate::bus::BusDevice;

/// The debug console of Bochs and QEMU: a byte written to the port is printed; a read returns 0xe9.
pub struct DebugConsole {
    output: Box<dyn SerialOutput>,
}

impl DebugConsole {
    /// A console that prints to `output`.
    pub fn new(output: Box<dyn SerialOutput>) -> Self {
        Self { output }
    }
}

impl BusDevice for DebugConsole {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xe9);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        self.output.write(&data[..1]);
    }
}

/// The debug-exit port: a byte written to it ends the machine with that code.
pub struct DebugExit {
    power: PowerSink,
}

impl DebugExit {
    /// A port that reports to `power`.
    pub fn new(power: PowerSink) -> Self {
        Self { power }
    }
}

impl BusDevice for DebugExit {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        (self.power)(PowerEvent::Exit(data[0]));
    }
}

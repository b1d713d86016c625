//! The keyboard controller's reset line.

use super::{PowerEvent, PowerSink};
use crate::bus::BusDevice;

/// Command that pulses the reset line.
const PULSE_RESET: u8 = 0xfe;

/// Port 0x64 of an 8042 without keyboard and mouse: only the pulse of the reset line does something.
pub struct I8042 {
    power: PowerSink,
}

impl I8042 {
    /// A controller that reports to `power`.
    pub fn new(power: PowerSink) -> Self {
        Self { power }
    }
}

impl BusDevice for I8042 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // Both buffers are empty.
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data[0] == PULSE_RESET {
            (self.power)(PowerEvent::Reset);
        }
    }
}

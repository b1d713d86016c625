//! ACPI fixed hardware: PM1a event and control blocks, PM timer, GPE0, and the reset register.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{PowerEvent, PowerSink};
use crate::bus::BusDevice;
use crate::interrupt::IrqLine;
use crate::lifecycle::{Lifecycle, LifecycleError};

/// First I/O port of the block.
pub const PM_BASE: u16 = 0x600;
/// Number of I/O ports.
pub const PM_SIZE: u16 = 0x20;
/// The FADT's reset register.
pub const RESET_PORT: u16 = PM_BASE + 0x0c;
/// The value that resets the machine.
pub const RESET_VALUE: u8 = 1;
/// `SLP_TYP` of S5 in the DSDT.
pub const S5_SLEEP_TYPE: u8 = 5;

const PM1_STS: u16 = 0x00;
const PM1_EN: u16 = 0x02;
const PM1_CNT: u16 = 0x04;
const PM_TMR: u16 = 0x08;
const RESET: u16 = 0x0c;
const GPE0_STS: u16 = 0x10;
const GPE0_EN: u16 = 0x11;

/// Bit of PM1 status and enable.
const POWER_BUTTON: u16 = 1 << 8;
const SCI_EN: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;
const PM_TIMER_HZ: u128 = 3_579_545;

#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Registers {
    status: u16,
    enable: u16,
    gpe_status: u8,
    gpe_enable: u8,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    registers: Registers,
    /// What the timer shows.
    timer: u32,
}

/// The ACPI power management registers (ACPI 6.5, section 4.8).
pub struct AcpiPm {
    registers: Mutex<Registers>,
    sci: Arc<dyn IrqLine>,
    power: PowerSink,
    epoch: Instant,
    /// What the timer was ahead of `epoch` by when its state was loaded, in ticks.
    timer_ahead: AtomicU32,
}

impl AcpiPm {
    /// Registers that raise `sci` (level-triggered) and report to `power`.
    pub fn new(sci: Arc<dyn IrqLine>, power: PowerSink) -> Self {
        Self {
            registers: Mutex::default(),
            sci,
            power,
            epoch: Instant::now(),
            timer_ahead: AtomicU32::new(0),
        }
    }

    /// Presses the power button: a guest that listens shuts down.
    pub fn press_power_button(&self) {
        let mut r = self.registers.lock();
        r.status |= POWER_BUTTON;
        self.update(&r);
    }

    /// Raises general-purpose event `bit` (0 to 7).
    pub fn raise_gpe(&self, bit: u8) {
        let mut r = self.registers.lock();
        r.gpe_status |= 1 << (bit & 7);
        self.update(&r);
    }

    fn update(&self, r: &Registers) {
        self.sci.set_level(r.status & r.enable != 0 || r.gpe_status & r.gpe_enable != 0);
    }

    fn timer(&self) -> u32 {
        let ticks = (self.epoch.elapsed().as_nanos() * PM_TIMER_HZ / 1_000_000_000) as u32;
        ticks.wrapping_add(self.timer_ahead.load(Ordering::Relaxed)) & 0xff_ffff
    }
}

impl BusDevice for AcpiPm {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let r = *self.registers.lock();
        let mut block = [0u8; PM_SIZE as usize];
        let mut put = |at: u16, bytes: &[u8]| {
            block[usize::from(at)..usize::from(at) + bytes.len()].copy_from_slice(bytes);
        };
        put(PM1_STS, &r.status.to_le_bytes());
        put(PM1_EN, &r.enable.to_le_bytes());
        put(PM1_CNT, &SCI_EN.to_le_bytes());
        put(PM_TMR, &self.timer().to_le_bytes());
        put(GPE0_STS, &[r.gpe_status, r.gpe_enable]);
        for (byte, value) in data.iter_mut().zip(block[offset as usize..].iter()) {
            *byte = *value;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut r = self.registers.lock();
        let mut control = None;
        for (at, &byte) in (offset as u16..).zip(data) {
            let (shift, word) = (8 * (at & 1), u16::from(byte));
            let merge = |old: u16| old & !(0xff << shift) | word << shift;
            match at & !1 {
                PM1_STS => r.status &= !(word << shift), // write one to clear
                PM1_EN => r.enable = merge(r.enable),
                PM1_CNT => control = Some(control.unwrap_or(0) | word << shift),
                _ => match at {
                    GPE0_STS => r.gpe_status &= !byte,
                    GPE0_EN => r.gpe_enable = byte,
                    RESET if byte == RESET_VALUE => (self.power)(PowerEvent::Reset),
                    _ => {}
                },
            }
        }
        self.update(&r);
        if let Some(control) = control
            && control & SLEEP_ENABLE != 0
            && control >> 10 & 7 == u16::from(S5_SLEEP_TYPE)
        {
            (self.power)(PowerEvent::PowerOff);
        }
    }
}

impl Lifecycle for AcpiPm {
    fn reset(&self) {
        let mut r = self.registers.lock();
        *r = Registers::default();
        self.update(&r);
    }

    fn save(&self) -> Result<serde_json::Value, LifecycleError> {
        let saved = Saved { registers: *self.registers.lock(), timer: self.timer() };
        serde_json::to_value(saved).map_err(|e| LifecycleError::State(e.to_string()))
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), LifecycleError> {
        let loaded = Saved::deserialize(state).map_err(|e| LifecycleError::State(e.to_string()))?;
        self.timer_ahead.fetch_add(loaded.timer.wrapping_sub(self.timer()), Ordering::Relaxed);
        let mut r = self.registers.lock();
        *r = loaded.registers;
        self.update(&r);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    struct Line(AtomicBool);

    impl IrqLine for Line {
        fn set_level(&self, asserted: bool) {
            self.0.store(asserted, Ordering::Relaxed);
        }
    }

    fn pm() -> (AcpiPm, Arc<Line>, Arc<Mutex<Vec<PowerEvent>>>) {
        let line = Arc::new(Line(AtomicBool::new(false)));
        let events = Arc::new(Mutex::new(Vec::new()));
        let log = events.clone();
        (AcpiPm::new(line.clone(), Arc::new(move |e| log.lock().push(e))), line, events)
    }

    #[test]
    fn power_button_raises_the_sci_until_it_is_acknowledged() {
        let (pm, line, _) = pm();
        pm.press_power_button();
        assert!(!line.0.load(Ordering::Relaxed), "not enabled");
        pm.write(2, &[0, 1]);
        assert!(line.0.load(Ordering::Relaxed));
        let mut status = [0; 2];
        pm.read(0, &mut status);
        assert_eq!(u16::from_le_bytes(status), POWER_BUTTON);
        pm.write(0, &POWER_BUTTON.to_le_bytes());
        assert!(!line.0.load(Ordering::Relaxed));
    }

    #[test]
    fn sleep_and_reset_registers_report_and_nothing_else_does() {
        let (pm, _, events) = pm();
        pm.write(4, &(SLEEP_ENABLE | 3 << 10).to_le_bytes());
        pm.write(0x0c, &[2]);
        assert!(events.lock().is_empty());
        pm.write(4, &(SLEEP_ENABLE | 5 << 10).to_le_bytes());
        pm.write(0x0c, &[1]);
        assert_eq!(*events.lock(), [PowerEvent::PowerOff, PowerEvent::Reset]);
    }

    #[test]
    fn state_survives_save_and_restore() {
        let (pm1, ..) = pm();
        pm1.write(2, &[0, 1]);
        pm1.press_power_button();
        let (pm2, line, _) = pm();
        let mut saved = pm1.save().unwrap();
        // Seconds from wrapping around, and seconds away from what the timer of a new machine shows.
        saved["timer"] = 0x80_0000.into();
        pm2.restore(&saved).unwrap();
        assert!(line.0.load(Ordering::Relaxed));
        assert!((0x80_0000..0xff_0000).contains(&pm2.timer()), "{:#x}", pm2.timer());
        assert!(pm2.restore(&serde_json::json!({"status": "x"})).is_err());
    }
}

//! The IO-APIC: 24 wired inputs (82093AA data sheet, with an EOI register as later versions have).

use std::sync::Weak;

use parking_lot::Mutex;

use super::lapic::{Apics, Delivery, Destination, Message};
use crate::accel::{AccelError, IOAPIC_PINS, IoApicState};

const PINS: usize = IOAPIC_PINS as usize;

const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
const LOGICAL: u64 = 1 << 11;
/// Delivery status and remote IRR cannot be written.
const READ_ONLY: u64 = REMOTE_IRR | 1 << 12;

// Offsets of the direct registers.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

// Indirect registers.
const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const REDIRECTION: u8 = 0x10;

/// Version 0x20 (with the EOI register), highest entry in bits 23:16.
const VERSION_VALUE: u32 = (IOAPIC_PINS - 1) << 16 | 0x20;

struct State {
    select: u8,
    id: u32,
    entries: [u64; PINS],
    /// Which inputs are asserted, after the sources of each are combined.
    levels: u32,
    /// How many sources assert each input.
    sources: [u32; PINS],
}

/// The IO-APIC.
pub(super) struct IoApic {
    state: Mutex<State>,
    apics: Weak<Apics>,
}

impl IoApic {
    pub(super) fn new(apics: Weak<Apics>) -> Self {
        let state = State { select: 0, id: 0, entries: [MASKED; PINS], levels: 0, sources: [0; PINS] };
        Self { state: Mutex::new(state), apics }
    }

    /// One of the sources of an input changed.
    pub(super) fn set_source(&self, pin: u32, asserted: bool) {
        let mut s = self.state.lock();
        let count = &mut s.sources[pin as usize];
        *count = if asserted { *count + 1 } else { count.saturating_sub(1) };
        let (level, bit) = (*count > 0, 1 << pin);
        if (s.levels & bit != 0) == level {
            return;
        }
        s.levels ^= bit;
        // An edge while the entry is masked is lost; a level is not, see the write of an entry.
        if level {
            self.service(&mut s, pin as usize);
        }
    }

    /// Sends the message of an input that became or still is asserted.
    fn service(&self, s: &mut State, pin: usize) {
        let entry = s.entries[pin];
        let level = entry & LEVEL != 0;
        if entry & MASKED != 0 || level && entry & REMOTE_IRR != 0 {
            return;
        }
        let Some(apics) = self.apics.upgrade() else { return };
        let message = Message {
            destination: Destination { id: (entry >> 56) as u32, logical: entry & LOGICAL != 0, wide: false },
            delivery: Delivery::from_bits((entry >> 8) as u32),
            vector: entry as u8,
            level,
        };
        let delivered = apics.deliver(&message);
        if level && delivered && matches!(message.delivery, Delivery::Fixed | Delivery::LowestPriority) {
            s.entries[pin] |= REMOTE_IRR;
        }
    }

    /// A processor ended the level-triggered interrupt `vector`.
    pub(super) fn end_of_interrupt(&self, vector: u8) {
        let mut s = self.state.lock();
        for pin in 0..PINS {
            let entry = s.entries[pin];
            if entry as u8 == vector && entry & REMOTE_IRR != 0 {
                s.entries[pin] &= !REMOTE_IRR;
                if s.levels & 1 << pin != 0 {
                    self.service(&mut s, pin);
                }
            }
        }
    }

    /// The state, with the inputs as they are now.
    pub(super) fn save(&self) -> IoApicState {
        let s = self.state.lock();
        let id = (s.id >> 24 & 15) as u8;
        IoApicState { select: s.select, id, levels: s.levels, redirection: s.entries.to_vec() }
    }

    /// Loads what [`Self::save`] returned. Asserted inputs are not delivered again: what was pending is in the local
    /// APICs.
    pub(super) fn load(&self, state: &IoApicState) -> Result<(), AccelError> {
        let invalid = || AccelError::InvalidState(format!("an IO-APIC has {IOAPIC_PINS} inputs"));
        let entries = state.redirection.as_slice().try_into().map_err(|_| invalid())?;
        if state.levels >> IOAPIC_PINS != 0 {
            return Err(invalid());
        }
        let mut s = self.state.lock();
        s.select = state.select;
        s.id = u32::from(state.id & 15) << 24;
        s.levels = state.levels;
        s.entries = entries;
        Ok(())
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let s = self.state.lock();
        let value = match offset & 0xff {
            SELECT => s.select.into(),
            WINDOW => match s.select {
                ID => s.id,
                ARBITRATION => s.id,
                VERSION => VERSION_VALUE,
                at => {
                    let entry = at.checked_sub(REDIRECTION).and_then(|i| s.entries.get(usize::from(i / 2)));
                    entry.map_or(0, |entry| (entry >> (32 * u32::from(at & 1))) as u32)
                }
            },
            _ => 0,
        };
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes().into_iter().chain(std::iter::repeat(0)))
        {
            *byte = value;
        }
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        let n = data.len().min(4);
        bytes[..n].copy_from_slice(&data[..n]);
        let value = u32::from_le_bytes(bytes);
        if offset & 0xff == EOI {
            return self.end_of_interrupt(value as u8);
        }
        let mut s = self.state.lock();
        match (offset & 0xff, s.select) {
            (SELECT, _) => s.select = value as u8,
            (WINDOW, ID) => s.id = value & 0x0f00_0000,
            (WINDOW, at @ REDIRECTION..) => {
                let pin = usize::from((at - REDIRECTION) / 2);
                let Some(entry) = s.entries.get_mut(pin) else { return };
                let shift = 32 * u32::from(at & 1);
                let written = *entry & !(0xffff_ffff << shift) | u64::from(value) << shift;
                *entry = written & !READ_ONLY | *entry & READ_ONLY;
                if *entry & LEVEL == 0 {
                    *entry &= !REMOTE_IRR;
                }
                // Lines are positive logic here whatever the entry's polarity says: devices assert and deassert.
                if *entry & (LEVEL | MASKED) == LEVEL && s.levels & 1 << pin != 0 {
                    self.service(&mut s, pin);
                }
            }
            _ => {}
        }
    }
}

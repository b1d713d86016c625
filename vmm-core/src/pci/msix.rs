//! The MSI-X table and its pending bits (PCI Local Bus 3.0, section 6.8.2).

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::accel::{AccelError, Vm};
use crate::interrupt::{Msi, MsiVector};
use crate::lifecycle::LifecycleError;

/// Size of one table entry in bytes: address, upper address, data, vector control.
pub const MSIX_ENTRY_SIZE: u64 = 16;
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;

#[derive(Clone, Copy, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
}

impl Entry {
    const RESET: Self = Self { address: 0, data: 0, control: 1, pending: false };

    fn word(&mut self, index: u64) -> u32 {
        match index {
            0 => self.address as u32,
            1 => (self.address >> 32) as u32,
            2 => self.data,
            _ => self.control,
        }
    }

    fn set_word(&mut self, index: u64, value: u32) {
        match index {
            0 => self.address = self.address & !0xffff_ffff | u64::from(value & !3),
            1 => self.address = self.address & 0xffff_ffff | u64::from(value) << 32,
            2 => self.data = value,
            _ => self.control = value & 1,
        }
    }
}

struct State {
    control: u16,
    entries: Vec<Entry>,
}

/// A function's MSI-X vectors.
pub struct Msix {
    vectors: Vec<Arc<dyn MsiVector>>,
    requester: AtomicU16,
    state: Mutex<State>,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    entries: Vec<Entry>,
}

impl Msix {
    /// A table of `count` vectors (1 to 2048) on `vm`.
    ///
    /// # Errors
    /// Fails when the accelerator has no vectors left or the count is out of range.
    pub fn new(vm: &dyn Vm, count: usize) -> Result<Self, AccelError> {
        if !(1..=2048).contains(&count) {
            return Err(AccelError::Unsupported(format!("{count} MSI-X vectors; use 1 to 2048")));
        }
        let vectors = (0..count).map(|_| vm.msi_vector()).collect::<Result<_, _>>()?;
        let state = Mutex::new(State { control: 0, entries: vec![Entry::RESET; count] });
        Ok(Self { vectors, requester: AtomicU16::new(0), state })
    }

    /// Sets the requester ID that the messages carry.
    pub fn set_requester(&self, requester: u16) {
        self.requester.store(requester, Ordering::Relaxed);
    }

    /// Number of vectors.
    pub fn vectors(&self) -> usize {
        self.vectors.len()
    }

    /// Size of the table in bytes.
    pub fn table_size(&self) -> u64 {
        self.vectors.len() as u64 * MSIX_ENTRY_SIZE
    }

    /// Whether the guest enabled MSI-X.
    pub fn enabled(&self) -> bool {
        self.state.lock().control & ENABLE != 0
    }

    /// Sends vector `index`, or remembers it as pending while it is masked. Without MSI-X enabled nothing happens.
    pub fn trigger(&self, index: usize) {
        let mut state = self.state.lock();
        if state.control & ENABLE == 0 {
            return;
        }
        let masked = state.control & FUNCTION_MASK != 0;
        if let Some(entry) = state.entries.get_mut(index) {
            if masked || entry.control & 1 != 0 {
                entry.pending = true;
            } else {
                self.vectors[index].trigger();
            }
        }
    }

    /// An event descriptor that sends vector `index`, or `None` when there is no such vector.
    ///
    /// # Errors
    /// Fails when the host gives no descriptor.
    pub fn event_fd(&self, index: usize) -> std::io::Result<Option<OwnedFd>> {
        self.vectors.get(index).map(|v| v.event_fd()).transpose()
    }

    /// Takes the message-control register.
    pub(super) fn set_control(&self, control: u16) {
        let mut state = self.state.lock();
        if state.control != control {
            state.control = control;
            for index in 0..self.vectors.len() {
                self.update(&mut state, index);
            }
        }
    }

    /// Programs the vector as its entry and the control register say, and sends what was pending.
    fn update(&self, state: &mut State, index: usize) {
        let open = state.control & (ENABLE | FUNCTION_MASK) == ENABLE;
        let entry = &mut state.entries[index];
        if open && entry.control & 1 == 0 {
            let requester = self.requester.load(Ordering::Relaxed);
            let message = Msi { address: entry.address, data: entry.data, requester };
            self.vectors[index].set_message(Some(message));
            if std::mem::take(&mut entry.pending) {
                self.vectors[index].trigger();
            }
        } else {
            self.vectors[index].set_message(None);
        }
    }

    /// A guest read of the table: 4 or 8 bytes, aligned; anything else reads as ones.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.state.lock();
        data.fill(0xff);
        if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            return;
        }
        for (i, chunk) in data.chunks_exact_mut(4).enumerate() {
            let at = offset + 4 * i as u64;
            if let Some(entry) = state.entries.get_mut((at / MSIX_ENTRY_SIZE) as usize) {
                chunk.copy_from_slice(&entry.word(at % MSIX_ENTRY_SIZE / 4).to_le_bytes());
            }
        }
    }

    /// A guest write of the table: 4 or 8 bytes, aligned; anything else is ignored.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            return;
        }
        let mut state = self.state.lock();
        for (i, chunk) in data.chunks_exact(4).enumerate() {
            let at = offset + 4 * i as u64;
            let index = (at / MSIX_ENTRY_SIZE) as usize;
            if let Some(entry) = state.entries.get_mut(index) {
                let value = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
                let word = at % MSIX_ENTRY_SIZE / 4;
                let unchanged = entry.word(word) == value;
                entry.set_word(word, value);
                // The guest changes address and data while masked; only an open vector needs programming.
                if !unchanged && (word == 3 || entry.control & 1 == 0) {
                    self.update(&mut state, index);
                }
            }
        }
    }

    /// A guest read of the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock();
        for (i, byte) in data.iter_mut().enumerate() {
            let first = (offset + i as u64).saturating_mul(8) as usize;
            *byte = (0..8).fold(0, |bits, n| {
                bits | u8::from(state.entries.get(first.saturating_add(n)).is_some_and(|e| e.pending)) << n
            });
        }
    }

    /// Masks and clears all entries.
    pub fn reset(&self) {
        let mut state = self.state.lock();
        state.entries.fill(Entry::RESET);
        state.control = 0;
        for index in 0..self.vectors.len() {
            self.update(&mut state, index);
        }
    }

    /// The table and the pending bits; the control register is part of the configuration space.
    pub fn save(&self) -> serde_json::Value {
        serde_json::json!(Saved { entries: self.state.lock().entries.clone() })
    }

    /// Loads what [`Self::save`] returned.
    ///
    /// # Errors
    /// Fails when the number of vectors differs.
    pub fn restore(&self, saved: &serde_json::Value) -> Result<(), LifecycleError> {
        let saved = Saved::deserialize(saved).map_err(|e| LifecycleError::State(e.to_string()))?;
        let mut state = self.state.lock();
        if saved.entries.len() != state.entries.len() {
            return Err(LifecycleError::State("its number of MSI-X vectors is another one".into()));
        }
        state.entries = saved.entries;
        for index in 0..self.vectors.len() {
            self.update(&mut state, index);
        }
        Ok(())
    }
}

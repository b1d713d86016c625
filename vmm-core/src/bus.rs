//! The MMIO and port I/O address spaces.

use std::sync::Arc;

use parking_lot::RwLock;

/// A device that answers reads and writes at offsets within a range of an address space.
///
/// Accesses come from vCPU threads, several at once: a device locks what it must.
pub trait BusDevice: Send + Sync {
    /// Fills `data` (1 to 8 bytes) from `offset` within the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data` (1 to 8 bytes) written at `offset` within the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range cannot be registered.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or wraps around.
    #[error("Range {base:#x}+{len:#x} is empty or wraps around the address space")]
    BadRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Another device answers in part of the range.
    #[error("Range {base:#x}+{len:#x} overlaps a device at {other:#x}")]
    Overlap {
        /// First address of the refused range.
        base: u64,
        /// Length in bytes.
        len: u64,
        /// First address of the device that is already there.
        other: u64,
    },
}

#[derive(Clone)]
struct Entry {
    base: u64,
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// An address space: disjoint ranges, each answered by one device. Reads where nobody answers return all ones.
#[derive(Default)]
pub struct Bus {
    // Sorted by base. Readers clone an `Arc` only, so a device may add or remove ranges while it is being accessed
    // (a PCI BAR that the guest moves).
    entries: RwLock<Arc<Vec<Entry>>>,
}

impl Bus {
    /// An empty address space.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer in `[base, base + len)`.
    ///
    /// # Errors
    /// Fails when the range is empty, wraps, or overlaps a registered one.
    pub fn insert(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let last =
            len.checked_sub(1).and_then(|n| base.checked_add(n)).ok_or(BusError::BadRange { base, len })?;
        let mut guard = self.entries.write();
        let at = guard.partition_point(|e| e.base < base);
        let hit = guard.get(at).filter(|e| e.base <= last);
        let hit = hit.or_else(|| at.checked_sub(1).map(|i| &guard[i]).filter(|e| e.last >= base));
        if let Some(other) = hit {
            return Err(BusError::Overlap { base, len, other: other.base });
        }
        let mut entries = Vec::clone(&guard);
        entries.insert(at, Entry { base, last, device });
        *guard = Arc::new(entries);
        Ok(())
    }

    /// Removes the range that starts at `base`; true when there was one.
    pub fn remove(&self, base: u64) -> bool {
        let mut guard = self.entries.write();
        let Ok(at) = guard.binary_search_by_key(&base, |e| e.base) else { return false };
        let mut entries = Vec::clone(&guard);
        entries.remove(at);
        *guard = Arc::new(entries);
        true
    }

    /// Removes all ranges.
    pub fn clear(&self) {
        *self.entries.write() = Arc::default();
    }

    fn find(&self, address: u64, len: usize) -> Option<(Arc<dyn BusDevice>, u64)> {
        let entries = Arc::clone(&self.entries.read());
        let at = entries.partition_point(|e| e.base <= address).checked_sub(1)?;
        let e = &entries[at];
        // An access that runs over the end of a device is nobody's.
        let last = address.checked_add(len as u64 - 1)?;
        (last <= e.last).then(|| (Arc::clone(&e.device), address - e.base))
    }

    /// Reads `data.len()` bytes; true when a device answered, otherwise `data` is all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        if data.is_empty() {
            return true;
        }
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes `data`; true when a device took it.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        if data.is_empty() {
            return true;
        }
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    struct Probe(AtomicU64);

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.store(offset << 8 | u64::from(data[0]), Ordering::Relaxed);
        }
    }

    #[test]
    fn dispatches_to_the_device_that_owns_the_whole_access() {
        let bus = Bus::new();
        let probe = Arc::new(Probe(AtomicU64::new(0)));
        bus.insert(0x1000, 0x10, probe.clone()).unwrap();
        let mut data = [0; 4];
        assert!(bus.read(0x1004, &mut data));
        assert_eq!(data, [4; 4]);
        assert!(bus.write(0x100f, &[7]));
        assert_eq!(probe.0.load(Ordering::Relaxed), 0xf07);
        assert!(!bus.read(0x100e, &mut data), "an access over the end is nobody's");
        assert_eq!(data, [0xff; 4]);
        assert!(!bus.write(u64::MAX, &[1, 2]));
    }

    #[test]
    fn refuses_overlaps_and_bad_ranges() {
        let bus = Bus::new();
        let probe = Arc::new(Probe(AtomicU64::new(0)));
        bus.insert(0x1000, 0x100, probe.clone()).unwrap();
        for (base, len) in [(0xfff, 2), (0x1000, 1), (0x10ff, 8), (0x0, 0x10000)] {
            assert_eq!(
                bus.insert(base, len, probe.clone()),
                Err(BusError::Overlap { base, len, other: 0x1000 })
            );
        }
        assert!(matches!(bus.insert(5, 0, probe.clone()), Err(BusError::BadRange { .. })));
        assert!(matches!(bus.insert(u64::MAX, 2, probe.clone()), Err(BusError::BadRange { .. })));
        bus.insert(0x1100, 1, probe.clone()).unwrap();
        assert!(bus.remove(0x1000));
        assert!(!bus.remove(0x1000));
        bus.insert(0x10ff, 1, probe).unwrap();
    }
}

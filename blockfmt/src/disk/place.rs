//! Where the bytes of a request are, for those who move them without this process.

use super::{Disk, State, check};
use crate::gate::Hold;
use crate::layer::LayerHold;
use crate::{Error, Extent, Gather, Result, Source, Storage};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A range of a file that belongs to a range of the disk as long as this lives.
pub(crate) struct Held {
    storage: Arc<dyn Storage>,
    /// The descriptor, which is open as long as the storage lives.
    fd: RawFd,
    /// First byte in the file.
    offset: u64,
    /// First byte on the disk.
    guest: u64,
    _layer: LayerHold,
    state: Hold<Arc<State>>,
}

impl Held {
    /// The file, and the first byte in it.
    pub fn file(&self) -> (RawFd, u64) {
        (self.fd, self.offset)
    }

    /// What `offset` and length of a transfer have to be multiples of; see [`Storage::alignment`].
    pub fn alignment(&self) -> u64 {
        self.storage.alignment() as u64
    }

    /// Name of the file.
    pub fn name(&self) -> String {
        self.storage.name()
    }

    /// Writes all bytes of the range.
    pub fn write(&self, bytes: Gather<'_>) -> Result<()> {
        self.storage.writev(bytes, self.offset).map_err(|e| Error::io("write", self.storage.name(), e))
    }

    /// Tells the layer that the whole range of `len` bytes was written, or may have been.
    pub fn written(&self, len: u64) {
        self.state.top().written(self.guest, len);
    }
}

/// Where all bytes of a request are.
pub(crate) enum Place {
    /// In a file as they are.
    File(Held),
    /// Nowhere: they are zero.
    Zero,
    /// In several places, or only the disk itself can read or change them, or knows what is wrong.
    Elsewhere,
}

impl Disk {
    /// Where a read finds its bytes. Does not wait for others who use the disk.
    pub(crate) fn place_to_read(&self, guest: u64, len: u64) -> Place {
        let Some(state) = self.hold(guest, len) else { return Place::Elsewhere };
        let mut found = None;
        for layer in &state.layers {
            match layer.size() {
                size if guest >= size => return Place::Zero,
                size if len > size - guest => return Place::Elsewhere,
                _ => {}
            }
            let Some(hold) = layer.try_hold() else { return Place::Elsewhere };
            match layer.resolve_read(guest, len) {
                Ok(Extent { len: n, source }) if n == len => match source {
                    Source::Below => {}
                    Source::Zero { .. } => return Place::Zero,
                    Source::Data { file, offset } => {
                        found = Some((layer.data_file(file).clone(), offset, hold));
                        break;
                    }
                    Source::Opaque { .. } => return Place::Elsewhere,
                },
                _ => return Place::Elsewhere,
            }
        }
        let Some((storage, offset, _layer)) = found else { return Place::Zero };
        in_file(storage, offset, guest, _layer, state)
    }

    /// Where a write may put its bytes without any other change. Does not wait for others who use the disk.
    pub(crate) fn place_to_write(&self, guest: u64, len: u64) -> Place {
        let Some(state) = self.hold(guest, len) else { return Place::Elsewhere };
        if self.0.read_only || !state.observers.is_empty() {
            return Place::Elsewhere;
        }
        let Some(_layer) = state.top().try_hold() else { return Place::Elsewhere };
        match state.top().resolve_write(guest, len) {
            Ok(Some(offset)) => {
                let storage = state.top().data_file(0).clone();
                if offset.saturating_add(len) > storage.writable_end() {
                    return Place::Elsewhere;
                }
                in_file(storage, offset, guest, _layer, state)
            }
            _ => Place::Elsewhere,
        }
    }

    /// Keeps the layers as they are, for a request that is in range and need not be delayed.
    fn hold(&self, guest: u64, len: u64) -> Option<Hold<Arc<State>>> {
        if self.0.throttled.load(Ordering::Acquire) {
            return None;
        }
        self.0.gate.try_hold().filter(|state| check(state, guest, len).is_ok())
    }
}

fn in_file(
    storage: Arc<dyn Storage>,
    offset: u64,
    guest: u64,
    _layer: LayerHold,
    state: Hold<Arc<State>>,
) -> Place {
    match storage.fd() {
        Some(fd) => Place::File(Held { storage, fd, offset, guest, _layer, state }),
        None => Place::Elsewhere,
    }
}

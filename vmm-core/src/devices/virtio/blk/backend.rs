//! What a block device stores its sectors in.

use std::io;

use blockfmt::queue::{Queue, QueueOptions};
use blockfmt::{Disk, Gather, Geometry, Scatter};
use parking_lot::Mutex;

/// Storage of a block device. All calls are synchronous and come from several threads at once.
///
/// A device calls these methods as long as they answer from memory. Where they let its thread sleep while other requests
/// wait, it asks for a [`queue`](Self::queue), which keeps all of them under way.
pub trait BlockBackend: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// Addressing facts for the guest.
    fn geometry(&self) -> Geometry;

    /// Fills `target` from `offset`.
    ///
    /// # Errors
    /// Fails when the storage does or the range is beyond its end.
    fn read(&self, target: Scatter<'_>, offset: u64) -> io::Result<()>;

    /// Writes all of `source` at `offset`.
    ///
    /// # Errors
    /// Fails when the storage does, is full or read-only, or the range is beyond its end.
    fn write(&self, source: Gather<'_>, offset: u64) -> io::Result<()>;

    /// Makes everything that completed before survive a crash of the host.
    ///
    /// # Errors
    /// Fails when the storage does.
    fn flush(&self) -> io::Result<()>;

    /// The contents of a range do not matter any more.
    ///
    /// # Errors
    /// As [`Self::write`].
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes a range read as zeros; with `unmap` its space may be released.
    ///
    /// # Errors
    /// As [`Self::write`].
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// Calls `callback` with the new size after every resize.
    fn on_resize(&self, callback: Box<dyn Fn(u64) + Send + Sync>);

    /// Makes a queue that does the same as the methods above and keeps many requests under way; `None` if there is no
    /// such thing. It is dropped, with nothing under way, whenever the device pauses.
    ///
    /// # Errors
    /// Fails when the host lacks the means. The device then goes on without.
    fn queue(&self, _options: QueueOptions) -> io::Result<Option<Queue>> {
        Ok(None)
    }
}

impl BlockBackend for Disk {
    fn size(&self) -> u64 {
        Self::size(self)
    }
    fn read_only(&self) -> bool {
        self.is_read_only()
    }
    fn geometry(&self) -> Geometry {
        Self::geometry(self)
    }
    fn read(&self, target: Scatter<'_>, offset: u64) -> io::Result<()> {
        Self::read(self, target, offset).map_err(io::Error::other)
    }
    fn write(&self, source: Gather<'_>, offset: u64) -> io::Result<()> {
        Self::write(self, source, offset).map_err(io::Error::other)
    }
    fn flush(&self) -> io::Result<()> {
        Self::flush(self).map_err(io::Error::other)
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        Self::discard(self, offset, len).map_err(io::Error::other)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        Self::write_zeroes(self, offset, len, unmap).map_err(io::Error::other)
    }
    fn on_resize(&self, callback: Box<dyn Fn(u64) + Send + Sync>) {
        Self::on_resize(self, callback);
    }
    fn queue(&self, options: QueueOptions) -> io::Result<Option<Queue>> {
        Queue::new(self, options).map(Some).map_err(io::Error::other)
    }
}

type ResizeCallback = Box<dyn Fn(u64) + Send + Sync>;

/// A disk in the host's memory: scratch space that vanishes with the machine.
#[derive(Default)]
pub struct MemoryDisk {
    data: Mutex<Vec<u8>>,
    callbacks: Mutex<Vec<ResizeCallback>>,
}

impl MemoryDisk {
    /// A disk of `size` zero bytes; pages that are not written cost nothing.
    pub fn new(size: usize) -> Self {
        Self { data: Mutex::new(vec![0; size]), callbacks: Mutex::default() }
    }

    /// Changes the size; new space reads as zeros.
    pub fn resize(&self, size: usize) {
        self.data.lock().resize(size, 0);
        for callback in self.callbacks.lock().iter() {
            callback(size as u64);
        }
    }

    fn range(data: &mut [u8], offset: u64, len: u64) -> io::Result<&mut [u8]> {
        let start = usize::try_from(offset).ok();
        let end = offset.checked_add(len).and_then(|end| usize::try_from(end).ok());
        let range = start.zip(end).and_then(|(start, end)| data.get_mut(start..end));
        range.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "Range beyond the end of the disk"))
    }
}

impl BlockBackend for MemoryDisk {
    fn size(&self) -> u64 {
        self.data.lock().len() as u64
    }
    fn read_only(&self) -> bool {
        false
    }
    fn geometry(&self) -> Geometry {
        let cylinders = (self.size() / 512 / (16 * 63)).clamp(1, 16383) as u16;
        Geometry {
            cylinders,
            heads: 16,
            sectors: 63,
            logical_block: 512,
            physical_block: 4096,
            cluster: 4096,
        }
    }
    fn read(&self, mut target: Scatter<'_>, offset: u64) -> io::Result<()> {
        target.copy_from(Self::range(&mut self.data.lock(), offset, target.len() as u64)?);
        Ok(())
    }
    fn write(&self, source: Gather<'_>, offset: u64) -> io::Result<()> {
        source.copy_to(Self::range(&mut self.data.lock(), offset, source.len() as u64)?);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true)
    }
    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        Self::range(&mut self.data.lock(), offset, len)?.fill(0);
        Ok(())
    }
    fn on_resize(&self, callback: ResizeCallback) {
        self.callbacks.lock().push(callback);
    }
}

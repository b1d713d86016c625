//! Flat arrays of bytes below the formats.

mod fault;
mod file;
mod lease;
mod lock;
mod memory;
mod record;

pub use fault::{Fault, FaultStorage, Operation};
pub use file::{FileOptions, FileStorage};
pub use lease::{LeaseError, Leases};
pub use lock::LockMode;
pub use memory::MemoryStorage;
pub use record::{Event, RecordingStorage};

use crate::{Gather, Scatter};
use std::fmt::Debug;
use std::fs::Metadata;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

/// What identifies a file on this host: device and inode numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// Device number of the file system (or of the device itself, for a block device).
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

impl FileId {
    /// The identity of the file that `meta` describes.
    pub(crate) fn of(meta: &Metadata) -> Self {
        match meta.file_type().is_block_device() {
            true => FileId { device: meta.rdev(), inode: 0 },
            false => FileId { device: meta.dev(), inode: meta.ino() },
        }
    }
}

/// A flat array of bytes. All methods may be called concurrently.
///
/// Transfers are complete or an error: a short transfer is continued by the implementation.
pub trait Storage: Send + Sync + Debug {
    /// Name for messages, usually a path.
    fn name(&self) -> String;

    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Whether the length is zero.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Changes the length; new bytes are zero.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Reads; bytes beyond the end are zero.
    fn readv(&self, dst: Scatter<'_>, offset: u64) -> io::Result<()>;

    /// Writes, extending the storage if needed.
    fn writev(&self, src: Gather<'_>, offset: u64) -> io::Result<()>;

    /// Copies the start of a range of `source`, from byte `from` on, to `offset` without moving it through the
    /// memory of this process, and returns the number of bytes that were copied. Where that is not possible, or
    /// fails, they are fewer than `len`, perhaps none: the caller reads and writes the rest.
    fn copy_from(&self, source: &dyn Storage, from: u64, offset: u64, len: u64) -> u64 {
        let _ = (source, from, offset, len);
        0
    }

    /// Makes everything that was written before survive a crash. A failure is sticky: data may be lost,
    /// so later calls fail too.
    fn flush(&self) -> io::Result<()>;

    /// Makes a range read as zeros, extending the storage if needed. With `unmap`, space is released.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// Releases the space of a range if that is possible; it reads as zeros or as before afterwards.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Reserves space so that later writes do not run out of it, extending the storage if needed.
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Whether the bytes at `offset` are data (`true`) or a hole, and for how many bytes at least
    /// (at most `len`). Storages that cannot tell report data.
    fn data_at(&self, offset: u64, len: u64) -> io::Result<(bool, u64)> {
        let _ = offset;
        Ok((true, len))
    }

    /// Whether bytes beyond the end read as zeros once the storage grows over them. Not so for devices.
    fn zero_beyond_end(&self) -> bool {
        true
    }

    /// Bytes taken on the host.
    fn allocated(&self) -> io::Result<u64> {
        self.len()
    }

    /// Whether writes are refused.
    fn read_only(&self) -> bool {
        false
    }

    /// Identity on this host, if the storage is a file.
    fn file_id(&self) -> Option<FileId> {
        None
    }

    /// A value that changes whenever the contents may have changed behind our back (time of last
    /// modification in nanoseconds), if known.
    fn modified(&self) -> Option<i128> {
        None
    }

    /// The descriptor, for callers that submit I/O themselves (`io_uring`). `None` if the storage does
    /// more than the file does.
    fn fd(&self) -> Option<RawFd> {
        None
    }

    /// What offsets and lengths of I/O on [`fd`](Storage::fd) have to be multiples of. Unless it is 1, memory has to be
    /// aligned to sectors of 512 bytes, too.
    fn alignment(&self) -> usize {
        1
    }

    /// Where I/O on [`fd`](Storage::fd) must stop to write: beyond, it would change the length beside others who do.
    fn writable_end(&self) -> u64 {
        0
    }

    /// Gives up (or takes again) the locks against other processes, around a hand-over.
    fn set_lock(&self, mode: LockMode) -> crate::Result<()> {
        let _ = mode;
        Ok(())
    }
}

/// Convenience over plain buffers.
impl dyn Storage {
    /// Reads into one buffer.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> crate::Result<()> {
        self.readv(Scatter::new(buf), offset).map_err(|e| crate::Error::io("read", self.name(), e))
    }

    /// Writes one buffer.
    pub fn write_at(&self, buf: &[u8], offset: u64) -> crate::Result<()> {
        self.writev(Gather::new(buf), offset).map_err(|e| crate::Error::io("write", self.name(), e))
    }

    /// [`Storage::flush`] with the crate's error.
    pub fn sync(&self) -> crate::Result<()> {
        self.flush().map_err(|e| crate::Error::io("flush", self.name(), e))
    }

    /// [`Storage::len`] with the crate's error.
    pub fn length(&self) -> crate::Result<u64> {
        self.len().map_err(|e| crate::Error::io("get the length of", self.name(), e))
    }

    /// [`Storage::set_len`] with the crate's error.
    pub fn truncate(&self, len: u64) -> crate::Result<()> {
        self.set_len(len).map_err(|e| crate::Error::io("resize", self.name(), e))
    }

    /// [`Storage::write_zeroes`] with the crate's error.
    pub fn zero(&self, offset: u64, len: u64, unmap: bool) -> crate::Result<()> {
        self.write_zeroes(offset, len, unmap).map_err(|e| crate::Error::io("zero", self.name(), e))
    }
}

/// Checks that a range neither overflows nor leaves what a file can hold.
pub(crate) fn checked_end(offset: u64, len: u64) -> io::Result<u64> {
    offset
        .checked_add(len)
        .filter(|end| *end <= i64::MAX as u64)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))
}

//! Requests of a block device (virtio 1.2, section 5.2.6).
#![expect(unsafe_code, reason = "buffers in guest memory become segments of transfers")]

use super::QUEUE_SIZE;
use super::device::Device;
use blockfmt::{Gather, Scatter};
use libc::iovec;
use std::sync::Arc;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const UNMAP: u32 = 1;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// Length of the header of a request.
const HEADER: usize = 16;
/// Length of one range of a discard or write-zeroes request.
const RANGE: usize = 16;
/// Most data of one request.
const MAX_DATA: usize = 1 << 30;

/// Limits of discard and write-zeroes requests, as drivers are told.
pub struct Limits;

impl Limits {
    pub const RANGES: u32 = 32;
    pub const RANGE_SECTORS: u32 = 1 << 21;
}

/// The descriptors of a request.
pub struct Chain {
    pub(super) memory: Arc<GuestMemoryMmap>,
    pub(super) table: GuestAddress,
    pub(super) size: u16,
    pub(super) head: u16,
}

impl Chain {
    /// Index of the first descriptor.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Calls `visit` for each buffer, until it returns `None`; `None` too when the chain is malformed.
    fn visit(&self, mut visit: impl FnMut(&Descriptor) -> Option<()>) -> Option<()> {
        let (mut table, mut count, mut index) = (self.table, self.size, self.head);
        let (mut indirect, mut seen) = (false, 0);
        loop {
            let place = table.checked_add(u64::from(index) * size_of::<Descriptor>() as u64)?;
            let descriptor: Descriptor = self.memory.read_obj(place).ok()?;
            if descriptor.refers_to_indirect_table() {
                let entries = descriptor.len() / size_of::<Descriptor>() as u32;
                let whole = descriptor.len().is_multiple_of(size_of::<Descriptor>() as u32);
                if indirect || descriptor.has_next() || !whole || !(1..=QUEUE_SIZE.into()).contains(&entries)
                {
                    return None;
                }
                (table, count, index, indirect) = (descriptor.addr(), entries as u16, 0, true);
                seen = 0;
                continue;
            }
            visit(&descriptor)?;
            seen += 1;
            if !descriptor.has_next() {
                return Some(());
            }
            index = descriptor.next();
            if index >= count || seen >= count {
                return None;
            }
        }
    }
}

/// The buffers of a request, in guest memory.
#[derive(Default)]
struct Buffers {
    readable: Vec<iovec>,
    writable: Vec<iovec>,
}

impl Buffers {
    /// Finds the buffers of a chain; `None` if it is malformed, one is not in guest memory or they are too long.
    fn collect(chain: &Chain) -> Option<Self> {
        let mut buffers = Buffers::default();
        let mut total = 0usize;
        chain.visit(|descriptor| {
            let len = descriptor.len() as usize;
            total = total.checked_add(len).filter(|total| *total <= MAX_DATA)?;
            let list = match descriptor.is_write_only() {
                true => &mut buffers.writable,
                false if buffers.writable.is_empty() => &mut buffers.readable,
                false => return None,
            };
            for slice in chain.memory.get_slices(descriptor.addr(), len) {
                let slice = slice.ok()?;
                list.push(iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
            }
            Some(())
        })?;
        Some(buffers)
    }
}

impl Device {
    /// Executes a request and returns the number of bytes that were written to its buffers.
    pub fn execute(&self, chain: &Chain) -> u32 {
        let Some(buffers) = Buffers::collect(chain) else { return 0 };
        // SAFETY: the segments are parts of the mapping that the chain keeps, and no Rust reference to guest memory
        // exists.
        let (source, mut target) =
            unsafe { (Gather::from_iovecs(&buffers.readable), Scatter::from_iovecs(&buffers.writable)) };
        let Some(room) = target.len().checked_sub(1) else { return 0 };
        let (status, written) = match source.len().checked_sub(HEADER) {
            None => (IO_ERROR, 0),
            Some(len) => {
                let mut header = [0; HEADER];
                source.slice(0, HEADER).copy_to(&mut header);
                self.run(&header, source.slice(HEADER, len), target.slice(0, room))
            }
        };
        target.slice(room, 1).copy_from(&[status]);
        written as u32 + 1
    }

    /// Runs the request and returns its status and how much it wrote to `target`.
    fn run(&self, header: &[u8; HEADER], source: Gather<'_>, mut target: Scatter<'_>) -> (u8, usize) {
        let (kind, sector) = (u32_at(header, 0), u64_at(header, 8));
        match kind {
            IN => match self.place(sector, target.len() as u64) {
                Some(offset) => {
                    let len = target.len();
                    (status(self.disk.read(target, offset)), len)
                }
                None => (IO_ERROR, 0),
            },
            OUT if !self.read_only => match self.place(sector, source.len() as u64) {
                Some(offset) => (self.settle(self.disk.write(source, offset)), 0),
                None => (IO_ERROR, 0),
            },
            FLUSH => (status(self.disk.flush()), 0),
            GET_ID => {
                let len = self.serial.len().min(target.len());
                target.copy_from(&self.serial[..len]);
                (OK, len)
            }
            DISCARD | WRITE_ZEROES if !self.read_only => (self.erase(kind, source), 0),
            OUT | DISCARD | WRITE_ZEROES => (IO_ERROR, 0),
            _ => (UNSUPPORTED, 0),
        }
    }

    /// The byte offset of whole sectors; the disk checks its end.
    fn place(&self, sector: u64, len: u64) -> Option<u64> {
        len.is_multiple_of(512).then(|| sector.checked_mul(512))?
    }

    /// The status of a change, which a driver that does not flush expects to be durable.
    fn settle(&self, result: blockfmt::Result<()>) -> u8 {
        match result {
            Ok(()) if self.write_through() => status(self.disk.flush()),
            result => status(result),
        }
    }

    fn erase(&self, kind: u32, source: Gather<'_>) -> u8 {
        let count = source.len() / RANGE;
        if count == 0 || count > Limits::RANGES as usize || !source.len().is_multiple_of(RANGE) {
            return IO_ERROR;
        }
        for n in 0..count {
            let mut range = [0; RANGE];
            source.slice(n * RANGE, RANGE).copy_to(&mut range);
            let (sectors, flags) = (u32_at(&range, 8), u32_at(&range, 12));
            if flags & !UNMAP != 0 || (kind == DISCARD && flags != 0) {
                return UNSUPPORTED;
            }
            let len = u64::from(sectors) * 512;
            let Some(offset) =
                self.place(u64_at(&range, 0), len).filter(|_| sectors <= Limits::RANGE_SECTORS)
            else {
                return IO_ERROR;
            };
            let result = match kind {
                DISCARD => self.disk.discard(offset, len),
                _ => self.disk.write_zeroes(offset, len, flags & UNMAP != 0),
            };
            if result.is_err() {
                return status(result);
            }
        }
        self.settle(Ok(()))
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

fn status(result: blockfmt::Result<()>) -> u8 {
    match result {
        Ok(()) => OK,
        Err(error) => {
            tracing::warn!(%error, "A request of a virtual machine failed");
            IO_ERROR
        }
    }
}

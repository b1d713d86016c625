//! Requests of a block device (virtio 1.2, section 5.2.6).
#![expect(unsafe_code, reason = "buffers in guest memory become segments of transfers")]

use super::QUEUE_SIZE;
use super::device::Device;
use blockfmt::{Gather, Memory, Scatter, queue};
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
    /// How many its ring took before.
    pub(super) number: u64,
}

impl Chain {
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
struct Buffers {
    header: Option<[u8; HEADER]>,
    /// What the device reads after the header.
    readable: Vec<iovec>,
    /// What the device writes before the status.
    writable: Vec<iovec>,
    status: iovec,
}

impl Buffers {
    /// Finds the buffers of a chain; `None` if it is malformed, one is not in guest memory, they are too long, or there
    /// is no place for a status.
    fn collect(chain: &Chain) -> Option<Self> {
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let mut total = 0usize;
        chain.visit(|descriptor| {
            let len = descriptor.len() as usize;
            total = total.checked_add(len).filter(|total| *total <= MAX_DATA)?;
            let list = match descriptor.is_write_only() {
                true => &mut writable,
                false if writable.is_empty() => &mut readable,
                false => return None,
            };
            for slice in chain.memory.get_slices(descriptor.addr(), len) {
                let slice = slice.ok()?;
                if !slice.is_empty() {
                    list.push(iovec {
                        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                        iov_len: slice.len(),
                    });
                }
            }
            Some(())
        })?;
        let last = writable.last_mut()?;
        last.iov_len -= 1;
        let status = iovec { iov_base: last.iov_base.wrapping_byte_add(last.iov_len), iov_len: 1 };
        if last.iov_len == 0 {
            writable.pop();
        }
        let header = take_header(&mut readable);
        Some(Buffers { header, readable, writable, status })
    }
}

/// Removes the header from the start of a list and returns it; `None` if the list is shorter.
fn take_header(list: &mut Vec<iovec>) -> Option<[u8; HEADER]> {
    let mut header = [0; HEADER];
    // SAFETY: the segments are parts of the mapping that the chain of their request keeps, and no Rust reference to
    // guest memory exists.
    let bytes = unsafe { Gather::from_iovecs(list) };
    if bytes.len() < HEADER {
        return None;
    }
    bytes.copy_to(&mut header);
    let mut left = HEADER;
    let whole = list.iter().take_while(|segment| {
        let inside = segment.iov_len <= left;
        left -= if inside { segment.iov_len } else { 0 };
        inside
    });
    let whole = whole.count();
    list.drain(..whole);
    if let Some(first) = list.first_mut() {
        *first = iovec { iov_base: first.iov_base.wrapping_byte_add(left), iov_len: first.iov_len - left };
    }
    Some(header)
}

/// A range that is discarded or zeroed.
struct Range {
    offset: u64,
    len: u64,
    /// Space may be released where zeros are written; `None` for a discard.
    unmap: Option<bool>,
}

/// What the disk has to do for a request, one after the other.
#[derive(Default)]
struct Steps {
    read: Option<u64>,
    write: Option<u64>,
    erase: std::vec::IntoIter<Range>,
    flush: bool,
}

enum Step {
    Read(u64),
    Write(u64),
    Erase(Range),
    Flush,
}

impl Iterator for Steps {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        if let Some(offset) = self.read.take() {
            Some(Step::Read(offset))
        } else if let Some(offset) = self.write.take() {
            Some(Step::Write(offset))
        } else if let Some(range) = self.erase.next() {
            Some(Step::Erase(range))
        } else {
            std::mem::take(&mut self.flush).then_some(Step::Flush)
        }
    }
}

/// A request that was taken.
pub struct Request {
    pub(super) chain: Chain,
    /// What is read or written, in guest memory, which the chain keeps mapped.
    data: Vec<iovec>,
    /// Where the status goes; `None` if the chain is malformed.
    answer: Option<iovec>,
    status: u8,
    /// Bytes that the request writes to `data`.
    written: usize,
    steps: Steps,
}

// SAFETY: the segments are parts of the mapping that the chain keeps, which any thread may use.
unsafe impl Send for Request {}

impl Request {
    /// Reads what a chain asks a device for. The guest may change it meanwhile: each part is looked at once.
    pub fn new(device: &Device, chain: Chain) -> Self {
        let Some(Buffers { header, readable, writable, status }) = Buffers::collect(&chain) else {
            let (data, steps) = (Vec::new(), Steps::default());
            return Request { chain, data, answer: None, status: IO_ERROR, written: 0, steps };
        };
        let answer = Some(status);
        let (kind, sector) = header.map_or((u32::MAX, 0), |header| (u32_at(&header, 0), u64_at(&header, 8)));
        let data = if matches!(kind, IN | GET_ID) { writable } else { readable };
        let mut request = Request { chain, data, answer, status: OK, written: 0, steps: Steps::default() };
        let steps = if header.is_some() { request.plan(device, kind, sector) } else { Err(IO_ERROR) };
        match steps {
            Ok(steps) => request.steps = steps,
            Err(status) => request.status = status,
        }
        request
    }

    /// What the disk has to do; or the status of a request for which there is nothing to do.
    fn plan(&mut self, device: &Device, kind: u32, sector: u64) -> Result<Steps, u8> {
        // SAFETY: as the fields say; no Rust reference to guest memory exists.
        let mut data = unsafe { Scatter::from_iovecs(&self.data) };
        let len = data.len();
        // A driver that does not flush expects changes to be durable.
        let flush = device.write_through();
        match kind {
            IN => {
                let read = Some(place(sector, len as u64)?);
                self.written = len;
                Ok(Steps { read, ..Steps::default() })
            }
            OUT if !device.read_only => {
                let write = Some(place(sector, len as u64)?);
                Ok(Steps { write, flush, ..Steps::default() })
            }
            FLUSH => Ok(Steps { flush: true, ..Steps::default() }),
            GET_ID => {
                self.written = device.serial.len().min(len);
                data.copy_from(&device.serial[..self.written]);
                Err(OK)
            }
            DISCARD | WRITE_ZEROES if !device.read_only => {
                Ok(Steps { erase: self.ranges(kind)?.into_iter(), flush, ..Steps::default() })
            }
            OUT | DISCARD | WRITE_ZEROES => Err(IO_ERROR),
            _ => Err(UNSUPPORTED),
        }
    }

    /// The ranges of a discard or write-zeroes request.
    fn ranges(&self, kind: u32) -> Result<Vec<Range>, u8> {
        // SAFETY: as the fields say; no Rust reference to guest memory exists.
        let data = unsafe { Gather::from_iovecs(&self.data) };
        let count = data.len() / RANGE;
        if count == 0 || count > Limits::RANGES as usize || !data.len().is_multiple_of(RANGE) {
            return Err(IO_ERROR);
        }
        let range = |n: usize| {
            let mut range = [0; RANGE];
            data.slice(n * RANGE, RANGE).copy_to(&mut range);
            let (sectors, flags) = (u32_at(&range, 8), u32_at(&range, 12));
            if flags & !UNMAP != 0 || (kind == DISCARD && flags != 0) {
                return Err(UNSUPPORTED);
            }
            if sectors > Limits::RANGE_SECTORS {
                return Err(IO_ERROR);
            }
            let len = u64::from(sectors) * 512;
            let unmap = (kind == WRITE_ZEROES).then_some(flags & UNMAP != 0);
            Ok(Range { offset: place(u64_at(&range, 0), len)?, len, unmap })
        };
        (0..count).map(range).collect()
    }

    /// Whether the disk has nothing to do for it.
    pub(super) fn is_done(&self) -> bool {
        self.steps.read.is_none()
            && self.steps.write.is_none()
            && self.steps.erase.len() == 0
            && !self.steps.flush
    }

    /// Whether it is a kind of request that may take long: more than moving bytes.
    pub(super) fn is_long(&self) -> bool {
        self.steps.flush || self.steps.erase.len() > 0
    }

    /// Does all that is to be done on a disk.
    pub fn execute(&mut self, device: &Device) {
        let disk = &device.disk;
        while let Some(step) = self.steps.next() {
            // SAFETY: as the fields say; no Rust reference to guest memory exists.
            let (source, target) =
                unsafe { (Gather::from_iovecs(&self.data), Scatter::from_iovecs(&self.data)) };
            let result = match step {
                Step::Read(offset) => disk.read(target, offset),
                Step::Write(offset) => disk.write(source, offset),
                Step::Erase(Range { offset, len, unmap: None }) => disk.discard(offset, len),
                Step::Erase(Range { offset, len, unmap: Some(unmap) }) => {
                    disk.write_zeroes(offset, len, unmap)
                }
                Step::Flush => disk.flush(),
            };
            self.note(result);
        }
    }

    /// What a queue of the disk is to do next, if anything; [`note`](Self::note) takes the result.
    ///
    /// # Safety
    /// The request is kept until that has ended: its memory is the guest's.
    pub(super) unsafe fn next(&mut self) -> Option<queue::Request> {
        Some(match self.steps.next()? {
            // SAFETY: the chain keeps the mapping as long as this lives, which the caller promises.
            Step::Read(offset) => queue::Request::Read { offset, into: unsafe { self.memory() } },
            // SAFETY: likewise.
            Step::Write(offset) => queue::Request::Write { offset, from: unsafe { self.memory() } },
            Step::Erase(Range { offset, len, unmap: None }) => queue::Request::Discard { offset, len },
            Step::Erase(Range { offset, len, unmap: Some(unmap) }) => {
                queue::Request::WriteZeroes { offset, len, unmap }
            }
            Step::Flush => queue::Request::Flush,
        })
    }

    /// # Safety
    /// As for [`next`](Self::next).
    unsafe fn memory(&mut self) -> Memory {
        // SAFETY: the caller's promise; no Rust reference to guest memory exists.
        unsafe { Memory::from_iovecs(std::mem::take(&mut self.data)) }
    }

    /// Takes the result of a step. After an error there is nothing more to do.
    pub(super) fn note(&mut self, result: blockfmt::Result<()>) {
        if let Err(error) = result {
            tracing::warn!(%error, "A request of a virtual machine failed");
            self.status = IO_ERROR;
            self.steps = Steps::default();
        }
    }

    /// Tells the guest how it ended; returns the number of bytes that were written to its buffers.
    pub(super) fn answer(&self) -> u32 {
        let Some(place) = &self.answer else { return 0 };
        // SAFETY: as the fields say; no Rust reference to guest memory exists.
        let mut place = unsafe { Scatter::from_iovecs(std::slice::from_ref(place)) };
        place.copy_from(&[self.status]);
        self.written as u32 + 1
    }
}

/// The byte offset of whole sectors; the disk checks its end.
fn place(sector: u64, len: u64) -> Result<u64, u8> {
    let offset = sector.checked_mul(512).filter(|_| len.is_multiple_of(512));
    offset.ok_or(IO_ERROR)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

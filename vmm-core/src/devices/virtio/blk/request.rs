//! What the driver asks of a block device: requests are copied out of guest memory and checked before anything is done.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use zerocopy::{FromBytes, IntoBytes};

use super::super::chain::{Chain, Segment};
use super::super::device::DeviceError;
use super::{Core, MAX_RANGE_SECTORS, MAX_RANGES, SECTOR};
use crate::memory::GuestMemory;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const UNMAP: u32 = 1;

/// The status byte of a request.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Outcome {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

#[derive(Clone, Copy, FromBytes, IntoBytes)]
#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes)]
#[repr(C)]
struct Range {
    sector: u64,
    sectors: u32,
    flags: u32,
}

/// Where the answer to a request goes.
#[derive(Clone, Copy)]
pub(super) struct Reply {
    /// What the chain is returned by.
    pub(super) head: u16,
    /// The used length of the chain.
    pub(super) used: u32,
    /// Guest address of the status byte.
    pub(super) status: u64,
}

/// A read or write within the disk.
#[derive(Clone, Copy)]
pub(super) struct Transfer {
    pub(super) read: bool,
    /// First byte on the disk.
    pub(super) offset: u64,
    /// Bytes.
    pub(super) len: u32,
}

/// A discard or write-zeroes of one range within the disk, in bytes.
#[derive(Clone, Copy)]
pub(super) struct Erase {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) how: How,
}

#[derive(Clone, Copy)]
pub(super) enum How {
    Discard,
    Zero { unmap: bool },
}

/// What is to be done for a request.
pub(super) enum Action {
    Transfer(Transfer),
    Flush,
    Erase(Vec<Erase>),
    /// Nothing any more.
    End(Outcome),
}

/// Reads a request and checks it; answers what needs no storage. The data of a transfer is put into `parts`.
pub(super) fn parse(
    core: &Core,
    chain: &Chain,
    memory: &GuestMemory,
    parts: &mut Vec<Segment>,
) -> Result<(Reply, Action), DeviceError> {
    let mut reader = chain.reader(memory);
    let header: Header = reader.read_obj()?.ok_or(DeviceError::Request("a block request has no header"))?;
    // The status is the last byte of the buffer, however it is cut into descriptors, of which none is empty.
    let last = chain.writable().last();
    let last = last.ok_or(DeviceError::Request("a block request has no room for its status"))?;
    let mut writer = chain.writer(memory);
    let used = writer.remaining();
    let reply = Reply { head: chain.head(), used, status: last.address + u64::from(last.len - 1) };
    let data_len = used - 1;
    parts.clear();
    let sector = u64::from_le(header.sector);
    let action = match u32::from_le(header.kind) {
        IN => {
            writer.take(data_len as usize, parts);
            core.transfer(sector, data_len, true)
        }
        OUT => {
            let len = reader.remaining();
            reader.take(len as usize, parts);
            core.transfer(sector, len, false)
        }
        FLUSH => Action::Flush,
        GET_ID => {
            let n = core.serial.len().min(data_len as usize);
            writer.write(&core.serial[..n])?;
            Action::End(Outcome::Ok)
        }
        kind @ (DISCARD | WRITE_ZEROES) => {
            let count = reader.remaining() / size_of::<Range>() as u32;
            let exact = reader.remaining() as usize == count as usize * size_of::<Range>();
            if count == 0 || !exact || count > MAX_RANGES {
                return Ok((reply, Action::End(Outcome::IoError)));
            }
            let mut ranges = Vec::with_capacity(count as usize);
            while let Some(range) = reader.read_obj::<Range>()? {
                match core.erase_of(kind, range) {
                    Ok(erase) => ranges.push(erase),
                    Err(outcome) => return Ok((reply, Action::End(outcome))),
                }
            }
            Action::Erase(ranges)
        }
        _ => Action::End(Outcome::Unsupported),
    };
    Ok((reply, action))
}

impl Core {
    fn transfer(&self, sector: u64, len: u32, read: bool) -> Action {
        match self.range(sector, u64::from(len)) {
            Some(offset) if read || !self.read_only => Action::Transfer(Transfer { read, offset, len }),
            _ => Action::End(Outcome::IoError),
        }
    }

    /// The byte offset of a range of whole sectors within the disk.
    fn range(&self, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(len)?;
        (len.is_multiple_of(SECTOR) && end <= self.backend.size()).then_some(offset)
    }

    fn erase_of(&self, kind: u32, range: Range) -> Result<Erase, Outcome> {
        let (sectors, flags) = (u32::from_le(range.sectors), u32::from_le(range.flags));
        let reserved = flags & !UNMAP != 0 || (kind == DISCARD && flags != 0);
        if reserved {
            return Err(Outcome::Unsupported);
        }
        let len = u64::from(sectors) * SECTOR;
        let offset = self.range(u64::from_le(range.sector), len).ok_or(Outcome::IoError)?;
        if self.read_only || sectors > MAX_RANGE_SECTORS {
            return Err(Outcome::IoError);
        }
        let how = if kind == DISCARD { How::Discard } else { How::Zero { unmap: flags & UNMAP != 0 } };
        Ok(Erase { offset, len, how })
    }

    pub(super) fn erase(&self, Erase { offset, len, how }: Erase) -> io::Result<()> {
        match how {
            How::Discard => self.backend.discard(offset, len),
            How::Zero { unmap } => self.backend.write_zeroes(offset, len, unmap),
        }
    }

    /// The outcome of something that the back-end did.
    pub(super) fn done(&self, result: io::Result<()>, counter: &AtomicU64) -> Outcome {
        match result {
            Ok(()) => {
                counter.fetch_add(1, Ordering::Relaxed);
                Outcome::Ok
            }
            Err(error) => {
                let cause = error.get_ref().and_then(|e| e.source()).map(ToString::to_string);
                tracing::warn!(%error, cause, "Block request failed");
                Outcome::IoError
            }
        }
    }

    /// [`Self::done`] of a transfer.
    pub(super) fn transferred(&self, result: io::Result<()>, read: bool, len: u32) -> Outcome {
        let c = &self.counters;
        let (count, bytes) = if read { (&c.reads, &c.read_bytes) } else { (&c.writes, &c.write_bytes) };
        let outcome = self.done(result, count);
        if outcome == Outcome::Ok {
            bytes.fetch_add(u64::from(len), Ordering::Relaxed);
        }
        outcome
    }

    /// What was left to the queue of the back-end is under way, unless that refused it.
    pub(super) fn deferred(&self, begun: io::Result<()>) -> Option<Outcome> {
        match begun {
            Ok(()) => {
                self.counters.deferred.fetch_add(1, Ordering::Relaxed);
                None
            }
            Err(error) => {
                tracing::warn!(%error, "Block request failed");
                Some(Outcome::IoError)
            }
        }
    }

    /// The answer to a request is known: puts it into guest memory and counts it. The caller returns the chain.
    pub(super) fn answer(
        &self,
        reply: Reply,
        outcome: Outcome,
        memory: &GuestMemory,
    ) -> Result<(), DeviceError> {
        if outcome != Outcome::Ok {
            self.counters.errors.fetch_add(1, Ordering::Relaxed);
        }
        self.counters.answered.fetch_add(1, Ordering::Relaxed);
        Ok(memory.write_obj(reply.status, &(outcome as u8))?)
    }
}

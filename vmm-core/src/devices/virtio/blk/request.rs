//! Executes the requests of one queue of a block device.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use zerocopy::{FromBytes, IntoBytes};

use super::super::chain::{Chain, Segment};
use super::super::device::{DeviceError, QueueHandler};
use super::super::iov::IoVectors;
use super::super::worker::Context;
use super::{Core, MAX_RANGE_SECTORS, MAX_RANGES, SECTOR};
use crate::memory::GuestMemory;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const UNMAP: u32 = 1;

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Outcome {
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

pub(super) struct Requests {
    core: Arc<Core>,
    can_flush: bool,
    chain: Chain,
    parts: Vec<Segment>,
    vectors: IoVectors,
}

impl Requests {
    pub(super) fn new(core: Arc<Core>, can_flush: bool) -> Self {
        Self { core, can_flush, chain: Chain::default(), parts: Vec::new(), vectors: IoVectors::default() }
    }

    /// Executes a request; returns the used length.
    fn execute(&mut self, chain: &Chain, memory: &GuestMemory) -> Result<u32, DeviceError> {
        let mut reader = chain.reader(memory);
        let header: Header =
            reader.read_obj()?.ok_or(DeviceError::Request("a block request has no header"))?;
        let mut writer = chain.writer(memory);
        let capacity = writer.remaining();
        let data_len = capacity
            .checked_sub(1)
            .ok_or(DeviceError::Request("a block request has no room for its status"))?;
        self.parts.clear();
        let sector = u64::from_le(header.sector);
        let outcome = match u32::from_le(header.kind) {
            IN => {
                writer.take(data_len as usize, &mut self.parts);
                self.transfer(memory, sector, data_len, true)
            }
            OUT => {
                let len = reader.remaining();
                reader.take(len as usize, &mut self.parts);
                let outcome = self.transfer(memory, sector, len, false);
                if outcome == Outcome::Ok { self.settle() } else { outcome }
            }
            FLUSH => self.done(self.core.backend.flush(), &self.core.counters.flushes),
            GET_ID => {
                let n = self.core.serial.len().min(data_len as usize);
                writer.write(&self.core.serial[..n])?;
                Outcome::Ok
            }
            kind @ (DISCARD | WRITE_ZEROES) => {
                let count = reader.remaining() / size_of::<Range>() as u32;
                let exact = reader.remaining() as usize == count as usize * size_of::<Range>();
                if count == 0 || !exact || count > MAX_RANGES {
                    Outcome::IoError
                } else {
                    let mut outcome = Outcome::Ok;
                    while let Some(range) = reader.read_obj::<Range>()? {
                        outcome = self.erase(kind, range);
                        if outcome != Outcome::Ok {
                            break;
                        }
                    }
                    if outcome == Outcome::Ok { self.settle() } else { outcome }
                }
            }
            _ => Outcome::Unsupported,
        };
        if outcome != Outcome::Ok {
            self.core.counters.errors.fetch_add(1, Ordering::Relaxed);
        }
        // The status is the last byte of the buffer, however it is cut into descriptors.
        let mut status = chain.writer(memory);
        self.parts.clear();
        status.take(data_len as usize, &mut self.parts);
        status.write(&[outcome as u8])?;
        Ok(capacity)
    }

    fn done(&self, result: std::io::Result<()>, counter: &AtomicU64) -> Outcome {
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

    /// Writes through when the driver does not flush.
    fn settle(&self) -> Outcome {
        if self.can_flush && self.core.writeback.load(Ordering::Acquire) {
            return Outcome::Ok;
        }
        self.done(self.core.backend.flush(), &self.core.counters.flushes)
    }

    /// Reads into or writes from `self.parts`.
    fn transfer(&mut self, memory: &GuestMemory, sector: u64, len: u32, read: bool) -> Outcome {
        let core = &self.core;
        let Some(offset) = self.range(sector, u64::from(len)) else { return Outcome::IoError };
        if !read && core.read_only {
            return Outcome::IoError;
        }
        let Ok(mut vectors) = self.vectors.resolve(memory, &self.parts) else { return Outcome::IoError };
        let (result, count, bytes) = if read {
            let result = core.backend.read(vectors.scatter(), offset);
            // A read that fails may have written a part.
            vectors.mark_written(len as usize);
            (result, &core.counters.reads, &core.counters.read_bytes)
        } else {
            (core.backend.write(vectors.gather(), offset), &core.counters.writes, &core.counters.write_bytes)
        };
        let outcome = self.done(result, count);
        if outcome == Outcome::Ok {
            bytes.fetch_add(u64::from(len), Ordering::Relaxed);
        }
        outcome
    }

    /// The byte offset of a range of whole sectors within the disk.
    fn range(&self, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(len)?;
        (len.is_multiple_of(SECTOR) && end <= self.core.backend.size()).then_some(offset)
    }

    fn erase(&self, kind: u32, range: Range) -> Outcome {
        let (sectors, flags) = (u32::from_le(range.sectors), u32::from_le(range.flags));
        let reserved = flags & !UNMAP != 0 || (kind == DISCARD && flags != 0);
        if reserved {
            return Outcome::Unsupported;
        }
        let len = u64::from(sectors) * SECTOR;
        let Some(offset) = self.range(u64::from_le(range.sector), len) else { return Outcome::IoError };
        if self.core.read_only || sectors > MAX_RANGE_SECTORS {
            return Outcome::IoError;
        }
        let backend = &self.core.backend;
        let result = match kind {
            DISCARD => backend.discard(offset, len),
            _ => backend.write_zeroes(offset, len, flags & UNMAP != 0),
        };
        self.done(result, &self.core.counters.discards)
    }

    /// Charges a request, or says when it may go on.
    fn admit(&self, chain: &Chain) -> Result<(), Instant> {
        let mut limiter = self.core.limiter.lock();
        if limiter.is_unlimited() {
            return Ok(());
        }
        let bytes = u64::from(chain.readable_len()) + u64::from(chain.writable_len());
        limiter.take(bytes.saturating_sub(17), Instant::now())
    }

    fn serve(&mut self, index: usize, chain: &mut Chain, context: &mut Context) -> Result<(), DeviceError> {
        loop {
            let Some(queue) = &mut context.queues[index] else { return Ok(()) };
            queue.disable_notification()?;
            while !context.stopping()
                && let Some(queue) = &mut context.queues[index]
                && queue.pop(chain)?
            {
                if let Err(at) = self.admit(chain) {
                    queue.unpop();
                    self.core.counters.throttled.fetch_add(1, Ordering::Relaxed);
                    context.deadline = Some(at);
                    return Ok(());
                }
                self.core.counters.requests.fetch_add(1, Ordering::Relaxed);
                let len = self.execute(chain, &context.memory);
                self.core.counters.answered.fetch_add(1, Ordering::Relaxed);
                queue.push(chain.head(), len?)?;
                context.signal(index)?;
            }
            let Some(queue) = &mut context.queues[index] else { return Ok(()) };
            if !queue.enable_notification()? || context.stopping() {
                return Ok(());
            }
        }
    }
}

impl QueueHandler for Requests {
    fn queue(&mut self, index: usize, context: &mut Context) -> Result<(), DeviceError> {
        let mut chain = std::mem::take(&mut self.chain);
        let result = self.serve(index, &mut chain, context);
        self.chain = chain;
        result
    }

    fn timer(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        for index in 0..context.queues.len() {
            self.queue(index, context)?;
        }
        Ok(())
    }
}

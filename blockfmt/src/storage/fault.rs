//! A storage that fails on purpose.

use super::{FileId, Storage};
use crate::{Gather, Scatter};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What an operation of a [`FaultStorage`] should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing special.
    Pass,
    /// Fail with this `errno` before anything happens.
    Fail(i32),
    /// Transfer half of the bytes (whole sectors of 512 bytes), then fail with this `errno`.
    Half(i32),
    /// Wait this many microseconds first.
    Stall(u32),
}

/// The operations that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// A read.
    Read,
    /// A write, zeroing or change of length.
    Write,
    /// A flush.
    Flush,
}

type Plan = dyn Fn(Operation, u64) -> Fault + Send + Sync;

/// Passes everything to another storage unless the plan says otherwise.
pub struct FaultStorage {
    inner: Arc<dyn Storage>,
    plan: Box<Plan>,
    count: AtomicU64,
}

impl std::fmt::Debug for FaultStorage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FaultStorage").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl FaultStorage {
    /// Asks `plan` about every operation; its second argument counts operations from zero.
    pub fn new(
        inner: Arc<dyn Storage>,
        plan: impl Fn(Operation, u64) -> Fault + Send + Sync + 'static,
    ) -> Self {
        FaultStorage { inner, plan: Box::new(plan), count: AtomicU64::new(0) }
    }

    /// Number of operations so far.
    pub fn operations(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// The `errno` to fail with after half of the transfer, if any.
    fn ask(&self, operation: Operation) -> io::Result<Option<i32>> {
        match (self.plan)(operation, self.count.fetch_add(1, Ordering::Relaxed)) {
            Fault::Pass => Ok(None),
            Fault::Fail(errno) => Err(io::Error::from_raw_os_error(errno)),
            Fault::Half(errno) => Ok(Some(errno)),
            Fault::Stall(micros) => {
                std::thread::sleep(std::time::Duration::from_micros(micros.into()));
                Ok(None)
            }
        }
    }

    fn ask_whole(&self, operation: Operation) -> io::Result<()> {
        self.ask(operation)?.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }
}

fn half(len: usize) -> usize {
    len / 2 / 512 * 512
}

impl Storage for FaultStorage {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.ask_whole(Operation::Write)?;
        self.inner.set_len(len)
    }

    fn readv(&self, mut dst: Scatter<'_>, offset: u64) -> io::Result<()> {
        if let Some(errno) = self.ask(Operation::Read)? {
            let half = half(dst.len());
            self.inner.readv(dst.slice(0, half), offset)?;
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.inner.readv(dst, offset)
    }

    fn writev(&self, src: Gather<'_>, offset: u64) -> io::Result<()> {
        if let Some(errno) = self.ask(Operation::Write)? {
            self.inner.writev(src.slice(0, half(src.len())), offset)?;
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.inner.writev(src, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.ask_whole(Operation::Flush)?;
        self.inner.flush()
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.ask_whole(Operation::Write)?;
        self.inner.write_zeroes(offset, len, unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.ask_whole(Operation::Write)?;
        self.inner.discard(offset, len)
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.ask_whole(Operation::Write)?;
        self.inner.allocate(offset, len)
    }

    fn data_at(&self, offset: u64, len: u64) -> io::Result<(bool, u64)> {
        self.inner.data_at(offset, len)
    }

    fn zero_beyond_end(&self) -> bool {
        self.inner.zero_beyond_end()
    }

    fn allocated(&self) -> io::Result<u64> {
        self.inner.allocated()
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn file_id(&self) -> Option<FileId> {
        self.inner.file_id()
    }
}

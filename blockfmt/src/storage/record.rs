//! Storages that remember every write and flush, to reconstruct what a crash could leave behind.

use super::{FileId, Storage};
use crate::{Gather, Scatter};
use parking_lot::Mutex;
use std::io;
use std::sync::Arc;

/// One change of a [`RecordingStorage`], in order of submission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes were written.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes.
        data: Vec<u8>,
    },
    /// A range was zeroed (also by a discard).
    Zero {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The length changed.
    SetLen(u64),
    /// Everything before this event survives a crash after it.
    Flush,
    /// A mark of the test, such as "this request was acknowledged".
    Mark(u64),
}

/// The events of several storages in one order.
type Log = Arc<Mutex<Vec<(usize, Event)>>>;

/// Passes everything to another storage and records it.
#[derive(Debug)]
pub struct RecordingStorage {
    inner: Arc<dyn Storage>,
    name: String,
    log: Log,
    index: usize,
}

impl RecordingStorage {
    /// Records what happens to `inner` from now on.
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        RecordingStorage { name: inner.name(), inner, log: Log::default(), index: 0 }
    }

    /// Records what happens to several storages, under new names, in one record.
    pub fn group(members: Vec<(String, Arc<dyn Storage>)>) -> Vec<Arc<Self>> {
        let log = Log::default();
        let members = members.into_iter().enumerate();
        members
            .map(|(index, (name, inner))| Arc::new(RecordingStorage { inner, name, log: log.clone(), index }))
            .collect()
    }

    /// Adds a mark to the record.
    pub fn mark(&self, value: u64) {
        self.log.lock().push((self.index, Event::Mark(value)));
    }

    /// A copy of the record of this storage.
    pub fn events(&self) -> Vec<Event> {
        self.log.lock().iter().filter(|(index, _)| *index == self.index).map(|(_, e)| e.clone()).collect()
    }

    /// A copy of the record of all storages of the group, with their numbers.
    pub fn group_events(&self) -> Vec<(usize, Event)> {
        self.log.lock().clone()
    }
}

impl Storage for RecordingStorage {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut events = self.log.lock();
        self.inner.set_len(len)?;
        events.push((self.index, Event::SetLen(len)));
        Ok(())
    }

    fn readv(&self, dst: Scatter<'_>, offset: u64) -> io::Result<()> {
        self.inner.readv(dst, offset)
    }

    fn writev(&self, src: Gather<'_>, offset: u64) -> io::Result<()> {
        let data = src.to_vec();
        let mut events = self.log.lock();
        self.inner.writev(Gather::new(&data), offset)?;
        events.push((self.index, Event::Write { offset, data }));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let mut events = self.log.lock();
        self.inner.flush()?;
        events.push((self.index, Event::Flush));
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let mut events = self.log.lock();
        self.inner.write_zeroes(offset, len, unmap)?;
        events.push((self.index, Event::Zero { offset, len }));
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = self.len()?.min(offset.saturating_add(len));
        if end <= offset {
            return Ok(());
        }
        let mut events = self.log.lock();
        self.inner.discard(offset, end - offset)?;
        events.push((self.index, Event::Zero { offset, len: end - offset }));
        Ok(())
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut events = self.log.lock();
        self.inner.allocate(offset, len)?;
        events.push((self.index, Event::SetLen(self.inner.len()?)));
        Ok(())
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

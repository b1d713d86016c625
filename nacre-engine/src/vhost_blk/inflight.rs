//! The record of requests in flight (vhost-user specification, "Inflight I/O tracking", split virtqueues).
//!
//! It is shared memory that the front-end keeps while the back-end is away. A queue's part:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | features, 0 |
//! | 8 | 2 | version: 1, 0 before the first use |
//! | 10 | 2 | number of descriptors |
//! | 12 | 2 | head of the last batch of completed requests |
//! | 14 | 2 | used index when that batch was recorded |
//! | 16 + 16 i | 1 | 1 while the request whose first descriptor is `i` is in flight |
//! | 22 + 16 i | 2 | the next of its batch |
//! | 24 + 16 i | 8 | the larger, the later it was taken |
//!
//! The parts begin at multiples of 64. All of it is as hostile as the rest of a guest's memory.

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

const HEADER: usize = 16;
const ENTRY: usize = 16;
const ALIGNMENT: usize = 64;
const VERSION: u16 = 1;

const AT_VERSION: usize = 8;
const AT_COUNT: usize = 10;
const AT_LAST_HEAD: usize = 12;
const AT_USED: usize = 14;
const AT_NEXT: usize = 6;
const AT_COUNTER: usize = 8;

/// Whether a file has this part of it: what is mapped beyond the end would be a fault for whoever looks at it.
pub fn reaches(file: &File, offset: u64, len: u64) -> io::Result<bool> {
    let metadata = file.metadata()?;
    Ok(!metadata.is_file() || offset.checked_add(len).is_some_and(|end| end <= metadata.len()))
}

/// The memory of the records of all queues.
#[derive(Clone)]
pub struct Region {
    mapping: Arc<MmapRegion>,
    queues: u16,
    size: u16,
}

/// Bytes of the part of a queue.
fn stride(size: u16) -> usize {
    (HEADER + ENTRY * usize::from(size)).next_multiple_of(ALIGNMENT)
}

impl Region {
    /// Bytes for queues of a size.
    pub fn len(queues: u16, size: u16) -> usize {
        stride(size) * usize::from(queues)
    }

    /// Makes the file of an empty region, whose length cannot change.
    pub fn create(queues: u16, size: u16) -> io::Result<File> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create("inflight", flags)?);
        file.set_len(Self::len(queues, size) as u64)?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW))?;
        Ok(file)
    }

    /// Maps a file that [`create`](Self::create) made, here or in another process.
    pub fn open(file: File, offset: u64, len: u64, queues: u16, size: u16) -> io::Result<Self> {
        let wanted = Self::len(queues, size);
        if len < wanted as u64 || !reaches(&file, offset, wanted as u64)? {
            return Err(io::Error::other("The record of requests in flight is too short for its queues"));
        }
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), wanted);
        Ok(Region { mapping: Arc::new(mapping.map_err(io::Error::other)?), queues, size })
    }

    /// The record of a queue, if the region has one for a ring of this size.
    pub fn record(&self, queue: u16, size: u16) -> Option<Record> {
        (queue < self.queues && size <= self.size).then(|| Record {
            mapping: self.mapping.clone(),
            base: usize::from(queue) * stride(self.size),
            size,
            counter: 0,
        })
    }
}

/// The record of a queue.
pub struct Record {
    mapping: Arc<MmapRegion>,
    base: usize,
    size: u16,
    /// Of the request that is taken next.
    counter: u64,
}

type Result<T> = std::result::Result<T, vm_memory::VolatileMemoryError>;

impl Record {
    /// A record of a single queue in memory of its own, with these bytes at its start.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn with_bytes(size: u16, bytes: &[u8]) -> io::Result<Self> {
        let len = Region::len(1, size);
        let region = Region::open(Region::create(1, size)?, 0, len as u64, 1, size)?;
        let record = region.record(0, size).ok_or(io::ErrorKind::InvalidInput)?;
        let slice = record.slice().map_err(io::Error::other)?;
        slice.write(&bytes[..bytes.len().min(len)], 0).map_err(io::Error::other)?;
        Ok(record)
    }

    fn slice(&self) -> Result<VolatileSlice<'_>> {
        self.mapping.get_slice(self.base, HEADER + ENTRY * usize::from(self.size))
    }

    fn at(head: u16) -> usize {
        HEADER + ENTRY * usize::from(head)
    }

    /// Begins to keep the record of a ring whose used index is `used`. Returns the requests that are in flight in the
    /// order in which they were taken; `None` for a record that was not used before.
    pub fn begin(&mut self, used: u16) -> Result<Option<Vec<u16>>> {
        let slice = self.slice()?;
        let (order, size) = (Ordering::Acquire, self.size);
        let fresh = slice.load::<u16>(AT_VERSION, order)? != VERSION;
        let batch = used.wrapping_sub(slice.load::<u16>(AT_USED, order)?);
        if fresh || batch > size {
            // Or it belongs to a ring that was reset since.
            for head in 0..size {
                slice.store(0u8, Self::at(head), Ordering::Release)?;
            }
            slice.store(size, AT_COUNT, Ordering::Release)?;
            slice.store(used, AT_USED, Ordering::Release)?;
            slice.store(VERSION, AT_VERSION, Ordering::Release)?;
            return Ok(None);
        }
        // The driver was told of the last batch, and the record was not.
        let mut head: u16 = slice.load(AT_LAST_HEAD, order)?;
        for _ in 0..batch {
            if head >= size {
                break;
            }
            slice.store(0u8, Self::at(head), Ordering::Release)?;
            head = slice.load(Self::at(head) + AT_NEXT, order)?;
        }
        slice.store(used, AT_USED, Ordering::Release)?;
        let mut list = Vec::new();
        for head in 0..size {
            if slice.load::<u8>(Self::at(head), order)? == 1 {
                list.push((slice.load::<u64>(Self::at(head) + AT_COUNTER, order)?, head));
            }
        }
        list.sort_unstable();
        let next = list.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        self.counter = next;
        Ok(Some(list.into_iter().map(|(_, head)| head).collect()))
    }

    /// A request was taken.
    pub fn taken(&mut self, head: u16) -> Result<()> {
        let counter = self.counter;
        self.counter = counter.wrapping_add(1);
        let slice = self.slice()?;
        slice.store(counter, Self::at(head) + AT_COUNTER, Ordering::Release)?;
        slice.store(1u8, Self::at(head), Ordering::Release)
    }

    /// The driver is about to be told that a request is done.
    pub fn completing(&self, head: u16) -> Result<()> {
        self.slice()?.store(head, AT_LAST_HEAD, Ordering::Release)
    }

    /// The driver was told, and the used index is `used` now.
    pub fn completed(&self, head: u16, used: u16) -> Result<()> {
        let slice = self.slice()?;
        slice.store(0u8, Self::at(head), Ordering::Release)?;
        slice.store(used, AT_USED, Ordering::Release)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes of a record: `(head, counter)` in flight, the last batch, the used index.
    fn bytes(inflight: &[(u16, u64)], batch: &[u16], used: u16) -> Vec<u8> {
        let mut bytes = vec![0; Region::len(1, 8)];
        bytes[AT_VERSION] = 1;
        bytes[AT_COUNT] = 8;
        bytes[AT_USED..][..2].copy_from_slice(&used.to_le_bytes());
        for (head, counter) in inflight {
            bytes[Record::at(*head)] = 1;
            bytes[Record::at(*head) + AT_COUNTER..][..8].copy_from_slice(&counter.to_le_bytes());
        }
        let mut at = AT_LAST_HEAD;
        for head in batch {
            bytes[at..][..2].copy_from_slice(&head.to_le_bytes());
            at = Record::at(*head) + AT_NEXT;
        }
        bytes
    }

    fn begin(bytes: &[u8], used: u16) -> Option<Vec<u16>> {
        Record::with_bytes(8, bytes).unwrap().begin(used).unwrap()
    }

    #[test]
    fn requests_in_flight_come_back_in_the_order_in_which_they_were_taken() {
        assert_eq!(begin(&[], 5), None);
        assert_eq!(begin(&bytes(&[], &[], 5), 5), Some(vec![]));
        assert_eq!(begin(&bytes(&[(1, 9), (4, 7), (6, 8)], &[], 5), 5), Some(vec![4, 6, 1]));
    }

    #[test]
    fn a_batch_that_the_driver_knows_of_is_done() {
        let flights = [(1, 9), (4, 7), (6, 8), (7, 10)];
        assert_eq!(begin(&bytes(&flights, &[6, 1], 0xffff), 1), Some(vec![4, 7]));
        assert_eq!(begin(&bytes(&flights, &[6, 1], 0xffff), 0), Some(vec![4, 1, 7]), "one of them");
        assert_eq!(begin(&bytes(&flights, &[900], 4), 5), Some(vec![4, 6, 1, 7]), "no such descriptor");
        assert_eq!(begin(&bytes(&flights, &[6], 4), 100), None, "the ring was reset");
    }

    #[test]
    fn a_request_is_in_flight_until_the_driver_is_told() {
        let file = Region::create(3, 8).unwrap();
        let len = Region::len(3, 8) as u64;
        let region = || Region::open(file.try_clone().unwrap(), 0, len, 3, 8).unwrap();
        let mut record = region().record(2, 8).unwrap();
        assert_eq!(record.begin(0).unwrap(), None);
        for head in [3, 0, 7] {
            record.taken(head).unwrap();
        }
        let again = |used| region().record(2, 8).unwrap().begin(used).unwrap().unwrap();
        assert_eq!(again(0), [3, 0, 7]);
        record.completing(0).unwrap();
        assert_eq!(again(0), [3, 0, 7]);
        record.completed(0, 1).unwrap();
        assert_eq!(again(1), [3, 7]);
        record.completing(3).unwrap();
        assert_eq!(again(2), [7], "the driver was told, the record was not");
        assert_eq!(region().record(1, 8).unwrap().begin(0).unwrap(), None, "another queue");
    }

    #[test]
    fn regions_that_are_too_small_are_refused() {
        let file = || Region::create(2, 8).unwrap();
        let len = Region::len(2, 8) as u64;
        assert!(Region::open(file(), 0, len - 1, 2, 8).is_err());
        assert!(Region::open(file(), 0, len, 3, 8).is_err(), "more queues than it has");
        assert!(Region::open(file(), 4096, len, 2, 8).is_err(), "beyond the end of the file");
        assert!(Region::open(file(), 0, len, 2, 8).unwrap().record(2, 8).is_none());
        assert!(Region::open(file(), 0, len, 2, 8).unwrap().record(0, 16).is_none());
        assert!(file().set_len(0).is_err(), "it cannot shrink");
    }
}

//! Storage in memory.

use super::{Storage, checked_end};
use crate::{Gather, Scatter};
use parking_lot::RwLock;
use std::collections::BTreeMap;
use std::io;

const PAGE: u64 = 65536;

#[derive(Clone, Debug, Default)]
struct Pages {
    len: u64,
    pages: BTreeMap<u64, Box<[u8]>>,
}

/// A sparse array of bytes in memory, for temporary layers and tests.
#[derive(Debug, Default)]
pub struct MemoryStorage(RwLock<Pages>);

impl MemoryStorage {
    /// An empty storage.
    pub fn new() -> Self {
        Self::default()
    }

    /// A storage with the given contents.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let storage = Self::new();
        storage.0.write().write(0, bytes);
        storage
    }

    /// A copy of the contents.
    pub fn to_vec(&self) -> Vec<u8> {
        let pages = self.0.read();
        let mut out = vec![0; pages.len as usize];
        pages.read(0, &mut out);
        out
    }
}

impl Clone for MemoryStorage {
    fn clone(&self) -> Self {
        MemoryStorage(RwLock::new(self.0.read().clone()))
    }
}

/// Calls `f` with page number, offset in the page and range of the buffer for each page of a range.
fn pieces(offset: u64, len: usize, mut f: impl FnMut(u64, usize, std::ops::Range<usize>)) {
    let mut done = 0;
    while done < len {
        let at = offset + done as u64;
        let skip = (at % PAGE) as usize;
        let n = (PAGE as usize - skip).min(len - done);
        f(at / PAGE, skip, done..done + n);
        done += n;
    }
}

impl Pages {
    fn read(&self, offset: u64, out: &mut [u8]) {
        pieces(offset, out.len(), |page, skip, range| match self.pages.get(&page) {
            Some(bytes) => out[range.clone()].copy_from_slice(&bytes[skip..skip + range.len()]),
            None => out[range].fill(0),
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        pieces(offset, data.len(), |page, skip, range| {
            let bytes = self.pages.entry(page).or_insert_with(|| vec![0; PAGE as usize].into());
            bytes[skip..skip + range.len()].copy_from_slice(&data[range]);
        });
        self.len = self.len.max(offset + data.len() as u64);
    }

    fn zero(&mut self, offset: u64, len: u64) {
        let end = offset + len;
        let whole: Vec<u64> = self
            .pages
            .range(offset.div_ceil(PAGE)..(end / PAGE).max(offset.div_ceil(PAGE)))
            .map(|p| *p.0)
            .collect();
        for page in whole {
            self.pages.remove(&page);
        }
        for page in [offset / PAGE, end / PAGE] {
            if let Some(bytes) = self.pages.get_mut(&page) {
                let (from, to) = (offset.max(page * PAGE), end.min((page + 1) * PAGE));
                if from < to {
                    bytes[(from - page * PAGE) as usize..(to - page * PAGE) as usize].fill(0);
                }
            }
        }
    }
}

impl Storage for MemoryStorage {
    fn name(&self) -> String {
        "memory".into()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.read().len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        checked_end(0, len)?;
        let mut pages = self.0.write();
        if len < pages.len {
            let old = pages.len;
            pages.zero(len, old - len);
        }
        pages.len = len;
        Ok(())
    }

    fn readv(&self, mut dst: Scatter<'_>, offset: u64) -> io::Result<()> {
        checked_end(offset, dst.len() as u64)?;
        let pages = self.0.read();
        pieces(offset, dst.len(), |page, skip, range| match pages.pages.get(&page) {
            Some(bytes) => dst.slice(range.start, range.len()).copy_from(&bytes[skip..skip + range.len()]),
            None => dst.slice(range.start, range.len()).zero(),
        });
        Ok(())
    }

    fn writev(&self, src: Gather<'_>, offset: u64) -> io::Result<()> {
        checked_end(offset, src.len() as u64)?;
        let data = src.to_vec();
        self.0.write().write(offset, &data);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        let end = checked_end(offset, len)?;
        let mut pages = self.0.write();
        pages.zero(offset, len);
        pages.len = pages.len.max(end);
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        checked_end(offset, len)?;
        self.0.write().zero(offset, len);
        Ok(())
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = checked_end(offset, len)?;
        let mut pages = self.0.write();
        pages.len = pages.len.max(end);
        Ok(())
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.0.read().pages.len() as u64 * PAGE)
    }
}

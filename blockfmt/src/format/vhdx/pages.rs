//! Pages of the block allocation table and of the sector bitmaps in memory.

use super::header::{PAGE, Region, le64, put};
use crate::{Result, Storage};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// Pages that are kept: 32 MiB.
const CACHED: usize = 8192;
/// Changed pages after which a flush should follow.
const CROWDED: usize = 64;

/// A page that has to be read first, by its offset in the file.
#[derive(Debug)]
pub(super) struct Missing(pub u64);

/// Cached pages by their offset in the file.
#[derive(Debug, Default)]
pub(super) struct Pages {
    map: HashMap<u64, Box<[u8]>>,
    /// Pages that are newer than in the log.
    dirty: BTreeSet<u64>,
    /// Pages that are on their way to the log and to their places.
    busy: BTreeSet<u64>,
}

/// A page with its offset in the file.
pub(super) type Image = (u64, Box<[u8]>);

impl Pages {
    /// The page that holds the byte at `at`.
    pub fn get(&self, at: u64) -> Result<&[u8], Missing> {
        let page = at / PAGE * PAGE;
        self.map.get(&page).map(|b| &b[..]).ok_or(Missing(page))
    }

    /// An entry of eight bytes.
    pub fn word(&self, at: u64) -> Result<u64, Missing> {
        Ok(le64(self.get(at)?, (at % PAGE) as usize))
    }

    /// Reads a page unless it is here.
    pub fn load(&mut self, storage: &Arc<dyn Storage>, at: u64) -> Result<&mut Box<[u8]>> {
        let page = at / PAGE * PAGE;
        if !self.map.contains_key(&page) {
            let mut bytes = vec![0; PAGE as usize];
            storage.read_at(&mut bytes, page)?;
            self.insert(page, bytes.into());
        }
        Ok(self.map.entry(page).or_default())
    }

    /// Puts a page into the cache.
    pub fn insert(&mut self, page: u64, bytes: Box<[u8]>) {
        if self.map.len() >= CACHED {
            let (dirty, busy) = (&self.dirty, &self.busy);
            self.map.retain(|p, _| dirty.contains(p) || busy.contains(p));
        }
        self.map.insert(page, bytes);
    }

    /// Changes bytes within one page.
    pub fn change(&mut self, storage: &Arc<dyn Storage>, at: u64, bytes: &[u8]) -> Result<()> {
        let page = self.load(storage, at)?;
        put(page, (at % PAGE) as usize, bytes);
        self.dirty.insert(at / PAGE * PAGE);
        Ok(())
    }

    /// Whether so much waits to be written that a flush should follow.
    pub fn crowded(&self) -> bool {
        self.dirty.len() >= CROWDED
    }

    /// Takes the changed pages, in the order in which they may become durable: bitmaps before the entries that
    /// make them count, and the table from its end, as the entry of a bitmap follows those of its blocks.
    pub fn take_dirty(&mut self, table: Region) -> Vec<Image> {
        let dirty = std::mem::take(&mut self.dirty);
        let (entries, bitmaps): (Vec<u64>, Vec<u64>) = dirty.into_iter().partition(|p| table.contains(*p));
        let order = bitmaps.into_iter().chain(entries.into_iter().rev());
        let pages: Vec<Image> = order.filter_map(|p| Some((p, self.map.get(&p)?.clone()))).collect();
        self.busy.extend(pages.iter().map(|(p, _)| *p));
        pages
    }

    /// Ends what [`take_dirty`](Self::take_dirty) began.
    pub fn settle(&mut self, pages: &[Image], written: bool) {
        self.busy.clear();
        if !written {
            self.dirty.extend(pages.iter().map(|(p, _)| *p));
        }
    }

    /// Forgets all pages. None may be dirty.
    pub fn clear(&mut self) {
        self.map.clear();
    }
}

/// Bits of sectors in a page, the least significant bit of the first byte first: whether the one at `first`
/// is set, and for how many (at most `limit`) that holds.
pub(super) fn run(page: &[u8], first: u64, limit: u64) -> (bool, u64) {
    let bit = |s: u64| page[(s / 8) as usize] >> (s % 8) & 1 != 0;
    let set = bit(first);
    let whole = if set { 0xff } else { 0 };
    let mut n = 1;
    while n < limit {
        let at = first + n;
        if at.is_multiple_of(8) && limit - n >= 8 && page[(at / 8) as usize] == whole {
            n += 8;
        } else if bit(at) == set {
            n += 1;
        } else {
            break;
        }
    }
    (set, n)
}

/// Sets bits.
pub(super) fn set(page: &mut [u8], first: u64, count: u64) {
    let mut at = first;
    while at < first + count {
        if at.is_multiple_of(8) && first + count - at >= 8 {
            page[(at / 8) as usize] = 0xff;
            at += 8;
        } else {
            page[(at / 8) as usize] |= 1 << (at % 8);
            at += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_bits() {
        let mut page = vec![0; 8];
        set(&mut page, 3, 20);
        assert_eq!(page[..3], [0xf8, 0xff, 0x7f]);
        assert_eq!(run(&page, 0, 64), (false, 3));
        assert_eq!(run(&page, 3, 61), (true, 20));
        assert_eq!(run(&page, 4, 5), (true, 5));
        assert_eq!(run(&page, 23, 41), (false, 41));
    }

    #[test]
    fn bitmaps_come_before_the_table_and_the_table_backwards() {
        let storage: Arc<dyn Storage> = Arc::new(crate::storage::MemoryStorage::new());
        let mut pages = Pages::default();
        for at in [0x1000, 0x2008, 0x9000, 0x5000] {
            pages.change(&storage, at, &[1]).unwrap();
        }
        let taken = pages.take_dirty(Region { offset: 0x1000, len: 0x2000 });
        let order: Vec<u64> = taken.iter().map(|(p, _)| *p).collect();
        assert_eq!(order, [0x5000, 0x9000, 0x2000, 0x1000]);
        pages.settle(&taken, false);
        assert_eq!(pages.take_dirty(Region { offset: 0, len: 0 }).len(), 4);
    }
}

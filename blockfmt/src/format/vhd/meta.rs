//! The block allocation table and the sector bitmaps in memory.

use super::footer::SECTOR;
use std::collections::{BTreeSet, HashMap};

/// A block without space in the file.
pub(super) const UNUSED: u32 = u32::MAX;
/// Memory for cached sector bitmaps.
const CACHE_BYTES: usize = 32 << 20;

/// Which sectors of a block are in this file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Bits {
    Full,
    /// One bit per sector, the most significant bit of the first byte first.
    Some(Box<[u8]>),
}

impl Bits {
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        if bytes.iter().all(|b| *b == 0xff) { Bits::Full } else { Bits::Some(bytes.into()) }
    }

    /// Whether the bit of `sector` is set, and for how many sectors (at most `limit`) that holds.
    pub fn run(&self, sector: u64, limit: u64) -> (bool, u64) {
        let Bits::Some(bytes) = self else { return (true, limit) };
        let bit = |s: u64| bytes[(s / 8) as usize] & (0x80 >> (s % 8)) != 0;
        let first = bit(sector);
        let mut n = 1;
        while n < limit {
            let at = sector + n;
            let whole = bytes[(at / 8) as usize];
            if at.is_multiple_of(8) && limit - n >= 8 && whole == if first { 0xff } else { 0 } {
                n += 8;
            } else if bit(at) == first {
                n += 1;
            } else {
                break;
            }
        }
        (first, n)
    }

    /// Sets bits; returns whether any changed.
    pub fn set(&mut self, sector: u64, count: u64) -> bool {
        let Bits::Some(bytes) = self else { return false };
        let mut changed = false;
        for s in sector..sector + count {
            let (byte, mask) = (&mut bytes[(s / 8) as usize], 0x80 >> (s % 8));
            changed |= *byte & mask == 0;
            *byte |= mask;
        }
        if changed && bytes.iter().all(|b| *b == 0xff) {
            *self = Bits::Full;
        }
        changed
    }

    pub fn to_bytes(&self, len: usize) -> Vec<u8> {
        match self {
            Bits::Full => vec![0xff; len],
            Bits::Some(bytes) => bytes.to_vec(),
        }
    }
}

/// What is known about the blocks of an image.
#[derive(Debug)]
pub(super) struct Meta {
    /// Sector of each block's bitmap, which its data follows.
    pub bat: Vec<u32>,
    /// Cached bitmaps.
    pub bits: HashMap<u32, Bits>,
    /// Blocks whose entry in the table is not on disk yet.
    pub pending: BTreeSet<u32>,
    /// Blocks whose bitmap is newer than on disk.
    pub dirty: BTreeSet<u32>,
    /// Where the next block goes.
    pub end: u64,
    /// The file may hold stale bytes from `end` to here.
    pub stale_end: u64,
    /// Whether the trailing footer has to be written.
    pub footer_dirty: bool,
}

impl Meta {
    /// Adds a bitmap to the cache.
    pub fn cache(&mut self, block: u32, bits: Bits, bitmap_bytes: usize) {
        if self.bits.len() >= (CACHE_BYTES / bitmap_bytes).max(64) {
            let dirty = &self.dirty;
            self.bits.retain(|b, _| dirty.contains(b));
        }
        self.bits.insert(block, bits);
    }

    /// Whether so much waits to be written that a flush should follow.
    pub fn crowded(&self, bitmap_bytes: usize) -> bool {
        self.dirty.len() >= (CACHE_BYTES / bitmap_bytes).max(64) / 2
    }

    /// The sector of the table on disk that holds the entry of `block`, as it may be written now: entries of
    /// blocks that are not durable are left out.
    pub fn table_sector(&self, block: u32) -> (u64, Vec<u8>) {
        let per_sector = (SECTOR / 4) as u32;
        let first = block / per_sector * per_sector;
        let mut out = vec![0xff; SECTOR as usize];
        for (chunk, b) in out.chunks_mut(4).zip(first..) {
            if let Some(entry) = self.bat.get(b as usize)
                && !self.pending.contains(&b)
            {
                chunk.copy_from_slice(&entry.to_be_bytes());
            }
        }
        (u64::from(first) * 4, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_bits() {
        let mut bits = Bits::Some(vec![0; 8].into());
        assert!(bits.set(3, 20));
        assert!(!bits.set(5, 2));
        assert_eq!(bits.run(0, 64), (false, 3));
        assert_eq!(bits.run(3, 64 - 3), (true, 20));
        assert_eq!(bits.run(4, 5), (true, 5));
        assert_eq!(bits.run(23, 41), (false, 41));
        assert!(bits.set(0, 64));
        assert_eq!(bits, Bits::Full);
    }
}

//! Which parts of a disk changed.

use crate::disk::Observer;
use crate::{Below, Error, Result};
use parking_lot::{Mutex, MutexGuard};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// A bitmap over a disk, one bit per granule. Changes and queries may run concurrently.
///
/// As an [`Observer`] it marks what changes.
#[derive(Debug)]
pub struct DirtyMap {
    bits: Box<[AtomicU64]>,
    granularity: u64,
    granules: u64,
    /// Marks that a backup has taken and puts back if it fails.
    lent: Mutex<Option<Box<DirtyMap>>>,
}

impl DirtyMap {
    /// A clear map of a disk of `size` bytes with granules of `granularity` bytes (a power of two).
    pub fn new(size: u64, granularity: u64) -> Result<Self> {
        if !granularity.is_power_of_two() || granularity < 512 {
            return Err(Error::InvalidOption("The granularity is a power of two of at least 512".into()));
        }
        let granules = size.div_ceil(granularity);
        if granules > 1 << 34 {
            return Err(Error::InvalidOption("The granularity is too small for a disk of this size".into()));
        }
        let bits = (0..granules.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Ok(DirtyMap { bits, granularity, granules, lent: Mutex::new(None) })
    }

    /// Bytes per granule.
    pub fn granularity(&self) -> u64 {
        self.granularity
    }

    /// Number of granules.
    pub fn granules(&self) -> u64 {
        self.granules
    }

    fn range(&self, offset: u64, len: u64) -> Range<u64> {
        let end = offset.saturating_add(len).div_ceil(self.granularity).min(self.granules);
        offset / self.granularity..end
    }

    /// Marks every granule that a range touches.
    pub fn mark(&self, offset: u64, len: u64) {
        for granule in self.range(offset, len) {
            self.bits[(granule / 64) as usize].fetch_or(1 << (granule % 64), Ordering::AcqRel);
        }
    }

    /// Clears a granule and returns whether it was marked.
    pub fn take(&self, granule: u64) -> bool {
        let mask = 1 << (granule % 64);
        self.bits[(granule / 64) as usize].fetch_and(!mask, Ordering::AcqRel) & mask != 0
    }

    /// Whether a granule is marked.
    pub fn get(&self, granule: u64) -> bool {
        self.bits[(granule / 64) as usize].load(Ordering::Acquire) >> (granule % 64) & 1 != 0
    }

    /// The first marked granule at or after `from`.
    pub fn next(&self, from: u64) -> Option<u64> {
        let mut granule = from;
        while granule < self.granules {
            let word = self.bits[(granule / 64) as usize].load(Ordering::Acquire) >> (granule % 64);
            if word != 0 {
                return Some(granule + u64::from(word.trailing_zeros())).filter(|g| *g < self.granules);
            }
            granule = (granule / 64 + 1) * 64;
        }
        None
    }

    /// The marked granules, in order.
    pub fn marked(&self) -> impl Iterator<Item = u64> {
        std::iter::successors(self.next(0), |granule| self.next(granule + 1))
    }

    /// Number of marked granules.
    pub fn count(&self) -> u64 {
        self.bits.iter().map(|w| u64::from(w.load(Ordering::Acquire).count_ones())).sum()
    }

    /// Clears all granules.
    pub(crate) fn clear(&self) -> Result<()> {
        let lent = self.lent.lock();
        match &*lent {
            Some(_) => Err(Error::Busy("this bitmap".into())),
            None => {
                self.bits.iter().for_each(|word| word.store(0, Ordering::Release));
                Ok(())
            }
        }
    }

    /// The marks with those that a backup has taken, as long as it may put them back. None are taken or put back while
    /// the result lives.
    pub(crate) fn all_marks(&self) -> AllMarks<'_> {
        AllMarks { map: self, lent: self.lent.lock() }
    }

    /// Lets the caller take the marks, and put them back.
    pub(crate) fn lend(&self) -> Result<Lent<'_>> {
        let mut lent = self.lent.lock();
        if lent.is_some() {
            return Err(Error::Busy("this bitmap".into()));
        }
        let bits = self.bits.iter().map(|_| AtomicU64::new(0)).collect();
        *lent = Some(Box::new(DirtyMap { bits, lent: Mutex::new(None), ..*self }));
        Ok(Lent(self))
    }

    /// Whether someone has taken marks and may put them back.
    pub(crate) fn is_lent(&self) -> bool {
        self.lent.lock().is_some()
    }

    /// First byte and length of a granule on a disk of `size` bytes.
    pub(crate) fn bytes(&self, granule: u64, size: u64) -> (u64, u64) {
        let offset = (granule * self.granularity).min(size);
        (offset, self.granularity.min(size - offset))
    }
}

/// See [`DirtyMap::all_marks`].
pub(crate) struct AllMarks<'a> {
    map: &'a DirtyMap,
    lent: MutexGuard<'a, Option<Box<DirtyMap>>>,
}

impl AllMarks<'_> {
    /// The first marked granule at or after `from`.
    pub(crate) fn next(&self, from: u64) -> Option<u64> {
        let lent = self.lent.as_ref().and_then(|lent| lent.next(from));
        self.map.next(from).into_iter().chain(lent).min()
    }
}

/// Marks that were taken from a map. Dropping it puts them back.
pub(crate) struct Lent<'a>(&'a DirtyMap);

impl Lent<'_> {
    /// Takes all marks and calls `each` with their granules.
    pub(crate) fn take(&self, mut each: impl FnMut(u64)) {
        let lent = self.0.lent.lock();
        let Some(lent) = &*lent else { return };
        for (word, taken) in self.0.bits.iter().zip(&lent.bits) {
            taken.fetch_or(word.swap(0, Ordering::AcqRel), Ordering::AcqRel);
        }
        lent.marked().for_each(&mut each);
    }

    /// Keeps the marks: they are not put back.
    pub(crate) fn keep(self) {
        *self.0.lent.lock() = None;
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if let Some(lent) = self.0.lent.lock().take() {
            for (word, taken) in self.0.bits.iter().zip(&lent.bits) {
                word.fetch_or(taken.load(Ordering::Acquire), Ordering::AcqRel);
            }
        }
    }
}

impl Observer for DirtyMap {
    fn after_change(&self, _disk: Below<'_>, offset: u64, len: u64) {
        self.mark(offset, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_that_are_taken_are_kept_or_put_back() {
        let map = DirtyMap::new(1000 * 512, 512).unwrap();
        map.mark(70 * 512, 512);
        let lent = map.lend().unwrap();
        let mut seen = Vec::new();
        lent.take(|granule| seen.push(granule));
        map.mark(3 * 512, 512);
        assert_eq!((seen, map.count()), (vec![70], 1));
        let marks = map.all_marks();
        assert_eq!((marks.next(0), marks.next(4)), (Some(3), Some(70)));
        drop(marks);
        assert!(map.lend().is_err() && map.clear().is_err());
        drop(lent);
        assert!(map.marked().eq([3, 70]) && !map.is_lent());
        let lent = map.lend().unwrap();
        lent.take(|_| {});
        lent.keep();
        assert!(map.all_marks().next(0).is_none());
        map.mark(0, 1);
        map.clear().unwrap();
        assert_eq!(map.count(), 0);
    }

    #[test]
    fn marks_cover_what_they_touch() {
        let map = DirtyMap::new(1000 * 512 + 1, 512).unwrap();
        assert_eq!(map.granules(), 1001);
        map.mark(511, 2);
        map.mark(1000 * 512, u64::MAX);
        assert_eq!((map.next(0), map.next(1), map.next(2), map.count()), (Some(0), Some(1), Some(1000), 3));
        assert!(map.take(1) && !map.take(1) && !map.get(1));
        assert_eq!(map.bytes(1000, 1000 * 512 + 1), (512_000, 1));
        assert!(DirtyMap::new(1, 3).is_err());
    }
}

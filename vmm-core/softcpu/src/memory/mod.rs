//! Guest-physical memory, shared by the processors and devices of a machine.
//!
//! Beside the mapping from guest-physical addresses to host memory this keeps what processors must know
//! about writes that they did not make themselves: for each page, which 64-byte lines some processor has
//! decoded instructions from, and whether the page was written since dirty tracking last looked.

mod sync;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(crate) use sync::Member;

/// Size of the pages that memory is tracked by.
pub const PAGE_SIZE: u64 = 4096;

/// A region or range of guest memory cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The region is empty, unaligned, wraps around, or exceeds 52 address bits.
    #[error("Region {gpa:#x}+{len:#x} is empty, not page-aligned or beyond the address space")]
    BadRegion {
        /// Guest-physical start.
        gpa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The region overlaps one that exists.
    #[error("Region {gpa:#x}+{len:#x} overlaps another; remove that one first")]
    Overlap {
        /// Guest-physical start.
        gpa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The range is not within one region.
    #[error("Guest-physical range {gpa:#x}+{len:#x} is not within one memory region")]
    OutOfRange {
        /// Guest-physical start.
        gpa: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// What all processors keep about one page.
#[derive(Debug, Default)]
pub(crate) struct PageMeta {
    /// Bit n: a processor decoded instructions from the 64-byte line n.
    pub code: AtomicU64,
}

/// A range of RAM or ROM.
#[derive(Debug)]
pub(crate) struct Region {
    pub gpa: u64,
    pub len: u64,
    /// Address of the host memory.
    pub host: usize,
    pub readonly: bool,
    pub pages: Box<[PageMeta]>,
    dirty: Box<[AtomicU64]>,
}

impl Region {
    #[inline]
    pub fn page(&self, gpa: u64) -> &PageMeta {
        &self.pages[((gpa - self.gpa) / PAGE_SIZE) as usize]
    }

    #[inline]
    fn dirty_bit(&self, gpa: u64) -> (&AtomicU64, u64) {
        let page = (gpa - self.gpa) / PAGE_SIZE;
        (&self.dirty[(page / 64) as usize], 1 << (page % 64))
    }

    pub fn is_dirty(&self, gpa: u64) -> bool {
        let (word, bit) = self.dirty_bit(gpa);
        word.load(Ordering::Relaxed) & bit != 0
    }

    pub fn set_dirty(&self, gpa: u64) {
        let (word, bit) = self.dirty_bit(gpa);
        if word.load(Ordering::Relaxed) & bit == 0 {
            word.fetch_or(bit, Ordering::SeqCst);
        }
    }
}

/// The regions at one moment, sorted by address.
#[derive(Debug, Default, Clone)]
pub(crate) struct Map {
    pub regions: Vec<Arc<Region>>,
}

impl Map {
    /// The region that contains `gpa`.
    #[inline]
    pub fn find(&self, gpa: u64) -> Option<&Arc<Region>> {
        self.regions.iter().find(|r| gpa.wrapping_sub(r.gpa) < r.len)
    }
}

/// The memory of a machine: a list of regions of host memory at guest-physical addresses.
///
/// Devices and other users of the host memory behind it (DMA, loaders, debuggers) must call
/// [`GuestMemory::notify_written`] after they have written to it while processors exist.
#[derive(Debug, Default)]
pub struct GuestMemory {
    map: Mutex<Arc<Map>>,
    /// Changes with `map`.
    map_generation: AtomicU64,
    dirty_tracking: AtomicBool,
    sync: sync::Sync,
}

impl GuestMemory {
    /// Memory without any region.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a region; processors see it before their next instruction boundary at which they look for
    /// events.
    ///
    /// # Errors
    /// The region is not page-aligned, or overlaps another.
    ///
    /// # Safety
    /// `host` must point to `len` bytes, readable (and writable unless `readonly`) and mapped until the
    /// region is removed or the memory is dropped. Guest code reads and writes them at any time and from
    /// any thread that runs a processor, so the rest of the program must not hold references to them.
    pub unsafe fn add_region(
        &self,
        gpa: u64,
        len: u64,
        host: *mut u8,
        readonly: bool,
    ) -> Result<(), MemoryError> {
        let bad = !(gpa | len | host as u64).is_multiple_of(PAGE_SIZE)
            || len == 0
            || gpa.checked_add(len).is_none_or(|end| end > 1 << 52);
        if bad {
            return Err(MemoryError::BadRegion { gpa, len });
        }
        let mut guard = self.lock_map();
        if guard.regions.iter().any(|r| gpa < r.gpa + r.len && r.gpa < gpa + len) {
            return Err(MemoryError::Overlap { gpa, len });
        }
        let count = (len / PAGE_SIZE) as usize;
        let region = Region {
            gpa,
            len,
            host: host as usize,
            readonly,
            pages: (0..count).map(|_| PageMeta::default()).collect(),
            dirty: (0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        };
        let mut map = Map::clone(&guard);
        let at = map.regions.partition_point(|r| r.gpa < gpa);
        map.regions.insert(at, Arc::new(region));
        self.publish(&mut guard, map);
        Ok(())
    }

    /// Removes the region that starts at `gpa`. On return no processor uses its host memory any more.
    ///
    /// # Errors
    /// No region starts there.
    pub fn remove_region(&self, gpa: u64) -> Result<(), MemoryError> {
        {
            let mut guard = self.lock_map();
            let mut map = Map::clone(&guard);
            let at = map.regions.iter().position(|r| r.gpa == gpa);
            map.regions.remove(at.ok_or(MemoryError::OutOfRange { gpa, len: 0 })?);
            self.publish(&mut guard, map);
        }
        self.sync.synchronise(None, &mut || {});
        Ok(())
    }

    fn publish(&self, guard: &mut MutexGuard<'_, Arc<Map>>, map: Map) {
        **guard = Arc::new(map);
        self.map_generation.fetch_add(1, Ordering::SeqCst);
        self.sync.request();
    }

    /// Tells the processors that something else than a processor wrote to guest memory, so that they
    /// decode changed instructions anew, and marks the pages as dirty. Ranges without memory are ignored.
    pub fn notify_written(&self, gpa: u64, len: u64) {
        if len == 0 {
            return;
        }
        // Pairs with the fence in `mark_code`: either we see the code bit or the decoder sees our bytes.
        fence(Ordering::SeqCst);
        let map = self.snapshot();
        let tracking = self.dirty_tracking.load(Ordering::Relaxed);
        let last = gpa.saturating_add(len - 1);
        for region in &map.regions {
            let (first, end) = (gpa.max(region.gpa), last.min(region.gpa + region.len - 1));
            if first > end {
                continue;
            }
            let mut at = first;
            while at <= end {
                let stop = (at | (PAGE_SIZE - 1)).min(end);
                if tracking {
                    region.set_dirty(at);
                }
                self.invalidate_code(region, at, stop - at + 1, None);
                at = stop + 1;
            }
        }
    }

    /// Starts or stops recording which pages are written. Starting begins with all pages clean.
    pub fn set_dirty_tracking(&self, on: bool) {
        if on {
            for region in &self.snapshot().regions {
                region.dirty.iter().for_each(|w| w.store(0, Ordering::Relaxed));
            }
        }
        self.dirty_tracking.store(on, Ordering::SeqCst);
        self.sync.synchronise(None, &mut || {});
    }

    /// Returns which pages of a range were written since tracking started or this was last called for
    /// them, and clears them: bit n of the result is the page at `gpa + n * PAGE_SIZE`. Writes that follow
    /// the call are reported by the next one.
    ///
    /// # Errors
    /// The range is not within one region, or not page-aligned.
    pub fn take_dirty(&self, gpa: u64, len: u64) -> Result<Vec<u64>, MemoryError> {
        let map = self.snapshot();
        let error = MemoryError::OutOfRange { gpa, len };
        let region = map.find(gpa).filter(|r| len <= r.gpa + r.len - gpa).ok_or(error)?;
        if !(gpa | len).is_multiple_of(PAGE_SIZE) {
            return Err(error);
        }
        let pages = len / PAGE_SIZE;
        let mut result = vec![0u64; pages.div_ceil(64) as usize];
        for page in 0..pages {
            let (word, bit) = region.dirty_bit(gpa + page * PAGE_SIZE);
            if word.load(Ordering::Relaxed) & bit != 0 && word.fetch_and(!bit, Ordering::SeqCst) & bit != 0 {
                result[(page / 64) as usize] |= 1 << (page % 64);
            }
        }
        // Processors may still write through translations that they made while the page was dirty.
        self.sync.synchronise(None, &mut || {});
        Ok(result)
    }

    /// Copies guest memory to `data`.
    ///
    /// # Errors
    /// The range is not within one region.
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let host = self.host_range(gpa, data.len() as u64, false)?;
        // SAFETY: `add_region`'s contract and the check in `host_range` make the range readable.
        unsafe { std::ptr::copy_nonoverlapping(host as *const u8, data.as_mut_ptr(), data.len()) };
        Ok(())
    }

    /// Copies `data` to guest memory, ROM included, and notifies the processors.
    ///
    /// # Errors
    /// The range is not within one region, or the region's host memory is read-only.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), MemoryError> {
        let host = self.host_range(gpa, data.len() as u64, true)?;
        // SAFETY: `add_region`'s contract and the check in `host_range` make the range writable.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), host as *mut u8, data.len()) };
        self.notify_written(gpa, data.len() as u64);
        Ok(())
    }

    fn host_range(&self, gpa: u64, len: u64, write: bool) -> Result<usize, MemoryError> {
        let map = self.snapshot();
        map.find(gpa)
            .filter(|r| len <= r.gpa + r.len - gpa && !(write && r.readonly))
            .map(|r| r.host + (gpa - r.gpa) as usize)
            .ok_or(MemoryError::OutOfRange { gpa, len })
    }

    fn lock_map(&self) -> MutexGuard<'_, Arc<Map>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The regions as they are now.
    pub(crate) fn snapshot(&self) -> Arc<Map> {
        self.lock_map().clone()
    }

    /// Changes whenever [`GuestMemory::snapshot`] does.
    #[inline(always)]
    pub(crate) fn map_generation(&self) -> u64 {
        self.map_generation.load(Ordering::Acquire)
    }

    pub(crate) fn dirty_tracking(&self) -> bool {
        self.dirty_tracking.load(Ordering::Relaxed)
    }

    pub(crate) fn sync(&self) -> &sync::Sync {
        &self.sync
    }

    /// If any byte of the range (within one page) was decoded as code: forgets that and tells all processors
    /// but `writer`. Returns whether it was.
    pub(crate) fn invalidate_code(
        &self,
        region: &Region,
        gpa: u64,
        len: u64,
        writer: Option<&Arc<Member>>,
    ) -> bool {
        let page = region.page(gpa);
        if page.code.load(Ordering::Relaxed) & line_mask(gpa, len) == 0 {
            return false;
        }
        page.code.store(0, Ordering::SeqCst);
        self.sync.invalidated(gpa & !(PAGE_SIZE - 1), writer);
        true
    }
}

/// The 64-byte lines of its page that a range touches, as bits.
#[inline]
pub(crate) fn line_mask(gpa: u64, len: u64) -> u64 {
    let first = (gpa % PAGE_SIZE) / 64;
    let last = ((gpa % PAGE_SIZE) + len.max(1) - 1).min(PAGE_SIZE - 1) / 64;
    (u64::MAX >> (63 - (last - first))) << first
}

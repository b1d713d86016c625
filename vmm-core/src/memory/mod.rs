//! Guest-physical RAM.
//!
//! RAM is shared memory (memfd), so that vhost-user back-ends in other processes can map it. Devices reach it through
//! [`GuestMemory`], which checks every guest address, and tells the accelerator of every write through a
//! [`WriteObserver`]: the software CPU must drop translated code, migration must see dirty pages.

mod map;

pub use map::{Backing, MapError, MemoryRegion, RegionOptions};

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use arc_swap::ArcSwapOption;

/// Size of the pages that dirty tracking and code tracking count in.
pub const PAGE_SIZE: u64 = 4096;

/// A guest address range that is not RAM.
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq, Eq)]
#[error("Guest range {address:#x}+{len:#x} is not RAM")]
pub struct AccessError {
    /// First guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Learns of every write that a device makes to guest RAM, after the bytes are visible.
pub trait WriteObserver: Send + Sync {
    /// `len` bytes at guest-physical `address` were written.
    fn written(&self, address: u64, len: u64);
}

/// All RAM of one guest. Cheap to clone; clones share everything.
#[derive(Clone)]
pub struct GuestMemory {
    inner: Arc<Inner>,
}

struct Inner {
    /// Sorted by guest address, disjoint.
    regions: Vec<MemoryRegion>,
    observer: ArcSwapOption<Box<dyn WriteObserver>>,
}

/// A part of guest RAM that is contiguous in the host: the guest and other threads may change it at any time, so it
/// is only ever copied from and to, never borrowed as a Rust slice.
pub struct GuestSlice<'a> {
    memory: &'a GuestMemory,
    address: u64,
    ptr: *mut u8,
    len: usize,
}

impl GuestMemory {
    /// Composes regions into the guest's RAM.
    ///
    /// # Errors
    /// Fails when two regions overlap.
    pub fn new(mut regions: Vec<MemoryRegion>) -> Result<Self, MapError> {
        regions.sort_by_key(MemoryRegion::guest_address);
        for pair in regions.windows(2) {
            if pair[0].end() > pair[1].guest_address() {
                return Err(MapError::Overlap { address: pair[1].guest_address() });
            }
        }
        Ok(Self { inner: Arc::new(Inner { regions, observer: ArcSwapOption::empty() }) })
    }

    /// One anonymous shared region of `size` bytes at address 0: for tests and small guests.
    ///
    /// # Errors
    /// Fails when the host does not give the memory.
    pub fn flat(size: u64) -> Result<Self, MapError> {
        Self::new(vec![MemoryRegion::allocate(0, size, &RegionOptions::default())?])
    }

    /// The regions, by ascending guest address.
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.inner.regions
    }

    /// Sum of the regions' sizes in bytes.
    pub fn total_size(&self) -> u64 {
        self.inner.regions.iter().map(MemoryRegion::size).sum()
    }

    /// Installs the observer of device writes (the accelerator's or migration's); replaces an earlier one.
    pub fn set_write_observer(&self, observer: Option<Box<dyn WriteObserver>>) {
        self.inner.observer.store(observer.map(Arc::new));
    }

    /// Whether somebody has to be told of every write: [`Self::mark_written`] is more than a formality then.
    pub fn has_write_observer(&self) -> bool {
        self.inner.observer.load().is_some()
    }

    /// Reports a write made through a raw pointer or by another process.
    pub fn mark_written(&self, address: u64, len: u64) {
        if let Some(observer) = &*self.inner.observer.load() {
            observer.written(address, len);
        }
    }

    fn region(&self, address: u64) -> Option<&MemoryRegion> {
        let regions = &self.inner.regions;
        let at = regions.partition_point(|r| r.guest_address() <= address).checked_sub(1)?;
        Some(&regions[at]).filter(|r| address < r.end())
    }

    /// The largest host-contiguous part of `[address, address + len)` that starts at `address`.
    fn head(&self, address: u64, len: usize) -> Result<GuestSlice<'_>, AccessError> {
        let error = AccessError { address, len: len as u64 };
        let region = self.region(address).ok_or(error)?;
        let offset = address - region.guest_address();
        let len = (region.size() - offset).min(len as u64) as usize;
        // SAFETY: `offset < size`, so the pointer stays inside the region's mapping.
        let ptr = unsafe { region.host_ptr().add(offset as usize) };
        Ok(GuestSlice { memory: self, address, ptr, len })
    }

    /// The range as one host-contiguous slice.
    ///
    /// # Errors
    /// Fails when any part of the range is not RAM, or it crosses from one region into another.
    pub fn slice(&self, address: u64, len: usize) -> Result<GuestSlice<'_>, AccessError> {
        let slice = self.head(address, len)?;
        if slice.len == len { Ok(slice) } else { Err(AccessError { address, len: len as u64 }) }
    }

    /// Whether the whole range is RAM.
    pub fn contains(&self, address: u64, len: u64) -> bool {
        let Some(end) = address.checked_add(len) else { return false };
        let mut at = address;
        while at < end {
            match self.region(at) {
                Some(r) => at = r.end(),
                None => return false,
            }
        }
        true
    }

    /// Drops the host's mapping of the page that `address` is in, if it is RAM; its content stays. The next access maps
    /// it anew.
    pub(crate) fn unmap_page(&self, address: u64) {
        let Ok(page) = self.slice(address & !(PAGE_SIZE - 1), PAGE_SIZE as usize) else { return };
        // SAFETY: the page lies inside a live mapping of shared memory, whose content is in the file. A refusal (a page of
        // another size) leaves it mapped, which is allowed at any time.
        unsafe { libc::madvise(page.ptr.cast(), PAGE_SIZE as usize, libc::MADV_DONTNEED) };
    }

    fn pieces(
        &self,
        address: u64,
        len: usize,
        mut piece: impl FnMut(usize, GuestSlice<'_>),
    ) -> Result<(), AccessError> {
        if !self.contains(address, len as u64) {
            return Err(AccessError { address, len: len as u64 });
        }
        let mut done = 0;
        while done < len {
            let slice = self.head(address + done as u64, len - done)?;
            let n = slice.len;
            piece(done, slice);
            done += n;
        }
        Ok(())
    }

    /// Copies guest RAM into `data`.
    ///
    /// # Errors
    /// Fails, without reading, when any part of the range is not RAM.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<(), AccessError> {
        self.pieces(address, data.len(), |at, s| s.copy_to(&mut data[at..at + s.len]))
    }

    /// Copies `data` into guest RAM.
    ///
    /// # Errors
    /// Fails, without writing, when any part of the range is not RAM.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), AccessError> {
        self.pieces(address, data.len(), |at, s| s.copy_from(&data[at..at + s.len]))
    }

    /// Fills a range of guest RAM with one byte value.
    ///
    /// # Errors
    /// Fails, without writing, when any part of the range is not RAM.
    pub fn fill(&self, address: u64, len: usize, value: u8) -> Result<(), AccessError> {
        self.pieces(address, len, |_, s| {
            // SAFETY: the slice lies inside a live mapping; see `GuestSlice` for concurrent guest access.
            unsafe { std::ptr::write_bytes(s.ptr, value, s.len) };
            self.mark_written(s.address, s.len as u64);
        })
    }

    /// Reads a plain-data object.
    ///
    /// # Errors
    /// Fails when any part of it is not RAM.
    pub fn read_obj<T: zerocopy::FromBytes + zerocopy::IntoBytes>(
        &self,
        address: u64,
    ) -> Result<T, AccessError> {
        let mut value = T::new_zeroed();
        self.read(address, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Writes a plain-data object.
    ///
    /// # Errors
    /// Fails when any part of it is not RAM.
    pub fn write_obj<T: zerocopy::IntoBytes + zerocopy::Immutable>(
        &self,
        address: u64,
        value: &T,
    ) -> Result<(), AccessError> {
        self.write(address, value.as_bytes())
    }
}

macro_rules! atomic_access {
    ($($load:ident $store:ident $int:ty, $atomic:ty;)*) => {
        impl GuestMemory {
            $(
                #[doc = concat!("Loads a naturally aligned little-endian `", stringify!($int), "` atomically.")]
                ///
                /// # Errors
                /// Fails when the address is misaligned or not RAM.
                pub fn $load(&self, address: u64, order: Ordering) -> Result<$int, AccessError> {
                    let atomic = self.atomic::<$atomic>(address)?;
                    Ok(<$int>::from_le(atomic.load(order)))
                }

                #[doc = concat!("Stores a naturally aligned little-endian `", stringify!($int), "` atomically.")]
                ///
                /// # Errors
                /// Fails when the address is misaligned or not RAM.
                pub fn $store(&self, address: u64, value: $int, order: Ordering) -> Result<(), AccessError> {
                    self.atomic::<$atomic>(address)?.store(value.to_le(), order);
                    self.mark_written(address, size_of::<$int>() as u64);
                    Ok(())
                }
            )*
        }
    };
}

atomic_access! {
    load_u8 store_u8 u8, AtomicU8;
    load_u16 store_u16 u16, AtomicU16;
    load_u32 store_u32 u32, AtomicU32;
    load_u64 store_u64 u64, AtomicU64;
}

impl GuestMemory {
    /// The atomic `T` at `address`.
    fn atomic<T>(&self, address: u64) -> Result<&T, AccessError> {
        let slice = self.slice(address, size_of::<T>())?;
        let ptr = slice.ptr.cast::<T>();
        if !ptr.is_aligned() {
            return Err(AccessError { address, len: size_of::<T>() as u64 });
        }
        // SAFETY: the range lies inside a mapping that lives as long as `self`, is aligned, and `T` is one of the
        // atomic integers named in `atomic_access!`, for which any bytes are valid.
        Ok(unsafe { &*ptr })
    }

    /// A full memory barrier between this thread's guest accesses (virtio's event-index check needs one).
    pub fn barrier(&self) {
        fence(Ordering::SeqCst);
    }
}

impl GuestSlice<'_> {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The host address, for vectored system calls. After the kernel wrote through it, call [`Self::mark_written`].
    pub fn host_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// Copies out; both lengths must be equal.
    ///
    /// # Panics
    /// When the lengths differ (a caller's mistake, never a guest's choice).
    pub fn copy_to(&self, data: &mut [u8]) {
        assert_eq!(data.len(), self.len, "guest copy of unequal length");
        // SAFETY: source lies inside a live mapping, destination is a distinct host buffer of the same length. The
        // guest may write concurrently; the bytes copied are then unspecified but every value is a valid u8.
        unsafe { std::ptr::copy_nonoverlapping(self.ptr, data.as_mut_ptr(), self.len) }
    }

    /// Copies in and reports the write; both lengths must be equal.
    ///
    /// # Panics
    /// When the lengths differ (a caller's mistake, never a guest's choice).
    pub fn copy_from(&self, data: &[u8]) {
        assert_eq!(data.len(), self.len, "guest copy of unequal length");
        // SAFETY: as in `copy_to`, with the roles exchanged.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.ptr, self.len) }
        self.mark_written();
    }

    /// Reports that the slice was written through [`Self::host_ptr`].
    pub fn mark_written(&self) {
        self.memory.mark_written(self.address, self.len as u64);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn two_regions() -> GuestMemory {
        let options = RegionOptions::default();
        GuestMemory::new(vec![
            MemoryRegion::allocate(0x2000, 0x1000, &options).unwrap(),
            MemoryRegion::allocate(0x0, 0x2000, &options).unwrap(),
            MemoryRegion::allocate(0x10000, 0x1000, &options).unwrap(),
        ])
        .unwrap()
    }

    #[test]
    fn copies_across_adjacent_regions_and_refuses_holes() {
        let m = two_regions();
        let data: Vec<u8> = (0..=255).collect();
        m.write(0x1f80, &data).unwrap();
        let mut back = vec![0; 256];
        m.read(0x1f80, &mut back).unwrap();
        assert_eq!(back, data);
        assert!(m.slice(0x1f80, 256).is_err(), "crosses regions");
        assert_eq!(m.write(0x2ff0, &data), Err(AccessError { address: 0x2ff0, len: 256 }));
        let mut tail = [1; 16];
        m.read(0x2ff0, &mut tail).unwrap();
        assert_eq!(tail, [0; 16], "a refused write changes nothing");
        assert!(m.read(u64::MAX - 3, &mut back).is_err());
        assert!(!m.contains(u64::MAX, 2));
    }

    #[test]
    fn atomics_check_alignment_and_bounds() {
        let m = two_regions();
        m.store_u32(0x10ffc, 0x1234_5678, Ordering::Release).unwrap();
        assert_eq!(m.load_u16(0x10ffe, Ordering::Acquire), Ok(0x1234));
        assert!(m.load_u32(0x10ffe, Ordering::Acquire).is_err());
        assert!(m.load_u16(0x10ffd, Ordering::Acquire).is_err());
    }

    #[test]
    fn overlapping_regions_are_refused() {
        let options = RegionOptions::default();
        let r = vec![
            MemoryRegion::allocate(0, 0x2000, &options).unwrap(),
            MemoryRegion::allocate(0x1000, 0x1000, &options).unwrap(),
        ];
        assert!(matches!(GuestMemory::new(r), Err(MapError::Overlap { address: 0x1000 })));
    }

    #[test]
    fn every_write_is_observed() {
        struct Log(Arc<Mutex<Vec<(u64, u64)>>>);
        impl WriteObserver for Log {
            fn written(&self, address: u64, len: u64) {
                self.0.lock().unwrap().push((address, len));
            }
        }
        let m = two_regions();
        let log = Arc::new(Mutex::new(Vec::new()));
        m.set_write_observer(Some(Box::new(Log(log.clone()))));
        m.write(0x1ffe, &[0; 4]).unwrap();
        m.write_obj(0x10, &7u64).unwrap();
        m.store_u8(0x20, 1, Ordering::Relaxed).unwrap();
        m.fill(0x30, 5, 9).unwrap();
        assert_eq!(*log.lock().unwrap(), [(0x1ffe, 2), (0x2000, 2), (0x10, 8), (0x20, 1), (0x30, 5)]);
        assert_eq!(m.read_obj::<u64>(0x10).unwrap(), 7);
    }
}

//! A guest's memory as the front-end shares it, and the log of pages written during migration. One of the modules
//! that may use `unsafe`.
#![expect(unsafe_code, reason = "maps shared memory and hands out raw pointers into it")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// Most regions a front-end may share.
pub const REGIONS_MAX: usize = 256;
/// Bytes of guest memory behind one bit of the log.
const LOG_PAGE: u64 = 4096;

/// A shared mapping of a file.
#[derive(Debug)]
struct Mapping {
    base: *mut u8,
    len: usize,
}

// SAFETY: the mapping is shared memory that any thread may access; accesses treat it as concurrently modified.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `fd` from `offset` on. The range must lie within the file, or later accesses would fault.
    fn new(fd: &OwnedFd, len: usize, offset: u64) -> io::Result<Self> {
        let size = File::from(fd.try_clone()?).metadata()?.len();
        if len == 0 || offset.checked_add(len as u64).is_none_or(|end| end > size) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the region exceeds its file"));
        }
        // SAFETY: a fresh shared mapping at an address of the kernel's choice touches no existing object.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { base: base.cast(), len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and len are those of the mapping made in `new`; nothing refers to it any more, since
        // pointers into it live no longer than the `GuestMemory` that holds it.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// One region as a message describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Guest physical address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Address in the front-end's process.
    pub user: u64,
    /// Offset of the region in the shared file.
    pub offset: u64,
}

#[derive(Clone, Debug)]
struct Region {
    info: RegionInfo,
    /// Where the region starts in this process.
    host: usize,
    _mapping: Arc<Mapping>,
}

/// All regions of one guest. A change makes a new value; the old one stays mapped while a burst holds it.
#[derive(Clone, Debug, Default)]
pub struct GuestMemory {
    regions: Vec<Region>,
    log: Option<Arc<DirtyLog>>,
}

impl GuestMemory {
    /// The memory with one more region.
    pub fn with_region(&self, info: RegionInfo, fd: &OwnedFd) -> io::Result<Self> {
        let bad = |m| Err(io::Error::new(io::ErrorKind::InvalidInput, m));
        if self.regions.len() >= REGIONS_MAX {
            return bad("too many memory regions");
        }
        let (Some(guest_end), Some(_), Some(len)) = (
            info.guest.checked_add(info.size),
            info.user.checked_add(info.size),
            info.size.checked_add(info.offset % LOG_PAGE),
        ) else {
            return bad("a memory region wraps around");
        };
        if self.regions.iter().any(|r| info.guest < r.info.guest + r.info.size && r.info.guest < guest_end) {
            return bad("memory regions overlap");
        }
        // mmap wants a page-aligned offset; huge pages want more, but front-ends align theirs.
        let slack = (info.offset % LOG_PAGE) as usize;
        let mapping = Arc::new(Mapping::new(fd, len as usize, info.offset - slack as u64)?);
        let host = mapping.base as usize + slack;
        let mut new = self.clone();
        new.regions.push(Region { info, host, _mapping: mapping });
        Ok(new)
    }

    /// The memory without the region at these addresses.
    pub fn without_region(&self, info: RegionInfo) -> Option<Self> {
        let same =
            |r: &Region| (r.info.guest, r.info.user, r.info.size) == (info.guest, info.user, info.size);
        let at = self.regions.iter().position(same)?;
        let mut new = self.clone();
        new.regions.remove(at);
        Some(new)
    }

    /// The memory with `log` attached.
    pub fn with_log(&self, log: Option<Arc<DirtyLog>>) -> Self {
        Self { log, ..self.clone() }
    }

    /// Address in this process of `len` bytes at guest address `guest`; `None` unless one region holds them all.
    #[inline(always)]
    pub fn translate(&self, guest: u64, len: u64) -> Option<*mut u8> {
        for r in &self.regions {
            let offset = guest.wrapping_sub(r.info.guest);
            if offset < r.info.size {
                return (len <= r.info.size - offset).then(|| (r.host + offset as usize) as *mut u8);
            }
        }
        None
    }

    /// The same for an address in the front-end's process.
    pub fn translate_user(&self, user: u64, len: u64) -> Option<*mut u8> {
        self.regions.iter().find_map(|r| {
            let offset = user.wrapping_sub(r.info.user);
            (offset < r.info.size && len <= r.info.size - offset)
                .then(|| (r.host + offset as usize) as *mut u8)
        })
    }

    /// Guest address of an address in the front-end's process.
    pub fn guest_of_user(&self, user: u64) -> Option<u64> {
        self.regions.iter().find_map(|r| {
            let offset = user.wrapping_sub(r.info.user);
            (offset < r.info.size).then(|| r.info.guest + offset)
        })
    }

    /// Notes that `len` bytes at guest address `guest` were written.
    #[inline]
    pub fn log_write(&self, guest: u64, len: u64) {
        if let Some(log) = &self.log {
            log.mark(guest, len);
        }
    }
}

/// The bitmap of written pages, shared with the front-end.
#[derive(Debug)]
pub struct DirtyLog {
    _mapping: Mapping,
    bits: *const AtomicU8,
    bytes: u64,
}

// SAFETY: `bits` points into the mapping, which is shared memory; it is accessed atomically only.
unsafe impl Send for DirtyLog {}
// SAFETY: as above.
unsafe impl Sync for DirtyLog {}

impl DirtyLog {
    /// Maps the log.
    pub fn new(fd: &OwnedFd, size: u64, offset: u64) -> io::Result<Self> {
        let slack = offset % LOG_PAGE;
        let len = size.checked_add(slack).ok_or(io::ErrorKind::InvalidInput)?;
        let mapping = Mapping::new(fd, len as usize, offset - slack)?;
        // SAFETY: slack is less than the mapping's length.
        let bits = unsafe { mapping.base.add(slack as usize) }.cast_const().cast();
        Ok(Self { _mapping: mapping, bits, bytes: size })
    }

    /// Sets the bits of all pages that the range touches; pages beyond the log are ignored.
    pub fn mark(&self, guest: u64, len: u64) {
        if len == 0 {
            return;
        }
        let last = guest.saturating_add(len - 1) / LOG_PAGE;
        for page in guest / LOG_PAGE..=last {
            if page / 8 >= self.bytes {
                return;
            }
            // SAFETY: the index was checked against the length of the mapped bitmap.
            let byte = unsafe { &*self.bits.add((page / 8) as usize) };
            byte.fetch_or(1 << (page % 8), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(guest: u64, size: u64, user: u64, offset: u64) -> RegionInfo {
        RegionInfo { guest, size, user, offset }
    }

    #[test]
    fn translation_checks_both_ends() {
        let f = tempfile::tempfile().unwrap();
        f.set_len(0x4000).unwrap();
        let fd = OwnedFd::from(f);
        let m = GuestMemory::default().with_region(region(0x1000, 0x1000, 0x7000, 0), &fd).unwrap();
        let m = m.with_region(region(0x2000, 0x1000, 0x9000, 0x1000), &fd).unwrap();
        assert!(m.translate(0x1000, 0x1000).is_some());
        assert!(m.translate(0x1fff, 2).is_none(), "a range may not span regions");
        assert!(m.translate(0xfff, 1).is_none());
        assert!(m.translate(0x1001, u64::MAX).is_none());
        assert!(m.translate_user(0x9fff, 1).is_some());
        assert!(m.translate_user(0x9fff, 2).is_none());
        assert_eq!((m.guest_of_user(0x9fff), m.guest_of_user(0xa000)), (Some(0x2fff), None));
        assert!(m.with_region(region(0x2fff, 1, 0, 0), &fd).is_err(), "overlap");
        assert!(m.with_region(region(0x9000, 0x4001, 0, 0), &fd).is_err(), "beyond the file");
        assert!(m.with_region(region(u64::MAX - 1, 0x1000, 0, 0), &fd).is_err(), "wraps");
        let m = m.without_region(region(0x1000, 0x1000, 0x7000, 0)).unwrap();
        assert!(m.translate(0x1000, 1).is_none());
    }

    #[test]
    fn the_log_marks_every_page_touched() {
        let f = tempfile::tempfile().unwrap();
        f.set_len(0x1000).unwrap();
        let fd = OwnedFd::from(f.try_clone().unwrap());
        let log = DirtyLog::new(&fd, 16, 0).unwrap();
        log.mark(0x0fff, 2);
        log.mark(8 * 0x1000, 1);
        log.mark(1 << 60, 1 << 50);
        let mut b = [0; 2];
        std::os::unix::fs::FileExt::read_exact_at(&f, &mut b, 0).unwrap();
        assert_eq!(b, [3, 1]);
    }
}

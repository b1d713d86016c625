//! The host mappings behind guest RAM.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

/// Why guest RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The size is zero, not a multiple of the page size, or wraps around.
    #[error(
        "Memory region {address:#x}+{size:#x} is empty, not a multiple of its page size, or wraps around"
    )]
    BadRange {
        /// Guest-physical start.
        address: u64,
        /// Size in bytes.
        size: u64,
    },
    /// Two regions overlap.
    #[error("Memory regions overlap at {address:#x}")]
    Overlap {
        /// Guest-physical start of the second region.
        address: u64,
    },
    /// The host refused.
    #[error("Cannot get {size} bytes of memory ({step}); free some or configure less")]
    Host {
        /// Size in bytes.
        size: u64,
        /// The step that failed.
        step: &'static str,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
}

/// Pages that back a region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// The host's normal pages.
    #[default]
    Normal,
    /// Transparent huge pages where the host has them.
    TransparentHuge,
    /// 2 MiB pages reserved in hugetlbfs.
    Huge2M,
    /// 1 GiB pages reserved in hugetlbfs.
    Huge1G,
}

/// How a region is allocated.
#[derive(Clone, Debug, Default)]
pub struct RegionOptions {
    /// Page kind.
    pub backing: Backing,
    /// Touch every page now, so that a lack of memory shows at once.
    pub prefault: bool,
    /// Bind to this host NUMA node.
    pub host_node: Option<u32>,
}

/// One mapped region of guest RAM. Clones share the mapping; the last one unmaps it.
#[derive(Clone)]
pub struct MemoryRegion {
    address: u64,
    mapping: Arc<Mapping>,
}

struct Mapping {
    ptr: *mut u8,
    size: u64,
    file: File,
}

// SAFETY: the mapping is plain shared memory; all access goes through volatile-like copies or atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `ptr` and `size` are what mmap returned and nobody borrows the mapping any more.
        unsafe { libc::munmap(self.ptr.cast(), self.size as usize) };
    }
}

impl MemoryRegion {
    /// Allocates `size` bytes of shared memory for guest-physical `address`.
    ///
    /// # Errors
    /// Fails when the range is malformed or the host has too little memory or refuses a step.
    pub fn allocate(address: u64, size: u64, options: &RegionOptions) -> Result<Self, MapError> {
        let (huge_flag, page) = match options.backing {
            Backing::Normal | Backing::TransparentHuge => (0, super::PAGE_SIZE),
            Backing::Huge2M => (libc::MFD_HUGETLB | libc::MFD_HUGE_2MB, 2 << 20),
            Backing::Huge1G => (libc::MFD_HUGETLB | libc::MFD_HUGE_1GB, 1 << 30),
        };
        if size == 0
            || !size.is_multiple_of(page)
            || address.checked_add(size).is_none()
            || size > i64::MAX as u64
        {
            return Err(MapError::BadRange { address, size });
        }
        let fail = |step| move || MapError::Host { size, step, source: std::io::Error::last_os_error() };
        // SAFETY: the name is a C string; the call has no other memory effect.
        let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), libc::MFD_CLOEXEC | huge_flag) };
        if fd < 0 {
            return Err(fail("memfd_create")());
        }
        // SAFETY: `fd` is a fresh descriptor that nobody else owns.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(size).map_err(|source| MapError::Host { size, step: "ftruncate", source })?;
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let ptr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if ptr == libc::MAP_FAILED {
            return Err(fail("mmap")());
        }
        let region = Self { address, mapping: Arc::new(Mapping { ptr: ptr.cast(), size, file }) };
        let len = size as usize;
        if options.backing == Backing::TransparentHuge {
            // SAFETY: the range is the mapping just made. Advice only: a host without huge pages still works.
            unsafe { libc::madvise(ptr, len, libc::MADV_HUGEPAGE) };
        }
        if let Some(node) = options.host_node {
            let mut mask = [0u64; 16];
            let word = mask.get_mut(node as usize / 64).ok_or(MapError::Host {
                size,
                step: "mbind",
                source: std::io::Error::from_raw_os_error(libc::EINVAL),
            })?;
            *word = 1 << (node % 64);
            const MPOL_BIND: libc::c_long = 2;
            // SAFETY: the range is the mapping just made and the mask outlives the call.
            let rc =
                unsafe { libc::syscall(libc::SYS_mbind, ptr, len, MPOL_BIND, mask.as_ptr(), 1024u64, 0u64) };
            if rc != 0 {
                return Err(fail("mbind")());
            }
        }
        if options.prefault {
            // SAFETY: the range is the mapping just made.
            if unsafe { libc::madvise(ptr, len, libc::MADV_POPULATE_WRITE) } != 0 {
                return Err(fail("prefault")());
            }
        }
        Ok(region)
    }

    /// Guest-physical start.
    pub fn guest_address(&self) -> u64 {
        self.address
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.mapping.size
    }

    /// Guest-physical address after the last byte.
    pub fn end(&self) -> u64 {
        self.address + self.mapping.size
    }

    /// Start of the host mapping.
    pub fn host_ptr(&self) -> *mut u8 {
        self.mapping.ptr
    }

    /// The memfd behind the region (the mapping starts at its offset 0), for sharing with another process.
    pub fn file(&self) -> &File {
        &self.mapping.file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_ranges_are_refused() {
        let options = RegionOptions::default();
        for (address, size) in [(0, 0), (0, 100), (u64::MAX - 4095, 8192), (0, 1 << 63)] {
            let r = MemoryRegion::allocate(address, size, &options);
            assert!(matches!(r, Err(MapError::BadRange { .. })), "{address:#x}+{size:#x}");
        }
    }

    #[test]
    fn options_are_honoured_or_fail_clearly() {
        let options = RegionOptions { prefault: true, backing: Backing::TransparentHuge, host_node: Some(0) };
        let r = MemoryRegion::allocate(0, 4 << 20, &options).unwrap();
        assert_eq!(r.file().metadata().unwrap().len(), 4 << 20);
        let far = RegionOptions { host_node: Some(5000), ..Default::default() };
        assert!(matches!(MemoryRegion::allocate(0, 4096, &far), Err(MapError::Host { step: "mbind", .. })));
    }
}

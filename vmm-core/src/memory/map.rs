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
    #[error("Cannot get {size} bytes of memory ({step}); {advice}")]
    Host {
        /// Size in bytes.
        size: u64,
        /// The step that failed.
        step: &'static str,
        /// What to do.
        advice: &'static str,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
}

const FREE_SOME: &str = "free some or configure less";
const RESERVE_PAGES: &str = "reserve enough in /sys/kernel/mm/hugepages or choose normal pages";
const NODES: &str = "give a node of /sys/devices/system/node";

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
        // Reserved pages are taken now: what is missing later would end the process.
        let (huge_flag, page, reserve, advice) = match options.backing {
            Backing::Normal | Backing::TransparentHuge => {
                (0, super::PAGE_SIZE, libc::MAP_NORESERVE, FREE_SOME)
            }
            Backing::Huge2M => (libc::MFD_HUGETLB | libc::MFD_HUGE_2MB, 2 << 20, 0, RESERVE_PAGES),
            Backing::Huge1G => (libc::MFD_HUGETLB | libc::MFD_HUGE_1GB, 1 << 30, 0, RESERVE_PAGES),
        };
        if size == 0
            || !size.is_multiple_of(page)
            || address.checked_add(size).is_none()
            || size > i64::MAX as u64
        {
            return Err(MapError::BadRange { address, size });
        }
        let host = |step, source| MapError::Host { size, step, advice, source };
        let fail = |step| host(step, std::io::Error::last_os_error());
        // SAFETY: the name is a C string; the call has no other memory effect.
        let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), libc::MFD_CLOEXEC | huge_flag) };
        if fd < 0 {
            return Err(fail("memfd_create"));
        }
        // SAFETY: `fd` is a fresh descriptor that nobody else owns.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(size).map_err(|source| host("ftruncate", source))?;
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let ptr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | reserve,
                file.as_raw_fd(),
                0,
            )
        };
        if ptr == libc::MAP_FAILED {
            return Err(fail("mmap"));
        }
        let region = Self { address, mapping: Arc::new(Mapping { ptr: ptr.cast(), size, file }) };
        let len = size as usize;
        if options.backing == Backing::TransparentHuge {
            // SAFETY: the range is the mapping just made. Advice only: a host without huge pages still works.
            unsafe { libc::madvise(ptr, len, libc::MADV_HUGEPAGE) };
        }
        if let Some(node) = options.host_node {
            let no_node = |source| MapError::Host { size, step: "mbind", advice: NODES, source };
            let mut mask = [0u64; 16];
            let word = mask.get_mut(node as usize / 64);
            *word.ok_or_else(|| no_node(std::io::Error::from_raw_os_error(libc::EINVAL)))? = 1 << (node % 64);
            const MPOL_BIND: libc::c_long = 2;
            // SAFETY: the range is the mapping just made and the mask outlives the call.
            let rc =
                unsafe { libc::syscall(libc::SYS_mbind, ptr, len, MPOL_BIND, mask.as_ptr(), 1024u64, 0u64) };
            if rc != 0 {
                return Err(no_node(std::io::Error::last_os_error()));
            }
        }
        if options.prefault {
            // SAFETY: the range is the mapping just made.
            if unsafe { libc::madvise(ptr, len, libc::MADV_POPULATE_WRITE) } != 0 {
                return Err(fail("prefault"));
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

    /// Pages that the host reserved are had at once or not at all: never a signal when they are touched.
    #[test]
    fn reserved_huge_pages_are_taken_or_refused() {
        let free = |kib: u32| {
            let path = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/free_hugepages");
            std::fs::read_to_string(path).ok().and_then(|n| n.trim().parse::<u64>().ok())
        };
        for (backing, page) in [(Backing::Huge2M, 2u64 << 20), (Backing::Huge1G, 1 << 30)] {
            let free = free((page >> 10) as u32);
            let more = free.unwrap_or(0) + 1;
            let options = RegionOptions { backing, ..Default::default() };
            match MemoryRegion::allocate(0, more * page, &options) {
                Err(error @ MapError::Host { .. }) => {
                    assert!(error.to_string().contains("/sys/kernel/mm/hugepages"), "{error}");
                }
                Err(other) => panic!("{other}"),
                Ok(_) => panic!("{more} pages of {free:?}"),
            }
            if free > Some(0) {
                let region = MemoryRegion::allocate(0, page, &options).unwrap();
                // SAFETY: inside the mapping, which nobody else knows.
                unsafe { region.host_ptr().add(page as usize - 1).write(1) };
            }
            assert!(matches!(MemoryRegion::allocate(0, page / 2, &options), Err(MapError::BadRange { .. })));
        }
    }
}

//! Gives pages of guest RAM back to the host.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::memory::{GuestMemory, PAGE_SIZE};

/// Frees `[offset, offset + len)` of a shared-memory file; it reads as zeros afterwards.
fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the call takes no memory of this process. What the file's mappings show changes to zeros, which guest
    // memory may at any time.
    let rc = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, len as i64) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Frees the whole pages within a guest range, as far as it is RAM; returns how many bytes were freed. What the host
/// does not free (a part of a huge page) stays as it is.
pub(super) fn discard(memory: &GuestMemory, address: u64, len: u64) -> u64 {
    let Some(end) = address.checked_add(len) else { return 0 };
    let start = address.next_multiple_of(PAGE_SIZE);
    let end = end - end % PAGE_SIZE;
    let mut freed = 0;
    for region in memory.regions() {
        let from = start.max(region.guest_address());
        let to = end.min(region.end());
        if from < to && punch(region.file(), from - region.guest_address(), to - from).is_ok() {
            memory.mark_written(from, to - from);
            freed += to - from;
        }
    }
    freed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{MemoryRegion, RegionOptions};

    #[test]
    fn whole_pages_of_ram_are_freed() {
        let region = |at, size| MemoryRegion::allocate(at, size, &RegionOptions::default()).unwrap();
        let memory =
            GuestMemory::new(vec![region(0, 0x4000), region(0x4000, 0x1000), region(0x10000, 0x1000)])
                .unwrap();
        for address in (0..0x5000).step_by(8).chain([0x10000]) {
            memory.write_obj(address, &1u64).unwrap();
        }
        assert_eq!(discard(&memory, 0x1001, 0x3fff), 0x3000, "0x2000 to 0x5000, over two regions");
        let page = |address| memory.read_obj::<u64>(address).unwrap();
        assert_eq!([0x1000, 0x1ff8, 0x2000, 0x3ff8, 0x4000, 0x4ff8].map(page), [1, 1, 0, 0, 0, 0]);
        assert_eq!(discard(&memory, 0x5000, 0xb000), 0, "a hole");
        assert_eq!(discard(&memory, u64::MAX - 10, 100), 0);
        assert_eq!(discard(&memory, 0, 1 << 40), 0x6000);
        assert_eq!(page(0x10000), 0);
    }
}

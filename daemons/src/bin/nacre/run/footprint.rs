//! The memory that a machine's process keeps.

use std::ffi::{c_int, c_void};

/// Lets go of the pages of program code and constants: most of those that are mapped now were for start-up only. They
/// are pages of files; what is needed again comes back from the page cache with a fault.
pub fn release_code() {
    // SAFETY: the callback follows the interface, and needs no data.
    unsafe { libc::dl_iterate_phdr(Some(release_object), std::ptr::null_mut()) };
}

/// Releases what cannot be written of one loaded object.
unsafe extern "C" fn release_object(info: *mut libc::dl_phdr_info, _: usize, _: *mut c_void) -> c_int {
    // SAFETY: the loader passes a valid description, with this many program headers.
    let (base, headers) = unsafe {
        ((*info).dlpi_addr, std::slice::from_raw_parts((*info).dlpi_phdr, usize::from((*info).dlpi_phnum)))
    };
    const PAGE: u64 = 4096;
    let constant = headers.iter().filter(|h| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_W == 0);
    let mut ranges = constant.map(|header| {
        let start = base + header.p_vaddr;
        start & !(PAGE - 1)..(start + header.p_memsz).next_multiple_of(PAGE)
    });
    let mut next = ranges.next();
    while let Some(mut range) = next {
        next = ranges.next();
        // Neighbours together: each call interrupts the processors on which this process has threads.
        while let Some(neighbour) = next.take_if(|next| next.start == range.end) {
            range.end = neighbour.end;
            next = ranges.next();
        }
        let len = (range.end - range.start) as usize;
        // SAFETY: the segments are mapped from a file and nobody writes them (the loader's relocations are in segments
        // that can be written), so their contents are the same when they are read again. A refusal changes nothing.
        unsafe { libc::madvise(range.start as *mut c_void, len, libc::MADV_DONTNEED) };
    }
    0
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    /// Constants that only this test reads, longer than what the kernel maps around a fault.
    static CONSTANTS: [u8; 1 << 20] = [7; 1 << 20];

    /// Whether this process has the page of `byte` mapped (Linux, admin-guide/mm/pagemap.rst).
    fn is_mapped(byte: &u8) -> bool {
        let mut entry = [0; 8];
        let page = std::ptr::from_ref(byte).addr() as u64 / 4096;
        File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut entry, page * 8).unwrap();
        u64::from_le_bytes(entry) >> 63 != 0
    }

    #[test]
    fn code_is_released_and_still_runs() {
        let byte = &std::hint::black_box(&CONSTANTS)[CONSTANTS.len() / 2];
        // SAFETY: a reference is valid to read; volatile, because the compiler knows the value.
        let read = || unsafe { std::ptr::from_ref(byte).read_volatile() };
        assert_eq!(read(), 7);
        assert!(is_mapped(byte));
        super::release_code();
        assert!(!is_mapped(byte));
        assert_eq!(read(), 7);
        assert!(is_mapped(byte));
    }
}

//! Executable memory for generated code. A page is never writable and executable at once.

use std::io;
use std::ptr::NonNull;

/// Address space reserved for stubs. The number of distinct forms is bounded (an opcode, its
/// immediate byte, register or memory operand), so a guest cannot outgrow it.
const STUBS: usize = 8 << 20;
const PAGE: usize = 4096;

/// An append-only region of machine code, owned by one virtual CPU.
///
/// Appending makes the pages it touches writable for a moment, which is sound because only the
/// owner, through `&mut self`, can append and only the owner runs the code.
#[derive(Debug)]
pub(crate) struct Arena {
    base: NonNull<u8>,
    capacity: usize,
    used: usize,
}

// SAFETY: the mapping is owned by the arena and is not tied to the thread that made it.
unsafe impl Send for Arena {}

impl Arena {
    /// Room for all stubs.
    pub(crate) fn new() -> io::Result<Self> {
        Self::with_capacity(STUBS)
    }

    /// Reserves the address space, a multiple of the page size; no memory is committed yet.
    pub(crate) fn with_capacity(capacity: usize) -> io::Result<Self> {
        // SAFETY: an anonymous private mapping at an address that the kernel chooses.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                capacity,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, capacity, used: 0 })
    }

    /// Bytes in use.
    #[cfg(feature = "native")]
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// Bytes that can be added.
    #[cfg(feature = "native")]
    pub(crate) fn room(&self) -> usize {
        self.capacity.saturating_sub(self.used.next_multiple_of(16))
    }

    /// Where the next code will be.
    #[cfg(feature = "native")]
    pub(crate) fn next_address(&self) -> u64 {
        self.base.as_ptr() as u64 + self.used.next_multiple_of(16) as u64
    }

    /// Forgets all but the first `used` bytes.
    #[cfg(feature = "native")]
    pub(crate) fn truncate(&mut self, used: usize) {
        self.used = self.used.min(used);
    }

    /// Copies `code` into the arena and returns the address where it can be called.
    pub(crate) fn append(&mut self, code: &[u8]) -> io::Result<NonNull<u8>> {
        let start = self.used.next_multiple_of(16);
        let end = start
            .checked_add(code.len())
            .filter(|&end| end <= self.capacity)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let first = start / PAGE * PAGE;
        let length = end.next_multiple_of(PAGE) - first;
        self.protect(first, length, libc::PROT_READ | libc::PROT_WRITE)?;
        // SAFETY: `start..end` lies in the mapping, is writable now and no code in it is running,
        // because the caller holds the arena exclusively.
        let target = unsafe {
            let target = self.base.add(start);
            std::ptr::copy_nonoverlapping(code.as_ptr(), target.as_ptr(), code.len());
            target
        };
        self.protect(first, length, libc::PROT_READ | libc::PROT_EXEC)?;
        self.used = end;
        Ok(target)
    }

    fn protect(&self, offset: usize, length: usize, access: i32) -> io::Result<()> {
        // SAFETY: callers pass page-aligned ranges inside the mapping that this arena owns.
        let result = unsafe { libc::mprotect(self.base.add(offset).as_ptr().cast(), length, access) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with this length and nothing runs in it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.capacity) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn appended_code_runs_and_earlier_code_stays() {
        let mut arena = Arena::new().expect("arena");
        let mut functions = Vec::new();
        for value in 0..2000u32 {
            let mut code = vec![0xb8];
            code.extend(value.to_le_bytes());
            code.push(0xc3);
            functions.push(arena.append(&code).expect("append"));
        }
        for (value, function) in functions.into_iter().enumerate() {
            // SAFETY: the bytes are `mov eax, value; ret`.
            let function: extern "sysv64" fn() -> u32 = unsafe { std::mem::transmute(function.as_ptr()) };
            assert_eq!(function() as usize, value);
        }
    }

    #[test]
    fn a_full_arena_is_an_error() {
        let mut arena = Arena::new().expect("arena");
        assert!(arena.append(&vec![0xcc; STUBS + 1]).is_err());
        assert!(arena.append(&[0xc3]).is_ok());
    }
}

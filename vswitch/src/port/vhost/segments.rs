//! The buffers of a descriptor chain as one stretch of bytes. One of the modules that may use `unsafe`.
#![expect(unsafe_code, reason = "copies from and to guest memory")]

use super::memory::GuestMemory;

/// One buffer of a chain, in this process and in the guest. Whoever makes one vouches that its bytes are mapped.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    pub ptr: *mut u8,
    pub len: usize,
    pub guest: u64,
}

/// Reads the collected segments in order.
pub struct Reader<'a> {
    segments: &'a [Segment],
    at: usize,
    offset: usize,
}

impl<'a> Reader<'a> {
    pub fn new(segments: &'a [Segment]) -> Self {
        Self { segments, at: 0, offset: 0 }
    }

    pub fn read(&mut self, out: &mut [u8]) {
        let mut done = 0;
        while done < out.len() {
            let Some(s) = self.segments.get(self.at) else { return };
            let n = (s.len - self.offset).min(out.len() - done);
            // SAFETY: the segment is mapped and holds n bytes from the offset on; `out` has room for them.
            unsafe { copy(s.ptr.add(self.offset), out[done..].as_mut_ptr(), n) };
            done += n;
            self.advance(n);
        }
    }

    fn advance(&mut self, n: usize) {
        self.offset += n;
        if self.segments.get(self.at).is_some_and(|s| self.offset >= s.len) {
            self.at += 1;
            self.offset = 0;
        }
    }

    pub fn skip(&mut self, n: usize) {
        for _ in 0..n {
            self.advance(1);
        }
    }

    /// The rest of the present segment.
    pub fn next_part(&mut self) -> Option<(*const u8, usize)> {
        let s = self.segments.get(self.at)?;
        // SAFETY: the offset is less than the segment's length.
        let part = (unsafe { s.ptr.add(self.offset) }.cast_const(), s.len - self.offset);
        self.at += 1;
        self.offset = 0;
        Some(part)
    }
}

/// Writes the collected segments in order.
pub struct Writer<'a> {
    segments: &'a [Segment],
    at: usize,
    offset: usize,
    log: Option<&'a GuestMemory>,
}

impl<'a> Writer<'a> {
    /// Writes are noted in the log of the memory `log`, if given.
    pub fn new(segments: &'a [Segment], log: Option<&'a GuestMemory>) -> Self {
        Self { segments, at: 0, offset: 0, log }
    }

    pub fn write(&mut self, mut from: *const u8, mut len: usize) {
        while len > 0 {
            let Some(s) = self.segments.get(self.at) else { return };
            let n = (s.len - self.offset).min(len);
            // SAFETY: the segment is mapped and has room for n bytes from the offset on; the caller's part holds
            // `len` >= n bytes.
            unsafe {
                copy(from, s.ptr.add(self.offset), n);
                from = from.add(n);
            }
            if let Some(memory) = self.log {
                memory.log_write(s.guest + self.offset as u64, n as u64);
            }
            len -= n;
            self.offset += n;
            if self.offset == s.len {
                self.at += 1;
                self.offset = 0;
            }
        }
    }
}

/// Copies `len` bytes; short lengths, the usual case, without a call.
///
/// # Safety
/// `len` bytes must be readable at `from` and writable at `to`, without overlap.
#[inline(always)]
pub unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    type B16 = [u8; 16];
    type B32 = [u8; 32];
    // SAFETY: each branch touches the first and the last bytes of the range only, which may overlap each other.
    unsafe {
        match len {
            32..=64 => {
                let a = from.cast::<B32>().read_unaligned();
                let b = from.add(len - 32).cast::<B32>().read_unaligned();
                to.cast::<B32>().write_unaligned(a);
                to.add(len - 32).cast::<B32>().write_unaligned(b);
            }
            16..=31 => {
                let a = from.cast::<B16>().read_unaligned();
                let b = from.add(len - 16).cast::<B16>().read_unaligned();
                to.cast::<B16>().write_unaligned(a);
                to.add(len - 16).cast::<B16>().write_unaligned(b);
            }
            _ => std::ptr::copy_nonoverlapping(from, to, len),
        }
    }
}

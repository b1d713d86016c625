//! The part of a packet that still lies in a guest's memory. One of the modules that may use `unsafe`.
#![expect(unsafe_code, reason = "guest memory is reached through raw pointers")]

/// Largest number of chunks a packet is made of: head, owned tail, and a bounded descriptor chain.
pub const CHUNKS_MAX: usize = 20;
/// Largest number of guest segments in one packet (virtio_net allows 18 with 64 KiB in 4 KiB pages).
pub const SEGMENTS_MAX: usize = CHUNKS_MAX - 2;

/// Address and length of one part of a packet.
#[derive(Clone, Copy, Debug)]
pub struct Chunk {
    /// First byte.
    pub ptr: *const u8,
    /// Number of bytes.
    pub len: usize,
}

/// The parts of a packet in order.
#[derive(Debug)]
pub struct Chunks {
    list: [Chunk; CHUNKS_MAX],
    n: usize,
}

impl Chunks {
    #[inline]
    pub(super) fn new() -> Self {
        Self { list: [Chunk { ptr: std::ptr::null(), len: 0 }; CHUNKS_MAX], n: 0 }
    }

    #[inline]
    pub(super) fn push(&mut self, part: &[u8]) {
        self.list[self.n] = Chunk { ptr: part.as_ptr(), len: part.len() };
        self.n += 1;
    }

    /// The parts in order.
    #[inline]
    pub fn iter(&self) -> std::slice::Iter<'_, Chunk> {
        self.list[..self.n].iter()
    }

    /// Number of parts.
    pub fn len(&self) -> usize {
        self.n
    }

    /// Whether there is no part.
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }
}

/// Segments of a frame in guest memory. The burst that holds the packet keeps that memory mapped.
#[derive(Clone, Debug, Default)]
pub(crate) struct GuestTail {
    segments: Vec<Chunk>,
    len: usize,
}

// SAFETY: the pointers refer to shared guest memory, which is mapped for the whole process and which every access
// treats as concurrently modified bytes.
unsafe impl Send for GuestTail {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for GuestTail {}

impl GuestTail {
    #[inline]
    pub fn clear(&mut self) {
        self.segments.clear();
        self.len = 0;
    }

    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Appends a segment; `false` when the packet has as many as it may.
    ///
    /// # Safety
    /// `ptr..ptr + len` must lie in a mapping of the guest memory that the packet's burst holds at least until it is
    /// cleared.
    #[inline]
    pub unsafe fn push(&mut self, ptr: *const u8, len: usize) -> bool {
        if self.segments.len() >= SEGMENTS_MAX {
            return false;
        }
        self.segments.push(Chunk { ptr, len });
        self.len += len;
        true
    }

    #[inline]
    pub(super) fn segments(&self) -> &[Chunk] {
        &self.segments
    }

    #[inline]
    pub(super) fn chunks(&self, out: &mut Chunks) {
        for c in &self.segments {
            out.list[out.n] = *c;
            out.n += 1;
        }
    }

    /// Appends the bytes from `from` on to `out`.
    pub(super) fn copy_from(&self, from: usize, out: &mut Vec<u8>) {
        let mut skip = from;
        for c in &self.segments {
            if skip >= c.len {
                skip -= c.len;
                continue;
            }
            let n = c.len - skip;
            out.reserve(n);
            // SAFETY: `push` promised that the segment is mapped; `reserve` made room for `n` bytes, which the copy
            // initialises.
            unsafe {
                std::ptr::copy_nonoverlapping(c.ptr.add(skip), out.as_mut_ptr().add(out.len()), n);
                out.set_len(out.len() + n);
            }
            skip = 0;
        }
    }
}

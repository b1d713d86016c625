//! Scatter and gather lists.
//!
//! A list is a sequence of `(pointer, length)` segments. Segments may be guest memory that the guest
//! changes at any time, so no Rust reference to their bytes is ever made: bytes move with raw copies or
//! inside system calls.

use libc::iovec;
use parking_lot::Mutex;
use std::io::{IoSlice, IoSliceMut};
use std::marker::PhantomData;

#[derive(Clone, Copy)]
enum List<'a> {
    One(iovec),
    Many(&'a [iovec]),
}

/// A sub-range of a list of segments.
#[derive(Clone, Copy)]
struct View<'a> {
    list: List<'a>,
    skip: usize,
    len: usize,
}

impl<'a> View<'a> {
    fn one(ptr: *mut u8, len: usize) -> Self {
        View { list: List::One(iovec { iov_base: ptr.cast(), iov_len: len }), skip: 0, len }
    }

    fn many(iov: &'a [iovec]) -> Self {
        let len = iov.iter().fold(0usize, |sum, v| sum.saturating_add(v.iov_len));
        View { list: List::Many(iov), skip: 0, len }
    }

    fn slice(self, offset: usize, len: usize) -> Self {
        assert!(offset <= self.len && len <= self.len - offset, "slice of a segment list out of range");
        View { skip: self.skip + offset, len, ..self }
    }

    fn for_each(&self, mut f: impl FnMut(*mut u8, usize) -> bool) {
        let one;
        let iov = match self.list {
            List::One(v) => {
                one = [v];
                &one[..]
            }
            List::Many(iov) => iov,
        };
        let (mut skip, mut left) = (self.skip, self.len);
        for v in iov {
            if left == 0 {
                return;
            }
            if skip >= v.iov_len {
                skip -= v.iov_len;
                continue;
            }
            let n = (v.iov_len - skip).min(left);
            // `skip` is inside of the segment, so the addition stays in the same allocation.
            if !f(v.iov_base.cast::<u8>().wrapping_add(skip), n) {
                return;
            }
            skip = 0;
            left -= n;
        }
    }

    fn fill_iovecs(&self, out: &mut [iovec]) -> usize {
        let mut n = 0;
        self.for_each(|ptr, len| {
            out[n] = iovec { iov_base: ptr.cast(), iov_len: len };
            n += 1;
            n < out.len()
        });
        n
    }

    fn aligned(&self, align: usize) -> bool {
        let mut ok = true;
        self.for_each(|ptr, len| {
            ok = (ptr as usize).is_multiple_of(align) && len.is_multiple_of(align);
            ok
        });
        ok
    }
}

/// Where a read puts its bytes.
pub struct Scatter<'a> {
    view: View<'a>,
    _lifetime: PhantomData<&'a mut [u8]>,
}

impl<'a> Scatter<'a> {
    /// One contiguous buffer.
    pub fn new(buf: &'a mut [u8]) -> Self {
        Scatter { view: View::one(buf.as_mut_ptr(), buf.len()), _lifetime: PhantomData }
    }

    /// Several buffers.
    pub fn vectored(bufs: &'a mut [IoSliceMut<'_>]) -> Self {
        // SAFETY: `IoSliceMut` is documented to be ABI-compatible with `iovec` on Unix, and the exclusive
        // borrow of the buffers lasts as long as the list.
        let iov = unsafe { std::slice::from_raw_parts(bufs.as_ptr().cast::<iovec>(), bufs.len()) };
        Scatter { view: View::many(iov), _lifetime: PhantomData }
    }

    /// Raw segments, for example of guest memory.
    ///
    /// # Safety
    /// Every segment must stay mapped and writable for `'a`. Other parties may read and write the bytes
    /// at any time (a guest does), but no Rust reference to them may exist.
    pub unsafe fn from_iovecs(iov: &'a [iovec]) -> Self {
        Scatter { view: View::many(iov), _lifetime: PhantomData }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.view.len
    }

    /// Whether the list holds no bytes.
    pub fn is_empty(&self) -> bool {
        self.view.len == 0
    }

    /// The sub-range of `len` bytes at `offset`. Panics if it is out of range.
    pub fn slice(&mut self, offset: usize, len: usize) -> Scatter<'_> {
        Scatter { view: self.view.slice(offset, len), _lifetime: PhantomData }
    }

    /// Fills the whole list with zeros.
    pub fn zero(&mut self) {
        self.view.for_each(|ptr, len| {
            // SAFETY: the segment is writable for `len` bytes by the constructor's contract.
            unsafe { std::ptr::write_bytes(ptr, 0, len) };
            true
        });
    }

    /// Copies `src` to the start of the list. Panics if it is longer than the list.
    pub fn copy_from(&mut self, src: &[u8]) {
        let view = self.view.slice(0, src.len());
        let mut done = 0;
        view.for_each(|ptr, len| {
            // SAFETY: the segment is writable for `len` bytes by the constructor's contract, `src` has
            // `len` bytes from `done` on, and the two do not overlap: `src` is a shared Rust reference.
            unsafe { std::ptr::copy_nonoverlapping(src[done..done + len].as_ptr(), ptr, len) };
            done += len;
            true
        });
    }

    /// Writes the segments to `out`, as many as fit, and returns their number.
    pub fn fill_iovecs(&mut self, out: &mut [iovec]) -> usize {
        self.view.fill_iovecs(out)
    }

    pub(crate) fn aligned(&self, align: usize) -> bool {
        self.view.aligned(align)
    }
}

/// Where a write takes its bytes from.
#[derive(Clone, Copy)]
pub struct Gather<'a> {
    view: View<'a>,
    _lifetime: PhantomData<&'a [u8]>,
}

impl<'a> Gather<'a> {
    /// One contiguous buffer.
    pub fn new(buf: &'a [u8]) -> Self {
        Gather { view: View::one(buf.as_ptr().cast_mut(), buf.len()), _lifetime: PhantomData }
    }

    /// Several buffers.
    pub fn vectored(bufs: &'a [IoSlice<'_>]) -> Self {
        // SAFETY: `IoSlice` is documented to be ABI-compatible with `iovec` on Unix, and the borrow of the
        // buffers lasts as long as the list.
        let iov = unsafe { std::slice::from_raw_parts(bufs.as_ptr().cast::<iovec>(), bufs.len()) };
        Gather { view: View::many(iov), _lifetime: PhantomData }
    }

    /// Raw segments, for example of guest memory.
    ///
    /// # Safety
    /// Every segment must stay mapped and readable for `'a`. Other parties may write the bytes at any time.
    pub unsafe fn from_iovecs(iov: &'a [iovec]) -> Self {
        Gather { view: View::many(iov), _lifetime: PhantomData }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.view.len
    }

    /// Whether the list holds no bytes.
    pub fn is_empty(&self) -> bool {
        self.view.len == 0
    }

    /// The sub-range of `len` bytes at `offset`. Panics if it is out of range.
    pub fn slice(&self, offset: usize, len: usize) -> Gather<'a> {
        Gather { view: self.view.slice(offset, len), _lifetime: PhantomData }
    }

    /// Copies the start of the list to all of `dst`. Panics if the list is shorter.
    pub fn copy_to(&self, dst: &mut [u8]) {
        let view = self.view.slice(0, dst.len());
        let mut done = 0;
        view.for_each(|ptr, len| {
            // SAFETY: the segment is readable for `len` bytes by the constructor's contract, `dst` has
            // `len` bytes from `done` on, and the two do not overlap: `dst` is an exclusive reference.
            unsafe { std::ptr::copy_nonoverlapping(ptr, dst[done..done + len].as_mut_ptr(), len) };
            done += len;
            true
        });
    }

    /// Calls `f` with the list between two other buffers.
    pub(crate) fn with_edges<R>(&self, head: &[u8], tail: &[u8], f: impl FnOnce(Gather<'_>) -> R) -> R {
        let part = |bytes: &[u8]| iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let mut iov = vec![part(head)];
        self.view.for_each(|ptr, len| {
            iov.push(iovec { iov_base: ptr.cast(), iov_len: len });
            true
        });
        iov.push(part(tail));
        f(Gather { view: View::many(&iov), _lifetime: PhantomData })
    }

    /// The whole list as one vector.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; self.len()];
        self.copy_to(&mut out);
        out
    }

    /// Writes the segments to `out`, as many as fit, and returns their number.
    pub fn fill_iovecs(&self, out: &mut [iovec]) -> usize {
        self.view.fill_iovecs(out)
    }

    pub(crate) fn aligned(&self, align: usize) -> bool {
        self.view.aligned(align)
    }
}

/// The memory of a request that outlives the call that made it.
pub struct Memory(Owner);

enum Owner {
    Bytes(Vec<u8>),
    Aligned(AlignedBuf),
    Segments(Vec<iovec>),
}

// SAFETY: bytes belong to this alone, and who made segments promised that they may be used from anywhere.
unsafe impl Send for Memory {}

impl From<Vec<u8>> for Memory {
    fn from(bytes: Vec<u8>) -> Self {
        Memory(Owner::Bytes(bytes))
    }
}

impl From<AlignedBuf> for Memory {
    fn from(bytes: AlignedBuf) -> Self {
        Memory(Owner::Aligned(bytes))
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl Memory {
    /// Raw segments, for example of guest memory.
    ///
    /// # Safety
    /// As long as this lives, every segment must stay mapped and writable (readable is enough for a write to a disk),
    /// whichever thread uses it. Other parties may read and write the bytes at any time, but no Rust reference to them
    /// may exist.
    pub unsafe fn from_iovecs(segments: Vec<iovec>) -> Self {
        Memory(Owner::Segments(segments))
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.gather().len()
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes, if this was made of a vector.
    pub fn into_vec(self) -> Option<Vec<u8>> {
        match self.0 {
            Owner::Bytes(bytes) => Some(bytes),
            Owner::Aligned(_) | Owner::Segments(_) => None,
        }
    }

    /// The buffer, if this was made of one.
    pub(crate) fn into_aligned(self) -> Option<AlignedBuf> {
        match self.0 {
            Owner::Aligned(bytes) => Some(bytes),
            Owner::Bytes(_) | Owner::Segments(_) => None,
        }
    }

    /// The segments, if they are several, and the only one, if it is one. They stay valid when this is moved.
    pub(crate) fn segments(&mut self) -> (&[iovec], Option<iovec>) {
        let one = |bytes: &mut [u8]| iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        match &mut self.0 {
            Owner::Bytes(bytes) => (&[], Some(one(bytes))),
            Owner::Aligned(bytes) => (&[], Some(one(bytes))),
            Owner::Segments(list) => (list, <[iovec; 1]>::try_from(&list[..]).ok().map(|[one]| one)),
        }
    }

    /// The memory as the destination of a read.
    pub fn scatter(&mut self) -> Scatter<'_> {
        match &mut self.0 {
            Owner::Bytes(bytes) => Scatter::new(bytes),
            Owner::Aligned(bytes) => Scatter::new(bytes),
            // SAFETY: the segments are as `Scatter` wants them, by the contract of `from_iovecs`.
            Owner::Segments(list) => unsafe { Scatter::from_iovecs(list) },
        }
    }

    /// The memory as the source of a write.
    pub fn gather(&self) -> Gather<'_> {
        match &self.0 {
            Owner::Bytes(bytes) => Gather::new(bytes),
            Owner::Aligned(bytes) => Gather::new(bytes),
            // SAFETY: the segments are as `Gather` wants them, by the contract of `from_iovecs`.
            Owner::Segments(list) => unsafe { Gather::from_iovecs(list) },
        }
    }
}

/// A zeroed buffer that starts at a multiple of its alignment, for direct I/O.
pub(crate) struct AlignedBuf {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    pub(crate) fn new(len: usize, align: usize) -> Self {
        let bytes = vec![0u8; len + align];
        let start = bytes.as_ptr().align_offset(align);
        AlignedBuf { bytes, start, len }
    }

    /// Most bytes that it can have without new memory.
    pub(crate) fn capacity(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// The same memory with another length, at most the capacity; it holds arbitrary old contents.
    pub(crate) fn with_len(self, len: usize) -> Self {
        assert!(len <= self.capacity());
        AlignedBuf { len, ..self }
    }
}

impl std::ops::Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl std::ops::DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// Buffers that are used again, so that large ones are not mapped, zeroed and unmapped for every request.
#[derive(Debug, Default)]
pub(crate) struct BufferPool(Mutex<Vec<Vec<u8>>>);

/// Most buffers that a pool keeps, and the longest.
const POOL: (usize, usize) = (8, 1 << 20);

impl BufferPool {
    /// A buffer of `len` bytes that holds arbitrary old contents.
    pub(crate) fn take(&self, len: usize) -> PoolBuf<'_> {
        let mut bytes = self.0.lock().pop().unwrap_or_default();
        if bytes.len() < len {
            bytes.resize(len, 0);
        }
        PoolBuf { pool: self, bytes, len }
    }
}

/// A buffer that returns to its pool when it is dropped.
pub(crate) struct PoolBuf<'a> {
    pool: &'a BufferPool,
    bytes: Vec<u8>,
    len: usize,
}

impl std::ops::Deref for PoolBuf<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl std::ops::DerefMut for PoolBuf<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl Drop for PoolBuf<'_> {
    fn drop(&mut self) {
        let mut pool = self.pool.0.lock();
        if pool.len() < POOL.0 && self.bytes.capacity() <= POOL.1 {
            pool.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_cross_segments() {
        let (mut a, mut b, mut c) = ([0u8; 3], [0u8; 4], [0u8; 5]);
        {
            let mut bufs = [IoSliceMut::new(&mut a), IoSliceMut::new(&mut b), IoSliceMut::new(&mut c)];
            let mut list = Scatter::vectored(&mut bufs);
            assert_eq!(list.len(), 12);
            list.slice(2, 7).copy_from(&[1, 2, 3, 4, 5, 6, 7]);
            list.slice(11, 1).copy_from(&[9]);
            list.slice(4, 1).zero();
        }
        assert_eq!((a, b, c), ([0, 0, 1], [2, 0, 4, 5], [6, 7, 0, 0, 9]));
        let bufs = [IoSlice::new(&a), IoSlice::new(&b), IoSlice::new(&c)];
        let list = Gather::vectored(&bufs);
        assert_eq!(list.slice(2, 7).to_vec(), [1, 2, 0, 4, 5, 6, 7]);
        let mut out = [iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; 2];
        assert_eq!(list.slice(2, 10).fill_iovecs(&mut out), 2);
        assert_eq!((out[0].iov_len, out[1].iov_len), (1, 4));
    }
}

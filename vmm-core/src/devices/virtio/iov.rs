//! Guest buffers as I/O vectors of the host, for system calls and back-ends that copy straight from and to guest RAM.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use blockfmt::{Gather, Memory, Scatter};
use libc::iovec;
use vmm_sys_util::eventfd::EventFd;

use super::chain::Segment;
use crate::memory::{AccessError, GuestMemory};

/// What the kernel takes in one call.
const MAX_VECTORS: usize = 1024;

/// Reusable storage for I/O vectors. Between calls it holds no pointers that anyone uses.
#[derive(Default)]
pub struct IoVectors(Vec<iovec>);

// SAFETY: the pointers are only used through `GuestVectors`, which borrows the memory that they point to.
unsafe impl Send for IoVectors {}

/// Guest buffers, resolved to host addresses; borrows the memory that is mapped there.
pub struct GuestVectors<'a> {
    vectors: &'a mut Vec<iovec>,
    memory: &'a GuestMemory,
    segments: &'a [Segment],
}

impl IoVectors {
    /// Resolves guest buffers.
    ///
    /// # Errors
    /// Fails when a segment is not RAM (never for a chain from a [`super::Queue`]).
    pub fn resolve<'a>(
        &'a mut self,
        memory: &'a GuestMemory,
        segments: &'a [Segment],
    ) -> Result<GuestVectors<'a>, AccessError> {
        self.0.clear();
        for segment in segments {
            let (mut address, mut left) = (segment.address, segment.len as usize);
            while left != 0 {
                // A segment may run from one region into the next.
                let slice = memory.slice(address, left).or_else(|error| {
                    let regions = memory.regions();
                    let at = regions.partition_point(|r| r.guest_address() <= address);
                    let end = at.checked_sub(1).map_or(0, |i| regions[i].end());
                    let part = end.checked_sub(address).filter(|&p| p != 0 && p < left as u64);
                    memory.slice(address, part.ok_or(error)? as usize)
                })?;
                self.0.push(iovec { iov_base: slice.host_ptr().cast(), iov_len: slice.len() });
                address += slice.len() as u64;
                left -= slice.len();
            }
        }
        Ok(GuestVectors { vectors: &mut self.0, memory, segments })
    }
}

impl GuestVectors<'_> {
    /// The buffers as the destination of a read. Call [`Self::mark_written`] afterwards.
    pub fn scatter(&mut self) -> Scatter<'_> {
        // SAFETY: the vectors point into live mappings of `self.memory`, which is borrowed for as long.
        unsafe { Scatter::from_iovecs(self.vectors) }
    }

    /// The buffers as the source of a write.
    pub fn gather(&self) -> Gather<'_> {
        // SAFETY: as in `scatter`.
        unsafe { Gather::from_iovecs(self.vectors) }
    }

    /// The buffers for a request that outlives this borrow.
    ///
    /// # Safety
    /// The guest memory has to stay mapped for as long as the result lives.
    pub(super) unsafe fn into_memory(self) -> Memory {
        // SAFETY: the vectors point into guest memory, which is mapped writable, and the caller keeps it so. The guest is
        // another party; no Rust reference to its bytes exists.
        unsafe { Memory::from_iovecs(std::mem::take(self.vectors)) }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.vectors.iter().map(|v| v.iov_len).sum()
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes `prefix` and then the buffers to a file or device with one system call.
    ///
    /// # Errors
    /// Those of `writev`, and `InvalidInput` when the buffers are in more pieces than the kernel takes.
    pub fn write_to(&mut self, fd: BorrowedFd<'_>, prefix: &[u8]) -> io::Result<usize> {
        // SAFETY: `prefixed` passes vectors that are valid to read for the duration of the call.
        self.prefixed(prefix, |vectors| unsafe {
            libc::writev(fd.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32)
        })
    }

    /// Sends `prefix` and then the buffers on a socket with one system call, which neither blocks nor raises a signal.
    ///
    /// # Errors
    /// Those of `sendmsg`, and `InvalidInput` when the buffers are in more pieces than the kernel takes.
    pub fn send_to(&mut self, fd: BorrowedFd<'_>, prefix: &[u8]) -> io::Result<usize> {
        self.prefixed(prefix, |vectors| {
            // SAFETY: an all-zero message header is valid: no address, no vectors, no control data.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = vectors.as_mut_ptr();
            message.msg_iovlen = vectors.len();
            // SAFETY: `prefixed` passes vectors that are valid to read for the duration of the call.
            unsafe {
                libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
            }
        })
    }

    /// Calls `write` with a vector for `prefix` in front of the others. All point to memory that may be read: `prefix`,
    /// and live mappings of `self.memory`, which is borrowed for as long.
    fn prefixed(&mut self, prefix: &[u8], write: impl FnOnce(&mut [iovec]) -> isize) -> io::Result<usize> {
        if self.vectors.len() >= MAX_VECTORS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.vectors.insert(0, iovec { iov_base: prefix.as_ptr().cast_mut().cast(), iov_len: prefix.len() });
        let n = write(self.vectors);
        let result = usize::try_from(n).map_err(|_| io::Error::last_os_error());
        self.vectors.remove(0);
        result
    }

    /// Reports that the first `len` bytes were written.
    pub fn mark_written(&self, len: usize) {
        let mut left = len as u64;
        for segment in self.segments {
            let n = left.min(u64::from(segment.len));
            if n == 0 {
                break;
            }
            self.memory.mark_written(segment.address, n);
            left -= n;
        }
    }
}

/// Sends bytes on a socket; neither blocks nor raises a signal.
pub(super) fn send(fd: BorrowedFd<'_>, data: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: the buffer is valid for its length.
    let n = unsafe { libc::send(fd.as_raw_fd(), data.as_ptr().cast(), data.len(), flags) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// A view of an event descriptor with its lifetime.
pub(super) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `event` is borrowed, which the lifetime of the result says.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;

    use super::*;
    use crate::memory::{MemoryRegion, RegionOptions};

    #[test]
    fn segments_may_cross_regions() {
        let region = |at| MemoryRegion::allocate(at, 0x1000, &RegionOptions::default()).unwrap();
        let memory = GuestMemory::new(vec![region(0), region(0x1000), region(0x8000)]).unwrap();
        let segments = [Segment { address: 0xffe, len: 4 }, Segment { address: 0x8000, len: 2 }];
        let mut vectors = IoVectors::default();
        let (mut rx, tx) = std::io::pipe().unwrap();
        let mut v = vectors.resolve(&memory, &segments).unwrap();
        v.scatter().copy_from(b"abcdef");
        let mut data = [0; 4];
        memory.read(0xffe, &mut data).unwrap();
        assert_eq!(&data, b"abcd");
        assert_eq!(v.write_to(tx.as_fd(), b"12").unwrap(), 8);
        assert_eq!(v.len(), 6);
        let mut back = [0; 8];
        rx.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"12abcdef");
        assert!(vectors.resolve(&memory, &[Segment { address: 0x1ffe, len: 4 }]).is_err());
    }
}

//! The few system calls without a safe wrapper in `std`: eventfd, epoll, poll, vectored socket I/O, and cache
//! prefetch. This is one of the modules that may use `unsafe`.
#![expect(unsafe_code, reason = "system calls and the prefetch intrinsic have no safe wrapper in std")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::packet::Chunks;

fn cvt(r: libc::c_int) -> io::Result<libc::c_int> {
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r) }
}

fn cvt_len(r: libc::ssize_t) -> io::Result<usize> {
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r as usize) }
}

/// A non-blocking eventfd.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// Makes a counter at zero.
    pub fn new() -> io::Result<Self> {
        // SAFETY: eventfd takes no pointers.
        let fd = cvt(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        // SAFETY: the call returned a new descriptor that nothing else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Adopts an eventfd that a peer handed over, and makes it non-blocking.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(fd.as_raw_fd())?;
        Ok(Self(fd))
    }

    /// Adds one. A full counter already wakes the reader, so failure needs no handling.
    pub fn signal(&self) {
        let one = 1u64;
        // SAFETY: `one` is eight readable bytes.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// Resets the counter; returns whether it was set.
    pub fn clear(&self) -> bool {
        let mut v = 0u64;
        // SAFETY: `v` is eight writable bytes.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut v).cast(), 8) == 8 }
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsRawFd for Epoll {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A level-triggered epoll set.
#[derive(Debug)]
pub struct Epoll(OwnedFd);

impl Epoll {
    /// Makes an empty set.
    pub fn new() -> io::Result<Self> {
        // SAFETY: epoll_create1 takes no pointers.
        let fd = cvt(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: the call returned a new descriptor that nothing else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Watches `fd` for readability under `token`.
    pub fn add(&self, fd: RawFd, token: u64) -> io::Result<()> {
        let mut ev = libc::epoll_event { events: libc::EPOLLIN as u32, u64: token };
        // SAFETY: `ev` lives through the call.
        cvt(unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut ev) })?;
        Ok(())
    }

    /// Waits up to `timeout_ms` (-1: for ever) and calls `f` with the token of each ready descriptor.
    pub fn wait(&self, timeout_ms: i32, mut f: impl FnMut(u64)) -> io::Result<usize> {
        let mut evs = [libc::epoll_event { events: 0, u64: 0 }; 64];
        // SAFETY: `evs` has room for the 64 events asked for.
        let n = unsafe { libc::epoll_wait(self.0.as_raw_fd(), evs.as_mut_ptr(), 64, timeout_ms) };
        match cvt(n) {
            Ok(n) => {
                evs[..n as usize].iter().for_each(|e| f(e.u64));
                Ok(n as usize)
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(0),
            Err(e) => Err(e),
        }
    }
}

/// Waits until one of `fds` is readable or closed; returns one flag a descriptor.
pub fn poll_readable<const N: usize>(fds: [RawFd; N], timeout_ms: i32) -> io::Result<[bool; N]> {
    let mut p = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    // SAFETY: `p` holds N initialised entries.
    let r = unsafe { libc::poll(p.as_mut_ptr(), N as libc::nfds_t, timeout_ms) };
    match cvt(r) {
        Ok(_) => Ok(p.map(|p| p.revents != 0)),
        Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok([false; N]),
        Err(e) => Err(e),
    }
}

/// Puts a descriptor into non-blocking mode.
pub fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: F_GETFL and F_SETFL take no pointers.
    let flags = cvt(unsafe { libc::fcntl(fd, libc::F_GETFL) })?;
    // SAFETY: as above.
    cvt(unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) })?;
    Ok(())
}

/// `readv` into the given buffers.
pub fn read_vectored(fd: RawFd, bufs: &mut [io::IoSliceMut<'_>]) -> io::Result<usize> {
    // SAFETY: IoSliceMut is guaranteed ABI compatible with iovec; the buffers live through the call.
    cvt_len(unsafe { libc::readv(fd, bufs.as_ptr().cast(), bufs.len() as libc::c_int) })
}

/// `sendmsg` (sockets) of a prefix and the chunks of a packet, without waiting and without SIGPIPE.
pub fn send_chunks(fd: RawFd, prefix: &[u8], chunks: &Chunks) -> io::Result<usize> {
    let iov = iovecs(prefix, chunks);
    // SAFETY: msghdr is plain data for which zero is valid.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = iov.as_ptr().cast_mut();
    msg.msg_iovlen = iov.len();
    // SAFETY: every iovec describes readable memory that the packet behind `chunks` keeps mapped.
    cvt_len(unsafe { libc::sendmsg(fd, &msg, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) })
}

/// `writev` (tap) of a prefix and the chunks of a packet.
pub fn write_chunks(fd: RawFd, prefix: &[u8], chunks: &Chunks) -> io::Result<usize> {
    let iov = iovecs(prefix, chunks);
    // SAFETY: every iovec describes readable memory that the packet behind `chunks` keeps mapped.
    cvt_len(unsafe { libc::writev(fd, iov.as_ptr(), iov.len() as libc::c_int) })
}

fn iovecs(prefix: &[u8], chunks: &Chunks) -> Vec<libc::iovec> {
    let mut iov = Vec::with_capacity(1 + chunks.len());
    if !prefix.is_empty() {
        iov.push(libc::iovec { iov_base: prefix.as_ptr().cast_mut().cast(), iov_len: prefix.len() });
    }
    iov.extend(chunks.iter().map(|c| libc::iovec { iov_base: c.ptr.cast_mut().cast(), iov_len: c.len }));
    iov
}

/// Asks the CPU to load the cache line of `t`.
#[inline(always)]
pub fn prefetch<T: ?Sized>(t: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: prefetch has no effect on memory or registers whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>((&raw const *t).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = t;
}

/// Binds the calling thread to one core.
pub fn pin_to_core(core: usize) -> io::Result<()> {
    // SAFETY: cpu_set_t is plain data for which zero is valid.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if core >= 8 * size_of::<libc::cpu_set_t>() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the number was checked against the size of the set.
    unsafe { libc::CPU_SET(core, &mut set) };
    // SAFETY: `set` is initialised and of the size given.
    cvt(unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) })?;
    Ok(())
}

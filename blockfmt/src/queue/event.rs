//! Descriptors that become readable.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// An eventfd.
#[derive(Debug)]
pub(super) struct Event(File);

impl Event {
    pub fn new() -> io::Result<Self> {
        // SAFETY: a system call without pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Event(unsafe { File::from_raw_fd(fd) }))
    }

    /// Makes it readable.
    pub fn signal(&self) {
        // Fails only if it is readable already.
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }

    /// Makes it unreadable.
    pub fn clear(&self) {
        // Fails only if it is not readable.
        let _ = (&self.0).read(&mut [0; 8]);
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// An epoll instance, which is readable while one of some descriptors is. Nobody has to clear it.
#[derive(Debug)]
pub(super) struct AnyOf(OwnedFd);

impl AnyOf {
    pub fn new(descriptors: [BorrowedFd<'_>; 2]) -> io::Result<Self> {
        // SAFETY: a system call without pointers.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let any = AnyOf(unsafe { OwnedFd::from_raw_fd(fd) });
        for descriptor in descriptors {
            let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
            // SAFETY: the structure lives during the call, which only reads it.
            let added =
                unsafe { libc::epoll_ctl(fd, libc::EPOLL_CTL_ADD, descriptor.as_raw_fd(), &raw mut event) };
            if added < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(any)
    }
}

impl AsFd for AnyOf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until a descriptor is readable. May return early.
pub(super) fn wait_for(descriptor: BorrowedFd<'_>) {
    let mut poll = libc::pollfd { fd: descriptor.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one structure, which lives during the call. It fails only if a signal arrives.
    unsafe { libc::poll(&raw mut poll, 1, -1) };
}

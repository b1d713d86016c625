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

    /// Watches `fd` for readability and room to write, as wanted; `new`: for the first time.
    pub fn set(&self, fd: RawFd, token: u64, read: bool, write: bool, new: bool) -> io::Result<()> {
        let events = if read { libc::EPOLLIN } else { 0 } | if write { libc::EPOLLOUT } else { 0 };
        let mut ev = libc::epoll_event { events: events as u32, u64: token };
        let op = if new { libc::EPOLL_CTL_ADD } else { libc::EPOLL_CTL_MOD };
        // SAFETY: `ev` lives through the call.
        cvt(unsafe { libc::epoll_ctl(self.0.as_raw_fd(), op, fd, &mut ev) })?;
        Ok(())
    }

    /// Stops watching `fd`. A descriptor that is not watched is no error.
    pub fn remove(&self, fd: RawFd) {
        // SAFETY: EPOLL_CTL_DEL ignores the event argument.
        unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut()) };
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

/// Asks the CPU to load the cache line at `p`, which need not be a valid address.
#[inline(always)]
pub fn prefetch<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: prefetch has no effect on memory or registers whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Asks the CPU for the cache line at `p`, which need not be a valid address, to be written.
#[inline(always)]
pub fn prefetch_write(p: *mut u8) {
    // The intrinsic would make it a prefetch for reading, as not every x86-64 has the instruction; those without ignore
    // it.
    #[cfg(target_arch = "x86_64")]
    // SAFETY: prefetchw has no effect on memory or registers whatever the address.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) p, options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Receives bytes and descriptors from a Unix stream socket.
pub fn recv_with_fds(fd: RawFd, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let mut control = [0u64; 32];
    // SAFETY: msghdr is plain data for which zero is valid.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.as_mut_ptr().cast();
    msg.msg_controllen = size_of_val(&control);
    // SAFETY: `msg` describes writable buffers that live through the call.
    let n = cvt_len(unsafe { libc::recvmsg(fd, &mut msg, libc::MSG_CMSG_CLOEXEC) })?;
    // SAFETY: the kernel filled the control buffer that `msg` describes.
    let mut c = unsafe { libc::CMSG_FIRSTHDR(&msg) };
    while !c.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return headers within the buffer, or null.
        let header = unsafe { &*c };
        if header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: CMSG_LEN computes a constant.
            let bytes = header.cmsg_len - unsafe { libc::CMSG_LEN(0) } as usize;
            for i in 0..bytes / size_of::<RawFd>() {
                // SAFETY: the message holds this many descriptors, which now belong to this process alone.
                fds.push(unsafe {
                    OwnedFd::from_raw_fd(libc::CMSG_DATA(c).cast::<RawFd>().add(i).read_unaligned())
                });
            }
        }
        // SAFETY: `c` came from this buffer.
        c = unsafe { libc::CMSG_NXTHDR(&msg, c) };
    }
    Ok(n)
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

const TUN_OFFLOADS: libc::c_uint =
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;

/// An interface request with the name filled in.
fn interface_request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain data for which zero is valid.
    let mut r: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.bytes().any(|b| b == 0 || b == b'/') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "this is not an interface name"));
    }
    for (to, from) in r.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(r)
}

/// Opens one queue of a tap interface: non-blocking, with virtio-net headers and offloads.
pub fn open_tap(name: &str, multi_queue: bool) -> io::Result<OwnedFd> {
    let fd: OwnedFd = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun")?.into();
    let mut r = interface_request(name)?;
    let queues = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
    r.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an ifreq, which lives through the call.
    cvt(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &mut r) })?;
    // SAFETY: TUNSETOFFLOAD takes a number.
    cvt(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(TUN_OFFLOADS)) })?;
    set_nonblocking(fd.as_raw_fd())?;
    Ok(fd)
}

fn socket(domain: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: socket takes no pointers.
    let fd = cvt(unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, protocol) })?;
    // SAFETY: the call returned a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Starts to connect to an address without waiting: the stream becomes writable when it is done.
pub fn connect_tcp(to: &std::net::SocketAddr) -> io::Result<std::net::TcpStream> {
    use std::net::SocketAddr;
    // SAFETY: sockaddr_storage is plain data for which zero is valid.
    let mut a: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let (domain, len) = match to {
        SocketAddr::V4(v4) => {
            let sin = libc::sockaddr_in {
                sin_family: libc::AF_INET as u16,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                sin_zero: [0; 8],
            };
            // SAFETY: sockaddr_storage is larger than, and aligned for, every address.
            unsafe { (&raw mut a).cast::<libc::sockaddr_in>().write(sin) };
            (libc::AF_INET, size_of::<libc::sockaddr_in>())
        }
        SocketAddr::V6(v6) => {
            let sin6 = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as u16,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: as above.
            unsafe { (&raw mut a).cast::<libc::sockaddr_in6>().write(sin6) };
            (libc::AF_INET6, size_of::<libc::sockaddr_in6>())
        }
    };
    let s = socket(domain, libc::SOCK_STREAM, 0)?;
    // SAFETY: `a` is an address of the length given.
    match cvt(unsafe { libc::connect(s.as_raw_fd(), (&raw const a).cast(), len as libc::socklen_t) }) {
        Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => Err(e),
        _ => Ok(s.into()),
    }
}

/// Sets an interface's UP flag.
pub fn bring_up(name: &str) -> io::Result<()> {
    let s = socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    let mut r = interface_request(name)?;
    // SAFETY: SIOCGIFFLAGS reads the name and writes the flags of an ifreq.
    cvt(unsafe { libc::ioctl(s.as_raw_fd(), libc::SIOCGIFFLAGS, &mut r) })?;
    // SAFETY: the call above made the flags the union's active field.
    unsafe { r.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    // SAFETY: SIOCSIFFLAGS reads an ifreq.
    cvt(unsafe { libc::ioctl(s.as_raw_fd(), libc::SIOCSIFFLAGS, &r) })?;
    Ok(())
}

fn set_option<T>(fd: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` is readable for its size.
    cvt(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const *value).cast(), len) })?;
    Ok(())
}

/// Opens a packet socket on an interface: promiscuous, with virtio-net headers, without its own output.
pub fn open_packet_socket(name: &str) -> io::Result<OwnedFd> {
    const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
    const PACKET_VNET_HDR: libc::c_int = 15;
    let s = socket(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
    let mut r = interface_request(name)?;
    // SAFETY: SIOCGIFINDEX reads the name and writes the index of an ifreq.
    cvt(unsafe { libc::ioctl(s.as_raw_fd(), libc::SIOCGIFINDEX, &mut r) })?;
    // SAFETY: the call above made the index the union's active field.
    let index = unsafe { r.ifr_ifru.ifru_ifindex };
    set_option(&s, libc::SOL_PACKET, PACKET_VNET_HDR, &1i32)?;
    set_option(&s, libc::SOL_PACKET, libc::PACKET_AUXDATA, &1i32)?;
    set_option(&s, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, &1i32)?;
    let member = libc::packet_mreq {
        mr_ifindex: index,
        mr_type: libc::PACKET_MR_PROMISC as u16,
        mr_alen: 0,
        mr_address: [0; 8],
    };
    set_option(&s, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &member)?;
    // SAFETY: sockaddr_ll is plain data for which zero is valid.
    let mut a: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    a.sll_family = libc::AF_PACKET as u16;
    a.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    a.sll_ifindex = index;
    // SAFETY: `a` is an address of the length given.
    cvt(unsafe { libc::bind(s.as_raw_fd(), (&raw const a).cast(), size_of_val(&a) as libc::socklen_t) })?;
    Ok(s)
}

/// Receives from a packet socket; returns the length and the VLAN tag that the kernel took off, as (TPID, TCI).
pub fn recv_packet(fd: RawFd, bufs: &mut [io::IoSliceMut<'_>]) -> io::Result<(usize, Option<(u16, u16)>)> {
    const TP_STATUS_VLAN_VALID: u32 = 1 << 4;
    const TP_STATUS_VLAN_TPID_VALID: u32 = 1 << 6;
    let mut control = [0u64; 16];
    // SAFETY: msghdr is plain data for which zero is valid.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = bufs.as_mut_ptr().cast();
    msg.msg_iovlen = bufs.len();
    msg.msg_control = control.as_mut_ptr().cast();
    msg.msg_controllen = size_of_val(&control);
    // SAFETY: IoSliceMut is ABI compatible with iovec; all buffers live through the call.
    let n = cvt_len(unsafe { libc::recvmsg(fd, &mut msg, libc::MSG_DONTWAIT) })?;
    let mut tag = None;
    // SAFETY: the kernel filled the control buffer that `msg` describes.
    let c = unsafe { libc::CMSG_FIRSTHDR(&msg) };
    if !c.is_null() {
        // SAFETY: the header lies within the buffer.
        let header = unsafe { &*c };
        if header.cmsg_level == libc::SOL_PACKET && header.cmsg_type == libc::PACKET_AUXDATA {
            // SAFETY: PACKET_AUXDATA carries a tpacket_auxdata.
            let aux = unsafe { libc::CMSG_DATA(c).cast::<libc::tpacket_auxdata>().read_unaligned() };
            if aux.tp_status & TP_STATUS_VLAN_VALID != 0 {
                let tpid_valid = aux.tp_status & TP_STATUS_VLAN_TPID_VALID != 0;
                tag = Some((if tpid_valid { aux.tp_vlan_tpid } else { 0x8100 }, aux.tp_vlan_tci));
            }
        }
    }
    Ok((n, tag))
}

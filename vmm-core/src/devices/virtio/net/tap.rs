//! A tap device of the host, with the kernel's offloads and several queues.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use super::super::iov::GuestVectors;
use super::{HEADER_LEN, Header, NetBackend, NetPort, Sent, net_features as f};
use zerocopy::IntoBytes;

const TUNSETIFF: u64 = 0x4004_54ca;
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
const TUNSETQUEUE: u64 = 0x4004_54d9;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_ATTACH_QUEUE: u16 = 0x0200;
const IFF_DETACH_QUEUE: u16 = 0x0400;
const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;
const TUN_F_TSO_ECN: u32 = 8;

/// Why a tap device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is empty or longer than 15 bytes.
    #[error("{0:?} is not a name of a network interface; use 1 to 15 bytes")]
    BadName(String),
    /// The host refused.
    #[error("Cannot open tap device {name} ({step}); check that it exists and that you may use it")]
    Host {
        /// The interface.
        name: String,
        /// The step that failed.
        step: &'static str,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
}

/// `struct ifreq` with flags.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    unused: [u8; 22],
}

impl Request {
    fn new(flags: u16) -> Self {
        Self { name: [0; 16], flags, unused: [0; 22] }
    }
}

fn ioctl(file: &File, request: u64, argument: *const libc::c_void) -> io::Result<()> {
    // SAFETY: every caller in this module passes an argument of the type that the request takes, or an integer for
    // TUNSETOFFLOAD, and it outlives the call.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A tap device with one or more queues. It exists as long as the back-end, unless it was made persistent.
pub struct TapBackend {
    name: String,
    queues: Vec<File>,
}

impl TapBackend {
    /// Opens the tap device `name` with `pairs` queues, and makes it when it does not exist.
    ///
    /// # Errors
    /// Fails when the name is malformed or the host refuses.
    pub fn open(name: &str, pairs: u16) -> Result<Self, TapError> {
        if name.is_empty() || name.len() > 15 || name.contains(['/', '\0']) {
            return Err(TapError::BadName(name.into()));
        }
        let multi = if pairs > 1 { IFF_MULTI_QUEUE } else { 0 };
        let mut request = Request::new(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | multi);
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        let fail = |step| move |source| TapError::Host { name: name.into(), step, source };
        let mut queues = Vec::new();
        for _ in 0..pairs.max(1) {
            let mut options = OpenOptions::new();
            options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
            let file = options.open("/dev/net/tun").map_err(fail("open /dev/net/tun"))?;
            ioctl(&file, TUNSETIFF, (&raw const request).cast()).map_err(fail("TUNSETIFF"))?;
            let size = HEADER_LEN as i32;
            ioctl(&file, TUNSETVNETHDRSZ, (&raw const size).cast()).map_err(fail("TUNSETVNETHDRSZ"))?;
            queues.push(file);
        }
        Ok(Self { name: name.into(), queues })
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl NetBackend for TapBackend {
    fn pairs(&self) -> u16 {
        self.queues.len() as u16
    }

    fn offloads(&self) -> u64 {
        let host = f::CSUM | f::HOST_TSO4 | f::HOST_TSO6 | f::HOST_ECN;
        host | f::GUEST_CSUM | f::GUEST_TSO4 | f::GUEST_TSO6 | f::GUEST_ECN
    }

    fn set_offloads(&self, features: u64) -> io::Result<()> {
        let mut flags = 0;
        if features & f::GUEST_CSUM != 0 {
            for (feature, flag) in
                [(f::GUEST_TSO4, TUN_F_TSO4), (f::GUEST_TSO6, TUN_F_TSO6), (f::GUEST_ECN, TUN_F_TSO_ECN)]
            {
                if features & feature != 0 {
                    flags |= flag;
                }
            }
            // ECN alone is not a valid combination.
            if flags & (TUN_F_TSO4 | TUN_F_TSO6) == 0 {
                flags = 0;
            }
            flags |= TUN_F_CSUM;
        }
        ioctl(&self.queues[0], TUNSETOFFLOAD, std::ptr::without_provenance(flags as usize))
    }

    fn set_active_pairs(&self, pairs: u16) -> io::Result<()> {
        if self.queues.len() == 1 {
            return Ok(());
        }
        for (index, queue) in self.queues.iter().enumerate() {
            let flag = if index < usize::from(pairs) { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
            let request = Request::new(flag);
            match ioctl(queue, TUNSETQUEUE, (&raw const request).cast()) {
                // It is in the wanted state already.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
                other => other?,
            }
        }
        Ok(())
    }

    fn open(&self, index: u16) -> io::Result<Box<dyn NetPort>> {
        let queue = self.queues.get(usize::from(index)).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(TapPort(queue.try_clone()?)))
    }
}

struct TapPort(File);

impl NetPort for TapPort {
    fn descriptor(&self) -> Option<RawFd> {
        Some(self.0.as_raw_fd())
    }

    fn receive(&mut self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match self.0.read(frame) {
                Ok(n) if n < HEADER_LEN + 14 => {}
                Ok(n) => return Ok(Some(n)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                // The interface was deleted.
                Err(e) => return Err(e),
            }
        }
    }

    fn send(&mut self, header: &Header, frame: &mut GuestVectors<'_>) -> io::Result<Sent> {
        match frame.write_to(self.0.as_fd(), header.as_bytes()) {
            Ok(_) => Ok(Sent::Yes),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Sent::Later),
            // The kernel refuses the frame or its header, or the interface is down.
            Err(_) => Ok(Sent::Dropped),
        }
    }

    fn reconnect(&mut self) -> io::Result<()> {
        // An interface that comes back under the same name is another one.
        Err(io::ErrorKind::NotConnected.into())
    }
}

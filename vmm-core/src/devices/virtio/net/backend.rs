//! Where the frames of a network device go.

use std::io;
use std::os::fd::RawFd;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::super::iov::GuestVectors;

/// Length of [`Header`] in bytes.
pub const HEADER_LEN: usize = 12;

/// The header of every frame (virtio 1.2, section 5.1.6), as the kernel's tap devices have it too. All fields are
/// little-endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Header {
    /// Whether a checksum is to be completed, or was verified.
    pub flags: u8,
    /// How the frame is to be segmented.
    pub gso_type: u8,
    /// Length of the headers in front of the payload to segment.
    pub header_len: u16,
    /// Payload of each segment.
    pub gso_size: u16,
    /// Where the checksum begins.
    pub checksum_start: u16,
    /// Where the checksum goes, from its begin.
    pub checksum_offset: u16,
    /// Buffers that a received frame took.
    pub buffers: u16,
}

/// What happened to a frame that was to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way.
    Yes,
    /// The port has no room; it wants to be asked again when its descriptor is writable.
    Later,
    /// The port refuses it, for good.
    Dropped,
}

/// One connection to a network, used by the thread of one pair of queues. Nothing blocks.
pub trait NetPort: Send {
    /// The descriptor to watch, or `None` while there is no connection.
    fn descriptor(&self) -> Option<RawFd>;

    /// Whether the descriptor is to be watched for being writable, too.
    fn wants_write(&self) -> bool {
        false
    }

    /// Sends what is left of earlier frames.
    ///
    /// # Errors
    /// Fails when the connection is lost.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Whether a frame waits inside of the port, of which its descriptor says nothing.
    fn is_ready(&self) -> bool {
        false
    }

    /// Takes the next received frame with its header into `frame`; returns their length, or `None` when there is none
    /// now.
    ///
    /// # Errors
    /// Fails when the connection is lost.
    fn receive(&mut self, frame: &mut [u8]) -> io::Result<Option<usize>>;

    /// Sends a frame.
    ///
    /// # Errors
    /// Fails when the connection is lost.
    fn send(&mut self, header: &Header, frame: &mut GuestVectors<'_>) -> io::Result<Sent>;

    /// Tries to connect again after a loss.
    ///
    /// # Errors
    /// Fails while the other side is not there.
    fn reconnect(&mut self) -> io::Result<()>;
}

/// A network that a device is attached to.
pub trait NetBackend: Send + Sync {
    /// Pairs of queues that it can serve.
    fn pairs(&self) -> u16 {
        1
    }

    /// Checksum and segmentation features (of [`super::net_features`]) that it has.
    fn offloads(&self) -> u64 {
        0
    }

    /// The features that the driver accepted, or left on at run time: what may be delivered to it.
    ///
    /// # Errors
    /// Fails when the host refuses.
    fn set_offloads(&self, _features: u64) -> io::Result<()> {
        Ok(())
    }

    /// The driver uses this many pairs.
    ///
    /// # Errors
    /// Fails when the host refuses.
    fn set_active_pairs(&self, _pairs: u16) -> io::Result<()> {
        Ok(())
    }

    /// The port of pair `index`. It may come without a connection and make it later.
    ///
    /// # Errors
    /// Fails when the host refuses.
    fn open(&self, index: u16) -> io::Result<Box<dyn NetPort>>;
}

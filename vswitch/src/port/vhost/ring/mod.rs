//! The device's side of a virtqueue, in either of its layouts.

mod frames;
mod packed;
mod split;

pub use self::packed::PackedRing;
pub use self::split::SplitRing;
use super::memory::GuestMemory;
use crate::packet::Burst;
use crate::packet::offload::VNET_HDR_LEN;
use crate::port::Batch;

/// Largest queue.
pub const QUEUE_MAX: u16 = 32_768;
/// Most descriptors in a chain.
const CHAIN_MAX: usize = 64;

/// Flags of a descriptor, the same in both layouts.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// What the guest got wrong. The queue is dead until it is set up anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The available index is further ahead than the queue is long.
    #[error("The available index runs ahead of the queue")]
    Index,
    /// A descriptor number lies outside of its table.
    #[error("A descriptor number is outside of its table")]
    Descriptor,
    /// An address is not in guest memory.
    #[error("A descriptor points outside of guest memory")]
    Address,
    /// A chain is too long, nested, or mixes directions.
    #[error("A descriptor chain is malformed")]
    Chain,
}

/// Features that change how a ring is used.
#[derive(Clone, Copy, Debug)]
pub struct RingFeatures {
    /// `VIRTIO_F_RING_PACKED`.
    pub packed: bool,
    /// `VIRTIO_RING_F_EVENT_IDX`.
    pub event_idx: bool,
    /// `VIRTIO_NET_F_MRG_RXBUF`.
    pub mergeable: bool,
    /// Length of the packet header: 10 or 12.
    pub header: usize,
    /// Whether writes go to the dirty log (`VHOST_F_LOG_ALL`).
    pub log: bool,
}

impl Default for RingFeatures {
    /// Those of a front-end that negotiates none.
    fn default() -> Self {
        Self { packed: false, event_idx: false, mergeable: false, header: VNET_HDR_LEN, log: false }
    }
}

/// Addresses of the three parts, in this process.
#[derive(Clone, Copy, Debug)]
pub struct RingAddresses {
    /// Descriptor table; of a packed ring, the ring itself.
    pub desc: *mut u8,
    /// Available ring; of a packed ring, the driver's wish for notifications.
    pub avail: *mut u8,
    /// Used ring; of a packed ring, the device's wish for notifications.
    pub used: *mut u8,
    /// Guest address of `used`, when its pages are to be logged.
    pub used_log: Option<u64>,
    /// Guest address of `desc`, when its pages are to be logged.
    pub desc_log: Option<u64>,
}

impl RingAddresses {
    /// Whether the parts are aligned as the layout demands.
    pub fn is_aligned(&self, packed: bool) -> bool {
        let avail = if packed { 4 } else { 2 };
        (self.desc as usize).is_multiple_of(16)
            && (self.avail as usize).is_multiple_of(avail)
            && (self.used as usize).is_multiple_of(4)
    }
}

/// Bytes of each part of a ring of `size` entries, in the order of [`RingAddresses`].
pub fn part_sizes(size: u16, packed: bool) -> (u64, u64, u64) {
    let n = u64::from(size);
    if packed { (16 * n, 4, 4) } else { (16 * n, 6 + 2 * n, 6 + 8 * n) }
}

/// A ring of either layout.
#[derive(Debug)]
pub enum Ring {
    /// Virtio 1.2, 2.7.
    Split(SplitRing),
    /// Virtio 1.2, 2.8.
    Packed(PackedRing),
}

/// Calls the same on either ring.
macro_rules! either {
    ($ring:expr, $r:ident => $call:expr) => {
        match $ring {
            Ring::Split($r) => $call,
            Ring::Packed($r) => $call,
        }
    };
}

impl Ring {
    /// Where the ring stands: what a front-end asks for when it stops the queue.
    pub fn base(&self) -> u32 {
        either!(self, r => r.base())
    }

    /// Whether buffers taken by [`Ring::pop`] wait for [`Ring::complete`].
    pub fn has_pending(&self) -> bool {
        either!(self, r => r.has_pending())
    }

    /// Changes the features that may change while the queue runs.
    pub fn set_log(&mut self, on: bool) {
        either!(self, r => r.set_log(on));
    }

    /// Takes packets that the guest sends, up to the burst's room. Heads are copied, tails stay in guest memory,
    /// which the burst must hold, until [`Ring::complete`].
    #[inline]
    pub fn pop(&mut self, memory: &GuestMemory, burst: &mut Burst) -> Result<(), RingError> {
        either!(self, r => r.pop(memory, burst))
    }

    /// Gives back every buffer taken by [`Ring::pop`].
    #[inline]
    pub fn complete(&mut self, memory: &GuestMemory) {
        either!(self, r => r.complete(memory));
    }

    /// Copies packets into buffers of the guest; returns how many went in.
    #[inline]
    pub fn push(&mut self, memory: &GuestMemory, batch: &Batch<'_>) -> Result<usize, RingError> {
        either!(self, r => r.push(memory, batch))
    }

    /// Whether the driver wants to be notified of what was published since the last call.
    #[inline]
    pub fn wants_notification(&mut self) -> bool {
        either!(self, r => r.wants_notification())
    }

    /// Asks for notifications or waives them; when asking, returns whether buffers are available already.
    pub fn arm(&mut self, memory: &GuestMemory, on: bool) -> bool {
        match self {
            Self::Split(r) => r.arm(on),
            Self::Packed(r) => r.arm(memory, on),
        }
    }

    /// The front-end knows where the ring stands: nothing in the ring need tell.
    pub fn forget_position(&mut self, memory: &GuestMemory) {
        if let Self::Packed(r) = self {
            r.forget_position(memory);
        }
    }
}

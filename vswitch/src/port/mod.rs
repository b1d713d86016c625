//! Ports: what packets come in and go out by.

mod bond_port;
mod capture;
mod datagram;
mod endpoint;
mod netdev;
mod patch;
mod stream;
mod vhost;

use std::os::fd::RawFd;

pub(crate) use bond_port::BondPort;
pub use capture::{CapturePort, NextWriter};
pub use datagram::DatagramPort;
pub use endpoint::{Endpoint, EndpointPort};
pub use netdev::NetdevPort;
pub use patch::{PatchPanel, PatchPort};
pub(crate) use stream::listen_private;
pub use stream::{StreamMode, StreamPort};
pub use vhost::{VhostUserDriver, VhostUserOptions, VhostUserPort};

use crate::packet::offload::OffloadCaps;
use crate::packet::{Burst, Packet};

/// Number of a port within its switch, as OpenFlow numbers ports: from 1 to [`PORT_MAX`].
pub type PortId = u32;
/// Largest port number.
pub const PORT_MAX: PortId = 4095;

/// The packets that one transmit call is given, in order.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    packets: &'a [Packet],
    index: Option<&'a [u16]>,
}

impl<'a> Batch<'a> {
    /// All of `packets`.
    pub fn all(packets: &'a [Packet]) -> Self {
        Self { packets, index: None }
    }

    /// The packets at the places in `index`.
    #[inline]
    pub(crate) fn select(packets: &'a [Packet], index: &'a [u16]) -> Self {
        Self { packets, index: Some(index) }
    }

    /// Number of packets.
    #[inline]
    pub fn len(&self) -> usize {
        self.index.map_or(self.packets.len(), <[u16]>::len)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Packet number `i` of the batch.
    #[inline]
    pub fn get(&self, i: usize) -> &'a Packet {
        match self.index {
            Some(index) => &self.packets[usize::from(index[i])],
            None => &self.packets[i],
        }
    }

    /// The packets in order.
    pub fn iter(&self) -> impl Iterator<Item = &'a Packet> + '_ {
        (0..self.len()).map(|i| self.get(i))
    }
}

/// A source and sink of packets.
///
/// Every queue is used by one worker at a time, but different queues by different workers, so implementations
/// synchronise inside. No call may block.
pub trait Port: Send + Sync {
    /// What the port is, for people: `vhost-user`, `tap`.
    fn kind(&self) -> &'static str;

    /// Number of receive queues. It stays the same for the port's life.
    fn rx_queues(&self) -> usize {
        1
    }

    /// Number of transmit queues. It stays the same for the port's life.
    fn tx_queues(&self) -> usize {
        1
    }

    /// What the peer takes unfinished; it may change at any time.
    fn offloads(&self) -> OffloadCaps {
        OffloadCaps::empty()
    }

    /// Whether a peer is there. Packets towards a port without one are dropped.
    fn link_up(&self) -> bool {
        true
    }

    /// Moves received packets into `burst`, as many as there are and as fit.
    fn receive(&self, queue: usize, burst: &mut Burst);

    /// Says that the packets of the last [`Port::receive`] on this queue are no longer needed. The peer may learn of it
    /// at the next [`Port::receive`] or [`Port::arm`] only.
    fn complete(&self, queue: usize) {
        let _ = queue;
    }

    /// Sends packets; returns how many, counted from the first, were taken. The rest is dropped. A sleeping peer may
    /// need [`Port::notify`] to wake up.
    fn transmit(&self, queue: usize, batch: &Batch<'_>) -> usize;

    /// Wakes the peer, if it wants that, for what was sent on a queue since the last call. Apart from
    /// [`Port::transmit`], since to find out what the peer wants takes long right after writing to its memory.
    fn notify(&self, queue: usize) {
        let _ = queue;
    }

    /// A descriptor, the same for the port's life, that becomes readable when an armed queue has something to
    /// receive. `None`: the queue is only found to be ready by polling.
    fn ready_fd(&self, queue: usize) -> Option<RawFd>;

    /// Switches wake-ups of [`Port::ready_fd`] on or off; when on, returns whether packets wait already.
    fn arm(&self, queue: usize, on: bool) -> bool;

    /// Whether an empty [`Port::receive`] costs only a few loads (shared memory) and not a system call.
    fn is_cheap_to_poll(&self) -> bool {
        false
    }
}

//! A burst: the packets that one receive call takes from one queue.

use std::any::Any;
use std::sync::Arc;

use super::{FRAME_MAX, FRAME_MIN, Packet};

/// Most packets that one receive call takes from a queue, so that no port starves the others.
pub const BURST: usize = 32;

/// Most guests whose memory is held from one burst to the next.
const HELD_MAX: usize = 64;
/// Most packets in a burst, copies included.
const COPIES_MAX: usize = 16_384;

/// Up to [`BURST`] received packets, and copies that the pipeline makes of them.
#[derive(Debug, Default)]
pub struct Burst {
    packets: Vec<Packet>,
    len: usize,
    /// Guest memory that packets of this burst, or of those before it, lie in.
    memory: Vec<Arc<dyn Any + Send + Sync>>,
    /// Frames that the port refused while it filled the burst (too long, too short, malformed descriptors).
    pub errors: u32,
}

impl Burst {
    /// An empty burst.
    pub fn new() -> Self {
        Self { packets: (0..BURST).map(|_| Packet::default()).collect(), ..Self::default() }
    }

    /// Drops all packets. The hold on guest memory stays, for the next ones: see [`Burst::release`].
    #[inline]
    pub fn clear(&mut self) {
        self.packets[..self.len].iter_mut().for_each(Packet::clear);
        self.len = 0;
        self.errors = 0;
        if self.memory.len() > HELD_MAX {
            self.memory.clear();
        }
    }

    /// Drops all packets and the hold on guest memory, which may then be unmapped.
    pub fn release(&mut self) {
        self.clear();
        self.memory.clear();
    }

    /// Number of packets.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no packet.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many more packets a port may add.
    #[inline]
    pub fn room(&self) -> usize {
        BURST.saturating_sub(self.len)
    }

    /// The packets.
    #[inline]
    pub fn packets(&self) -> &[Packet] {
        &self.packets[..self.len]
    }

    /// One packet, to be edited.
    #[inline]
    pub(crate) fn packet_mut(&mut self, i: usize) -> &mut Packet {
        &mut self.packets[i]
    }

    /// Adds an empty packet for a port to fill; `None` when the burst is full.
    #[inline]
    pub(crate) fn push(&mut self) -> Option<&mut Packet> {
        if self.len >= BURST {
            return None;
        }
        self.len += 1;
        let p = &mut self.packets[self.len - 1];
        p.clear();
        Some(p)
    }

    /// Takes back the last packet added.
    #[inline]
    pub(crate) fn pop(&mut self) {
        self.len = self.len.saturating_sub(1);
        self.packets[self.len].clear();
    }

    /// Adds a copy of `frame`; `false` when the burst is full. A frame of impossible length counts as an error.
    pub fn push_frame(&mut self, frame: &[u8]) -> bool {
        if !(FRAME_MIN..=FRAME_MAX).contains(&frame.len()) {
            self.errors += 1;
            return true;
        }
        match self.push() {
            Some(p) => {
                p.set_frame(frame);
                true
            }
            None => false,
        }
    }

    /// Adds a copy of packet `i`, beyond the limit for received packets, and returns its index; `None` when the
    /// rules make more copies than is sane.
    pub(crate) fn duplicate(&mut self, i: usize) -> Option<usize> {
        if self.len >= COPIES_MAX {
            return None;
        }
        if self.packets.len() == self.len {
            self.packets.push(Packet::default());
        }
        let (old, new) = self.packets.split_at_mut(self.len);
        new[0].clone_from_same_burst(&old[i]);
        self.len += 1;
        Some(self.len - 1)
    }

    /// Keeps guest memory mapped until the burst is released. Memory that is held already costs no atomic operation.
    #[inline]
    pub(crate) fn hold<T: Any + Send + Sync>(&mut self, memory: &Arc<T>) {
        if !self.memory.iter().any(|m| std::ptr::addr_eq(Arc::as_ptr(m), Arc::as_ptr(memory))) {
            self.memory.push(memory.clone());
        }
    }
}

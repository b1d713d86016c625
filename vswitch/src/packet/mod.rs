//! Packets in flight and bursts of them.
//!
//! A [`Packet`] keeps the first [`HEAD_MAX`] bytes of its frame in itself: they are copied out of guest memory
//! before anything looks at them, so a guest cannot change a header between the check and the copy. The rest (the
//! tail) either lies in an owned buffer or still in the sender's memory, from where the output port copies it
//! straight into the receiver's buffer.

mod burst;
pub mod checksum;
pub(crate) mod edit;
mod guest;
pub mod key;
pub mod offload;
pub mod vlan;

pub use burst::{BURST, Burst};
pub(crate) use guest::GuestTail;
pub use guest::{Chunk, Chunks};
pub use offload::Offload;

/// Bytes of a frame that a packet always keeps in itself. Every header the switch matches on fits.
pub const HEAD_MAX: usize = 128;
/// Free room in front of the head, for tags that the switch adds.
const HEADROOM: usize = 32;
/// Largest frame that the switch carries: a 64 KiB TSO packet with its headers.
pub const FRAME_MAX: usize = 65_536 + 256;
/// Shortest frame that is switched: an Ethernet header.
pub const FRAME_MIN: usize = 14;

/// One Ethernet frame, without frame check sequence.
#[derive(Debug)]
pub struct Packet {
    head: [u8; HEADROOM + HEAD_MAX],
    start: u16,
    end: u16,
    owned: Vec<u8>,
    guest: GuestTail,
    /// What the sender left to be done: checksum, segmentation.
    pub offload: Offload,
}

impl Default for Packet {
    fn default() -> Self {
        Self {
            head: [0; HEADROOM + HEAD_MAX],
            start: HEADROOM as u16,
            end: HEADROOM as u16,
            owned: Vec::new(),
            guest: GuestTail::default(),
            offload: Offload::default(),
        }
    }
}

impl Packet {
    /// A packet that holds a copy of `frame`.
    pub fn from_frame(frame: &[u8]) -> Self {
        let mut p = Self::default();
        p.set_frame(frame);
        p
    }

    /// Makes the packet empty; buffers keep their capacity.
    #[inline]
    pub fn clear(&mut self) {
        self.start = HEADROOM as u16;
        self.end = HEADROOM as u16;
        self.owned.clear();
        self.guest.clear();
        self.offload = Offload::default();
    }

    /// Replaces the content with a copy of `frame`.
    pub fn set_frame(&mut self, frame: &[u8]) {
        self.clear();
        let n = frame.len().min(HEAD_MAX);
        self.head_space(n).copy_from_slice(&frame[..n]);
        self.owned.extend_from_slice(&frame[n..]);
    }

    /// Length of the frame in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        (self.end - self.start) as usize + self.owned.len() + self.guest.len()
    }

    /// Whether the packet holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first bytes of the frame: all headers.
    #[inline]
    pub fn head(&self) -> &[u8] {
        &self.head[self.start as usize..self.end as usize]
    }

    /// The first bytes of the frame, to be edited.
    #[inline]
    pub fn head_mut(&mut self) -> &mut [u8] {
        &mut self.head[self.start as usize..self.end as usize]
    }

    /// Sets the head to `n` bytes (at most [`HEAD_MAX`]) and returns them to be filled.
    #[inline]
    pub(crate) fn head_space(&mut self, n: usize) -> &mut [u8] {
        self.start = HEADROOM as u16;
        self.end = (HEADROOM + n.min(HEAD_MAX)) as u16;
        &mut self.head[HEADROOM..self.end as usize]
    }

    /// Grows the frame by `n` bytes at the front; `None` when the room is used up.
    pub(crate) fn grow_front(&mut self, n: usize) -> Option<&mut [u8]> {
        self.start = self.start.checked_sub(u16::try_from(n).ok()?)?;
        Some(self.head_mut())
    }

    /// Takes `n` bytes away from the front of the head.
    pub(crate) fn shrink_front(&mut self, n: usize) {
        self.start = (self.start as usize + n).min(self.end as usize) as u16;
    }

    /// Reads with `readv` semantics: `read` fills the given buffers in turn (a header of the caller, the head, a
    /// tail of up to `tail_max` bytes) and returns the total count.
    pub(crate) fn fill_with(
        &mut self,
        header: &mut [u8],
        tail_max: usize,
        read: impl FnOnce(&mut [std::io::IoSliceMut<'_>]) -> std::io::Result<usize>,
    ) -> std::io::Result<usize> {
        self.clear();
        let h = header.len();
        self.owned.resize(tail_max, 0);
        let head = &mut self.head[HEADROOM..];
        let result = read(&mut [
            std::io::IoSliceMut::new(header),
            std::io::IoSliceMut::new(head),
            std::io::IoSliceMut::new(&mut self.owned),
        ]);
        let n = result.as_ref().map_or(0, |n| n.saturating_sub(h));
        self.end = (HEADROOM + n.min(HEAD_MAX)) as u16;
        self.owned.truncate(n.saturating_sub(HEAD_MAX));
        result
    }

    /// The guest part of the tail, for the ring code to fill.
    pub(crate) fn guest_mut(&mut self) -> &mut GuestTail {
        &mut self.guest
    }

    /// Addresses of the parts of the frame, valid while the packet is neither changed nor cleared.
    #[inline]
    pub fn chunks(&self) -> Chunks {
        let mut c = Chunks::new();
        c.push(self.head());
        if !self.owned.is_empty() {
            c.push(&self.owned);
        }
        self.guest.chunks(&mut c);
        c
    }

    /// Calls `f` with the address and length of each part of the frame in order. The addresses are valid until the
    /// packet is changed or cleared.
    #[inline(always)]
    pub(crate) fn for_each_part(&self, mut f: impl FnMut(*const u8, usize)) {
        let head = self.head();
        f(head.as_ptr(), head.len());
        if !self.owned.is_empty() {
            f(self.owned.as_ptr(), self.owned.len());
        }
        for c in self.guest.segments() {
            f(c.ptr, c.len);
        }
    }

    /// Appends bytes `from..` of the frame to `out`.
    pub fn copy_from(&self, from: usize, out: &mut Vec<u8>) {
        let head = self.head();
        if from < head.len() {
            out.extend_from_slice(&head[from..]);
        }
        let skip = from.saturating_sub(head.len());
        if skip < self.owned.len() {
            out.extend_from_slice(&self.owned[skip..]);
        }
        self.guest.copy_from(skip.saturating_sub(self.owned.len()), out);
    }

    /// The frame as one owned buffer.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut v = Vec::with_capacity(self.len());
        self.copy_from(0, &mut v);
        v
    }

    /// A copy that owns all of its bytes.
    pub(crate) fn detached(&self) -> Self {
        let mut owned = Vec::new();
        self.copy_from(self.head().len(), &mut owned);
        Self {
            head: self.head,
            start: self.start,
            end: self.end,
            owned,
            guest: GuestTail::default(),
            offload: self.offload,
        }
    }

    /// Makes this packet a copy of `other`; a tail in guest memory is shared, not copied, so both must belong to
    /// the same burst.
    pub(crate) fn clone_from_same_burst(&mut self, other: &Packet) {
        self.head.copy_from_slice(&other.head);
        self.start = other.start;
        self.end = other.end;
        self.owned.clear();
        self.owned.extend_from_slice(&other.owned);
        self.guest.clone_from(&other.guest);
        self.offload = other.offload;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_survives_the_split_into_head_and_tail() {
        let frame: Vec<u8> = (0..1500u32).map(|i| i as u8).collect();
        let p = Packet::from_frame(&frame);
        assert_eq!((p.len(), p.head().len()), (1500, HEAD_MAX));
        assert_eq!(p.to_vec(), frame);
        let mut part = Vec::new();
        p.copy_from(HEAD_MAX - 3, &mut part);
        assert_eq!(part, &frame[HEAD_MAX - 3..]);
        assert_eq!(p.chunks().iter().map(|c| c.len).sum::<usize>(), 1500);
    }

    #[test]
    fn room_in_front_is_bounded() {
        let mut p = Packet::from_frame(&[7; 60]);
        assert!(p.grow_front(HEADROOM).is_some());
        assert!(p.grow_front(1).is_none());
        p.shrink_front(HEADROOM);
        assert_eq!(p.to_vec(), [7; 60]);
    }
}

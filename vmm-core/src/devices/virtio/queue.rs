//! The device side of a split virtqueue (virtio 1.2, section 2.7).
//!
//! Everything in guest memory is hostile and may change at any time: each descriptor is read once, every range is
//! checked to be RAM, chains and indirect tables are bounded, and an available index further ahead than the queue is
//! long is an error.

use std::sync::atomic::Ordering;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::chain::{Chain, Segment};
use crate::memory::{AccessError, GuestMemory};

/// The longest chain accepted when it comes from an indirect table.
pub(super) const MAX_INDIRECT: u32 = 1024;
pub(super) const DESCRIPTOR_SIZE: u64 = 16;
pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 1 << 1;
pub(super) const INDIRECT: u16 = 1 << 2;
const NO_INTERRUPT: u16 = 1;
pub(super) const NO_NOTIFY: u16 = 1;

/// What is wrong with a queue. The device cannot go on and asks for a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// A ring or a buffer is not RAM.
    #[error("The queue refers to memory that is not RAM")]
    Memory(#[from] AccessError),
    /// The size is zero, too large, or not a power of two.
    #[error("Queue size {0} is not a power of two within the device's limit")]
    BadSize(u16),
    /// A ring is not aligned as its layout asks.
    #[error("The queue's ring at {0:#x} is misaligned")]
    Misaligned(u64),
    /// More buffers than the queue is long became available at once.
    #[error("The available index is {0} ahead, more than the queue's size")]
    AvailableIndex(u16),
    /// A descriptor index is outside of its table.
    #[error("Descriptor {0} is outside of its table")]
    BadDescriptor(u16),
    /// A chain has too many descriptors, possibly because it loops.
    #[error("A descriptor chain is too long or loops")]
    TooLong,
    /// A chain describes 4 GiB or more.
    #[error("A descriptor chain describes 4 GiB or more")]
    TooLarge,
    /// A readable descriptor follows a writable one, or an indirect one is nested or combined with others.
    #[error("A descriptor chain combines descriptors in a forbidden way")]
    BadFlags,
}

/// Where the driver put a queue and how it uses it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueLayout {
    /// Number of entries, a power of two.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub driver: u64,
    /// Guest address of the used ring.
    pub device: u64,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC` was negotiated.
    pub indirect: bool,
}

/// The device side of a split virtqueue.
#[derive(Clone)]
pub struct Queue {
    memory: GuestMemory,
    layout: QueueLayout,
    next_available: u16,
    next_used: u16,
    /// `next_used` when the driver was last considered for an interrupt.
    signalled: u16,
}

#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes)]
#[repr(C)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// Whether the other side, which wants to hear when its ring's index passes `event`, has to be told that the index went
/// from `old` to `new` (virtio 1.2, section 2.7.10).
pub(super) fn wants_event(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

impl Queue {
    /// Checks a layout. `next` is the index of the next buffer in the available and in the used ring: zeros for a new
    /// queue, [`Self::position`] for a restored one.
    ///
    /// # Errors
    /// Fails when the size is not a power of two, or a ring is misaligned or not RAM.
    pub fn new(memory: GuestMemory, layout: QueueLayout, next: (u16, u16)) -> Result<Self, QueueError> {
        let size = u64::from(layout.size);
        if !layout.size.is_power_of_two() || layout.size > 1 << 15 {
            return Err(QueueError::BadSize(layout.size));
        }
        for (address, align, len) in [
            (layout.descriptors, 16, DESCRIPTOR_SIZE * size),
            (layout.driver, 2, 6 + 2 * size),
            (layout.device, 4, 6 + 8 * size),
        ] {
            if address % align != 0 {
                return Err(QueueError::Misaligned(address));
            }
            if !memory.contains(address, len) {
                return Err(AccessError { address, len }.into());
            }
        }
        Ok(Self { memory, layout, next_available: next.0, next_used: next.1, signalled: next.1 })
    }

    /// The layout.
    pub fn layout(&self) -> &QueueLayout {
        &self.layout
    }

    /// The next indices in the available and the used ring.
    pub fn position(&self) -> (u16, u16) {
        (self.next_available, self.next_used)
    }

    /// Continues at other indices: a back-end in another process served the queue meanwhile.
    pub fn set_position(&mut self, (available, used): (u16, u16)) {
        (self.next_available, self.next_used, self.signalled) = (available, used, used);
    }

    /// The used index that the driver sees in memory.
    ///
    /// # Errors
    /// Fails when the ring is not RAM.
    pub fn used_index(&self) -> Result<u16, QueueError> {
        Ok(self.memory.load_u16(self.layout.device + 2, Ordering::Acquire)?)
    }

    fn slot(&self, index: u16) -> u64 {
        u64::from(index & (self.layout.size - 1))
    }

    /// Number of buffers that the driver made available and that were not popped yet.
    ///
    /// # Errors
    /// Fails when the ring is not RAM or its index is impossible.
    pub fn available(&self) -> Result<u16, QueueError> {
        let index = self.memory.load_u16(self.layout.driver + 2, Ordering::Acquire)?;
        let ahead = index.wrapping_sub(self.next_available);
        if ahead > self.layout.size { Err(QueueError::AvailableIndex(ahead)) } else { Ok(ahead) }
    }

    /// Takes the next available buffer into `chain` (whose allocations are reused); false when there is none.
    ///
    /// # Errors
    /// Fails when the ring or the chain is malformed; the queue cannot be used any more then.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        if self.available()? == 0 {
            return Ok(false);
        }
        let at = self.layout.driver + 4 + 2 * self.slot(self.next_available);
        let head = self.memory.load_u16(at, Ordering::Relaxed)?;
        self.read_chain(head, chain)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(true)
    }

    /// Gives back the buffer that was popped last, unused.
    pub fn unpop(&mut self) {
        self.next_available = self.next_available.wrapping_sub(1);
    }

    fn read_chain(&self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        chain.head = head;
        chain.readable.clear();
        chain.writable.clear();
        let mut table = self.layout.descriptors;
        let mut entries = u32::from(self.layout.size);
        let mut index = head;
        let mut left = entries;
        let mut total = 0u32;
        let mut indirect = false;
        loop {
            if u32::from(index) >= entries {
                return Err(QueueError::BadDescriptor(index));
            }
            left = left.checked_sub(1).ok_or(QueueError::TooLong)?;
            // One copy: the guest may change the descriptor between two reads.
            let d: Descriptor = self.memory.read_obj(table + DESCRIPTOR_SIZE * u64::from(index))?;
            let (address, len) = (u64::from_le(d.address), u32::from_le(d.len));
            let flags = u16::from_le(d.flags);
            if flags & INDIRECT != 0 {
                // It may follow direct descriptors (section 2.7.5.3.2), but nothing follows it.
                if !self.layout.indirect || indirect || flags & NEXT != 0 {
                    return Err(QueueError::BadFlags);
                }
                let size = DESCRIPTOR_SIZE as u32;
                if len == 0 || !len.is_multiple_of(size) || len / size > MAX_INDIRECT {
                    return Err(QueueError::TooLong);
                }
                if !self.memory.contains(address, u64::from(len)) {
                    return Err(AccessError { address, len: u64::from(len) }.into());
                }
                (table, entries, index, left, indirect) = (address, len / size, 0, len / size, true);
                continue;
            }
            if len != 0 {
                if !self.memory.contains(address, u64::from(len)) {
                    return Err(AccessError { address, len: u64::from(len) }.into());
                }
                total = total.checked_add(len).ok_or(QueueError::TooLarge)?;
                let segment = Segment { address, len };
                if flags & WRITE != 0 {
                    chain.writable.push(segment);
                } else if chain.writable.is_empty() {
                    chain.readable.push(segment);
                } else {
                    return Err(QueueError::BadFlags);
                }
            }
            if flags & NEXT == 0 {
                return Ok(());
            }
            index = u16::from_le(d.next);
        }
    }

    /// Returns a buffer of which `len` bytes were written, without letting the driver see it before
    /// [`Self::publish`].
    ///
    /// # Errors
    /// Fails when the ring is not RAM.
    pub fn add_used(&mut self, head: u16, len: u32) -> Result<(), QueueError> {
        let at = self.layout.device + 4 + 8 * self.slot(self.next_used);
        let element = u64::from(head) | u64::from(len) << 32;
        self.memory.write(at, &element.to_le_bytes())?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Lets the driver see all buffers returned so far.
    ///
    /// # Errors
    /// Fails when the ring is not RAM.
    pub fn publish(&mut self) -> Result<(), QueueError> {
        Ok(self.memory.store_u16(self.layout.device + 2, self.next_used, Ordering::Release)?)
    }

    /// Returns a buffer of which `len` bytes were written.
    ///
    /// # Errors
    /// Fails when the ring is not RAM.
    pub fn push(&mut self, head: u16, len: u32) -> Result<(), QueueError> {
        self.add_used(head, len)?;
        self.publish()
    }

    /// Whether the driver wants an interrupt for what was published since the last call.
    ///
    /// # Errors
    /// Fails when the ring is not RAM.
    pub fn needs_interrupt(&mut self) -> Result<bool, QueueError> {
        let (old, new) = (std::mem::replace(&mut self.signalled, self.next_used), self.next_used);
        if old == new {
            return Ok(false);
        }
        // The used index must be visible before the driver's wish is read; the driver does the mirror image.
        self.memory.barrier();
        if self.layout.event_idx {
            let at = self.layout.driver + 4 + 2 * u64::from(self.layout.size);
            let event = self.memory.load_u16(at, Ordering::Relaxed)?;
            Ok(wants_event(event, old, new))
        } else {
            Ok(self.memory.load_u16(self.layout.driver, Ordering::Relaxed)? & NO_INTERRUPT == 0)
        }
    }

    /// Asks the driver not to notify while the device looks at the queue anyway.
    ///
    /// # Errors
    /// Fails when the ring is not RAM.
    pub fn disable_notification(&mut self) -> Result<(), QueueError> {
        if !self.layout.event_idx {
            self.memory.store_u16(self.layout.device, NO_NOTIFY, Ordering::Relaxed)?;
        }
        Ok(())
    }

    /// Asks the driver to notify of the next buffer that it makes available; true when some are available that were not
    /// popped (or were given back).
    ///
    /// # Errors
    /// Fails when the ring is not RAM or its index is impossible.
    pub fn enable_notification(&mut self) -> Result<bool, QueueError> {
        if self.layout.event_idx {
            // The next one after those that are there, popped or not: a driver does not tell twice of one buffer.
            let seen = self.next_available.wrapping_add(self.available()?);
            let at = self.layout.device + 4 + 8 * u64::from(self.layout.size);
            self.memory.store_u16(at, seen, Ordering::Relaxed)?;
        } else {
            self.memory.store_u16(self.layout.device, 0, Ordering::Relaxed)?;
        }
        self.memory.barrier();
        Ok(self.available()? != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame may need more buffers than there are: the device gives back those it took, and waits for the others.
    #[test]
    fn a_device_that_waits_for_more_buffers_is_told_of_them() {
        const DESCRIPTORS: u64 = 0x1000;
        const DRIVER: u64 = 0x2000;
        const DEVICE: u64 = 0x3000;
        const SIZE: u16 = 4;
        let memory = GuestMemory::flat(1 << 20).unwrap();
        let layout = QueueLayout {
            size: SIZE,
            descriptors: DESCRIPTORS,
            driver: DRIVER,
            device: DEVICE,
            event_idx: true,
            indirect: false,
        };
        let mut queue = Queue::new(memory.clone(), layout, (0, 0)).unwrap();
        let buffer = Descriptor { address: 0x8000, len: 64, flags: WRITE, next: 0 };
        for n in 0..SIZE {
            memory.write(DESCRIPTORS + DESCRIPTOR_SIZE * u64::from(n), buffer.as_bytes()).unwrap();
            memory.store_u16(DRIVER + 4 + 2 * u64::from(n), n, Ordering::Relaxed).unwrap();
        }
        let offer = |index| memory.store_u16(DRIVER + 2, index, Ordering::Release).unwrap();
        let event = || memory.load_u16(DEVICE + 4 + 8 * u64::from(SIZE), Ordering::Acquire).unwrap();
        offer(2);
        let mut chain = Chain::default();
        assert!(queue.pop(&mut chain).unwrap() && queue.pop(&mut chain).unwrap());
        queue.unpop();
        queue.unpop();
        assert!(queue.enable_notification().unwrap());
        offer(3);
        assert!(wants_event(event(), 2, 3), "the driver tells of the third buffer");
        for _ in 0..3 {
            assert!(queue.pop(&mut chain).unwrap());
        }
        assert!(!queue.enable_notification().unwrap());
        assert!(wants_event(event(), 3, 4), "and of the fourth");
    }
}

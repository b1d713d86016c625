//! The rings of a queue, and the record of what is in flight.
//!
//! Requests end in any order. With a record the driver is told so; without one, in the order in which they were taken:
//! then the used index says which of them a back-end that ended had not completed.

use super::QUEUE_SIZE;
use super::inflight::Record;
use super::request::Chain;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use thiserror::Error;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// A driver or a front-end broke the rules of rings.
#[derive(Debug, Error)]
pub enum RingError {
    /// The rings are not in guest memory, or not aligned, or what they say is impossible.
    #[error("The rings of the queue are malformed; reset the device")]
    Malformed(#[from] virtio_queue::Error),
    /// Part of the rings is not in guest memory.
    #[error("The rings of the queue are not in guest memory; reset the device")]
    Outside,
    /// A request begins at a descriptor that the table does not have.
    #[error("A request begins beyond the table of descriptors; reset the device")]
    Head,
    /// The record of requests in flight cannot be used.
    #[error("The record of requests in flight cannot be used; connect again with another one")]
    Record(#[from] vm_memory::VolatileMemoryError),
}

/// Where the rings of a queue are.
#[derive(Clone, Copy, Debug, Default)]
pub struct RingSetup {
    /// Number of descriptors.
    pub size: u16,
    /// Guest address of the descriptors.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Index of the next request in the available ring, unless the record of requests in flight knows better.
    pub base: u16,
    /// Notifications are suppressed by indices.
    pub event_idx: bool,
}

/// A queue that was started.
pub struct Ring {
    queue: Queue,
    memory: Arc<GuestMemoryMmap>,
    record: Option<Record>,
    /// Requests that were in flight when another back-end ended.
    again: VecDeque<u16>,
    /// What the driver's index was when it was looked at last: looking takes a while.
    available: u16,
    /// Requests that were taken.
    taken: u64,
    /// Requests of whose end the driver was told.
    told: u64,
    /// Without a record: those in between, with what they wrote to their buffers if they have ended.
    ended: VecDeque<(u16, Option<u32>)>,
}

impl Ring {
    /// Starts a queue, with what the record says is in flight.
    ///
    /// # Errors
    /// When the rings or the record cannot be used.
    pub fn start(
        setup: &RingSetup,
        memory: Arc<GuestMemoryMmap>,
        mut record: Option<Record>,
    ) -> Result<Self, RingError> {
        let mut queue = Queue::new(QUEUE_SIZE)?;
        queue.try_set_size(setup.size)?;
        queue.try_set_desc_table_address(GuestAddress(setup.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(setup.available))?;
        queue.try_set_used_ring_address(GuestAddress(setup.used))?;
        queue.set_event_idx(setup.event_idx);
        queue.set_next_avail(setup.base);
        queue.set_ready(true);
        if !queue.is_valid(&*memory) {
            return Err(RingError::Outside);
        }
        let used = queue.used_idx(&*memory, Ordering::Acquire)?.0;
        queue.set_next_used(used);
        let mut again = VecDeque::new();
        if let Some(list) = record.as_mut().map(|record| record.begin(used)).transpose()?.flatten() {
            // Whatever was taken was completed or is in flight.
            queue.set_next_avail(used.wrapping_add(list.len() as u16));
            again = list.into();
        }
        let available = queue.next_avail();
        Ok(Ring { queue, memory, record, again, available, taken: 0, told: 0, ended: VecDeque::new() })
    }

    /// Goes on in other memory.
    pub(super) fn set_memory(&mut self, memory: Arc<GuestMemoryMmap>) {
        self.memory = memory;
    }

    pub(super) fn set_event_idx(&mut self, on: bool) {
        self.queue.set_event_idx(on);
    }

    /// Index of the request in the available ring that is taken next.
    pub fn base(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Whether requests that were in flight when the ring started have not been taken yet.
    pub(super) fn has_old(&self) -> bool {
        !self.again.is_empty()
    }

    /// Whether as many requests are taken and not completed as the ring has places. A driver that keeps to the rules
    /// makes no more available.
    pub(super) fn is_full(&self) -> bool {
        self.taken - self.told >= u64::from(self.queue.size())
    }

    /// Whether there are requests to take.
    pub(super) fn has_more(&mut self) -> bool {
        if self.has_old() {
            return true;
        }
        if self.available == self.queue.next_avail()
            && let Ok(index) = self.queue.avail_idx(&*self.memory, Ordering::Relaxed)
        {
            self.available = index.0;
        }
        self.available != self.queue.next_avail()
    }

    /// Takes a request, unless the ring is full: one that was in flight when the ring started before those that the
    /// driver made available.
    ///
    /// # Errors
    /// When the ring or the record is malformed.
    pub fn take(&mut self) -> Result<Option<Chain>, RingError> {
        if self.is_full() {
            return Ok(None);
        }
        if let Some(head) = self.again.pop_front() {
            return Ok(Some(self.chain(head)));
        }
        let Some(head) = self.queue.iter(&*self.memory)?.next().map(|chain| chain.head_index()) else {
            return Ok(None);
        };
        if head >= self.queue.size() {
            return Err(RingError::Head);
        }
        if let Some(record) = &mut self.record {
            record.taken(head)?;
        }
        Ok(Some(self.chain(head)))
    }

    fn chain(&mut self, head: u16) -> Chain {
        let (table, size) = (GuestAddress(self.queue.desc_table()), self.queue.size());
        let number = self.taken;
        self.taken += 1;
        if self.record.is_none() {
            self.ended.push_back((head, None));
        }
        Chain { memory: self.memory.clone(), table, size, head, number }
    }

    /// Ends a request that was taken; returns whether the driver wants to be notified.
    ///
    /// # Errors
    /// When the ring or the record is malformed.
    pub fn complete(&mut self, chain: &Chain, written: u32) -> Result<bool, RingError> {
        if self.record.is_some() {
            self.tell(chain.head, written)?;
        } else {
            let place = chain.number.checked_sub(self.told).and_then(|place| usize::try_from(place).ok());
            if let Some((_, ended)) = place.and_then(|place| self.ended.get_mut(place)) {
                *ended = Some(written);
            }
            let before = self.told;
            while let Some((head, Some(written))) = self.ended.front().copied() {
                self.ended.pop_front();
                self.tell(head, written)?;
            }
            if self.told == before {
                return Ok(false);
            }
        }
        Ok(self.queue.needs_notification(&*self.memory)?)
    }

    /// Tells the driver that a request is done.
    fn tell(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        if let Some(record) = &self.record {
            record.completing(head)?;
        }
        self.queue.add_used(&*self.memory, head, written)?;
        if let Some(record) = &self.record {
            record.completed(head, self.queue.next_used())?;
        }
        self.told += 1;
        Ok(())
    }

    /// Asks the driver not to notify of requests.
    pub(super) fn ignore_driver(&mut self) -> Result<(), RingError> {
        Ok(self.queue.disable_notification(&*self.memory)?)
    }

    /// Asks the driver to notify of requests; returns whether there are some that it did not notify of.
    pub(super) fn listen_to_driver(&mut self) -> Result<bool, RingError> {
        Ok(self.queue.enable_notification(&*self.memory)?)
    }
}

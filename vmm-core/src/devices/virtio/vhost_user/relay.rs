//! Rings of this process between those of the guest and the back-end.
//!
//! A back-end writes to guest RAM without anybody here noticing. Where somebody has to (the software CPU drops code
//! that it decoded from memory that changes), the back-end gets rings in memory that only this process and it share.
//! Their descriptors point to the guest's buffers, so data is not copied; but a buffer comes back here first, is
//! reported as written, and only then appears in the guest's used ring.
//!
//! Buffers go back to the guest in the order in which it made them available, whatever the order of the back-end. So
//! the guest's used index tells what is not done, and a back-end that restarts gets exactly that again.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::chain::{Chain, Segment};
use super::super::device::DeviceError;
use super::super::queue::{
    DESCRIPTOR_SIZE, INDIRECT, MAX_INDIRECT, NEXT, NO_NOTIFY, QueueError, QueueLayout, WRITE, wants_event,
};
use super::super::worker::Context;
use super::VhostUserError;
use crate::memory::{AccessError, GuestMemory, MapError, MemoryRegion, PAGE_SIZE, RegionOptions};

/// Room for the longest chain that the guest may describe by an indirect table.
const TABLE_SIZE: u64 = MAX_INDIRECT as u64 * DESCRIPTOR_SIZE;

/// The rings of all queues of a device. They live as long as a connection.
pub(super) struct Relay {
    memory: GuestMemory,
    rings: Vec<Option<Ring>>,
}

/// Memory for the rings of `queues` queues of at most `size` entries, which a back-end finds behind guest RAM. A device
/// has the same for its whole life: back-ends keep a mapping that they believe to know by its address.
pub(super) fn allocate(guest: &GuestMemory, queues: u16, size: u16) -> Result<GuestMemory, MapError> {
    let ram_end = guest.regions().last().map_or(0, MemoryRegion::end);
    let mut end = ram_end;
    for _ in 0..queues {
        Places::new(size, true, &mut end);
    }
    GuestMemory::new(vec![MemoryRegion::allocate(ram_end, end - ram_end, &RegionOptions::default())?])
}

/// Where the parts of a queue are.
struct Places {
    descriptors: u64,
    driver: u64,
    device: u64,
    tables: u64,
}

impl Places {
    /// Puts them at `*at`, which is moved behind them.
    fn new(size: u16, indirect: bool, at: &mut u64) -> Self {
        let size = u64::from(size);
        let mut place = |len: u64| {
            let start = *at;
            *at += len.next_multiple_of(PAGE_SIZE);
            start
        };
        Self {
            descriptors: place(DESCRIPTOR_SIZE * size),
            driver: place(6 + 2 * size),
            device: place(6 + 8 * size),
            tables: place(if indirect { TABLE_SIZE * size } else { 0 }),
        }
    }
}

/// The driver's side of a queue of the back-end.
struct Ring {
    layout: QueueLayout,
    /// Where each descriptor's indirect table is.
    tables: u64,
    kick: EventFd,
    /// The next indices in the available and the used ring.
    next: (u16, u16),
    free: Vec<u16>,
    /// By the descriptor at its head: the number of the request that it belongs to.
    heads: Vec<Option<u64>>,
    /// What the guest waits for, in its order.
    requests: VecDeque<Request>,
    /// The number of the first of them.
    first: u64,
}

struct Request {
    /// The head of the guest's chain.
    head: u16,
    /// The descriptors of the ring that describe it.
    descriptors: Vec<u16>,
    writable: Vec<Segment>,
    /// Bytes that the back-end says it wrote, when it is done.
    used: Option<u32>,
}

impl Relay {
    /// Empty rings for the queues of `context` in `memory`, which [`allocate`] made for them.
    pub(super) fn new(memory: GuestMemory, context: &Context) -> Result<Self, DeviceError> {
        let mut at = memory.regions().first().map_or(0, MemoryRegion::guest_address);
        let mut rings = Vec::with_capacity(context.queues.len());
        for queue in &context.queues {
            rings.push(queue.as_ref().map(|queue| Ring::new(&memory, queue.layout(), &mut at)).transpose()?);
        }
        Ok(Self { memory, rings })
    }

    /// The memory that the rings are in.
    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Where the rings of a queue are, and what tells the back-end of new buffers.
    pub(super) fn ring(&self, index: usize) -> Option<(&QueueLayout, &EventFd)> {
        self.rings.get(index)?.as_ref().map(|ring| (&ring.layout, &ring.kick))
    }

    /// Passes on what the guest made available.
    pub(super) fn forward(
        &mut self,
        index: usize,
        chain: &mut Chain,
        context: &mut Context,
    ) -> Result<(), DeviceError> {
        let Some(ring) = self.rings.get_mut(index).and_then(Option::as_mut) else { return Ok(()) };
        loop {
            let Some(queue) = &mut context.queues[index] else { return Ok(()) };
            queue.disable_notification()?;
            let before = ring.next.0;
            while queue.pop(chain)? {
                ring.push(&self.memory, chain)?;
            }
            let more = queue.enable_notification()?;
            if ring.publish(&self.memory, before)? {
                // A counter that is full is signalled already.
                let _ = ring.kick.write(1);
            }
            if !more || context.stopping() {
                return Ok(());
            }
        }
    }

    /// Gives back to the guest what the back-end is done with.
    pub(super) fn give_back(&mut self, index: usize, context: &mut Context) -> Result<(), DeviceError> {
        let Some(ring) = self.rings.get_mut(index).and_then(Option::as_mut) else { return Ok(()) };
        loop {
            let arrived = ring.take(&self.memory)?;
            let Some(queue) = &mut context.queues[index] else { return Ok(()) };
            let before = queue.position().1;
            while let Some((request, len)) = ring.finished() {
                for segment in request.writable {
                    context.memory.mark_written(segment.address, segment.len.into());
                }
                queue.add_used(request.head, len)?;
            }
            if queue.position().1 != before {
                queue.publish()?;
                context.signal(index)?;
            }
            if !arrived || context.stopping() {
                return Ok(());
            }
        }
    }
}

impl Ring {
    /// Rings like those of the guest's queue, at `*at`, which is moved behind them.
    fn new(memory: &GuestMemory, guest: &QueueLayout, at: &mut u64) -> Result<Self, DeviceError> {
        let Places { descriptors, driver, device, tables } = Places::new(guest.size, guest.indirect, at);
        // What an earlier back-end left.
        memory.fill(driver, (device - driver) as usize, 0)?;
        memory.fill(device, (tables - device) as usize, 0)?;
        Ok(Self {
            layout: QueueLayout { descriptors, driver, device, ..*guest },
            tables,
            kick: EventFd::new(EFD_NONBLOCK)?,
            next: (0, 0),
            free: (0..guest.size).rev().collect(),
            heads: vec![None; usize::from(guest.size)],
            requests: VecDeque::new(),
            first: 0,
        })
    }

    fn slot(&self, index: u16) -> u64 {
        u64::from(index & (self.layout.size - 1))
    }

    /// Describes a chain of the guest to the back-end, which does not see it before [`Self::publish`].
    fn push(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<(), QueueError> {
        let readable = chain.readable().iter().map(|s| (*s, 0));
        let writable = chain.writable().iter().map(|s| (*s, WRITE));
        let mut segments: Vec<_> = readable.chain(writable).collect();
        if segments.is_empty() {
            // Descriptors of no length are not in the chain, but the back-end has to see one.
            segments.push((Segment { address: 0, len: 0 }, 0));
        }
        let table = self.layout.indirect && segments.len() > 1;
        let needed = if table { 1 } else { segments.len() };
        // Chains that share descriptors may have more of them than there are.
        let left = self.free.len().checked_sub(needed).ok_or(QueueError::TooLong)?;
        let descriptors = self.free.split_off(left);
        let head = descriptors[0];
        if table {
            let at = self.tables + TABLE_SIZE * u64::from(head);
            let indices: Vec<u16> = (0..segments.len() as u16).collect();
            write_chain(memory, at, &indices, &segments)?;
            let len = segments.len() as u64 * DESCRIPTOR_SIZE;
            let pointer = (Segment { address: at, len: len as u32 }, INDIRECT);
            write_chain(memory, self.layout.descriptors, &descriptors, &[pointer])?;
        } else {
            write_chain(memory, self.layout.descriptors, &descriptors, &segments)?;
        }
        let entry = self.layout.driver + 4 + 2 * self.slot(self.next.0);
        memory.store_u16(entry, head, Ordering::Relaxed)?;
        self.next.0 = self.next.0.wrapping_add(1);
        self.heads[usize::from(head)] = Some(self.first + self.requests.len() as u64);
        let writable = chain.writable().to_vec();
        self.requests.push_back(Request { head: chain.head(), descriptors, writable, used: None });
        Ok(())
    }

    /// Shows the back-end what was pushed since the available index was `before`; whether it wants to be told.
    fn publish(&self, memory: &GuestMemory, before: u16) -> Result<bool, AccessError> {
        let new = self.next.0;
        if new == before {
            return Ok(false);
        }
        memory.store_u16(self.layout.driver + 2, new, Ordering::Release)?;
        memory.barrier();
        if self.layout.event_idx {
            let at = self.layout.device + 4 + 8 * u64::from(self.layout.size);
            Ok(wants_event(memory.load_u16(at, Ordering::Relaxed)?, before, new))
        } else {
            Ok(memory.load_u16(self.layout.device, Ordering::Relaxed)? & NO_NOTIFY == 0)
        }
    }

    /// Notes what the back-end returned. False when there was nothing; it signals the next buffer then.
    fn take(&mut self, memory: &GuestMemory) -> Result<bool, DeviceError> {
        if self.layout.event_idx {
            let at = self.layout.driver + 4 + 2 * u64::from(self.layout.size);
            memory.store_u16(at, self.next.1, Ordering::Relaxed)?;
            memory.barrier();
        }
        let index = memory.load_u16(self.layout.device + 2, Ordering::Acquire)?;
        let arrived = index != self.next.1;
        while index != self.next.1 {
            let at = self.layout.device + 4 + 8 * self.slot(self.next.1);
            let [head, len] = memory.read_obj::<[u32; 2]>(at)?.map(u32::from_le);
            self.done(head, len).ok_or(VhostUserError::Protocol("returned a buffer that it did not have"))?;
            self.next.1 = self.next.1.wrapping_add(1);
        }
        Ok(arrived)
    }

    fn done(&mut self, head: u32, len: u32) -> Option<()> {
        let number = self.heads.get_mut(head as usize)?.take()?;
        let request = self.requests.get_mut(usize::try_from(number - self.first).ok()?)?;
        request.used = Some(len);
        self.free.append(&mut request.descriptors);
        Some(())
    }

    /// The next request in the guest's order, when the back-end is done with it, and the length that it wrote.
    fn finished(&mut self) -> Option<(Request, u32)> {
        let len = self.requests.front()?.used?;
        let request = self.requests.pop_front()?;
        self.first += 1;
        Some((request, len))
    }
}

/// Writes a chain into the table at `table`, to the descriptors `indices`, of which there are as many as segments.
fn write_chain(
    memory: &GuestMemory,
    table: u64,
    indices: &[u16],
    segments: &[(Segment, u16)],
) -> Result<(), AccessError> {
    for (i, (index, (segment, flags))) in indices.iter().zip(segments).enumerate() {
        let next = indices.get(i + 1).copied();
        let flags = flags | if next.is_some() { NEXT } else { 0 };
        let mut bytes = [0; DESCRIPTOR_SIZE as usize];
        bytes[..8].copy_from_slice(&segment.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&segment.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.unwrap_or(0).to_le_bytes());
        memory.write(table + DESCRIPTOR_SIZE * u64::from(*index), &bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;

//! The device's side of a packed virtqueue (virtio 1.2, 2.8) that carries network packets. One of the modules that may
//! use `unsafe`.
//!
//! As with a split ring, the guest can write everything here at any time: a descriptor is used in a copy that was read
//! once and checked.
//!
//! A packed ring has no index of what was used. This device notes where it stands, after each batch, where the driver
//! looks for the offset of an event, which has a meaning with event flags that are not used here only (2.8.14). The note
//! is taken back when a queue is stopped in an orderly way, and its front-end told where it stands. If the device dies,
//! the note and the descriptors tell its successor: see `recover`.
#![expect(unsafe_code, reason = "reads and writes rings and buffers in guest memory")]

mod recover;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::frames::{Buffer, fill_simple, prefetch_buffer, take_chain, take_simple};
use super::{CHAIN_MAX, INDIRECT, NEXT, RingAddresses, RingError, RingFeatures, WRITE};
use crate::packet::{BURST, Burst, Packet};
use crate::port::Batch;
use crate::port::vhost::memory::GuestMemory;
use crate::port::vhost::segments::{Segment, Writer};

/// Largest queue: so that a noted position is never zero.
const SIZE_MAX: u16 = 16_384;

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Event flags (2.8.10): always notify, never, or at a certain descriptor.
const EVENTS_ON: u16 = 0;
const EVENTS_OFF: u16 = 1;
const EVENTS_AT: u16 = 2;

/// A place in the ring, and the wrap counter there. As a vring base: 15 bits and one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    index: u16,
    wrap: bool,
}

impl Position {
    fn decode(bits: u16) -> Self {
        Self { index: bits & 0x7fff, wrap: bits & 0x8000 != 0 }
    }

    fn encode(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    /// `n`, at most `size`, places further.
    #[inline(always)]
    fn advanced(self, n: u16, size: u16) -> Self {
        let index = self.index + n;
        if index >= size { Self { index: index - size, wrap: !self.wrap } } else { Self { index, ..self } }
    }
}

#[derive(Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    id: u16,
    flags: u16,
}

impl Descriptor {
    #[inline(always)]
    fn new(addr: u64, rest: u64) -> Self {
        Self { addr, len: rest as u32, id: (rest >> 32) as u16, flags: (rest >> 48) as u16 }
    }
}

/// A buffer of the driver's: its first place, its identifier, and the descriptors it takes in the ring.
#[derive(Clone, Copy, Debug)]
struct Chain {
    at: Position,
    id: u16,
    count: u16,
}

/// A buffer to be given back.
#[derive(Clone, Copy, Debug)]
struct Used {
    chain: Chain,
    /// Bytes written.
    len: u32,
    /// Whether the packet goes on in the next one.
    more: bool,
}

/// One packed virtqueue.
#[derive(Debug)]
pub struct PackedRing {
    size: u16,
    at: RingAddresses,
    features: RingFeatures,
    next_avail: Position,
    next_used: Position,
    /// Descriptors between the two.
    taken: u16,
    /// Where `next_used` was at the last decision about a notification.
    notified: Position,
    /// Whether something was given to the driver since then.
    unannounced: bool,
    /// What `pop` took and was not yet given back.
    pending: Vec<Chain>,
    /// What is given back with the batch under way.
    written: Vec<Used>,
    /// Buffers that were looked at last, and how many.
    window: [Buffer; BURST],
    looked: usize,
    segments: Vec<Segment>,
}

// SAFETY: the pointers refer to shared guest memory, valid for the whole process while the owner holds the memory.
unsafe impl Send for PackedRing {}

impl PackedRing {
    /// Adopts a ring in `memory`, where a device before it that died has got to, or else at `base` (see
    /// [`PackedRing::base`]).
    ///
    /// # Safety
    /// The three parts must be mapped, with the lengths of [`super::part_sizes`], for as long as the ring is used.
    pub unsafe fn new(
        memory: &GuestMemory,
        size: u16,
        at: RingAddresses,
        features: RingFeatures,
        base: u32,
    ) -> Result<Self, RingError> {
        if size == 0 || size > SIZE_MAX {
            return Err(RingError::Index);
        }
        if !at.is_aligned(true) {
            return Err(RingError::Address);
        }
        let start = Position::decode(base as u16);
        let mut ring = Self {
            size,
            at,
            features,
            next_avail: start,
            next_used: start,
            taken: 0,
            notified: start,
            unannounced: false,
            pending: Vec::with_capacity(BURST),
            written: Vec::with_capacity(BURST),
            window: [Buffer::NONE; BURST],
            looked: 0,
            segments: Vec::with_capacity(CHAIN_MAX),
        };
        let note = ring.device_events().load(Ordering::Relaxed) as u16;
        let start = if note == 0 { start } else { Position::decode(note.wrapping_sub(1)) };
        if start.index >= size {
            return Err(RingError::Index);
        }
        let start = if note == 0 { start } else { ring.recover(memory, start) };
        (ring.next_avail, ring.next_used, ring.notified) = (start, start, start);
        Ok(ring)
    }

    /// The next buffer to take and the next to give back, as `SET_VRING_BASE` carries them: the latter in the upper half,
    /// each with its wrap counter in the highest bit. Between bursts they are the same.
    pub fn base(&self) -> u32 {
        u32::from(self.next_avail.encode()) | u32::from(self.next_used.encode()) << 16
    }

    /// Whether buffers taken by [`PackedRing::pop`] wait for [`PackedRing::complete`].
    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Changes the features that may change while the queue runs.
    pub fn set_log(&mut self, on: bool) {
        self.features.log = on;
    }

    /// Points the ring at the same parts in a new mapping.
    ///
    /// # Safety
    /// As [`PackedRing::new`].
    pub unsafe fn relocate(&mut self, at: RingAddresses) {
        self.at = at;
    }

    /// Takes back the note of where the ring stands.
    pub fn forget_position(&mut self, memory: &GuestMemory) {
        let flags = self.device_events().load(Ordering::Relaxed) >> 16;
        self.set_device_events(memory, 0, flags as u16);
    }

    /// The two words of a descriptor; the second holds its length, identifier and flags.
    #[inline(always)]
    fn words(&self, index: u16) -> &[AtomicU64; 2] {
        debug_assert!(index < self.size);
        // SAFETY: every index is less than the size of the ring, which `new` was promised is mapped; it is aligned, and
        // 64-bit atomics may be shared with the guest.
        unsafe { &*self.at.desc.cast::<[AtomicU64; 2]>().add(usize::from(index)) }
    }

    #[inline(always)]
    fn descriptor(&self, index: u16) -> Descriptor {
        let [addr, rest] = self.words(index);
        // The flags first: the rest is good once they are.
        let rest = rest.load(Ordering::Acquire);
        Descriptor::new(addr.load(Ordering::Relaxed), rest)
    }

    /// The descriptor at a place, if the driver has made it available.
    #[inline(always)]
    fn available(&self, at: Position) -> Option<Descriptor> {
        let d = self.descriptor(at.index);
        let wanted = if at.wrap { AVAIL } else { USED };
        (d.flags & (AVAIL | USED) == wanted).then_some(d)
    }

    /// The driver's wish when to be notified: offset and wrap counter in the lower half, flags in the upper.
    fn driver_events(&self) -> u32 {
        // SAFETY: the part is four mapped bytes, aligned to four, which may be shared with the guest.
        unsafe { &*self.at.avail.cast::<AtomicU32>() }.load(Ordering::Relaxed)
    }

    /// The device's wish when to be notified.
    fn device_events(&self) -> &AtomicU32 {
        // SAFETY: as `driver_events`.
        unsafe { &*self.at.used.cast::<AtomicU32>() }
    }

    fn set_device_events(&self, memory: &GuestMemory, note: u16, flags: u16) {
        self.device_events().store(u32::from(note) | u32::from(flags) << 16, Ordering::Release);
        if self.features.log
            && let Some(base) = self.at.used_log
        {
            memory.log_write(base, 4);
        }
    }

    /// Notes where the ring stands.
    #[inline(always)]
    fn note_position(&self, memory: &GuestMemory) {
        let flags = self.device_events().load(Ordering::Relaxed) >> 16;
        self.set_device_events(memory, self.next_used.encode().wrapping_add(1), flags as u16);
    }

    /// Looks at the buffers from a place on, `wanted` at most and up to the first that is not one descriptor in the
    /// direction wanted, and asks for the first lines of each.
    #[inline(always)]
    fn look(&mut self, memory: &GuestMemory, from: Position, wanted: usize, write: bool) {
        self.looked = 0;
        let mut at = from;
        for _ in 0..wanted.min(BURST) {
            let Some(d) = self.available(at) else { return };
            let place = &mut self.window[self.looked];
            self.looked += 1;
            *place = Buffer::NONE;
            if d.flags & (NEXT | WRITE | INDIRECT) != if write { WRITE } else { 0 } {
                return;
            }
            let Some(ptr) = memory.translate(d.addr, d.len.into()) else { return };
            prefetch_buffer(ptr, self.features.header, write);
            *place = Buffer { ptr, len: d.len as usize, guest: d.addr, id: d.id };
            at = at.advanced(1, self.size);
        }
    }

    /// Collects the segments of the buffer at a place; `None` if there is none yet.
    #[cold]
    fn walk(&mut self, memory: &GuestMemory, at: Position, write: bool) -> Result<Option<Chain>, RingError> {
        let Some(mut d) = self.available(at) else { return Ok(None) };
        if d.flags & INDIRECT != 0 {
            let count = d.len / 16;
            if d.flags & NEXT != 0 || count == 0 || count as usize > CHAIN_MAX || !d.len.is_multiple_of(16) {
                return Err(RingError::Chain);
            }
            let table = memory.translate(d.addr, d.len.into()).ok_or(RingError::Address)?;
            for i in 0..count as usize {
                // SAFETY: the table holds `count` descriptors in mapped memory; it may be unaligned.
                let [addr, rest] = unsafe { table.cast::<[u64; 2]>().add(i).read_unaligned() };
                // Of the flags only this one has a meaning here (2.8.7).
                let flags = Descriptor::new(addr, rest).flags & WRITE;
                self.add_segment(memory, Descriptor { flags, ..Descriptor::new(addr, rest) }, write)?;
            }
            return Ok(Some(Chain { at, id: d.id, count: 1 }));
        }
        let longest = CHAIN_MAX.min(self.size.into()) as u16;
        let mut place = at;
        for count in 1..=longest {
            self.add_segment(memory, d, write)?;
            if d.flags & NEXT == 0 {
                return Ok(Some(Chain { at, id: d.id, count }));
            }
            place = place.advanced(1, self.size);
            d = self.descriptor(place.index);
        }
        Err(RingError::Chain)
    }

    fn add_segment(&mut self, memory: &GuestMemory, d: Descriptor, write: bool) -> Result<(), RingError> {
        if d.flags & INDIRECT != 0 || (d.flags & WRITE != 0) != write {
            return Err(RingError::Chain);
        }
        if d.len != 0 {
            let ptr = memory.translate(d.addr, d.len.into()).ok_or(RingError::Address)?;
            self.segments.push(Segment { ptr, len: d.len as usize, guest: d.addr });
        }
        Ok(())
    }

    /// Takes packets that the guest sends, up to the burst's room. Heads are copied, tails stay in guest memory,
    /// which the burst must hold, until [`PackedRing::complete`].
    pub fn pop(&mut self, memory: &GuestMemory, burst: &mut Burst) -> Result<(), RingError> {
        let header = self.features.header;
        // Buffers without a packet take no room, but time.
        let mut left = burst.room();
        while left > 0 {
            self.look(memory, self.next_avail, left, false);
            if self.looked == 0 {
                return Ok(());
            }
            left -= self.looked;
            for i in 0..self.looked {
                let b = self.window[i];
                let chain = if b.ptr.is_null() {
                    self.segments.clear();
                    // Anew: the guest may have changed its mind.
                    let Some(chain) = self.walk(memory, self.next_avail, false)? else { return Ok(()) };
                    self.claim(chain.count)?;
                    take_chain(&self.segments, header, burst);
                    chain
                } else {
                    self.claim(1)?;
                    // SAFETY: `look` translated the buffer; the caller makes the burst hold its memory.
                    unsafe { take_simple(b.ptr, b.len, header, burst) };
                    Chain { at: self.next_avail, id: b.id, count: 1 }
                };
                self.pending.push(chain);
                self.next_avail = self.next_avail.advanced(chain.count, self.size);
            }
        }
        Ok(())
    }

    /// Counts descriptors as taken. There cannot be more of them than the ring has.
    #[inline(always)]
    fn claim(&mut self, count: u16) -> Result<(), RingError> {
        if count > self.size - self.taken {
            return Err(RingError::Index);
        }
        self.taken += count;
        Ok(())
    }

    /// Gives back every buffer taken by [`PackedRing::pop`].
    pub fn complete(&mut self, memory: &GuestMemory) {
        self.written.extend(self.pending.drain(..).map(|chain| Used { chain, len: 0, more: false }));
        self.publish(memory);
    }

    /// Copies packets into buffers of the guest; returns how many went in.
    pub fn push(&mut self, memory: &GuestMemory, batch: &Batch<'_>) -> Result<usize, RingError> {
        let result = self.copy_in(memory, batch);
        self.publish(memory);
        result
    }

    /// Does so without telling the driver.
    #[inline(always)]
    fn copy_in(&mut self, memory: &GuestMemory, batch: &Batch<'_>) -> Result<usize, RingError> {
        let (mut sent, mut result) = (0, Ok(()));
        // Entry of the window at the next place.
        let mut at = 0;
        self.looked = 0;
        while sent < batch.len() {
            if at >= self.looked {
                self.look(memory, self.next_avail, batch.len() - sent, true);
                at = 0;
            }
            if self.looked == 0 {
                break;
            }
            match self.push_one(memory, batch.get(sent), self.window[at]) {
                Ok(Some(count)) => at += usize::from(count),
                Ok(None) => break,
                Err(e) => {
                    result = Err(e);
                    break;
                }
            }
            sent += 1;
        }
        result.map(|()| sent)
    }

    /// Copies one packet into the buffers from the next place on, the first of which is `buffer`. Returns how many
    /// descriptors they were, none if the packet does not fit into the driver's buffers and is lost; `None` if there are
    /// too few buffers at the moment.
    #[inline]
    fn push_one(
        &mut self,
        memory: &GuestMemory,
        p: &Packet,
        buffer: Buffer,
    ) -> Result<Option<u16>, RingError> {
        let header = self.features.header;
        let total = header + p.len();
        if buffer.len < total || buffer.ptr.is_null() {
            return self.push_chains(memory, p, total);
        }
        self.claim(1)?;
        // SAFETY: the buffer's bytes, at least `total`, are mapped.
        unsafe { fill_simple(p, buffer.ptr, header) };
        if self.features.log {
            memory.log_write(buffer.guest, total as u64);
        }
        let chain = Chain { at: self.next_avail, id: buffer.id, count: 1 };
        self.written.push(Used { chain, len: total as u32, more: false });
        self.next_avail = self.next_avail.advanced(1, self.size);
        Ok(Some(1))
    }

    /// The general case: chains of several descriptors, several buffers for one packet.
    #[cold]
    fn push_chains(
        &mut self,
        memory: &GuestMemory,
        p: &Packet,
        total: usize,
    ) -> Result<Option<u16>, RingError> {
        self.segments.clear();
        let (first_written, taken) = (self.written.len(), self.taken);
        let (mut room, mut buffers, mut place) = (0, 0u16, self.next_avail);
        while room < total {
            let before = self.segments.len();
            let too_long = buffers > 0 && !self.features.mergeable;
            let chain = if too_long { None } else { self.walk(memory, place, true)? };
            let Some(chain) = chain else {
                self.written.truncate(first_written);
                self.taken = taken;
                return Ok(too_long.then_some(0));
            };
            self.claim(chain.count)?;
            let capacity: usize = self.segments[before..].iter().map(|s| s.len).sum();
            let len = capacity.min(total - room) as u32;
            room += capacity;
            self.written.push(Used { chain, len, more: room < total });
            buffers += 1;
            place = place.advanced(chain.count, self.size);
        }
        let mut h = p.offload.encode();
        h[10..12].copy_from_slice(&buffers.to_le_bytes());
        let mut w = Writer::new(&self.segments, self.features.log.then_some(memory));
        w.write(h.as_ptr(), self.features.header);
        p.for_each_part(|from, len| w.write(from, len));
        self.next_avail = place;
        Ok(Some(self.taken - taken))
    }

    /// Gives back the buffers gathered in `written`.
    fn publish(&mut self, memory: &GuestMemory) {
        let Some(last) = self.written.last() else { return };
        self.next_used = last.chain.at.advanced(last.chain.count, self.size);
        self.taken -= self.written.iter().map(|u| u.chain.count).sum::<u16>();
        self.in_order_of_return().for_each(|u| self.give_back(memory, u));
        self.written.clear();
        self.note_position(memory);
        self.unannounced = true;
        crate::sys::prefetch(self.at.avail.cast_const());
    }

    /// What is gathered in `written`, as it is to be given back: packet by packet, the first buffer of each last, since a
    /// driver that sees it looks for the others (5.1.6.4.1).
    #[inline(always)]
    fn in_order_of_return(&self) -> impl Iterator<Item = &Used> {
        self.written.chunk_by(|u, _| u.more).flat_map(|packet| packet.iter().rev())
    }

    /// Gives one buffer back.
    #[inline(always)]
    fn give_back(&self, memory: &GuestMemory, u: &Used) {
        if u.chain.count > 1 {
            self.retire_tail(memory, u.chain);
        }
        let flags = Self::used_flags(u.chain.at) | if u.len > 0 { WRITE } else { 0 };
        let rest = u64::from(u.len) | u64::from(u.chain.id) << 32 | u64::from(flags) << 48;
        self.set_rest(memory, u.chain.at.index, rest);
    }

    /// Marks all descriptors of a chain but the first as used: the driver passes over them, but a successor sees that
    /// they are not available.
    #[cold]
    fn retire_tail(&self, memory: &GuestMemory, chain: Chain) {
        for i in 1..chain.count {
            let at = chain.at.advanced(i, self.size);
            let rest = self.words(at.index)[1].load(Ordering::Relaxed);
            let rest = rest & !(u64::from(AVAIL | USED) << 48) | u64::from(Self::used_flags(at)) << 48;
            self.set_rest(memory, at.index, rest);
        }
    }

    #[inline(always)]
    fn used_flags(at: Position) -> u16 {
        if at.wrap { AVAIL | USED } else { 0 }
    }

    /// Writes the second word of a descriptor.
    #[inline(always)]
    fn set_rest(&self, memory: &GuestMemory, index: u16, rest: u64) {
        self.words(index)[1].store(rest, Ordering::Release);
        if self.features.log
            && let Some(base) = self.at.desc_log
        {
            memory.log_write(base + 16 * u64::from(index) + 8, 8);
        }
    }

    /// Whether the driver wants to be notified of what was published since the last call. Best asked a while after
    /// publishing, as of a split ring.
    #[inline]
    pub fn wants_notification(&mut self) -> bool {
        if !std::mem::take(&mut self.unannounced) {
            return false;
        }
        // The descriptors must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.notified, self.next_used);
        let events = self.driver_events();
        match (events >> 16) as u16 & 3 {
            EVENTS_OFF => false,
            EVENTS_AT if self.features.event_idx => {
                // All three as distances back from the present place, of one lap at most.
                let new = self.next_used;
                let back = |p: Position| {
                    let lap = if p.wrap == new.wrap { 0 } else { self.size };
                    (new.index + lap).wrapping_sub(p.index)
                };
                // The event is within what was published: behind the present place, and not before the old one.
                let (event, old) = (back(Position::decode(events as u16)), back(old));
                event.wrapping_sub(1) < old
            }
            _ => true,
        }
    }

    /// Asks for notifications or waives them; when asking, returns whether buffers are available already.
    pub fn arm(&mut self, memory: &GuestMemory, on: bool) -> bool {
        let note = self.next_used.encode().wrapping_add(1);
        self.set_device_events(memory, note, if on { EVENTS_ON } else { EVENTS_OFF });
        if !on {
            return false;
        }
        fence(Ordering::SeqCst);
        self.available(self.next_avail).is_some()
    }
}

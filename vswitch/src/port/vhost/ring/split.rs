//! The device's side of a split virtqueue (virtio 1.2, 2.7) that carries network packets. One of the modules that
//! may use `unsafe`.
//!
//! The guest can write everything here at any time. So every index and descriptor is read once, checked, and used
//! only in the checked copy; a chain is bounded; what does not add up breaks the queue and nothing else.
#![expect(unsafe_code, reason = "reads and writes rings and buffers in guest memory")]

mod ahead;

use std::sync::atomic::{AtomicU16, Ordering, fence};

use self::ahead::WINDOW;
use super::frames::{Buffer, fill_simple, take_chain, take_simple};
use super::{CHAIN_MAX, INDIRECT, NEXT, QUEUE_MAX, RingAddresses, RingError, RingFeatures, WRITE};
use crate::packet::{BURST, Burst, Packet};
use crate::port::Batch;
use crate::port::vhost::memory::GuestMemory;
use crate::port::vhost::segments::{Segment, Writer};

/// How far ahead of copying a buffer is looked at that was not looked at before.
const AHEAD: u16 = 8;

/// Flag of the used ring: the driver need not notify. Flag of the available ring: the device need not.
const NO_NOTIFY: u16 = 1;

/// What became of one packet.
enum Pushed {
    /// It took this many chains.
    Chains(u16),
    /// There are too few buffers at the moment.
    NoRoom,
    /// It does not fit into the driver's buffers and is lost.
    TooLong,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// One split virtqueue.
#[derive(Debug)]
pub struct SplitRing {
    size: u16,
    at: RingAddresses,
    features: RingFeatures,
    /// Next available entry to take.
    next_avail: u16,
    /// The available index when it was last read. The driver's cache line is not asked for again before it is needed.
    seen_avail: u16,
    /// Entries up to this one were looked at: their buffers are in `window`, by their number modulo its length.
    looked: u16,
    window: [Buffer; WINDOW as usize],
    /// Next used entry to write.
    next_used: u16,
    /// Value of `next_used` at the last decision about a notification.
    notified: u16,
    /// Whether something was given to the driver since then.
    unannounced: bool,
    /// Heads of chains taken by `pop` and not yet given back.
    pending: Vec<u16>,
    /// Used elements of the batch under way.
    written: Vec<(u16, u32)>,
    segments: Vec<Segment>,
}

// SAFETY: the pointers refer to shared guest memory, valid for the whole process while the owner holds the memory.
unsafe impl Send for SplitRing {}

impl SplitRing {
    /// Adopts a ring, where its used index stands: each buffer that was taken before has been given back, or is to be
    /// taken again.
    ///
    /// # Safety
    /// The three parts must be mapped, with the lengths of [`super::part_sizes`], for as long as the ring is used.
    /// Buffers are looked at before they are needed: the memory that [`SplitRing::pop`] and [`SplitRing::push`] are
    /// given must stay the same until [`SplitRing::relocate`].
    pub unsafe fn new(size: u16, at: RingAddresses, features: RingFeatures) -> Result<Self, RingError> {
        if !size.is_power_of_two() || size > QUEUE_MAX {
            return Err(RingError::Index);
        }
        if !at.is_aligned(false) {
            return Err(RingError::Address);
        }
        let mut ring = Self {
            size,
            at,
            features,
            next_avail: 0,
            seen_avail: 0,
            looked: 0,
            window: [Buffer::NONE; WINDOW as usize],
            next_used: 0,
            notified: 0,
            unannounced: false,
            pending: Vec::with_capacity(BURST),
            written: Vec::with_capacity(BURST),
            segments: Vec::with_capacity(CHAIN_MAX),
        };
        ring.next_used = ring.used_index().load(Ordering::Relaxed);
        let start = ring.next_used;
        (ring.next_avail, ring.seen_avail, ring.looked, ring.notified) = (start, start, start, start);
        Ok(ring)
    }

    /// The next available entry: what a front-end asks for when it stops the queue.
    pub fn base(&self) -> u32 {
        self.next_avail.into()
    }

    /// Whether chains taken by [`SplitRing::pop`] wait for [`SplitRing::complete`].
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
    /// As [`SplitRing::new`].
    pub unsafe fn relocate(&mut self, at: RingAddresses) {
        self.at = at;
        // Buffers are elsewhere, or gone, too.
        self.looked = self.next_avail;
    }

    fn word(&self, part: *mut u8, index: usize) -> &AtomicU16 {
        // SAFETY: callers pass an index within the part, whose mapping `new` was promised; parts are aligned to two
        // bytes at least, and 16-bit atomics may be shared with the guest.
        unsafe { &*part.cast::<AtomicU16>().add(index) }
    }

    fn avail_flags(&self) -> &AtomicU16 {
        self.word(self.at.avail, 0)
    }

    fn avail_index(&self) -> &AtomicU16 {
        self.word(self.at.avail, 1)
    }

    fn used_flags(&self) -> &AtomicU16 {
        self.word(self.at.used, 0)
    }

    fn used_index(&self) -> &AtomicU16 {
        self.word(self.at.used, 1)
    }

    /// Driver's wish when to be notified.
    fn used_event(&self) -> &AtomicU16 {
        self.word(self.at.avail, 2 + usize::from(self.size))
    }

    /// Device's wish when to be notified.
    fn avail_event(&self) -> &AtomicU16 {
        self.word(self.at.used, 2 + 4 * usize::from(self.size))
    }

    /// Number of entries that the driver has made available.
    #[inline]
    fn available(&mut self) -> Result<u16, RingError> {
        let index = self.avail_index().load(Ordering::Acquire);
        let n = index.wrapping_sub(self.next_avail);
        if n > self.size {
            return Err(RingError::Index);
        }
        self.seen_avail = index;
        Ok(n)
    }

    /// Number of entries that the driver is known to have made available; whether there are more than fewer than
    /// `wanted` is asked.
    #[inline]
    fn available_for(&mut self, wanted: u16) -> Result<u16, RingError> {
        let known = self.seen_avail.wrapping_sub(self.next_avail);
        if known >= wanted { Ok(known) } else { self.available() }
    }

    #[inline]
    fn avail_entry(&self, i: u16) -> Result<u16, RingError> {
        let head = self.word(self.at.avail, 2 + usize::from(i & (self.size - 1))).load(Ordering::Relaxed);
        if head >= self.size { Err(RingError::Descriptor) } else { Ok(head) }
    }

    #[inline(always)]
    fn descriptor(&self, i: u16) -> Descriptor {
        debug_assert!(i < self.size);
        // SAFETY: every caller checked `i` against the size of the table; the table is mapped and aligned.
        unsafe { self.at.desc.cast::<Descriptor>().add(usize::from(i)).read_volatile() }
    }

    /// Collects the segments of a chain; `write` says which direction they must have.
    #[cold]
    fn walk(&mut self, memory: &GuestMemory, head: u16, write: bool) -> Result<(), RingError> {
        let mut d = self.descriptor(head);
        let mut table: Option<(*const Descriptor, u32)> = None;
        if d.flags & INDIRECT != 0 {
            let count = d.len / 16;
            if d.flags & NEXT != 0 || count == 0 || count as usize > CHAIN_MAX || !d.len.is_multiple_of(16) {
                return Err(RingError::Chain);
            }
            let t = memory.translate(d.addr, d.len.into()).ok_or(RingError::Address)?;
            table = Some((t.cast_const().cast(), count));
            // SAFETY: the table holds `count` > 0 descriptors in mapped memory; it may be unaligned.
            d = unsafe { t.cast::<Descriptor>().read_unaligned() };
        }
        for _ in 0..CHAIN_MAX {
            if d.flags & INDIRECT != 0 || (d.flags & WRITE != 0) != write {
                return Err(RingError::Chain);
            }
            if d.len != 0 {
                let ptr = memory.translate(d.addr, d.len.into()).ok_or(RingError::Address)?;
                self.segments.push(Segment { ptr, len: d.len as usize, guest: d.addr });
            }
            if d.flags & NEXT == 0 {
                return Ok(());
            }
            let limit = table.map_or(u32::from(self.size), |(_, n)| n);
            if u32::from(d.next) >= limit {
                return Err(RingError::Descriptor);
            }
            d = match table {
                // SAFETY: the index was checked against the number of descriptors in the table.
                Some((t, _)) => unsafe { t.add(usize::from(d.next)).read_unaligned() },
                None => self.descriptor(d.next),
            };
        }
        Err(RingError::Chain)
    }

    /// Takes packets that the guest sends, up to the burst's room. Heads are copied, tails stay in guest memory,
    /// which the burst must hold, until [`SplitRing::complete`].
    pub fn pop(&mut self, memory: &GuestMemory, burst: &mut Burst) -> Result<(), RingError> {
        let n = self.available_for(burst.room() as u16)?.min(burst.room() as u16);
        if n == 0 {
            return Ok(());
        }
        // Addresses first, then packets, so that the loads of each overlap.
        let end = self.next_avail.wrapping_add(n);
        let unseen = end.wrapping_sub(self.looked);
        if unseen <= WINDOW {
            self.prefetch_descriptors(self.looked, unseen);
            self.look_up_to(memory, end, false);
        }
        let header = self.features.header;
        for _ in 0..n {
            let b = self.window[usize::from(self.next_avail % WINDOW)];
            self.segments.clear();
            if b.ptr.is_null() {
                let head = self.avail_entry(self.next_avail)?;
                self.walk(memory, head, false)?;
                take_chain(&self.segments, header, burst);
                self.pending.push(head);
            } else {
                // SAFETY: `look` translated the buffer; the caller makes the burst hold its memory.
                unsafe { take_simple(b.ptr, b.len, header, burst) };
                self.pending.push(b.id);
            }
            self.next_avail = self.next_avail.wrapping_add(1);
        }
        self.look_ahead(memory, false);
        Ok(())
    }

    /// Gives back every chain taken by [`SplitRing::pop`].
    pub fn complete(&mut self, memory: &GuestMemory) {
        self.written.extend(self.pending.drain(..).map(|h| (h, 0)));
        self.publish(memory);
    }

    /// Copies packets into buffers of the guest; returns how many went in.
    pub fn push(&mut self, memory: &GuestMemory, batch: &Batch<'_>) -> Result<usize, RingError> {
        let wanted = u16::try_from(batch.len()).unwrap_or(u16::MAX);
        let available = self.available_for(wanted)?;
        // Not kept in `self` while packets are copied: to load it back together with its neighbours the CPU would wait
        // until every store before it has reached the cache, packets into the guest's lines included.
        let mut next = self.next_avail;
        let mut end = next.wrapping_add(available);
        self.prefetch_used(available.min(wanted));
        let mut sent = 0;
        let mut result = Ok(());
        while sent < batch.len() && next != end {
            if self.looked.wrapping_sub(next) > WINDOW {
                // A packet took several chains.
                self.looked = next;
            }
            let left = end.wrapping_sub(next).min((batch.len() - sent).min(AHEAD.into()) as u16);
            self.look_up_to(memory, next.wrapping_add(left), true);
            let (p, buffer) = (batch.get(sent), self.window[usize::from(next % WINDOW)]);
            match self.push_one(memory, p, buffer, next, end.wrapping_sub(next)) {
                Ok(Pushed::Chains(used)) => next = next.wrapping_add(used),
                Ok(Pushed::TooLong) => {}
                Ok(Pushed::NoRoom) => {
                    // More than were known may be there by now.
                    self.next_avail = next;
                    match self.available() {
                        Ok(n) if n > end.wrapping_sub(next) => end = next.wrapping_add(n),
                        Ok(_) => break,
                        Err(e) => {
                            result = Err(e);
                            break;
                        }
                    }
                    continue;
                }
                Err(e) => {
                    result = Err(e);
                    break;
                }
            }
            sent += 1;
        }
        self.next_avail = next;
        self.publish(memory);
        self.look_ahead(memory, true);
        result.map(|()| sent)
    }

    /// Copies one packet into `buffer`, or into the chains from entry `next` on, of which there are `available`.
    #[inline]
    fn push_one(
        &mut self,
        memory: &GuestMemory,
        p: &Packet,
        buffer: Buffer,
        next: u16,
        available: u16,
    ) -> Result<Pushed, RingError> {
        let header = self.features.header;
        let total = header + p.len();
        if buffer.len < total || buffer.ptr.is_null() {
            return self.push_chains(memory, p, total, next, available);
        }
        // SAFETY: the buffer's bytes, at least `total`, are mapped.
        unsafe { fill_simple(p, buffer.ptr, header) };
        if self.features.log {
            memory.log_write(buffer.guest, total as u64);
        }
        self.written.push((buffer.id, total as u32));
        Ok(Pushed::Chains(1))
    }

    /// The general case: chains of several descriptors, several chains for one packet.
    #[cold]
    fn push_chains(
        &mut self,
        memory: &GuestMemory,
        p: &Packet,
        total: usize,
        next: u16,
        available: u16,
    ) -> Result<Pushed, RingError> {
        self.segments.clear();
        let first_written = self.written.len();
        let (mut room, mut chains) = (0, 0u16);
        while room < total {
            let limit = if self.features.mergeable { available } else { 1 };
            if chains >= limit {
                self.written.truncate(first_written);
                return Ok(if self.features.mergeable { Pushed::NoRoom } else { Pushed::TooLong });
            }
            let head = self.avail_entry(next.wrapping_add(chains))?;
            let before = self.segments.len();
            self.walk(memory, head, true)?;
            let capacity: usize = self.segments[before..].iter().map(|s| s.len).sum();
            let len = capacity.min(total - room);
            self.written.push((head, len as u32));
            room += capacity;
            chains += 1;
        }
        let mut h = p.offload.encode();
        h[10..12].copy_from_slice(&chains.to_le_bytes());
        let mut w = Writer::new(&self.segments, self.features.log.then_some(memory));
        w.write(h.as_ptr(), self.features.header);
        p.for_each_part(|from, len| w.write(from, len));
        Ok(Pushed::Chains(chains))
    }

    /// Publishes the used elements gathered in `written`.
    fn publish(&mut self, memory: &GuestMemory) {
        if self.written.is_empty() {
            return;
        }
        let mask = self.size - 1;
        // SAFETY: the used ring has `size` elements of eight bytes, four bytes behind its start.
        let elements = unsafe { self.at.used.add(4) }.cast::<[u32; 2]>();
        for (i, (head, len)) in self.written.iter().enumerate() {
            let at = usize::from(self.next_used.wrapping_add(i as u16) & mask);
            // SAFETY: `at` is less than the size of the ring; the ring is aligned to four bytes.
            unsafe { elements.add(at).write_volatile([u32::from(*head), *len]) };
            if self.features.log
                && let Some(base) = self.at.used_log
            {
                memory.log_write(base + 4 + 8 * at as u64, 8);
            }
        }
        self.next_used = self.next_used.wrapping_add(self.written.len() as u16);
        self.written.clear();
        self.used_index().store(self.next_used, Ordering::Release);
        if self.features.log
            && let Some(base) = self.at.used_log
        {
            memory.log_write(base + 2, 2);
        }
        self.unannounced = true;
        // For the wish to be notified, which is in the line of the available index.
        crate::sys::prefetch(self.at.avail.cast_const());
    }

    /// Whether the driver wants to be notified of what was published since the last call.
    ///
    /// To find out waits for all stores to reach the cache: best done a while after publishing.
    #[inline]
    pub fn wants_notification(&mut self) -> bool {
        if !std::mem::take(&mut self.unannounced) {
            return false;
        }
        // The index must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.notified, self.next_used);
        if self.features.event_idx {
            let event = self.used_event().load(Ordering::Relaxed);
            self.next_used.wrapping_sub(event).wrapping_sub(1) < self.next_used.wrapping_sub(old)
        } else {
            self.avail_flags().load(Ordering::Relaxed) & NO_NOTIFY == 0
        }
    }

    /// Asks for notifications or waives them; when asking, returns whether entries are available already.
    pub fn arm(&mut self, on: bool) -> bool {
        if self.features.event_idx {
            if on {
                self.avail_event().store(self.next_avail, Ordering::Relaxed);
            }
        } else {
            self.used_flags().store(if on { 0 } else { NO_NOTIFY }, Ordering::Relaxed);
        }
        if !on {
            return false;
        }
        fence(Ordering::SeqCst);
        // A bad index counts as work: `pop` will find the error.
        self.available().map_or(true, |n| n > 0)
    }
}

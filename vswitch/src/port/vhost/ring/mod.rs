//! The device's side of a split virtqueue (virtio 1.2, 2.7) that carries network packets. One of the modules that
//! may use `unsafe`.
//!
//! The guest can write everything here at any time. So every index and descriptor is read once, checked, and used
//! only in the checked copy; a chain is bounded; what does not add up breaks the queue and nothing else.
#![expect(unsafe_code, reason = "reads and writes rings and buffers in guest memory")]

mod ahead;

use std::sync::atomic::{AtomicU16, Ordering, fence};

use self::ahead::{Buffer, WINDOW};
use super::memory::GuestMemory;
use super::segments::{Reader, Segment, Writer, copy};
use crate::packet::offload::VNET_HDR_LEN;
use crate::packet::{BURST, Burst, FRAME_MAX, FRAME_MIN, HEAD_MAX, Offload, Packet};
use crate::port::Batch;

/// Largest queue.
pub const QUEUE_MAX: u16 = 32_768;
/// Most descriptors in a chain.
const CHAIN_MAX: usize = 64;

/// How far ahead of copying a buffer is looked at that was not looked at before.
const AHEAD: u16 = 8;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Flag of the used ring: the driver need not notify. Flag of the available ring: the device need not.
const NO_NOTIFY: u16 = 1;

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

/// What became of one packet.
enum Pushed {
    /// It took this many chains.
    Chains(u16),
    /// There are too few buffers at the moment.
    NoRoom,
    /// It does not fit into the driver's buffers and is lost.
    TooLong,
}

/// Features that change how a ring is used.
#[derive(Clone, Copy, Debug)]
pub struct RingFeatures {
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
        Self { event_idx: false, mergeable: false, header: VNET_HDR_LEN, log: false }
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// Addresses of the three parts, in this process.
#[derive(Clone, Copy, Debug)]
pub struct RingAddresses {
    /// Descriptor table.
    pub desc: *mut u8,
    /// Available ring.
    pub avail: *mut u8,
    /// Used ring.
    pub used: *mut u8,
    /// Guest address of the used ring, when its pages are to be logged.
    pub used_log: Option<u64>,
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

/// Bytes of each part of a ring of `size` entries: descriptor table, available ring, used ring.
pub fn part_sizes(size: u16) -> (u64, u64, u64) {
    let n = u64::from(size);
    (16 * n, 6 + 2 * n, 6 + 8 * n)
}

impl SplitRing {
    /// Adopts a ring, where its used index stands: each buffer that was taken before has been given back, or is to be
    /// taken again.
    ///
    /// # Safety
    /// The three parts must be mapped, with the lengths of [`part_sizes`], for as long as the ring is used. Buffers are
    /// looked at before they are needed: the memory that [`SplitRing::pop`] and [`SplitRing::push`] are given must stay
    /// the same until [`SplitRing::relocate`].
    pub unsafe fn new(size: u16, at: RingAddresses, features: RingFeatures) -> Result<Self, RingError> {
        if !size.is_power_of_two() || size > QUEUE_MAX {
            return Err(RingError::Index);
        }
        if !(at.desc as usize).is_multiple_of(16)
            || !(at.avail as usize).is_multiple_of(2)
            || !(at.used as usize).is_multiple_of(4)
        {
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
    pub fn base(&self) -> u16 {
        self.next_avail
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
        for _ in 0..n {
            let b = self.window[usize::from(self.next_avail % WINDOW)];
            self.segments.clear();
            if b.ptr.is_null() {
                let head = self.avail_entry(self.next_avail)?;
                self.walk(memory, head, false)?;
                self.take_chain(burst);
                self.pending.push(head);
            } else {
                self.take_simple(b.ptr, b.len, burst);
                self.pending.push(b.head);
            }
            self.next_avail = self.next_avail.wrapping_add(1);
        }
        self.look_ahead(memory, false);
        Ok(())
    }

    /// A packet in one buffer.
    #[inline(always)]
    fn take_simple(&mut self, ptr: *mut u8, len: usize, burst: &mut Burst) {
        let header = self.features.header;
        let frame = len.wrapping_sub(header);
        if len < header || !(FRAME_MIN..=FRAME_MAX).contains(&frame) {
            burst.errors += 1;
            return;
        }
        // SAFETY: the buffer holds at least the header, of which ten bytes are read, once.
        let h = unsafe { ptr.cast::<[u8; VNET_HDR_LEN]>().read_volatile() };
        let Some(p) = burst.push() else { return };
        let n = frame.min(HEAD_MAX);
        let space = p.head_space(n);
        // SAFETY: `ptr + header` is followed by `frame` >= n mapped bytes; `space` has room for n.
        unsafe { copy(ptr.add(header), space.as_mut_ptr(), n) };
        if frame > n {
            // SAFETY: the rest of the buffer is mapped by the memory that the caller makes the burst hold.
            unsafe { p.guest_mut().push(ptr.add(header + n), frame - n) };
        }
        if h != [0; VNET_HDR_LEN] {
            set_offload(&h, burst);
        }
    }

    /// A packet in the collected segments.
    fn take_chain(&mut self, burst: &mut Burst) {
        let total: usize = self.segments.iter().map(|s| s.len).sum();
        let header = self.features.header;
        if total < header + FRAME_MIN || total > header + FRAME_MAX {
            burst.errors += 1;
            return;
        }
        let mut h = [0u8; VNET_HDR_LEN];
        let mut reader = Reader::new(&self.segments);
        reader.read(&mut h);
        reader.skip(header - VNET_HDR_LEN);
        let frame = total - header;
        let Some(p) = burst.push() else { return };
        reader.read(p.head_space(frame.min(HEAD_MAX)));
        while let Some((ptr, len)) = reader.next_part() {
            // SAFETY: the segment was translated by the memory that the caller makes the burst hold.
            if !unsafe { p.guest_mut().push(ptr, len) } {
                burst.pop();
                burst.errors += 1;
                return;
            }
        }
        set_offload(&h, burst);
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
        let end = next.wrapping_add(available);
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
                Ok(Pushed::NoRoom) => break,
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
        let h = p.offload.encode();
        // SAFETY: the buffer's bytes, at least `total`, are mapped; the header is 10 or 12 bytes of the 12 in `h`, and
        // the packet's parts add up to the rest.
        unsafe {
            copy_header(&h, buffer.ptr, header);
            let mut to = buffer.ptr.add(header);
            p.for_each_part(|from, len| {
                copy(from, to, len);
                to = to.add(len);
            });
        }
        if self.features.log {
            memory.log_write(buffer.guest, total as u64);
        }
        self.written.push((buffer.head, total as u32));
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

/// Applies a sender's offload request to the packet added last, or refuses the packet.
#[cold]
fn set_offload(h: &[u8; VNET_HDR_LEN], burst: &mut Burst) {
    let offload = Offload::parse(h);
    let last = burst.len() - 1;
    if offload.is_valid(burst.packets()[last].head().len()) {
        burst.packet_mut(last).offload = offload.sanitized();
    } else {
        burst.pop();
        burst.errors += 1;
    }
}

/// Copies the 10 or 12 bytes of a packet header, unless they are there already: the driver's copy of a cache line that
/// is not written stays good.
///
/// # Safety
/// `len` bytes at `to` must be readable and writable, and `len` be ten or twelve.
#[inline(always)]
unsafe fn copy_header(h: &[u8; 12], to: *mut u8, len: usize) {
    // SAFETY: promised by the caller.
    unsafe {
        if len == 12 {
            // In two loads.
            let (low, high) = (to.cast::<[u8; 8]>().read(), to.add(8).cast::<[u8; 4]>().read());
            if low != h[..8] || high != h[8..] {
                to.cast::<[u8; 12]>().write(*h);
            }
        } else {
            std::ptr::copy_nonoverlapping(h.as_ptr(), to, len.min(12));
        }
    }
}

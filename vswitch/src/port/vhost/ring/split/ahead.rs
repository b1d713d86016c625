//! What a ring asks the CPU for before it is needed. Cache lines that another core wrote last take long to come, many at
//! once as long as one.

use super::SplitRing;
use crate::packet::BURST;
use crate::port::vhost::memory::GuestMemory;
use crate::port::vhost::ring::frames::{Buffer, prefetch_buffer};
use crate::port::vhost::ring::{INDIRECT, NEXT, WRITE};

/// Buffers that are looked at before they are needed, so that their cache lines come meanwhile: a burst.
pub(super) const WINDOW: u16 = BURST as u16;

impl SplitRing {
    #[inline(always)]
    pub(super) fn prefetch_descriptors(&self, from: u16, n: u16) {
        for i in 0..n {
            if let Ok(head) = self.avail_entry(from.wrapping_add(i)) {
                crate::sys::prefetch(self.at.desc.wrapping_add(16 * usize::from(head)).cast_const());
            }
        }
    }

    /// Asks for the places of the next `n` used elements.
    #[inline(always)]
    pub(super) fn prefetch_used(&self, n: u16) {
        for i in (0..n).step_by(8) {
            let at = usize::from(self.next_used.wrapping_add(i) & (self.size - 1));
            crate::sys::prefetch_write(self.at.used.wrapping_add(4 + 8 * at));
        }
    }

    /// Looks at what is known to be available beyond this call: buffers for the next one, descriptors for the one after
    /// that.
    #[inline(always)]
    pub(super) fn look_ahead(&mut self, memory: &GuestMemory, write: bool) {
        if self.looked.wrapping_sub(self.next_avail) > WINDOW {
            self.looked = self.next_avail;
        }
        let known = self.seen_avail.wrapping_sub(self.next_avail);
        self.look_up_to(memory, self.next_avail.wrapping_add(known.min(WINDOW)), write);
        if known > WINDOW {
            self.prefetch_descriptors(self.next_avail.wrapping_add(WINDOW), (known - WINDOW).min(WINDOW));
        }
    }

    /// Looks at the buffers of available entries up to `end`, which is within the window.
    #[inline(always)]
    pub(super) fn look_up_to(&mut self, memory: &GuestMemory, end: u16, write: bool) {
        while end.wrapping_sub(self.looked).wrapping_sub(1) < WINDOW {
            self.window[usize::from(self.looked % WINDOW)] = self.look(memory, self.looked, write);
            self.looked = self.looked.wrapping_add(1);
        }
    }

    /// Looks at the chain of an available entry and asks for the first lines of its buffer. A chain that is not one
    /// buffer in the direction wanted, or wrong, is left to the general case, which reads it anew.
    #[inline(always)]
    fn look(&self, memory: &GuestMemory, entry: u16, write: bool) -> Buffer {
        let Ok(head) = self.avail_entry(entry) else { return Buffer::NONE };
        let d = self.descriptor(head);
        if d.flags & (NEXT | WRITE | INDIRECT) != if write { WRITE } else { 0 } {
            return Buffer::NONE;
        }
        let Some(ptr) = memory.translate(d.addr, d.len.into()) else { return Buffer::NONE };
        prefetch_buffer(ptr, self.features.header, write);
        Buffer { ptr, len: d.len as usize, guest: d.addr, id: head }
    }
}

//! Frames from and to the buffers of a ring, whatever its kind. One of the modules that may use `unsafe`.
#![expect(unsafe_code, reason = "copies packets from and to guest memory")]

use crate::packet::offload::VNET_HDR_LEN;
use crate::packet::{Burst, FRAME_MAX, FRAME_MIN, HEAD_MAX, Offload, Packet};
use crate::port::vhost::segments::{Reader, Segment, copy};

/// A chain of one buffer in the direction wanted, translated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Buffer {
    pub ptr: *mut u8,
    pub len: usize,
    pub guest: u64,
    /// What it is given back by: the number of its descriptor in a split ring, its identifier in a packed one.
    pub id: u16,
}

impl Buffer {
    /// Stands for a chain that is anything else.
    pub const NONE: Self = Self { ptr: std::ptr::null_mut(), len: 0, guest: 0, id: 0 };
}

/// Adds the packet in one buffer to a burst; `header` is the length of the packet header. The head of the frame is
/// copied, the rest stays where it is.
///
/// # Safety
/// `len` bytes must be mapped at `ptr`, by the memory that the caller makes the burst hold.
#[inline(always)]
pub(super) unsafe fn take_simple(ptr: *mut u8, len: usize, header: usize, burst: &mut Burst) {
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

/// Adds the packet in the segments of a chain to a burst, which must hold their memory.
pub(super) fn take_chain(segments: &[Segment], header: usize, burst: &mut Burst) {
    let total: usize = segments.iter().map(|s| s.len).sum();
    if total < header + FRAME_MIN || total > header + FRAME_MAX {
        burst.errors += 1;
        return;
    }
    let mut h = [0u8; VNET_HDR_LEN];
    let mut reader = Reader::new(segments);
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

/// Copies a packet, with its header, into one buffer.
///
/// # Safety
/// The buffer must be mapped and hold the header, of 10 or 12 bytes, and the packet.
#[inline(always)]
pub(super) unsafe fn fill_simple(p: &Packet, ptr: *mut u8, header: usize) {
    let h = p.offload.encode();
    // SAFETY: promised by the caller; the header is 10 or 12 bytes of the 12 in `h`.
    unsafe {
        copy_header(&h, ptr, header);
        let mut to = ptr.add(header);
        p.for_each_part(|from, len| {
            copy(from, to, len);
            to = to.add(len);
        });
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

/// Asks for the first lines of a buffer, for a packet to be written there or read.
#[inline(always)]
pub(super) fn prefetch_buffer(ptr: *mut u8, header: usize, write: bool) {
    let second = ptr.wrapping_add(64);
    if !write {
        crate::sys::prefetch(ptr.cast_const());
        return crate::sys::prefetch(second.cast_const());
    }
    // A header with a cache line of its own is mostly left as it is; the frame follows it into the second line.
    if ptr as usize % 64 + header < 64 {
        crate::sys::prefetch_write(ptr);
    } else {
        crate::sys::prefetch(ptr.cast_const());
    }
    crate::sys::prefetch_write(second);
}

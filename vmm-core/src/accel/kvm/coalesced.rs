//! Writes that the kernel queues instead of leaving the guest for each (`KVM_REGISTER_COALESCED_MMIO`): those to
//! registers that do nothing until another register is touched, such as the index of an index and data pair.
//!
//! The queue is the VM's, in a page that each vCPU's mapping shows. Whoever leaves the guest empties it before anything
//! else, so a device sees accesses in the order in which a vCPU made them.

use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring, kvm_run};
use parking_lot::Mutex;

use crate::accel::IoBus;
use crate::memory::PAGE_SIZE;

const RING: usize = KVM_COALESCED_MMIO_PAGE_OFFSET as usize * PAGE_SIZE as usize;
const ENTRIES: usize =
    (PAGE_SIZE as usize - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>();

/// Passes the queued writes on to `bus`. `page` is the page that the kernel shares with a vCPU, whose mapping is
/// `page_size` bytes long; `turn` is the VM's.
pub fn deliver(page: &mut kvm_run, page_size: usize, turn: &Mutex<()>, bus: &dyn IoBus) {
    if page_size < RING + PAGE_SIZE as usize {
        return;
    }
    // SAFETY: the mapping is long enough, page-aligned, and lives as long as the borrow of its first page.
    let ring = unsafe { (&raw mut *page).cast::<u8>().add(RING) };
    // SAFETY: the queue begins with the indices `first` and `last`, which other threads and the kernel change atomically.
    let [first, last] = unsafe { &*ring.cast::<[AtomicU32; 2]>() };
    if first.load(Ordering::Acquire) == last.load(Ordering::Acquire) {
        return;
    }
    // `first` moves on only after the device took the write: a vCPU that found the queue empty above comes after
    // everything that was in it.
    let _turn = turn.lock();
    loop {
        let at = first.load(Ordering::Acquire) as usize;
        if at == last.load(Ordering::Acquire) as usize || at >= ENTRIES {
            return;
        }
        // SAFETY: the index is within the page, and the kernel leaves the entry alone until `first` passes it.
        let write = unsafe {
            ring.add(size_of::<kvm_coalesced_mmio_ring>()).cast::<kvm_coalesced_mmio>().add(at).read()
        };
        let data = &write.data[..(write.len as usize).min(write.data.len())];
        // SAFETY: both variants of the union are one 32-bit number.
        if unsafe { write.__bindgen_anon_1.pio } != 0 {
            bus.port_write(write.phys_addr as u16, data);
        } else {
            bus.mmio_write(write.phys_addr, data);
        }
        first.store(((at + 1) % ENTRIES) as u32, Ordering::Release);
    }
}

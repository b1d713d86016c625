//! Dirty pages through rings: each vCPU puts the pages that it writes into a ring that the kernel shares with us
//! (`KVM_CAP_DIRTY_LOG_RING`; Linux's Documentation/virt/kvm/api.rst, section 8.29). Asking costs as much as was
//! written, where the dirty log's bitmap costs as much as there is memory.
//!
//! A vCPU whose ring is almost full leaves the guest until somebody harvests. What was harvested is kept as a bitmap
//! of each region until it is taken.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_DIRTY_LOG_PAGE_OFFSET, kvm_enable_cap};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use parking_lot::Mutex;

use super::sys;
use crate::memory::{GuestMemory, PAGE_SIZE};

/// A page was written; the rest of the entry is valid.
const DIRTY: u32 = 1;
/// We have seen the entry: the kernel may watch the page again.
const HARVESTED: u32 = 2;
/// The kernel refuses smaller rings: it keeps entries in reserve.
const FEWEST: u32 = 1024;

/// `kvm_dirty_gfn`: both sides change it while the other looks.
#[repr(C)]
struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    /// Page number within the slot.
    offset: AtomicU64,
}

/// Passes slot and page number of each new entry from `next` on to `found`, and gives the entries back; returns how
/// many there were.
fn harvest(entries: &[Entry], next: &mut usize, mut found: impl FnMut(u32, u64)) -> usize {
    // Never more than once around: an entry that was given back is not new before the kernel was told to reset.
    for count in 0..entries.len() {
        let entry = &entries[*next];
        if entry.flags.load(Ordering::Acquire) & DIRTY == 0 {
            return count;
        }
        found(entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed));
        entry.flags.store(HARVESTED, Ordering::Release);
        *next = (*next + 1) % entries.len();
    }
    entries.len()
}

/// One vCPU's ring, mapped.
struct Ring {
    entries: NonNull<Entry>,
    count: usize,
    next: usize,
}

// SAFETY: the mapping belongs to no thread; its entries are atomics.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: &VcpuFd, count: usize) -> io::Result<Self> {
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE as i64;
        let (size, access) = (count * size_of::<Entry>(), libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let mapped = unsafe {
            libc::mmap(std::ptr::null_mut(), size, access, libc::MAP_SHARED, vcpu.as_raw_fd(), offset)
        };
        match NonNull::new(mapped.cast()) {
            Some(entries) if mapped != libc::MAP_FAILED => Ok(Self { entries, count, next: 0 }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn harvest(&mut self, found: impl FnMut(u32, u64)) -> usize {
        // SAFETY: the mapping has `count` entries and lives as long as `self`; entries are atomics, so the kernel may
        // write them meanwhile.
        let entries = unsafe { std::slice::from_raw_parts(self.entries.as_ptr(), self.count) };
        harvest(entries, &mut self.next, found)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: what `map` mapped, and nobody borrows it any more.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), self.count * size_of::<Entry>()) };
    }
}

struct State {
    rings: Vec<Ring>,
    /// What was harvested and not taken, by region: one bit a page.
    dirty: Vec<Vec<u64>>,
}

impl State {
    fn mark(dirty: &mut [Vec<u64>], slot: u32, page: u64) {
        let word = dirty.get_mut(slot as usize).and_then(|words| words.get_mut((page / 64) as usize));
        if let Some(word) = word {
            *word |= 1 << (page % 64);
        }
    }
}

/// The rings of a VM's vCPUs.
pub struct DirtyRings {
    entries: u32,
    state: Mutex<State>,
}

impl DirtyRings {
    /// How many entries a ring has at most on this host; `None` without rings.
    pub fn most(kvm: &Kvm) -> Option<u32> {
        let bytes = u32::try_from(kvm.check_extension_int(Cap::DirtyLogRing)).unwrap_or(0);
        Some(bytes / size_of::<Entry>() as u32).filter(|most| *most >= FEWEST)
    }

    /// Gives each vCPU that will be created a ring of `wanted` entries (0 for none), or of what the host has instead.
    /// From then on the VM has no dirty log. `None` where the host has no rings.
    pub fn enable(kvm: &Kvm, vm: &VmFd, wanted: u32, memory: &GuestMemory) -> Option<Self> {
        let most = Self::most(kvm).filter(|_| wanted != 0)?;
        let entries = wanted.clamp(FEWEST, most).next_power_of_two().min(most);
        let mut request = kvm_enable_cap { cap: KVM_CAP_DIRTY_LOG_RING, ..Default::default() };
        request.args[0] = u64::from(entries) * size_of::<Entry>() as u64;
        if let Err(error) = vm.enable_cap(&request) {
            tracing::debug!(%error, entries, "No dirty rings; the dirty log takes their place");
            return None;
        }
        Some(Self { entries, state: Mutex::new(State { rings: Vec::new(), dirty: empty(memory) }) })
    }

    /// Entries of each ring.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Takes in the ring of a new vCPU. It is looked at until the VM ends, also when the vCPU went before.
    pub fn add(&self, vcpu: &VcpuFd) -> io::Result<()> {
        let ring = Ring::map(vcpu, self.entries as usize)?;
        self.state.lock().rings.push(ring);
        Ok(())
    }

    /// Empties all rings, so that vCPUs can go on.
    pub fn harvest(&self, vm: &VmFd) -> io::Result<()> {
        Self::harvest_locked(&mut self.state.lock(), vm)
    }

    fn harvest_locked(state: &mut State, vm: &VmFd) -> io::Result<()> {
        let State { rings, dirty } = state;
        let count: usize =
            rings.iter_mut().map(|ring| ring.harvest(|slot, page| State::mark(dirty, slot, page))).sum();
        // The pages are watched again before anybody reads them: what is written later is reported again.
        if count > 0 { sys::reset_dirty_rings(vm) } else { Ok(()) }
    }

    /// The pages of region `index` that were written since the last call, of which there must be one.
    pub fn take(&self, vm: &VmFd, index: usize) -> io::Result<Vec<u64>> {
        let mut state = self.state.lock();
        Self::harvest_locked(&mut state, vm)?;
        let clean = vec![0; state.dirty[index].len()];
        Ok(std::mem::replace(&mut state.dirty[index], clean))
    }

    /// Forgets everything.
    pub fn clear(&self, vm: &VmFd, memory: &GuestMemory) -> io::Result<()> {
        let mut state = self.state.lock();
        Self::harvest_locked(&mut state, vm)?;
        state.dirty = empty(memory);
        Ok(())
    }
}

/// Clean bitmaps.
fn empty(memory: &GuestMemory) -> Vec<Vec<u64>> {
    let words = |size: u64| size.div_ceil(PAGE_SIZE).div_ceil(64) as usize;
    memory.regions().iter().map(|region| vec![0; words(region.size())]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(count: usize) -> Vec<Entry> {
        let entry = || Entry { flags: AtomicU32::new(0), slot: AtomicU32::new(0), offset: AtomicU64::new(0) };
        (0..count).map(|_| entry()).collect()
    }

    /// The kernel's part: a page was written.
    fn put(entry: &Entry, slot: u32, offset: u64) {
        assert_ne!(entry.flags.load(Ordering::Relaxed) & (DIRTY | HARVESTED), DIRTY, "not taken yet");
        entry.slot.store(slot, Ordering::Relaxed);
        entry.offset.store(offset, Ordering::Relaxed);
        entry.flags.store(DIRTY, Ordering::Release);
    }

    #[test]
    fn entries_are_taken_in_order_and_around_the_end() {
        let entries = ring(4);
        let mut next = 0;
        let mut all = Vec::new();
        let mut at = 0;
        for round in 0..5 {
            for page in 0..3u64 {
                put(&entries[at], round, page);
                at = (at + 1) % 4;
            }
            assert_eq!(harvest(&entries, &mut next, |slot, page| all.push((slot, page))), 3);
            assert_eq!(harvest(&entries, &mut next, |_, _| panic!("taken already")), 0);
            assert_eq!(next, at);
        }
        let expected: Vec<_> = (0..5).flat_map(|round| (0..3).map(move |page| (round, page))).collect();
        assert_eq!(all, expected);
        assert!(entries.iter().all(|e| e.flags.load(Ordering::Relaxed) == HARVESTED));
    }

    #[test]
    fn a_full_ring_is_harvested_once() {
        let entries = ring(4);
        entries.iter().for_each(|entry| put(entry, 0, 7));
        let mut next = 0;
        assert_eq!(harvest(&entries, &mut next, |slot, page| assert_eq!((slot, page), (0, 7))), 4);
        assert_eq!(next, 0);
    }

    #[test]
    fn pages_that_do_not_exist_are_ignored() {
        let mut dirty = vec![vec![0; 2], vec![0]];
        for (slot, page) in [(0, 65), (1, 63), (1, 64), (2, 0), (1 << 16, 0), (0, u64::MAX)] {
            State::mark(&mut dirty, slot, page);
        }
        assert_eq!(dirty, [vec![0, 2], vec![1 << 63]]);
    }
}

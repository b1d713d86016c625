//! The software TLB: two direct-mapped tables (supervisor, user) of host addresses.

/// Entries of each table. They reach 16 MiB: buffers of a few MiB that are copied to each other rarely collide.
pub(crate) const ENTRIES: usize = 4096;
/// A tag that no address has.
const EMPTY: u64 = u64::MAX;
/// Marks a tag whose permission is known, but whose accesses have to take the slow path.
pub(crate) const SLOW: u64 = 1;
const PAGE: u64 = !0xfff;

/// One translation. A tag equals the page's linear address if the access is allowed without further ado.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct Entry {
    pub read: u64,
    pub write: u64,
    pub exec: u64,
    /// Host address minus linear address.
    pub addend: u64,
}

/// A table that knows nothing.
pub(crate) static NO_ENTRIES: [Entry; ENTRIES] = [NONE; ENTRIES];

const NONE: Entry = Entry { read: EMPTY, write: EMPTY, exec: EMPTY, addend: 0 };

/// What the fast path does not need.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Info {
    /// Guest-physical page.
    pub page: u64,
    pub global: bool,
    /// Part of a page larger than 4 KiB.
    pub large: bool,
}

/// Both tables.
pub(crate) struct Tlb {
    pub entries: Box<[Entry; 2 * ENTRIES]>,
    pub info: Box<[Info; 2 * ENTRIES]>,
    /// Entries that a write of CR3 removes.
    local: Vec<u16>,
    /// Which GiB large pages were mapped in, as bits of [`gigabyte`].
    large: u64,
}

/// Index of the entry for an address.
#[inline(always)]
pub(crate) fn index(address: u64, user: usize) -> usize {
    (address >> 12) as usize % ENTRIES + user * ENTRIES
}

/// A bit for the GiB that an address is in; others share it.
fn gigabyte(address: u64) -> u64 {
    1 << (address >> 30 & 63)
}

impl Tlb {
    pub fn new() -> Self {
        Self {
            entries: Box::new([NONE; 2 * ENTRIES]),
            info: Box::new([Info::default(); 2 * ENTRIES]),
            local: Vec::with_capacity(2 * ENTRIES),
            large: 0,
        }
    }

    /// Installs a translation.
    pub fn fill(&mut self, at: usize, entry: Entry, info: Info) {
        self.entries[at] = entry;
        self.info[at] = info;
        if info.large {
            self.large |= gigabyte(entry.read);
        }
        if !info.global {
            if self.local.len() == self.local.capacity() {
                // Only repeated fills of the same entries come here; the list is a superset anyway.
                self.local.sort_unstable();
                self.local.dedup();
                if self.local.len() * 2 > self.local.capacity() {
                    self.flush_local();
                    self.entries[at] = entry;
                }
            }
            self.local.push(at as u16);
        }
    }

    /// Removes all translations that are not global.
    pub fn flush_local(&mut self) {
        for &at in &self.local {
            if !self.info[usize::from(at)].global {
                self.entries[usize::from(at)] = NONE;
            }
        }
        self.local.clear();
    }

    /// Removes all translations.
    pub fn flush_all(&mut self) {
        self.entries.fill(NONE);
        self.local.clear();
        self.large = 0;
    }

    /// Removes the translations of one address (and, if the page may be a large one, all large ones).
    pub fn flush_address(&mut self, address: u64) {
        self.entries[index(address, 0)] = NONE;
        self.entries[index(address, 1)] = NONE;
        if self.large & gigabyte(address) != 0 {
            for (entry, info) in self.entries.iter_mut().zip(self.info.iter()) {
                if info.large && entry.read != EMPTY && (entry.read ^ address) >> 30 == 0 {
                    *entry = NONE;
                }
            }
        }
    }

    /// Makes all writes look at the page's metadata again.
    pub fn forget_writes(&mut self) {
        for entry in self.entries.iter_mut() {
            slow_write(entry);
        }
    }

    /// The same for one guest-physical page.
    pub fn forget_writes_to(&mut self, page: u64) {
        for (entry, info) in self.entries.iter_mut().zip(self.info.iter()) {
            if info.page == page {
                slow_write(entry);
            }
        }
    }
}

fn slow_write(entry: &mut Entry) {
    if entry.write & !PAGE == 0 {
        entry.write |= SLOW;
    }
}

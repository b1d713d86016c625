//! Where things lie in the guest's physical address space.
//!
//! ```text
//! 0x0000_0000  RAM: boot structures
//! 0x000e_0000  ACPI tables, VM generation ID (128 KiB)
//! 0x0010_0000  RAM, up to 3 GiB
//! 0xc000_0000  PCI memory window (512 MiB)
//! 0xe000_0000  PCI configuration (ECAM)
//! 0xfeb0_0000  virtio-mmio devices, 4 KiB each
//! 0xfec0_0000  IO-APIC, local APICs
//! 0x1_0000_0000  the rest of RAM
//! above RAM    64-bit PCI memory window (at a multiple of 64 GiB)
//! ```
//!
//! With firmware, which has the memory below 1 MiB for itself and places BARs below 0xfec0_0000, ACPI tables and VM
//! generation ID are at the end of the RAM below 4 GiB, and the PCI memory window is 0xe010_0000 to 0xfec0_0000.

use std::ops::Range;

use super::VmError;
use super::config::{MemoryConfig, PageConfig};
use crate::acpi::NumaNode;
use crate::boot::{MemoryKind, MemoryMapEntry};
use crate::memory::{Backing, GuestMemory, MemoryRegion, PAGE_SIZE, RegionOptions};
use crate::pci::ECAM_SIZE;

/// End of conventional memory; the last KiB below 640 KiB belongs to firmware.
const CONVENTIONAL_END: u64 = 0x9_fc00;
/// Where tables go without firmware, within the area that guests search for ACPI's.
const TABLE_AREA: Range<u64> = 0xe_0000..0x10_0000;
/// Bytes of the tables with firmware: beyond the first MiB there is room for those of any machine.
const FIRMWARE_TABLES: u64 = 256 << 10;
const HIGH_RAM: u64 = 0x10_0000;
/// RAM below 4 GiB ends here at the latest.
const LOW_RAM_END: u64 = 0xc000_0000;
const FOUR_GIB: u64 = 1 << 32;
const PCI_MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
pub(super) const PCI_ECAM: Range<u64> = 0xe000_0000..0xe000_0000 + ECAM_SIZE;
pub(super) const PCI_IO: Range<u64> = 0x1000..0x1_0000;
const PCI_MMIO64_ALIGN: u64 = 64 << 30;
/// SeaBIOS places BARs from here downwards, below the IO-APIC.
const FIRMWARE_PCI_END: u64 = 0xfec0_0000;
/// GSIs of the PCI interrupt lines.
pub(super) const PCI_INTX: [u32; 4] = [16, 17, 18, 19];

/// Register pages of virtio-mmio devices, and the interrupt inputs that are free for them.
pub(super) const VIRTIO_MMIO: u64 = 0xfeb0_0000;
pub(super) const VIRTIO_MMIO_GSIS: [u32; 12] = [20, 21, 22, 23, 16, 17, 18, 19, 5, 10, 11, 12];

/// The smallest guest: boot structures, and a MiB above them.
const MIN_SIZE: u64 = 2 << 20;
/// Guest-physical addresses of at most 45 bits, the 64-bit PCI window included.
const MAX_SIZE: u64 = 1 << 44;

/// The window for large BARs, above all RAM.
pub(super) fn pci_mmio64(memory: &GuestMemory) -> Range<u64> {
    let end = memory.regions().last().map_or(0, MemoryRegion::end).max(FOUR_GIB);
    let start = end.next_multiple_of(PCI_MMIO64_ALIGN);
    start..start + PCI_MMIO64_ALIGN
}

/// What firmware makes different.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Places {
    /// Where ACPI tables go.
    pub(super) acpi: Range<u64>,
    /// The page of the VM generation ID.
    pub(super) generation_id: u64,
    /// The PCI memory window below 4 GiB.
    pub(super) pci_mmio32: Range<u64>,
}

impl Places {
    /// The places in a machine with this RAM, with or without firmware.
    pub(super) fn of(memory: &GuestMemory, firmware: bool) -> Self {
        let (tables, pci_mmio32) = if firmware {
            let end = low_ram_end(memory);
            (end.saturating_sub(FIRMWARE_TABLES)..end, PCI_ECAM.end..FIRMWARE_PCI_END)
        } else {
            (TABLE_AREA, PCI_MMIO32)
        };
        let generation_id = tables.end - PAGE_SIZE;
        Self { acpi: tables.start..generation_id, generation_id, pci_mmio32 }
    }

    fn tables(&self) -> Range<u64> {
        self.acpi.start..self.generation_id + PAGE_SIZE
    }
}

/// End of the RAM below 4 GiB.
fn low_ram_end(memory: &GuestMemory) -> u64 {
    let ends = memory.regions().iter().map(MemoryRegion::end);
    ends.filter(|&end| end <= LOW_RAM_END).max().unwrap_or(0)
}

/// Splits `[start, start + size)` of a RAM that is contiguous to its owner around the hole below 4 GiB.
fn place(start: u64, size: u64) -> Vec<Range<u64>> {
    let end = start + size;
    let mut ranges = Vec::new();
    if start < LOW_RAM_END {
        ranges.push(start..end.min(LOW_RAM_END));
    }
    if end > LOW_RAM_END {
        let shift = FOUR_GIB - LOW_RAM_END;
        ranges.push(start.max(LOW_RAM_END) + shift..end + shift);
    }
    ranges
}

/// Allocates guest RAM, and says which of it belongs to which NUMA node.
pub(super) fn allocate(config: &MemoryConfig, cpus: u32) -> Result<(GuestMemory, Vec<NumaNode>), VmError> {
    let size = config.size;
    if !(MIN_SIZE..=MAX_SIZE).contains(&size) || !size.is_multiple_of(PAGE_SIZE) {
        return Err(VmError::Config(format!(
            "memory of {size} bytes; give a multiple of 4096 between 2 MiB and 16 TiB"
        )));
    }
    let most = host_memory();
    if size > most {
        return Err(VmError::Config(format!(
            "memory of {} MiB; this host has {} MiB, give the guest less",
            size >> 20,
            most >> 20
        )));
    }
    let options = RegionOptions {
        backing: match config.pages {
            PageConfig::Normal => Backing::Normal,
            PageConfig::Transparent => Backing::TransparentHuge,
            PageConfig::Huge2m => Backing::Huge2M,
            PageConfig::Huge1g => Backing::Huge1G,
        },
        prefault: config.prefault,
        host_node: config.host_node,
    };
    let mut regions = Vec::new();
    let mut nodes = Vec::new();
    if config.numa.is_empty() {
        for range in place(0, size) {
            regions.push(MemoryRegion::allocate(range.start, range.end - range.start, &options)?);
        }
    } else {
        check_numa(config, cpus)?;
        let mut start = 0;
        for node in &config.numa {
            let options = RegionOptions { host_node: node.host_node.or(config.host_node), ..options.clone() };
            let memory = place(start, node.size);
            for range in &memory {
                regions.push(MemoryRegion::allocate(range.start, range.end - range.start, &options)?);
            }
            nodes.push(NumaNode { cpus: node.cpus.clone(), memory, distances: node.distances.clone() });
            start += node.size;
        }
    }
    Ok((GuestMemory::new(regions)?, nodes))
}

/// What the host has in all, swap space included: a guest that is larger could never use what it was told it has.
fn host_memory() -> u64 {
    // SAFETY: an all-zero structure is valid, and the call fills it.
    let info = unsafe {
        let mut info: libc::sysinfo = std::mem::zeroed();
        libc::sysinfo(&mut info);
        info
    };
    info.totalram.saturating_add(info.totalswap).saturating_mul(u64::from(info.mem_unit))
}

fn check_numa(config: &MemoryConfig, cpus: u32) -> Result<(), VmError> {
    let fail = |what: String| Err(VmError::Config(what));
    let count = config.numa.len();
    let total = config.numa.iter().try_fold(0u64, |sum, n| sum.checked_add(n.size));
    if total != Some(config.size) || config.numa.iter().any(|n| n.size == 0 || n.size % PAGE_SIZE != 0) {
        return fail("NUMA nodes whose sizes do not add up to the memory; correct their sizes".into());
    }
    let mut assigned: Vec<u32> = config.numa.iter().flat_map(|n| n.cpus.iter().copied()).collect();
    assigned.sort_unstable();
    if !assigned.iter().copied().eq(0..cpus) {
        return fail("NUMA nodes that do not have each vCPU once; correct their vCPUs".into());
    }
    let bad_distance = |(at, n): (usize, &super::config::NumaConfig)| {
        !n.distances.is_empty() && (n.distances.len() != count || n.distances[at] != 10)
    };
    if config.numa.iter().enumerate().any(bad_distance) {
        return fail("NUMA distances that are not one for each node with 10 for itself; correct them".into());
    }
    Ok(())
}

/// RAM from `start` on; adjacent regions (NUMA nodes) are one range.
fn ram(memory: &GuestMemory, start: u64) -> Vec<Range<u64>> {
    let mut ram: Vec<Range<u64>> = Vec::new();
    for region in memory.regions() {
        let start = region.guest_address().max(start);
        match ram.last_mut() {
            _ if region.end() <= start => {}
            Some(last) if last.end == start => last.end = region.end(),
            _ => ram.push(start..region.end()),
        }
    }
    ram
}

fn entry(range: Range<u64>, kind: MemoryKind) -> MemoryMapEntry {
    MemoryMapEntry { address: range.start, size: range.end - range.start, kind }
}

/// The memory map that a kernel is told.
pub(super) fn memory_map(memory: &GuestMemory) -> Vec<MemoryMapEntry> {
    let mut map = vec![
        entry(0..CONVENTIONAL_END, MemoryKind::Ram),
        entry(CONVENTIONAL_END..HIGH_RAM, MemoryKind::Reserved),
    ];
    map.extend(ram(memory, HIGH_RAM).into_iter().map(|range| entry(range, MemoryKind::Ram)));
    map.push(entry(PCI_ECAM, MemoryKind::Reserved));
    map
}

/// The memory map that firmware is told. What it keeps of the first MiB is its own choice.
pub(super) fn firmware_memory_map(memory: &GuestMemory, places: &Places) -> Vec<MemoryMapEntry> {
    let tables = places.tables();
    let mut map = Vec::new();
    for range in ram(memory, 0) {
        if range.contains(&tables.start) {
            map.push(entry(range.start..tables.start, MemoryKind::Ram));
            map.push(entry(tables.clone(), MemoryKind::Reserved));
        } else {
            map.push(entry(range, MemoryKind::Ram));
        }
    }
    map.push(entry(PCI_ECAM, MemoryKind::Reserved));
    map
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of address ranges")]
mod tests {
    use super::super::config::NumaConfig;
    use super::*;

    #[test]
    fn ram_is_split_around_the_hole() {
        assert_eq!(place(0, 1 << 30), [0..1 << 30]);
        assert_eq!(place(0, 4 << 30), [0..LOW_RAM_END, FOUR_GIB..5 << 30]);
        assert_eq!(place(5 << 30, 1 << 30), [6 << 30..7 << 30]);
    }

    #[test]
    fn numa_nodes_must_fit_the_machine() {
        let node = |cpus: &[u32], size| NumaConfig { cpus: cpus.to_vec(), size, ..NumaConfig::default() };
        let config = |numa: Vec<NumaConfig>| MemoryConfig { size: 8 << 20, numa, ..MemoryConfig::default() };
        let good = config(vec![node(&[0], 6 << 20), node(&[1], 2 << 20)]);
        let (memory, nodes) = allocate(&good, 2).unwrap();
        assert_eq!(memory.total_size(), 8 << 20);
        assert_eq!(nodes[1].memory, [6 << 20..8 << 20]);
        let map = memory_map(&memory);
        assert_eq!(map[2].size, 7 << 20, "adjacent nodes are one range");
        for bad in [
            config(vec![node(&[0, 1], 6 << 20)]),
            config(vec![node(&[0], 6 << 20), node(&[0], 2 << 20)]),
            config(vec![node(&[0], 6 << 20), node(&[1, 2], 2 << 20)]),
            MemoryConfig { size: (4 << 20) + 1, ..MemoryConfig::default() },
            MemoryConfig { size: 0, ..MemoryConfig::default() },
        ] {
            assert!(matches!(allocate(&bad, 2), Err(VmError::Config(_))), "{bad:?}");
        }
    }

    #[test]
    fn firmware_has_the_first_mib_and_finds_the_tables_reserved() {
        let node = |size| NumaConfig { cpus: vec![0], size, ..NumaConfig::default() };
        for size in [64 << 20, 5 << 30] {
            let config = MemoryConfig { size, numa: vec![node(size)], ..MemoryConfig::default() };
            let (memory, _) = allocate(&config, 1).unwrap();
            let places = Places::of(&memory, true);
            let low_end = size.min(LOW_RAM_END);
            assert_eq!(places.tables(), low_end - FIRMWARE_TABLES..low_end);
            let map = firmware_memory_map(&memory, &places);
            assert_eq!(map[0], entry(0..places.acpi.start, MemoryKind::Ram));
            assert_eq!(map[1], entry(places.tables(), MemoryKind::Reserved));
            let ram = |e: &&MemoryMapEntry| e.kind == MemoryKind::Ram;
            let total: u64 = map.iter().filter(ram).map(|e| e.size).sum();
            assert_eq!(total + FIRMWARE_TABLES, size);
            assert_eq!(Places::of(&memory, false).tables(), TABLE_AREA);
        }
    }
}

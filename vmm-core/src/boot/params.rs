//! The structures that tell a guest where it is: `hvm_start_info`, Linux's `boot_params`, page tables and a GDT.

use zerocopy::{Immutable, IntoBytes};

use super::{BootError, BootSource, Entry, EntryMode, KernelEntry, Loaded, MAX_COMMAND_LINE};
use crate::memory::{AccessError, GuestMemory};

// Where the boot structures lie, below 0x30000 in the first 640 KiB.
const GDT: u64 = 0x500;
const STACK_TOP: u64 = 0x5ff0;
const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6080;
const LOADER_NAME: u64 = 0x60c0;
const MEMORY_MAP: u64 = 0x6100;
const BOOT_PARAMS: u64 = 0x7000;
/// PML4, PDPT and four page directories.
const PAGE_TABLES: u64 = 0x9000;
const COMMAND_LINE: u64 = 0x2_0000;

/// `boot_params` holds at most this many entries of the memory map.
const E820_MAX: usize = 128;

/// The GDT at entry: null, an unused entry, flat code at selector 0x10, flat data at 0x18, a task state at 0x20. Code is 64-bit
/// or 32-bit by the descriptor cache that the vCPU starts with; this one is for [`EntryMode::Long`].
pub const BOOT_GDT: [u64; 5] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];

/// Code descriptor at selector 0x10 for [`EntryMode::Protected`].
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;

/// What a range of guest-physical addresses is (ACPI address range types).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// RAM that the guest may use.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
    /// ACPI tables, usable after the guest has read them.
    Acpi = 3,
    /// To be preserved across sleep.
    Nvs = 4,
}

/// A range of the guest's physical memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryMapEntry {
    /// First address.
    pub address: u64,
    /// Length in bytes.
    pub size: u64,
    /// What it is.
    pub kind: MemoryKind,
}

/// `struct hvm_start_info` of the PVH boot ABI, version 1.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    nr_modules: u32,
    modlist: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

const START_INFO_MAGIC: u32 = 0x336e_c578;

/// `struct hvm_modlist_entry`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Module {
    address: u64,
    size: u64,
    command_line: u64,
    reserved: u64,
}

/// `struct hvm_memmap_table_entry`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// What a Multiboot kernel finds in EAX.
const MULTIBOOT_MAGIC: u64 = 0x2bad_b002;
/// Memory sizes, command line, modules, memory map, name of the boot loader.
const MULTIBOOT_FLAGS: u32 = 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;

/// The Multiboot information, up to the fields that are absent here.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MultibootInfo {
    flags: u32,
    /// RAM below 640 KiB and above 1 MiB (up to the first hole), in KiB.
    memory_lower: u32,
    memory_upper: u32,
    boot_device: u32,
    command_line: u32,
    modules: u32,
    module_list: u32,
    symbols: [u32; 4],
    map_length: u32,
    map_address: u32,
    drives: [u32; 2],
    config_table: u32,
    loader_name: u32,
}

/// An entry of the Multiboot memory map.
#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct MultibootMapEntry {
    /// Bytes of the entry behind this field.
    size: u32,
    address: u64,
    length: u64,
    kind: u32,
}

/// An entry of the Multiboot module list.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MultibootModule {
    start: u32,
    end: u32,
    string: u32,
    reserved: u32,
}

/// Writes the Multiboot information.
fn write_multiboot(
    memory: &GuestMemory,
    map: &[MemoryMapEntry],
    initrd: Option<(u64, u64)>,
) -> Result<(), AccessError> {
    for (entry, at) in map.iter().zip((MEMORY_MAP..).step_by(size_of::<MultibootMapEntry>())) {
        let (address, length, kind) = (entry.address, entry.size, entry.kind as u32);
        memory.write_obj(at, &MultibootMapEntry { size: 20, address, length, kind })?;
    }
    if let Some((address, size)) = initrd {
        // `Loaded::initrd_limit` of these kernels is below 4 GiB.
        let (start, end) = (address as u32, (address + size) as u32);
        memory
            .write_obj(MODULES, &MultibootModule { start, end, string: LOADER_NAME as u32, reserved: 0 })?;
    }
    memory.write(LOADER_NAME, b"nacre\0")?;
    let ram_at = |address: u64| {
        let entry = map
            .iter()
            .find(|e| e.kind == MemoryKind::Ram && e.address <= address && address - e.address < e.size);
        entry.map_or(0, |e| (e.size - (address - e.address)) >> 10).min(u64::from(u32::MAX)) as u32
    };
    let info = MultibootInfo {
        flags: MULTIBOOT_FLAGS,
        memory_lower: ram_at(0),
        memory_upper: ram_at(super::HIGH_RAM),
        boot_device: 0,
        command_line: COMMAND_LINE as u32,
        modules: initrd.is_some().into(),
        module_list: MODULES as u32,
        symbols: [0; 4],
        map_length: (map.len() * size_of::<MultibootMapEntry>()) as u32,
        map_address: MEMORY_MAP as u32,
        drives: [0; 2],
        config_table: 0,
        loader_name: LOADER_NAME as u32,
    };
    memory.write_obj(START_INFO, &info)
}

/// Writes the boot structures for a loaded kernel and says how the vCPU starts.
pub(super) fn finish(
    memory: &GuestMemory,
    source: &BootSource<'_>,
    loaded: &Loaded,
    initrd: Option<(u64, u64)>,
) -> Result<Entry, BootError> {
    let line = source.command_line.as_bytes();
    let max = loaded.command_line_max.min(MAX_COMMAND_LINE);
    if line.len() > max || line.contains(&0) {
        return Err(BootError::CommandLine { len: line.len(), max });
    }
    memory.write(COMMAND_LINE, line)?;
    memory.write(COMMAND_LINE + line.len() as u64, &[0])?;

    let map = &source.memory_map[..source.memory_map.len().min(E820_MAX)];
    for (entry, at) in map.iter().zip((MEMORY_MAP..).step_by(size_of::<MapEntry>())) {
        let entry =
            MapEntry { address: entry.address, size: entry.size, kind: entry.kind as u32, reserved: 0 };
        memory.write_obj(at, &entry)?;
    }
    if let Some((address, size)) = initrd {
        memory.write_obj(MODULES, &Module { address, size, command_line: 0, reserved: 0 })?;
    }
    let info = StartInfo {
        magic: START_INFO_MAGIC,
        version: 1,
        flags: 0,
        nr_modules: initrd.is_some().into(),
        modlist: if initrd.is_some() { MODULES } else { 0 },
        command_line: COMMAND_LINE,
        rsdp: source.rsdp,
        memory_map: MEMORY_MAP,
        memory_map_entries: map.len() as u32,
        reserved: 0,
    };
    memory.write_obj(START_INFO, &info)?;

    let mut gdt = BOOT_GDT;
    let mut rax = 0;
    let (mode, rip, rbx, rdi, rsi) = match loaded.entry {
        KernelEntry::Multiboot(rip) => {
            gdt[2] = CODE_32;
            write_multiboot(memory, map, initrd)?;
            rax = MULTIBOOT_MAGIC;
            (EntryMode::Protected, rip, START_INFO, 0, 0)
        }
        KernelEntry::Pvh(rip) => {
            gdt[2] = CODE_32;
            (EntryMode::Protected, rip, START_INFO, 0, 0)
        }
        KernelEntry::Long(rip) => {
            write_page_tables(memory)?;
            write_boot_params(memory, source, &loaded.setup_header, initrd, map)?;
            (EntryMode::Long { page_tables: PAGE_TABLES }, rip, 0, START_INFO, BOOT_PARAMS)
        }
    };
    memory.write_obj(GDT, &gdt)?;
    Ok(Entry { mode, rip, rax, rbx, rdi, rsi, rsp: STACK_TOP, gdt: GDT })
}

/// Maps the first 4 GiB one to one with 2 MiB pages.
fn write_page_tables(memory: &GuestMemory) -> Result<(), AccessError> {
    const PRESENT_WRITE: u64 = 3;
    const PAGE_SIZE_2M: u64 = 1 << 7;
    let pdpt = PAGE_TABLES + 0x1000;
    memory.fill(PAGE_TABLES, 0x2000, 0)?;
    memory.write_obj(PAGE_TABLES, &(pdpt | PRESENT_WRITE))?;
    for gib in 0..4u64 {
        let directory = pdpt + 0x1000 * (gib + 1);
        memory.write_obj(pdpt + gib * 8, &(directory | PRESENT_WRITE))?;
        let entries: [u64; 512] =
            std::array::from_fn(|i| (gib << 30) | (i as u64) << 21 | PRESENT_WRITE | PAGE_SIZE_2M);
        memory.write_obj(directory, &entries)?;
    }
    Ok(())
}

/// Writes Linux's `boot_params` (the kernel's Documentation/arch/x86/zero-page.rst).
fn write_boot_params(
    memory: &GuestMemory,
    source: &BootSource<'_>,
    setup_header: &[u8],
    initrd: Option<(u64, u64)>,
    map: &[MemoryMapEntry],
) -> Result<(), AccessError> {
    let mut page = [0u8; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, setup_header);
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x210, &[0xff]); // type_of_loader: none that is registered
    put(0x228, &(COMMAND_LINE as u32).to_le_bytes());
    if let Some((address, size)) = initrd {
        put(0x218, &(address as u32).to_le_bytes());
        put(0x21c, &(size as u32).to_le_bytes());
        put(0x0c0, &((address >> 32) as u32).to_le_bytes());
        put(0x0c4, &((size >> 32) as u32).to_le_bytes());
    }
    put(0x070, &source.rsdp.to_le_bytes());
    put(0x1e8, &[map.len() as u8]);
    for (entry, at) in map.iter().zip((0x2d0..).step_by(20)) {
        put(at, &entry.address.to_le_bytes());
        put(at + 8, &entry.size.to_le_bytes());
        put(at + 16, &(entry.kind as u32).to_le_bytes());
    }
    memory.write(BOOT_PARAMS, &page)
}

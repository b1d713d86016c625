//! Multiboot kernels (the Multiboot Specification, version 0.6.96): test guests and small kernels.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::elf::{self, Identity, PT_LOAD, Segment, Tables, read_struct};
use super::image::Image;
use super::{BootError, KernelEntry, Loaded, MAX_COMMAND_LINE};
use crate::memory::GuestMemory;

/// Bytes of the file that the header lies in.
const SEARCHED: u64 = 8192;
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// What a kernel must get: page-aligned modules and memory information, which every kernel gets here.
const KNOWN_REQUIREMENTS: u32 = 3;
const ALL_REQUIREMENTS: u32 = 0xffff;
/// The header says where the file is loaded to.
const HAS_ADDRESSES: u32 = 1 << 16;

/// The header's fixed part and the addresses behind it.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
struct Header {
    magic: u32,
    flags: u32,
    checksum: u32,
    header_address: u32,
    load_address: u32,
    load_end: u32,
    bss_end: u32,
    entry: u32,
}

/// `Elf32_Ehdr`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ElfHeader {
    identity: Identity,
    entry: u32,
    phoff: u32,
    shoff: u32,
    tables: Tables,
}

/// `Elf32_Phdr`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ElfSegment {
    kind: u32,
    offset: u32,
    vaddr: u32,
    paddr: u32,
    filesz: u32,
    memsz: u32,
    flags: u32,
    align: u32,
}

const ET_EXEC: u16 = 2;
const EM_386: u16 = 3;

/// The header and its offset, if the file has one.
fn find(
    image: &Image<'_>,
    io: &dyn Fn(std::io::Error) -> BootError,
) -> Result<Option<(Header, u64)>, BootError> {
    let mut head = vec![0; SEARCHED.min(image.len()) as usize];
    image.read_at(0, &mut head).map_err(io)?;
    // The address fields may be missing at the end of a short file.
    head.resize(head.len() + size_of::<Header>(), 0);
    let header = (0..head.len() - size_of::<Header>()).step_by(4).find_map(|at| {
        let (header, _) = Header::read_from_prefix(&head[at..]).ok()?;
        let sum = header.magic.wrapping_add(header.flags).wrapping_add(header.checksum);
        (header.magic == HEADER_MAGIC && sum == 0).then_some((header, at as u64))
    });
    Ok(header)
}

/// Loads the kernel if it is one.
pub(super) fn load(
    memory: &GuestMemory,
    image: &Image<'_>,
    io: &dyn Fn(std::io::Error) -> BootError,
) -> Result<Option<Loaded>, BootError> {
    let Some((header, at)) = find(image, io)? else { return Ok(None) };
    if header.flags & ALL_REQUIREMENTS & !KNOWN_REQUIREMENTS != 0 {
        return Err(BootError::Unsupported("its Multiboot header requires a video mode or more"));
    }
    let segments = if header.flags & HAS_ADDRESSES != 0 {
        vec![flat_segment(&header, at, image.len())?]
    } else {
        elf_segments(image, io)?
    };
    let mut end = 0;
    for segment in &segments {
        end = end.max(elf::load_segment(memory, image, segment, io)?);
    }
    let entry = if header.flags & HAS_ADDRESSES != 0 {
        header.entry
    } else {
        read_struct::<ElfHeader>(image, 0, "the ELF header", io)?.entry
    };
    let inside = |s: &Segment| (s.paddr..s.paddr + s.memsz).contains(&u64::from(entry));
    if !segments.iter().any(inside) {
        return Err(BootError::Malformed("the entry point lies outside of the loaded segments"));
    }
    Ok(Some(Loaded {
        entry: KernelEntry::Multiboot(entry.into()),
        end,
        initrd_limit: u64::from(u32::MAX),
        command_line_max: MAX_COMMAND_LINE,
        setup_header: Vec::new(),
    }))
}

/// The one segment of a file whose header at offset `at` has addresses.
fn flat_segment(header: &Header, at: u64, len: u64) -> Result<Segment, BootError> {
    let malformed = BootError::Malformed("its Multiboot addresses contradict each other");
    let before = header.header_address.checked_sub(header.load_address).map(u64::from);
    let Some(offset) = before.and_then(|before| at.checked_sub(before)) else { return Err(malformed) };
    let size = match header.load_end {
        0 => Some(len - offset),
        end => end.checked_sub(header.load_address).map(u64::from),
    };
    let Some(filesz) = size else { return Err(malformed) };
    let bss = u64::from(header.bss_end).saturating_sub(header.load_address.into());
    Ok(Segment::loaded(offset, header.load_address.into(), filesz, bss.max(filesz)))
}

/// The segments of a 32-bit ELF file.
fn elf_segments(
    image: &Image<'_>,
    io: &dyn Fn(std::io::Error) -> BootError,
) -> Result<Vec<Segment>, BootError> {
    let header: ElfHeader = read_struct(image, 0, "the ELF header", io)?;
    let Identity { ident, kind, machine, .. } = header.identity;
    if ident[..6] != *b"\x7fELF\x01\x01" || machine != EM_386 || kind != ET_EXEC {
        return Err(BootError::Unsupported("a Multiboot kernel must be a 32-bit x86 ELF executable"));
    }
    let Tables { phentsize, phnum, .. } = header.tables;
    if usize::from(phentsize) != size_of::<ElfSegment>() || phnum > elf::MAX_SEGMENTS {
        return Err(BootError::Malformed("odd ELF program headers"));
    }
    let mut segments = Vec::new();
    for i in 0..u64::from(phnum) {
        let at = u64::from(header.phoff) + i * size_of::<ElfSegment>() as u64;
        let s: ElfSegment = read_struct(image, at, "an ELF program header", io)?;
        if s.kind == PT_LOAD && s.memsz > 0 {
            segments.push(Segment::loaded(s.offset.into(), s.paddr.into(), s.filesz.into(), s.memsz.into()));
        }
    }
    if segments.is_empty() {
        return Err(BootError::Malformed("the ELF file has nothing to load"));
    }
    Ok(segments)
}

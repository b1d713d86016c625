//! ELF64 executables: Linux's vmlinux and freestanding guests.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::image::{CopyError, Image};
use super::{BootError, HIGH_RAM, KernelEntry, Loaded, MAX_COMMAND_LINE};
use crate::memory::GuestMemory;

/// The start of `Elf32_Ehdr` and `Elf64_Ehdr`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Identity {
    pub(super) ident: [u8; 16],
    pub(super) kind: u16,
    pub(super) machine: u16,
    version: u32,
}

/// The end of both.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Tables {
    flags: u32,
    ehsize: u16,
    pub(super) phentsize: u16,
    pub(super) phnum: u16,
    shentsize: u16,
    shnum: u16,
    shstrndx: u16,
}

/// `Elf64_Ehdr`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    identity: Identity,
    entry: u64,
    phoff: u64,
    shoff: u64,
    tables: Tables,
}

/// `Elf64_Phdr`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Segment {
    kind: u32,
    flags: u32,
    offset: u64,
    vaddr: u64,
    pub(super) paddr: u64,
    filesz: u64,
    pub(super) memsz: u64,
    align: u64,
}

impl Segment {
    /// A segment that is loaded to a physical address.
    pub(super) fn loaded(offset: u64, paddr: u64, filesz: u64, memsz: u64) -> Self {
        Self { kind: PT_LOAD, flags: 0, offset, vaddr: paddr, paddr, filesz, memsz, align: 1 }
    }
}

pub(super) const ELFCLASS64: u8 = 2;
const ELFDATA2LSB: u8 = 1;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;
pub(super) const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Note type whose value is the physical address of the PVH entry point.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// More program headers than any kernel has.
pub(super) const MAX_SEGMENTS: u16 = 64;
/// Note segments longer than this are not searched.
const MAX_NOTES: u64 = 1 << 20;

pub(super) fn read_struct<T: FromBytes + IntoBytes>(
    image: &Image<'_>,
    offset: u64,
    what: &'static str,
    io: &dyn Fn(std::io::Error) -> BootError,
) -> Result<T, BootError> {
    let need = offset.saturating_add(size_of::<T>() as u64);
    if need > image.len() {
        return Err(BootError::Truncated { what, need, have: image.len() });
    }
    let mut value = T::new_zeroed();
    image.read_at(offset, value.as_mut_bytes()).map_err(io)?;
    Ok(value)
}

pub(super) fn load(
    memory: &GuestMemory,
    image: &Image<'_>,
    io: &dyn Fn(std::io::Error) -> BootError,
) -> Result<Loaded, BootError> {
    let header: Header = read_struct(image, 0, "the ELF header", io)?;
    let Identity { ident, kind, machine, .. } = header.identity;
    if ident[4] != ELFCLASS64 || ident[5] != ELFDATA2LSB || machine != EM_X86_64 {
        return Err(BootError::Unsupported("the ELF file is not for x86-64"));
    }
    if kind != ET_EXEC && kind != ET_DYN {
        return Err(BootError::Unsupported("the ELF file is not an executable"));
    }
    let Tables { phentsize, phnum, .. } = header.tables;
    if usize::from(phentsize) != size_of::<Segment>() || phnum > MAX_SEGMENTS {
        return Err(BootError::Malformed("odd ELF program headers"));
    }
    let mut end = 0;
    let mut pvh = None;
    for i in 0..u64::from(phnum) {
        let offset = header
            .phoff
            .checked_add(i * size_of::<Segment>() as u64)
            .ok_or(BootError::Malformed("ELF program headers wrap around"))?;
        let segment: Segment = read_struct(image, offset, "an ELF program header", io)?;
        match segment.kind {
            PT_LOAD if segment.memsz > 0 => end = end.max(load_segment(memory, image, &segment, io)?),
            PT_NOTE if pvh.is_none() => pvh = pvh_entry(image, &segment, io)?,
            _ => {}
        }
    }
    if end == 0 {
        return Err(BootError::Malformed("the ELF file has nothing to load"));
    }
    let entry = match pvh {
        Some(address) => KernelEntry::Pvh(address),
        None => KernelEntry::Long(header.entry),
    };
    let rip = pvh.unwrap_or(header.entry);
    if !(HIGH_RAM..end).contains(&rip) {
        return Err(BootError::Malformed("the entry point lies outside of the loaded segments"));
    }
    Ok(Loaded {
        entry,
        end,
        initrd_limit: u64::from(u32::MAX),
        command_line_max: MAX_COMMAND_LINE,
        setup_header: Vec::new(),
    })
}

/// Loads one segment and returns its end.
pub(super) fn load_segment(
    memory: &GuestMemory,
    image: &Image<'_>,
    segment: &Segment,
    io: &dyn Fn(std::io::Error) -> BootError,
) -> Result<u64, BootError> {
    let need = segment.offset.saturating_add(segment.filesz);
    if need > image.len() {
        return Err(BootError::Truncated { what: "an ELF segment", need, have: image.len() });
    }
    if segment.filesz > segment.memsz {
        return Err(BootError::Malformed("an ELF segment is longer in the file than in memory"));
    }
    let (address, size) = (segment.paddr, segment.memsz);
    if address < HIGH_RAM || !memory.contains(address, size) {
        return Err(BootError::Segment { address, size });
    }
    image.copy_to(memory, segment.offset, segment.filesz, address).map_err(|e| match e {
        CopyError::Io(e) => io(e),
        CopyError::Memory(e) => e.into(),
    })?;
    memory.fill(address + segment.filesz, (size - segment.filesz) as usize, 0)?;
    Ok(address + size)
}

/// The PVH entry point, if a note of this segment names one.
fn pvh_entry(
    image: &Image<'_>,
    segment: &Segment,
    io: &dyn Fn(std::io::Error) -> BootError,
) -> Result<Option<u64>, BootError> {
    let need = segment.offset.saturating_add(segment.filesz);
    if need > image.len() {
        return Err(BootError::Truncated { what: "an ELF note", need, have: image.len() });
    }
    if segment.filesz > MAX_NOTES {
        return Ok(None);
    }
    let mut notes = vec![0; segment.filesz as usize];
    image.read_at(segment.offset, &mut notes).map_err(io)?;
    let mut rest = &notes[..];
    while let Some((header, body)) = rest.split_first_chunk::<12>() {
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (name_len, desc_len, kind) = (word(0) as usize, word(4) as usize, word(8));
        let Some((name, tail)) = split_padded(body, name_len) else { break };
        let Some((desc, tail)) = split_padded(tail, desc_len) else { break };
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" && desc.len() >= 4 {
            return Ok(Some(u64::from(u32::from_le_bytes([desc[0], desc[1], desc[2], desc[3]]))));
        }
        rest = tail;
    }
    Ok(None)
}

/// Splits off `len` bytes and their padding to a multiple of 4.
fn split_padded(bytes: &[u8], len: usize) -> Option<(&[u8], &[u8])> {
    let (head, _) = bytes.split_at_checked(len)?;
    let padded = len.checked_next_multiple_of(4)?.min(bytes.len());
    Some((head, &bytes[padded..]))
}

//! Kernel loaders: they place a kernel, its initrd and command line in guest RAM and say how the first vCPU starts.
//!
//! - bzImage: the payload is decompressed on the host and the ELF inside is entered through PVH. Where the payload's
//!   format is not known, the kernel is entered by the 64-bit boot protocol and decompresses itself.
//! - ELF with the PVH note (`XEN_ELFNOTE_PHYS32_ENTRY`): 32-bit protected mode, EBX holds `hvm_start_info`.
//! - A Multiboot kernel (a 32-bit ELF file, or any file whose header has addresses): 32-bit protected mode, EAX holds
//!   the boot loader's magic number and EBX the Multiboot information.
//! - ELF without that note: long mode with the first 4 GiB mapped one to one; RDI holds `hvm_start_info` and RSI a Linux
//!   `boot_params` page.
//! - A BIOS image ([`load_firmware`]): real mode, at its reset vector.

mod bzimage;
mod decompress;
mod elf;
mod firmware;
mod image;
mod multiboot;
mod params;

use std::fs::File;
use std::path::{Path, PathBuf};

pub use decompress::Compression;
pub use firmware::{MAX_FIRMWARE, load_firmware};
pub use params::{BOOT_GDT, MemoryKind, MemoryMapEntry};

use crate::memory::{AccessError, GuestMemory};
use image::Image;

/// First address that a kernel may be loaded to; the boot structures lie below.
pub const HIGH_RAM: u64 = 0x10_0000;

/// Longest command line in bytes, without its terminator.
pub const MAX_COMMAND_LINE: usize = 0xffff;

/// Why a guest cannot be booted from what was given.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file could not be read.
    #[error("Cannot read {what} {}; check the path and its permissions", path.display())]
    File {
        /// Which file.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// The file is of no format that can be booted.
    #[error("The kernel is neither a bzImage nor an ELF or Multiboot file; give an x86-64 Linux kernel")]
    NotAKernel,
    /// The file ends too early.
    #[error("The kernel is truncated: {what} needs {need} bytes, the file has {have}; copy it again")]
    Truncated {
        /// The part that is incomplete.
        what: &'static str,
        /// Length that the file should have.
        need: u64,
        /// Length of the file.
        have: u64,
    },
    /// The firmware is no BIOS image.
    #[error(
        "{} is no BIOS image (64 to 256 KiB that end in a reset vector); give one such as SeaBIOS's bios-256k.bin",
        path.display()
    )]
    Firmware {
        /// The file.
        path: PathBuf,
    },
    /// A kernel of a kind that cannot be booted.
    #[error("The kernel cannot be booted: {0}")]
    Unsupported(&'static str),
    /// A header field that contradicts itself or the file.
    #[error("The kernel is malformed: {0}")]
    Malformed(&'static str),
    /// The payload does not decompress.
    #[error("The kernel's {format} payload does not decompress; copy the file again")]
    Decompress {
        /// Compression format.
        format: Compression,
        /// The decoder's reason.
        #[source]
        source: std::io::Error,
    },
    /// Guest memory has no place for it.
    #[error("No room for the {what} ({size} bytes) in guest memory; give the guest more memory")]
    NoRoom {
        /// What is to be loaded.
        what: &'static str,
        /// Its size in bytes.
        size: u64,
    },
    /// A segment of the kernel lies outside of the guest's RAM.
    #[error(
        "The kernel's segment {address:#x}+{size:#x} is not in RAM above 1 MiB; give the guest more memory or link it elsewhere"
    )]
    Segment {
        /// Guest-physical address.
        address: u64,
        /// Size in bytes.
        size: u64,
    },
    /// The command line is too long or has a NUL byte.
    #[error("The command line has {len} bytes or a NUL byte; at most {max} bytes without NUL are possible")]
    CommandLine {
        /// Its length.
        len: usize,
        /// The longest possible.
        max: usize,
    },
    /// Boot structures did not fit where they belong.
    #[error("Guest memory is too small to boot; give the guest at least 2 MiB")]
    Memory(#[from] AccessError),
}

/// What is booted, and where the guest finds its surroundings.
pub struct BootSource<'a> {
    /// The kernel file.
    pub kernel: &'a Path,
    /// The initrd file.
    pub initrd: Option<&'a Path>,
    /// The command line.
    pub command_line: &'a str,
    /// Guest-physical address of the ACPI RSDP, or 0 for none.
    pub rsdp: u64,
    /// The guest's physical memory map.
    pub memory_map: &'a [MemoryMapEntry],
}

/// The CPU mode that a kernel is entered in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EntryMode {
    /// As after a reset, but with the code segment F000h at the end of the first MiB.
    #[default]
    Real,
    /// 32-bit protected mode without paging, flat segments (PVH and Multiboot).
    Protected,
    /// Long mode, CR3 set to page tables that map the first 4 GiB one to one.
    Long {
        /// Physical address of the page-map level 4.
        page_tables: u64,
    },
}

/// How the first vCPU starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// CPU mode.
    pub mode: EntryMode,
    /// Instruction pointer.
    pub rip: u64,
    /// RAX: the boot loader's magic number for Multiboot, otherwise 0.
    pub rax: u64,
    /// RBX: `hvm_start_info` or the Multiboot information for [`EntryMode::Protected`].
    pub rbx: u64,
    /// RDI: `hvm_start_info` for [`EntryMode::Long`].
    pub rdi: u64,
    /// RSI: the Linux `boot_params` page for [`EntryMode::Long`].
    pub rsi: u64,
    /// Stack pointer: a small stack below the boot structures.
    pub rsp: u64,
    /// Physical address of the GDT; [`BOOT_GDT`] is its content.
    pub gdt: u64,
}

/// A kernel that lies in guest RAM: what the boot structures must say about it.
struct Loaded {
    entry: KernelEntry,
    /// First address after the kernel, including memory that it uses before it reads the memory map.
    end: u64,
    /// Highest address at which the initrd may end.
    initrd_limit: u64,
    command_line_max: usize,
    /// The setup header of a bzImage (from offset 0x1f1), for `boot_params`.
    setup_header: Vec<u8>,
}

enum KernelEntry {
    Pvh(u64),
    Long(u64),
    Multiboot(u64),
}

/// Loads a kernel with its initrd and command line into guest RAM.
///
/// # Errors
/// Fails when a file cannot be read, is not a kernel or is damaged, or the guest's memory is too small.
pub fn load(memory: &GuestMemory, source: &BootSource<'_>) -> Result<Entry, BootError> {
    let (kernel, len) = open("kernel", source.kernel)?;
    let initrd = source.initrd.map(|path| open("initrd", path).map(|f| (f, path))).transpose()?;
    let kernel_error = |source_error| BootError::File {
        what: "kernel",
        path: source.kernel.to_owned(),
        source: source_error,
    };
    let loaded = load_kernel(memory, &Image::file(&kernel, len), &kernel_error)?;

    let initrd = match initrd {
        None => None,
        Some(((file, size), path)) => {
            let address = place_initrd(memory, &loaded, size)?;
            let image = Image::file(&file, size);
            image.copy_to(memory, 0, size, address).map_err(|e| e.into_boot("initrd", path))?;
            Some((address, size))
        }
    };
    params::finish(memory, source, &loaded, initrd)
}

/// Opens a regular file; returns it with its length.
fn open(what: &'static str, path: &Path) -> Result<(File, u64), BootError> {
    let fail = |source| BootError::File { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(fail)?;
    let meta = file.metadata().map_err(fail)?;
    if !meta.is_file() {
        return Err(fail(std::io::Error::other("not a regular file")));
    }
    Ok((file, meta.len()))
}

/// Loads the kernel proper; `io` makes an error of a failed read.
fn load_kernel(
    memory: &GuestMemory,
    image: &Image<'_>,
    io: &dyn Fn(std::io::Error) -> BootError,
) -> Result<Loaded, BootError> {
    let mut head = [0; 4];
    if image.len() < head.len() as u64 {
        return Err(BootError::NotAKernel);
    }
    image.read_at(0, &mut head).map_err(io)?;
    // A 64-bit ELF file is entered by PVH or in long mode, whatever else it offers.
    let elf = head == *b"\x7fELF";
    let mut class = [0; 1];
    if elf && image.len() > 4 {
        image.read_at(4, &mut class).map_err(io)?;
    }
    if class != [elf::ELFCLASS64]
        && let Some(loaded) = multiboot::load(memory, image, io)?
    {
        return Ok(loaded);
    }
    if elf { elf::load(memory, image, io) } else { bzimage::load(memory, image, io) }
}

/// The initrd goes as high as it can below the kernel's limit.
fn place_initrd(memory: &GuestMemory, loaded: &Loaded, size: u64) -> Result<u64, BootError> {
    let no_room = BootError::NoRoom { what: "initrd", size };
    let low_end = memory
        .regions()
        .iter()
        .find(|r| r.guest_address() <= HIGH_RAM && HIGH_RAM < r.end())
        .map_or(0, |r| r.end());
    let Some(address) = low_end.min(loaded.initrd_limit).checked_sub(size).map(|a| a & !0xfff) else {
        return Err(no_room);
    };
    if address < loaded.end.max(HIGH_RAM) { Err(no_room) } else { Ok(address) }
}

#[cfg(test)]
mod tests;

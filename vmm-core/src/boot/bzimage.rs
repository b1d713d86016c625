//! Linux bzImage files (the kernel's Documentation/arch/x86/boot.rst).

use super::image::{CopyError, Image};
use super::{BootError, HIGH_RAM, KernelEntry, Loaded, decompress, elf};
use crate::memory::GuestMemory;

/// Offset of the setup header in the file.
const SETUP_HEADER: usize = 0x1f1;
/// The part of the file that holds every field that is read here.
const HEAD: usize = 0x280;
/// `xloadflags`: the kernel has a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// Offset of the 64-bit entry point in the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
/// First boot protocol with `init_size` and `pref_address`.
const PROTOCOL_2_10: u16 = 0x20a;

struct SetupHeader<'a>(&'a [u8; HEAD]);

impl SetupHeader<'_> {
    fn u8(&self, at: usize) -> u8 {
        self.0[at]
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) | u64::from(self.u32(at + 4)) << 32
    }

    /// File offset of the protected-mode kernel: after the boot sector and the setup sectors.
    fn kernel_offset(&self) -> u64 {
        let sectors = match self.u8(0x1f1) {
            0 => 4,
            n => u64::from(n),
        };
        (sectors + 1) * 512
    }

    /// Size of the protected-mode kernel in bytes (`syssize` counts 16-byte paragraphs).
    fn kernel_size(&self) -> u64 {
        u64::from(self.u32(0x1f4)) * 16
    }

    /// The header as it is copied to `boot_params`: it ends where the jump at its start leads.
    fn bytes(&self) -> &[u8] {
        let end = (0x202 + usize::from(self.u8(0x201))).min(HEAD);
        &self.0[SETUP_HEADER..end]
    }
}

pub(super) fn load(
    memory: &GuestMemory,
    image: &Image<'_>,
    io: &dyn Fn(std::io::Error) -> BootError,
) -> Result<Loaded, BootError> {
    let mut head = [0; HEAD];
    let have = image.len();
    image.read_at(0, &mut head[..HEAD.min(have as usize)]).map_err(io)?;
    let header = SetupHeader(&head);
    if &head[0x202..0x206] != b"HdrS" || header.u16(0x1fe) != 0xaa55 {
        return Err(BootError::NotAKernel);
    }
    if header.u16(0x206) < PROTOCOL_2_10 {
        return Err(BootError::Unsupported("its boot protocol is older than 2.10"));
    }
    let (offset, size) = (header.kernel_offset(), header.kernel_size());
    let need = offset + size;
    if have < need {
        return Err(BootError::Truncated { what: "the protected-mode kernel", need, have });
    }

    let payload_offset = u64::from(header.u32(0x248));
    let payload_len = u64::from(header.u32(0x24c));
    if payload_offset + payload_len > size {
        return Err(BootError::Malformed("the payload is longer than the kernel"));
    }
    let mut payload = vec![0; payload_len as usize];
    image.read_at(offset + payload_offset, &mut payload).map_err(io)?;
    let command_line_max = header.u32(0x238) as usize;
    if let Some(elf_bytes) = decompress::decompress(&payload)? {
        drop(payload);
        let loaded = elf::load(memory, &Image::bytes(&elf_bytes), io)?;
        // A kernel without the PVH note needs the boot protocol: its own entry expects a relocated image.
        if matches!(loaded.entry, KernelEntry::Pvh(_)) {
            return Ok(Loaded { command_line_max, ..loaded });
        }
    }
    load_boot_protocol(memory, image, &header, io)
}

/// Loads the protected-mode kernel as it is; it will decompress itself.
fn load_boot_protocol(
    memory: &GuestMemory,
    image: &Image<'_>,
    header: &SetupHeader<'_>,
    io: &dyn Fn(std::io::Error) -> BootError,
) -> Result<Loaded, BootError> {
    if header.u16(0x236) & XLF_KERNEL_64 == 0 {
        return Err(BootError::Unsupported("it has neither a PVH nor a 64-bit entry point"));
    }
    let (offset, size) = (header.kernel_offset(), header.kernel_size());
    let address = header.u64(0x258);
    let room = u64::from(header.u32(0x260)).max(size);
    if address < HIGH_RAM || !memory.contains(address, room) {
        return Err(BootError::Segment { address, size: room });
    }
    if size <= ENTRY_64 {
        return Err(BootError::Malformed("the kernel ends before its entry point"));
    }
    image.copy_to(memory, offset, size, address).map_err(|e| match e {
        CopyError::Io(e) => io(e),
        CopyError::Memory(e) => e.into(),
    })?;
    Ok(Loaded {
        entry: KernelEntry::Long(address + ENTRY_64),
        end: address + room,
        initrd_limit: u64::from(header.u32(0x22c)) + 1,
        command_line_max: header.u32(0x238) as usize,
        setup_header: header.bytes().to_vec(),
    })
}

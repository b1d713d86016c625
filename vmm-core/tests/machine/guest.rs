//! Tiny guests: code made by the assembler library, in an ELF file with the PVH note.

use std::io::Write;

use iced_x86::code_asm::CodeAssembler;

/// Where guests are linked.
pub const BASE: u64 = 0x10_0000;

/// An ELF64 executable that is entered through PVH at the start of `code`.
fn elf(code: &[u8]) -> Vec<u8> {
    const CODE_OFFSET: u64 = 0x1000;
    let mut f = Vec::new();
    f.extend(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    f.extend(2u16.to_le_bytes());
    f.extend(62u16.to_le_bytes());
    f.extend(1u32.to_le_bytes());
    f.extend(BASE.to_le_bytes());
    f.extend(64u64.to_le_bytes());
    f.extend([0; 12]);
    for n in [64u16, 56, 2, 0, 0, 0] {
        f.extend(n.to_le_bytes());
    }
    let mut segment = |kind: u32, offset: u64, address: u64, filesz: u64, memsz: u64| {
        f.extend(kind.to_le_bytes());
        f.extend(7u32.to_le_bytes());
        for n in [offset, address, address, filesz, memsz, 4] {
            f.extend(n.to_le_bytes());
        }
    };
    let len = code.len() as u64;
    segment(1, CODE_OFFSET, BASE, len, len + 0x10000);
    segment(4, 0x200, 0, 20, 20);
    f.resize(0x200, 0);
    for n in [4u32, 4, 18] {
        f.extend(n.to_le_bytes());
    }
    f.extend(*b"Xen\0");
    f.extend((BASE as u32).to_le_bytes());
    f.resize(CODE_OFFSET as usize, 0);
    f.extend(code);
    f
}

/// A kernel file with the 32-bit code that `write` assembles.
pub fn kernel(
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> tempfile::NamedTempFile {
    let mut a = CodeAssembler::new(32).unwrap();
    write(&mut a).unwrap();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&elf(&a.assemble(BASE).unwrap())).unwrap();
    file
}

/// A 32-bit Multiboot ELF executable with the 32-bit code that `write` assembles.
pub fn multiboot_kernel(
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> tempfile::NamedTempFile {
    const CODE_OFFSET: u32 = 0x1000;
    let mut a = CodeAssembler::new(32).unwrap();
    write(&mut a).unwrap();
    let code = a.assemble(BASE).unwrap();
    let mut f = Vec::from(*b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0");
    let words = |f: &mut Vec<u8>, words: &[u32]| words.iter().for_each(|w| f.extend(w.to_le_bytes()));
    words(&mut f, &[2 | 3 << 16, 1, BASE as u32, 52, 0, 0, 52 | 32 << 16, 1, 0]);
    let len = code.len() as u32;
    words(&mut f, &[1, CODE_OFFSET, BASE as u32, BASE as u32, len, len + 0x1000, 7, 0x1000]);
    // The header: aligned modules and memory information, no addresses.
    let flags = 3u32;
    words(&mut f, &[0x1bad_b002, flags, 0u32.wrapping_sub(0x1bad_b002 + flags)]);
    f.resize(CODE_OFFSET as usize, 0);
    f.extend(code);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&f).unwrap();
    file
}

//! Freestanding guests, assembled here, for tests and benchmarks.

use iced_x86::code_asm::{CodeAssembler, al, dx, ecx};

/// Where the guests are linked to.
pub const ADDRESS: u64 = 0x20_0000;
/// Where their code is in the file.
pub const CODE_OFFSET: usize = 0x1000;
/// The PVH note: name `Xen`, type 18 (XEN_ELFNOTE_PHYS32_ENTRY), the entry point as the value.
const PVH_NOTE_TYPE: u32 = 18;

/// An ELF file with one loadable segment and the PVH note, both of whose entry points are the first byte of `code`
/// (32-bit through PVH, 64-bit through the ELF header).
pub fn elf(code: &[u8]) -> Vec<u8> {
    const HEADER: usize = 64;
    const SEGMENT: usize = 56;
    let note_at = HEADER + 2 * SEGMENT;
    let mut note = Vec::new();
    for word in [4, 4, PVH_NOTE_TYPE, u32::from_le_bytes(*b"Xen\0"), ADDRESS as u32] {
        note.extend(word.to_le_bytes());
    }
    // The segment's offset in the file agrees with its address modulo the page size.
    let mut file = Vec::from(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // Executable, x86-64, version 1.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend(ADDRESS.to_le_bytes());
    file.extend((HEADER as u64).to_le_bytes());
    file.extend(0u64.to_le_bytes());
    file.extend(0u32.to_le_bytes());
    for half in [HEADER, SEGMENT, 2, 0, 0, 0] {
        file.extend((half as u16).to_le_bytes());
    }
    let mut segment = |kind: u32, flags: u32, offset: usize, address: u64, size: usize, align: u64| {
        file.extend(kind.to_le_bytes());
        file.extend(flags.to_le_bytes());
        for word in [offset as u64, address, address, size as u64, size as u64, align] {
            file.extend(word.to_le_bytes());
        }
    };
    segment(1, 7, CODE_OFFSET, ADDRESS, code.len(), 0x1000);
    segment(4, 4, note_at, ADDRESS + 0x1000, note.len(), 4);
    file.extend(note);
    file.resize(CODE_OFFSET, 0);
    file.extend(code);
    file
}

/// A guest that writes `exits` bytes to a port where no device answers, then `A` to the first serial port. Its code
/// means the same in 32-bit and in 64-bit mode.
pub fn first_byte(exits: u32) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut assemble = || -> Result<Vec<u8>, iced_x86::IcedError> {
        if exits > 0 {
            let mut again = a.create_label();
            a.mov(ecx, exits)?;
            a.mov(dx, 0x2ff)?;
            a.set_label(&mut again)?;
            a.out(dx, al)?;
            a.sub(ecx, 1)?;
            a.jnz(again)?;
        }
        a.mov(dx, 0x3f8)?;
        a.mov(al, u32::from(b'A'))?;
        a.out(dx, al)?;
        let mut halt = a.create_label();
        a.set_label(&mut halt)?;
        a.hlt()?;
        a.jmp(halt)?;
        a.assemble(ADDRESS)
    };
    elf(&assemble().unwrap())
}

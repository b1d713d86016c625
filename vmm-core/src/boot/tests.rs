use std::io::Write;

use proptest::prelude::*;

use super::*;

const BASE: u64 = 0x20_0000;

/// A small ELF64 executable with one loaded segment of 0x200 bytes and 0x100 bytes of bss, and perhaps a PVH note.
fn elf_file(pvh: Option<u32>) -> Vec<u8> {
    let mut f = Vec::new();
    f.extend(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    f.extend(2u16.to_le_bytes());
    f.extend(62u16.to_le_bytes());
    f.extend(1u32.to_le_bytes());
    f.extend((BASE + 0x10).to_le_bytes()); // entry
    f.extend(64u64.to_le_bytes()); // phoff
    f.extend(0u64.to_le_bytes());
    f.extend(0u32.to_le_bytes());
    for n in [64u16, 56, 1 + u16::from(pvh.is_some()), 0, 0, 0] {
        f.extend(n.to_le_bytes());
    }
    let segment = |f: &mut Vec<u8>, kind: u32, offset: u64, address: u64, filesz: u64, memsz: u64| {
        f.extend(kind.to_le_bytes());
        f.extend(7u32.to_le_bytes());
        for n in [offset, address, address, filesz, memsz, 8] {
            f.extend(n.to_le_bytes());
        }
    };
    segment(&mut f, 1, 0x200, BASE, 0x200, 0x300);
    segment(&mut f, 4, 0x400, 0, 20, 20);
    f.resize(0x200, 0);
    f.resize(0x400, 0xa5);
    for n in [4u32, 4, 18] {
        f.extend(n.to_le_bytes());
    }
    f.extend(*b"Xen\0");
    f.extend(pvh.unwrap_or(0).to_le_bytes());
    f
}

/// A bzImage around `payload`.
fn bzimage_file(payload: &[u8]) -> Vec<u8> {
    let mut f = vec![0; 0x400];
    let kernel_size = (0x300 + payload.len()).next_multiple_of(16);
    f[0x1f1] = 1;
    f[0x1f4..0x1f8].copy_from_slice(&((kernel_size / 16) as u32).to_le_bytes());
    f[0x1fe..0x200].copy_from_slice(&0xaa55u16.to_le_bytes());
    f[0x201] = 0x6c;
    f[0x202..0x206].copy_from_slice(b"HdrS");
    f[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    f[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    f[0x236..0x238].copy_from_slice(&1u16.to_le_bytes());
    f[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    f[0x248..0x24c].copy_from_slice(&0x300u32.to_le_bytes());
    f[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    f[0x258..0x260].copy_from_slice(&BASE.to_le_bytes());
    f[0x260..0x264].copy_from_slice(&0x1000u32.to_le_bytes());
    f.resize(0x400 + 0x300, 0x90);
    f.extend(payload);
    f.resize(0x400 + kernel_size, 0);
    f
}

fn zstd_payload(data: &[u8]) -> Vec<u8> {
    let mut payload = zstd::encode_all(data, 1).unwrap();
    payload.extend((data.len() as u32).to_le_bytes());
    payload
}

fn temp(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn boot(kernel: &[u8], initrd: Option<&[u8]>, command_line: &str) -> Result<(GuestMemory, Entry), BootError> {
    let memory = GuestMemory::flat(8 << 20).unwrap();
    let kernel = temp(kernel);
    let initrd = initrd.map(temp);
    let map = [MemoryMapEntry { address: 0, size: 8 << 20, kind: MemoryKind::Ram }];
    let source = BootSource {
        kernel: kernel.path(),
        initrd: initrd.as_ref().map(|f| f.path()),
        command_line,
        rsdp: 0xe_0000,
        memory_map: &map,
    };
    load(&memory, &source).map(|entry| (memory, entry))
}

#[test]
fn pvh_entry_with_initrd_and_command_line() {
    let initrd = [0x5a; 5000];
    let (memory, entry) = boot(&elf_file(Some(0x20_0040)), Some(&initrd), "console=ttyS0").unwrap();
    assert_eq!((entry.mode, entry.rip), (EntryMode::Protected, 0x20_0040));
    let info: [u64; 7] = memory.read_obj(entry.rbx).unwrap();
    assert_eq!(info[0], 1 << 32 | 0x336e_c578);
    assert_eq!(info[1] >> 32, 1, "one module");
    let module: [u64; 2] = memory.read_obj(info[2]).unwrap();
    assert_eq!(module[1], 5000);
    assert_eq!(module[0] % 4096, 0);
    let mut back = [0; 5000];
    memory.read(module[0], &mut back).unwrap();
    assert_eq!(back, initrd);
    let mut line = [0; 14];
    memory.read(info[3], &mut line).unwrap();
    assert_eq!(&line, b"console=ttyS0\0");
    assert_eq!(info[4], 0xe_0000);
    assert_eq!(memory.read_obj::<u8>(BASE + 0x1ff).unwrap(), 0xa5);
    assert_eq!(memory.read_obj::<u8>(BASE + 0x200).unwrap(), 0);
}

#[test]
fn elf_without_a_note_starts_in_long_mode() {
    let (memory, entry) = boot(&elf_file(None), None, "").unwrap();
    let EntryMode::Long { page_tables } = entry.mode else { panic!("{entry:?}") };
    assert_eq!(entry.rip, BASE + 0x10);
    // Walk the tables for an address in the fourth GiB.
    let address = 0xfee0_1234u64;
    let pdpt = memory.read_obj::<u64>(page_tables).unwrap() & !0xfff;
    let pd = memory.read_obj::<u64>(pdpt + (address >> 30) * 8).unwrap() & !0xfff;
    let pde = memory.read_obj::<u64>(pd + (address >> 21 & 511) * 8).unwrap();
    assert_eq!(pde & !0x1f_ffff | address & 0x1f_ffff, address);
    assert_eq!(memory.read_obj::<u32>(entry.rsi + 0x202).unwrap(), u32::from_le_bytes(*b"HdrS"));
}

#[test]
fn bzimage_payload_is_entered_through_pvh() {
    let kernel = bzimage_file(&zstd_payload(&elf_file(Some(0x20_0040))));
    let (memory, entry) = boot(&kernel, None, "quiet").unwrap();
    assert_eq!((entry.mode, entry.rip), (EntryMode::Protected, 0x20_0040));
    assert_eq!(memory.read_obj::<u8>(BASE).unwrap(), 0xa5);
}

#[test]
fn unknown_payload_falls_back_to_the_boot_protocol() {
    let (memory, entry) = boot(&bzimage_file(b"no format that we know"), Some(&[1; 100]), "quiet").unwrap();
    assert!(matches!(entry.mode, EntryMode::Long { .. }));
    assert_eq!(entry.rip, BASE + 0x200);
    assert_eq!(memory.read_obj::<u8>(BASE + 0x200).unwrap(), 0x90);
    assert_eq!(memory.read_obj::<u32>(entry.rsi + 0x21c).unwrap(), 100, "ramdisk_size");
    assert_eq!(memory.read_obj::<u8>(entry.rsi + 0x1e8).unwrap(), 1, "e820 entries");
}

#[test]
fn wrong_files_are_told_apart() {
    assert!(matches!(boot(b"", None, ""), Err(BootError::NotAKernel)));
    assert!(matches!(boot(&[0; 4096], None, ""), Err(BootError::NotAKernel)));
    let mut arm = elf_file(None);
    arm[18] = 0xb7;
    assert!(matches!(boot(&arm, None, ""), Err(BootError::Unsupported(_))));
    let elf = elf_file(Some(0x20_0040));
    assert!(matches!(boot(&elf[..0x300], None, ""), Err(BootError::Truncated { .. })));
    let kernel = bzimage_file(&zstd_payload(&elf));
    assert!(matches!(boot(&kernel[..kernel.len() - 32], None, ""), Err(BootError::Truncated { .. })));
    let mut damaged = kernel;
    damaged[0x720] ^= 0xff;
    assert!(matches!(boot(&damaged, None, ""), Err(BootError::Decompress { .. })));
    assert!(matches!(boot(&elf, None, "a\0b"), Err(BootError::CommandLine { .. })));
    assert!(matches!(boot(&elf, None, &"x".repeat(70_000)), Err(BootError::CommandLine { .. })));
    let big = vec![0; 7 << 20];
    assert!(matches!(boot(&elf, Some(&big), ""), Err(BootError::NoRoom { what: "initrd", .. })));
    let source = BootSource {
        kernel: Path::new("/nonexistent/vmlinuz"),
        initrd: None,
        command_line: "",
        rsdp: 0,
        memory_map: &[],
    };
    let memory = GuestMemory::flat(2 << 20).unwrap();
    assert!(matches!(load(&memory, &source), Err(BootError::File { what: "kernel", .. })));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Damaged headers give an error or a kernel inside of RAM, never a panic.
    #[test]
    fn mutated_headers_never_panic(
        bz in any::<bool>(),
        edits in prop::collection::vec((0usize..0x480, any::<u8>()), 1..12),
        cut in prop::option::of(0usize..0x800),
    ) {
        let elf = elf_file(Some(0x20_0040));
        let mut file = if bz { bzimage_file(&zstd_payload(&elf)) } else { elf };
        for (at, value) in edits {
            // Headers only: most damage elsewhere is noticed by the decoder at once.
            let at = if bz { 0x1f1 + at % 0x80 } else { at };
            if let Some(byte) = file.get_mut(at) {
                *byte = value;
            }
        }
        file.truncate(cut.unwrap_or(file.len()));
        if let Ok((memory, entry)) = boot(&file, None, "console=ttyS0") {
            prop_assert!(memory.contains(entry.rip, 1));
        }
    }
}

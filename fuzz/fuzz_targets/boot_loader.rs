//! Any bytes as a kernel file: loading it gives an entry point inside RAM, or an error.
#![no_main]

use std::io::Write;

use fuzz::reached;
use libfuzzer_sys::fuzz_target;
use vmm_core::boot::{self, BootSource, EntryMode, MemoryKind, MemoryMapEntry};
use vmm_core::memory::GuestMemory;

const RAM: u64 = 32 << 20;

fuzz_target!(|kernel: &[u8]| {
    let file = |bytes: &[u8]| {
        let mut file = tempfile::NamedTempFile::new_in("/dev/shm").expect("file");
        file.write_all(bytes).expect("write");
        file
    };
    let (kernel, initrd) = (file(kernel), file(b"initrd"));
    let memory = GuestMemory::flat(RAM).expect("memory");
    let map = [MemoryMapEntry { address: 0, size: RAM, kind: MemoryKind::Ram }];
    let source = BootSource {
        kernel: kernel.path(),
        initrd: Some(initrd.path()),
        command_line: "quiet",
        rsdp: 0,
        memory_map: &map,
    };
    let Ok(entry) = boot::load(&memory, &source) else { return };
    assert!(entry.rip < RAM, "{entry:x?}");
    match (entry.mode, entry.rax) {
        (EntryMode::Long { page_tables }, _) => {
            assert!(page_tables < RAM, "{entry:x?}");
            reached("long");
        }
        (EntryMode::Protected, 0) => reached("pvh"),
        (EntryMode::Protected, _) => reached("multiboot"),
        (EntryMode::Real, _) => unreachable!("a kernel is not entered as firmware is"),
    }
});

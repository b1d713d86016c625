//! Any bytes as a kernel file: loading it gives an entry point inside RAM, or an error.
#![no_main]

use std::io::Write;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use vmm_core::boot::{self, BootSource, MemoryKind, MemoryMapEntry};
use vmm_core::memory::GuestMemory;

fuzz_target!(|kernel: &[u8]| {
    let mut file = tempfile::NamedTempFile::new_in("/dev/shm").expect("file");
    file.write_all(kernel).expect("write");
    let memory = GuestMemory::flat(32 << 20).expect("memory");
    let map = [MemoryMapEntry { address: 0, size: 32 << 20, kind: MemoryKind::Ram }];
    let source = BootSource {
        kernel: file.path(),
        initrd: Some(Path::new("/dev/null")),
        command_line: "quiet",
        rsdp: 0,
        memory_map: &map,
    };
    let _ = boot::load(&memory, &source);
});

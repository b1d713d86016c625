//! Any bytes as a qcow2 image: opening, reading, writing, checking and closing it ends with a result, quickly and in
//! bounded memory.
#![no_main]

use std::sync::Arc;

use blockfmt::storage::MemoryStorage;
use blockfmt::{Format, OpenOptions, OpenPolicy};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|image: &[u8]| {
    let storage = Arc::new(MemoryStorage::from_bytes(image));
    let open = OpenOptions::new(Format::Qcow2).policy(OpenPolicy::deny());
    let Ok(disk) = open.open_storage(storage, "fuzz.qcow2") else { return };
    let size = disk.size();
    let mut buffer = vec![0; 8192];
    for part in 0..8 {
        let offset = size / 8 * part;
        let len = buffer.len().min((size - offset) as usize);
        let _ = disk.read_at(&mut buffer[..len], offset);
        let _ = disk.map(offset, len as u64);
    }
    let _ = disk.write_at(&[7; 700], size / 3);
    let _ = disk.write_zeroes(size / 2, (size / 4).min(1 << 20), true);
    let _ = disk.discard(0, size.min(1 << 20));
    let _ = disk.flush();
    let _ = disk.close();
});

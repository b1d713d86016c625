//! Any bytes as a qcow2 image: opening, reading, writing, checking and closing it ends with a result, quickly and in
//! bounded memory.
#![no_main]

use std::sync::Arc;

use blockfmt::storage::MemoryStorage;
use blockfmt::{Format, OpenOptions, OpenPolicy};
use fuzz::{exercise, reached};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|image: &[u8]| {
    let storage = Arc::new(MemoryStorage::from_bytes(image));
    let open = OpenOptions::new(Format::Qcow2).policy(OpenPolicy::deny());
    let Ok(disk) = open.open_storage(storage, "fuzz.qcow2") else { return };
    reached("opened");
    exercise(&disk, false);
});

//! Changed VHD images whose checksums are right: opening, reading, writing and closing them ends with a result,
//! quickly and in bounded memory.
#![no_main]

use std::sync::{Arc, LazyLock};

use blockfmt::format::vhd::{VhdKind, VhdOptions};
use blockfmt::storage::MemoryStorage;
use blockfmt::{CreateOptions, Format, OpenOptions, OpenPolicy, Storage};
use fuzz::{exercise, reached, seal};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Patch {
    /// From the start of the file, or back from its end.
    from_end: bool,
    at: u16,
    bytes: [u8; 8],
    len: u8,
}

#[derive(Arbitrary, Debug)]
struct Input {
    fixed: bool,
    read_only: bool,
    patches: Vec<Patch>,
}

/// A dynamic image and a fixed one.
static IMAGES: LazyLock<[MemoryStorage; 2]> = LazyLock::new(|| {
    [VhdKind::Dynamic, VhdKind::Fixed].map(|kind| {
        let storage = Arc::new(MemoryStorage::new());
        let vhd = VhdOptions { kind, block_size: 512 << 10 };
        CreateOptions::new(Format::Vhd, 5 << 20).vhd(vhd).create_on(storage.clone()).expect("create");
        let disk = OpenOptions::new(Format::Vhd).open_storage(storage.clone(), "x").expect("open");
        disk.write_at(&[1; 4096], 2 << 20).expect("write");
        disk.close().expect("close");
        MemoryStorage::clone(&storage)
    })
});

fn sum(bytes: &[u8]) -> [u8; 4] {
    (!bytes.iter().map(|b| u32::from(*b)).sum::<u32>()).to_be_bytes()
}

fuzz_target!(|input: Input| {
    let image = Arc::new(IMAGES[usize::from(input.fixed)].clone());
    let storage: &(dyn Storage + 'static) = &*image;
    let end = storage.length().expect("length") - 512;
    for patch in input.patches.iter().take(32) {
        let at = if patch.from_end { end + u64::from(patch.at) % 500 } else { u64::from(patch.at) % 4096 };
        let len = 1 + usize::from(patch.len) % 8;
        storage.write_at(&patch.bytes[..len], at).expect("patch");
    }
    if !input.fixed {
        seal(storage, 0, 512, 64, sum);
        seal(storage, 512, 1024, 36, sum);
    }
    seal(storage, end, 512, 64, sum);
    let open = OpenOptions::new(Format::Vhd).policy(OpenPolicy::deny()).read_only(input.read_only);
    let Ok(disk) = open.open_storage(image.clone(), "fuzz.vhd") else { return };
    reached("opened");
    exercise(&disk, false);
});

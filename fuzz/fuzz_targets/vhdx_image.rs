//! Changed VHDX images, some with a log to replay, whose checksums are right: opening, reading, writing, checking and
//! closing them ends with a result, quickly and in bounded memory.
#![no_main]

use std::sync::{Arc, LazyLock};

use blockfmt::format::vhdx::VhdxOptions;
use blockfmt::storage::MemoryStorage;
use blockfmt::{CreateOptions, Format, OpenOptions, OpenPolicy, Storage};
use fuzz::{exercise, reached, seal};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Place {
    Identifier,
    Header(bool),
    Regions(bool),
    Log,
    MetadataTable,
    MetadataItems,
    Table,
}

#[derive(Arbitrary, Debug)]
struct Patch {
    place: Place,
    at: u16,
    bytes: [u8; 8],
    len: u8,
}

#[derive(Arbitrary, Debug)]
struct Input {
    clean: bool,
    read_only: bool,
    repair: bool,
    patches: Vec<Patch>,
}

/// An image that was closed, and one that was not.
static IMAGES: LazyLock<[MemoryStorage; 2]> = LazyLock::new(|| {
    let storage = Arc::new(MemoryStorage::new());
    let vhdx = VhdxOptions { block_size: Some(1 << 20), ..VhdxOptions::default() };
    CreateOptions::new(Format::Vhdx, 5 << 20).vhdx(vhdx).create_on(storage.clone()).expect("create");
    let disk = OpenOptions::new(Format::Vhdx).open_storage(storage.clone(), "x").expect("open");
    disk.write_at(&[1; 4096], 2 << 20).expect("write");
    disk.flush().expect("flush");
    let dirty = MemoryStorage::clone(&storage);
    disk.close().expect("close");
    [dirty, MemoryStorage::clone(&storage)]
});

fn sum(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).to_le_bytes()
}

fuzz_target!(|input: Input| {
    let image = Arc::new(IMAGES[usize::from(input.clean)].clone());
    let storage: &(dyn Storage + 'static) = &*image;
    for patch in input.patches.iter().take(32) {
        let (base, span) = match patch.place {
            Place::Identifier => (0, 64),
            Place::Header(second) => ((64 << 10) << u32::from(second), 128),
            Place::Regions(second) => ((192 << 10) + (u64::from(second) << 16), 128),
            Place::Log => (1 << 20, 20480),
            Place::MetadataTable => (2 << 20, 512),
            Place::MetadataItems => ((2 << 20) + 65536, 64),
            Place::Table => (3 << 20, 64),
        };
        let len = 1 + usize::from(patch.len) % 8;
        storage.write_at(&patch.bytes[..len], base + u64::from(patch.at) % span).expect("patch");
    }
    for at in [64 << 10, 128 << 10] {
        seal(storage, at, 4096, 4, sum);
    }
    for at in [192 << 10, 256 << 10] {
        seal(storage, at, 65536, 4, sum);
    }
    for at in (0..5u64).map(|n| (1 << 20) + n * 4096) {
        let mut head = [0; 12];
        storage.read_at(&mut head, at).expect("read");
        let len = u32::from_le_bytes([head[8], head[9], head[10], head[11]]) as usize;
        if head.starts_with(b"loge") && (4096..1 << 16).contains(&len) {
            seal(storage, at, len, 4, sum);
        }
    }
    let open = OpenOptions::new(Format::Vhdx).policy(OpenPolicy::deny());
    let open = open.read_only(input.read_only).repair(input.repair);
    let Ok(disk) = open.open_storage(image.clone(), "fuzz.vhdx") else { return };
    reached("opened");
    exercise(&disk, input.repair);
});

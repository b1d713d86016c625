//! Changed LUKS headers: opening with a secret ends with a disk that can be used or with an error, in bounded memory.
#![no_main]

use std::sync::{Arc, LazyLock};

use blockfmt::storage::MemoryStorage;
use blockfmt::{CipherMode, CreateOptions, Format, LuksOptions, OpenOptions, OpenPolicy, Secret, Storage};
use fuzz::{exercise, reached};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

/// Bytes of the header.
const HEADER: u64 = 592;
/// Where rounds of key derivation are counted: for the master key's digest and for the eight slots.
const ROUNDS: [u64; 9] = [164, 212, 260, 308, 356, 404, 452, 500, 548];
/// More rounds than this, up to what is refused, only take time.
const ROUNDS_MAX: u32 = 2000;
const ROUNDS_REFUSED: u32 = 64 << 20;

#[derive(Arbitrary, Debug)]
struct Patch {
    at: u16,
    bytes: [u8; 8],
    len: u8,
}

#[derive(Arbitrary, Debug)]
struct Input {
    cbc: bool,
    wrong_secret: bool,
    /// Cut off the image's end.
    cut: u16,
    patches: Vec<Patch>,
}

/// An image in each mode of encryption.
static IMAGES: LazyLock<[MemoryStorage; 2]> = LazyLock::new(|| {
    [CipherMode::Xts, CipherMode::Cbc].map(|mode| {
        let storage = Arc::new(MemoryStorage::new());
        let luks = LuksOptions { mode, key_bits: 128, iter_time_ms: 1, ..LuksOptions::default() };
        let create = CreateOptions::new(Format::Luks, 1 << 20).luks(luks).secret(Secret::new("right"));
        create.create_on(storage.clone()).expect("create");
        MemoryStorage::clone(&storage)
    })
});

fuzz_target!(|input: Input| {
    let image = Arc::new(IMAGES[usize::from(input.cbc)].clone());
    let storage: &(dyn Storage + 'static) = &*image;
    for patch in input.patches.iter().take(32) {
        let len = 1 + usize::from(patch.len) % 8;
        storage.write_at(&patch.bytes[..len], u64::from(patch.at) % HEADER).expect("patch");
    }
    for at in ROUNDS {
        let mut rounds = [0; 4];
        storage.read_at(&mut rounds, at).expect("read");
        let rounds = u32::from_be_bytes(rounds);
        if (ROUNDS_MAX..=ROUNDS_REFUSED).contains(&rounds) {
            storage.write_at(&(rounds % ROUNDS_MAX).to_be_bytes(), at).expect("patch");
        }
    }
    let len = storage.length().expect("length");
    storage.truncate(len - u64::from(input.cut)).expect("cut");
    let secret = Secret::new(if input.wrong_secret { "wrong" } else { "right" });
    let open = OpenOptions::new(Format::Luks).policy(OpenPolicy::deny()).secret(secret);
    let Ok(disk) = open.open_storage(image.clone(), "fuzz.luks") else { return };
    reached("opened");
    exercise(&disk, false);
});

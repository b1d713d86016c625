//! Random operations on a fresh disk of any format against a model: what was written is read, also after reopening.
#![no_main]

use std::sync::{Arc, LazyLock};

use arbitrary::Arbitrary;
use blockfmt::format::vhd::{VhdKind, VhdOptions};
use blockfmt::storage::MemoryStorage;
use blockfmt::{CreateOptions, Disk, Format, LuksOptions, OpenOptions, OpenPolicy, Secret};
use fuzz::reached;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Operation {
    Write { offset: u32, len: u16, value: u8 },
    Zero { offset: u32, len: u32, unmap: bool },
    Discard { offset: u32, len: u16 },
    Read { offset: u32, len: u16 },
    Flush,
    Reopen,
}

const SIZE: u64 = 3 << 20;

static IMAGES: LazyLock<Vec<(Format, MemoryStorage)>> = LazyLock::new(|| {
    let luks = LuksOptions { iter_time_ms: 1, ..LuksOptions::default() };
    let fixed = VhdOptions { kind: VhdKind::Fixed, ..VhdOptions::default() };
    let create = |format| CreateOptions::new(format, SIZE);
    let images = [
        create(Format::Qcow2),
        create(Format::Raw),
        create(Format::Vhd),
        create(Format::Vhd).vhd(fixed),
        create(Format::Vhdx),
        create(Format::Luks).luks(luks.clone()).secret(Secret::new("secret")),
        create(Format::Qcow2).luks(luks).secret(Secret::new("secret")),
    ];
    let make = |options: CreateOptions| {
        let storage = Arc::new(MemoryStorage::new());
        let format = options.format;
        options.create_on(storage.clone()).expect("create");
        // Space of an encrypted disk that was never written reads as noise.
        let disk = open(format, &storage);
        if format == Format::Luks {
            disk.write_at(&vec![0; SIZE as usize], 0).expect("write");
        }
        disk.close().expect("close");
        (format, MemoryStorage::clone(&storage))
    };
    images.into_iter().map(make).collect()
});

fn open(format: Format, storage: &Arc<MemoryStorage>) -> Disk {
    let options = OpenOptions::new(format).policy(OpenPolicy::deny()).secret(Secret::new("secret"));
    options.open_storage(storage.clone(), "fuzz").expect("open")
}

fuzz_target!(|case: (u8, Vec<Operation>)| {
    let (image, operations) = case;
    let (format, image) = &IMAGES[usize::from(image) % IMAGES.len()];
    let storage = Arc::new(image.clone());
    let open = || open(*format, &storage);
    let mut disk = open();
    // None: discarded, so either the old bytes or zeros.
    let mut model: Vec<Option<u8>> = vec![Some(0); SIZE as usize];
    let clamp = |offset: u32, len: u64| {
        let offset = u64::from(offset) % SIZE;
        (offset, len.min(SIZE - offset))
    };
    for operation in operations.into_iter().take(64) {
        match operation {
            Operation::Write { offset, len, value } => {
                let (offset, len) = clamp(offset, len.into());
                disk.write_at(&vec![value; len as usize], offset).expect("write");
                model[offset as usize..(offset + len) as usize].fill(Some(value));
            }
            Operation::Zero { offset, len, unmap } => {
                let (offset, len) = clamp(offset, u64::from(len) % (1 << 20));
                disk.write_zeroes(offset, len, unmap).expect("zero");
                model[offset as usize..(offset + len) as usize].fill(Some(0));
            }
            Operation::Discard { offset, len } => {
                let (offset, len) = clamp(offset, len.into());
                disk.discard(offset, len).expect("discard");
                model[offset as usize..(offset + len) as usize].fill(None);
            }
            Operation::Read { offset, len } => {
                let (offset, len) = clamp(offset, len.into());
                let mut data = vec![0; len as usize];
                disk.read_at(&mut data, offset).expect("read");
                for (got, want) in data.iter().zip(&model[offset as usize..]) {
                    assert!(want.is_none_or(|want| want == *got));
                }
            }
            Operation::Flush => disk.flush().expect("flush"),
            Operation::Reopen => {
                disk.close().expect("close");
                drop(disk);
                disk = open();
            }
        }
    }
    let mut data = vec![0; SIZE as usize];
    disk.read_at(&mut data, 0).expect("read");
    assert!(data.iter().zip(&model).all(|(got, want)| want.is_none_or(|want| want == *got)));
    match format {
        Format::Qcow2 => reached("qcow2"),
        Format::Raw => reached("raw"),
        Format::Vhd => reached("vhd"),
        Format::Vhdx => reached("vhdx"),
        _ => reached("luks"),
    }
});

//! Random operations on a fresh qcow2 disk against a model: what was written is read, also after reopening.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use blockfmt::storage::MemoryStorage;
use blockfmt::{CreateOptions, Format, OpenOptions, OpenPolicy};
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

fuzz_target!(|operations: Vec<Operation>| {
    let storage = Arc::new(MemoryStorage::new());
    CreateOptions::new(Format::Qcow2, SIZE).create_on(storage.clone()).expect("create");
    let open = || {
        let options = OpenOptions::new(Format::Qcow2).policy(OpenPolicy::deny());
        options.open_storage(storage.clone(), "fuzz.qcow2").expect("open")
    };
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
});

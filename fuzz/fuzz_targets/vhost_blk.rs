//! Any guest, and any record of requests in flight, against a disk that is exported over vhost-user: its requests end,
//! are bounded, and write to no guest memory but the used ring and the buffers that the guest made writable.
#![no_main]

use std::sync::Arc;

use blockfmt::storage::MemoryStorage;
use blockfmt::{Format, OpenOptions};
use fuzz::{reached, records};
use libfuzzer_sys::fuzz_target;
use nacre_engine::vhost_blk::{Device, Flights, Record, Request, Ring, RingSetup};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MEMORY: usize = 0x1_0000;
const DISK: usize = 1 << 17;
const QUEUE_SIZE: u16 = 16;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x200;
/// Where a seed's first header and status are; the rest is the input's choice.
const STATUS: u64 = 0x310;

/// Kinds of records.
const MEMORY_BYTES: u8 = 0;
const IN_FLIGHT: u8 = 1;
const DISK_BYTES: u8 = 2;

/// The parts of memory that the guest lets the device write, of every chain that its table can form.
fn writable(memory: &GuestMemoryMmap) -> Vec<(u64, u64)> {
    let mut list = vec![(USED, 6 + 8 * u64::from(QUEUE_SIZE))];
    let mut tables = vec![(0u64, u64::from(QUEUE_SIZE), false)];
    while let Some((table, count, indirect)) = tables.pop() {
        for at in (0..count).filter_map(|n| table.checked_add(n * 16)) {
            let Ok((address, len, flags)) = (|| -> Result<_, vm_memory::GuestMemoryError> {
                let address: u64 = memory.read_obj(GuestAddress(at))?;
                let len: u32 = memory.read_obj(GuestAddress(at.saturating_add(8)))?;
                let flags: u16 = memory.read_obj(GuestAddress(at.saturating_add(12)))?;
                Ok((address, u64::from(len), flags))
            })() else {
                continue;
            };
            match flags {
                _ if flags & 4 != 0 && !indirect => tables.push((address, (len / 16).min(1024), true)),
                _ if flags & 2 != 0 => list.push((address, len)),
                _ => {}
            }
        }
    }
    list
}

fn contents(memory: &GuestMemoryMmap) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY];
    memory.read_slice(&mut bytes, GuestAddress(0)).expect("memory");
    bytes
}

fuzz_target!(|data: &[u8]| {
    let [flags, base, data @ ..] = data else { return };
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
    let mut image = vec![0; DISK];
    let mut record = None;
    for (kind, body) in records(data) {
        let Some((at, bytes)) = body.split_first_chunk::<2>() else { continue };
        let at = usize::from(u16::from_le_bytes(*at));
        match kind {
            MEMORY_BYTES => {
                let len = bytes.len().min(MEMORY - at);
                memory.write_slice(&bytes[..len], GuestAddress(at as u64)).expect("memory");
            }
            IN_FLIGHT => record = Some(Record::with_bytes(QUEUE_SIZE, bytes).expect("record")),
            DISK_BYTES => image[at..at + bytes.len()].copy_from_slice(bytes),
            _ => {}
        }
    }
    let storage = Arc::new(MemoryStorage::from_bytes(&image));
    let disk = OpenOptions::new(Format::Raw).open_storage(storage, "fuzz.raw").expect("disk");
    let device = Device::new(disk, "fuzz", flags & 1 != 0, 1).expect("device");
    let before = contents(&memory);
    let allowed = writable(&memory);
    let setup = RingSetup {
        size: QUEUE_SIZE,
        descriptors: 0,
        available: AVAILABLE,
        used: USED,
        base: (*base).into(),
        event_idx: flags & 2 != 0,
    };
    let recorded = record.is_some();
    let Ok(mut ring) = Ring::start(&setup, Arc::new(memory.clone()), record) else { return };
    let status: u8 = memory.read_obj(GuestAddress(STATUS)).expect("memory");
    // Each request is executed at once, or left to a queue of the disk.
    let left = flags & 4 != 0;
    let (mut flights, mut ended) = (Flights::new(), Vec::new());
    // A table that a request writes to may form other chains then: it is looked at while nothing has been written.
    let mut first = true;
    for _ in 0..4 * QUEUE_SIZE {
        let Ok(Some(chain)) = ring.take() else { break };
        let request = Request::new(&device, chain);
        ended.extend(match left {
            true => flights.leave(&device, request),
            false => flights.run(&device, request, false),
        });
        flights.wait(&mut ended);
        let (chain, written) = ended.pop().expect("every request ends");
        if first {
            let after = contents(&memory);
            for at in (0..MEMORY as u64).filter(|at| before[*at as usize] != after[*at as usize]) {
                let inside = |(start, len): &(u64, u64)| at.checked_sub(*start).is_some_and(|n| n < *len);
                assert!(allowed.iter().any(inside), "a byte at {at:#x} changed");
            }
            first = false;
        }
        if written > 0 {
            reached(if recorded { "again" } else { "answer" });
        }
        match left {
            _ if written <= 512 => {}
            false => reached("read"),
            true => reached("read-later"),
        }
        if ring.complete(&chain, written).is_err() {
            break;
        }
    }
    if memory.read_obj::<u8>(GuestAddress(STATUS)).is_ok_and(|now| now == 0 && status != 0) {
        reached("success");
    }
});

//! What fuzz targets share.

pub mod virtio;

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use blockfmt::format::check::Repair;
use blockfmt::{Disk, Storage};

/// Says, once a process, that an input came as far as `stage`. `fuzz/run` fails when no input of a run reaches a stage
/// that its target names: such a target would only test how its inputs are refused.
pub fn reached(stage: &'static str) {
    static STAGES: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());
    if STAGES.lock().expect("lock").insert(stage) {
        eprintln!("reached: {stage}");
    }
}

/// Splits an input into records: a kind, a length of 16 bits (little-endian), as many bytes. The last one may be cut.
pub fn records(mut input: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        let ([kind, low, high], rest) = input.split_first_chunk::<3>()?;
        let (body, rest) = rest.split_at(rest.len().min(u16::from_le_bytes([*low, *high]).into()));
        input = rest;
        Some((*kind, body))
    })
}

/// What can be read from a socket without waiting, and whether the peer may still send.
pub fn drain(mut stream: &UnixStream) -> (Vec<u8>, bool) {
    stream.set_nonblocking(true).expect("socket");
    let mut bytes = Vec::new();
    let open = matches!(stream.read_to_end(&mut bytes), Err(e) if e.kind() == ErrorKind::WouldBlock);
    (bytes, open)
}

/// Puts a checksum into `len` bytes of a storage, computed with the field of four bytes at `field` cleared.
pub fn seal(
    storage: &(dyn Storage + 'static),
    at: u64,
    len: usize,
    field: usize,
    sum: impl Fn(&[u8]) -> [u8; 4],
) {
    let mut bytes = vec![0; len];
    storage.read_at(&mut bytes, at).expect("read");
    bytes[field..field + 4].fill(0);
    storage.write_at(&sum(&bytes), at + field as u64).expect("write");
}

/// Does a little of everything that a disk offers. Errors are fine.
pub fn exercise(disk: &Disk, repair: bool) {
    let size = disk.size();
    let mut buffer = vec![0; 8192];
    for part in 0..8 {
        let offset = size / 8 * part;
        let len = buffer.len().min((size - offset) as usize);
        let _ = disk.read_at(&mut buffer[..len], offset);
        let _ = disk.map(offset, len as u64);
    }
    let _ = disk.layers()[0].info();
    let _ = disk.layers()[0].check(Repair::Nothing);
    let _ = disk.write_at(&[7; 700], size / 3);
    let _ = disk.write_zeroes(size / 2, (size / 4).min(1 << 20), true);
    let _ = disk.discard(0, size.min(1 << 20));
    let _ = disk.flush();
    if repair {
        let _ = disk.layers()[0].check(Repair::All);
    }
    let _ = disk.close();
}

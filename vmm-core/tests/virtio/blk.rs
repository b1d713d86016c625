//! The block device.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockfmt::{Gather, Geometry, Scatter};
use parking_lot::Mutex;
use vmm_core::devices::virtio::blk::{BlkOptions, BlockBackend, MemoryDisk};
use vmm_core::devices::virtio::rate::{Limits, Rate};
use vmm_core::devices::virtio::{Blk, Status, features};

use crate::conformance::{self, Subject};
use crate::driver::{Buffer, DriverQueue, Guest, TRANSPORTS, Transport};

pub const FLUSH: u64 = 1 << 9;
const CONFIG_WCE: u64 = 1 << 11;
const SIZE: usize = 1 << 20;

pub fn header(guest: &mut Guest, kind: u32, sector: u64) -> Buffer {
    let mut bytes = Vec::new();
    bytes.extend(kind.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(sector.to_le_bytes());
    guest.readable(&bytes)
}

/// Sends one request and returns its status and the writable data.
fn request(
    guest: &mut Guest,
    queue: &mut DriverQueue,
    kind: u32,
    sector: u64,
    out: &[u8],
    want: u32,
) -> (u8, Vec<u8>) {
    let mut buffers = vec![header(guest, kind, sector)];
    if !out.is_empty() {
        buffers.push(guest.readable(out));
    }
    let data = (want != 0).then(|| guest.writable(want));
    buffers.extend(data);
    let status = guest.writable(1);
    buffers.push(status);
    let len = guest.exchange(queue, &buffers);
    assert_eq!(len, want + 1);
    (guest.bytes(status)[0], data.map(|d| guest.bytes(d)).unwrap_or_default())
}

pub fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn conforms() {
    conformance::run(&Subject {
        make: || Blk::new(Arc::new(MemoryDisk::new(SIZE)), &BlkOptions::default()),
        device_type: 2,
        queue: 0,
        needs: 0,
        request: |guest| {
            let header = header(guest, 0, 1);
            (vec![header, guest.writable(512), guest.writable(1)], 513)
        },
    });
}

#[test]
fn reads_what_was_written() {
    for transport in TRANSPORTS {
        let options =
            BlkOptions { serial: "a-serial-number-that-is-long".into(), queues: 3, ..Default::default() };
        let mut guest = Guest::new(transport, Blk::new(Arc::new(MemoryDisk::new(SIZE)), &options));
        let mut queues = guest.bring_up(u64::MAX, 64);
        assert_eq!(queues.len(), 3);
        assert_eq!(guest.config_u64(0), SIZE as u64 / 512);
        assert_eq!(guest.config_u32(20), 512);
        let data: Vec<u8> = (0..4096u32).map(|i| ((i * 7) >> 3) as u8).collect();
        assert_eq!(request(&mut guest, &mut queues[0], 1, 9, &data, 0).0, 0);
        assert_eq!(request(&mut guest, &mut queues[1], 4, 0, &[], 0).0, 0);
        assert_eq!(request(&mut guest, &mut queues[2], 0, 9, &[], 4096), (0, data));
        assert_eq!(request(&mut guest, &mut queues[0], 8, 0, &[], 20), (0, b"a-serial-number-that".to_vec()));
        // Write zeroes, discard, and several ranges in one request.
        let ranges = [range(9, 1, 1), range(11, 1, 0)].concat();
        assert_eq!(request(&mut guest, &mut queues[0], 13, 0, &ranges, 0).0, 0);
        assert_eq!(request(&mut guest, &mut queues[0], 11, 0, &range(12, 2, 0), 0).0, 0);
        let back = request(&mut guest, &mut queues[0], 0, 9, &[], 4096).1;
        let zero: Vec<bool> = back.chunks(512).map(|c| c.iter().all(|&b| b == 0)).collect();
        assert_eq!(zero, [true, false, true, true, true, false, false, false]);
    }
}

#[test]
fn refuses_requests_that_make_no_sense() {
    let mut guest =
        Guest::new(Transport::Mmio, Blk::new(Arc::new(MemoryDisk::new(SIZE)), &BlkOptions::default()));
    let mut queues = guest.bring_up(u64::MAX, 64);
    let queue = &mut queues[0];
    let end = SIZE as u64 / 512;
    for (kind, sector, out, want, status) in [
        (0, end, vec![], 512, 1),
        (0, end - 1, vec![], 1024, 1),
        (0, u64::MAX, vec![], 512, 1),
        (0, u64::MAX / 512, vec![], 512, 1),
        (0, 0, vec![], 511, 1),
        (1, end, vec![1; 512], 0, 1),
        (1, 0, vec![1; 100], 0, 1),
        (11, 0, range(end, 1, 0), 0, 1),
        (11, 0, range(u64::MAX, u32::MAX, 0), 0, 1),
        (11, 0, range(0, 1, 1), 0, 2),
        (13, 0, range(0, 1, 2), 0, 2),
        (13, 0, vec![0; 17], 0, 1),
        (13, 0, vec![], 0, 1),
        (13, 0, vec![0; 16 * 33], 0, 1),
        (77, 0, vec![], 0, 2),
    ] {
        assert_eq!(request(&mut guest, queue, kind, sector, &out, want).0, status, "type {kind} at {sector}");
    }
    assert_eq!(request(&mut guest, queue, 0, end - 1, &[], 512).0, 0);
    // No header, no room for a status.
    for cut in [true, false] {
        let mut queues = guest.bring_up(0, 64);
        let mut buffers = vec![header(&mut guest, 0, 0), guest.writable(1)];
        if cut {
            buffers[0].len = 15;
        } else {
            buffers.pop();
        }
        queues[0].submit(&buffers);
        guest.notify(0);
        guest.wait_needs_reset();
    }
}

#[test]
fn read_only_disks_refuse_changes() {
    let options = BlkOptions { read_only: true, ..Default::default() };
    let mut guest = Guest::new(Transport::PciMsix, Blk::new(Arc::new(MemoryDisk::new(SIZE)), &options));
    assert_eq!(guest.offered() & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
    let mut queues = guest.bring_up(u64::MAX, 64);
    assert_eq!(request(&mut guest, &mut queues[0], 1, 0, &[1; 512], 0).0, 1);
    assert_eq!(request(&mut guest, &mut queues[0], 13, 0, &range(0, 1, 0), 0).0, 1);
    assert_eq!(request(&mut guest, &mut queues[0], 0, 0, &[], 512), (0, vec![0; 512]));
}

/// Counts calls and fails where it is told to.
struct Faulty {
    disk: MemoryDisk,
    fail: Mutex<Option<&'static str>>,
    flushes: AtomicU64,
}

impl Faulty {
    fn new() -> Arc<Self> {
        Arc::new(Self { disk: MemoryDisk::new(SIZE), fail: Mutex::new(None), flushes: AtomicU64::new(0) })
    }

    fn check(&self, operation: &str) -> io::Result<()> {
        if *self.fail.lock() == Some(operation) { Err(io::Error::other("injected")) } else { Ok(()) }
    }
}

impl BlockBackend for Faulty {
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn read_only(&self) -> bool {
        false
    }
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }
    fn read(&self, target: Scatter<'_>, offset: u64) -> io::Result<()> {
        self.check("read")?;
        self.disk.read(target, offset)
    }
    fn write(&self, source: Gather<'_>, offset: u64) -> io::Result<()> {
        self.check("write")?;
        self.disk.write(source, offset)
    }
    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.check("flush")
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check("discard")?;
        self.disk.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.check("write_zeroes")?;
        self.disk.write_zeroes(offset, len, unmap)
    }
    fn on_resize(&self, callback: Box<dyn Fn(u64) + Send + Sync>) {
        self.disk.on_resize(callback);
    }
}

#[test]
fn back_end_errors_reach_the_guest_and_nothing_else() {
    let backend = Faulty::new();
    let blk = Blk::new(backend.clone(), &BlkOptions::default());
    let mut guest = Guest::new(Transport::PciMsix, blk.clone());
    let mut queues = guest.bring_up(u64::MAX, 64);
    let queue = &mut queues[0];
    for (fault, kind, out, want) in [
        ("read", 0, vec![], 512),
        ("write", 1, vec![7; 512], 0),
        ("flush", 4, vec![], 0),
        ("discard", 11, range(0, 8, 0), 0),
        ("write_zeroes", 13, range(0, 8, 0), 0),
    ] {
        *backend.fail.lock() = Some(fault);
        assert_eq!(request(&mut guest, queue, kind, 0, &out, want).0, 1, "{fault}");
        *backend.fail.lock() = None;
        assert_eq!(request(&mut guest, queue, kind, 0, &out, want).0, 0, "{fault}");
    }
    assert_eq!(blk.counters().errors.load(Ordering::SeqCst), 5);
    assert_eq!(guest.status() & Status::NEEDS_RESET, 0);
}

#[test]
fn writes_go_through_when_the_driver_does_not_flush() {
    for (accepted, writeback, flushes) in
        [(0, None, 1), (FLUSH, None, 0), (FLUSH | CONFIG_WCE, Some(0), 1), (FLUSH | CONFIG_WCE, Some(1), 0)]
    {
        let backend = Faulty::new();
        let mut guest = Guest::new(Transport::Mmio, Blk::new(backend.clone(), &BlkOptions::default()));
        let mut queues = guest.bring_up(accepted, 64);
        if let Some(value) = writeback {
            guest.write(guest.config_address() + 32, &[value]);
        }
        assert_eq!(request(&mut guest, &mut queues[0], 1, 0, &[1; 512], 0).0, 0);
        assert_eq!(backend.flushes.load(Ordering::SeqCst), flushes, "{accepted:#x} {writeback:?}");
    }
}

#[test]
fn resizes_are_announced() {
    for transport in TRANSPORTS {
        let disk = Arc::new(MemoryDisk::new(SIZE));
        let mut guest = Guest::new(transport, Blk::new(disk.clone(), &BlkOptions::default()));
        let mut queues = guest.bring_up(u64::MAX, 8);
        let before = guest.generation();
        disk.resize(2 * SIZE);
        guest.wait_interrupt(None);
        assert_ne!(guest.generation(), before);
        assert_eq!(guest.config_u64(0), 2 * SIZE as u64 / 512);
        let last = 2 * SIZE as u64 / 512 - 1;
        assert_eq!(request(&mut guest, &mut queues[0], 0, last, &[], 512).0, 0);
    }
}

#[test]
fn a_rate_limit_delays_and_completes() {
    let rate = Rate { per_second: 200, burst: 5 };
    let options = BlkOptions { limits: Limits { bytes: None, operations: Some(rate) }, ..Default::default() };
    let blk = Blk::new(Arc::new(MemoryDisk::new(SIZE)), &options);
    let mut guest = Guest::new(Transport::PciMsix, blk.clone());
    let mut queues = guest.bring_up(features::EVENT_IDX, 64);
    for _ in 0..20 {
        let header = header(&mut guest, 0, 0);
        let buffers = [header, guest.writable(512), guest.writable(1)];
        queues[0].submit(&buffers);
    }
    guest.notify(0);
    for _ in 0..20 {
        guest.wait_used(&mut queues[0]);
    }
    assert_ne!(blk.counters().throttled.load(Ordering::SeqCst), 0);
    assert_eq!(blk.counters().reads.load(Ordering::SeqCst), 20);
}

#[test]
fn a_formatted_disk_is_a_back_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, vec![0x5a; SIZE]).unwrap();
    let disk = blockfmt::OpenOptions::new(blockfmt::Format::Raw).open(&path).unwrap();
    let mut guest = Guest::new(Transport::PciMsix, Blk::new(Arc::new(disk.clone()), &BlkOptions::default()));
    let mut queues = guest.bring_up(u64::MAX, 64);
    assert_eq!(request(&mut guest, &mut queues[0], 0, 3, &[], 1024), (0, vec![0x5a; 1024]));
    assert_eq!(request(&mut guest, &mut queues[0], 1, 4, &[1; 512], 0).0, 0);
    assert_eq!(request(&mut guest, &mut queues[0], 4, 0, &[], 0).0, 0);
    assert_eq!(std::fs::read(&path).unwrap()[4 * 512..5 * 512], [1; 512]);
    disk.resize(2 * SIZE as u64).unwrap();
    guest.wait_interrupt(None);
    assert_eq!(guest.config_u64(0), 2 * SIZE as u64 / 512);
}

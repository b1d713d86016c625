//! The block device over storage that answers late: requests of one queue are under way together.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockfmt::{Format, OpenOptions};
use parking_lot::Mutex;
use vmm_core::devices::virtio::blk::{BlkOptions, BlockBackend};
use vmm_core::devices::virtio::{
    Activation, Blk, Context, Interrupt, Queue, QueueLayout, Status, VirtioDevice, features,
};
use vmm_core::memory::WriteObserver;

use crate::blk::{FLUSH, header, range};
use crate::driver::{Buffer, DriverQueue, Guest, Transport};
use crate::late::{Call, Late, Offer, Slow};

const SIZE: u64 = 1 << 20;
const READ: u32 = 0;
const WRITE: u32 = 1;
const SYNC: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn blk(backend: Arc<dyn BlockBackend>) -> Arc<Blk> {
    Blk::new(backend, &BlkOptions::default())
}

/// The buffers of a request: header, data, status.
fn buffers(guest: &mut Guest, kind: u32, sector: u64, out: &[u8], want: u32) -> Vec<Buffer> {
    let mut buffers = vec![header(guest, kind, sector)];
    if !out.is_empty() {
        buffers.push(guest.readable(out));
    }
    if want != 0 {
        buffers.push(guest.writable(want));
    }
    buffers.push(guest.writable(1));
    buffers
}

fn status(guest: &Guest, buffers: &[Buffer]) -> u8 {
    guest.bytes(*buffers.last().unwrap())[0]
}

/// Has requests of all kinds served while others wait, until the device leaves them to its queue.
fn prime(guest: &mut Guest, queue: &mut DriverQueue, blk: &Blk) {
    for kind in [READ, SYNC] {
        for _ in 0..12 {
            let buffers = buffers(guest, kind, 0, &[], if kind == READ { 512 } else { 0 });
            queue.submit(&buffers);
        }
    }
    guest.notify(queue.index);
    for _ in 0..24 {
        guest.wait_used(queue);
    }
    assert!(blk.counters().deferred.load(Ordering::SeqCst) > 12);
}

/// What was reported as written to guest memory: address and length.
struct Log(Arc<Mutex<Vec<(u64, u64)>>>);

impl WriteObserver for Log {
    fn written(&self, address: u64, len: u64) {
        self.0.lock().push((address, len));
    }
}

#[test]
fn all_requests_are_under_way_and_end_in_any_order() {
    for transport in [Transport::PciMsix, Transport::Mmio] {
        let (late, disk) = Late::new(SIZE);
        let contents: Vec<u8> = (0..SIZE).map(|at| (at / 512) as u8 ^ 0x35).collect();
        disk.write_at(&contents, 0).unwrap();
        let blk = blk(Arc::new(disk));
        let mut guest = Guest::new(transport, blk.clone());
        let mut queue = guest.bring_up(u64::MAX, 256).remove(0);
        prime(&mut guest, &mut queue, &blk);
        let _held = late.hold();
        late.fail(Call::Read(5 * 512));
        let mut sent = HashMap::new();
        for sector in 0..32 {
            let buffers = buffers(&mut guest, READ, sector, &[], 512);
            sent.insert(queue.submit(&buffers), (sector, buffers));
        }
        guest.notify(0);
        assert_eq!(late.wait_for(32).len(), 32);
        let log = Arc::new(Mutex::new(Vec::new()));
        guest.memory.set_write_observer(Some(Box::new(Log(log.clone()))));
        for sector in (0..32).rev() {
            late.release(Call::Read(sector * 512));
            let (head, len) = guest.wait_used(&mut queue);
            let (seen, buffers) = sent.remove(&head).unwrap();
            assert_eq!((seen, len), (sector, 513));
            // What a read fills is reported, for a machine that moves and for translated code.
            assert!(log.lock().contains(&(buffers[1].address, 512)), "sector {sector}");
            let failed = sector == 5;
            assert_eq!(status(&guest, &buffers), u8::from(failed), "sector {sector}");
            assert!(failed || guest.bytes(buffers[1]) == [sector as u8 ^ 0x35; 512], "sector {sector}");
        }
        let c = blk.counters();
        assert_eq!(c.requests.load(Ordering::SeqCst), c.answered.load(Ordering::SeqCst));
        assert_eq!(c.errors.load(Ordering::SeqCst), 1);
        late.open();
    }
}

#[test]
fn a_driver_that_reuses_heads_gets_no_more_under_way_than_its_queue_is_long() {
    let (late, disk) = Late::new(SIZE);
    let blk = blk(Arc::new(disk));
    let mut guest = Guest::new(Transport::PciMsix, blk.clone());
    let mut queue = guest.bring_up(features::INDIRECT_DESC, 8).remove(0);
    let send = |guest: &mut Guest, queue: &mut DriverQueue| {
        for sector in 0..8 {
            let buffers = buffers(guest, READ, sector, &[], 512);
            let table = guest.allocate(64);
            queue.submit_indirect(table, &buffers);
        }
        guest.notify(0);
    };
    send(&mut guest, &mut queue);
    for _ in 0..8 {
        guest.wait_used(&mut queue);
    }
    assert_ne!(blk.counters().deferred.load(Ordering::SeqCst), 0);
    let _held = late.hold();
    send(&mut guest, &mut queue);
    late.wait_for(8);
    // The driver offers them again before it gets them back.
    for head in 0..8 {
        queue.publish(head);
    }
    guest.notify(0);
    late.release(Call::Read(0));
    while queue.used_index() == 8 {
        guest.wait_interrupt(Some(0));
    }
    // One has ended, so one more is begun.
    late.wait_for(8);
    assert_eq!(late.most(), 8);
    late.open();
    while queue.used_index() != 24 {
        guest.wait_interrupt(Some(0));
    }
    assert_eq!(blk.counters().answered.load(Ordering::SeqCst), 24);
    assert_eq!(blk.counters().errors.load(Ordering::SeqCst), 0);
}

struct Quiet;

impl Interrupt for Quiet {
    fn queue(&self, _: usize) {}
    fn config(&self) {}
    fn queue_event(&self, _: usize) -> io::Result<Option<OwnedFd>> {
        Ok(None)
    }
}

#[test]
fn a_stop_waits_for_all_that_is_under_way_and_answers_it() {
    let (late, disk) = Late::new(SIZE);
    let blk = blk(Arc::new(disk));
    // This test is the worker: nothing is answered unless it calls the handler.
    let mut guest = Guest::new(Transport::Mmio, blk.clone());
    let negotiated = guest.negotiate(0);
    let mut queue = guest.set_up_queue(0, 256, negotiated);
    let layout = QueueLayout {
        size: queue.size,
        descriptors: queue.descriptors,
        driver: queue.available,
        device: queue.used,
        event_idx: false,
        indirect: false,
    };
    let served = Queue::new(guest.memory.clone(), layout, (0, 0)).unwrap();
    let interrupt: Arc<dyn Interrupt> = Arc::new(Quiet);
    let activation = Activation {
        memory: &guest.memory,
        features: FLUSH,
        queues: &[Some(served.clone())],
        kicks: &[],
        interrupt: &interrupt,
    };
    let mut handler = blk.activate(activation).unwrap().remove(0).handler;
    let mut context = Context::detached(guest.memory.clone(), vec![Some(served)], interrupt.clone()).unwrap();
    handler.start(&mut context).unwrap();
    for _ in 0..12 {
        let buffers = buffers(&mut guest, READ, 0, &[], 512);
        queue.submit(&buffers);
    }
    handler.queue(0, &mut context).unwrap();
    handler.stop(&mut context);
    assert_eq!(queue.used_index(), 12);
    while queue.poll().is_some() {}
    // Again with writes that are held.
    handler.start(&mut context).unwrap();
    let _held = late.hold();
    let sent: Vec<_> = (0..8)
        .map(|sector| {
            let buffers = buffers(&mut guest, WRITE, sector, &[sector as u8 + 1; 512], 0);
            queue.submit(&buffers);
            buffers
        })
        .collect();
    handler.queue(0, &mut context).unwrap();
    late.wait_for(8);
    assert_eq!(queue.used_index(), 12, "nothing is answered before it has ended");
    std::thread::scope(|scope| {
        scope.spawn(|| late.open());
        handler.stop(&mut context);
    });
    assert_eq!(queue.used_index(), 20);
    assert!(sent.iter().all(|buffers| status(&guest, buffers) == 0));
    let c = blk.counters();
    assert_eq!(c.requests.load(Ordering::SeqCst), c.answered.load(Ordering::SeqCst));
    assert_eq!(c.writes.load(Ordering::SeqCst), 8);
}

#[test]
fn pause_and_reset_leave_nothing_under_way() {
    for reset in [false, true] {
        let (late, disk) = Late::new(SIZE);
        let blk = blk(Arc::new(disk.clone()));
        let mut guest = Guest::new(Transport::PciMsix, blk.clone());
        let mut queue = guest.bring_up(u64::MAX, 256).remove(0);
        prime(&mut guest, &mut queue, &blk);
        let before = queue.used_index();
        let _held = late.hold();
        for sector in 0..16 {
            let buffers = buffers(&mut guest, WRITE, sector, &[sector as u8 + 1; 512], 0);
            queue.submit(&buffers);
        }
        guest.notify(0);
        late.wait_for(16);
        std::thread::scope(|scope| {
            scope.spawn(|| late.open());
            if reset { guest.set_status(0) } else { guest.virtio().pause() }
        });
        assert_eq!(queue.used_index().wrapping_sub(before), 16);
        let mut contents = vec![0; 16 * 512];
        disk.read_at(&mut contents, 0).unwrap();
        assert!(contents.chunks(512).enumerate().all(|(n, sector)| sector == [n as u8 + 1; 512]));
        if !reset {
            guest.start();
            let buffers = buffers(&mut guest, READ, 3, &[], 512);
            queue.submit(&buffers);
            guest.notify(0);
            for _ in 0..17 {
                guest.wait_used(&mut queue);
            }
            assert_eq!(guest.bytes(buffers[1]), [4; 512]);
        }
    }
}

/// What the driver knows of one of its requests.
struct Sent {
    from: usize,
    effect: Option<Vec<u8>>,
    buffers: Vec<Buffer>,
}

/// Random requests on ranges that do not overlap, many at a time, and the same ones on an array.
fn exercise(blk: &Arc<Blk>, late: Option<&Late>, accepted: u64, seed: u64) {
    const UNIT: usize = 4096;
    const UNITS: u64 = 64;
    let mut state = seed;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut guest = Guest::new(Transport::PciMsix, blk.clone());
    let mut queue = guest.bring_up(accepted, 256).remove(0);
    let mut model = vec![0; SIZE as usize];
    let mut sent: HashMap<u16, Sent> = HashMap::new();
    let mut end = |guest: &Guest, sent: &mut HashMap<u16, Sent>, (head, _): (u16, u32)| {
        let Sent { from, effect, buffers } = sent.remove(&head).expect("each request is answered once");
        assert_eq!(status(guest, &buffers), 0);
        match effect {
            Some(bytes) => model[from..from + bytes.len()].copy_from_slice(&bytes),
            None if buffers.len() == 3 => {
                let seen = guest.bytes(buffers[1]);
                assert!(seen == model[from..from + seen.len()], "at {from}");
            }
            // What was answered before is durable when it is written through.
            None => {}
        }
        if let Some(late) = late
            && accepted & FLUSH == 0
        {
            let durable = late.durable();
            let busy = |at: usize| sent.values().any(|s| s.from == at && s.effect.is_some());
            for at in (0..UNITS as usize * UNIT).step_by(UNIT).filter(|at| !busy(*at)) {
                assert!(durable[at..at + UNIT] == model[at..at + UNIT], "{at} is not durable");
            }
        }
    };
    for n in 0..1200u32 {
        let from = random(UNITS) as usize * UNIT;
        while sent.len() == 24 || sent.values().any(|s| s.from == from) {
            guest.notify(0);
            let used = guest.wait_used(&mut queue);
            end(&guest, &mut sent, used);
        }
        let sector = from as u64 / 512;
        let (kind, out, want, effect) = match random(8) {
            0..3 => {
                let bytes: Vec<u8> = (0..UNIT).map(|at| (n as usize * 7 + at / 512) as u8).collect();
                (WRITE, bytes.clone(), 0, Some(bytes))
            }
            3 => {
                let ranges = [range(sector, 4, 1), range(sector + 4, 4, 0)].concat();
                (WRITE_ZEROES, ranges, 0, Some(vec![0; UNIT]))
            }
            // Zeros, or what was there: in our storages zeros.
            4 => (DISCARD, range(sector, 8, 0), 0, Some(vec![0; UNIT])),
            5 if random(4) == 0 => (SYNC, vec![], 0, None),
            _ => (READ, vec![], UNIT as u32, None),
        };
        let buffers = buffers(&mut guest, kind, sector, &out, want);
        // Flushes have no range.
        let from = if kind == SYNC { usize::MAX - n as usize } else { from };
        sent.insert(queue.submit(&buffers), Sent { from, effect, buffers });
        if n % 150 == 149 {
            guest.virtio().pause();
            let c = blk.counters();
            assert_eq!(c.requests.load(Ordering::SeqCst), c.answered.load(Ordering::SeqCst));
            guest.start();
        } else if random(4) == 0 {
            guest.notify(0);
        }
    }
    guest.notify(0);
    while !sent.is_empty() {
        let used = guest.wait_used(&mut queue);
        end(&guest, &mut sent, used);
    }
    assert_eq!(guest.status() & Status::NEEDS_RESET, 0);
    assert!(blk.counters().deferred.load(Ordering::SeqCst) > 100, "requests were under way together");
}

#[test]
fn random_requests_do_what_they_do_one_by_one() {
    let (late, disk) = Late::new(SIZE);
    exercise(&blk(Arc::new(disk)), Some(&late), u64::MAX, 1);
}

#[test]
fn writes_that_go_through_are_durable_when_they_are_answered() {
    let (late, disk) = Late::new(SIZE);
    let erase = 1 << 13 | 1 << 14;
    exercise(&blk(Arc::new(disk)), Some(&late), features::EVENT_IDX | erase, 2);
    assert!(late.flushes() > 100);
}

#[test]
fn a_flush_covers_what_was_answered_before() {
    let (late, disk) = Late::new(SIZE);
    let blk = blk(Arc::new(disk));
    let mut guest = Guest::new(Transport::PciMsix, blk.clone());
    let mut queue = guest.bring_up(u64::MAX, 256).remove(0);
    prime(&mut guest, &mut queue, &blk);
    let _held = late.hold();
    for sector in [1, 2] {
        let buffers = buffers(&mut guest, WRITE, sector, &[sector as u8; 512], 0);
        queue.submit(&buffers);
    }
    guest.notify(0);
    late.wait_for(2);
    late.release(Call::Write(512));
    guest.wait_used(&mut queue);
    late.wait_for(1);
    let sync = buffers(&mut guest, SYNC, 0, &[], 0);
    let head = queue.submit(&sync);
    guest.notify(0);
    // It is under way beside the other write.
    assert!(late.wait_for(2).contains(&Call::Flush));
    late.release(Call::Flush);
    assert_eq!(guest.wait_used(&mut queue).0, head);
    assert_eq!((status(&guest, &sync), late.durable()[512]), (0, 1));
    late.open();
    guest.wait_used(&mut queue);
}

fn raw(path: &Path, direct: bool) -> blockfmt::Disk {
    std::fs::File::create(path).unwrap().set_len(SIZE).unwrap();
    OpenOptions::new(Format::Raw).direct(direct).open(path).unwrap()
}

#[test]
fn files_with_and_without_the_page_cache_are_read_and_written_by_queues() {
    let dir = tempfile::tempdir().unwrap();
    for direct in [false, true] {
        let path = dir.path().join(format!("{direct}.raw"));
        let disk = raw(&path, direct);
        let slow = Arc::new(Slow { disk, offer: Offer::Queue, asked: Mutex::new(0) });
        exercise(&blk(slow.clone()), None, u64::MAX, 3);
        // A pause gives the queue back.
        assert!(*slow.asked.lock() > 1);
    }
}

#[test]
fn back_ends_without_a_queue_are_called_directly() {
    for offer in [Offer::None, Offer::Failure] {
        let (_, disk) = Late::new(SIZE);
        let slow = Arc::new(Slow { disk, offer, asked: Mutex::new(0) });
        let blk = blk(slow.clone());
        let mut guest = Guest::new(Transport::PciMsix, blk.clone());
        let mut queue = guest.bring_up(u64::MAX, 256).remove(0);
        for _ in 0..40 {
            let buffers = buffers(&mut guest, READ, 0, &[], 512);
            queue.submit(&buffers);
        }
        guest.notify(0);
        for _ in 0..40 {
            guest.wait_used(&mut queue);
        }
        assert_eq!(*slow.asked.lock(), 1, "a back-end that has none is not asked again");
        assert_eq!(blk.counters().deferred.load(Ordering::SeqCst), 0);
        assert_eq!(blk.counters().reads.load(Ordering::SeqCst), 40);
    }
}

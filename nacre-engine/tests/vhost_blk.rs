//! Exports of storage that answers when the test lets it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../daemons/tests/vhost_driver/mod.rs"]
mod vhost_driver;

use nacre_engine::blockfmt::storage::MemoryStorage;
use nacre_engine::blockfmt::{Format, Gather, OpenOptions, Scatter, Storage};
use nacre_engine::vhost_blk::{Device, Export};
use parking_lot::{Condvar, Mutex};
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use vhost_driver::{AVAILABLE, DATA, Driver, Guest, PAGE, SLOTS, WRITE};
use vm_memory::{Bytes, GuestAddress};

const PAGES: u64 = 1024;
/// Pages behind these, whose content matters to nobody.
const SCRATCH: u64 = 8;
const SECTORS: u64 = PAGE / 512;
/// A test whose requests do not arrive fails after this instead of waiting for ever.
const TOO_LONG: Duration = Duration::from_secs(60);

/// Kinds of requests.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Read(u64),
    Write(u64),
    Erase(u64),
    Flush,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    waiting: Vec<Operation>,
    /// Those that may go, and the errors that they end with.
    going: Vec<(Operation, Option<i32>)>,
}

/// A storage whose operations wait until they are let go.
#[derive(Debug)]
struct Gate {
    inner: MemoryStorage,
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    fn pass(&self, operation: Operation) -> io::Result<()> {
        let mut state = self.state.lock();
        if !state.closed {
            return Ok(());
        }
        state.waiting.push(operation);
        self.changed.notify_all();
        loop {
            let going = state.going.iter().position(|(going, _)| *going == operation);
            if going.is_some() || !state.closed {
                let place = state.waiting.iter().position(|waiting| *waiting == operation).unwrap();
                state.waiting.remove(place);
                let errno = going.and_then(|place| state.going.remove(place).1);
                self.changed.notify_all();
                return errno.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)));
            }
            self.changed.wait(&mut state);
        }
    }

    /// Waits until so many operations wait, and returns them.
    fn wait_for(&self, count: usize) -> Vec<Operation> {
        let mut state = self.state.lock();
        let few = |state: &mut State| state.waiting.len() < count;
        let result = self.changed.wait_while_for(&mut state, few, TOO_LONG);
        assert!(!result.timed_out(), "{:?} are under way, not {count}", state.waiting);
        state.waiting.clone()
    }

    fn waiting(&self) -> Vec<Operation> {
        self.state.lock().waiting.clone()
    }

    /// Lets an operation go, and waits until it is gone.
    fn let_go(&self, operation: Operation, errno: Option<i32>) {
        let mut state = self.state.lock();
        state.going.push((operation, errno));
        self.changed.notify_all();
        self.changed.wait_while(&mut state, |state| state.going.contains(&(operation, errno)));
    }

    fn close(&self) {
        self.state.lock().closed = true;
    }

    fn open(&self) {
        self.state.lock().closed = false;
        self.changed.notify_all();
    }
}

impl Storage for Gate {
    fn name(&self) -> String {
        "gate".into()
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }

    fn readv(&self, dst: Scatter<'_>, offset: u64) -> io::Result<()> {
        self.pass(Operation::Read(offset))?;
        self.inner.readv(dst, offset)
    }

    fn writev(&self, src: Gather<'_>, offset: u64) -> io::Result<()> {
        self.pass(Operation::Write(offset))?;
        self.inner.writev(src, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.pass(Operation::Flush)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.pass(Operation::Erase(offset))?;
        self.inner.write_zeroes(offset, len, unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.pass(Operation::Erase(offset))?;
        self.inner.discard(offset, len)
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.allocate(offset, len)
    }
}

/// Opens the gate at the end of a test, also of one that fails: the export waits for what is under way.
struct Opened(Arc<Gate>);

impl Drop for Opened {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// An export of a disk behind a gate. Page `n` of the disk is full of `n`.
struct Setup {
    guest: Guest,
    opened: Opened,
    export: Option<Export>,
    dir: tempfile::TempDir,
}

fn fill(page: u64) -> u8 {
    (page % 251 + 1) as u8
}

impl Setup {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..(PAGES + SCRATCH) * PAGE).map(|at| fill(at / PAGE)).collect();
        let inner = MemoryStorage::from_bytes(&bytes);
        let gate = Arc::new(Gate { inner, state: Mutex::default(), changed: Condvar::new() });
        let disk = OpenOptions::new(Format::Raw).open_storage(gate.clone(), "gate").unwrap();
        let device = Device::new(disk, "gate", false, 2).unwrap();
        let export = Some(Export::start(&dir.path().join("vhost"), device).unwrap());
        Setup { guest: Guest::new(), opened: Opened(gate), export, dir }
    }

    fn gate(&self) -> Arc<Gate> {
        self.opened.0.clone()
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("vhost")
    }

    fn connect(&mut self, recorded: bool) -> Driver {
        let socket = self.socket();
        match recorded {
            true => Driver::connect_with_record(&socket, &mut self.guest),
            false => Driver::connect(&socket, &self.guest, false),
        }
    }

    /// Makes a request of a slot's page of memory and a page of the disk available.
    fn submit(&mut self, slot: u16, kind: u32, page: u64) {
        let data = data(slot);
        match kind {
            IN => self.guest.submit_in(0, slot, (IN, page * SECTORS), (data, PAGE as u32), WRITE),
            OUT => self.guest.submit_in(0, slot, (OUT, page * SECTORS), (data, PAGE as u32), 0),
            FLUSH => self.guest.submit_in(0, slot, (FLUSH, 0), (0, 0), 0),
            kind => {
                self.guest.put(data, page * SECTORS);
                self.guest.put(data + 8, SECTORS as u32);
                self.guest.put(data + 12, 0u32);
                self.guest.submit_in(0, slot, (kind, 0), (data, 16), 0);
            }
        }
    }

    fn page(&self, slot: u16) -> Vec<u8> {
        let mut bytes = vec![0; PAGE as usize];
        self.guest.memory.read_slice(&mut bytes, GuestAddress(data(slot))).unwrap();
        bytes
    }

    /// Waits until the driver was told of so many more requests than `from`, and returns their slots.
    fn completed(&self, driver: &Driver, from: u16, count: u16) -> Vec<u16> {
        while self.guest.used(0).wrapping_sub(from) < count {
            driver.wait(0);
        }
        (0..count).map(|n| self.guest.done(0, from.wrapping_add(n))).collect()
    }

    /// Closes the gate and lets requests through until the export has learnt that they take time, of both kinds.
    fn become_slow(&mut self, driver: &Driver) {
        self.become_slow_for(driver, IN);
        self.become_slow_for(driver, WRITE_ZEROES);
    }

    fn become_slow_for(&mut self, driver: &Driver, kind: u32) {
        let gate = self.gate();
        gate.close();
        let mut seen = self.guest.used(0);
        (0..SCRATCH as u16).for_each(|slot| self.submit(slot, kind, PAGES + u64::from(slot)));
        driver.kicks[0].write(1).unwrap();
        // Two of them wait at once when the thread of the queue does not do them itself.
        loop {
            match gate.waiting()[..] {
                [] => std::thread::yield_now(),
                [single] => gate.let_go(single, None),
                _ => break,
            }
            while seen != self.guest.used(0) {
                let slot = self.guest.done(0, seen);
                seen = seen.wrapping_add(1);
                self.submit(slot, kind, PAGES + u64::from(slot));
                driver.kicks[0].write(1).unwrap();
            }
        }
        gate.open();
        driver.finish(&self.guest, 0);
        gate.close();
    }
}

/// Where the page of a slot is in the guest's memory.
fn data(slot: u16) -> u64 {
    DATA + u64::from(slot) * PAGE
}

#[test]
fn the_whole_depth_is_under_way_and_ends_in_any_order() {
    for recorded in [true, false] {
        let mut setup = Setup::new();
        let gate = setup.gate();
        let driver = setup.connect(recorded);
        setup.become_slow(&driver);
        let before = setup.guest.used(0);
        let page = |slot: u16| 100 + u64::from(slot);
        (0..SLOTS).for_each(|slot| setup.submit(slot, IN, page(slot)));
        driver.kicks[0].write(1).unwrap();
        gate.wait_for(SLOTS.into());
        let order: Vec<u16> = (0..SLOTS).map(|n| (n * 5 + 7) % SLOTS).collect();
        for (n, slot) in order.iter().enumerate() {
            gate.let_go(Operation::Read(page(*slot) * PAGE), None);
            if recorded {
                assert_eq!(setup.completed(&driver, before, n as u16 + 1).last(), Some(slot));
                let left = |slot: &u16| setup.guest.in_flight(0, *slot);
                assert!(order[n + 1..].iter().all(left), "what is under way is recorded");
            }
        }
        let told = setup.completed(&driver, before, SLOTS);
        // Without a record the used index has to say what was not completed.
        assert_eq!(told, if recorded { order } else { (0..SLOTS).collect() });
        for slot in 0..SLOTS {
            assert_eq!(setup.guest.status(0, slot), 0);
            assert!(setup.page(slot) == [fill(page(slot)); PAGE as usize]);
            assert!(!recorded || !setup.guest.in_flight(0, slot));
        }
    }
}

#[test]
fn errors_belong_to_their_requests() {
    let mut setup = Setup::new();
    let gate = setup.gate();
    let driver = setup.connect(true);
    setup.become_slow(&driver);
    for slot in 0..SLOTS {
        let kind = [IN, OUT, DISCARD, WRITE_ZEROES][usize::from(slot % 4)];
        setup.submit(slot, kind, 200 + u64::from(slot));
    }
    driver.kicks[0].write(1).unwrap();
    for operation in gate.wait_for(SLOTS.into()) {
        let (Operation::Read(at) | Operation::Write(at) | Operation::Erase(at)) = operation else { panic!() };
        let fails = (at / PAGE).is_multiple_of(3);
        gate.let_go(operation, fails.then_some(5)); // EIO
    }
    driver.finish(&setup.guest, 0);
    for slot in 0..SLOTS {
        let fails = (200 + slot).is_multiple_of(3);
        assert_eq!(setup.guest.status(0, slot), u8::from(fails), "request {slot}");
    }
}

/// How a front-end makes a queue end.
#[derive(Clone, Copy, Debug)]
enum End {
    Stop,
    Reset,
    Leave,
    Remove,
}

#[test]
fn whoever_ends_a_queue_waits_for_what_is_under_way() {
    for end in [End::Stop, End::Reset, End::Leave, End::Remove] {
        let mut setup = Setup::new();
        let gate = setup.gate();
        let driver = setup.connect(true);
        setup.become_slow(&driver);
        let before = setup.guest.used(0);
        let available = u32::from(setup.guest.available[0]);
        (0..8).for_each(|slot| setup.submit(slot, OUT, 300 + u64::from(slot)));
        driver.kicks[0].write(1).unwrap();
        gate.wait_for(8);
        for slot in 1..8 {
            gate.let_go(Operation::Write((300 + slot) * PAGE), None);
        }
        setup.completed(&driver, before, 7);
        let export = setup.export.take().unwrap();
        std::thread::scope(|scope| {
            let (socket, guest) = (setup.socket(), &setup.guest);
            let ending = scope.spawn(move || {
                let rest = match end {
                    End::Stop => {
                        let next = driver.stop();
                        assert_eq!(next[0], available + 8);
                        (None, Some(export))
                    }
                    End::Reset => {
                        driver.reset();
                        (Some(driver), Some(export))
                    }
                    End::Leave => {
                        drop(driver);
                        drop(Driver::connect(&socket, guest, false)); // the next one is served
                        (None, Some(export))
                    }
                    End::Remove => {
                        drop(export);
                        (Some(driver), None)
                    }
                };
                (guest.used(0), rest)
            });
            for _ in 0..50 {
                std::thread::sleep(Duration::from_millis(1));
                if ending.is_finished() {
                    gate.open(); // or the end of the export would wait, too
                    panic!("{end:?} does not wait");
                }
            }
            gate.open();
            let (used, rest) = ending.join().unwrap();
            assert_eq!(used, before.wrapping_add(8), "{end:?}");
            drop(rest);
        });
        assert!((0..8).all(|slot| setup.guest.status(0, slot) == 0 && !setup.guest.in_flight(0, slot)));
    }
}

#[test]
fn a_device_that_was_reset_is_set_up_again_with_other_memory() {
    let mut setup = Setup::new();
    let gate = setup.gate();
    let driver = setup.connect(true);
    setup.become_slow(&driver);
    let before = setup.guest.used(0);
    (0..4).for_each(|slot| setup.submit(slot, IN, 400 + u64::from(slot)));
    driver.kicks[0].write(1).unwrap();
    gate.wait_for(4);
    driver.set_memory(&setup.guest);
    (4..8).for_each(|slot| setup.submit(slot, IN, 400 + u64::from(slot)));
    driver.kicks[0].write(1).unwrap();
    gate.wait_for(8);
    gate.open();
    setup.completed(&driver, before, 8);
    assert!((0..8).all(|slot| setup.page(slot) == [fill(400 + u64::from(slot)); PAGE as usize]));
    driver.reset();
    // Nothing is served until the rings are set up.
    setup.submit(0, IN, 500);
    driver.kicks[0].write(1).unwrap();
    let driver = {
        drop(driver);
        Driver::connect(&setup.socket(), &setup.guest, true)
    };
    driver.finish(&setup.guest, 0);
    assert!(setup.page(0) == [fill(500); PAGE as usize]);
}

#[test]
fn a_ring_that_was_given_up_is_replaced_when_nothing_of_it_is_under_way() {
    let mut setup = Setup::new();
    let gate = setup.gate();
    let mut driver = setup.connect(true);
    setup.become_slow(&driver);
    let before = setup.guest.used(0);
    (0..8).for_each(|slot| setup.submit(slot, OUT, 700 + u64::from(slot)));
    driver.kicks[0].write(1).unwrap();
    gate.wait_for(8);
    // An index far ahead; it is right again when the first request has ended and the ring was looked at.
    let index = setup.guest.available[0];
    setup.guest.put(AVAILABLE + 2, index.wrapping_add(0x7fff));
    gate.let_go(Operation::Write(700 * PAGE), None);
    setup.completed(&driver, before, 1);
    driver.kicks[0].write(1).unwrap();
    while !driver.is_kick_taken(0) {
        std::thread::yield_now();
    }
    setup.guest.put(AVAILABLE + 2, index);
    std::thread::scope(|scope| {
        let starting = scope.spawn(move || {
            driver.start_again(0);
            driver
        });
        for _ in 0..50 {
            std::thread::sleep(Duration::from_millis(1));
            if starting.is_finished() || gate.waiting().len() != 7 {
                gate.open(); // or the end of the export would wait, too
                panic!("a new ring begins beside requests of the old one");
            }
        }
        gate.open();
        // The record names what the driver was not told of: it is done once more.
        setup.completed(&starting.join().unwrap(), before, 8);
    });
    assert!((0..8).all(|slot| setup.guest.status(0, slot) == 0 && !setup.guest.in_flight(0, slot)));
    assert_eq!(setup.guest.used(0), before.wrapping_add(8));
}

#[test]
fn changes_are_durable_before_a_driver_that_does_not_flush_knows_of_them() {
    let mut setup = Setup::new();
    let gate = setup.gate();
    let mut driver = setup.connect(true);
    setup.become_slow(&driver);
    driver.set_flushing(false);
    let before = setup.guest.used(0);
    for (slot, kind) in [OUT, OUT, WRITE_ZEROES, DISCARD, OUT, OUT].into_iter().enumerate() {
        setup.submit(slot as u16, kind, 600 + slot as u64);
    }
    driver.kicks[0].write(1).unwrap();
    for change in gate.wait_for(6) {
        assert_ne!(change, Operation::Flush);
        gate.let_go(change, None);
    }
    assert!(gate.wait_for(1).iter().all(|operation| *operation == Operation::Flush));
    assert_eq!(setup.guest.used(0), before);
    gate.open();
    driver.finish(&setup.guest, 0);
    assert!((0..6).all(|slot| setup.guest.status(0, slot) == 0));
    let mut zeros = [1; PAGE as usize];
    gate.inner.readv(Scatter::new(&mut zeros), 602 * PAGE).unwrap();
    assert!(zeros == [0; PAGE as usize]);
}

/// What the storage is left to do to a page.
#[derive(Clone, Copy)]
enum Effect {
    Read,
    Become(u8),
    Discard,
    Flush,
}

#[test]
fn random_requests_at_depth_behave_like_an_array() {
    for recorded in [true, false] {
        let mut setup = Setup::new();
        let gate = setup.gate();
        let mut driver = setup.connect(recorded);
        setup.become_slow(&driver);
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut below = move |limit: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random >> 11) % limit
        };
        // What each page is full of; `None` after a discard: zeros or what was there.
        let mut model: Vec<Option<u8>> = (0..PAGES).map(|page| Some(fill(page))).collect();
        let mut pending: HashMap<u16, (u64, Effect)> = HashMap::new();
        let mut most = 0;
        let mut seen = setup.guest.used(0);
        for round in 0..4000u32 {
            while pending.len() < usize::from(SLOTS) {
                let slot = (0..SLOTS).find(|slot| !pending.contains_key(slot)).unwrap();
                let page = below(PAGES);
                if pending.values().any(|(other, _)| *other == page) {
                    continue;
                }
                let byte = below(256) as u8;
                let (kind, effect) = match below(10) {
                    0..4 => (IN, Effect::Read),
                    4..7 => (OUT, Effect::Become(byte)),
                    7 => (WRITE_ZEROES, Effect::Become(0)),
                    8 => (DISCARD, Effect::Discard),
                    _ => (FLUSH, Effect::Flush),
                };
                setup.guest.memory.write_slice(&[byte; PAGE as usize], GuestAddress(data(slot))).unwrap();
                setup.submit(slot, kind, page);
                pending.insert(slot, (page, effect));
            }
            driver.kicks[0].write(1).unwrap();
            let waiting = gate.waiting();
            most = most.max(waiting.len());
            if waiting.is_empty() {
                std::thread::yield_now(); // they are on the way to the gate or to the driver
            } else {
                gate.let_go(waiting[below(waiting.len() as u64) as usize], None);
            }
            let last = round % 500 == 499;
            if last {
                // Everything ends, and another session goes on.
                gate.open();
                driver.finish(&setup.guest, 0);
                gate.close();
            }
            while seen != setup.guest.used(0) {
                let slot = setup.guest.done(0, seen);
                seen = seen.wrapping_add(1);
                assert_eq!(setup.guest.status(0, slot), 0);
                let (page, effect) = pending.remove(&slot).expect("each request ends once");
                let known = &mut model[page as usize];
                match effect {
                    Effect::Read => {
                        let bytes = setup.page(slot);
                        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page} is mixed");
                        assert_eq!(bytes[0], known.unwrap_or(bytes[0]), "page {page}");
                        *known = Some(bytes[0]);
                    }
                    Effect::Become(byte) => *known = Some(byte),
                    Effect::Discard => *known = None,
                    Effect::Flush => {}
                }
            }
            if last {
                assert!(pending.is_empty());
                gate.open();
                drop(driver);
                driver = setup.connect(recorded);
                setup.become_slow(&driver);
                seen = setup.guest.used(0);
            }
        }
        assert!(most > usize::from(SLOTS) / 2, "only {most} requests were under way at once");
    }
}

//! What every device must do, whatever it is, over every transport.
//!
//! A device under test is a constructor and one request that it answers without outside help: its queue, and buffers
//! with the used length expected (or that the device just keeps the buffers, as receive queues do).

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Once};

use vmm_core::devices::virtio::{Status, VirtioDevice, features};

use crate::driver::{Buffer, DriverQueue, Guest, TRANSPORTS, Transport};
use crate::platform::wait;

/// One kind of device for the suite.
pub struct Subject {
    pub make: fn() -> Arc<dyn VirtioDevice>,
    pub device_type: u32,
    /// A queue that answers by itself.
    pub queue: u16,
    /// Features without which that queue does not exist.
    pub needs: u64,
    /// A request for it and the used length expected.
    pub request: fn(&mut Guest) -> (Vec<Buffer>, u32),
}

const ALL: u64 = u64::MAX;

/// Runs the whole suite.
pub fn run(subject: &Subject) {
    for transport in TRANSPORTS {
        for check in [
            identifies_itself,
            refuses_bad_features,
            waits_for_the_driver,
            answers,
            answers_through_indirect_tables,
            suppresses_interrupts_by_index,
            suppresses_interrupts_by_flag,
            survives_malformed_chains,
            survives_malformed_queues,
            resets_in_flight,
            resets_one_queue,
            pauses_and_resumes,
            saves_and_restores,
            ignores_wild_accesses,
            survives_random_requests,
        ] {
            check(subject, transport);
        }
    }
    moves_its_doorbells(subject);
}

fn guest(subject: &Subject, transport: Transport) -> Guest {
    Guest::new(transport, (subject.make)())
}

fn take(subject: &Subject, guest: &mut Guest, queues: &mut [DriverQueue]) {
    let (buffers, expected) = (subject.request)(guest);
    let len = guest.exchange(&mut queues[usize::from(subject.queue)], &buffers);
    assert_eq!(len, expected, "{:?}", guest.transport);
}

fn identifies_itself(subject: &Subject, transport: Transport) {
    let guest = guest(subject, transport);
    assert_eq!(guest.virtio().device().device_type(), subject.device_type);
    assert_eq!(guest.status(), 0);
    assert!(guest.queues() > subject.queue);
    for index in 0..guest.queues() {
        assert!(guest.queue_max(index).is_power_of_two());
    }
    let common = features::VERSION_1 | features::INDIRECT_DESC | features::EVENT_IDX;
    assert_eq!(guest.offered() & common, common);
}

fn refuses_bad_features(subject: &Subject, transport: Transport) {
    let guest = guest(subject, transport);
    let begun = Status::ACKNOWLEDGE | Status::DRIVER;
    for bad in [0, features::VERSION_1 | 1 << 63, guest.offered() & !features::VERSION_1] {
        guest.set_status(0);
        guest.set_status(begun);
        guest.accept(bad);
        guest.set_status(begun | Status::FEATURES_OK);
        assert_eq!(guest.status(), begun, "{bad:#x}");
        // A driver that goes on regardless does not get a device.
        guest.set_status(begun | Status::DRIVER_OK);
        assert_ne!(guest.status() & Status::NEEDS_RESET, 0);
    }
    guest.set_status(0);
    assert_eq!(guest.status(), 0);
}

/// A notification before DRIVER_OK moves nothing; the buffer is served afterwards.
fn waits_for_the_driver(subject: &Subject, transport: Transport) {
    let mut guest = guest(subject, transport);
    let features = guest.negotiate(ALL);
    let mut queues: Vec<_> = (0..guest.queues()).map(|i| guest.set_up_queue(i, 16, features)).collect();
    let (buffers, expected) = (subject.request)(&mut guest);
    let queue = &mut queues[usize::from(subject.queue)];
    queue.submit(&buffers);
    guest.notify(subject.queue);
    assert_eq!(queue.used_index(), 0, "served before DRIVER_OK");
    guest.driver_ok();
    assert_eq!(guest.wait_used(queue).1, expected);
}

fn answers(subject: &Subject, transport: Transport) {
    for features in [0, features::EVENT_IDX, ALL].map(|f| f | subject.needs) {
        for size in [4, 16, 256] {
            let mut guest = guest(subject, transport);
            let mut queues = guest.bring_up(features, size);
            // More than once around the ring.
            for _ in 0..2 * size.min(20) + 3 {
                take(subject, &mut guest, &mut queues);
            }
        }
    }
}

fn answers_through_indirect_tables(subject: &Subject, transport: Transport) {
    let mut guest = guest(subject, transport);
    let mut queues = guest.bring_up(ALL, 4);
    let queue = &mut queues[usize::from(subject.queue)];
    for _ in 0..9 {
        let (buffers, expected) = (subject.request)(&mut guest);
        let table = guest.allocate(16 * 16);
        queue.submit_indirect(table, &buffers);
        guest.notify(subject.queue);
        assert_eq!(guest.wait_used(queue).1, expected);
    }
}

fn suppresses_interrupts_by_index(subject: &Subject, transport: Transport) {
    if transport != Transport::PciMsix {
        return;
    }
    let mut guest = guest(subject, transport);
    let mut queues = guest.bring_up(features::EVENT_IDX | subject.needs, 16);
    let queue = &mut queues[usize::from(subject.queue)];
    queue.set_used_event(2);
    for done in 1..=3 {
        let (buffers, _) = (subject.request)(&mut guest);
        queue.submit(&buffers);
        guest.notify(subject.queue);
        if done == 3 {
            let vector = guest.vm.vectors.lock()[usize::from(subject.queue) + 1].clone();
            wait(&vector.event);
        }
        while queue.used_index() != done {
            std::thread::yield_now();
        }
        while queue.poll_quietly().is_some() {}
    }
    assert_eq!(guest.interrupts(subject.queue), 1);
}

fn suppresses_interrupts_by_flag(subject: &Subject, transport: Transport) {
    if transport != Transport::PciMsix {
        return;
    }
    let mut guest = guest(subject, transport);
    let mut queues = guest.bring_up(subject.needs, 16);
    let queue = &mut queues[usize::from(subject.queue)];
    guest.memory.store_u16(queue.available, 1, Ordering::SeqCst).unwrap();
    let (buffers, _) = (subject.request)(&mut guest);
    queue.submit(&buffers);
    guest.notify(subject.queue);
    while queue.poll_quietly().is_none() {
        std::thread::yield_now();
    }
    guest.lifecycle().pause().unwrap();
    assert_eq!(guest.interrupts(subject.queue), 0);
}

/// Each malformed chain makes the device ask for a reset, after which it works again.
fn survives_malformed_chains(subject: &Subject, transport: Transport) {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    type Break = fn(&mut Guest, &DriverQueue) -> u16;
    let out_of_ram: Break = |_, q| {
        q.describe(q.descriptors, 0, u64::MAX - 8, 16, 0, 0);
        0
    };
    let over_the_end: Break = |g, q| {
        q.describe(q.descriptors, 0, g.memory.total_size() - 8, 16, 0, 0);
        0
    };
    let huge: Break = |_, q| {
        q.describe(q.descriptors, 0, 0x1000, u32::MAX, WRITE, 0);
        0
    };
    let loops: Break = |_, q| {
        q.describe(q.descriptors, 0, 0x1000, 16, NEXT, 1);
        q.describe(q.descriptors, 1, 0x1000, 16, NEXT, 0);
        0
    };
    let next_outside: Break = |_, q| {
        q.describe(q.descriptors, 0, 0x1000, 16, NEXT, q.size);
        0
    };
    let head_outside: Break = |_, q| q.size;
    let readable_after_writable: Break = |_, q| {
        q.describe(q.descriptors, 0, 0x1000, 16, NEXT | WRITE, 1);
        q.describe(q.descriptors, 1, 0x1000, 16, 0, 0);
        0
    };
    let indirect_outside: Break = |g, q| {
        q.describe(q.descriptors, 0, g.memory.total_size() - 16, 32, INDIRECT, 0);
        0
    };
    let indirect_ragged: Break = |_, q| {
        q.describe(q.descriptors, 0, 0x1000, 24, INDIRECT, 0);
        0
    };
    let indirect_empty: Break = |_, q| {
        q.describe(q.descriptors, 0, 0x1000, 0, INDIRECT, 0);
        0
    };
    let indirect_too_long: Break = |_, q| {
        q.describe(q.descriptors, 0, 0x1000, 16 * 1025, INDIRECT, 0);
        0
    };
    let indirect_nested: Break = |g, q| {
        let table = g.allocate(64);
        q.describe(table, 0, table, 16, INDIRECT, 0);
        q.describe(q.descriptors, 0, table, 64, INDIRECT, 0);
        0
    };
    let indirect_with_next: Break = |g, q| {
        let table = g.allocate(64);
        q.describe(table, 0, 0x1000, 16, 0, 0);
        q.describe(q.descriptors, 0, table, 64, INDIRECT | NEXT, 1);
        0
    };
    let indirect_loop: Break = |g, q| {
        let table = g.allocate(64);
        q.describe(table, 0, 0x1000, 16, NEXT, 1);
        q.describe(table, 1, 0x1000, 16, NEXT, 0);
        q.describe(q.descriptors, 0, table, 64, INDIRECT, 0);
        0
    };
    let mut guest = guest(subject, transport);
    for (i, make) in [
        out_of_ram,
        over_the_end,
        huge,
        loops,
        next_outside,
        head_outside,
        readable_after_writable,
        indirect_outside,
        indirect_ragged,
        indirect_empty,
        indirect_too_long,
        indirect_nested,
        indirect_with_next,
        indirect_loop,
    ]
    .into_iter()
    .enumerate()
    {
        let mut queues = guest.bring_up(ALL, 8);
        let queue = &mut queues[usize::from(subject.queue)];
        let head = make(&mut guest, queue);
        queue.publish(head);
        guest.notify(subject.queue);
        guest.wait_needs_reset();
        assert_eq!(queue.used_index(), 0, "case {i}");
    }
    // Indirect descriptors are refused when they were not negotiated.
    let mut queues = guest.bring_up(subject.needs, 8);
    let (buffers, _) = (subject.request)(&mut guest);
    let table = guest.allocate(4096);
    queues[usize::from(subject.queue)].submit_indirect(table, &buffers);
    guest.notify(subject.queue);
    guest.wait_needs_reset();
    // So is an available index that jumps.
    let queues = guest.bring_up(ALL, 8);
    queues[usize::from(subject.queue)].set_available_index(9);
    guest.notify(subject.queue);
    guest.wait_needs_reset();
    let mut queues = guest.bring_up(ALL, 8);
    take(subject, &mut guest, &mut queues);
}

fn survives_malformed_queues(subject: &Subject, transport: Transport) {
    type Break = fn(&mut DriverQueue);
    let cases: [Break; 7] = [
        |q| q.descriptors = u64::MAX - 0xfff,
        |q| q.available = 1 << 40,
        |q| q.used = crate::driver::MEMORY - 4,
        |q| q.descriptors += 8,
        |q| q.available += 1,
        |q| q.used += 2,
        |q| q.size = 7,
    ];
    let mut guest = guest(subject, transport);
    for case in cases {
        let features = guest.negotiate(ALL);
        let max = guest.queue_max(subject.queue);
        let mut queue = guest.set_up_queue(subject.queue, 8, features);
        // Set it up again with the fault.
        guest.negotiate(ALL);
        case(&mut queue);
        guest.enable_queue(&queue);
        guest.driver_ok();
        assert_ne!(guest.status() & Status::NEEDS_RESET, 0);
        guest.negotiate(ALL);
        queue.size = max.saturating_mul(2);
        guest.enable_queue(&queue);
        guest.driver_ok();
        assert_ne!(guest.status() & Status::NEEDS_RESET, 0);
    }
    let mut queues = guest.bring_up(ALL, 8);
    take(subject, &mut guest, &mut queues);
}

/// A reset right after a notification leaves nothing behind that would touch the old rings.
fn resets_in_flight(subject: &Subject, transport: Transport) {
    let mut guest = guest(subject, transport);
    for _ in 0..20 {
        let mut queues = guest.bring_up(ALL, 8);
        let (buffers, _) = (subject.request)(&mut guest);
        let queue = &mut queues[usize::from(subject.queue)];
        queue.submit(&buffers);
        guest.notify(subject.queue);
        guest.set_status(0);
        assert_eq!(guest.status(), 0);
        let used = queue.used_index();
        guest.notify(subject.queue);
        assert_eq!(queue.used_index(), used, "the old ring is still written");
    }
    let mut queues = guest.bring_up(ALL, 8);
    take(subject, &mut guest, &mut queues);
}

fn resets_one_queue(subject: &Subject, transport: Transport) {
    let mut guest = guest(subject, transport);
    let mut queues = guest.bring_up(ALL, 8);
    for _ in 0..3 {
        take(subject, &mut guest, &mut queues);
        guest.reset_queue(subject.queue);
        let old = &mut queues[usize::from(subject.queue)];
        let used = old.used_index();
        let (buffers, _) = (subject.request)(&mut guest);
        old.submit(&buffers);
        guest.notify(subject.queue);
        assert_eq!(old.used_index(), used, "a disabled queue is served");
        queues[usize::from(subject.queue)] = guest.set_up_queue(subject.queue, 4, ALL & guest.offered());
        assert_eq!(guest.status() & Status::NEEDS_RESET, 0);
    }
    take(subject, &mut guest, &mut queues);
}

fn pauses_and_resumes(subject: &Subject, transport: Transport) {
    let mut guest = guest(subject, transport);
    let mut queues = guest.bring_up(ALL, 8);
    for _ in 0..5 {
        take(subject, &mut guest, &mut queues);
        guest.lifecycle().pause().unwrap();
        let (buffers, expected) = (subject.request)(&mut guest);
        let queue = &mut queues[usize::from(subject.queue)];
        let used = queue.used_index();
        queue.submit(&buffers);
        guest.notify(subject.queue);
        assert_eq!(queue.used_index(), used, "a paused device works");
        guest.start();
        assert_eq!(guest.wait_used(queue).1, expected);
    }
}

/// The state moves to another device of the same kind over the same memory.
fn saves_and_restores(subject: &Subject, transport: Transport) {
    let mut first = guest(subject, transport);
    let mut queues = first.bring_up(ALL, 8);
    for _ in 0..5 {
        take(subject, &mut first, &mut queues);
    }
    assert!(first.lifecycle().save().is_err(), "saved while it works");
    first.lifecycle().pause().unwrap();
    // In flight while the state moves.
    let (buffers, expected) = (subject.request)(&mut first);
    queues[usize::from(subject.queue)].submit(&buffers);
    let saved = first.lifecycle().save().unwrap();
    let text = serde_json::to_string(&saved).unwrap();
    let mut second = Guest::with_memory(transport, (subject.make)(), first.memory.clone());
    second.lifecycle().pause().unwrap();
    second.lifecycle().restore(&serde_json::from_str(&text).unwrap()).unwrap();
    second.adopt(&first);
    drop(first);
    second.start();
    assert_eq!(second.wait_used(&mut queues[usize::from(subject.queue)]).1, expected);
    take(subject, &mut second, &mut queues);
    second.lifecycle().pause().unwrap();
    for bad in ["null", "{}", "[1]", r#"{"virtio":{}}"#] {
        assert!(second.lifecycle().restore(&serde_json::from_str(bad).unwrap()).is_err());
    }
}

/// Accesses of every width everywhere: nothing panics, nothing hangs.
fn ignores_wild_accesses(subject: &Subject, transport: Transport) {
    let mut guest = guest(subject, transport);
    drop(guest.bring_up(ALL, 8));
    for address in guest.window().step_by(1) {
        for len in [1, 2, 4, 8] {
            let mut data = [0; 8];
            guest.mmio.read(address, &mut data[..len]);
            guest.write(address, &vec![0xff; len]);
        }
        if address % 64 == 0 {
            guest.write(address, &[0; 4]);
        }
    }
    guest.repair();
    let mut queues = guest.bring_up(ALL, 8);
    take(subject, &mut guest, &mut queues);
}

/// Counts panics of device threads, which end them without a trace in the device's state.
fn worker_panics() -> usize {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let thread = std::thread::current();
            if thread.name().is_some_and(|n| n.starts_with("virtio-") || n.starts_with("vhost-")) {
                PANICS.fetch_add(1, Ordering::SeqCst);
            }
            before(info);
        }));
    });
    PANICS.load(Ordering::SeqCst)
}

/// Well-formed chains with random contents on every queue: answered, ignored or refused, but never worse.
fn survives_random_requests(subject: &Subject, transport: Transport) {
    let before = worker_panics();
    let mut guest = guest(subject, transport);
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    let area = guest.allocate(64 << 10);
    for _ in 0..12 {
        let mut queues = guest.bring_up(ALL, 64);
        for _ in 0..8 {
            let noise: Vec<u8> =
                (0..4096).map(|_| if random(3) == 0 { random(256) as u8 } else { random(4) as u8 }).collect();
            guest.memory.write(area, &noise).unwrap();
            for queue in &mut queues {
                let readable = random(3);
                let buffers: Vec<_> = (0..readable + random(3))
                    .map(|i| Buffer {
                        address: area + random(2048),
                        len: random(80) as u32,
                        writable: i >= readable,
                    })
                    .collect();
                if !buffers.is_empty() && queue.free() >= buffers.len() {
                    queue.submit(&buffers);
                    guest.notify(queue.index);
                }
            }
        }
        // Waits for the workers, so that one that hangs is seen.
        guest.lifecycle().pause().unwrap();
        guest.start();
    }
    let mut queues = guest.bring_up(ALL, 8);
    take(subject, &mut guest, &mut queues);
    assert_eq!(worker_panics(), before, "a device thread panicked");
}

/// Doorbells follow the BAR and go away with the device.
fn moves_its_doorbells(subject: &Subject) {
    let mut guest = guest(subject, Transport::PciMsix);
    let count = usize::from(guest.queues());
    guest.move_bar(0xcabc_0000);
    assert_eq!(guest.vm.doorbells(), 0, "no driver is ready");
    let mut queues = guest.bring_up(ALL, 8);
    assert_eq!(guest.vm.doorbells(), count);
    take(subject, &mut guest, &mut queues);
    guest.move_bar(0xcacc_0000);
    assert_eq!(guest.vm.doorbells(), count);
    take(subject, &mut guest, &mut queues);
    let vm = guest.vm.clone();
    drop(guest);
    assert_eq!(vm.doorbells(), 0);
    assert_eq!(Arc::strong_count(&vm), 1, "the device keeps the machine alive");
}

//! The vhost-user back-end against a small front-end: traffic, hostile rings, reconnection, migration. With rings of
//! either layout where that makes a difference.
#![expect(clippy::unwrap_used, reason = "a test ends where a step fails")]

mod common;
#[path = "common/vhost_guest.rs"]
mod vhost_guest;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::{drain, port, udp};
use vhost_guest::{
    BUFFERS, Driver, GUEST, Guest, INDIRECT, MEMORY, NEXT, SIZE, USER, WRITE, device_part, driver_part,
    packed_base, pair, ring,
};
use vswitch::{
    Burst, Endpoint, Offload, Port, PortConfig, PortId, StreamMode, Switch, VhostUserOptions, VhostUserPort,
};

const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 28 | 1 << 15;
const PACKED: u64 = 1 << 34;
/// The features with rings of each layout.
const LAYOUTS: [u64; 2] = [FEATURES, FEATURES | PACKED];
const LOG_ALL: u64 = 1 << 26;

struct Fixture {
    switch: Switch,
    guest: PortId,
    end: Endpoint,
    dir: tempfile::TempDir,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let switch = common::switch();
    let options = VhostUserOptions::new(dir.path().join("s"), StreamMode::Listen);
    let options = VhostUserOptions { packed_rings: true, ..options };
    let guest =
        switch.add_port("guest", VhostUserPort::new(&options).unwrap(), PortConfig::default()).unwrap();
    let (_, end) = port(&switch, "end", PortConfig::default());
    Fixture { switch, guest, end, dir }
}

impl Fixture {
    fn connect(&self, features: u64, before: Option<(File, Driver)>) -> Guest {
        Guest::connect(&self.dir.path().join("s"), features, before)
    }

    /// Waits until the port's link is in the state.
    fn link(&self, up: bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while self.switch.ports().iter().find(|p| p.id == self.guest).unwrap().link_up != up {
            assert!(Instant::now() < end, "the link does not change");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.switch.poll();
    }
}

#[test]
fn a_queue_that_is_polled_wants_no_notifications() {
    let f = fixture();
    for features in LAYOUTS {
        let g = f.connect(features, None);
        // The used ring's flags, or the device's event flags, though nobody armed or disarmed the queues since they
        // started.
        for q in 0..2 {
            let flags = device_part(q) + if g.packed { 2 } else { 0 };
            assert_eq!(g.read(flags, 2), [1, 0]);
        }
        drop(g);
        f.link(false);
    }
}

#[test]
fn packed_rings_are_for_those_who_want_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let _port = VhostUserPort::new(&VhostUserOptions::new(&path, StreamMode::Listen)).unwrap();
    assert_eq!(Guest::connect(&path, FEATURES, None).ask(1, &[]) & PACKED, 0);
}

#[test]
fn frames_pass_both_ways_whole() {
    for features in LAYOUTS {
        frames_pass(features);
    }
}

fn frames_pass(features: u64) {
    let f = fixture();
    let mut g = f.connect(features, None);
    f.link(true);
    // The ring goes round more than twice.
    for round in 0..40 {
        for len in [60usize, 127, 128, 129, 1514] {
            let mut frame = udp(1, 2, 3, 4);
            frame.extend((frame.len()..len).map(|i| i as u8));
            g.transmit(5, &frame);
            f.switch.poll();
            assert_eq!(drain(&f.end), [frame.clone()], "{round}");
            assert_eq!(g.used_index(1), g.driver.avail[1]);
            g.reclaim();
            frame[5] = 1;
            frame[11] = 2;
            g.receive_buffer(6, 2048);
            f.end.send(&frame);
            f.switch.poll();
            let got = g.received();
            assert_eq!(got.len(), 1);
            assert_eq!((&got[0][10..12], &got[0][12..]), (&[1u8, 0][..], &frame[..]));
        }
    }
    // A frame longer than a buffer, as long as they come, spans several, and the header says how many. One that finds
    // too few is lost, and they are left: for the next one, with those that came meanwhile.
    let mut long = udp(2, 1, 3, 4);
    long.resize(9018, 7);
    for slot in 0..8 {
        g.receive_buffer(slot, 1024);
    }
    f.end.send(&long);
    f.switch.poll();
    assert!(g.received().is_empty());
    g.offer(
        0,
        8,
        &[
            (GUEST + BUFFERS + 0x4000, 300, WRITE),
            (GUEST + BUFFERS + 0x4000 + 300, 700, WRITE),
            (GUEST + BUFFERS + 0x4000 + 1000, 24, WRITE),
        ],
    );
    g.receive_buffer(9, 1024);
    f.end.send(&long);
    f.switch.poll();
    let got = g.received();
    assert_eq!((got.len(), got[0][10]), (9, 9));
    assert_eq!(got.concat()[12..], long);
    // A burst of frames for buffers of one descriptor, of two, and in a table.
    let table = BUFFERS + 0xf000;
    for (i, at) in [(0, 0x6000), (1, 0x6800)] {
        g.table_entry(table, i, GUEST + BUFFERS + at, 0x800, WRITE | if i == 0 { NEXT } else { 0 }, 1);
    }
    g.offer(0, 10, &[(GUEST + BUFFERS + 0x5000, 20, WRITE), (GUEST + BUFFERS + 0x5014, 1000, WRITE)]);
    g.offer(0, 12, &[(GUEST + table, 32, INDIRECT)]);
    g.receive_buffer(13, 2048);
    let frames: Vec<_> = (0..4).map(|n| udp(2, 1, n, 4)).collect();
    f.end.send_burst(frames.iter().map(|f| (&f[..], Offload::default())));
    f.switch.poll();
    let got = g.received();
    // The buffer left over from before came first.
    assert_eq!(got.iter().map(|b| &b[12..]).collect::<Vec<_>>(), frames.iter().collect::<Vec<_>>());
    // Chains and indirect tables carry frames too.
    let at = BUFFERS + 0x8_0000;
    let frame = udp(1, 2, 3, 4);
    g.write(at, &[&[0; 12], &frame[..]].concat());
    let rest = frame.len() as u32 - 23;
    g.offer(1, 0, &[(GUEST + at, 5, 0), (GUEST + at + 5, 30, 0), (GUEST + at + 35, rest, 0)]);
    g.table_entry(table, 0, GUEST + at, 12, NEXT, 1);
    g.table_entry(table, 1, GUEST + at + 12, frame.len() as u32, 0, 0);
    g.offer(1, 1, &[(GUEST + table, 32, INDIRECT)]);
    g.transmit(2, &frame);
    f.switch.poll();
    assert_eq!(drain(&f.end), [&frame[..]; 3]);
    assert_eq!(g.used_index(1), g.driver.avail[1]);
}

/// The driver says at which descriptor it wants to hear of used ones.
#[test]
fn a_driver_is_notified_where_it_asks_for_it() {
    const EVENT_IDX: u64 = 1 << 29;
    for features in LAYOUTS {
        let f = fixture();
        let mut g = f.connect(features | EVENT_IDX, None);
        f.link(true);
        let call = vmm_sys_util::eventfd::EventFd::new(nix::libc::EFD_NONBLOCK).unwrap();
        g.send(13, &0u64.to_le_bytes(), &[call.as_raw_fd()]);
        assert_eq!(g.ack(18, &pair(0, 1), &[]), 0);
        // Through more than a lap, in steps of three, with an event at the second of every other three.
        for step in 0..50 {
            let n = g.driver.avail[0];
            let event = n.wrapping_add(if step % 2 == 0 { 1 } else { 3 });
            if g.packed {
                g.write(driver_part(0), &[(packed_base(event) as u16).to_le_bytes(), [2, 0]].concat());
            } else {
                g.write(driver_part(0) + 4 + 2 * u64::from(SIZE), &event.to_le_bytes());
            }
            for slot in 0..3 {
                g.receive_buffer(slot, 2048);
            }
            let frame = udp(2, 1, 3, 4);
            f.end.send_burst([(&frame[..], Offload::default()); 3]);
            f.switch.settle(3);
            assert_eq!(g.received().len(), 3);
            assert_eq!(call.read().is_ok(), step % 2 == 0, "{step}");
        }
    }
}

type Attack = fn(&mut Guest);

/// What breaks a ring of either layout.
const ATTACKS: [(&str, Attack); 7] = [
    ("address outside of memory", |g| g.offer(1, 0, &[(GUEST + MEMORY - 10, 100, 0)])),
    ("length that wraps", |g| g.offer(1, 0, &[(GUEST, u32::MAX, 0)])),
    ("writable buffer to send", |g| g.offer(1, 0, &[(GUEST, 100, WRITE)])),
    ("endless chain", |g| g.offer(1, 0, &[(GUEST, 1, NEXT); SIZE as usize])),
    ("nested indirect table", |g| {
        g.table_entry(BUFFERS, 0, GUEST + BUFFERS, 16, INDIRECT, 0);
        g.offer(1, 0, &[(GUEST, 12, 0), (GUEST + BUFFERS, 16, INDIRECT)]);
    }),
    ("indirect table of no size", |g| g.offer(1, 0, &[(GUEST + BUFFERS, 8, INDIRECT)])),
    ("indirect table outside of memory", |g| g.offer(1, 0, &[(GUEST + MEMORY - 16, 32, INDIRECT)])),
];

const SPLIT_ATTACKS: [(&str, Attack); 4] = [
    ("index too far ahead", |g| g.write(driver_part(1) + 2, &1000u16.to_le_bytes())),
    ("head outside of the table", |g| g.offer_head(1, 64)),
    ("loop", |g| {
        g.descriptor(ring(1), 0, GUEST, 1, [NEXT, 1]);
        g.descriptor(ring(1), 1, GUEST, 1, [NEXT, 0]);
        g.offer_head(1, 0);
    }),
    ("next outside of an indirect table", |g| {
        g.table_entry(BUFFERS, 0, GUEST, 100, NEXT, 1);
        g.offer(1, 0, &[(GUEST + BUFFERS, 16, INDIRECT)]);
    }),
];

const PACKED_ATTACKS: [(&str, Attack); 2] = [
    ("table within a chain", |g| g.offer(1, 0, &[(GUEST + BUFFERS, 16, INDIRECT), (GUEST, 100, 0)])),
    ("more buffers than the ring has places", |g| {
        // The second chain goes on over the first one's places, all but the head.
        let chain = [(GUEST, 2, 0); 40];
        g.offer(1, 0, &chain);
        let head = g.read(ring(1) + 16, 16);
        g.offer(1, 1, &chain);
        g.write(ring(1) + 16, &head);
    }),
];

#[test]
fn a_hostile_guest_loses_its_queue_and_nothing_else() {
    for (features, attacks) in LAYOUTS.into_iter().zip([&SPLIT_ATTACKS[..], &PACKED_ATTACKS]) {
        let f = fixture();
        for (name, attack) in ATTACKS.iter().chain(attacks) {
            let mut g = f.connect(features, None);
            f.link(true);
            g.transmit(7, &udp(1, 2, 3, 4));
            f.switch.poll();
            assert_eq!(drain(&f.end).len(), 1, "before: {name}");
            attack(&mut g);
            f.switch.settle(5);
            assert!(drain(&f.end).is_empty(), "{name}");
            // What is sent by the queue from now on does not arrive.
            g.transmit(3, &udp(1, 2, 3, 4));
            f.switch.settle(5);
            assert!(drain(&f.end).is_empty(), "{name}");
            // The receive queue still works.
            g.receive_buffer(1, 2048);
            f.end.send(&udp(2, 1, 3, 4));
            f.switch.poll();
            assert_eq!(g.received().len(), 1, "{name}");
            drop(g);
            f.link(false);
        }
        // Frames that are too short or ask for senseless offloads are dropped and given back.
        let mut g = f.connect(features, None);
        f.link(true);
        g.transmit(0, &[1, 2, 3]);
        let at = BUFFERS + 0x8_0000 + 0x800;
        g.transmit(1, &udp(1, 2, 3, 4));
        g.write(at, &[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        g.transmit(2, &udp(1, 2, 3, 4));
        f.switch.settle(5);
        assert_eq!(drain(&f.end).len(), 1);
        assert_eq!(g.used_index(1), g.driver.avail[1]);
        assert_eq!(f.switch.port_stats(f.guest).unwrap().rx_errors, 2);
    }
}

/// A base outside of the ring is the front-end's error.
#[test]
fn a_packed_ring_starts_within_itself() {
    let f = fixture();
    let mut g = f.connect(FEATURES | PACKED, None);
    f.link(true);
    g.send(11, &pair(1, 0), &[]);
    assert_eq!(g.reply(), pair(1, packed_base(0)));
    g.send(10, &pair(1, u32::from(SIZE)), &[]);
    let kick = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    assert_eq!(g.ack(12, &1u64.to_le_bytes(), &[kick.as_raw_fd()]), 1);
}

/// The header has its shortest form when nothing was negotiated.
#[test]
fn queues_run_without_features() {
    let f = fixture();
    let mut g = f.connect(0, None);
    f.link(true);
    let (at, frame) = (BUFFERS + 0x8_0000, udp(1, 2, 3, 4));
    g.write(at, &[&[0; 10], &frame[..]].concat());
    g.offer(1, 0, &[(GUEST + at, 5, 0), (GUEST + at + 5, 5 + frame.len() as u32, 0)]);
    f.switch.poll();
    assert_eq!(drain(&f.end), [frame]);
}

#[test]
fn malformed_messages_end_the_connection_only() {
    let f = fixture();
    let messages: [&[u8]; 4] = [
        &[1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0],
        &[5, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
        &[5, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, 9, 0, 0, 0],
        &[9, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, 200, 0, 0, 0],
    ];
    for m in messages {
        let mut s = UnixStream::connect(f.dir.path().join("s")).unwrap();
        s.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        s.write_all(m).unwrap();
        assert_eq!(s.read(&mut [0; 16]).unwrap_or(0), 0);
    }
    let _guest = f.connect(FEATURES, None);
    f.link(true);
}

#[test]
fn a_guest_reconnects_to_a_new_switch_with_its_rings() {
    for features in LAYOUTS {
        let f = fixture();
        let mut g = f.connect(features, None);
        f.link(true);
        g.receive_buffer(0, 2048);
        for slot in 0..3 {
            g.transmit(slot, &udp(1, 2, 3, 4));
        }
        f.switch.poll();
        assert_eq!(drain(&f.end).len(), 3);
        // Frames offered while there is no switch are not lost.
        drop(f.switch);
        g.transmit(3, &udp(1, 2, 3, 4));
        let f2 = fixture();
        let mut g = f2.connect(features, g.remains());
        f2.link(true);
        f2.switch.poll();
        assert_eq!(drain(&f2.end).len(), 1);
        f2.end.send(&udp(2, 1, 3, 4));
        f2.switch.poll();
        assert_eq!(g.received().len(), 1, "the buffer offered to the old switch is used by the new one");
        // Stopping a queue tells where it stands; it starts again from there.
        let base = if g.packed { packed_base(4) } else { 4 };
        g.send(11, &pair(1, 0), &[]);
        assert_eq!(g.reply(), pair(1, base));
        g.set_up(1, base);
        g.transmit(4, &udp(1, 2, 3, 4));
        f2.switch.poll();
        assert_eq!(drain(&f2.end).len(), 1);
    }
}

/// A driver that starts anew after its queue was stopped finds nothing of the old one.
#[test]
fn a_queue_starts_anew_where_its_front_end_says() {
    let f = fixture();
    let mut g = f.connect(FEATURES | PACKED, None);
    f.link(true);
    for slot in 0..5 {
        g.transmit(slot, &udp(1, 2, 3, 4));
    }
    f.switch.poll();
    assert_eq!(drain(&f.end).len(), 5);
    g.send(11, &pair(1, 0), &[]);
    assert_eq!(g.reply(), pair(1, packed_base(5)));
    // It clears its descriptors, but not what only the device writes.
    g.write(ring(1), &[0; 16 * SIZE as usize]);
    g.driver.avail[1] = 0;
    g.set_up(1, packed_base(0));
    g.transmit(0, &udp(1, 2, 3, 4));
    f.switch.poll();
    assert_eq!(drain(&f.end).len(), 1);
}

/// Buffers are given back in order and after what came of them, so the ring alone tells a successor where to go on: no
/// record of descriptors in flight is needed.
#[test]
fn frames_that_a_dying_switch_had_taken_are_taken_again() {
    for features in LAYOUTS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let options = VhostUserOptions::new(&path, StreamMode::Listen);
        let port = VhostUserPort::new(&VhostUserOptions { packed_rings: true, ..options }).unwrap();
        let mut g = Guest::connect(&path, features, None);
        let mut burst = Burst::new();
        let frame = |n: u16| udp(1, 2, n, 4);
        for slot in 0..5 {
            g.transmit(slot, &frame(slot));
        }
        port.receive(0, &mut burst);
        port.complete(0);
        burst.clear();
        for slot in 5..9 {
            g.transmit(slot, &frame(slot));
        }
        port.receive(0, &mut burst);
        assert_eq!((burst.len(), g.used_index(1)), (4, 5));
        // It ends here, with the burst on its way. Nothing is done on leaving: the memory is that of this moment.
        let before = g.read(0, MEMORY as usize);
        let remains = g.remains();
        drop((burst, port, g));
        remains.as_ref().unwrap().0.write_all_at(&before, 0).unwrap();
        let f = fixture();
        let mut g = f.connect(features, remains);
        f.link(true);
        f.switch.poll();
        assert_eq!(drain(&f.end), (5..9).map(frame).collect::<Vec<_>>());
        assert_eq!(g.used_index(1), 9);
        // One that died between giving a buffer back and saying so: it is not taken again.
        if g.packed {
            g.transmit(9, &frame(9));
            let note = g.read(device_part(1), 4);
            f.switch.poll();
            assert_eq!(drain(&f.end).len(), 1);
            let before = g.read(0, MEMORY as usize);
            let remains = g.remains();
            drop((f, g));
            let memory = &remains.as_ref().unwrap().0;
            memory.write_all_at(&before, 0).unwrap();
            memory.write_all_at(&note, device_part(1)).unwrap();
            let f = fixture();
            let mut g = f.connect(features, remains);
            f.link(true);
            g.transmit(10, &frame(10));
            f.switch.poll();
            assert_eq!(drain(&f.end), [frame(10)]);
        }
    }
}

#[test]
fn migration_logs_writes_and_announces() {
    for features in LAYOUTS {
        migration_logs(features);
    }
}

fn migration_logs(features: u64) {
    let f = fixture();
    let mut g = f.connect(features | LOG_ALL, None);
    f.link(true);
    let log = tempfile::tempfile().unwrap();
    log.set_len(4096).unwrap();
    let payload: Vec<u8> = [4096u64, 0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let fd = OwnedFd::from(log.try_clone().unwrap());
    g.send(6, &payload, &[fd.as_raw_fd()]);
    assert!(g.reply().is_empty());
    g.receive_buffer(2, 2048);
    f.end.send(&udp(2, 1, 3, 4));
    f.switch.poll();
    assert_eq!(g.received().len(), 1);
    let mut written = Vec::new();
    // Beyond the other queue.
    let other = (GUEST + ring(1)) / 4096..(GUEST + ring(2)) / 4096;
    for page in (GUEST / 4096..(GUEST + MEMORY) / 4096).filter(|p| !other.contains(p)) {
        let mut b = [0];
        log.read_exact_at(&mut b, page / 8).unwrap();
        if b[0] >> (page % 8) & 1 == 1 {
            written.push(4096 * page - GUEST);
        }
    }
    // The buffer and what the device writes of its ring: of a packed one the descriptors too.
    let ring = [ring(0), device_part(0)];
    assert_eq!(written, [if g.packed { &ring[..] } else { &ring[1..] }, &[BUFFERS + 0x1000]].concat());
    // A ring that is said to be at the end of all addresses is not logged.
    assert_eq!(g.ack(9, &Guest::addresses(0, u64::MAX - 1), &[]), 0);
    g.receive_buffer(2, 2048);
    f.end.send(&udp(2, 1, 3, 4));
    f.switch.poll();
    assert_eq!(g.received().len(), 1);
    // The back-end announces the guest, and takes MTU and status.
    assert_eq!(g.ack(19, &[2, 0, 0, 0, 0, 9, 0, 0], &[]), 0);
    assert_eq!(g.ack(20, &1400u64.to_le_bytes(), &[]), 0);
    assert_eq!(g.ack(39, &15u64.to_le_bytes(), &[]), 0);
    assert_eq!(g.ask(40, &[]), 15);
    f.switch.poll();
    let rarp = drain(&f.end);
    assert_eq!(
        (&rarp[0][..14], rarp[0][21]),
        (&[255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 9, 0x80, 0x35][..], 3)
    );
    assert!(f.switch.mac_table().iter().any(|r| r.mac == 0x0200_0000_0009 && r.port == f.guest));
}

#[test]
fn memory_comes_and_goes_in_slots() {
    for features in LAYOUTS {
        memory_comes_and_goes(features);
    }
}

fn memory_comes_and_goes(features: u64) {
    let f = fixture();
    let mut g = f.connect(features, None);
    f.link(true);
    assert!(g.ask(36, &[]) >= 32, "memory slots");
    let extra = tempfile::tempfile().unwrap();
    extra.set_len(0x1000).unwrap();
    let frame = udp(1, 2, 3, 4);
    extra.write_all_at(&[&[0; 12], &frame[..]].concat(), 0).unwrap();
    let (guest, user) = (GUEST + MEMORY, USER + MEMORY);
    let slot: Vec<u8> = [0u64, guest, 0x1000, user, 0].iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(g.ack(37, &slot, &[extra.as_raw_fd()]), 0);
    assert_eq!(g.ack(37, &slot, &[extra.as_raw_fd()]), 1, "it overlaps");
    let buffer = [(guest, 12 + frame.len() as u32, 0)];
    g.offer(1, 0, &buffer);
    f.switch.poll();
    assert_eq!(drain(&f.end), std::slice::from_ref(&frame));
    // The second of these buffers is looked at before it is needed, and gone when it is.
    g.receive_buffer(1, 2048);
    g.offer(0, 5, &[(guest, 2048, WRITE)]);
    f.end.send(&udp(2, 1, 3, 4));
    f.switch.poll();
    assert_eq!(g.received().len(), 1);
    assert_eq!(g.ack(38, &slot, &[]), 0);
    f.end.send(&udp(2, 1, 3, 4));
    f.switch.settle(5);
    assert!(g.received().is_empty());
    assert_eq!(g.ack(38, &slot, &[]), 1, "it is gone");
    // The rings, in the memory that stays, go on; a buffer in what went is an error of the guest.
    g.transmit(1, &frame);
    f.switch.poll();
    assert_eq!(drain(&f.end), [frame]);
    g.offer(1, 0, &buffer);
    f.switch.settle(5);
    assert!(drain(&f.end).is_empty());
    assert_ne!(g.used_index(1), g.driver.avail[1]);
}

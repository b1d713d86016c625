//! The vhost-user back-end against a small front-end: traffic, hostile rings, reconnection, migration.
#![expect(clippy::unwrap_used, reason = "a test ends where a step fails")]

mod common;

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{drain, port, udp};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vswitch::{
    Burst, Endpoint, Port, PortConfig, PortId, StreamMode, Switch, VhostUserOptions, VhostUserPort,
};

const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 28 | 1 << 15;
const LOG_ALL: u64 = 1 << 26;
const PROTOCOL: u64 = 1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 15 | 1 << 16;
const SIZE: u64 = 64;
/// Guest address of the memory; the front-end's own addresses are shifted, so that a mix-up shows.
const GUEST: u64 = 0x10_0000;
const USER: u64 = 0x7f00_0000_0000;
const MEMORY: u64 = 0x10_0000;
const BUFFERS: u64 = 0x1_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A guest with one pair of queues; its memory is a file.
struct Guest {
    socket: UnixStream,
    memory: File,
    avail: [u16; 2],
    used: [u16; 2],
}

impl Guest {
    fn connect(path: &Path, features: u64, memory: Option<File>) -> Self {
        let memory = memory.unwrap_or_else(|| {
            let f = tempfile::tempfile().unwrap();
            f.set_len(MEMORY).unwrap();
            f
        });
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut g = Self { socket, memory, avail: [0; 2], used: [0; 2] };
        let offered = g.ask(1, &[]);
        assert_eq!(offered & features, features);
        // A front-end may leave it at none.
        if features != 0 {
            g.send(2, &features.to_le_bytes(), &[]);
        }
        assert_eq!(g.ask(15, &[]) & PROTOCOL, PROTOCOL);
        g.send(16, &PROTOCOL.to_le_bytes(), &[]);
        g.send(3, &[], &[]);
        let table: Vec<u8> = [1u64, GUEST, MEMORY, USER, 0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let fd = g.memory.as_raw_fd();
        assert_eq!(g.ack(5, &table, &[fd]), 0);
        for q in 0..2u32 {
            let used = g.used_index(q);
            (g.avail[q as usize], g.used[q as usize]) = (used, used);
            g.send(8, &pair(q, SIZE as u32), &[]);
            g.send(10, &pair(q, u32::from(used)), &[]);
            let mut addr = pair(q, 0);
            for part in [ring(q), ring(q) + 0x2000, ring(q) + 0x1000] {
                addr.extend((USER + part).to_le_bytes());
            }
            addr.extend(0u64.to_le_bytes());
            g.send(9, &addr, &[]);
            let call = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
            g.send(13, &u64::from(q).to_le_bytes(), &[call.as_raw_fd()]);
            let kick = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
            g.send(12, &u64::from(q).to_le_bytes(), &[kick.as_raw_fd()]);
            assert_eq!(g.ack(18, &pair(q, 1), &[]), 0);
        }
        g
    }

    fn send(&mut self, code: u32, payload: &[u8], fds: &[RawFd]) {
        self.send_flags(code, 1, payload, fds);
    }

    fn send_flags(&mut self, code: u32, flags: u32, payload: &[u8], fds: &[RawFd]) {
        let mut m: Vec<u8> =
            [code, flags, payload.len() as u32].iter().flat_map(|v| v.to_le_bytes()).collect();
        m.extend_from_slice(payload);
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights };
        sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(&m)], control, MsgFlags::empty(), None)
            .unwrap();
    }

    fn reply(&mut self) -> Vec<u8> {
        let mut h = [0; 12];
        self.socket.read_exact(&mut h).unwrap();
        let mut p = vec![0; u32::from_le_bytes(h[8..12].try_into().unwrap()) as usize];
        self.socket.read_exact(&mut p).unwrap();
        p
    }

    fn ask(&mut self, code: u32, payload: &[u8]) -> u64 {
        self.send(code, payload, &[]);
        u64::from_le_bytes(self.reply()[..8].try_into().unwrap())
    }

    fn ack(&mut self, code: u32, payload: &[u8], fds: &[RawFd]) -> u64 {
        self.send_flags(code, 9, payload, fds);
        u64::from_le_bytes(self.reply()[..8].try_into().unwrap())
    }

    fn write(&self, at: u64, data: &[u8]) {
        self.memory.write_all_at(data, at).unwrap();
    }

    fn read(&self, at: u64, n: usize) -> Vec<u8> {
        let mut v = vec![0; n];
        self.memory.read_exact_at(&mut v, at).unwrap();
        v
    }

    fn used_index(&self, q: u32) -> u16 {
        u16::from_le_bytes(self.read(ring(q) + 0x2002, 2).try_into().unwrap())
    }

    fn descriptor(&self, table: u64, i: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let mut d = addr.to_le_bytes().to_vec();
        d.extend(len.to_le_bytes());
        d.extend(flags.to_le_bytes());
        d.extend(next.to_le_bytes());
        self.write(table + 16 * i, &d);
    }

    /// Makes a chain available.
    fn offer(&mut self, q: u32, head: u16) {
        let at = &mut self.avail[q as usize];
        self.memory
            .write_all_at(&head.to_le_bytes(), ring(q) + 0x1004 + 2 * (u64::from(*at) % SIZE))
            .unwrap();
        *at = at.wrapping_add(1);
        let index = *at;
        self.write(ring(q) + 0x1002, &index.to_le_bytes());
    }

    /// Sends a frame in one buffer, with an empty packet header.
    fn transmit(&mut self, slot: u16, frame: &[u8]) {
        let at = BUFFERS + 0x8_0000 + 0x800 * u64::from(slot);
        self.write(at, &[&[0; 12], frame].concat());
        self.descriptor(ring(1), slot.into(), GUEST + at, 12 + frame.len() as u32, 0, 0);
        self.offer(1, slot);
    }

    /// Offers a receive buffer.
    fn receive_buffer(&mut self, slot: u16, len: u32) {
        let at = BUFFERS + 0x800 * u64::from(slot);
        self.descriptor(ring(0), slot.into(), GUEST + at, len, WRITE, 0);
        self.offer(0, slot);
    }

    /// The buffers that the device has used on the receive queue since the last call.
    fn received(&mut self) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        while self.used[0] != self.used_index(0) {
            let e = self.read(ring(0) + 0x2004 + 8 * (u64::from(self.used[0]) % SIZE), 8);
            let id = u32::from_le_bytes(e[..4].try_into().unwrap());
            let len = u32::from_le_bytes(e[4..].try_into().unwrap()) as usize;
            out.push(self.read(BUFFERS + 0x800 * u64::from(id), len));
            self.used[0] = self.used[0].wrapping_add(1);
        }
        out
    }
}

fn ring(q: u32) -> u64 {
    0x4000 * u64::from(q)
}

fn pair(a: u32, b: u32) -> Vec<u8> {
    [a.to_le_bytes(), b.to_le_bytes()].concat()
}

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
    let guest =
        switch.add_port("guest", VhostUserPort::new(&options).unwrap(), PortConfig::default()).unwrap();
    let (_, end) = port(&switch, "end", PortConfig::default());
    Fixture { switch, guest, end, dir }
}

impl Fixture {
    fn connect(&self, features: u64, memory: Option<File>) -> Guest {
        Guest::connect(&self.dir.path().join("s"), features, memory)
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
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vhost");
    let s = common::switch();
    let p = VhostUserPort::new(&VhostUserOptions::new(&path, StreamMode::Listen)).unwrap();
    s.add_port("guest", p, PortConfig::default()).unwrap();
    let g = Guest::connect(&path, FEATURES, None);
    // The used ring's flags, though nobody armed or disarmed the queues since they started.
    for q in 0..2 {
        assert_eq!(g.read(ring(q) + 0x2000, 2), [1, 0]);
    }
}

#[test]
fn frames_pass_both_ways_whole() {
    let f = fixture();
    let mut g = f.connect(FEATURES, None);
    f.link(true);
    for len in [60usize, 127, 128, 129, 1514] {
        let mut frame = udp(1, 2, 3, 4);
        frame.extend((frame.len()..len).map(|i| i as u8));
        g.transmit(5, &frame);
        f.switch.poll();
        assert_eq!(drain(&f.end), [frame.clone()]);
        assert_eq!(g.used_index(1), g.avail[1]);
        frame[5] = 1;
        frame[11] = 2;
        g.receive_buffer(6, 2048);
        f.end.send(&frame);
        f.switch.poll();
        let got = g.received();
        assert_eq!(got.len(), 1);
        assert_eq!((&got[0][10..12], &got[0][12..]), (&[1u8, 0][..], &frame[..]));
    }
    // A frame longer than a buffer, as long as they come, spans several, and the header says how many.
    let mut long = udp(2, 1, 3, 4);
    long.resize(9018, 7);
    for slot in 0..10 {
        g.receive_buffer(slot, 1024);
    }
    f.end.send(&long);
    f.switch.poll();
    let got = g.received();
    assert_eq!((got.len(), got[0][10]), (9, 9));
    assert_eq!(got.concat()[12..], long);
    // Chains and indirect tables carry frames too.
    let at = BUFFERS + 0x8_0000;
    let frame = udp(1, 2, 3, 4);
    g.write(at, &[&[0; 12], &frame[..]].concat());
    g.descriptor(ring(1), 0, GUEST + at, 5, NEXT, 9);
    g.descriptor(ring(1), 9, GUEST + at + 5, 30, NEXT, 3);
    g.descriptor(ring(1), 3, GUEST + at + 35, frame.len() as u32 - 23, 0, 0);
    g.offer(1, 0);
    let table = BUFFERS + 0xf000;
    g.descriptor(table, 0, GUEST + at, 12, NEXT, 1);
    g.descriptor(table, 1, GUEST + at + 12, frame.len() as u32, 0, 0);
    g.descriptor(ring(1), 1, GUEST + table, 32, INDIRECT, 0);
    g.offer(1, 1);
    f.switch.poll();
    assert_eq!(drain(&f.end), [frame.clone(), frame]);
}

#[test]
fn a_hostile_guest_loses_its_queue_and_nothing_else() {
    type Attack = fn(&mut Guest);
    let attacks: [(&str, Attack); 9] = [
        ("index too far ahead", |g| g.write(ring(1) + 0x1002, &1000u16.to_le_bytes())),
        ("head outside of the table", |g| g.offer(1, 64)),
        ("address outside of memory", |g| {
            g.descriptor(ring(1), 0, GUEST + MEMORY - 10, 100, 0, 0);
            g.offer(1, 0);
        }),
        ("length that wraps", |g| {
            g.descriptor(ring(1), 0, GUEST, u32::MAX, 0, 0);
            g.offer(1, 0);
        }),
        ("loop", |g| {
            g.descriptor(ring(1), 0, GUEST, 1, NEXT, 1);
            g.descriptor(ring(1), 1, GUEST, 1, NEXT, 0);
            g.offer(1, 0);
        }),
        ("writable buffer to send", |g| {
            g.descriptor(ring(1), 0, GUEST, 100, WRITE, 0);
            g.offer(1, 0);
        }),
        ("nested indirect table", |g| {
            g.descriptor(BUFFERS, 0, GUEST + BUFFERS, 16, INDIRECT, 0);
            g.descriptor(ring(1), 0, GUEST + BUFFERS, 16, INDIRECT, 0);
            g.offer(1, 0);
        }),
        ("next outside of an indirect table", |g| {
            g.descriptor(BUFFERS, 0, GUEST, 100, NEXT, 1);
            g.descriptor(ring(1), 0, GUEST + BUFFERS, 16, INDIRECT, 0);
            g.offer(1, 0);
        }),
        ("indirect table of no size", |g| {
            g.descriptor(ring(1), 0, GUEST + BUFFERS, 8, INDIRECT, 0);
            g.offer(1, 0);
        }),
    ];
    let f = fixture();
    for (name, attack) in attacks {
        let mut g = f.connect(FEATURES, None);
        f.link(true);
        g.transmit(7, &udp(1, 2, 3, 4));
        f.switch.poll();
        assert_eq!(drain(&f.end).len(), 1, "before: {name}");
        attack(&mut g);
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
    let mut g = f.connect(FEATURES, None);
    f.link(true);
    g.transmit(0, &[1, 2, 3]);
    let at = BUFFERS + 0x8_0000 + 0x800;
    g.transmit(1, &udp(1, 2, 3, 4));
    g.write(at, &[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    g.transmit(2, &udp(1, 2, 3, 4));
    f.switch.settle(5);
    assert_eq!(drain(&f.end).len(), 1);
    assert_eq!(g.used_index(1), g.avail[1]);
    assert_eq!(f.switch.port_stats(f.guest).unwrap().rx_errors, 2);
}

/// The header has its shortest form when nothing was negotiated.
#[test]
fn queues_run_without_features() {
    let f = fixture();
    let mut g = f.connect(0, None);
    f.link(true);
    let (at, frame) = (BUFFERS + 0x8_0000, udp(1, 2, 3, 4));
    g.write(at, &[&[0; 10], &frame[..]].concat());
    g.descriptor(ring(1), 0, GUEST + at, 5, NEXT, 1);
    g.descriptor(ring(1), 1, GUEST + at + 5, 5 + frame.len() as u32, 0, 0);
    g.offer(1, 0);
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
    let f = fixture();
    let mut g = f.connect(FEATURES, None);
    f.link(true);
    g.receive_buffer(0, 2048);
    for slot in 0..3 {
        g.transmit(slot, &udp(1, 2, 3, 4));
    }
    f.switch.poll();
    assert_eq!(drain(&f.end).len(), 3);
    // Frames offered while there is no switch are not lost.
    let memory = g.memory.try_clone().unwrap();
    drop(f.switch);
    g.transmit(3, &udp(1, 2, 3, 4));
    let (avail, used) = (g.avail, g.used);
    let f2 = fixture();
    let mut g = f2.connect(FEATURES, Some(memory));
    (g.avail, g.used) = (avail, used);
    f2.link(true);
    f2.switch.poll();
    assert_eq!(drain(&f2.end).len(), 1);
    f2.end.send(&udp(2, 1, 3, 4));
    f2.switch.poll();
    assert_eq!(g.received().len(), 1, "the buffer offered to the old switch is used by the new one");
    // Stopping a queue tells where it stands; it starts again from there.
    g.send(11, &pair(1, 0), &[]);
    assert_eq!(g.reply(), pair(1, 4));
}

/// Buffers are given back in order and after what came of them, so the used index alone tells a successor where to go
/// on: no record of descriptors in flight is needed.
#[test]
fn frames_that_a_dying_switch_had_taken_are_taken_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let port = VhostUserPort::new(&VhostUserOptions::new(&path, StreamMode::Listen)).unwrap();
    let mut g = Guest::connect(&path, FEATURES, None);
    for slot in 0..5 {
        g.transmit(slot, &udp(1, 2, slot, 4));
    }
    let mut burst = Burst::new();
    port.receive(0, &mut burst);
    assert_eq!((burst.len(), g.used_index(1)), (5, 0));
    // It ends here, with the burst on its way.
    let (memory, avail) = (g.memory.try_clone().unwrap(), g.avail);
    drop((burst, port, g));
    let f = fixture();
    let mut g = f.connect(FEATURES, Some(memory));
    g.avail = avail;
    f.link(true);
    f.switch.poll();
    assert_eq!(drain(&f.end), (0..5).map(|n| udp(1, 2, n, 4)).collect::<Vec<_>>());
    assert_eq!(g.used_index(1), 5);
}

#[test]
fn migration_logs_writes_and_announces() {
    let f = fixture();
    let mut g = f.connect(FEATURES | LOG_ALL, None);
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
    let page = (GUEST + BUFFERS + 0x1000) / 4096;
    let mut b = [0];
    log.read_exact_at(&mut b, page / 8).unwrap();
    assert_eq!(b[0] >> (page % 8) & 1, 1);
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
    let f = fixture();
    let mut g = f.connect(FEATURES, None);
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
    g.descriptor(ring(1), 0, guest, 12 + frame.len() as u32, 0, 0);
    g.offer(1, 0);
    f.switch.poll();
    assert_eq!(drain(&f.end), std::slice::from_ref(&frame));
    // The second of these buffers is looked at before it is needed, and gone when it is.
    g.receive_buffer(1, 2048);
    g.descriptor(ring(0), 5, guest, 2048, WRITE, 0);
    g.offer(0, 5);
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
    g.offer(1, 0);
    f.switch.settle(5);
    assert!(drain(&f.end).is_empty());
    assert_ne!(g.used_index(1), g.avail[1]);
}

//! What the clients of the NBD server together may make it hold.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::nbd::ServerLimits;
use common::late::{Kind, LateStorage, PATIENCE};
use common::nbd::{BLOCK, Client, READ, Served, WRITE};
use std::io::{Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

const SIZE: u64 = 256 << 20;
const MIB: u64 = 1 << 20;

fn serve(storage: &Arc<LateStorage>, limits: ServerLimits, clients: usize) -> (Served, Vec<Client>) {
    let served = Served::new(storage, limits, None);
    let clients = (0..clients).map(|_| Client::new(served.connect())).collect();
    (served, clients)
}

/// Sends `count` requests for 1 MiB each, from MiB number `first` on.
fn send(client: &mut Client, command: u16, first: u64, count: u64) {
    let request = |n: u64| {
        let mut out = client.request(command, 0, n, n * MIB, MIB);
        out.resize(out.len() + if command == WRITE { MIB as usize } else { 0 }, 1);
        out
    };
    let all: Vec<_> = (first..first + count).map(request).collect();
    client.send(&all);
}

fn limits(bytes: u64) -> ServerLimits {
    ServerLimits { bytes, ..ServerLimits::default() }
}

#[test]
fn payload_of_all_connections_is_bounded() {
    const CLIENTS: u64 = 6;
    const REQUESTS: u64 = 12;
    let storage = LateStorage::new(SIZE);
    let (_served, mut clients) = serve(&storage, limits(8 * MIB), CLIENTS as usize);
    let closed = storage.close();
    // The first one may have all of it, and each other one a request nevertheless.
    send(&mut clients[0], READ, 0, REQUESTS);
    assert_eq!(storage.wait_for(8).len(), 8);
    for n in 1..CLIENTS {
        send(&mut clients[n as usize], READ, n * REQUESTS, REQUESTS);
        assert_eq!(storage.wait_for(8 + n as usize).len() as u64, 8 + n);
    }
    // In whatever order they end, every connection goes on, and there are never more.
    for _ in 0..CLIENTS * REQUESTS {
        let call = *storage.wait_for(1).last().unwrap();
        storage.let_go(call, None);
        assert_eq!(clients[(call.1 / MIB / REQUESTS) as usize].reply().1, 0);
    }
    assert_eq!(storage.most() as u64, 8 + CLIENTS - 1);
    drop(closed);
}

#[test]
fn connections_share_evenly() {
    let storage = LateStorage::new(SIZE);
    let (_served, mut clients) = serve(&storage, limits(8 * MIB), 2);
    let _closed = storage.close();
    send(&mut clients[0], READ, 0, 20);
    storage.wait_for(8);
    send(&mut clients[1], READ, 100, 20);
    storage.wait_for(9);
    // As the requests of the first one end, the second one gets its half.
    for _ in 0..5 {
        let calls = storage.wait_for(1);
        storage.let_go(*calls.iter().find(|call| call.1 < 100 * MIB).unwrap(), None);
        assert_eq!(clients[0].reply().1, 0);
    }
    let calls = storage.wait_for(4);
    storage.let_go(*calls.iter().find(|call| call.1 >= 100 * MIB).unwrap(), None);
    assert_eq!(clients[1].reply().1, 0);
    // Or a little less, as it had nothing at all for a moment.
    let calls = storage.wait_for(8);
    assert!(calls.iter().filter(|call| call.1 >= 100 * MIB).count() >= 3, "{calls:?}");
}

#[test]
fn threads_of_all_connections_are_bounded() {
    const CLIENTS: usize = 4;
    let storage = LateStorage::new(SIZE);
    let limits = ServerLimits { threads: 8, ..ServerLimits::default() };
    let (_served, mut clients) = serve(&storage, limits, CLIENTS);
    let closed = storage.close();
    for (n, client) in clients.iter_mut().enumerate() {
        client.send_blocks(READ, 0, 40 * n as u64..40 * (n as u64 + 1));
    }
    // The first one came when it was alone.
    storage.wait_for(8 + CLIENTS - 1);
    for _ in 0..40 * CLIENTS {
        let call = *storage.wait_for(1).last().unwrap();
        storage.let_go(call, None);
        assert_eq!(clients[(call.1 / BLOCK / 40) as usize].reply().1, 0);
    }
    drop(closed);
    assert_eq!(storage.most(), 8 + CLIENTS - 1);
}

#[test]
fn a_client_that_takes_no_replies_keeps_only_its_part() {
    let storage = LateStorage::new(SIZE);
    let (_served, mut clients) = serve(&storage, limits(8 * MIB), 2);
    let closed = storage.close();
    send(&mut clients[0], READ, 0, 16);
    for call in storage.wait_for(8) {
        storage.let_go(call, None);
    }
    // What was read for it counts until it takes it: the other one has a request at a time.
    send(&mut clients[1], READ, 100, 8);
    for n in 100..108 {
        let calls = storage.wait_for(1);
        let ours: Vec<_> = calls.iter().filter(|call| call.1 >= 100 * MIB).collect();
        assert!(ours.len() <= 1, "{calls:?}");
        storage.let_go((Kind::Read, n * MIB), None);
        assert_eq!(clients[1].reply().1, 0);
    }
    assert_eq!(storage.most(), 8);
    drop(closed);
    (0..16).for_each(|_| assert_eq!(clients[0].reply().1, 0));
}

#[test]
fn payload_that_is_being_sent_counts() {
    let storage = LateStorage::new(SIZE);
    let (_served, mut clients) = serve(&storage, limits(2 * MIB), 2);
    let closed = storage.close();
    send(&mut clients[0], READ, 0, 1);
    storage.wait_for(1);
    storage.let_go((Kind::Read, 0), None);
    send(&mut clients[1], READ, 100, 8);
    for n in 100..108 {
        storage.let_go((Kind::Read, n * MIB), None);
        assert_eq!(clients[1].reply().1, 0);
    }
    assert_eq!(storage.most(), 1);
    drop(closed);
    assert_eq!(clients[0].reply().1, 0);
}

/// Waits until so many clients use the export.
fn wait_for_connections(served: &Served, count: usize) {
    let begun = Instant::now();
    while served.server.exports()[0].connections != count {
        assert!(begun.elapsed() < PATIENCE, "{:?}", served.server.exports());
        std::thread::yield_now();
    }
}

#[test]
fn who_waits_for_room_notices_the_end() {
    for command in [READ, WRITE] {
        let storage = LateStorage::new(SIZE);
        let (served, mut clients) = serve(&storage, limits(8 * MIB), 2);
        let mut second = clients.pop().unwrap();
        let closed = storage.close();
        send(&mut clients[0], READ, 0, 12);
        storage.wait_for(8);
        // A write that has no room is not read from the socket: the client would wait for that.
        let second = std::thread::spawn(move || {
            if command == READ {
                send(&mut second, command, 100, 12);
            } else {
                send(&mut second, command, 100, 1);
                let more = second.request(command, 0, 1, 101 * MIB, MIB);
                second.send(&[more]);
            }
        });
        storage.wait_for(9);
        second.join().unwrap(); // it is gone now
        let kind = if command == READ { Kind::Read } else { Kind::Write };
        storage.let_go((kind, 100 * MIB), None);
        wait_for_connections(&served, 1);
        // So does a connection of a server that stops.
        let stopping = std::thread::spawn(move || drop(served));
        drop(closed);
        stopping.join().unwrap();
        assert_eq!(storage.running(), 0);
    }
}

#[test]
fn connections_are_bounded_and_slow_handshakes_end() {
    let storage = LateStorage::new(SIZE);
    let limits =
        ServerLimits { connections: 3, handshake: Duration::from_millis(300), ..ServerLimits::default() };
    let served = Served::new(&storage, limits, None);
    let mut client = Client::new(served.connect());
    // Those that send an option byte by byte, or nothing at all, do not keep others out for ever.
    let (mut slow, mut silent) = (served.connect(), served.connect());
    let trickle = std::thread::spawn(move || {
        let option = b"IHAVEOPT\0\0\0\x03\0\0\0\0";
        option.iter().cycle().any(|byte| {
            std::thread::sleep(Duration::from_millis(10)); // it is slow
            slow.write_all(&[*byte]).is_err()
        })
    });
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
    assert!(trickle.join().unwrap());
    // Who came in time stays.
    send(&mut client, READ, 0, 1);
    assert_eq!(client.reply().1, 0);
    let _others = [Client::new(served.connect()), Client::new(served.connect())];
    // One more is turned away.
    let mut last = std::os::unix::net::UnixStream::connect(served.socket()).unwrap();
    last.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(last.read(&mut [0]).unwrap(), 0);
}

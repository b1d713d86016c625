//! The NBD server over storage that answers late.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

mod common;

use blockfmt::nbd::{ServerLimits, TlsClient, TlsServer};
use blockfmt::{Scatter, Storage};
use common::late::{Kind, LateStorage};
use common::nbd::{BLOCK, Client, DISC, EIO, FLUSH, FUA, READ, Served, TRIM, WRITE, ZEROES};
use common::{Rng, make_certificates, wait_until_blocked};
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

const SIZE: u64 = 256 << 20;
/// Requests that the server hands to threads at a time.
const THREADS: usize = 32;

fn serve(storage: &Arc<LateStorage>, tls: Option<TlsServer>) -> (Served, UnixStream) {
    let served = Served::new(storage, ServerLimits::default(), tls);
    let stream = served.connect();
    (served, stream)
}

/// Requests of every kind are under way together and are answered in the order in which they end.
fn all_at_once(storage: &Arc<LateStorage>, client: &mut Client) {
    let threads = THREADS as u64;
    client.send_blocks(WRITE, 0, 0..threads);
    (0..threads).for_each(|_| assert_eq!(client.reply().1, 0));
    let closed = storage.close();
    let kinds = [(READ, Kind::Read), (WRITE, Kind::Write), (ZEROES, Kind::Zero), (TRIM, Kind::Discard)];
    for (command, kind) in kinds {
        client.send_blocks(command, 0, 0..threads);
        assert!(storage.wait_for(THREADS).iter().all(|call| call.0 == kind));
        for n in (0..threads).rev() {
            let error = if n % 5 == 2 { Some(libc::EIO) } else { None };
            storage.let_go((kind, n * BLOCK), error);
            let (cookie, seen, data) = client.reply();
            assert_eq!((cookie, seen), (n, if error.is_some() { EIO } else { 0 }));
            let expected = if command == READ && error.is_none() { BLOCK as usize } else { 0 };
            assert_eq!(data, vec![n as u8; expected]);
        }
    }
    drop(closed);
}

#[test]
fn requests_are_under_way_together() {
    let storage = LateStorage::new(SIZE);
    let (server, stream) = serve(&storage, None);
    all_at_once(&storage, &mut Client::new(stream));
    drop(server);
    assert_eq!(storage.running(), 0);
}

/// Keeps back what is written while it is told to, but for some bytes.
struct Withholding {
    stream: UnixStream,
    kept: Arc<Mutex<Option<Vec<u8>>>>,
}

impl Read for Withholding {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buf)
    }
}

impl Write for Withholding {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match &mut *self.kept.lock().unwrap() {
            Some(kept) => {
                let now = if kept.is_empty() { 10 } else { 0 };
                self.stream.write_all(&buf[..now])?;
                kept.extend(&buf[now..]);
                Ok(buf.len())
            }
            None => self.stream.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn requests_are_under_way_together_with_tls() {
    let dir = tempfile::tempdir().unwrap();
    make_certificates(dir.path());
    let storage = LateStorage::new(SIZE);
    let (_server, mut stream) = serve(&storage, Some(TlsServer::from_directory(dir.path(), true).unwrap()));
    stream.write_all(b"IHAVEOPT\0\0\0\x05\0\0\0\0").unwrap();
    stream.read_exact(&mut [0; 20]).unwrap();
    let (kept, mut below) = (Arc::default(), stream.try_clone().unwrap());
    let stream = Withholding { stream, kept: Arc::clone(&kept) };
    let tls = TlsClient::from_directory(dir.path()).unwrap();
    let mut client = Client::new(tls.connect(stream, "localhost").unwrap());
    all_at_once(&storage, &mut client);
    // A part of a record does not keep the replies to others.
    let _closed = storage.close();
    client.send_blocks(READ, 0, 1..2);
    storage.wait_for(1);
    *kept.lock().unwrap() = Some(Vec::new());
    client.send_blocks(READ, 0, 2..3);
    storage.let_go((Kind::Read, BLOCK), None);
    assert_eq!(client.reply().0, 1);
    let rest = kept.lock().unwrap().take().unwrap();
    assert!(!rest.is_empty());
    below.write_all(&rest).unwrap();
    storage.let_go((Kind::Read, 2 * BLOCK), None);
    assert_eq!(client.reply().0, 2);
}

#[test]
fn a_write_through_is_answered_after_its_flush() {
    let storage = LateStorage::new(SIZE);
    let (_server, stream) = serve(&storage, None);
    let mut client = Client::new(stream);
    let closed = storage.close();
    for (command, kind) in [(WRITE, Kind::Write), (ZEROES, Kind::Zero), (TRIM, Kind::Discard)] {
        for error in [None, Some(libc::EIO)] {
            client.send_blocks(command, FUA, 1..2);
            assert_eq!(storage.wait_for(1), [(kind, BLOCK)]);
            storage.let_go((kind, BLOCK), None);
            // Whether it failed is known to its reply.
            storage.let_go((Kind::Flush, 0), error);
            assert_eq!(client.reply().1, if error.is_some() { EIO } else { 0 });
            if error.is_some() {
                // Nothing is flushed for a write that failed.
                client.send_blocks(command, FUA, 2..3);
                storage.let_go((kind, 2 * BLOCK), error);
                assert_eq!(client.reply().1, EIO);
            }
        }
    }
    drop(closed);
}

#[test]
fn memory_under_way_is_bounded() {
    const REQUESTS: u64 = 60;
    const LEN: u64 = 4 << 20;
    let storage = LateStorage::new(SIZE);
    let (_server, stream) = serve(&storage, None);
    let mut client = Client::new(stream);
    let closed = storage.close();
    let requests: Vec<_> = (0..REQUESTS).map(|n| client.request(READ, 0, n, n * LEN, LEN)).collect();
    client.send(&requests);
    for n in 0..REQUESTS as usize {
        let call = storage.wait_for(16.min(REQUESTS as usize - n))[0];
        storage.let_go(call, None);
        assert_eq!(client.reply().1, 0);
    }
    assert_eq!(storage.most(), 16, "64 MiB of payload");
    // More requests than may be under way wait for their turn.
    client.send_blocks(READ, 0, 0..500);
    storage.wait_for(THREADS);
    drop(closed);
    (0..500).for_each(|_| assert_eq!(client.reply().1, 0));
    // One request may be longer than all others together may be.
    let long = client.request(READ, 0, 1, 0, 32 << 20);
    client.send(&[long]);
    assert_eq!(client.reply().2.len(), 32 << 20);
}

#[test]
fn the_end_of_a_connection_waits_for_its_requests() {
    const REQUESTS: u64 = 40;
    for goodbye in [false, true] {
        let storage = LateStorage::new(SIZE);
        let (server, stream) = serve(&storage, None);
        let mut client = Client::new(stream);
        let closed = storage.close();
        client.send_blocks(WRITE, 0, 1..1 + REQUESTS);
        if goodbye {
            let disc = client.request(DISC, 0, 0, 0, 0);
            client.send(&[disc]);
        }
        storage.wait_for(THREADS);
        drop(client);
        let (task, told) = std::sync::mpsc::channel();
        let (late, server) = (storage.clone(), Arc::new(server));
        let remover = server.clone();
        let thread = std::thread::spawn(move || {
            task.send(std::fs::read_link("/proc/thread-self").unwrap()).unwrap();
            remover.server.remove_export("disk").unwrap();
            // The removal itself flushes, which is over.
            assert_eq!(late.running(), 0);
        });
        wait_until_blocked(&thread, &told.recv().unwrap());
        assert_eq!(storage.running(), THREADS);
        if goodbye {
            // Those that have not begun do although the first reply finds nobody.
            for _ in THREADS..REQUESTS as usize {
                storage.let_go(storage.wait_for(THREADS)[0], None);
            }
            storage.wait_for(THREADS);
        }
        drop(closed);
        thread.join().unwrap();
        let stored = |n: &u64| {
            let mut byte = [0];
            storage.readv(Scatter::new(&mut byte), n * BLOCK).unwrap();
            u64::from(byte[0]) == *n
        };
        let count = (1..1 + REQUESTS).filter(stored).count();
        // Who says goodbye gets all done; otherwise what had begun is.
        assert!(if goodbye { count == 40 } else { count >= THREADS }, "{count}");
    }
}

/// A request under way: its command, its blocks, and what these become.
type Pending = (u16, Range<u64>, Option<u8>);

fn bytes_of(blocks: &Range<u64>) -> Range<usize> {
    (blocks.start * BLOCK) as usize..(blocks.end * BLOCK) as usize
}

/// Takes a reply and compares it with, or does it to, the model.
fn settle(client: &mut Client, pending: &mut HashMap<u64, Pending>, model: &mut [u8]) {
    let (cookie, error, data) = client.reply();
    let (command, blocks, becomes) = pending.remove(&cookie).expect("each request is answered once");
    assert_eq!(error, 0);
    let part = &mut model[bytes_of(&blocks)];
    assert!(command != READ || data == part, "{blocks:?} differ");
    if let Some(byte) = becomes {
        part.fill(byte);
    }
}

#[test]
fn random_requests_at_depth() {
    const BLOCKS: u64 = 256;
    let storage = LateStorage::new(BLOCKS * BLOCK);
    let (server, stream) = serve(&storage, None);
    let mut client = Client::new(stream);
    let mut rng = Rng(7);
    let mut model = vec![0u8; (BLOCKS * BLOCK) as usize];
    let mut pending: HashMap<u64, Pending> = HashMap::new();
    for cookie in 0..6000u64 {
        let command = [READ, READ, WRITE, WRITE, WRITE, ZEROES, TRIM, FLUSH][rng.below(8) as usize];
        let start = rng.below(BLOCKS);
        let (blocks, flags) = match command {
            FLUSH => (0..0, 0),
            READ => (start..(start + 1 + rng.below(20)).min(BLOCKS), 0),
            _ => (start..(start + 1 + rng.below(20)).min(BLOCKS), u16::from(rng.below(8) == 0)),
        };
        let overlaps = |p: &Pending| p.1.start < blocks.end && blocks.start < p.1.end;
        while pending.len() == 48 || pending.values().any(overlaps) {
            settle(&mut client, &mut pending, &mut model);
        }
        let byte = rng.next() as u8;
        let becomes = match command {
            WRITE => Some(byte),
            // The storage releases what is discarded.
            ZEROES | TRIM => Some(0),
            _ => None,
        };
        let len = (blocks.end - blocks.start) * BLOCK;
        let mut out = client.request(command, flags, cookie, blocks.start * BLOCK, len);
        if command == WRITE {
            out.extend(vec![byte; len as usize]);
        }
        client.send(&[out]);
        pending.insert(cookie, (command, blocks, becomes));
    }
    while !pending.is_empty() {
        settle(&mut client, &mut pending, &mut model);
    }
    drop(client);
    drop(server);
    let mut seen = vec![0; model.len()];
    storage.readv(Scatter::new(&mut seen), 0).unwrap();
    assert!(seen == model);
}

//! A client that speaks as little of the NBD protocol as a test needs, and a server for it.
#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers, too")]

use super::late::{LateStorage, PATIENCE};
use blockfmt::nbd::{Export, Server, ServerLimits, TlsServer};
use blockfmt::{Format, OpenOptions};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use tempfile::TempDir;

pub const BLOCK: u64 = 4096;
pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const ZEROES: u16 = 6;
pub const FUA: u16 = 1;
pub const EIO: u32 = 5;

pub trait Peer: Read + Write + Send {}

impl<T: Read + Write + Send> Peer for T {}

/// A server that exports a storage as "disk".
pub struct Served {
    pub server: Server,
    dir: TempDir,
}

impl Served {
    pub fn new(storage: &Arc<LateStorage>, limits: ServerLimits, tls: Option<TlsServer>) -> Self {
        let disk = OpenOptions::new(Format::Raw).open_storage(storage.clone(), "late").unwrap();
        let server = Server::with_limits(limits);
        let export = Export { name: "disk".into(), description: String::new(), disk, read_only: false };
        server.add_export(export).unwrap();
        if let Some(tls) = tls {
            server.require_tls(tls);
        }
        let served = Served { server, dir: tempfile::tempdir().unwrap() };
        served.server.listen_unix(&served.socket()).unwrap();
        served
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    /// A connection that has exchanged flags.
    pub fn connect(&self) -> UnixStream {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        stream
    }
}

/// A client that gets simple replies.
pub struct Client {
    pub stream: Box<dyn Peer>,
    /// Lengths of the reads under way, by cookie.
    reads: HashMap<u64, usize>,
}

impl Client {
    /// Chooses the export, and lets the server notice that its storage is late.
    pub fn new(stream: impl Peer + 'static) -> Self {
        let mut client = Client { stream: Box::new(stream), reads: HashMap::new() };
        client.stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk").unwrap();
        client.stream.read_exact(&mut [0; 10]).unwrap();
        let requests: Vec<_> = (0..8).map(|n| client.request(READ, 0, n, n * BLOCK, BLOCK)).collect();
        client.send(&requests);
        let flushes: Vec<_> = (0..2).map(|n| client.request(FLUSH, 0, n, 0, 0)).collect();
        client.send(&flushes);
        (0..10).for_each(|_| assert_eq!(client.reply().1, 0));
        client
    }

    pub fn request(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, len: u64) -> Vec<u8> {
        if command == READ {
            self.reads.insert(cookie, len as usize);
        }
        let mut out = 0x2560_9513u32.to_be_bytes().to_vec();
        out.extend(flags.to_be_bytes());
        out.extend(command.to_be_bytes());
        out.extend(cookie.to_be_bytes());
        out.extend(offset.to_be_bytes());
        out.extend((len as u32).to_be_bytes());
        out
    }

    /// Requests of one kind for the `n`th block each, with `n` as cookie, sent together.
    pub fn send_blocks(&mut self, command: u16, flags: u16, blocks: Range<u64>) {
        let one = |n: u64| {
            let mut out = self.request(command, flags, n, n * BLOCK, BLOCK);
            if command == WRITE {
                out.extend([n as u8; BLOCK as usize]);
            }
            out
        };
        let all: Vec<_> = blocks.map(one).collect();
        self.send(&all);
    }

    pub fn send(&mut self, requests: &[Vec<u8>]) {
        self.stream.write_all(&requests.concat()).unwrap();
        self.stream.flush().unwrap();
    }

    /// Cookie, error and data of the next reply.
    pub fn reply(&mut self) -> (u64, u32, Vec<u8>) {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).unwrap();
        assert_eq!(head[..4], 0x6744_6698u32.to_be_bytes());
        let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
        let cookie = u64::from_be_bytes(head[8..].try_into().unwrap());
        let len = self.reads.remove(&cookie).filter(|_| error == 0);
        let mut data = vec![0; len.unwrap_or(0)];
        self.stream.read_exact(&mut data).unwrap();
        (cookie, error, data)
    }
}

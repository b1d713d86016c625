//! A port that writes the frames sent to it into a pcapng file. As the target of a mirror it captures packets.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use super::{Batch, Port};
use crate::clock::Clock;
use crate::packet::Burst;

/// Gives the writer that a capture goes on with when the present one is full; an error ends the capture.
pub type NextWriter<W> = Box<dyn FnMut() -> io::Result<W> + Send>;

/// See the module's documentation. Timestamps are dates in nanoseconds.
pub struct CapturePort<W> {
    clock: Clock,
    snap: u32,
    /// Most bytes given to one writer.
    limit: u64,
    out: Mutex<Output<W>>,
}

struct Output<W> {
    writer: W,
    written: u64,
    next: NextWriter<W>,
    /// Nothing more is written.
    ended: bool,
}

impl<W: Write> Output<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.writer.write_all(bytes)
    }

    /// Writes a packet's block, into the next writer if this one is full.
    fn add(&mut self, block: &[u8], limit: u64, snap: u32) -> io::Result<()> {
        if self.written + block.len() as u64 > limit {
            self.writer.flush()?;
            self.writer = (self.next)()?;
            self.written = 0;
            self.write(&head(snap))?;
        }
        self.write(block)
    }
}

impl<W: Write + Send> CapturePort<W> {
    /// Starts a capture that keeps at most `snap` bytes of each frame.
    pub fn new(out: W, snap: u32, clock: Clock) -> io::Result<Self> {
        Self::parts(out, snap, clock, u64::MAX, Box::new(|| Err(io::ErrorKind::StorageFull.into())))
    }

    /// Starts a capture that goes on with another writer when one has taken `limit` bytes. Each holds one packet at
    /// least.
    pub fn parts(first: W, snap: u32, clock: Clock, limit: u64, next: NextWriter<W>) -> io::Result<Self> {
        let snap = snap.max(64);
        let head = head(snap);
        let mut out = Output { writer: first, written: 0, next, ended: false };
        out.write(&head)?;
        // A packet's block has 32 bytes around the frame, and up to three of padding.
        let limit = limit.max(head.len() as u64 + u64::from(snap) + 36);
        Ok(Self { clock, snap, limit, out: Mutex::new(out) })
    }

    /// Ends the capture and gives the writer back, flushed.
    pub fn finish(self) -> io::Result<W> {
        let mut out = self.out.into_inner().writer;
        out.flush()?;
        Ok(out)
    }
}

impl CapturePort<File> {
    /// Starts a capture into a file. At `limit` bytes the file is renamed to its name with `.1` behind it, those with
    /// a number to the next one, and the capture goes on with a new file, so that the last `files` remain. One file
    /// alone ends the capture when it is full.
    pub fn files(path: &Path, snap: u32, clock: Clock, limit: u64, files: u32) -> io::Result<Self> {
        let first = File::create(path)?;
        let path = path.to_path_buf();
        let next = move || {
            if files < 2 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            for n in (1..files).rev() {
                match fs::rename(numbered(&path, n - 1), numbered(&path, n)) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                    _ => {}
                }
            }
            File::create(&path)
        };
        Self::parts(first, snap, clock, limit, Box::new(next))
    }
}

/// Name of the `n`th file before the present one.
fn numbered(path: &Path, n: u32) -> PathBuf {
    if n == 0 {
        return path.to_path_buf();
    }
    let mut name = path.as_os_str().to_os_string();
    name.push(format!(".{n}"));
    name.into()
}

/// What a capture starts with.
fn head(snap: u32) -> Vec<u8> {
    // Section header: byte order, version 1.0, unknown length.
    let mut section = 0x1a2b_3c4d_u32.to_le_bytes().to_vec();
    section.extend_from_slice(&[1, 0, 0, 0]);
    section.extend_from_slice(&u64::MAX.to_le_bytes());
    // One Ethernet interface with timestamps in nanoseconds.
    let mut interface = vec![1, 0, 0, 0];
    interface.extend_from_slice(&snap.to_le_bytes());
    interface.extend_from_slice(&[9, 0, 1, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
    [block(0x0a0d_0d0a, &section), block(1, &interface)].concat()
}

/// A pcapng block: type, length, body padded to 32 bits, length.
fn block(kind: u32, body: &[u8]) -> Vec<u8> {
    let padded = body.len().next_multiple_of(4);
    let len = (padded + 12) as u32;
    let mut b = Vec::with_capacity(len as usize);
    b.extend_from_slice(&kind.to_le_bytes());
    b.extend_from_slice(&len.to_le_bytes());
    b.extend_from_slice(body);
    b.resize(8 + padded, 0);
    b.extend_from_slice(&len.to_le_bytes());
    b
}

impl<W: Write + Send> Port for CapturePort<W> {
    fn kind(&self) -> &'static str {
        "capture"
    }

    fn receive(&self, _queue: usize, _burst: &mut Burst) {}

    fn transmit(&self, _queue: usize, batch: &Batch<'_>) -> usize {
        let now = self.clock.date(self.clock.now());
        let mut out = self.out.lock();
        for (i, p) in batch.iter().enumerate() {
            if out.ended {
                return i;
            }
            let mut frame = p.to_vec();
            let len = frame.len() as u32;
            frame.truncate(self.snap as usize);
            let mut body = Vec::with_capacity(20 + frame.len());
            for word in [0, (now >> 32) as u32, now as u32, frame.len() as u32, len] {
                body.extend_from_slice(&word.to_le_bytes());
            }
            body.extend_from_slice(&frame);
            if let Err(e) = out.add(&block(6, &body), self.limit, self.snap) {
                tracing::warn!(error = %e, "the capture ends");
                out.ended = true;
                return i;
            }
        }
        batch.len()
    }

    fn ready_fd(&self, _queue: usize) -> Option<RawFd> {
        None
    }

    fn arm(&self, _queue: usize, _on: bool) -> bool {
        false
    }
}

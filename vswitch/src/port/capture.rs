//! A port that writes the frames sent to it into a pcapng file. As the target of a mirror it captures packets.

use std::io::{self, Write};
use std::os::fd::RawFd;

use parking_lot::Mutex;

use super::{Batch, Port};
use crate::clock::Clock;
use crate::packet::Burst;

/// See the module's documentation. Timestamps are dates in nanoseconds.
#[derive(Debug)]
pub struct CapturePort<W> {
    clock: Clock,
    snap: u32,
    out: Mutex<W>,
}

impl<W: Write + Send> CapturePort<W> {
    /// Starts a capture that keeps at most `snap` bytes of each frame.
    pub fn new(mut out: W, snap: u32, clock: Clock) -> io::Result<Self> {
        let snap = snap.max(64);
        // Section header: byte order, version 1.0, unknown length.
        let mut section = 0x1a2b_3c4d_u32.to_le_bytes().to_vec();
        section.extend_from_slice(&[1, 0, 0, 0]);
        section.extend_from_slice(&u64::MAX.to_le_bytes());
        out.write_all(&block(0x0a0d_0d0a, &section))?;
        // One Ethernet interface with timestamps in nanoseconds.
        let mut interface = vec![1, 0, 0, 0];
        interface.extend_from_slice(&snap.to_le_bytes());
        interface.extend_from_slice(&[9, 0, 1, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
        out.write_all(&block(1, &interface))?;
        Ok(Self { clock, snap, out: Mutex::new(out) })
    }

    /// Ends the capture and gives the writer back, flushed.
    pub fn finish(self) -> io::Result<W> {
        let mut out = self.out.into_inner();
        out.flush()?;
        Ok(out)
    }
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
        let mut blocks = Vec::new();
        for p in batch.iter() {
            let mut frame = p.to_vec();
            let len = frame.len() as u32;
            frame.truncate(self.snap as usize);
            let mut body = Vec::with_capacity(20 + frame.len());
            for word in [0, (now >> 32) as u32, now as u32, frame.len() as u32, len] {
                body.extend_from_slice(&word.to_le_bytes());
            }
            body.extend_from_slice(&frame);
            blocks.extend(block(6, &body));
        }
        match self.out.lock().write_all(&blocks) {
            Ok(()) => batch.len(),
            Err(e) => {
                tracing::warn!(error = %e, "cannot write the capture");
                0
            }
        }
    }

    fn ready_fd(&self, _queue: usize) -> Option<RawFd> {
        None
    }

    fn arm(&self, _queue: usize, _on: bool) -> bool {
        false
    }
}

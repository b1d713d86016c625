//! A Unix stream socket with the framing that QEMU, passt and gvproxy share: each frame follows its length, 4 bytes
//! big-endian.
//!
//! The framing has no place for checksum and segmentation offloads, so this side does them in software: the guest then
//! handles few large TCP segments, and the peer sees ordinary frames.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::super::iov::{GuestVectors, send};
use super::coalesce::Run;
use super::pair::put_header;
use super::{HEADER_LEN, Header, NetBackend, NetPort, Sent, net_features as f, offload};

/// The longest frame accepted from the peer.
const FRAME_MAX: usize = 14 + 4 + 65536;
/// Received bytes that are held at most; a read asks for all that is free. More frames at a time join better.
const BUFFER: usize = 128 << 10;

/// A peer that listens on a Unix socket. With offloads in software, with one pair of queues.
pub struct StreamBackend {
    path: Option<PathBuf>,
    stream: Mutex<Option<UnixStream>>,
    /// What may be delivered to the driver.
    features: Arc<AtomicU64>,
}

impl StreamBackend {
    /// Connects to `path`, now if somebody listens there, or else when somebody does.
    pub fn new(path: &Path) -> Self {
        let stream = UnixStream::connect(path).ok();
        Self { path: Some(path.to_owned()), stream: Mutex::new(stream), features: Arc::default() }
    }

    /// Whether the peer was there when the back-end was made.
    pub fn is_connected(&self) -> bool {
        self.stream.lock().is_some()
    }

    /// Uses a connection that exists; when the peer closes it the link stays down.
    pub fn from_stream(stream: UnixStream) -> Self {
        Self { path: None, stream: Mutex::new(Some(stream)), features: Arc::default() }
    }
}

impl NetBackend for StreamBackend {
    fn offloads(&self) -> u64 {
        let host = f::CSUM | f::HOST_TSO4 | f::HOST_TSO6 | f::HOST_ECN;
        host | f::GUEST_CSUM | f::GUEST_TSO4 | f::GUEST_TSO6
    }

    fn set_offloads(&self, features: u64) -> io::Result<()> {
        self.features.store(features, Ordering::Release);
        Ok(())
    }

    fn open(&self, _index: u16) -> io::Result<Box<dyn NetPort>> {
        // The connection stays with the back-end, so that it outlives a reset of the device.
        let mut held = self.stream.lock();
        if held.is_none()
            && let Some(path) = &self.path
        {
            *held = UnixStream::connect(path).ok();
        }
        let stream = held.as_ref().map(UnixStream::try_clone).transpose()?;
        if let Some(stream) = &stream {
            stream.set_nonblocking(true)?;
        }
        Ok(Box::new(StreamPort {
            path: self.path.clone(),
            stream,
            features: Arc::clone(&self.features),
            buffered: Vec::new(),
            start: 0,
            end: 0,
            pending: Vec::new(),
            scratch: Vec::new(),
        }))
    }
}

struct StreamPort {
    path: Option<PathBuf>,
    stream: Option<UnixStream>,
    features: Arc<AtomicU64>,
    /// Received bytes from `start` to `end`; allocated with the first of them.
    buffered: Vec<u8>,
    start: usize,
    end: usize,
    /// What is left of frames that the socket took only a part of.
    pending: Vec<u8>,
    /// A frame while its offloads are done.
    scratch: Vec<u8>,
}

fn closed() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}

impl StreamPort {
    /// Where the next frame is in the buffer, when all of it is there.
    fn next_frame(&self) -> io::Result<Option<(usize, usize)>> {
        let bytes = &self.buffered[self.start..self.end];
        let Some(length) = bytes.first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length) as usize;
        if length > FRAME_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "The peer announced a frame that is too long",
            ));
        }
        let from = self.start + 4;
        Ok((bytes.len() >= 4 + length).then_some((from, from + length)))
    }

    fn fill(&mut self) -> io::Result<bool> {
        let stream = self.stream.as_mut().ok_or_else(closed)?;
        self.buffered.resize(BUFFER, 0);
        self.buffered.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        match stream.read(&mut self.buffered[self.end..]) {
            Ok(0) => Err(closed()),
            Ok(n) => {
                self.end += n;
                Ok(true)
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Puts the frame at `from..to` into `frame`, with those that continue it, and with the header.
    fn deliver(&mut self, from: usize, to: usize, frame: &mut [u8]) -> io::Result<usize> {
        let mut len = to - from;
        let (head, body) = frame.split_at_mut(HEADER_LEN);
        body[..len].copy_from_slice(&self.buffered[from..to]);
        let mut header = Header::default();
        if let Some(mut run) = Run::begin(&body[..len], self.features.load(Ordering::Acquire)) {
            while !run.is_closed()
                && let Some((from, to)) = self.next_frame()?
                && run.join(body, &self.buffered[from..to])
            {
                self.start = to;
                len = run.len();
            }
            header = run.finish(body);
        }
        put_header(&header, head);
        Ok(HEADER_LEN + len)
    }

    /// Sends what a frame with offloads becomes.
    fn send_offloaded(&mut self, header: &Header, frame: &GuestVectors<'_>) -> io::Result<Sent> {
        self.scratch.resize(frame.len(), 0);
        frame.gather().copy_to(&mut self.scratch);
        if offload::transmit(header, &mut self.scratch, &mut self.pending).is_err() {
            return Ok(Sent::Dropped);
        }
        self.flush()?;
        Ok(Sent::Yes)
    }
}

impl NetPort for StreamPort {
    fn descriptor(&self) -> Option<RawFd> {
        self.stream.as_ref().map(AsRawFd::as_raw_fd)
    }

    fn wants_write(&self) -> bool {
        !self.pending.is_empty()
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut done = 0;
        while done < self.pending.len() {
            let stream = self.stream.as_ref().ok_or_else(closed)?;
            match send(stream.as_fd(), &self.pending[done..]) {
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.pending.drain(..done);
        Ok(())
    }

    fn is_ready(&self) -> bool {
        // A malformed length is for `receive` to report.
        self.next_frame().map_or(true, |next| next.is_some())
    }

    fn receive(&mut self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            if let Some((from, to)) = self.next_frame()? {
                self.start = to;
                if to - from < 14 {
                    continue;
                }
                return self.deliver(from, to, frame).map(Some);
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    fn send(&mut self, header: &Header, frame: &mut GuestVectors<'_>) -> io::Result<Sent> {
        self.flush()?;
        if !self.pending.is_empty() {
            return Ok(Sent::Later);
        }
        if header.flags & offload::NEEDS_CSUM != 0 || header.gso_type != 0 {
            return self.send_offloaded(header, frame);
        }
        let stream = self.stream.as_ref().ok_or_else(closed)?;
        let length = (frame.len() as u32).to_be_bytes();
        let written = match frame.send_to(stream.as_fd(), &length) {
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Sent::Later),
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => return Ok(Sent::Dropped),
            Err(e) => return Err(e),
        };
        if written < 4 + frame.len() {
            // The frame is begun and must be completed, before anything else.
            self.pending.extend(&length[written.min(4)..]);
            let done = written.saturating_sub(4);
            let rest = frame.gather().slice(done, frame.len() - done).to_vec();
            self.pending.extend(rest);
        }
        Ok(Sent::Yes)
    }

    fn reconnect(&mut self) -> io::Result<()> {
        self.stream = None;
        self.pending.clear();
        (self.start, self.end) = (0, 0);
        let stream = UnixStream::connect(self.path.as_ref().ok_or_else(closed)?)?;
        stream.set_nonblocking(true)?;
        self.stream = Some(stream);
        Ok(())
    }
}

//! A Unix stream socket with the framing that QEMU, passt and gvproxy share: each frame follows its length, 4 bytes
//! big-endian.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use super::super::iov::{GuestVectors, send};
use super::pair::put_header;
use super::{HEADER_LEN, Header, NetBackend, NetPort, Sent};

/// The longest frame accepted from the peer.
const FRAME_MAX: usize = 14 + 4 + 65536;
/// What is read from the socket at once.
const CHUNK: usize = 16 << 10;

/// A peer that listens on a Unix socket. Without offloads, with one pair of queues.
pub struct StreamBackend {
    path: Option<PathBuf>,
    stream: Mutex<Option<UnixStream>>,
}

impl StreamBackend {
    /// Connects to `path`, now if somebody listens there, or else when somebody does.
    pub fn new(path: &Path) -> Self {
        let stream = UnixStream::connect(path).ok();
        Self { path: Some(path.to_owned()), stream: Mutex::new(stream) }
    }

    /// Whether the peer was there when the back-end was made.
    pub fn is_connected(&self) -> bool {
        self.stream.lock().is_some()
    }

    /// Uses a connection that exists; when the peer closes it the link stays down.
    pub fn from_stream(stream: UnixStream) -> Self {
        Self { path: None, stream: Mutex::new(Some(stream)) }
    }
}

impl NetBackend for StreamBackend {
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
            buffered: Vec::new(),
            start: 0,
            pending: Vec::new(),
        }))
    }
}

struct StreamPort {
    path: Option<PathBuf>,
    stream: Option<UnixStream>,
    /// Received bytes; those before `start` were delivered.
    buffered: Vec<u8>,
    start: usize,
    /// What is left of a frame that the socket took only a part of.
    pending: Vec<u8>,
}

fn closed() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}

impl StreamPort {
    /// The length of the next frame and whether all of it is there.
    fn next_frame(&self) -> io::Result<Option<usize>> {
        let bytes = &self.buffered[self.start..];
        let Some(length) = bytes.first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length) as usize;
        if length > FRAME_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "The peer announced a frame that is too long",
            ));
        }
        Ok((bytes.len() >= 4 + length).then_some(length))
    }

    fn fill(&mut self) -> io::Result<bool> {
        let stream = self.stream.as_mut().ok_or_else(closed)?;
        self.buffered.drain(..self.start);
        self.start = 0;
        let len = self.buffered.len();
        self.buffered.resize(len + CHUNK, 0);
        let result = stream.read(&mut self.buffered[len..]);
        self.buffered.truncate(len + *result.as_ref().unwrap_or(&0));
        match result {
            Ok(0) => Err(closed()),
            Ok(_) => Ok(true),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(false),
            Err(e) => Err(e),
        }
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
        while !self.pending.is_empty() {
            let stream = self.stream.as_ref().ok_or_else(closed)?;
            match send(stream.as_fd(), &self.pending) {
                Ok(n) => {
                    self.pending.drain(..n);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn receive(&mut self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            if let Some(length) = self.next_frame()? {
                let from = self.start + 4;
                self.start = from + length;
                if length < 14 {
                    continue;
                }
                put_header(&Header::default(), frame);
                frame[HEADER_LEN..HEADER_LEN + length].copy_from_slice(&self.buffered[from..from + length]);
                return Ok(Some(HEADER_LEN + length));
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    fn send(&mut self, _header: &Header, frame: &mut GuestVectors<'_>) -> io::Result<Sent> {
        self.flush()?;
        if !self.pending.is_empty() {
            return Ok(Sent::Later);
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
        self.buffered.clear();
        self.pending.clear();
        self.start = 0;
        let stream = UnixStream::connect(self.path.as_ref().ok_or_else(closed)?)?;
        stream.set_nonblocking(true)?;
        self.stream = Some(stream);
        Ok(())
    }
}

//! One connection between a guest's port and a Unix socket.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::EventSet;

use super::super::iov::send;
use super::packet::{NO_RECEIVE, NO_SEND, Packet};

/// What the guest may send before the host's program reads it.
pub(super) const BUFFER: u32 = 256 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The guest was asked and did not answer yet.
    Requested,
    Open,
    /// This side closed both directions; the guest's answer is awaited.
    Closing,
}

pub(super) struct Connection {
    stream: UnixStream,
    pub(super) stage: Stage,
    pub(super) token: u32,
    /// Bytes of the guest that the socket had no room for.
    pending: Vec<u8>,
    /// Bytes passed on to the socket so far, and as the guest was last told.
    pub(super) forwarded: u32,
    told: u32,
    /// Bytes sent to the guest so far.
    sent: u32,
    /// The guest's credit: the size of its buffer, and the bytes it took out of it.
    peer_buffer: u32,
    peer_forwarded: u32,
    /// The host's program sends no more.
    pub(super) ended: bool,
    /// The host's program closed its end altogether.
    pub(super) hung_up: bool,
    /// The guest sends no more; the socket is shut down once `pending` is written.
    guest_done: bool,
    /// The guest receives no more.
    guest_deaf: bool,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, token: u32, stage: Stage) -> Self {
        Self {
            stream,
            stage,
            token,
            pending: Vec::new(),
            forwarded: 0,
            told: 0,
            sent: 0,
            peer_buffer: 0,
            peer_forwarded: 0,
            ended: false,
            hung_up: false,
            guest_done: false,
            guest_deaf: false,
        }
    }

    pub(super) fn descriptor(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    pub(super) fn learn_credit(&mut self, packet: &Packet) {
        self.peer_buffer = u32::from_le(packet.buffer);
        self.peer_forwarded = u32::from_le(packet.forwarded);
    }

    /// Bytes that the guest has room for.
    pub(super) fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_buffer.saturating_sub(in_flight)
    }

    /// What to watch the socket for. `room`: the guest has buffers for packets.
    pub(super) fn interest(&self, room: bool) -> EventSet {
        let mut events = EventSet::empty();
        if self.stage == Stage::Open && room && !self.ended && !self.guest_deaf && self.credit() != 0 {
            events |= EventSet::IN;
        }
        if !self.pending.is_empty() {
            events |= EventSet::OUT;
        }
        events
    }

    /// Reads bytes for the guest; `None` when there are none now, 0 at the end.
    pub(super) fn read(&mut self, data: &mut [u8]) -> io::Result<Option<usize>> {
        match self.stream.read(data) {
            Ok(n) => {
                self.sent = self.sent.wrapping_add(n as u32);
                Ok(Some(n))
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Takes bytes of the guest. Fails when the guest exceeds its credit or the socket is gone.
    pub(super) fn write(&mut self, data: &[u8]) -> io::Result<()> {
        if self.guest_done || self.pending.len() + data.len() > BUFFER as usize {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut done = 0;
        if self.pending.is_empty() {
            done = self.pass_on(data)?;
        }
        self.pending.extend(&data[done..]);
        Ok(())
    }

    fn pass_on(&mut self, data: &[u8]) -> io::Result<usize> {
        match send(self.stream.as_fd(), data) {
            Ok(n) => {
                self.forwarded = self.forwarded.wrapping_add(n as u32);
                Ok(n)
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(0),
            Err(e) => Err(e),
        }
    }

    /// Writes what is pending.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        if !self.pending.is_empty() {
            let pending = std::mem::take(&mut self.pending);
            let done = self.pass_on(&pending)?;
            self.pending = pending;
            self.pending.drain(..done);
        }
        if self.pending.is_empty() && self.guest_done {
            // The socket may be closed by the other side already.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// The guest shuts down a direction; true when nothing is left to do.
    pub(super) fn shut_down(&mut self, flags: u32) -> io::Result<bool> {
        self.guest_done |= flags & NO_SEND != 0;
        self.guest_deaf |= flags & NO_RECEIVE != 0;
        self.flush()?;
        Ok(self.is_finished())
    }

    /// Whether the guest closed both directions and all its bytes are with the host's program.
    pub(super) fn is_finished(&self) -> bool {
        self.guest_done && self.guest_deaf && self.pending.is_empty()
    }

    /// Whether the guest should be told that there is room again.
    pub(super) fn owes_credit(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= BUFFER / 2
    }

    /// Puts the credit into a packet.
    pub(super) fn stamp(&mut self, packet: &mut Packet) {
        packet.buffer = BUFFER.to_le();
        packet.forwarded = self.forwarded.to_le();
        self.told = self.forwarded;
    }

    /// Tells the host's program that the guest accepted.
    pub(super) fn welcome(&mut self, port: u32) -> io::Result<()> {
        let line = format!("OK {port}\n");
        match send(self.stream.as_fd(), line.as_bytes()) {
            Ok(n) if n == line.len() => Ok(()),
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(e) => Err(e),
        }
    }
}

//! Both directions of a connection with their buffers.

use super::stream::Stream;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::BorrowedFd;

/// Bytes read from a client at once, besides payload.
const INPUT_BYTES: usize = 64 << 10;
/// Memory for replies that a connection keeps.
const KEEP_BYTES: usize = 1 << 20;
/// Payload of this length is sent from where it is.
const COPY_BYTES: usize = 64 << 10;

pub(super) struct Link<'a> {
    stream: &'a mut Stream,
    input: Box<[u8]>,
    /// The part of `input` that came and was not taken.
    unread: Range<usize>,
    /// Replies that are not sent yet.
    pub out: Vec<u8>,
}

impl<'a> Link<'a> {
    pub fn new(stream: &'a mut Stream) -> Self {
        Link { stream, input: vec![0; INPUT_BYTES].into(), unread: 0..0, out: Vec::new() }
    }

    /// Bytes that came and were not taken.
    pub fn input(&self) -> &[u8] {
        &self.input[self.unread.clone()]
    }

    /// Whether more than [`input`](Self::input) came, as far as that can be told without asking the kernel.
    pub fn has_more_input(&self) -> bool {
        self.stream.has_input()
    }

    /// Moves what came to `into`, as much as fits, and returns its length.
    pub fn take(&mut self, into: &mut [u8]) -> usize {
        let len = into.len().min(self.unread.len());
        into[..len].copy_from_slice(&self.input()[..len]);
        self.unread.start += len;
        len
    }

    /// Waits for bytes of the client, or for `event`; returns whether [`receive`](Self::receive) has bytes.
    pub fn wait(&self, event: BorrowedFd<'_>) -> io::Result<bool> {
        Ok(self.stream.has_input() || self.stream.wait_for_input_or(event)?)
    }

    /// Takes bytes from the client, first to `into` and what is more to the [`input`](Self::input), and returns the
    /// number in `into`. It may be that nothing came; the end is [`io::ErrorKind::UnexpectedEof`].
    pub fn receive(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.input.copy_within(self.unread.clone(), 0);
        self.unread = 0..self.unread.len();
        let Some(len) = self.stream.receive(into, &mut self.input[self.unread.end..])? else { return Ok(0) };
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let direct = len.min(into.len());
        self.unread.end += len - direct;
        Ok(direct)
    }

    /// Sends the replies.
    pub fn send(&mut self) -> io::Result<()> {
        if !self.out.is_empty() {
            self.stream.write_all(&self.out)?;
            self.out.clear();
            self.out.shrink_to(KEEP_BYTES);
        }
        Ok(())
    }

    /// Adds payload to the replies, or sends all with it.
    pub fn add_payload(&mut self, payload: &[u8]) -> io::Result<()> {
        if payload.len() < COPY_BYTES {
            self.out.extend(payload);
            return Ok(());
        }
        self.send()?;
        self.stream.write_all(payload)
    }
}

//! Requests after the handshake.
//!
//! The thread of a connection does requests itself as long as it need not sleep for them. Those that arrived together
//! are read with one system call and answered with one, unless the first answer would wait noticeably longer for that.
//! Requests to storage that answers late are left to a queue and answered in the order in which they end.

use super::budget::Budget;
use super::handshake::Session;
use super::late::{Completed, Late};
use super::link::Link;
use super::proto::{EXTENDED_REQUEST_MAGIC, MAX_PAYLOAD, REQUEST_MAGIC, command, command_flag, error_number};
use super::reply::{self, Outcome};
use super::status::statuses;
use super::stream::Stream;
use crate::iobuf::AlignedBuf;
use crate::queue::{self, Pace};
use crate::{Disk, Result};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

const EINVAL: u32 = 22;
const EPERM: u32 = 1;
const EOVERFLOW: u32 = 75;
/// Replies of this length are sent without waiting for more.
const OUTPUT_BYTES: usize = 256 << 10;
/// Time that a reply, or a request for the queue, may wait for others.
const MAX_WAIT: Duration = Duration::from_micros(50);

#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub len: u64,
}

/// Serves requests until the client leaves, and has ended all of them then.
pub(super) fn run(stream: &mut Stream, session: &Session, budget: &Arc<Budget>) -> io::Result<()> {
    let mut service = Service {
        session,
        link: Link::new(stream),
        usual: Pace::new(),
        long: Pace::of_long_requests(),
        late: Late::new(budget),
        unsent: 0,
        waiting: None,
    };
    while let Some(request) = service.next_request()? {
        if request.command == command::DISC {
            return service.finish(true);
        }
        service.serve(request)?;
    }
    service.finish(false)
}

struct Service<'a> {
    session: &'a Session,
    link: Link<'a>,
    /// For reads and writes, and for all others.
    usual: Pace,
    long: Pace,
    late: Late,
    /// Bytes of the budget for payload among the replies that are not sent.
    unsent: u64,
    /// Since when a reply or a request for the queue waits for others.
    waiting: Option<Instant>,
}

impl Service<'_> {
    fn header_len(&self) -> usize {
        if self.session.extended { 32 } else { 28 }
    }

    /// The next request, without its payload; `None` if the client sends no more.
    fn next_request(&mut self) -> io::Result<Option<Request>> {
        let overdue = self.waiting.is_some_and(|since| since.elapsed() >= MAX_WAIT);
        if overdue || self.link.out.len() >= OUTPUT_BYTES {
            self.advance()?;
        }
        let len = self.header_len();
        while self.link.input().len() < len {
            match self.receive(&mut []) {
                Ok(_) => {}
                // Leaving without a word is common.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        let mut b = [0; 32];
        self.link.take(&mut b[..len]);
        parse(&b, self.session.extended).map(Some)
    }

    /// Takes bytes from the client as [`Link::receive`] does. Replies go out meanwhile.
    fn receive(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            self.advance()?;
            match self.late.event() {
                Some(event) if !self.link.wait(event)? => {}
                _ => return self.link.receive(into),
            }
        }
    }

    /// Begins what was left to the queue, and sends all replies that there are.
    fn advance(&mut self) -> io::Result<()> {
        loop {
            self.late.submit();
            while let Some(completed) = self.late.completed() {
                self.complete(completed)?;
            }
            if !self.late.is_staged() {
                self.waiting = None;
                return self.send();
            }
        }
    }

    /// Sends the replies.
    fn send(&mut self) -> io::Result<()> {
        self.link.send()?;
        self.late.release(std::mem::take(&mut self.unsent));
        Ok(())
    }

    /// Waits until a request with so many bytes of payload may be under way besides the others, and reserves the bytes.
    /// What it waits for are requests of this connection, as there are some whenever it waits: their ends tell whether
    /// the client is still there, too.
    fn make_room(&mut self, bytes: u64) -> io::Result<()> {
        while !self.late.reserve(bytes) {
            self.advance()?;
            if self.late.reserve(bytes) {
                break;
            }
            self.late.wait();
        }
        Ok(())
    }

    /// Ends what is under way. All of it is done, though nobody listens any more, if the client `said_goodbye`.
    fn finish(&mut self, said_goodbye: bool) -> io::Result<()> {
        let result = loop {
            match self.advance() {
                Ok(()) if self.late.len() == 0 => return Ok(()),
                Ok(()) => self.late.wait(),
                Err(error) => break Err(error),
            }
        };
        if said_goodbye {
            self.late.drain();
        }
        result
    }

    /// Takes the payload of a write, whatever becomes of the request.
    fn receive_payload(&mut self, len: u64) -> io::Result<AlignedBuf> {
        if len > MAX_PAYLOAD {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a write is too long"));
        }
        let mut payload = self.late.buffer(len as usize);
        let mut done = self.link.take(&mut payload);
        while done < payload.len() {
            // Our replies do not wait for a client that sends slowly.
            done += self.receive(&mut payload[done..])?;
        }
        Ok(payload)
    }

    fn serve(&mut self, r: Request) -> io::Result<()> {
        let bytes = payload_len(&r);
        self.make_room(bytes)?;
        let payload = match r.command {
            command::WRITE => Some(self.receive_payload(r.len)?),
            _ => None,
        };
        if let Some(error) = refusal(self.session, &r) {
            self.late.keep(payload);
            self.late.release(bytes);
            self.reply(&r, &Outcome::Failed(error));
            return Ok(());
        }
        if r.command == command::FLUSH || r.flags & command_flag::FUA != 0 {
            self.advance()?; // this one takes long
        }
        if r.command == command::BLOCK_STATUS {
            let outcome = statuses(self.session, &r).map_or_else(|error| failed(&error), Outcome::Status);
            self.reply(&r, &outcome);
            return Ok(());
        }
        self.perform(r, payload);
        Ok(())
    }

    /// Does a request that the disk is for, or leaves it to the queue.
    fn perform(&mut self, r: Request, payload: Option<AlignedBuf>) {
        let more =
            self.late.len() > 0 || self.link.input().len() >= self.header_len() || self.link.has_more_input();
        let disk = &self.session.export.disk;
        let out = &mut self.link.out;
        let start = out.len();
        let data = start + reply::data_header_len(self.session);
        let mut direct = || {
            if r.command == command::READ {
                out.resize(data + r.len as usize, 0);
                return disk.read_at(&mut out[data..], r.offset);
            }
            change(disk, &r, payload.as_deref().unwrap_or_default())
        };
        let pace = match r.command {
            command::READ | command::WRITE => &mut self.usual,
            _ => &mut self.long,
        };
        let result = match self.late.is_refused() {
            true => Some(direct()),
            false => pace.run(more, &mut direct),
        };
        let result = match result {
            Some(result) => result,
            None if !self.late.prepare(disk) => direct(),
            None => {
                let work = self.work(&r, payload);
                return self.push(r, work, payload_len(&r));
            }
        };
        self.late.keep(payload);
        match r.command {
            command::READ => self.unsent += payload_len(&r),
            _ => self.late.release(payload_len(&r)),
        }
        match result {
            Ok(()) if flushes(&r) => self.perform(flush_of(&r), None),
            Ok(()) => {
                let outcome = if r.command == command::READ { Outcome::Data } else { Outcome::Done };
                self.reply_at(start, &r, &outcome);
            }
            Err(error) => self.reply_at(start, &r, &failed(&error)),
        }
    }

    /// What the queue has to do for a request.
    fn work(&mut self, r: &Request, payload: Option<AlignedBuf>) -> queue::Request {
        let (offset, len) = (r.offset, r.len);
        match (r.command, payload) {
            (command::WRITE, Some(payload)) => queue::Request::Write { offset, from: payload.into() },
            (command::READ, _) => {
                queue::Request::Read { offset, into: self.late.buffer(len as usize).into() }
            }
            (command::TRIM, _) => queue::Request::Discard { offset, len },
            (command::WRITE_ZEROES, _) => queue::Request::WriteZeroes { offset, len, unmap: unmaps(r) },
            _ => queue::Request::Flush,
        }
    }

    /// Leaves a request that has `bytes` of the budget to the queue.
    fn push(&mut self, r: Request, work: queue::Request, bytes: u64) {
        self.waiting = self.waiting.or_else(|| Some(Instant::now()));
        if let Err(error) = self.late.push(r, work, bytes) {
            self.late.release(bytes);
            self.reply(&r, &failed(&error));
        }
    }

    /// Goes on with a request after the queue did its part.
    fn complete(&mut self, (r, result, bytes, memory): Completed) -> io::Result<()> {
        match (result, &memory) {
            (Ok(()), _) if flushes(&r) => self.push(flush_of(&r), queue::Request::Flush, 0),
            (Ok(()), Some(data)) if r.command == command::READ => {
                let start = self.link.out.len();
                self.link.out.resize(start + reply::data_header_len(self.session), 0);
                self.reply_at(start, &r, &Outcome::Data);
                self.link.add_payload(data)?;
            }
            (Ok(()), _) => self.reply(&r, &Outcome::Done),
            (Err(error), _) => self.reply(&r, &failed(&error)),
        }
        self.late.keep(memory);
        self.late.release(bytes);
        // Many that ended together are not kept in memory together.
        if self.link.out.len() >= OUTPUT_BYTES { self.send() } else { Ok(()) }
    }

    fn reply(&mut self, r: &Request, outcome: &Outcome) {
        self.reply_at(self.link.out.len(), r, outcome);
    }

    /// Adds a reply, whose room, if there is any, begins at `start` of the unsent replies.
    fn reply_at(&mut self, start: usize, r: &Request, outcome: &Outcome) {
        reply::encode(&mut self.link.out, start, self.session, r, outcome);
        self.waiting = self.waiting.or_else(|| Some(Instant::now()));
    }
}

fn parse(b: &[u8; 32], extended: bool) -> io::Result<Request> {
    let u32_at = |at: usize| u32::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
    let u64_at = |at: usize| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));
    let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
    if u32_at(0) != magic {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a request has the wrong magic"));
    }
    Ok(Request {
        flags: u16::from_be_bytes([b[4], b[5]]),
        command: u16::from_be_bytes([b[6], b[7]]),
        cookie: u64_at(8),
        offset: u64_at(16),
        len: if extended { u64_at(24) } else { u32_at(24).into() },
    })
}

/// Bytes of the budget that a request needs.
fn payload_len(r: &Request) -> u64 {
    match r.command {
        command::READ | command::WRITE => r.len.min(MAX_PAYLOAD),
        _ => 0,
    }
}

fn changes(r: &Request) -> bool {
    matches!(r.command, command::WRITE | command::TRIM | command::WRITE_ZEROES)
}

/// Why a request is not done.
fn refusal(session: &Session, r: &Request) -> Option<u32> {
    use command_flag as f;
    let allowed = match r.command {
        command::READ => f::DF | f::FUA,
        command::WRITE_ZEROES => f::FUA | f::NO_HOLE,
        command::BLOCK_STATUS => f::REQ_ONE | f::FUA,
        _ => f::FUA,
    };
    let known = match r.command {
        command::READ | command::FLUSH => true,
        command::BLOCK_STATUS => !session.contexts.is_empty(),
        _ => changes(r),
    };
    if r.flags & !allowed != 0 {
        return Some(EINVAL);
    }
    if changes(r) && session.read_only() {
        return Some(EPERM);
    }
    if !known || (r.len == 0 && r.command != command::FLUSH) {
        return Some(EINVAL);
    }
    (r.command == command::READ && r.len > MAX_PAYLOAD).then_some(EOVERFLOW)
}

/// Does a request that has no reply with data.
fn change(disk: &Disk, r: &Request, payload: &[u8]) -> Result<()> {
    match r.command {
        command::WRITE => disk.write_at(payload, r.offset),
        command::TRIM => disk.discard(r.offset, r.len),
        command::WRITE_ZEROES => disk.write_zeroes(r.offset, r.len, unmaps(r)),
        _ => disk.flush(),
    }
}

fn unmaps(r: &Request) -> bool {
    r.flags & command_flag::NO_HOLE == 0
}

/// Whether a flush follows a request.
fn flushes(r: &Request) -> bool {
    changes(r) && r.flags & command_flag::FUA != 0
}

/// What follows such a request, and is answered for it.
fn flush_of(r: &Request) -> Request {
    Request { command: command::FLUSH, flags: 0, ..*r }
}

fn failed(error: &crate::Error) -> Outcome {
    tracing::debug!(%error, "An NBD request failed");
    Outcome::Failed(error_number(error))
}

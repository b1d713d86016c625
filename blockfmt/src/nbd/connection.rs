//! One connection of a client: handshake, requests and replies.

use super::proto::{
    CHUNK_DONE, EXTENDED_REPLY_MAGIC, EXTENDED_REQUEST_MAGIC, INIT_MAGIC, MAX_PAYLOAD, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk, command,
    export_flag, option, reply,
};
use super::stream::Stream;
use super::tls::TlsClient;
use parking_lot::{Condvar, Mutex};
use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::sync::Arc;

/// Most replies to one option.
const MAX_OPTION_REPLIES: usize = 10_000;
/// Longest reply to an option, and longest list of extents.
const MAX_REPLY: u32 = 1 << 20;
/// Most chunks in one reply.
const MAX_CHUNKS: usize = 1 << 20;
/// Most requests in flight on one connection.
pub(super) const DEPTH: usize = 64;

/// What was agreed on with the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub size: u64,
    pub flags: u16,
    /// Smallest request in bytes.
    pub min_block: u64,
    /// Most bytes of payload in a request.
    pub max_block: u64,
    structured: bool,
    extended: bool,
    /// Numbers and names of the metadata contexts.
    pub contexts: Vec<(u32, String)>,
}

impl Facts {
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub command: u16,
    pub flags: u16,
    pub offset: u64,
    pub len: u64,
}

/// Why a request failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The server says so; the connection lives on.
    Server(io::Error),
    /// The connection is of no use any more.
    Connection(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Connection(error)
    }
}

/// What the server sent for a request.
#[derive(Debug, Default)]
pub(super) struct Answer {
    /// Number of the context, length and state of each extent.
    pub extents: Vec<(u32, u64, u64)>,
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("The NBD server {what}"))
}

/// A connection after the handshake, for requests of several threads at a time.
///
/// Whoever waits for a reply reads from the connection if nobody else does. The start of a reply tells whose it
/// is: that thread goes on with reading, straight into its buffer, and then passes the turn on.
#[derive(Debug)]
pub(super) struct Connection {
    pub facts: Facts,
    sender: Mutex<Sender>,
    /// The other direction.
    receiver: Mutex<Stream>,
    replies: Mutex<Replies>,
}

#[derive(Debug)]
struct Sender {
    stream: Stream,
    cookie: u64,
}

#[derive(Debug, Default)]
struct Replies {
    /// Requests whose replies are not complete.
    waiting: HashSet<u64>,
    /// Whether a thread reads from the connection, or is about to: the one that `head` is for.
    reading: bool,
    /// The start of a reply that waits for its thread.
    head: Option<Head>,
    /// Threads that sleep, by the cookies of their requests. Each has a condition of its own, so that only one wakes.
    sleepers: Vec<(u64, Arc<Condvar>)>,
    failed: bool,
}

impl Replies {
    /// Wakes one thread that sleeps, for it to read.
    fn wake_any(&mut self) {
        if let Some((_, sleeper)) = self.sleepers.pop() {
            sleeper.notify_one();
        }
    }

    /// Wakes the thread of a request, if it sleeps.
    fn wake(&mut self, cookie: u64) {
        if let Some(at) = self.sleepers.iter().position(|(c, _)| *c == cookie) {
            self.sleepers.swap_remove(at).1.notify_one();
        }
    }

    fn fail(&mut self) {
        self.failed = true;
        for (_, sleeper) in self.sleepers.drain(..) {
            sleeper.notify_one();
        }
    }
}

/// The start of a reply, or of a part of one.
#[derive(Clone, Copy, Debug)]
struct Head {
    cookie: u64,
    part: Part,
}

#[derive(Clone, Copy, Debug)]
enum Part {
    /// All of the reply, with the number of an error.
    Simple {
        code: u32,
    },
    Chunk {
        flags: u16,
        kind: u16,
        len: u64,
    },
}

/// What is known of a reply.
struct Reply<'a> {
    request: Request,
    data: &'a mut [u8],
    /// Bytes of `data` that came.
    filled: u64,
    error: Option<i32>,
    answer: Answer,
}

fn array<const N: usize>(stream: &mut Stream) -> io::Result<[u8; N]> {
    let mut out = [0; N];
    stream.read_exact(&mut out)?;
    Ok(out)
}

fn send_option(stream: &mut Stream, number: u32, data: &[u8]) -> io::Result<()> {
    let mut out = OPTION_MAGIC.to_vec();
    out.extend(number.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    stream.write_all(&out)
}

fn option_reply(stream: &mut Stream, number: u32) -> io::Result<(u32, Vec<u8>)> {
    if u64::from_be_bytes(array(stream)?) != OPTION_REPLY_MAGIC
        || u32::from_be_bytes(array(stream)?) != number
    {
        return Err(invalid("sent something else than a reply to an option"));
    }
    let kind = u32::from_be_bytes(array(stream)?);
    let len = u32::from_be_bytes(array(stream)?);
    if len > MAX_REPLY {
        return Err(invalid("sent too long a reply to an option"));
    }
    let mut data = vec![0; len as usize];
    stream.read_exact(&mut data)?;
    Ok((kind, data))
}

/// Whether the server accepts an option without data.
fn ask(stream: &mut Stream, number: u32) -> io::Result<bool> {
    send_option(stream, number, b"")?;
    Ok(option_reply(stream, number)?.0 == reply::ACK)
}

impl Connection {
    /// Negotiates. With `tls`, the connection is encrypted before anything is said.
    pub fn negotiate(
        mut stream: Stream,
        export: &str,
        contexts: &[String],
        tls: Option<(&TlsClient, &str)>,
    ) -> io::Result<Self> {
        if array::<8>(&mut stream)? != *INIT_MAGIC || array::<8>(&mut stream)? != *OPTION_MAGIC {
            return Err(invalid("does not speak the newstyle protocol"));
        }
        let flags = u16::from_be_bytes(array(&mut stream)?) & 3;
        if flags & 1 == 0 {
            return Err(invalid("does not speak the fixed newstyle protocol"));
        }
        stream.write_all(&u32::from(flags).to_be_bytes())?;
        if let Some((tls, host)) = tls {
            if !ask(&mut stream, option::STARTTLS)? {
                return Err(invalid("does not offer TLS"));
            }
            stream = tls.wrap(stream, host)?;
        }
        let extended = ask(&mut stream, option::EXTENDED_HEADERS)?;
        let structured = extended || ask(&mut stream, option::STRUCTURED_REPLY)?;
        let mut facts = Facts {
            size: 0,
            flags: 0,
            min_block: 1,
            max_block: MAX_PAYLOAD,
            structured,
            extended,
            contexts: Vec::new(),
        };
        if structured && !contexts.is_empty() {
            facts.contexts = set_contexts(&mut stream, export, contexts)?;
        }
        go(&mut stream, export, flags & 2 != 0, &mut facts)?;
        let block = facts.min_block;
        let sane = block.is_power_of_two() && block <= 65536 && facts.max_block >= block;
        if !sane || facts.size > i64::MAX as u64 || !facts.has(export_flag::HAS_FLAGS) {
            return Err(invalid("describes its export in a way that makes no sense"));
        }
        facts.max_block = facts.max_block.min(MAX_PAYLOAD) / block * block;
        let (incoming, outgoing) = stream.split()?;
        let receiver = Mutex::new(incoming);
        let sender = Mutex::new(Sender { stream: outgoing, cookie: 0 });
        Ok(Connection { facts, sender, receiver, replies: Mutex::default() })
    }

    /// Sends a request and takes the reply; the payload of a read goes to `data`.
    pub fn perform(&self, r: Request, payload: &[u8], data: &mut [u8]) -> Result<Answer, Failure> {
        let reply = Reply { request: r, data, filled: 0, error: None, answer: Answer::default() };
        let result = self.send(r, payload).and_then(|cookie| self.receive(cookie, reply));
        if let Err(Failure::Connection(_)) = result {
            self.replies.lock().fail();
            // Threads that wait for the peer end. One that reads now sees for itself what is wrong.
            if let Some(receiver) = self.receiver.try_lock() {
                receiver.shutdown();
            }
        }
        result
    }

    /// Sends a request and returns its cookie.
    fn send(&self, r: Request, payload: &[u8]) -> Result<u64, Failure> {
        let mut sender = self.sender.lock();
        sender.cookie += 1;
        let cookie = sender.cookie;
        self.replies.lock().waiting.insert(cookie);
        let mut out = self.head(r, cookie);
        out.extend(payload);
        sender.stream.write_all(&out)?;
        Ok(cookie)
    }

    /// A request without its payload.
    fn head(&self, r: Request, cookie: u64) -> Vec<u8> {
        let mut out = Vec::with_capacity(32);
        let extended = self.facts.extended;
        out.extend((if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC }).to_be_bytes());
        out.extend(r.flags.to_be_bytes());
        out.extend(r.command.to_be_bytes());
        out.extend(cookie.to_be_bytes());
        out.extend(r.offset.to_be_bytes());
        match extended {
            true => out.extend(r.len.to_be_bytes()),
            false => out.extend((r.len as u32).to_be_bytes()),
        }
        out
    }

    /// Takes all parts of a reply.
    fn receive(&self, cookie: u64, mut reply: Reply<'_>) -> Result<Answer, Failure> {
        for _ in 0..MAX_CHUNKS {
            let part = self.next_part(cookie)?;
            let done = reply.take(&mut self.receiver.lock(), part)?;
            {
                let mut replies = self.replies.lock();
                replies.reading = false;
                if done {
                    replies.waiting.remove(&cookie);
                }
                replies.wake_any();
            }
            if !done {
                continue;
            }
            if let Some(errno) = reply.error {
                return Err(Failure::Server(io::Error::from_raw_os_error(errno)));
            }
            if reply.filled != reply.data.len() as u64 {
                return Err(invalid("sent less data than was asked for").into());
            }
            return Ok(reply.answer);
        }
        Err(invalid("never ends its reply").into())
    }

    /// Waits for a part of the reply to a request. The caller has the turn to read then.
    fn next_part(&self, cookie: u64) -> io::Result<Part> {
        let mut replies = self.replies.lock();
        loop {
            if replies.failed {
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "The connection was lost"));
            }
            if let Some(head) = replies.head.take_if(|head| head.cookie == cookie) {
                return Ok(head.part);
            }
            if replies.reading {
                let woken = Arc::new(Condvar::new());
                replies.sleepers.push((cookie, woken.clone()));
                woken.wait(&mut replies);
                replies.sleepers.retain(|(c, _)| *c != cookie); // it may have woken by itself
                continue;
            }
            replies.reading = true;
            drop(replies);
            let head = Head::read(&mut self.receiver.lock(), &self.facts)?;
            if head.cookie == cookie {
                return Ok(head.part);
            }
            replies = self.replies.lock();
            if !replies.waiting.contains(&head.cookie) {
                return Err(invalid("replied to a request that nobody made"));
            }
            replies.head = Some(head);
            replies.wake(head.cookie);
        }
    }

    /// Says goodbye. No request is in flight.
    pub fn disconnect(&self) {
        let request = Request { command: command::DISC, flags: 0, offset: 0, len: 0 };
        let out = self.head(request, 0);
        let sender = &mut self.sender.lock().stream;
        // The server may be gone already.
        let _ = sender.write_all(&out);
        sender.shutdown();
    }
}

impl Head {
    fn read(s: &mut Stream, facts: &Facts) -> io::Result<Self> {
        let magic = u32::from_be_bytes(array(s)?);
        if magic == SIMPLE_REPLY_MAGIC && !facts.extended {
            let code = u32::from_be_bytes(array(s)?);
            let cookie = u64::from_be_bytes(array(s)?);
            return Ok(Head { cookie, part: Part::Simple { code } });
        }
        let expected = if facts.extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
        if magic != expected || !facts.structured {
            return Err(invalid("sent something else than a reply"));
        }
        let flags = u16::from_be_bytes(array(s)?);
        let kind = u16::from_be_bytes(array(s)?);
        let cookie = u64::from_be_bytes(array(s)?);
        let len = match facts.extended {
            true => {
                array::<8>(s)?; // the offset of the request
                u64::from_be_bytes(array(s)?)
            }
            false => u32::from_be_bytes(array(s)?).into(),
        };
        Ok(Head { cookie, part: Part::Chunk { flags, kind, len } })
    }
}

impl Reply<'_> {
    /// Takes the rest of a part; returns whether it was the last.
    fn take(&mut self, s: &mut Stream, part: Part) -> io::Result<bool> {
        let (flags, kind, len) = match part {
            Part::Chunk { flags, kind, len } => (flags, kind, len),
            Part::Simple { code: 0 } => {
                s.read_exact(self.data)?;
                self.filled = self.data.len() as u64;
                return Ok(true);
            }
            Part::Simple { code } => {
                self.error = Some(errno(code));
                return Ok(true);
            }
        };
        let (start, room) = (self.request.offset, self.data.len() as u64);
        // The part of the buffer that `len` bytes at a place of the export belong to.
        let place = |at: u64, len: u64| {
            let from = at.checked_sub(start).filter(|from| *from <= room)?;
            let end = from.checked_add(len).filter(|end| *end <= room)?;
            Some(from as usize..end as usize)
        };
        let outside = || invalid("sent data that was not asked for");
        match kind {
            chunk::NONE if len == 0 => {}
            chunk::OFFSET_DATA if len >= 8 => {
                let range = place(u64::from_be_bytes(array(s)?), len - 8).ok_or_else(outside)?;
                self.filled += range.len() as u64;
                s.read_exact(&mut self.data[range])?;
            }
            chunk::OFFSET_HOLE if len == 12 => {
                let at = u64::from_be_bytes(array(s)?);
                let range = place(at, u32::from_be_bytes(array(s)?).into()).ok_or_else(outside)?;
                self.filled += range.len() as u64;
                self.data[range].fill(0);
            }
            _ if len > u64::from(MAX_REPLY) => return Err(invalid("sent too long a reply")),
            _ => {
                let mut payload = vec![0; len as usize];
                s.read_exact(&mut payload)?;
                parse_payload(kind, &payload, &mut self.error, &mut self.answer)?;
            }
        }
        Ok(flags & CHUNK_DONE != 0)
    }
}

fn parse_payload(kind: u16, payload: &[u8], error: &mut Option<i32>, answer: &mut Answer) -> io::Result<()> {
    let u32_at = |at: usize| payload.get(at..at + 4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
    let short = || invalid("sent too short a reply");
    if kind & 0x8000 != 0 {
        *error = Some(errno(u32_at(0).ok_or_else(short)?));
        return Ok(());
    }
    let context = u32_at(0).ok_or_else(short)?;
    match kind {
        chunk::BLOCK_STATUS => {
            for e in payload[4..].chunks_exact(8) {
                let word =
                    |at: usize| u64::from(u32::from_be_bytes([e[at], e[at + 1], e[at + 2], e[at + 3]]));
                answer.extents.push((context, word(0), word(4)));
            }
        }
        chunk::BLOCK_STATUS_EXT => {
            for e in payload.get(8..).ok_or_else(short)?.chunks_exact(16) {
                let (a, b) = e.split_at(8);
                let word = |b: &[u8]| b.iter().fold(0, |n, b| n << 8 | u64::from(*b));
                answer.extents.push((context, word(a), word(b)));
            }
        }
        _ => return Err(invalid("sent an unknown kind of reply")),
    }
    if answer.extents.len() > MAX_REPLY as usize {
        return Err(invalid("sent too many extents"));
    }
    Ok(())
}

fn set_contexts(stream: &mut Stream, export: &str, contexts: &[String]) -> io::Result<Vec<(u32, String)>> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend((contexts.len() as u32).to_be_bytes());
    for context in contexts {
        data.extend((context.len() as u32).to_be_bytes());
        data.extend(context.as_bytes());
    }
    send_option(stream, option::SET_META_CONTEXT, &data)?;
    let mut out = Vec::new();
    for _ in 0..MAX_OPTION_REPLIES {
        let (kind, data) = option_reply(stream, option::SET_META_CONTEXT)?;
        match (kind, data.split_first_chunk::<4>()) {
            (reply::META_CONTEXT, Some((id, name))) => {
                // Only what was asked for, each once: the server shall not choose how much there is to remember.
                let known = |(_, known): &(u32, String)| known.as_bytes() == name;
                if let Some(asked) = contexts.iter().find(|c| c.as_bytes() == name)
                    && !out.iter().any(known)
                {
                    out.push((u32::from_be_bytes(*id), asked.clone()));
                }
            }
            (reply::ACK, _) => return Ok(out),
            // Not supported, or no such export, which the next option will tell.
            (kind, _) if kind & 0x8000_0000 != 0 => return Ok(Vec::new()),
            _ => return Err(invalid("sent an invalid reply to an option")),
        }
    }
    Err(invalid("never ends its replies"))
}

/// Chooses the export.
fn go(stream: &mut Stream, export: &str, no_zeroes: bool, facts: &mut Facts) -> io::Result<()> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend([0, 1, 0, 3]); // one kind of information: block sizes
    send_option(stream, option::GO, &data)?;
    for _ in 0..MAX_OPTION_REPLIES {
        let (kind, data) = option_reply(stream, option::GO)?;
        let u32_at =
            |at: usize| u64::from(u32::from_be_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]]));
        match kind {
            reply::ACK => return Ok(()),
            reply::INFO if data.starts_with(&[0, 0]) && data.len() == 12 => {
                facts.size = u32_at(2) << 32 | u32_at(6);
                facts.flags = u16::from_be_bytes([data[10], data[11]]);
            }
            reply::INFO if data.starts_with(&[0, 3]) && data.len() == 14 => {
                (facts.min_block, facts.max_block) = (u32_at(2), u32_at(10));
            }
            reply::INFO => {}
            reply::ERR_UNSUP => {
                send_option(stream, option::EXPORT_NAME, export.as_bytes())?;
                facts.size = u64::from_be_bytes(array(stream)?);
                facts.flags = u16::from_be_bytes(array(stream)?);
                if !no_zeroes {
                    array::<124>(stream)?;
                }
                return Ok(());
            }
            reply::ERR_UNKNOWN => {
                return Err(io::Error::new(io::ErrorKind::NotFound, "There is no such export"));
            }
            reply::ERR_TLS_REQD => {
                let what = "The NBD server insists on TLS; use nbds://";
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
            }
            _ => return Err(invalid("refuses the export")),
        }
    }
    Err(invalid("never ends its replies"))
}

/// The host's number for an error of the protocol.
fn errno(code: u32) -> i32 {
    match code {
        1 => libc::EPERM,
        12 => libc::ENOMEM,
        22 => libc::EINVAL,
        28 => libc::ENOSPC,
        75 => libc::EOVERFLOW,
        95 => libc::ENOTSUP,
        108 => libc::ESHUTDOWN,
        _ => libc::EIO,
    }
}

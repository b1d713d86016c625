//! Requests and replies after the handshake.

use super::handshake::{Context, Session};
use super::proto::{
    CHUNK_DONE, EXTENDED_REPLY_MAGIC, EXTENDED_REQUEST_MAGIC, MAX_PAYLOAD, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC,
    STATE_HOLE, STATE_ZERO, STRUCTURED_REPLY_MAGIC, chunk, command, command_flag, error_number,
};
use super::stream::Stream;
use crate::job::DirtyMap;
use crate::{Result, Source};
use std::io::{self, BufReader, Read, Write};
use std::time::{Duration, Instant};

const EINVAL: u32 = 22;
const EPERM: u32 = 1;
const EOVERFLOW: u32 = 75;
/// Most extents in one block status reply.
const MAX_EXTENTS: usize = 1024;
/// Memory for payload that a connection keeps between requests.
const KEEP_BYTES: usize = 1 << 20;
/// Bytes read from a client at once.
const INPUT_BYTES: usize = 64 << 10;
/// Replies of this length are sent without waiting for more.
const OUTPUT_BYTES: usize = 256 << 10;
/// Time that a reply may wait for others.
const MAX_WAIT: Duration = Duration::from_micros(50);

#[derive(Clone, Copy, Debug)]
struct Request {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    len: u64,
}

/// Lengths and states.
type Extents = Vec<(u64, u64)>;

/// What a request led to.
enum Outcome {
    Done,
    /// The payload is at the end of the unsent replies, after its header.
    Data,
    /// By number of the context.
    Status(Vec<(u32, Extents)>),
    Failed(u32),
}

/// Serves requests until the client leaves.
///
/// Requests that arrived together are read with one system call and answered with one, unless the first
/// answer would wait noticeably longer for that.
pub(super) fn run(stream: &mut Stream, session: &Session) -> io::Result<()> {
    let mut link =
        Link { input: BufReader::with_capacity(INPUT_BYTES, stream), out: Vec::new(), payload: Vec::new() };
    let header_len = if session.extended { 32 } else { 28 };
    let mut waiting: Option<Instant> = None;
    loop {
        let late = waiting.is_some_and(|since| since.elapsed() >= MAX_WAIT);
        if late || link.out.len() >= OUTPUT_BYTES || link.input.buffer().len() < header_len {
            link.send()?;
            waiting = None;
        }
        let Some(request) = read_request(&mut link.input, session)? else { return Ok(()) };
        if request.command == command::DISC {
            return link.send();
        }
        if !matches!(request.command, command::READ | command::BLOCK_STATUS) {
            link.receive_payload(&request)?;
        }
        if request.command == command::FLUSH || request.flags & command_flag::FUA != 0 {
            link.send()?; // this one takes long
            waiting = None;
        }
        let start = link.out.len();
        let outcome = perform(&mut link, session, &request);
        reply(&mut link.out, start, session, &request, &outcome);
        waiting = waiting.or_else(|| Some(Instant::now()));
    }
}

/// Both directions of a connection with their buffers.
struct Link<'a> {
    input: BufReader<&'a mut Stream>,
    /// Replies that are not sent yet.
    out: Vec<u8>,
    /// The payload of a write.
    payload: Vec<u8>,
}

impl Link<'_> {
    fn send(&mut self) -> io::Result<()> {
        if !self.out.is_empty() {
            self.input.get_mut().write_all(&self.out)?;
            self.out.clear();
            self.out.shrink_to(KEEP_BYTES);
        }
        Ok(())
    }

    /// Takes the payload of a write from the socket, whatever becomes of the request.
    fn receive_payload(&mut self, r: &Request) -> io::Result<()> {
        if r.command != command::WRITE {
            return Ok(());
        }
        if r.len > MAX_PAYLOAD {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a write is too long"));
        }
        // Our replies must not wait for a client that sends slowly.
        if (self.input.buffer().len() as u64) < r.len {
            self.send()?;
        }
        self.payload.truncate(KEEP_BYTES);
        self.payload.shrink_to(KEEP_BYTES);
        self.payload.resize(self.payload.len().max(r.len as usize), 0);
        self.input.read_exact(&mut self.payload[..r.len as usize])
    }
}

fn read_request(input: &mut impl Read, session: &Session) -> io::Result<Option<Request>> {
    let mut b = [0; 32];
    let len = if session.extended { 32 } else { 28 };
    if let Err(error) = input.read_exact(&mut b[..len]) {
        // Leaving without a word is common.
        let left = error.kind() == io::ErrorKind::UnexpectedEof;
        return if left { Ok(None) } else { Err(error) };
    }
    let u32_at = |at: usize| u32::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
    let u64_at = |at: usize| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));
    let magic = if session.extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
    if u32_at(0) != magic {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a request has the wrong magic"));
    }
    Ok(Some(Request {
        flags: u16::from_be_bytes([b[4], b[5]]),
        command: u16::from_be_bytes([b[6], b[7]]),
        cookie: u64_at(8),
        offset: u64_at(16),
        len: if session.extended { u64_at(24) } else { u32_at(24).into() },
    }))
}

fn perform(link: &mut Link<'_>, session: &Session, r: &Request) -> Outcome {
    use command_flag as f;
    let disk = &session.export.disk;
    let allowed = match r.command {
        command::READ => f::DF | f::FUA,
        command::WRITE_ZEROES => f::FUA | f::NO_HOLE,
        command::BLOCK_STATUS => f::REQ_ONE | f::FUA,
        _ => f::FUA,
    };
    if r.flags & !allowed != 0 {
        return Outcome::Failed(EINVAL);
    }
    let changes = matches!(r.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
    if changes && session.read_only() {
        return Outcome::Failed(EPERM);
    }
    if r.len == 0 && r.command != command::FLUSH {
        return Outcome::Failed(EINVAL);
    }
    let result = match r.command {
        command::READ if r.len > MAX_PAYLOAD => return Outcome::Failed(EOVERFLOW),
        command::READ => {
            let from = link.out.len() + data_header_len(session);
            link.out.resize(from + r.len as usize, 0);
            disk.read_at(&mut link.out[from..], r.offset).map(|()| Outcome::Data)
        }
        command::WRITE => disk.write_at(&link.payload[..r.len as usize], r.offset).map(|()| Outcome::Done),
        command::FLUSH => disk.flush().map(|()| Outcome::Done),
        command::TRIM => disk.discard(r.offset, r.len).map(|()| Outcome::Done),
        command::WRITE_ZEROES => {
            let unmap = r.flags & f::NO_HOLE == 0;
            disk.write_zeroes(r.offset, r.len, unmap).map(|()| Outcome::Done)
        }
        command::BLOCK_STATUS if !session.contexts.is_empty() => statuses(session, r).map(Outcome::Status),
        _ => return Outcome::Failed(EINVAL),
    };
    let result = match result {
        Ok(outcome) if changes && r.flags & f::FUA != 0 => disk.flush().map(|()| outcome),
        other => other,
    };
    result.unwrap_or_else(|error| {
        tracing::debug!(%error, "An NBD request failed");
        Outcome::Failed(error_number(&error))
    })
}

/// The extents at the start of a range in every context.
fn statuses(session: &Session, r: &Request) -> Result<Vec<(u32, Extents)>> {
    let of = |context: &Context| {
        let extents = match &context.bitmap {
            None => status(session, r)?,
            Some(map) => {
                session.export.disk.map(r.offset, r.len)?; // the range exists
                dirty(map, session, r)
            }
        };
        Ok((context.id, extents))
    };
    session.contexts.iter().map(of).collect()
}

/// Longest range that a status reply describes: lengths have 32 bits unless headers are extended.
fn status_limit(session: &Session, r: &Request) -> u64 {
    if session.extended { r.len } else { r.len.min(u64::from(u32::MAX) & !0xffff) }
}

/// Lengths and states of what a bitmap says about the start of a range.
fn dirty(map: &DirtyMap, session: &Session, r: &Request) -> Extents {
    let (size, end) = (map.granularity(), r.offset + status_limit(session, r));
    let most = if r.flags & command_flag::REQ_ONE != 0 { 1 } else { MAX_EXTENTS };
    let mut out = Vec::new();
    let mut at = r.offset;
    while at < end && out.len() < most {
        let granule = at / size;
        let marked = granule < map.granules() && map.get(granule);
        let stop = match marked {
            true => (granule..map.granules()).find(|g| !map.get(*g)).unwrap_or(map.granules()),
            false => map.next(granule).unwrap_or(u64::MAX),
        };
        let stop = stop.saturating_mul(size).min(end).max(at + 1);
        out.push((stop - at, u64::from(marked)));
        at = stop;
    }
    out
}

/// Lengths and states of the extents at the start of a range.
fn status(session: &Session, r: &Request) -> Result<Extents> {
    let mut out = Extents::new();
    let limit = status_limit(session, r);
    let mut done = 0;
    while done < limit {
        let (extent, _) = session.export.disk.map(r.offset + done, limit - done)?;
        let state = match extent.source {
            Source::Data { .. } | Source::Opaque { .. } => 0,
            Source::Zero { allocated: true } => STATE_ZERO,
            Source::Zero { allocated: false } | Source::Below => STATE_ZERO | STATE_HOLE,
        };
        let full = out.len() == MAX_EXTENTS || r.flags & command_flag::REQ_ONE != 0;
        match out.last_mut() {
            Some(last) if last.1 == state => last.0 += extent.len,
            Some(_) if full => break,
            _ => out.push((extent.len, state)),
        }
        done += extent.len;
    }
    Ok(out)
}

/// The header of a chunk.
fn header(session: &Session, r: &Request, kind: u16, len: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(64);
    let magic = if session.extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
    out.extend(magic.to_be_bytes());
    out.extend(CHUNK_DONE.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(r.cookie.to_be_bytes());
    if session.extended {
        out.extend(r.offset.to_be_bytes());
        out.extend(len.to_be_bytes());
    } else {
        out.extend((len as u32).to_be_bytes());
    }
    out
}

/// Length of what precedes the payload of a read.
fn data_header_len(session: &Session) -> usize {
    match (session.structured, session.extended) {
        (false, _) => 16,
        (true, false) => 20 + 8,
        (true, true) => 32 + 8,
    }
}

/// Adds the reply to a request, which begins at `start` of the unsent replies.
fn reply(out: &mut Vec<u8>, start: usize, session: &Session, r: &Request, outcome: &Outcome) {
    if !matches!(outcome, Outcome::Data) {
        out.truncate(start); // a read that failed leaves its room
    }
    if !session.structured {
        let error = if let Outcome::Failed(error) = outcome { *error } else { 0 };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        header[4..8].copy_from_slice(&error.to_be_bytes());
        header[8..].copy_from_slice(&r.cookie.to_be_bytes());
        return match outcome {
            Outcome::Data => out[start..start + 16].copy_from_slice(&header),
            _ => out.extend(header),
        };
    }
    match outcome {
        Outcome::Done => out.extend(header(session, r, chunk::NONE, 0)),
        Outcome::Data => {
            let mut header = header(session, r, chunk::OFFSET_DATA, r.len + 8);
            header.extend(r.offset.to_be_bytes());
            out[start..start + header.len()].copy_from_slice(&header);
        }
        Outcome::Status(contexts) => {
            let last = contexts.len() - 1;
            for (n, (id, extents)) in contexts.iter().enumerate() {
                encode_status(out, session, r, (*id, extents), n == last);
            }
        }
        Outcome::Failed(error) => {
            out.extend(header(session, r, chunk::ERROR, 6));
            out.extend(error.to_be_bytes());
            out.extend(0u16.to_be_bytes()); // no message
        }
    }
}

/// Encodes the extents of one context.
fn encode_status(
    out: &mut Vec<u8>,
    session: &Session,
    r: &Request,
    (context, extents): (u32, &[(u64, u64)]),
    last: bool,
) {
    let start = out.len();
    let count = extents.len() as u64;
    out.extend(match session.extended {
        true => header(session, r, chunk::BLOCK_STATUS_EXT, 8 + count * 16),
        false => header(session, r, chunk::BLOCK_STATUS, 4 + count * 8),
    });
    if !last {
        out[start + 4..start + 6].fill(0); // not the last chunk
    }
    out.extend(context.to_be_bytes());
    if session.extended {
        out.extend((count as u32).to_be_bytes());
    }
    for (len, state) in extents {
        if session.extended {
            out.extend(len.to_be_bytes());
            out.extend(state.to_be_bytes());
        } else {
            out.extend((*len as u32).to_be_bytes());
            out.extend((*state as u32).to_be_bytes());
        }
    }
}

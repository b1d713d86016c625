//! Requests and replies after the handshake.

use super::handshake::{CONTEXT_ID, Session};
use super::proto::{
    CHUNK_DONE, EXTENDED_REPLY_MAGIC, EXTENDED_REQUEST_MAGIC, MAX_PAYLOAD, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC,
    STATE_HOLE, STATE_ZERO, STRUCTURED_REPLY_MAGIC, chunk, command, command_flag, error_number,
};
use super::stream::Stream;
use crate::{Result, Source};
use std::io::{self, Read, Write};

const EINVAL: u32 = 22;
const EPERM: u32 = 1;
const EOVERFLOW: u32 = 75;
/// Most extents in one block status reply.
const MAX_EXTENTS: usize = 1024;
/// Memory for payload that a connection keeps between requests.
const KEEP_BYTES: usize = 1 << 20;

#[derive(Clone, Copy, Debug)]
struct Request {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    len: u64,
}

/// What a request led to.
enum Outcome {
    Done,
    /// The payload to send is in the buffer, after room for headers.
    Data,
    Status(Vec<(u64, u64)>),
    Failed(u32),
}

/// Serves requests until the client leaves.
pub(super) fn run(stream: &mut Stream, session: &Session) -> io::Result<()> {
    let mut buf = Vec::new();
    loop {
        let Some(request) = read_request(stream, session)? else { return Ok(()) };
        if request.command == command::DISC {
            return Ok(());
        }
        let outcome = perform(stream, session, &request, &mut buf)?;
        send(stream, session, &request, &outcome, &mut buf)?;
        if buf.len() > KEEP_BYTES {
            buf = Vec::new();
        }
    }
}

fn read_request(stream: &mut Stream, session: &Session) -> io::Result<Option<Request>> {
    let mut b = [0; 32];
    let len = if session.extended { 32 } else { 28 };
    if let Err(error) = stream.read_exact(&mut b[..len]) {
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

/// Bytes that are kept free before the payload of a read, for the largest header and an offset.
const ROOM: usize = 40;

fn perform(stream: &mut Stream, session: &Session, r: &Request, buf: &mut Vec<u8>) -> io::Result<Outcome> {
    use command_flag as f;
    let disk = &session.export.disk;
    if r.command == command::WRITE {
        // The payload has to leave the socket whatever happens.
        if r.len > MAX_PAYLOAD {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a write is too long"));
        }
        buf.resize(buf.len().max(r.len as usize), 0);
        stream.read_exact(&mut buf[..r.len as usize])?;
    }
    let allowed = match r.command {
        command::READ => f::DF | f::FUA,
        command::WRITE_ZEROES => f::FUA | f::NO_HOLE,
        command::BLOCK_STATUS => f::REQ_ONE | f::FUA,
        _ => f::FUA,
    };
    if r.flags & !allowed != 0 {
        return Ok(Outcome::Failed(EINVAL));
    }
    let changes = matches!(r.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
    if changes && session.read_only() {
        return Ok(Outcome::Failed(EPERM));
    }
    if r.len == 0 && r.command != command::FLUSH {
        return Ok(Outcome::Failed(EINVAL));
    }
    let result = match r.command {
        command::READ if r.len > MAX_PAYLOAD => return Ok(Outcome::Failed(EOVERFLOW)),
        command::READ => {
            let end = ROOM + r.len as usize;
            buf.resize(buf.len().max(end), 0);
            disk.read_at(&mut buf[ROOM..end], r.offset).map(|()| Outcome::Data)
        }
        command::WRITE => disk.write_at(&buf[..r.len as usize], r.offset).map(|()| Outcome::Done),
        command::FLUSH => disk.flush().map(|()| Outcome::Done),
        command::TRIM => disk.discard(r.offset, r.len).map(|()| Outcome::Done),
        command::WRITE_ZEROES => {
            let unmap = r.flags & f::NO_HOLE == 0;
            disk.write_zeroes(r.offset, r.len, unmap).map(|()| Outcome::Done)
        }
        command::BLOCK_STATUS if session.allocation => status(session, r).map(Outcome::Status),
        _ => return Ok(Outcome::Failed(EINVAL)),
    };
    let result = match result {
        Ok(outcome) if changes && r.flags & f::FUA != 0 => disk.flush().map(|()| outcome),
        other => other,
    };
    Ok(result.unwrap_or_else(|error| {
        tracing::debug!(%error, "An NBD request failed");
        Outcome::Failed(error_number(&error))
    }))
}

/// Lengths and states of the extents at the start of a range.
fn status(session: &Session, r: &Request) -> Result<Vec<(u64, u64)>> {
    let mut out: Vec<(u64, u64)> = Vec::new();
    // Lengths of 32 bits unless headers are extended.
    let limit = if session.extended { r.len } else { r.len.min(u64::from(u32::MAX) & !0xffff) };
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

fn send(
    stream: &mut Stream,
    session: &Session,
    r: &Request,
    outcome: &Outcome,
    buf: &mut [u8],
) -> io::Result<()> {
    if !session.structured {
        let error = if let Outcome::Failed(error) = outcome { *error } else { 0 };
        let mut out = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        out.extend(error.to_be_bytes());
        out.extend(r.cookie.to_be_bytes());
        return match outcome {
            Outcome::Data => send_data(stream, &out, buf, r.len),
            _ => stream.write_all(&out),
        };
    }
    match outcome {
        Outcome::Done => stream.write_all(&header(session, r, chunk::NONE, 0)),
        Outcome::Data => {
            let mut out = header(session, r, chunk::OFFSET_DATA, r.len + 8);
            out.extend(r.offset.to_be_bytes());
            send_data(stream, &out, buf, r.len)
        }
        Outcome::Status(extents) => {
            let count = extents.len() as u64;
            let mut out = match session.extended {
                true => header(session, r, chunk::BLOCK_STATUS_EXT, 8 + count * 16),
                false => header(session, r, chunk::BLOCK_STATUS, 4 + count * 8),
            };
            out.extend(CONTEXT_ID.to_be_bytes());
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
            stream.write_all(&out)
        }
        Outcome::Failed(error) => {
            let mut out = header(session, r, chunk::ERROR, 6);
            out.extend(error.to_be_bytes());
            out.extend(0u16.to_be_bytes()); // no message
            stream.write_all(&out)
        }
    }
}

/// Sends a header and the payload in the buffer with one system call.
fn send_data(stream: &mut Stream, header: &[u8], buf: &mut [u8], len: u64) -> io::Result<()> {
    let start = ROOM - header.len();
    buf[start..ROOM].copy_from_slice(header);
    stream.write_all(&buf[start..ROOM + len as usize])
}

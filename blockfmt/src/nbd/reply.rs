//! The form of replies.

use super::handshake::Session;
use super::proto::{CHUNK_DONE, EXTENDED_REPLY_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk};
use super::transmission::Request;

/// Lengths and states.
pub(super) type Extents = Vec<(u64, u64)>;

/// What a request led to.
pub(super) enum Outcome {
    Done,
    /// The payload follows its header, for which there is room.
    Data,
    /// By number of the context.
    Status(Vec<(u32, Extents)>),
    Failed(u32),
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
pub(super) fn data_header_len(session: &Session) -> usize {
    match (session.structured, session.extended) {
        (false, _) => 16,
        (true, false) => 20 + 8,
        (true, true) => 32 + 8,
    }
}

/// Adds the reply to a request, which begins at `start` of the unsent replies.
pub(super) fn encode(out: &mut Vec<u8>, start: usize, session: &Session, r: &Request, outcome: &Outcome) {
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

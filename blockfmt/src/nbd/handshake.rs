//! The fixed newstyle handshake.

use super::proto::{
    INIT_MAGIC, MAX_OPTION, MAX_PAYLOAD, OPTION_MAGIC, OPTION_REPLY_MAGIC, export_flag, option, reply,
};
use super::server::{Export, Shared};
use super::stream::Stream;
use crate::job::DirtyMap;
use std::io::{self, Read, Write};
use std::sync::Arc;

/// `NBD_FLAG_FIXED_NEWSTYLE` and `NBD_FLAG_NO_ZEROES`, the same for server and client.
const FLAGS: u16 = 3;
const NO_ZEROES: u32 = 2;
/// Options that a client may send before it starts.
const MAX_OPTIONS: usize = 1000;
const ALLOCATION: &str = "base:allocation";
/// What names of contexts for dirty bitmaps start with, as QEMU's.
const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";

/// What was agreed on.
#[derive(Debug)]
pub(super) struct Session {
    pub export: Arc<Export>,
    pub structured: bool,
    pub extended: bool,
    /// The metadata contexts that were asked for.
    pub contexts: Vec<Context>,
}

/// Something that block status tells about.
#[derive(Clone, Debug)]
pub(super) struct Context {
    /// Its number in replies.
    pub id: u32,
    name: String,
    /// The bitmap; `None` for the allocation.
    pub bitmap: Option<Arc<DirtyMap>>,
}

/// The contexts that an export has.
fn contexts_of(shared: &Shared, export: &str) -> Vec<Context> {
    let bitmaps =
        shared.bitmaps(export).into_iter().map(|(name, map)| (format!("{DIRTY_BITMAP}{name}"), Some(map)));
    let all = std::iter::once((ALLOCATION.to_owned(), None)).chain(bitmaps);
    all.zip(1..).map(|((name, bitmap), id)| Context { id, name, bitmap }).collect()
}

impl Session {
    pub fn read_only(&self) -> bool {
        self.export.read_only || self.export.disk.is_read_only()
    }
}

fn flags(export: &Export, structured: bool) -> u16 {
    use export_flag as f;
    let mut flags = f::HAS_FLAGS | f::SEND_FLUSH | f::SEND_FUA | f::CAN_MULTI_CONN;
    flags |= match export.read_only || export.disk.is_read_only() {
        true => f::READ_ONLY,
        false => f::SEND_TRIM | f::SEND_WRITE_ZEROES,
    };
    if structured { flags | f::SEND_DF } else { flags }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn array<const N: usize>(stream: &mut Stream) -> io::Result<[u8; N]> {
    let mut out = [0; N];
    stream.read_exact(&mut out)?;
    Ok(out)
}

fn answer(stream: &mut Stream, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let mut out = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    stream.write_all(&out)
}

/// Takes a string with its length before it from the start of `data`.
fn take_string<'a>(data: &mut &'a [u8]) -> Option<&'a str> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    let (text, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    *data = rest;
    std::str::from_utf8(text).ok()
}

/// Negotiates; `None` if the client leaves.
pub(super) fn negotiate(stream: &mut Stream, shared: &Shared) -> io::Result<Option<Session>> {
    let tls = shared.tls();
    let mut encrypted = false;
    let mut hello = INIT_MAGIC.to_vec();
    hello.extend(OPTION_MAGIC);
    hello.extend(FLAGS.to_be_bytes());
    stream.write_all(&hello)?;
    let client = u32::from_be_bytes(array(stream)?);
    if client & !u32::from(FLAGS) != 0 {
        return Err(invalid("the client sets unknown flags"));
    }
    let (mut structured, mut extended) = (false, false);
    // The export for which block status was asked for, and what.
    let mut contexts: (String, Vec<Context>) = Default::default();
    for _ in 0..MAX_OPTIONS {
        if array::<8>(stream)? != *OPTION_MAGIC {
            return Err(invalid("an option has the wrong magic"));
        }
        let opt = u32::from_be_bytes(array(stream)?);
        let len = u32::from_be_bytes(array(stream)?);
        if len > MAX_OPTION {
            answer(stream, opt, reply::ERR_TOO_BIG, b"")?;
            return Err(invalid("an option is too long"));
        }
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data)?;
        let session = |export: Arc<Export>, (name, list): &(String, Vec<Context>)| Session {
            contexts: if *name == export.name { list.clone() } else { Vec::new() },
            export,
            structured,
            extended,
        };
        match opt {
            option::STARTTLS if data.is_empty() && !encrypted && tls.is_some() => {
                answer(stream, opt, reply::ACK, b"")?;
                if let Some(tls) = &tls {
                    stream.encrypt(tls)?;
                }
                // What was agreed on before could have been said by anyone.
                (encrypted, structured, extended, contexts) = (true, false, false, Default::default());
            }
            option::EXPORT_NAME if tls.is_some() && !encrypted => {
                return Err(invalid("the client does not use TLS"));
            }
            _ if tls.is_some() && !encrypted && opt != option::ABORT => {
                answer(stream, opt, reply::ERR_TLS_REQD, b"Use TLS")?;
            }
            option::EXPORT_NAME => {
                let export = std::str::from_utf8(&data).ok().and_then(|name| shared.export(name));
                // This option has no way to report an error.
                let export = export.ok_or_else(|| invalid("there is no such export"))?;
                let mut out = export.disk.size().to_be_bytes().to_vec();
                out.extend(flags(&export, structured).to_be_bytes());
                if client & NO_ZEROES == 0 {
                    out.extend([0; 124]);
                }
                stream.write_all(&out)?;
                return Ok(Some(session(export, &contexts)));
            }
            option::ABORT => {
                answer(stream, opt, reply::ACK, b"")?;
                return Ok(None);
            }
            option::LIST if data.is_empty() => {
                for export in shared.exports() {
                    let mut out = (export.name.len() as u32).to_be_bytes().to_vec();
                    out.extend(export.name.as_bytes());
                    out.extend(export.description.as_bytes().iter().take(4096));
                    answer(stream, opt, reply::SERVER, &out)?;
                }
                answer(stream, opt, reply::ACK, b"")?;
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                structured = true;
                answer(stream, opt, reply::ACK, b"")?;
            }
            option::EXTENDED_HEADERS if data.is_empty() => {
                structured = true;
                extended = true;
                answer(stream, opt, reply::ACK, b"")?;
            }
            option::INFO | option::GO => {
                let Some(name) = take_string(&mut &data[..]) else {
                    answer(stream, opt, reply::ERR_INVALID, b"")?;
                    continue;
                };
                let Some(export) = shared.export(name) else {
                    answer(stream, opt, reply::ERR_UNKNOWN, b"There is no such export")?;
                    continue;
                };
                send_info(stream, opt, &export, structured)?;
                if opt == option::GO {
                    return Ok(Some(session(export, &contexts)));
                }
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT if structured => {
                let set = opt == option::SET_META_CONTEXT;
                if set {
                    contexts = Default::default();
                }
                let Some((name, queries)) = parse_contexts(&data) else {
                    answer(stream, opt, reply::ERR_INVALID, b"")?;
                    continue;
                };
                if shared.export(&name).is_none() {
                    answer(stream, opt, reply::ERR_UNKNOWN, b"There is no such export")?;
                    continue;
                }
                let mut chosen = contexts_of(shared, &name);
                chosen.retain(|c| c.is_meant(&queries, !set));
                for context in &chosen {
                    let mut out = if set { context.id } else { 0 }.to_be_bytes().to_vec();
                    out.extend(context.name.as_bytes());
                    answer(stream, opt, reply::META_CONTEXT, &out)?;
                }
                if set {
                    contexts = (name, chosen);
                }
                answer(stream, opt, reply::ACK, b"")?;
            }
            option::LIST
            | option::STRUCTURED_REPLY
            | option::EXTENDED_HEADERS
            | option::LIST_META_CONTEXT
            | option::SET_META_CONTEXT => answer(stream, opt, reply::ERR_INVALID, b"")?,
            _ => answer(stream, opt, reply::ERR_UNSUP, b"")?,
        }
    }
    Err(invalid("the client never starts"))
}

impl Context {
    /// Whether one of the queries asks for this context. A list without queries asks for all.
    fn is_meant(&self, queries: &[&str], list: bool) -> bool {
        let prefix = |query: &str| list && query.ends_with(':') && self.name.starts_with(query);
        (list && queries.is_empty()) || queries.iter().any(|query| *query == self.name || prefix(query))
    }
}

/// The export that an option about metadata contexts names, and its queries.
fn parse_contexts(mut data: &[u8]) -> Option<(String, Vec<&str>)> {
    let name = take_string(&mut data)?.to_owned();
    let (count, rest) = data.split_first_chunk::<4>()?;
    data = rest;
    let mut queries = Vec::new();
    for _ in 0..u32::from_be_bytes(*count) {
        queries.push(take_string(&mut data)?);
    }
    Some((name, queries))
}

fn send_info(stream: &mut Stream, opt: u32, export: &Export, structured: bool) -> io::Result<()> {
    let mut out = 0u16.to_be_bytes().to_vec(); // NBD_INFO_EXPORT
    out.extend(export.disk.size().to_be_bytes());
    out.extend(flags(export, structured).to_be_bytes());
    answer(stream, opt, reply::INFO, &out)?;
    if !export.description.is_empty() {
        let mut out = 2u16.to_be_bytes().to_vec(); // NBD_INFO_DESCRIPTION
        out.extend(export.description.as_bytes().iter().take(4096));
        answer(stream, opt, reply::INFO, &out)?;
    }
    let mut out = 3u16.to_be_bytes().to_vec(); // NBD_INFO_BLOCK_SIZE: least, preferred, most
    for size in [1, 4096, MAX_PAYLOAD as u32] {
        out.extend(size.to_be_bytes());
    }
    answer(stream, opt, reply::INFO, &out)?;
    answer(stream, opt, reply::ACK, b"")
}

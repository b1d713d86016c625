//! An export of a server as a storage.

use super::connection::{Answer, Connection, DEPTH, Facts, Failure, Request};
use super::proto::{STATE_ZERO, command, command_flag, export_flag};
use super::stream::Stream;
use super::tls::TlsClient;
use super::uri::{Address, Uri};
use crate::{Error, Gather, Result, Scatter, Storage};
use parking_lot::{Condvar, Mutex, RwLock};
use std::io;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes that one request moves at most.
const PIECE: u64 = 4 << 20;
/// Bytes that one request without payload covers at most.
const SPAN: u64 = 1 << 30;
const ALLOCATION: &str = "base:allocation";
/// Pause between attempts to connect again.
const PAUSE: Duration = Duration::from_millis(100);

/// How a server is used.
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// Connections at most, if the server allows several.
    pub connections: usize,
    /// How long a lost connection is sought again.
    pub reconnect: Duration,
    /// How long an answer may take.
    pub timeout: Duration,
    /// Metadata contexts besides `base:allocation`, such as `qemu:dirty-bitmap:NAME`.
    pub contexts: Vec<String>,
}

impl Default for NbdOptions {
    fn default() -> Self {
        NbdOptions {
            read_only: false,
            connections: 4,
            reconnect: Duration::from_secs(10),
            timeout: Duration::from_secs(60),
            contexts: Vec::new(),
        }
    }
}

#[derive(Debug, Default)]
struct Pool {
    /// Connections, each with the number of its requests in flight.
    open: Vec<(Arc<Connection>, usize)>,
    /// Connections that are being made.
    coming: usize,
}

/// An export of an NBD server.
///
/// A connection that is lost is made again and the request repeated, for a limited time. If it is lost while
/// writes were not flushed, the server may have lost them: every flush fails from then on.
#[derive(Debug)]
pub struct NbdStorage {
    name: String,
    uri: Uri,
    tls: Option<TlsClient>,
    options: NbdOptions,
    facts: Facts,
    pool: Mutex<Pool>,
    /// A request ended, or a connection came or went.
    changed: Condvar,
    /// Writes that began, and how many of them a flush covered.
    written: AtomicU64,
    flushed: AtomicU64,
    lost: AtomicBool,
    /// Shared by writes of whole blocks; exclusive for writes that change a part of one.
    partial: RwLock<()>,
}

impl NbdStorage {
    /// Connects to an export.
    pub fn connect(uri: &str, options: NbdOptions) -> Result<Self> {
        let parsed = Uri::parse(uri)?;
        let tls = match (parsed.tls, &parsed.certificates) {
            (false, _) => None,
            (true, Some(directory)) => Some(TlsClient::from_directory(directory)?),
            (true, None) => {
                let what = "TLS needs tls-certificates=DIRECTORY in the URI, with ca-cert.pem in it";
                return Err(Error::InvalidOption(what.into()));
            }
        };
        let fail = |e| Error::io("connect to", uri, e);
        let first = connect(&parsed, tls.as_ref(), &options).map_err(fail)?;
        let facts = first.facts.clone();
        Ok(NbdStorage {
            name: uri.to_owned(),
            uri: parsed,
            tls,
            options,
            facts,
            pool: Mutex::new(Pool { open: vec![(Arc::new(first), 0)], coming: 0 }),
            changed: Condvar::new(),
            written: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            lost: AtomicBool::new(false),
            partial: RwLock::new(()),
        })
    }

    /// Lengths and states of the extents at the start of a range, in a metadata context that was asked for.
    pub fn block_status(&self, context: &str, offset: u64, len: u64) -> io::Result<Vec<(u64, u64)>> {
        let known = self.facts.contexts.iter().find(|(_, name)| name == context);
        let (id, _) = known.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOTSUP))?;
        let len = len.min(SPAN);
        let answer =
            self.request(Request { command: command::BLOCK_STATUS, flags: 0, offset, len }, &[], &mut [])?;
        let extents = answer.extents.iter().filter(|e| e.0 == *id && e.1 > 0);
        Ok(extents.map(|(_, len, state)| (*len, *state)).collect())
    }

    /// The metadata contexts that the server offers of those that were asked for.
    pub fn contexts(&self) -> impl Iterator<Item = &str> {
        self.facts.contexts.iter().map(|(_, name)| name.as_str())
    }

    fn limit(&self) -> usize {
        if self.facts.has(export_flag::CAN_MULTI_CONN) { self.options.connections.max(1) } else { 1 }
    }

    /// A connection for a request: an idle one, a new one, or one with other requests in flight.
    fn take(&self) -> io::Result<Arc<Connection>> {
        let mut pool = self.pool.lock();
        loop {
            let more = pool.open.len() + pool.coming < self.limit();
            match pool.open.iter_mut().min_by_key(|(_, load)| *load) {
                Some((connection, load)) if *load == 0 || (!more && *load < DEPTH) => {
                    *load += 1;
                    return Ok(connection.clone());
                }
                _ if more => break,
                _ => self.changed.wait(&mut pool),
            }
        }
        pool.coming += 1;
        drop(pool);
        let made = connect(&self.uri, self.tls.as_ref(), &self.options).and_then(|c| {
            match c.facts.size == self.facts.size && c.facts.flags == self.facts.flags {
                true => Ok(Arc::new(c)),
                false => Err(io::Error::other("The export is another one since the connection was lost")),
            }
        });
        let mut pool = self.pool.lock();
        pool.coming -= 1;
        if let Ok(connection) = &made {
            pool.open.push((connection.clone(), 1));
        }
        self.changed.notify_all();
        made
    }

    /// Ends the use of a connection; one that is `lost` is not used again.
    fn give_back(&self, connection: &Arc<Connection>, lost: bool) {
        let mut pool = self.pool.lock();
        if let Some(at) = pool.open.iter().position(|(c, _)| Arc::ptr_eq(c, connection)) {
            match lost {
                true => drop(pool.open.swap_remove(at)),
                false => pool.open[at].1 -= 1,
            }
        }
        self.changed.notify_all();
    }

    /// Performs a request, again on a new connection if one is lost.
    fn request(&self, r: Request, payload: &[u8], data: &mut [u8]) -> io::Result<Answer> {
        let deadline = Instant::now() + self.options.reconnect;
        loop {
            let error = match self.take() {
                Ok(connection) => {
                    let result = connection.perform(r, payload, data);
                    let lost = matches!(result, Err(Failure::Connection(_)));
                    if lost && self.written.load(Ordering::Acquire) != self.flushed.load(Ordering::Acquire) {
                        self.lost.store(true, Ordering::Release); // before a flush finds another connection
                    }
                    self.give_back(&connection, lost);
                    match result {
                        Ok(answer) => return Ok(answer),
                        Err(Failure::Server(error)) => return Err(error),
                        Err(Failure::Connection(error)) => error,
                    }
                }
                Err(error) => error,
            };
            if Instant::now() >= deadline {
                return Err(error);
            }
            tracing::warn!(%error, export = self.name, "The NBD connection was lost");
            std::thread::sleep(PAUSE);
        }
    }

    fn check_end(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.facts.size => Ok(()),
            // An export does not grow.
            _ => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        }
    }

    /// Calls `f` with offset and length of pieces that no multiple of `most` is inside of. If `most` is a number of
    /// blocks, so many hold any piece.
    fn pieces(
        offset: u64,
        len: u64,
        most: u64,
        mut f: impl FnMut(u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let n = (len - done).min(most - at % most);
            f(at, n)?;
            done += n;
        }
        Ok(())
    }

    fn most(&self) -> u64 {
        self.facts.max_block.min(PIECE)
    }

    /// Reads whole blocks.
    fn read_blocks(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let len = buf.len() as u64;
        self.request(Request { command: command::READ, flags: 0, offset, len }, &[], buf).map(drop)
    }

    /// Whether a range consists of whole blocks.
    fn whole(&self, offset: u64, len: u64) -> bool {
        offset.is_multiple_of(self.facts.min_block) && len.is_multiple_of(self.facts.min_block)
    }

    fn change(&self, command: u16, flags: u16, offset: u64, len: u64, payload: &[u8]) -> io::Result<()> {
        self.written.fetch_add(1, Ordering::AcqRel);
        self.request(Request { command, flags, offset, len }, payload, &mut []).map(drop)
    }
}

fn connect(uri: &Uri, tls: Option<&TlsClient>, options: &NbdOptions) -> io::Result<Connection> {
    let (stream, host) = match &uri.address {
        Address::Unix(path) => (Stream::Unix(UnixStream::connect(path)?), "localhost"),
        Address::Tcp(host, port) => {
            let stream = TcpStream::connect((host.as_str(), *port))?;
            stream.set_nodelay(true)?;
            (Stream::Tcp(stream), host.as_str())
        }
    };
    stream.set_timeout(Some(options.timeout))?;
    let host = uri.tls_hostname.as_deref().unwrap_or(host);
    let mut contexts = vec![ALLOCATION.to_owned()];
    contexts.extend(options.contexts.iter().cloned());
    Connection::negotiate(stream, &uri.export, &contexts, tls.map(|tls| (tls, host)))
}

impl Drop for NbdStorage {
    fn drop(&mut self) {
        self.pool.get_mut().open.iter().for_each(|(connection, _)| connection.disconnect());
    }
}

impl Storage for NbdStorage {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.facts.size)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        match len == self.facts.size {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::ENOTSUP)),
        }
    }

    fn readv(&self, mut dst: Scatter<'_>, offset: u64) -> io::Result<()> {
        let wanted = dst.len() as u64;
        let inside = self.facts.size.saturating_sub(offset).min(wanted);
        let block = self.facts.min_block;
        let mut buf = Vec::new();
        Self::pieces(offset, inside, self.most(), |at, n| {
            let (from, to) = (at / block * block, (at + n).next_multiple_of(block).min(self.facts.size));
            buf.resize((to - from) as usize, 0);
            self.read_blocks(&mut buf, from)?;
            let part = &buf[(at - from) as usize..(at - from + n) as usize];
            dst.slice((at - offset) as usize, n as usize).copy_from(part);
            Ok(())
        })?;
        dst.slice(inside as usize, (wanted - inside) as usize).zero();
        Ok(())
    }

    fn writev(&self, src: Gather<'_>, offset: u64) -> io::Result<()> {
        let len = src.len() as u64;
        self.check_end(offset, len)?;
        let whole = self.whole(offset, len);
        let _shared = whole.then(|| self.partial.read());
        let _exclusive = (!whole).then(|| self.partial.write());
        let block = self.facts.min_block;
        let mut buf = Vec::new();
        Self::pieces(offset, len, self.most(), |at, n| {
            let (from, to) = (at / block * block, (at + n).next_multiple_of(block));
            buf.resize((to - from) as usize, 0);
            if from < at {
                self.read_blocks(&mut buf[..block as usize], from)?;
            }
            if at + n < to {
                let last = buf.len() - block as usize;
                self.read_blocks(&mut buf[last..], to - block)?;
            }
            let part = &mut buf[(at - from) as usize..(at - from + n) as usize];
            src.slice((at - offset) as usize, n as usize).copy_to(part);
            self.change(command::WRITE, 0, from, to - from, &buf)
        })
    }

    fn flush(&self) -> io::Result<()> {
        let covered = self.written.load(Ordering::Acquire);
        if self.facts.has(export_flag::SEND_FLUSH) {
            self.request(Request { command: command::FLUSH, flags: 0, offset: 0, len: 0 }, &[], &mut [])?;
        }
        if self.lost.load(Ordering::Acquire) {
            return Err(io::Error::other("The connection was lost before what was written was flushed"));
        }
        self.flushed.fetch_max(covered, Ordering::AcqRel);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.check_end(offset, len)?;
        if self.facts.has(export_flag::SEND_WRITE_ZEROES) && self.whole(offset, len) {
            let flags = if unmap { 0 } else { command_flag::NO_HOLE };
            let _shared = self.partial.read();
            return Self::pieces(offset, len, SPAN, |at, n| {
                self.change(command::WRITE_ZEROES, flags, at, n, &[])
            });
        }
        let zeros = vec![0; len.min(PIECE) as usize];
        Self::pieces(offset, len, PIECE, |at, n| self.writev(Gather::new(&zeros[..n as usize]), at))
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let block = self.facts.min_block;
        let end = offset.saturating_add(len).min(self.facts.size) / block * block;
        let start = offset.next_multiple_of(block);
        if !self.facts.has(export_flag::SEND_TRIM) || start >= end {
            return Ok(());
        }
        let _shared = self.partial.read();
        Self::pieces(start, end - start, SPAN, |at, n| self.change(command::TRIM, 0, at, n, &[]))
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_end(offset, len)
    }

    fn data_at(&self, offset: u64, len: u64) -> io::Result<(bool, u64)> {
        let block = self.facts.min_block;
        let from = offset / block * block;
        let want = (offset + len - from).next_multiple_of(block).min(SPAN);
        if from + want > self.facts.size || !self.contexts().any(|c| c == ALLOCATION) {
            return Ok((true, len));
        }
        let extents = self.block_status(ALLOCATION, from, want)?;
        let Some((_, first)) = extents.first() else { return Ok((true, len)) };
        let zero = first & STATE_ZERO != 0;
        let same = extents.iter().take_while(|(_, state)| (state & STATE_ZERO != 0) == zero);
        let run = same.fold(0u64, |sum, (len, _)| sum.saturating_add(*len));
        let run = run.saturating_sub(offset - from).min(len);
        Ok(if run == 0 { (true, len) } else { (!zero, run) })
    }

    fn zero_beyond_end(&self) -> bool {
        false
    }

    fn read_only(&self) -> bool {
        self.options.read_only || self.facts.has(export_flag::READ_ONLY)
    }
}

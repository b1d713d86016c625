//! Unix stream port with the framing of QEMU and passt: each frame follows its length as four big-endian bytes.
//! It listens for one peer at a time, or connects and reconnects.

use std::fs;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Batch, Port};
use crate::error::{Error, Result};
use crate::packet::{Burst, FRAME_MAX, FRAME_MIN};
use crate::sys::{self, Epoll};

/// Which side waits for the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StreamMode {
    /// The switch makes the socket and waits for a peer.
    #[default]
    Listen,
    /// The switch connects to a socket that the peer made, again and again until it is there.
    Connect,
}

/// How long a connecting port waits between attempts.
const RETRY: Duration = Duration::from_millis(200);
/// Most bytes that wait for a slow peer before frames are dropped.
const BACKLOG: usize = 512 * 1024;
const READ_BUFFER: usize = 256 * 1024;

/// See the module's documentation.
#[derive(Debug)]
pub struct StreamPort {
    path: PathBuf,
    mode: StreamMode,
    listener: Option<UnixListener>,
    ready: Epoll,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    peer: Option<UnixStream>,
    next_attempt: Option<Instant>,
    input: Vec<u8>,
    parsed: usize,
    output: Vec<u8>,
}

impl StreamPort {
    /// Makes the port. In listen mode a stale socket file is replaced; one that a living process serves is refused.
    pub fn new(path: impl AsRef<Path>, mode: StreamMode) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let describe = || format!("set up the stream socket {}", path.display());
        let ready = Epoll::new().map_err(|e| Error::io(describe(), e))?;
        let listener = match mode {
            StreamMode::Listen => {
                let l = listen(&path)?;
                l.set_nonblocking(true)
                    .and_then(|()| ready.add(l.as_raw_fd(), 0))
                    .map_err(|e| Error::io(describe(), e))?;
                Some(l)
            }
            StreamMode::Connect => None,
        };
        Ok(Self { path, mode, listener, ready, state: Mutex::default() })
    }

    /// Adopts a socket that is connected already. When the peer goes, the port stays down.
    pub fn from_stream(stream: UnixStream) -> Result<Self> {
        let fail = |e| Error::io("use the connected stream socket", e);
        let ready = Epoll::new().map_err(fail)?;
        stream.set_nonblocking(true).and_then(|()| ready.add(stream.as_raw_fd(), 0)).map_err(fail)?;
        let state = State { peer: Some(stream), ..State::default() };
        Ok(Self {
            path: PathBuf::new(),
            mode: StreamMode::Listen,
            listener: None,
            ready,
            state: Mutex::new(state),
        })
    }

    /// Takes a new peer if there is none and one is to be had.
    fn find_peer(&self, state: &mut State) {
        let peer = match (&self.listener, self.mode) {
            (Some(l), _) => l.accept().ok().map(|(s, _)| s),
            (None, StreamMode::Connect) => {
                let now = Instant::now();
                if state.next_attempt.is_some_and(|t| now < t) {
                    return;
                }
                state.next_attempt = Some(now + RETRY);
                UnixStream::connect(&self.path).ok()
            }
            (None, StreamMode::Listen) => None,
        };
        let Some(peer) = peer else { return };
        if peer.set_nonblocking(true).and_then(|()| self.ready.add(peer.as_raw_fd(), 1)).is_ok() {
            tracing::debug!(path = %self.path.display(), "stream peer connected");
            *state = State { peer: Some(peer), ..State::default() };
        }
    }
}

/// Binds a listening socket; a socket file that nobody serves is removed first.
pub(crate) fn listen(path: &Path) -> Result<UnixListener> {
    claim(path, |p| UnixStream::connect(p).map(drop))?;
    UnixListener::bind(path).map_err(|e| Error::io(format!("listen on {}", path.display()), e))
}

/// Removes a socket file that nobody serves, which `connect` finds out. Any other file is left alone and an error.
pub(super) fn claim(path: &Path, connect: impl FnOnce(&Path) -> io::Result<()>) -> Result<()> {
    let fail = |e| Error::io(format!("listen on {}", path.display()), e);
    match fs::symlink_metadata(path) {
        Ok(m) if m.file_type().is_socket() => {
            if !connect(path).is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused) {
                return Err(Error::SocketInUse(path.to_path_buf()));
            }
            fs::remove_file(path).map_err(fail)
        }
        Ok(_) => Err(fail(ErrorKind::AlreadyExists.into())),
        Err(_) => Ok(()),
    }
}

/// A listening socket whose rights are the owner's alone, for those who may change or see everything. Accepting does
/// not wait.
pub(crate) fn listen_private(path: &Path) -> Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    let fail = |e| Error::io(format!("listen on {}", path.display()), e);
    let l = listen(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(fail)?;
    l.set_nonblocking(true).map_err(fail)?;
    Ok(l)
}

impl State {
    fn disconnect(&mut self) {
        // Closing the socket takes it out of the epoll set.
        *self = Self { next_attempt: self.next_attempt, ..Self::default() };
    }

    /// Reads once; `false` when the peer is gone.
    fn fill(&mut self) -> bool {
        let Some(peer) = &mut self.peer else { return false };
        if self.parsed > 0 {
            self.input.drain(..self.parsed);
            self.parsed = 0;
        }
        let old = self.input.len();
        self.input.resize(old + READ_BUFFER, 0);
        let r = peer.read(&mut self.input[old..]);
        self.input.truncate(old + r.as_ref().map_or(0, |n| *n));
        match r {
            Ok(0) => false,
            Ok(_) => true,
            Err(e) => matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }

    /// Takes frames out of the input; `false` when the peer broke the framing.
    fn parse(&mut self, burst: &mut Burst) -> bool {
        while burst.room() > 0 {
            let rest = &self.input[self.parsed..];
            let Some(len) = rest.first_chunk::<4>().map(|b| u32::from_be_bytes(*b) as usize) else { break };
            if len > FRAME_MAX {
                return false;
            }
            let Some(frame) = rest.get(4..4 + len) else { break };
            if len < FRAME_MIN {
                burst.errors += 1;
            } else {
                burst.push_frame(frame);
            }
            self.parsed += 4 + len;
        }
        true
    }

    /// Sends what waits; an error other than "would block" means that the peer is gone.
    fn drain_output(&mut self) -> io::Result<()> {
        let Some(peer) = &self.peer else { return Ok(()) };
        while !self.output.is_empty() {
            let n = match io::Write::write(&mut &*peer, &self.output) {
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            self.output.drain(..n);
        }
        Ok(())
    }
}

impl Port for StreamPort {
    fn kind(&self) -> &'static str {
        "unix-stream"
    }

    fn link_up(&self) -> bool {
        self.state.lock().peer.is_some()
    }

    fn receive(&self, _queue: usize, burst: &mut Burst) {
        let mut state = self.state.lock();
        if state.peer.is_none() {
            self.find_peer(&mut state);
            if state.peer.is_none() {
                return;
            }
        }
        let mut ok = state.drain_output().is_ok() && state.parse(burst);
        if ok && burst.is_empty() {
            ok = state.fill() && state.parse(burst);
        }
        if !ok {
            tracing::debug!(path = %self.path.display(), "stream peer gone");
            state.disconnect();
        }
    }

    fn transmit(&self, _queue: usize, batch: &Batch<'_>) -> usize {
        let mut state = self.state.lock();
        if state.drain_output().is_err() {
            state.disconnect();
        }
        let Some(fd) = state.peer.as_ref().map(AsRawFd::as_raw_fd) else { return 0 };
        for (i, p) in batch.iter().enumerate() {
            let prefix = (p.len() as u32).to_be_bytes();
            let total = 4 + p.len();
            let sent = if state.output.is_empty() {
                match sys::send_chunks(fd, &prefix, &p.chunks()) {
                    Ok(n) => n,
                    Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => 0,
                    Err(_) => {
                        state.disconnect();
                        return i;
                    }
                }
            } else {
                0
            };
            if sent == total {
                continue;
            }
            // The rest of a frame that went out in part must follow; a whole frame may be dropped.
            if sent == 0 && state.output.len() + total > BACKLOG {
                return i;
            }
            state.output.extend_from_slice(&prefix[sent.min(4)..]);
            p.copy_from(sent.saturating_sub(4), &mut state.output);
        }
        batch.len()
    }

    fn ready_fd(&self, _queue: usize) -> Option<RawFd> {
        Some(self.ready.as_raw_fd())
    }

    fn arm(&self, _queue: usize, on: bool) -> bool {
        let mut state = self.state.lock();
        if !on {
            return false;
        }
        if state.peer.is_none() && self.mode == StreamMode::Connect {
            self.find_peer(&mut state);
        }
        // A whole frame may wait in the input buffer, where the descriptor does not show it.
        let rest = &state.input[state.parsed..];
        let whole =
            rest.first_chunk::<4>().is_some_and(|b| rest.len() >= 4 + u32::from_be_bytes(*b) as usize);
        whole || !state.output.is_empty()
    }
}

impl Drop for StreamPort {
    fn drop(&mut self) {
        if self.listener.is_some() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

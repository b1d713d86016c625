//! Unix datagram port: one frame a datagram, as QEMU's `-netdev dgram` sends them.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use super::stream::claim;
use super::{Batch, Port};
use crate::error::{Error, Result};
use crate::packet::{Burst, FRAME_MAX};

/// See the module's documentation.
#[derive(Debug)]
pub struct DatagramPort {
    path: PathBuf,
    socket: UnixDatagram,
    /// Whether the peer is configured, so that nobody else's frames are taken.
    fixed: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    peer: Option<PathBuf>,
    /// Whether the peer was there when last tried.
    up: bool,
    buffer: Vec<u8>,
}

impl DatagramPort {
    /// Makes the socket `path`. Frames go to and come from the socket `peer`; without one, the peer is whoever sent
    /// last. A stale socket file is replaced; one that a living process serves is refused.
    pub fn new(path: impl AsRef<Path>, peer: Option<&Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        claim(&path, |p| UnixDatagram::unbound()?.connect(p))?;
        let fail = |e| Error::io(format!("set up the datagram socket {}", path.display()), e);
        let socket = UnixDatagram::bind(&path).map_err(fail)?;
        socket.set_nonblocking(true).map_err(fail)?;
        let state = State {
            peer: peer.map(Path::to_path_buf),
            up: peer.is_some_and(|p| UnixDatagram::unbound().and_then(|s| s.connect(p)).is_ok()),
            // One more byte than a frame may have shows that a datagram is too long.
            buffer: vec![0; FRAME_MAX + 1],
        };
        Ok(Self { path, socket, fixed: peer.is_some(), state: Mutex::new(state) })
    }
}

impl Port for DatagramPort {
    fn kind(&self) -> &'static str {
        "unix-datagram"
    }

    fn link_up(&self) -> bool {
        self.state.lock().up
    }

    fn receive(&self, _queue: usize, burst: &mut Burst) {
        let state = &mut *self.state.lock();
        while burst.room() > 0 {
            let (n, from) = match self.socket.recv_from(&mut state.buffer) {
                Ok(r) => r,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            let from = from.as_pathname();
            if self.fixed && from != state.peer.as_deref() {
                burst.errors += 1;
                // Bounded work also when only others send.
                return;
            }
            if state.peer.as_deref() != from {
                state.peer = from.map(Path::to_path_buf);
            }
            state.up = state.peer.is_some();
            burst.push_frame(&state.buffer[..n]);
        }
    }

    fn transmit(&self, _queue: usize, batch: &Batch<'_>) -> usize {
        let state = &mut *self.state.lock();
        let Some(peer) = &state.peer else { return 0 };
        for (i, p) in batch.iter().enumerate() {
            let r = self.socket.send_to(&p.to_vec(), peer);
            state.up = !r.as_ref().is_err_and(is_absent);
            if let Err(e) = r {
                // A full queue, or no peer: the rest would not go either. What is too long for the socket is lost alone.
                if e.kind() == ErrorKind::WouldBlock || !state.up {
                    return i;
                }
            }
        }
        batch.len()
    }

    fn ready_fd(&self, _queue: usize) -> Option<RawFd> {
        Some(self.socket.as_raw_fd())
    }

    fn arm(&self, _queue: usize, _on: bool) -> bool {
        // The descriptor itself says when there is something to read.
        false
    }
}

/// Whether an error says that the peer is not there.
fn is_absent(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound)
}

impl Drop for DatagramPort {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

//! Exports of disks as vhost-user-blk devices.
//!
//! An [`Export`] has a socket and serves one front-end at a time; when it leaves, the next one is served. A queue has a
//! thread. As long as the bytes are in the host's memory it executes requests one after the other; while storage answers
//! late it keeps as many under way as the driver makes available ([`Pace`](blockfmt::queue::Pace) decides), and they end
//! in any order. Two things bring requests back that were taken and not completed when a process was killed or a
//! connection broke:
//!
//! - The used ring: a front-end that keeps nothing else starts each queue at its used index. It is told of the end of
//!   requests in the order in which they were taken, in whatever order they ended.
//! - The record of requests in flight (`VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD`), which the front-end keeps and hands to
//!   the next process: what it names is executed again, beginning with what was taken first, and nothing twice.
//!
//! Writes that were acknowledged and not flushed survive a crash of this process where space was allocated before; where
//! it was not, they are lost like the cache of a disk. A front-end with a channel for it is told of a new size, which
//! is in the configuration space at once.
//!
//! ```
//! use nacre_engine::blockfmt::{CreateOptions, Format, OpenOptions};
//! use nacre_engine::vhost_blk::{Device, Export};
//!
//! # let dir = std::env::temp_dir().join(format!("vhost-blk-{}", std::process::id()));
//! # std::fs::create_dir(&dir)?;
//! let image = dir.join("disk.qcow2");
//! CreateOptions::new(Format::Qcow2, 8 << 20).create(&image)?;
//! let disk = OpenOptions::new(Format::Qcow2).open(&image)?;
//! let export = Export::start(&dir.join("vhost.sock"), Device::new(disk.clone(), "root", false, 2)?)?;
//! disk.resize(16 << 20)?;
//! export.config_changed();
//! drop(export);
//! # std::fs::remove_dir_all(&dir)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod channel;
mod device;
mod flights;
mod inflight;
mod queue;
mod request;
mod ring;
mod session;

pub use device::{Device, MAX_QUEUES, TooManyQueues};
pub use flights::{Ended, Flights};
pub use inflight::Record;
pub use request::{Chain, Request};
pub use ring::{Ring, RingError, RingSetup};

use channel::Channel;
use parking_lot::Mutex;
use session::Session;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

/// Largest size of a queue.
const QUEUE_SIZE: u16 = 1024;

/// What the export and its thread share.
struct Shared {
    device: Arc<Device>,
    stop: AtomicBool,
    /// The connection that is served.
    connection: Mutex<Option<UnixStream>>,
    /// Where its front-end is told of changes.
    channel: Mutex<Channel>,
}

/// A socket on which a disk is exported. Dropping it ends the session; requests have ended then.
pub struct Export {
    path: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Export {
    /// Listens on a socket.
    ///
    /// # Errors
    /// What the host says, as when somebody listens there.
    pub fn start(path: &Path, device: Device) -> io::Result<Self> {
        let listener = vmm_core::socket::listen(path)?;
        let shared = Arc::new(Shared {
            device: Arc::new(device),
            stop: AtomicBool::new(false),
            connection: Mutex::default(),
            channel: Mutex::default(),
        });
        let ours = shared.clone();
        let run = move || ours.run(&listener);
        let thread = std::thread::Builder::new().name("vhost-user".into()).spawn(run)?;
        Ok(Export { path: path.to_owned(), shared, thread: Some(thread) })
    }

    /// Tells the front-end that the configuration space, which has the size of the disk, may have changed.
    pub fn config_changed(&self) {
        self.shared.channel.lock().config_changed();
    }
}

impl Shared {
    fn run(&self, listener: &UnixListener) {
        while !self.stop.load(Ordering::Acquire) {
            let result = listener.accept().and_then(|(stream, _)| self.serve(stream));
            if let Err(error) = result {
                tracing::debug!(%error, "A vhost-user session ended");
            }
        }
    }

    /// Serves a front-end until it leaves.
    fn serve(&self, stream: UnixStream) -> io::Result<()> {
        let session = Arc::new(std::sync::Mutex::new(Session::new(self.device.clone())?));
        let peeked = stream.try_clone()?;
        *self.connection.lock() = Some(stream.try_clone()?);
        if self.stop.load(Ordering::Acquire) {
            return Ok(()); // whoever set it did not see the connection
        }
        let mut handler = BackendReqHandler::from_stream(stream, session);
        let result = loop {
            if let Some(channel) = Channel::peek(&peeked) {
                *self.channel.lock() = channel;
            }
            match handler.handle_request() {
                Ok(()) => {}
                Err(ProtocolError::Disconnected) => break Ok(()),
                Err(error) => break Err(io::Error::other(error)),
            }
        };
        *self.channel.lock() = Channel::default();
        *self.connection.lock() = None;
        // The threads of the queues end with the session, and what they were doing before.
        drop(handler);
        result
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(connection) = &*self.shared.connection.lock() {
            let _ = connection.shutdown(Shutdown::Both); // it may have ended itself
        }
        // A connection wakes a thread that waits for one.
        let woken = UnixStream::connect(&self.path).is_ok();
        let _ = std::fs::remove_file(&self.path);
        if let Some(thread) = self.thread.take().filter(|_| woken) {
            let _ = thread.join();
        }
    }
}

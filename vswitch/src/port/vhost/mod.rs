//! vhost-user port: the back-end of a guest's virtio-net device.
//!
//! Buffers are given back in the order in which the guest offered them, and only after what they held was sent on or
//! copied. So the ring alone tells where the successor of a switch that died goes on, by its used index if it is split,
//! by a note of the switch's and its descriptors if it is packed, and no record of descriptors in flight
//! (`INFLIGHT_SHMFD`) is needed.

mod memory;
mod message;
mod ring;
mod segments;
mod session;
mod vring;

use std::fs;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use crossbeam_utils::CachePadded;
use parking_lot::Mutex;
use parking_lot::lock_api::MutexGuard;

use self::message::{Features, ProtocolFeatures};
use self::session::Session;
use self::vring::Vring;
use super::stream::listen;
use super::{Batch, Port, StreamMode};
use crate::error::{Error, Result};
use crate::packet::Burst;
use crate::packet::offload::OffloadCaps;
use crate::spin::{RawSpin, SpinLock};
use crate::sys::{Epoll, EventFd, poll_readable};

/// Most pairs of queues.
const PAIRS_MAX: usize = 64;
/// Pause between attempts to connect, in milliseconds.
const RETRY_MS: i32 = 100;
/// Most frames that wait to be sent in the guest's name.
const INJECT_MAX: usize = 64;

/// How a vhost-user port is made.
#[derive(Clone, Debug)]
pub struct VhostUserOptions {
    /// The socket.
    pub path: PathBuf,
    /// Whether the switch makes the socket (front-ends connect) or connects to it.
    pub mode: StreamMode,
    /// Pairs of queues offered.
    pub queue_pairs: usize,
    /// Whether packed rings are offered. A front-end that passes whatever is offered on to its guest, but does not know
    /// where such a ring starts, would get a dead device.
    pub packed_rings: bool,
}

impl VhostUserOptions {
    /// A port with one pair of queues, split rings only.
    pub fn new(path: impl AsRef<Path>, mode: StreamMode) -> Self {
        Self { path: path.as_ref().to_path_buf(), mode, queue_pairs: 1, packed_rings: false }
    }
}

/// Waking up of one receive queue: the guest's kick descriptor and the switch's own.
#[derive(Debug)]
struct Waker {
    set: Epoll,
    nudge: EventFd,
    kick: Mutex<Option<EventFd>>,
}

/// What the session and the workers share.
#[derive(Debug)]
struct Device {
    /// Queue 2n receives in the guest's view, queue 2n + 1 sends.
    vrings: Vec<CachePadded<SpinLock<Vring>>>,
    /// For each queue that the guest sends by: whether the last burst taken from it is to be given back.
    finished: Vec<AtomicBool>,
    pairs: usize,
    packed_rings: bool,
    wakers: Vec<Waker>,
    acked: AtomicU64,
    link: AtomicBool,
    mtu: AtomicU32,
    injected: Mutex<Vec<Vec<u8>>>,
    has_injected: AtomicBool,
}

impl Device {
    fn new(pairs: usize, packed_rings: bool) -> std::io::Result<Self> {
        let mut wakers = Vec::new();
        for _ in 0..pairs {
            let (set, nudge) = (Epoll::new()?, EventFd::new()?);
            set.add(nudge.as_raw_fd(), 0)?;
            wakers.push(Waker { set, nudge, kick: Mutex::default() });
        }
        Ok(Self {
            vrings: (0..2 * pairs).map(|_| CachePadded::default()).collect(),
            finished: (0..pairs).map(|_| AtomicBool::new(false)).collect(),
            pairs,
            packed_rings,
            wakers,
            acked: AtomicU64::new(0),
            link: AtomicBool::new(false),
            mtu: AtomicU32::new(0),
            injected: Mutex::default(),
            has_injected: AtomicBool::new(false),
        })
    }

    fn features(&self) -> Features {
        let mut f = Features::all();
        f.set(Features::MQ, self.pairs > 1);
        f.set(Features::RING_PACKED, self.packed_rings);
        f
    }

    fn protocol_features(&self) -> ProtocolFeatures {
        ProtocolFeatures::all()
    }

    /// Replaces the kick descriptor of a queue. Those of the guest's receive queues are not waited for.
    fn set_kick(&self, queue: usize, kick: Option<EventFd>) {
        let Some(w) = self.wakers.get(queue / 2).filter(|_| queue % 2 == 1) else { return };
        let mut old = w.kick.lock();
        if let Some(old) = old.take() {
            w.set.remove(old.as_raw_fd());
        }
        if let Some(k) = &kick
            && let Err(e) = w.set.add(k.as_raw_fd(), 1)
        {
            tracing::warn!(error = %e, "cannot watch a kick descriptor");
        }
        *old = kick;
    }

    /// A queue's ring, once what is owed to the guest for it is settled: buffers of a finished burst to give back, and
    /// the notification for those given back the time before.
    fn vring(&self, index: usize) -> MutexGuard<'_, RawSpin, Vring> {
        let mut v = self.vrings[index].lock();
        v.notify();
        let finished = &self.finished[index / 2];
        if index % 2 == 1 && finished.load(Ordering::Acquire) {
            finished.store(false, Ordering::Relaxed);
            v.complete();
        }
        v
    }

    /// The ring by which frames of transmit queue `queue` reach the guest, which may use fewer queues than it could.
    fn to_guest(&self, queue: usize) -> MutexGuard<'_, RawSpin, Vring> {
        let own = 2 * (queue % self.pairs);
        let v = self.vrings[own].lock();
        if own == 0 || v.is_active() {
            return v;
        }
        drop(v);
        self.vrings[0].lock()
    }

    fn nudge(&self, queue: usize) {
        if let Some(w) = self.wakers.get(queue / 2) {
            w.nudge.signal();
        }
    }

    fn inject(&self, frame: Vec<u8>) {
        let mut list = self.injected.lock();
        if list.len() < INJECT_MAX {
            list.push(frame);
            self.has_injected.store(true, Ordering::Release);
            self.nudge(0);
        }
    }
}

/// See the module's documentation. Dropping it ends the connection and its thread.
#[derive(Debug)]
pub struct VhostUserPort {
    device: Arc<Device>,
    path: PathBuf,
    mode: StreamMode,
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

/// Serves front-ends of a [`VhostUserPort::driven`] in the caller's thread.
#[doc(hidden)]
#[derive(Debug)]
pub struct VhostUserDriver(Arc<Device>);

impl VhostUserDriver {
    /// Serves a front-end until it leaves or breaks the protocol; `before` runs ahead of each request.
    pub fn serve(&self, stream: &UnixStream, mut before: impl FnMut()) {
        let mut session = Session::new(&self.0, stream);
        loop {
            before();
            if session.serve_one().is_err() {
                return session.end();
            }
        }
    }
}

/// How the connection's thread is ended.
#[derive(Debug)]
struct Stop {
    requested: AtomicBool,
    wake: EventFd,
    stream: Mutex<Option<UnixStream>>,
}

impl VhostUserPort {
    /// Makes the port and starts to wait for its front-end.
    pub fn new(options: &VhostUserOptions) -> Result<Self> {
        if !(1..=PAIRS_MAX).contains(&options.queue_pairs) {
            return Err(Error::Invalid(format!("Queue pairs must be within 1 to {PAIRS_MAX}")));
        }
        let fail = |e| Error::io(format!("set up the vhost-user socket {}", options.path.display()), e);
        let listener = match options.mode {
            StreamMode::Listen => {
                let l = listen(&options.path)?;
                l.set_nonblocking(true).map_err(fail)?;
                Some(l)
            }
            StreamMode::Connect => None,
        };
        let device = Arc::new(Device::new(options.queue_pairs, options.packed_rings).map_err(fail)?);
        let stop = Arc::new(Stop {
            requested: AtomicBool::new(false),
            wake: EventFd::new().map_err(fail)?,
            stream: Mutex::default(),
        });
        let (d, s, path) = (device.clone(), stop.clone(), options.path.clone());
        let thread = thread::Builder::new()
            .name("nacre-vhost-user".into())
            .spawn(move || serve(&d, &s, listener.as_ref(), &path))
            .map_err(fail)?;
        Ok(Self { device, path: options.path.clone(), mode: options.mode, stop, thread: Some(thread) })
    }

    /// A port without socket and thread, and what serves its front-ends: for fuzzing.
    #[doc(hidden)]
    pub fn driven(queue_pairs: usize) -> std::io::Result<(Self, VhostUserDriver)> {
        let device = Arc::new(Device::new(queue_pairs, true)?);
        let stop =
            Stop { requested: AtomicBool::new(false), wake: EventFd::new()?, stream: Mutex::default() };
        let port = Self {
            device: device.clone(),
            path: PathBuf::new(),
            mode: StreamMode::Connect,
            stop: Arc::new(stop),
            thread: None,
        };
        Ok((port, VhostUserDriver(device)))
    }

    /// The MTU that the front-end told; zero when it told none.
    pub fn mtu(&self) -> u32 {
        self.device.mtu.load(Ordering::Relaxed)
    }
}

/// Serves one front-end after the other until told to stop.
fn serve(device: &Device, stop: &Stop, listener: Option<&UnixListener>, path: &Path) {
    while !stop.requested.load(Ordering::Acquire) {
        let stream = match listener {
            Some(l) => {
                let r = poll_readable([l.as_raw_fd(), stop.wake.as_raw_fd()], -1);
                if r.is_err() { None } else { l.accept().ok().map(|(s, _)| s) }
            }
            None => {
                let s = UnixStream::connect(path).ok();
                if s.is_none() {
                    let _ = poll_readable([stop.wake.as_raw_fd()], RETRY_MS);
                }
                s
            }
        };
        let Some(stream) = stream else { continue };
        let Ok(clone) = stream.try_clone() else { continue };
        if stream.set_nonblocking(false).is_err() {
            continue;
        }
        *stop.stream.lock() = Some(clone);
        // The request to stop may have come before the stream could be shut down.
        if !stop.requested.load(Ordering::Acquire) {
            tracing::info!(path = %path.display(), "vhost-user front-end connected");
            let end = Session::new(device, &stream).run();
            tracing::info!(path = %path.display(), reason = %end, "vhost-user front-end gone");
        }
        *stop.stream.lock() = None;
    }
}

impl Drop for VhostUserPort {
    fn drop(&mut self) {
        self.stop.requested.store(true, Ordering::Release);
        self.stop.wake.signal();
        if let Some(s) = &*self.stop.stream.lock() {
            let _ = s.shutdown(Shutdown::Both);
        }
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
        if self.mode == StreamMode::Listen {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Port for VhostUserPort {
    fn kind(&self) -> &'static str {
        "vhost-user"
    }

    fn rx_queues(&self) -> usize {
        self.device.pairs
    }

    fn tx_queues(&self) -> usize {
        self.device.pairs
    }

    fn offloads(&self) -> OffloadCaps {
        let f = Features::from_bits_truncate(self.device.acked.load(Ordering::Acquire));
        let pairs = [
            (Features::GUEST_CSUM, OffloadCaps::CSUM),
            (Features::GUEST_TSO4, OffloadCaps::TSO4),
            (Features::GUEST_TSO6, OffloadCaps::TSO6),
            (Features::GUEST_ECN, OffloadCaps::ECN),
        ];
        pairs.into_iter().filter(|(bit, _)| f.contains(*bit)).map(|(_, cap)| cap).collect()
    }

    fn link_up(&self) -> bool {
        self.device.link.load(Ordering::Acquire)
    }

    fn receive(&self, queue: usize, burst: &mut Burst) {
        if queue == 0 && self.device.has_injected.swap(false, Ordering::AcqRel) {
            let mut list = self.device.injected.lock();
            let n = list.len().min(burst.room());
            for f in list.drain(..n) {
                burst.push_frame(&f);
            }
            self.device.has_injected.store(!list.is_empty(), Ordering::Release);
        }
        self.device.vring(2 * queue + 1).receive(burst);
    }

    fn complete(&self, queue: usize) {
        self.device.finished[queue].store(true, Ordering::Release);
    }

    fn transmit(&self, queue: usize, batch: &Batch<'_>) -> usize {
        self.device.to_guest(queue).transmit(batch)
    }

    fn notify(&self, queue: usize) {
        self.device.to_guest(queue).notify();
    }

    fn ready_fd(&self, queue: usize) -> Option<RawFd> {
        Some(self.device.wakers.get(queue)?.set.as_raw_fd())
    }

    fn arm(&self, queue: usize, on: bool) -> bool {
        let w = &self.device.wakers[queue];
        w.nudge.clear();
        if let Some(k) = &*w.kick.lock() {
            k.clear();
        }
        let mut v = self.device.vring(2 * queue + 1);
        v.notify();
        let work = v.arm(on);
        drop(v);
        work || (on && queue == 0 && self.device.has_injected.load(Ordering::Acquire))
    }

    fn is_cheap_to_poll(&self) -> bool {
        true
    }
}

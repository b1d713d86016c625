//! Exports of disks as vhost-user-blk devices.
//!
//! Each export has a socket and serves one front-end at a time; when it leaves, the next one is served. A queue has a
//! thread, which completes requests in the order in which it takes them. So the used ring tells at any time what is
//! not done: a front-end that connects again, also to another process after a crash, starts each queue at its used
//! index, and no request is lost without a record of those in flight. Writes that were acknowledged and not flushed
//! survive a crash of this process where space was allocated before; where it was not, they are lost like the cache of a
//! disk. A new size is in the configuration space at once; front-ends are not told to look.

mod request;

use crate::jobs::lock;
use anyhow::{Context, Result};
use blockfmt::Disk;
use request::{Limits, execute};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use vhost_user_backend::{ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringMutex, VringT};
use virtio_queue::QueueOwnedT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringMutex<Memory>;

/// Feature bits of virtio 1.2, sections 5.2.3 and 6, and of vhost-user.
mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
}

/// Largest size of a queue.
const QUEUE_SIZE: u16 = 1024;
/// Buffers of one request, as told to drivers.
const SEG_MAX: u32 = 126;
/// Most queues of an export.
pub const MAX_QUEUES: u16 = 64;

/// The device behind a socket.
struct Device {
    disk: Disk,
    serial: [u8; 20],
    read_only: bool,
    features: AtomicU64,
    memory: Mutex<Option<Memory>>,
    /// Cleared when the front-end left: its queues, which may fill for ever, are not served any more.
    connected: AtomicBool,
    /// Held, for each queue, while a request is taken and executed.
    busy: Vec<Mutex<()>>,
}

impl Device {
    fn new(disk: Disk, name: &str, read_only: bool, queues: u16) -> Arc<Self> {
        let mut serial = [0; 20];
        let len = name.len().min(serial.len());
        serial[..len].copy_from_slice(&name.as_bytes()[..len]);
        Arc::new(Device {
            read_only: read_only || disk.is_read_only(),
            disk,
            serial,
            features: AtomicU64::new(0),
            memory: Mutex::default(),
            connected: AtomicBool::new(false),
            busy: (0..queues).map(|_| Mutex::default()).collect(),
        })
    }

    /// The configuration space (virtio 1.2, section 5.2.4).
    fn config(&self) -> [u8; 60] {
        let geometry = self.disk.geometry();
        let sectors = |bytes: u32| (bytes / 512).max(1);
        let blocks = |bytes: u32| (bytes / geometry.logical_block).max(1);
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.disk.size() / 512).to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &geometry.logical_block.to_le_bytes());
        put(24, &[blocks(geometry.physical_block).ilog2() as u8]);
        put(26, &(blocks(geometry.physical_block) as u16).to_le_bytes());
        put(28, &blocks(geometry.cluster).to_le_bytes());
        put(32, &[1]); // writes are cached until a flush
        put(34, &(self.busy.len() as u16).to_le_bytes());
        put(36, &Limits::RANGE_SECTORS.to_le_bytes());
        put(40, &Limits::RANGES.to_le_bytes());
        put(44, &sectors(geometry.cluster).to_le_bytes());
        put(48, &Limits::RANGE_SECTORS.to_le_bytes());
        put(52, &Limits::RANGES.to_le_bytes());
        put(56, &[1]); // zeroes may be holes
        config
    }

    /// Serves everything that is in a queue.
    fn serve(&self, vring: &Vring, queue: usize) -> io::Result<()> {
        let Some(memory) = lock(&self.memory).clone() else { return Ok(()) };
        let write_through = self.features.load(Ordering::Acquire) & feature::FLUSH == 0;
        let fail = |e: virtio_queue::Error| io::Error::other(e);
        loop {
            vring.disable_notification().map_err(fail)?;
            loop {
                // The front-end gets a queue back only between two requests.
                let _busy = lock(&self.busy[queue]);
                if !self.connected.load(Ordering::Acquire) {
                    return Ok(());
                }
                let next =
                    vring.get_mut().get_queue_mut().iter(memory.memory()).map(|mut chains| chains.next());
                let chain = match next {
                    Ok(Some(chain)) => chain,
                    Ok(None) => break,
                    Err(virtio_queue::Error::QueueNotReady) => return Ok(()), // it was stopped
                    Err(error) => return Err(fail(error)),
                };
                let head = chain.head_index();
                let used = execute(&self.disk, &self.serial, self.read_only, write_through, chain);
                vring.add_used(head, used).map_err(fail)?;
                if vring.needs_notification().map_err(fail)? {
                    vring.signal_used_queue()?;
                }
            }
            if !vring.enable_notification().map_err(fail)? {
                return Ok(());
            }
        }
    }
}

/// The device as the protocol's library wants it.
#[derive(Clone)]
struct Session(Arc<Device>);

impl VhostUserBackend for Session {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.0.busy.len()
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE.into()
    }

    fn features(&self) -> u64 {
        use feature::{
            BLK_SIZE, DISCARD, EVENT_IDX, FLUSH, INDIRECT_DESC, MQ, PROTOCOL_FEATURES, RO, SEG_MAX, TOPOLOGY,
            VERSION_1, WRITE_ZEROES,
        };
        let common = SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | MQ | INDIRECT_DESC | EVENT_IDX | VERSION_1;
        common | PROTOCOL_FEATURES | if self.0.read_only { RO } else { DISCARD | WRITE_ZEROES }
    }

    fn acked_features(&self, features: u64) {
        self.0.features.store(features, Ordering::Release);
    }

    fn protocol_features(&self) -> Protocol {
        Protocol::MQ
            | Protocol::CONFIG
            | Protocol::REPLY_ACK
            | Protocol::CONFIGURE_MEM_SLOTS
            | Protocol::RESET_DEVICE
    }

    fn set_event_idx(&self, _enabled: bool) {} // the queues are told themselves

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.0.config();
        let byte = |at: u32| config.get(at as usize).copied().unwrap_or(0);
        (offset..offset.saturating_add(size)).map(byte).collect()
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        *lock(&self.0.memory) = Some(memory);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.0.busy.len()).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        // The queue is not ready any more; wait for the request that was taken before.
        drop(self.0.busy.get(queue as usize).map(lock));
        Ok(())
    }

    fn handle_event(&self, _event: u16, _ready: EventSet, vrings: &[Vring], thread: usize) -> io::Result<()> {
        let Some(vring) = vrings.first() else { return Ok(()) };
        if let Err(error) = self.0.serve(vring, thread) {
            // The driver broke its rings: only itself suffers, until it resets the device.
            tracing::warn!(%error, queue = thread, "A queue is malformed");
        }
        Ok(())
    }
}

/// What the export and its thread share.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    session: Mutex<Option<ShutdownHandle>>,
}

/// A socket on which a disk is exported. Dropping it ends the session; requests have ended then.
pub struct Export {
    path: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Export {
    /// Listens on a socket.
    pub fn start(path: &Path, disk: Disk, name: &str, read_only: bool, queues: u16) -> Result<Self> {
        anyhow::ensure!((1..=MAX_QUEUES).contains(&queues), "An export has 1 to {MAX_QUEUES} queues");
        let listener =
            vmm_core::socket::listen(path).with_context(|| format!("Cannot listen on {}", path.display()))?;
        let device = Device::new(disk, name, read_only, queues);
        let shared = Arc::new(Shared::default());
        let ours = shared.clone();
        let run = move || {
            let mut listener = Listener::from(listener);
            while !ours.stop.load(Ordering::Acquire) {
                if let Err(error) = serve_one(&mut listener, &device, &ours) {
                    tracing::debug!(%error, "A vhost-user session ended");
                }
            }
        };
        let thread = std::thread::Builder::new().name("vhost-user".into()).spawn(run)?;
        Ok(Export { path: path.to_owned(), shared, thread: Some(thread) })
    }
}

/// Serves the next front-end until it leaves.
fn serve_one(
    listener: &mut Listener,
    device: &Arc<Device>,
    shared: &Shared,
) -> Result<(), vhost_user_backend::Error> {
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    device.connected.store(true, Ordering::Release);
    let mut daemon = VhostUserDaemon::new("vhost-session".into(), Session(device.clone()), memory)?;
    daemon.start(listener)?;
    *lock(&shared.session) = daemon.shutdown_handle();
    if shared.stop.load(Ordering::Acquire) {
        daemon.request_shutdown(); // whoever set it did not see the handle
    }
    let result = daemon.wait();
    *lock(&shared.session) = None;
    device.connected.store(false, Ordering::Release);
    // The queues' threads end here, with what they were doing.
    drop(daemon);
    *lock(&device.memory) = None;
    result
}

impl Drop for Export {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(session) = &*lock(&self.shared.session) {
            session.shutdown();
        }
        // A connection wakes a thread that waits for one.
        let woken = UnixStream::connect(&self.path).is_ok();
        let _ = std::fs::remove_file(&self.path);
        if let Some(thread) = self.thread.take().filter(|_| woken) {
            let _ = thread.join();
        }
    }
}

//! The network device (virtio 1.2, section 5.1).

mod backend;
mod coalesce;
mod control;
mod filter;
mod offload;
mod pair;
mod stream;
mod tap;

use std::io;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::{Immutable, IntoBytes};

pub use backend::{HEADER_LEN, Header, NetBackend, NetPort, Sent};
pub use stream::StreamBackend;
pub use tap::{TapBackend, TapError};

use super::device::{Activation, ConfigNotifier, DeviceError, HandlerSpec, VirtioDevice, copy_config};
use super::rate::{Limits, RateLimiter};
use crate::lifecycle::LifecycleError;
use filter::Filter;
use pair::Pair;

/// Feature bits of the network device.
pub mod net_features {
    /// The device completes checksums of sent frames.
    pub const CSUM: u64 = 1;
    /// The driver takes received frames with partial checksums.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// Offloads can be changed at run time.
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    /// The device gives its MTU.
    pub const MTU: u64 = 1 << 3;
    /// The device gives its MAC address.
    pub const MAC: u64 = 1 << 5;
    /// The driver takes received TCP/IPv4 segments larger than the MTU.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// The driver takes received TCP/IPv6 segments larger than the MTU.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// The driver takes large segments with ECN.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// The device segments TCP/IPv4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The device segments TCP/IPv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// The device segments TCP with ECN.
    pub const HOST_ECN: u64 = 1 << 13;
    /// A received frame may take several buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// The device gives the state of its link.
    pub const STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// The control queue takes receive filters.
    pub const CTRL_RX: u64 = 1 << 18;
    /// The driver announces itself to the network when asked to.
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    /// There are several pairs of queues.
    pub const MQ: u64 = 1 << 22;
    /// The control queue changes the MAC address.
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
}
use net_features as f;

const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 2;

/// What a network device is made of besides its back-end.
#[derive(Clone, Debug)]
pub struct NetOptions {
    /// The MAC address.
    pub mac: [u8; 6],
    /// The MTU that the guest is told, or its own default.
    pub mtu: Option<u16>,
    /// Entries of each queue.
    pub queue_size: u16,
    /// Limits on what the guest sends.
    pub send_limits: Limits,
    /// Limits on what the guest receives.
    pub receive_limits: Limits,
}

impl Default for NetOptions {
    fn default() -> Self {
        Self {
            mac: [0x52, 0x54, 0, 0, 0, 1],
            mtu: None,
            queue_size: 256,
            send_limits: Limits::default(),
            receive_limits: Limits::default(),
        }
    }
}

/// Counters of a network device since it was made.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// Frames the guest received.
    pub received: AtomicU64,
    /// Bytes the guest received.
    pub received_bytes: AtomicU64,
    /// Frames the guest sent.
    pub sent: AtomicU64,
    /// Bytes the guest sent.
    pub sent_bytes: AtomicU64,
    /// Frames for the guest that fitted no buffer.
    pub receive_dropped: AtomicU64,
    /// Frames for the guest that its filter refused.
    pub filtered: AtomicU64,
    /// Frames of the guest that the back-end refused or that were malformed.
    pub send_dropped: AtomicU64,
    /// Times that a rate limit made frames wait.
    pub throttled: AtomicU64,
}

#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    mac: [u8; 6],
    status: u16,
    max_pairs: u16,
    mtu: u16,
}

/// What the device and its handlers share.
struct Core {
    backend: Arc<dyn NetBackend>,
    mac: [u8; 6],
    config: Mutex<Config>,
    filter: Mutex<Filter>,
    /// Pairs of queues that the driver uses.
    active: AtomicU16,
    /// Features in use, including offloads that the driver turned off at run time.
    offloads: AtomicU64,
    send_limiter: Mutex<RateLimiter>,
    receive_limiter: Mutex<RateLimiter>,
    counters: NetCounters,
    notifier: OnceLock<ConfigNotifier>,
    /// Wakes the thread of each pair after `active` changed.
    wakes: Vec<EventFd>,
}

impl Core {
    fn set_active(&self, pairs: u16) {
        self.active.store(pairs, Ordering::Release);
        for wake in &self.wakes {
            // A full counter is signalled already.
            let _ = wake.write(1);
        }
    }

    fn set_status(&self, bit: u16, on: bool) {
        {
            let mut config = self.config.lock();
            let status = if on { config.status | bit } else { config.status & !bit };
            if status == config.status {
                return;
            }
            config.status = status;
        }
        if let Some(notifier) = self.notifier.get() {
            notifier.changed();
        }
    }
}

/// A virtio network device whose frames go through this process.
pub struct Net {
    core: Arc<Core>,
    pairs: u16,
    queue_size: u16,
    mtu: bool,
}

impl Net {
    /// A device over `backend`, with as many pairs of queues as it has.
    ///
    /// # Errors
    /// Fails when the host gives no event descriptors.
    pub fn new(backend: Arc<dyn NetBackend>, options: &NetOptions) -> io::Result<Arc<Self>> {
        let pairs = backend.pairs().max(1);
        let now = Instant::now();
        let config =
            Config { mac: options.mac, status: LINK_UP, max_pairs: pairs, mtu: options.mtu.unwrap_or(0) };
        let wakes = (0..pairs).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<io::Result<_>>()?;
        let core = Core {
            backend,
            mac: options.mac,
            config: Mutex::new(config),
            filter: Mutex::new(Filter::new(options.mac)),
            active: AtomicU16::new(1),
            offloads: AtomicU64::new(0),
            send_limiter: Mutex::new(RateLimiter::new(&options.send_limits, now)),
            receive_limiter: Mutex::new(RateLimiter::new(&options.receive_limits, now)),
            counters: NetCounters::default(),
            notifier: OnceLock::new(),
            wakes,
        };
        let queue_size = options.queue_size.clamp(2, 1 << 15).next_power_of_two();
        Ok(Arc::new(Self { core: Arc::new(core), pairs, queue_size, mtu: options.mtu.is_some() }))
    }

    /// Plugs the link in or out, as the guest sees it.
    pub fn set_link(&self, up: bool) {
        self.core.set_status(LINK_UP, up);
    }

    /// Asks the guest to announce itself to the network, after a migration for example.
    pub fn announce(&self) {
        if self.core.offloads.load(Ordering::Acquire) & f::GUEST_ANNOUNCE != 0 {
            self.core.set_status(ANNOUNCE, true);
        }
    }

    /// Replaces the rate limits while the device works.
    pub fn set_limits(&self, send: &Limits, receive: &Limits) {
        *self.core.send_limiter.lock() = RateLimiter::new(send, Instant::now());
        *self.core.receive_limiter.lock() = RateLimiter::new(receive, Instant::now());
    }

    /// The counters.
    pub fn counters(&self) -> &NetCounters {
        &self.core.counters
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        1
    }

    fn name(&self) -> &'static str {
        "virtio-net"
    }

    fn features(&self) -> u64 {
        let common = f::MAC | f::STATUS | f::MRG_RXBUF | f::CTRL_VQ | f::CTRL_RX | f::CTRL_MAC_ADDR;
        let mtu = if self.mtu { f::MTU } else { 0 };
        let mq = if self.pairs > 1 { f::MQ } else { 0 };
        let offloads = self.core.backend.offloads();
        let guest = if offloads & f::GUEST_CSUM != 0 { f::CTRL_GUEST_OFFLOADS } else { 0 };
        common | f::GUEST_ANNOUNCE | mtu | mq | offloads | guest
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![self.queue_size; usize::from(self.pairs) * 2];
        sizes.push(64);
        sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(self.core.config.lock().as_bytes(), offset, data);
    }

    fn connect(&self, notifier: ConfigNotifier) {
        // One transport owns the device.
        let _ = self.core.notifier.set(notifier);
    }

    fn activate(&self, activation: Activation<'_>) -> Result<Vec<HandlerSpec>, DeviceError> {
        let features = activation.features;
        self.core.offloads.store(features, Ordering::Release);
        self.core.backend.set_offloads(features)?;
        let multi = features & f::MQ != 0;
        let pairs = if multi { usize::from(self.pairs) } else { 1 };
        // Without MQ the control queue follows the first pair, whatever the device could do (section 5.1.2).
        let control = (features & f::CTRL_VQ != 0).then_some(pairs * 2);
        self.core.backend.set_active_pairs(self.core.active.load(Ordering::Acquire))?;
        let mut handlers = Vec::with_capacity(pairs);
        for index in 0..pairs {
            let port = self.core.backend.open(index as u16)?;
            let control = control.filter(|_| index == 0);
            let queues = [index * 2, index * 2 + 1].into_iter().chain(control);
            handlers.push(HandlerSpec::new(
                queues,
                Pair::new(Arc::clone(&self.core), port, index, features, control),
            ));
        }
        Ok(handlers)
    }

    fn reset(&self) {
        *self.core.filter.lock() = Filter::new(self.core.mac);
        self.core.active.store(1, Ordering::Release);
        self.core.offloads.store(0, Ordering::Release);
        let mut config = self.core.config.lock();
        config.mac = self.core.mac;
        config.status &= !ANNOUNCE;
    }

    fn save(&self) -> Result<serde_json::Value, LifecycleError> {
        Ok(serde_json::json!({
            "mac": self.core.config.lock().mac,
            "filter": *self.core.filter.lock(),
            "pairs": self.core.active.load(Ordering::Acquire),
            "offloads": self.core.offloads.load(Ordering::Acquire),
        }))
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), LifecycleError> {
        let saved: Saved = serde::Deserialize::deserialize(state)
            .map_err(|e: serde_json::Error| LifecycleError::State(e.to_string()))?;
        if !(1..=self.pairs).contains(&saved.pairs) {
            return Err(LifecycleError::State("its pairs of queues are others".into()));
        }
        self.core.config.lock().mac = saved.mac;
        *self.core.filter.lock() = saved.filter;
        self.core.active.store(saved.pairs, Ordering::Release);
        self.core.offloads.store(saved.offloads, Ordering::Release);
        // The guest may be on another host now: the network must learn where.
        self.announce();
        Ok(())
    }
}

#[derive(serde::Deserialize)]
struct Saved {
    mac: [u8; 6],
    filter: Filter,
    pairs: u16,
    offloads: u64,
}

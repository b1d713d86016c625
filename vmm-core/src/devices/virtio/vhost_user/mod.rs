//! Devices whose queues are served by another process over the vhost-user protocol: a switch, a storage daemon.
//!
//! The back-end maps guest RAM and moves the data itself. This process passes on features, rings and descriptors,
//! answers the configuration space, and connects again when the back-end restarts: it then continues at the used index
//! that it finds in guest memory.
//!
//! Where writes to guest RAM must not go unnoticed, on the software accelerator, the back-end gets rings of this
//! process's own instead of the guest's (`relay`): buffers pass by here on their way back.

mod connection;
mod handler;
mod relay;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::device::{
    Activation, ConfigNotifier, DeviceError, HandlerSpec, VirtioDevice, copy_config, features,
    write_config_bytes,
};
use super::net::net_features as f;
use crate::lifecycle::LifecycleError;
use crate::memory::GuestMemory;
use connection::{Connection, F_PROTOCOL_FEATURES, protocol};
use handler::{Control, External};

/// Why a back-end cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// Nobody listens.
    #[error("Cannot connect to {path}; start the vhost-user back-end first")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// The connection failed.
    #[error("The vhost-user connection failed")]
    Io(#[source] io::Error),
    /// The back-end does not follow the protocol.
    #[error("The vhost-user back-end {0}")]
    Protocol(&'static str),
    /// The back-end refused a request.
    #[error("The vhost-user back-end refused request {0}")]
    Refused(u32),
    /// Guest RAM is in more pieces than a message carries.
    #[error("Guest memory has {0} regions; vhost-user takes at most 8")]
    TooManyRegions(usize),
    /// The back-end lacks something that the device needs.
    #[error("The vhost-user back-end lacks {0}")]
    Lacks(&'static str),
}

impl From<VhostUserError> for DeviceError {
    fn from(error: VhostUserError) -> Self {
        Self::Backend(io::Error::other(error))
    }
}

/// Protocol features that a network device wants of its back-end, and those that a block device wants.
const NET_PROTOCOL: u64 = protocol::MQ | protocol::REPLY_ACK;
const BLK_PROTOCOL: u64 = NET_PROTOCOL | protocol::CONFIG;
/// Features of a network device that a back-end may have and this front-end passes on.
const NET_FEATURES: u64 = f::CSUM
    | f::GUEST_CSUM
    | f::GUEST_TSO4
    | f::GUEST_TSO6
    | f::GUEST_ECN
    | 1 << 10 // GUEST_UFO
    | f::HOST_TSO4
    | f::HOST_TSO6
    | f::HOST_ECN
    | 1 << 14 // HOST_UFO
    | f::MRG_RXBUF
    | IN_ORDER;
/// Features of a block device that are passed on: all that its configuration space and requests have.
const BLK_FEATURES: u64 = 0xfe76 | IN_ORDER;
const IN_ORDER: u64 = 1 << 35;
/// Bytes of a block device's configuration space.
const BLK_CONFIG: usize = 60;
/// Where `num_queues` is in it.
const BLK_QUEUES: usize = 34;
const BLK_MQ: u64 = 1 << 12;
/// Where the link status is in a network device's configuration space.
const NET_STATUS: usize = 6;
/// Entries of the control queue.
const CONTROL_SIZE: u16 = 64;

/// What a network device is made of besides its back-end.
#[derive(Clone, Debug)]
pub struct VhostUserNetOptions {
    /// The MAC address.
    pub mac: [u8; 6],
    /// The MTU that the guest is told, or its own default.
    pub mtu: Option<u16>,
    /// Pairs of queues; fewer when the back-end has fewer.
    pub pairs: u16,
    /// Entries of each queue.
    pub queue_size: u16,
}

impl Default for VhostUserNetOptions {
    fn default() -> Self {
        Self { mac: [0x52, 0x54, 0, 0, 0, 1], mtu: None, pairs: 1, queue_size: 256 }
    }
}

/// What the device and its handlers share.
struct Core {
    path: PathBuf,
    wanted: u64,
    connection: Mutex<Option<Connection>>,
    config: Mutex<Vec<u8>>,
    is_net: bool,
    /// Queues that the back-end serves, and the most entries of each.
    queues: (u16, u16),
    /// Memory for the rings of a relay, from its first use on.
    rings: Mutex<Option<GuestMemory>>,
    /// Pairs of queues that the driver uses.
    active: AtomicU16,
    notifier: OnceLock<ConfigNotifier>,
}

impl Core {
    /// Memory for the rings of a relay.
    fn ring_memory(&self, guest: &GuestMemory) -> Result<GuestMemory, DeviceError> {
        let mut rings = self.rings.lock();
        if let Some(memory) = &*rings {
            return Ok(memory.clone());
        }
        let (queues, size) = self.queues;
        let memory = relay::allocate(guest, queues, size).map_err(io::Error::other)?;
        Ok(rings.insert(memory).clone())
    }

    /// Shows in the configuration space of a network device whether the back-end is there.
    fn set_link(&self, up: bool) {
        if !self.is_net {
            return;
        }
        let before = std::mem::replace(&mut self.config.lock()[NET_STATUS], u8::from(up));
        // Coming up is always told: the driver of a restored guest may have seen the link of another back-end.
        if (up || before != 0)
            && let Some(notifier) = self.notifier.get()
        {
            notifier.changed();
        }
    }
}

/// A virtio device that another process serves.
pub struct VhostUser {
    core: Arc<Core>,
    features: u64,
}

impl VhostUser {
    /// A network device served by the back-end that listens at `path`.
    ///
    /// # Errors
    /// Fails when nobody listens there or it does not follow the protocol.
    pub fn net(path: &Path, options: &VhostUserNetOptions) -> Result<Arc<Self>, VhostUserError> {
        Self::net_with(path, Connection::open(path, NET_PROTOCOL)?, options)
    }

    /// The same over a socket that is connected, without a place to look for the back-end again: for fuzzing.
    #[doc(hidden)]
    pub fn net_over(stream: UnixStream, options: &VhostUserNetOptions) -> Result<Arc<Self>, VhostUserError> {
        Self::net_with(Path::new(""), Connection::negotiate(stream, NET_PROTOCOL)?, options)
    }

    fn net_with(
        path: &Path,
        connection: Connection,
        options: &VhostUserNetOptions,
    ) -> Result<Arc<Self>, VhostUserError> {
        let most = if connection.has(protocol::MQ) { connection.queues.clamp(2, 512) as u16 / 2 } else { 1 };
        // Back-ends count queues or pairs; both are at least what is used then.
        let pairs = options.pairs.clamp(1, most);
        let mut offered = connection.features & NET_FEATURES | f::MAC | f::STATUS;
        if pairs > 1 {
            offered |= f::MQ | f::CTRL_VQ;
        }
        let mtu = options.mtu.unwrap_or(0);
        offered |= if mtu == 0 { 0 } else { f::MTU };
        let mut config = options.mac.to_vec();
        for value in [1, pairs, mtu] {
            config.extend(value.to_le_bytes());
        }
        Self::new(path, NET_PROTOCOL, connection, offered, config, true, pairs * 2, options.queue_size)
    }

    /// A block device served by the back-end that listens at `path`, with `queues` queues at most.
    ///
    /// # Errors
    /// Fails when nobody listens there or it lacks the configuration space.
    pub fn blk(path: &Path, queues: u16, queue_size: u16) -> Result<Arc<Self>, VhostUserError> {
        Self::blk_with(path, Connection::open(path, BLK_PROTOCOL)?, queues, queue_size)
    }

    /// The same over a socket that is connected, without a place to look for the back-end again: for fuzzing.
    #[doc(hidden)]
    pub fn blk_over(stream: UnixStream, queues: u16, queue_size: u16) -> Result<Arc<Self>, VhostUserError> {
        Self::blk_with(Path::new(""), Connection::negotiate(stream, BLK_PROTOCOL)?, queues, queue_size)
    }

    fn blk_with(
        path: &Path,
        mut connection: Connection,
        queues: u16,
        queue_size: u16,
    ) -> Result<Arc<Self>, VhostUserError> {
        if !connection.has(protocol::CONFIG) {
            return Err(VhostUserError::Lacks("the configuration space"));
        }
        let mut config = connection.config(BLK_CONFIG)?;
        let offered = connection.features & BLK_FEATURES;
        let has = u16::from_le_bytes([config[BLK_QUEUES], config[BLK_QUEUES + 1]]);
        let most = if offered & BLK_MQ != 0 { has.max(1) } else { 1 };
        let queues = queues.clamp(1, most.min(connection.queues.clamp(1, 256) as u16));
        config[BLK_QUEUES..BLK_QUEUES + 2].copy_from_slice(&queues.to_le_bytes());
        Self::new(path, BLK_PROTOCOL, connection, offered, config, false, queues, queue_size)
    }

    #[expect(clippy::too_many_arguments, reason = "the constructors above are its only callers")]
    fn new(
        path: &Path,
        wanted: u64,
        connection: Connection,
        offered: u64,
        config: Vec<u8>,
        is_net: bool,
        queues: u16,
        queue_size: u16,
    ) -> Result<Arc<Self>, VhostUserError> {
        if connection.features & features::VERSION_1 == 0 {
            return Err(VhostUserError::Lacks("virtio 1.0"));
        }
        // What all queues have here the back-end must have, too; it is masked out otherwise.
        let ring = connection.features & (features::INDIRECT_DESC | features::EVENT_IDX);
        let core = Core {
            path: path.to_owned(),
            wanted,
            connection: Mutex::new(Some(connection)),
            config: Mutex::new(config),
            is_net,
            queues: (queues, queue_size.clamp(2, 1 << 15).next_power_of_two()),
            rings: Mutex::default(),
            active: AtomicU16::new(1),
            notifier: OnceLock::new(),
        };
        Ok(Arc::new(Self { core: Arc::new(core), features: offered | ring }))
    }

    fn has_control(&self) -> bool {
        self.features & f::CTRL_VQ != 0 && self.core.is_net
    }
}

impl VirtioDevice for VhostUser {
    fn device_type(&self) -> u32 {
        if self.core.is_net { 1 } else { 2 }
    }

    fn name(&self) -> &'static str {
        if self.core.is_net { "vhost-user-net" } else { "vhost-user-blk" }
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn ring_features(&self) -> u64 {
        self.features & (features::INDIRECT_DESC | features::EVENT_IDX) | features::RING_RESET
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let (queues, size) = self.core.queues;
        let mut sizes = vec![size; usize::from(queues)];
        sizes.extend(self.has_control().then_some(CONTROL_SIZE));
        sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.core.config.lock(), offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if self.core.is_net {
            return;
        }
        write_config_bytes(&mut self.core.config.lock(), offset, data);
        if let Some(connection) = &mut *self.core.connection.lock()
            && let Err(error) = connection.set_config(offset as u32, data)
        {
            tracing::warn!(%error, "The back-end did not take the configuration");
        }
    }

    fn connect(&self, notifier: ConfigNotifier) {
        // One transport owns the device.
        let _ = self.core.notifier.set(notifier);
    }

    fn activate(&self, activation: Activation<'_>) -> Result<Vec<HandlerSpec>, DeviceError> {
        let multi = activation.features & f::MQ != 0 && self.core.is_net;
        let (queues, _) = self.core.queues;
        let served = if self.core.is_net && !multi { 2 } else { usize::from(queues) };
        let relays = activation.memory.has_write_observer();
        let external = External::new(
            Arc::clone(&self.core),
            activation.features | F_PROTOCOL_FEATURES,
            activation.kicks[..served].iter().map(|k| k.try_clone()).collect::<io::Result<_>>()?,
            relays,
        );
        let own = (0..served).collect();
        let mut handlers = vec![HandlerSpec { queues: own, external: !relays, handler: Box::new(external) }];
        if self.has_control() && activation.features & f::CTRL_VQ != 0 {
            handlers.push(HandlerSpec::new([served], Control::new(Arc::clone(&self.core), queues / 2)));
        }
        Ok(handlers)
    }

    fn reset(&self) {
        self.core.active.store(1, Ordering::Release);
    }

    /// Only while there is an observer are buffers relayed.
    fn writes_unobserved(&self) -> bool {
        true
    }

    fn save(&self) -> Result<serde_json::Value, LifecycleError> {
        Ok(serde_json::json!({ "pairs": self.core.active.load(Ordering::Acquire) }))
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), LifecycleError> {
        let pairs = state["pairs"].as_u64().and_then(|p| u16::try_from(p).ok());
        let pairs = pairs.filter(|p| (1..=self.core.queues.0.max(1)).contains(p));
        let pairs = pairs.ok_or_else(|| LifecycleError::State("its pairs of queues are others".into()))?;
        self.core.active.store(pairs, Ordering::Release);
        Ok(())
    }
}

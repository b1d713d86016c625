//! Leases and locks for a program that wants nothing else of a cluster.
//!
//! A [`LeaseKeeper`] holds one host's delta lease on a shared file or block device, renews it on a thread of
//! its own, and takes locks (one a virtual disk, say) that no other host has. It is a blocking adapter around
//! [`LeaseHolder`](crate::lease::LeaseHolder) and [`Locker`](crate::lock::Locker), and needs no agent, no
//! network and no store.
//!
//! The contract: write to what a [`Lock`] stands for only while [`Lock::is_held`] says so, and stop *at
//! once* when [`KeeperEvent::Lost`] arrives; [`LeaseKeeper::expires_in`] says how much time is left. Then
//! drop the lock. With [`KeeperConfig::watchdog`], the host resets if its locks are not dropped in time.
//!
//! ```
//! use std::time::Duration;
//!
//! use cluster::adapters::{LeaseDisk, LeaseVolume};
//! use cluster::keeper::{KeeperConfig, LeaseKeeper, Resource};
//! use cluster::lease::Timing;
//! use cluster::lock::LockMode;
//! use cluster::ondisk::{Geometry, Name};
//! use cluster::types::HostId;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("leases");
//! // Once, by whoever makes the volume: a lockspace and the lease of one disk.
//! let (space, disk) = (Name::new("vms")?, Name::new("web-root")?);
//! std::fs::File::create(&path)?.set_len(2 << 20)?;
//! let volume = LeaseVolume::new(LeaseDisk::open(&path, Geometry::S512)?, space, 0);
//! volume.format_space(10)?;
//! volume.format_resource(0, disk)?;
//!
//! // On each host, with a number of its own.
//! let config = KeeperConfig {
//!     // A free lease is taken in two I/O timeouts.
//!     timing: Timing { io_timeout: 1, watchdog: 10 },
//!     ..KeeperConfig::new(&path, space, HostId(1), Name::new("host-a")?)
//! };
//! let keeper = LeaseKeeper::open(config)?;
//! keeper.wait_held(Duration::from_secs(60))?;
//! let lock = keeper.lock(Resource { index: 0, name: disk }, LockMode::Exclusive, Duration::from_secs(30))?;
//! println!("The disk is ours; its fencing token is {}", lock.token().lver);
//! lock.release()?;
//! # Ok(())
//! # }
//! ```

mod engine;
mod events;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::adapters::{Clock, DiskError, LeaseDisk, LeaseVolume, Watchdog, WatchdogError};
use crate::lease::{LossReason, Timing};
use crate::lock::{DenyReason, LockMode};
use crate::ondisk::{Geometry, Name};
use crate::types::{Generation, HostId, Time, Token};
use engine::{Engine, Input, LockId};
use events::Events;

/// A lease volume and this host's place on it.
#[derive(Clone, Debug)]
pub struct KeeperConfig {
    /// The shared file or block device.
    pub path: PathBuf,
    /// Its sector size and area size.
    pub geometry: Geometry,
    /// The lockspace's name.
    pub space: Name,
    /// Where the lockspace begins on the volume, in bytes.
    pub offset: u64,
    /// This host's number, which no other host may have.
    pub host: HostId,
    /// This host's name: a sector that carries it is taken back at once after a restart.
    pub name: Name,
    /// The timers; the same on every host.
    pub timing: Timing,
    /// The highest host number in use; more hosts mean longer reads.
    pub hosts: u16,
    /// Every host of the lockspace has a working watchdog, so a host that is silent for the dead-time is
    /// gone. Without this its locks can be taken only after [`LeaseKeeper::declare_gone`].
    pub watchdogs: bool,
    /// Feed this watchdog device while the lease is fresh or no lock is held.
    pub watchdog: Option<PathBuf>,
}

impl KeeperConfig {
    /// A lockspace at the beginning of a volume with 512-byte sectors, 64 hosts, the default timers (10 s
    /// I/O timeout, 60 s watchdog timeout), and no watchdogs.
    pub fn new(path: &Path, space: Name, host: HostId, name: Name) -> Self {
        KeeperConfig {
            path: path.to_owned(),
            geometry: Geometry::S512,
            space,
            offset: 0,
            host,
            name,
            timing: Timing::default(),
            hosts: 64,
            watchdogs: false,
            watchdog: None,
        }
    }
}

/// The lease area of a lockable resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Which area behind the lockspace, from 0.
    pub index: u32,
    /// The name that the area was formatted with.
    pub name: Name,
}

/// Why a keeper could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The volume cannot be used.
    #[error("Lease volume cannot be used; check its path and that it was formatted")]
    Disk(#[source] DiskError),
    /// The watchdog cannot be used.
    #[error("Watchdog of the lease keeper cannot be used")]
    Watchdog(#[source] WatchdogError),
    /// The operating system refused a thread or a descriptor.
    #[error("Lease keeper cannot be started")]
    Start(#[source] std::io::Error),
    /// The host number is zero or above the number of hosts.
    #[error("{0} is not between 1 and the number of hosts; correct the configuration")]
    BadHost(HostId),
    /// It did not happen in time.
    #[error("Lease or lock was not to be had in time; try again")]
    TimedOut,
    /// The lease is lost, and with it every lock.
    #[error("Lease was lost")]
    Lost(#[source] LossReason),
    /// The lock was not given.
    #[error("Lock was not given")]
    Denied(#[source] DenyReason),
    /// The outcome of a hand-over is not known: the lock may be the other host's. It must not be used.
    #[error("Hand-over ended without a clear outcome; stop using what the lock protects")]
    HandOver,
    /// The keeper's thread has ended.
    #[error("Lease keeper has ended because of an earlier error")]
    Ended,
}

/// What happened to the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeeperEvent {
    /// The lease is held; its generation.
    Acquired(Generation),
    /// The lease was renewed; several renewals in a row are one event.
    Renewed,
    /// No renewal succeeded for six I/O timeouts.
    Warning,
    /// The lease is gone, and every lock with it: stop what they protect, drop them, and (unless the number
    /// is in use) the keeper takes the lease again.
    Lost(LossReason),
}

/// The lease as other threads see it.
#[derive(Debug, Default)]
struct Status {
    generation: Option<Generation>,
    /// Until when locks may be used.
    trusted_until: Time,
    lost: Option<LossReason>,
}

#[derive(Debug)]
struct Shared {
    clock: Clock,
    status: Mutex<Status>,
    events: Events,
    commands: Sender<Input>,
}

impl Shared {
    fn status(&self) -> std::sync::MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn is_fresh(&self) -> bool {
        let status = self.status();
        status.generation.is_some() && self.clock.now() < status.trusted_until
    }

    fn call<T>(&self, command: impl FnOnce(Sender<T>) -> Input) -> Result<T, KeeperError> {
        let (reply, answer) = channel();
        self.commands.send(command(reply)).map_err(|_| KeeperError::Ended)?;
        answer.recv().map_err(|_| KeeperError::Ended)
    }
}

/// Ends the thread when the keeper and all its locks are gone.
#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // If the thread has ended already there is nothing to end.
        let _ = self.shared.commands.send(Input::Shutdown);
        let thread = self.thread.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(thread) = thread.take() {
            let _ = thread.join();
        }
    }
}

/// Holds a host's lease on a shared volume and takes locks there.
///
/// Clones share one lease. When the last clone and the last [`Lock`] are dropped, locks and lease are given
/// back and the threads end; that takes as long as the volume's requests in flight.
#[derive(Clone, Debug)]
pub struct LeaseKeeper {
    inner: Arc<Inner>,
}

impl LeaseKeeper {
    /// Opens the volume and begins to take the lease: that takes two to five I/O timeouts, or the dead-time
    /// if another host name has the number. See [`LeaseKeeper::wait_held`].
    ///
    /// # Errors
    /// The volume cannot be opened or is not formatted, the host number does not fit, or the watchdog cannot
    /// be used.
    pub fn open(config: KeeperConfig) -> Result<Self, KeeperError> {
        if config.host.0 == 0 || config.host.0 > config.hosts {
            return Err(KeeperError::BadHost(config.host));
        }
        let disk = LeaseDisk::open(&config.path, config.geometry).map_err(KeeperError::Disk)?;
        let volume = LeaseVolume::new(disk, config.space, config.offset);
        volume.read_delta(config.host).map_err(KeeperError::Disk)?;
        let watchdog = config.watchdog.as_deref().map(|p| Watchdog::open(p, config.timing.watchdog));
        let watchdog = watchdog.transpose().map_err(KeeperError::Watchdog)?;
        let (commands, inputs) = channel();
        let shared = Arc::new(Shared {
            clock: Clock,
            status: Mutex::default(),
            events: Events::new().map_err(KeeperError::Start)?,
            commands,
        });
        let engine = Engine::new(config, volume, watchdog, shared.clone()).map_err(KeeperError::Start)?;
        let thread = std::thread::Builder::new().name("lease-keeper".into());
        let thread = thread.spawn(move || engine.run(&inputs)).map_err(KeeperError::Start)?;
        Ok(LeaseKeeper { inner: Arc::new(Inner { shared, thread: Mutex::new(Some(thread)) }) })
    }

    /// Waits until the lease is held and gives its generation.
    ///
    /// # Errors
    /// [`KeeperError::TimedOut`], or [`KeeperError::Lost`] when another host uses the number.
    pub fn wait_held(&self, patience: Duration) -> Result<Generation, KeeperError> {
        let end = self.inner.shared.clock.now() + millis(patience);
        self.inner.shared.call(|reply| Input::WaitHeld { end, reply })?
    }

    /// The generation of the lease while it is held.
    pub fn generation(&self) -> Option<Generation> {
        self.inner.shared.status().generation
    }

    /// How long locks may still be used if no renewal succeeds from now on; zero without a lease.
    pub fn expires_in(&self) -> Duration {
        let status = self.inner.shared.status();
        let left = status.trusted_until.since(self.inner.shared.clock.now());
        if status.generation.is_some() { Duration::from_millis(left) } else { Duration::ZERO }
    }

    /// The next event, if there is one. The keeper's descriptor ([`AsFd`]) is readable while there is.
    ///
    /// If nobody takes the events, only the latest 1024 are kept.
    pub fn next_event(&self) -> Option<KeeperEvent> {
        self.inner.shared.events.take()
    }

    /// Takes a lock, trying again while another host holds it or the volume fails, until `patience` is over;
    /// with zero, once.
    ///
    /// # Errors
    /// [`KeeperError::Denied`] with the last reason: who holds it, the volume does not answer, or this keeper
    /// has the lock already. [`KeeperError::TimedOut`] if not even one try ended.
    pub fn lock(&self, resource: Resource, mode: LockMode, patience: Duration) -> Result<Lock, KeeperError> {
        let shared = &self.inner.shared;
        let end = shared.clock.now() + millis(patience);
        let (id, token) = shared.call(|reply| Input::Lock { resource, mode, end, reply })??;
        Ok(Lock { inner: self.inner.clone(), id, resource, mode, token, over: AtomicBool::new(false) })
    }

    /// Says that every life of `host` up to now is over: its power was seen off. Its locks can be taken.
    ///
    /// Safe only after fencing that looked at the power state; a host that is merely silent may still write.
    ///
    /// # Errors
    /// [`KeeperError::Ended`].
    pub fn declare_gone(&self, host: HostId) -> Result<(), KeeperError> {
        self.inner.shared.commands.send(Input::Gone(host)).map_err(|_| KeeperError::Ended)
    }
}

impl AsFd for LeaseKeeper {
    /// A descriptor to poll for reading: see [`LeaseKeeper::next_event`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.shared.events.as_fd()
    }
}

/// A lock that is held. Dropping it gives it back without waiting; [`Lock::release`] waits.
#[derive(Debug)]
pub struct Lock {
    inner: Arc<Inner>,
    id: LockId,
    resource: Resource,
    mode: LockMode,
    token: Token,
    /// Given back or handed over already.
    over: AtomicBool,
}

impl Lock {
    /// The fencing token: higher than that of every earlier owner.
    pub fn token(&self) -> Token {
        self.token
    }

    /// What is locked.
    pub fn resource(&self) -> Resource {
        self.resource
    }

    /// Shared or exclusive.
    pub fn mode(&self) -> LockMode {
        self.mode
    }

    /// Whether the lock may be used now: the lease that it was taken under has not expired since.
    pub fn is_held(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
            && self.inner.shared.status().generation == Some(self.token.owner.generation)
            && self.inner.shared.is_fresh()
    }

    /// Gives the lock back and waits until other hosts can take it. Close what it protects first.
    ///
    /// # Errors
    /// The volume does not answer, or the lease is lost; others can take the lock once the lease has expired.
    pub fn release(self) -> Result<(), KeeperError> {
        self.over.store(true, Ordering::Relaxed);
        let id = self.id;
        self.inner.shared.call(|reply| Input::Release { id, reply: Some(reply) })?
    }

    /// Makes `to` the owner of an exclusive lock in one step, for a live migration: stop writing first, and
    /// let the other host call [`LeaseKeeper::lock`] afterwards. Gives the new owner's token.
    ///
    /// # Errors
    /// After [`KeeperError::HandOver`] the lock may be the other host's: nothing may be written any more.
    /// After any other error it did not happen, and [`Lock::is_held`] still tells the truth.
    pub fn hand_over(&self, to: HostId) -> Result<Token, KeeperError> {
        let id = self.id;
        let result = self.inner.shared.call(|reply| Input::HandOver { id, to, reply }).and_then(|r| r);
        if matches!(result, Ok(_) | Err(KeeperError::HandOver | KeeperError::Ended)) {
            self.over.store(true, Ordering::Relaxed);
        }
        result
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if !self.over.load(Ordering::Relaxed) {
            // If the thread has ended, the lease runs out by itself.
            let _ = self.inner.shared.commands.send(Input::Release { id: self.id, reply: None });
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

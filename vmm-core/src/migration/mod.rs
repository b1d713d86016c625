//! Moving a machine: into a file and back, or to another process while it runs.
//!
//! Both are one stream of [records](record). [`Vm::snapshot`](crate::machine::Vm::snapshot) writes it into a file,
//! [`VmBuilder::restore`](crate::machine::VmBuilder::restore) reads it. [`Vm::migrate`](crate::machine::Vm::migrate) and
//! [`VmBuilder::receive`](crate::machine::VmBuilder::receive) are the two ends of a connection:
//!
//! ```text
//! source                                            target
//!   description ──────────────────────────────────►   builds the machine, disks closed
//!              ◄────────────────────────────── ready
//!   memory, then what was written meanwhile, in rounds ─►
//!   pauses the machine; the rest of memory, state ───►   loads them
//!   closes its disks; end ───────────────────────────►   opens the disks
//!              ◄─────────────────────────── prepared
//!   gives the machine up; run ───────────────────────►   runs it
//!              ◄──────────────────────────── running
//! ```
//! A target runs nothing before `run`, and a source that has sent it runs nothing any more: at most one of them runs the
//! machine whatever happens to the connection. Before `run` every failure lets the source go on. If the connection breaks
//! after it, the source cannot know whether it arrived; where both see the same locks of the disks, those tell: a target
//! that did not get it has let go of them. Otherwise the source stays paused and says so
//! ([`MigrationError::Uncertain`]).
//!
//! The stream itself is neither encrypted nor authenticated: use a Unix socket, a network of its own, or a [`Channel`]
//! that does both, such as TLS in a [`Layered`]. A target trusts its own configuration only: the stream names no file,
//! address or device of the host.

pub(crate) mod memory;
pub mod record;
mod state;

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

pub use record::{Record, StreamError, StreamReader, StreamWriter};
pub use state::{Description, DiskShape, MachineState, VcpuState};

/// A connection between the source and the target of a migration.
pub trait Channel: Read + Write + Send {
    /// Limits how long a read or write waits for the other side.
    ///
    /// # Errors
    /// Fails when the host refuses.
    fn set_timeout(&mut self, limit: Duration) -> io::Result<()>;

    /// Whether the other side is on this host, and sees the same locks of files.
    fn is_local(&self) -> bool {
        false
    }
}

impl Channel for UnixStream {
    fn set_timeout(&mut self, limit: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(limit))?;
        self.set_write_timeout(Some(limit))
    }

    fn is_local(&self) -> bool {
        true
    }
}

impl Channel for TcpStream {
    fn set_timeout(&mut self, limit: Duration) -> io::Result<()> {
        self.set_nodelay(true)?;
        self.set_read_timeout(Some(limit))?;
        self.set_write_timeout(Some(limit))
    }
}

impl<C: Channel + ?Sized> Channel for Box<C> {
    fn set_timeout(&mut self, limit: Duration) -> io::Result<()> {
        (**self).set_timeout(limit)
    }

    fn is_local(&self) -> bool {
        (**self).is_local()
    }
}

/// A channel whose bytes go through another stream on their way, such as one that encrypts them.
#[derive(Debug)]
pub struct Layered<S, C> {
    stream: S,
    below: C,
}

impl<S, C> Layered<S, C> {
    /// Reads and writes through `stream`, which does so through the connection that `below` is another handle of.
    pub fn new(stream: S, below: C) -> Self {
        Self { stream, below }
    }
}

impl<S: Read, C> Read for Layered<S, C> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer)
    }
}

impl<S: Write, C> Write for Layered<S, C> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl<S: Read + Write + Send, C: Channel> Channel for Layered<S, C> {
    fn set_timeout(&mut self, limit: Duration) -> io::Result<()> {
        self.below.set_timeout(limit)
    }

    fn is_local(&self) -> bool {
        self.below.is_local()
    }
}

/// How a machine is moved.
#[derive(Clone, Debug)]
pub struct MigrateOptions {
    /// Bytes a second at most while the guest runs; `None` for no limit. The last step, while it is paused, has none.
    pub bandwidth: Option<u64>,
    /// How long the guest may be paused at most, as far as the speed of the connection tells in advance.
    pub downtime: Duration,
    /// How many times memory is gone through before the migration is given up.
    pub rounds: u32,
    /// Slow the vCPUs down more and more when the guest writes faster than it can be sent.
    pub auto_converge: bool,
    /// How long the other side may be silent.
    pub timeout: Duration,
    /// Leave the machine paused on both sides with its disks closed, when the target has everything. Who owns both lets
    /// one of them go on, with [`Vm::start`](crate::machine::Vm::start), and drops the other: for owners with locks of
    /// their own to hand over.
    pub park: bool,
    /// The other side sees the same locks of the disks though it is on another host (NFS, for instance). Over a Unix
    /// socket it does anyway.
    pub shared_locks: bool,
}

impl Default for MigrateOptions {
    fn default() -> Self {
        Self {
            bandwidth: None,
            downtime: Duration::from_millis(300),
            rounds: 30,
            auto_converge: true,
            timeout: Duration::from_secs(30),
            park: false,
            shared_locks: false,
        }
    }
}

/// What a migration has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigrationReport {
    /// How many times memory was gone through while the guest ran.
    pub rounds: u32,
    /// Bytes that were sent.
    pub sent: u64,
    /// How long the guest was paused, until the target said that it runs, or has everything of a machine that is parked.
    pub downtime: Duration,
    /// How long all of it took.
    pub total: Duration,
    /// The target said that it has the machine. Otherwise the connection broke in the last instant, and only the lock that
    /// the target holds on a disk says so.
    pub confirmed: bool,
}

/// Why a migration failed. The source goes on unless an error says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// The other side gave up.
    #[error("The other side refuses the machine: {0}")]
    Refused(String),
    /// The other side broke the protocol.
    #[error("The other side does not follow the protocol; use the same version on both")]
    Protocol,
    /// The guest writes faster than the connection carries.
    #[error(
        "The guest writes memory faster than it can be sent ({left} bytes are left after {rounds} rounds); allow a longer \
         downtime or more bandwidth"
    )]
    NotConverging {
        /// Bytes that were left.
        left: u64,
        /// Rounds that were made.
        rounds: u32,
    },
    /// [`Monitor::cancel`] was called.
    #[error("The migration was cancelled")]
    Cancelled,
    /// Another migration or snapshot is under way.
    #[error("The machine is being moved or saved already; wait for that")]
    Busy,
    /// The connection broke when the target may or may not have got the order to run. The source is paused.
    #[error(
        "The connection broke in the last step: make sure that the target is gone, then resume this machine"
    )]
    Uncertain,
    /// The migration failed, and the source cannot open its disks again. The source is paused.
    #[error("The migration failed, and this machine stays paused because its disks cannot be opened again")]
    DisksLost(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Watches a migration and ends it, from other threads.
#[derive(Debug, Default)]
pub struct Monitor {
    cancelled: AtomicBool,
    round: AtomicU32,
    sent: AtomicU64,
    left: AtomicU64,
    throttle: AtomicU32,
}

/// How far a migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The round that is being sent, from 1; 0 before the first.
    pub round: u32,
    /// Bytes sent so far.
    pub sent: u64,
    /// Bytes of memory that were left to send when the round began.
    pub left: u64,
    /// How much of the time the vCPUs are held back, in per cent.
    pub throttle: u32,
}

impl Monitor {
    /// Ends the migration with [`MigrationError::Cancelled`], unless the machine has been given to the target.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        Progress {
            round: self.round.load(Ordering::Relaxed),
            sent: self.sent.load(Ordering::Relaxed),
            left: self.left.load(Ordering::Relaxed),
            throttle: self.throttle.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn check(&self) -> Result<(), MigrationError> {
        if self.cancelled.load(Ordering::Acquire) { Err(MigrationError::Cancelled) } else { Ok(()) }
    }

    pub(crate) fn begin_round(&self, round: u32, left: u64) {
        self.round.store(round, Ordering::Relaxed);
        self.left.store(left, Ordering::Relaxed);
    }

    pub(crate) fn set_sent(&self, bytes: u64) {
        self.sent.store(bytes, Ordering::Relaxed);
    }

    pub(crate) fn set_throttle(&self, percent: u32) {
        self.throttle.store(percent, Ordering::Relaxed);
    }
}

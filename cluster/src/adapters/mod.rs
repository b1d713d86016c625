//! The outside world: lease volumes, network, watchdog, fence agents, journal, actions, the lock
//! manager's connections.
//!
//! Each adapter is thin: it carries out what a state machine asked for and hands the result back.

mod clock;
mod disk;
mod fence_agent;
mod journal;
mod locks;
mod udp;
mod volume_io;
mod watchdog;

pub use clock::Clock;
pub use disk::{DiskError, LeaseDisk, LeaseVolume};
pub use fence_agent::{AgentError, FenceAgent};
pub use journal::{Action, ActionRunner, Event, Journal, JournalError, Rule, Severity};
pub use locks::{LockManager, LockManagerConfig, LockStatus};
pub use udp::{Links, NetError};
pub use volume_io::{VolumeIo, VolumeReply, VolumeRequest};
pub use watchdog::{Watchdog, WatchdogError};

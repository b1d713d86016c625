//! A distributed lock manager in the manner of the VMS cluster: named locks in six modes.
//!
//! Every host runs one [`Dlm`]. A name is *mastered* by the host that asked for it first (of hosts that ask at
//! once, by the lowest number): it keeps the queues of the name and its value block. There is no directory: a
//! host that does not know a name's master claims the name from everyone, and whoever masters it, or has the
//! better claim, says so. When the members change, every host tells everyone its locks, and masters are found
//! anew from that: nothing else survives a host.
//!
//! Locks here only order what hosts do to each other's data; they guard no disk against a host that is slow
//! to die. So a view of the members may leave a host out only once that host was fenced.
//!
//! [`Dlm`] is a sans-IO state machine. The transport has to deliver between two hosts in order and without
//! loss for as long as both are in one view (as
//! [`LockManager`](crate::adapters::LockManager) does over TCP); messages of another view are told apart by its number.

mod host;
mod master;
mod mode;
#[cfg(test)]
mod model;
mod recovery;
#[cfg(test)]
mod tests;

pub use host::{Dlm, LockError};
pub use mode::Mode;

use serde::{Deserialize, Serialize};

use crate::types::{HostId, HostSet};

/// A lock of one host; unique on that host for its whole life.
pub type LockId = u64;

/// The longest name of a lock, in bytes.
pub const NAME_MAX: usize = 255;
/// The size of a value block in bytes.
pub const VALUE_SIZE: usize = 64;

/// The value block of a name: a few bytes that travel with its locks.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Value {
    /// The bytes; shorter ones stand for themselves.
    pub bytes: Vec<u8>,
    /// Rises with every write.
    pub version: u64,
    /// False after a host died that may have written it: then the bytes are the last known ones.
    pub valid: bool,
}

impl Default for Value {
    /// Empty, never written, valid.
    fn default() -> Self {
        Value { bytes: Vec::new(), version: 0, valid: true }
    }
}

/// Who is in the cluster; the coordinator numbers the views, and every member installs all of them in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct View {
    /// Rises with each view.
    pub number: u64,
    /// The members in ascending order.
    pub members: Vec<HostId>,
}

impl View {
    /// A view of these members.
    pub fn new(number: u64, members: &HostSet) -> Self {
        View { number, members: members.iter().collect() }
    }
}

/// A change that a lock's owner wants.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Wish {
    /// Have the lock, or have it in another mode. A value is written if the present mode may write.
    Mode {
        /// The mode.
        mode: Mode,
        /// The new value, if any.
        value: Option<Vec<u8>>,
    },
    /// Give it back.
    Release {
        /// The new value, if any.
        value: Option<Vec<u8>>,
    },
}

/// A lock as its owner tells it when the members change.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Told {
    /// The name.
    pub name: String,
    /// The lock.
    pub id: LockId,
    /// The mode that it has.
    pub granted: Option<Mode>,
    /// What its owner waits for.
    pub wish: Option<Wish>,
    /// The value as its owner knows it.
    pub value: Value,
}

impl Told {
    /// Whether nobody else can have written the value since this lock's owner could, whatever became of its wish.
    fn still_writes(&self) -> bool {
        let relied = match (&self.wish, self.granted) {
            (Some(Wish::Mode { mode, .. }), Some(granted)) => Some(granted.meet(*mode)),
            (Some(Wish::Release { .. }), _) => None,
            (None, granted) | (_, granted @ None) => granted,
        };
        relied.is_some_and(Mode::writes_value)
    }
}

/// What hosts tell each other.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Body {
    /// I want to master the name.
    Claim {
        /// The name.
        name: String,
        /// Tells this claim from earlier ones of the sender.
        attempt: u64,
    },
    /// For all I know, you may.
    Consent {
        /// The name.
        name: String,
        /// The claim.
        attempt: u64,
    },
    /// I master it.
    Mastered {
        /// The name.
        name: String,
        /// The claim.
        attempt: u64,
    },
    /// To the master: change my lock.
    Request {
        /// The name.
        name: String,
        /// The lock.
        id: LockId,
        /// The change.
        wish: Wish,
    },
    /// I do not master it any more.
    NotMaster {
        /// The name.
        name: String,
        /// The lock.
        id: LockId,
    },
    /// From the master: your lock has this mode now.
    Granted {
        /// The lock.
        id: LockId,
        /// The mode.
        mode: Mode,
        /// The value.
        value: Value,
    },
    /// From the master: two conversions wait for each other, and yours came last.
    Deadlock {
        /// The lock.
        id: LockId,
    },
    /// From the master: your lock is gone.
    Released {
        /// The lock.
        id: LockId,
    },
    /// From the master: your lock is in the way of this mode.
    Blocking {
        /// The lock.
        id: LockId,
        /// The mode that somebody wants.
        mode: Mode,
    },
    /// The members have changed: my locks, and the values of the names that I master, in one or more parts.
    Recover {
        /// The number of the part, from 0.
        part: u32,
        /// Another part follows.
        more: bool,
        /// Some of the locks.
        locks: Vec<Told>,
        /// Some of the names that the sender mastered, with their values.
        mastered: Vec<(String, Value)>,
    },
}

impl Body {
    /// Whether it keeps to the limits. What does not comes from no [`Dlm`], and would be told on.
    fn is_bounded(&self) -> bool {
        let name = |name: &String| (1..=NAME_MAX).contains(&name.len());
        let bytes = |bytes: &Option<Vec<u8>>| bytes.as_ref().is_none_or(|b| b.len() <= VALUE_SIZE);
        let wish = |wish: &Wish| match wish {
            Wish::Mode { value, .. } | Wish::Release { value } => bytes(value),
        };
        let value = |value: &Value| value.bytes.len() <= VALUE_SIZE;
        match self {
            Body::Claim { name: n, .. }
            | Body::Consent { name: n, .. }
            | Body::Mastered { name: n, .. }
            | Body::NotMaster { name: n, .. } => name(n),
            Body::Request { name: n, wish: w, .. } => name(n) && wish(w),
            Body::Granted { value: v, .. } => value(v),
            Body::Deadlock { .. } | Body::Released { .. } | Body::Blocking { .. } => true,
            Body::Recover { locks, mastered, .. } => {
                locks.iter().all(|t| name(&t.name) && t.wish.iter().all(wish) && value(&t.value))
                    && mastered.iter().all(|(n, v)| name(n) && value(v))
            }
        }
    }
}

/// A message between hosts.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Message {
    /// The sender's view.
    pub view: u64,
    /// What it says.
    pub body: Body,
}

/// What happens to a [`Dlm`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DlmInput {
    /// The members have changed; hosts that are left out are fenced.
    View(View),
    /// A message arrived.
    Message(HostId, Message),
}

/// What a [`Dlm`] asks for or announces.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DlmOutput {
    /// Send a message.
    Send(HostId, Message),
    /// Something became of a lock.
    Event(LockEvent),
}

/// What became of a lock.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LockEvent {
    /// The lock has this mode, and the value was this.
    Granted {
        /// The lock.
        id: LockId,
        /// The mode.
        mode: Mode,
        /// The value block.
        value: Value,
    },
    /// The conversion would have waited for ever; the lock keeps its mode.
    Deadlock(LockId),
    /// The lock is gone.
    Released(LockId),
    /// The lock is in the way of somebody who wants this mode; give it up or convert it down when convenient.
    Blocking {
        /// The lock.
        id: LockId,
        /// The mode that is wanted.
        mode: Mode,
    },
}

//! Names and numbers that every part of the crate shares.

use core::fmt;
use core::ops::{Add, Sub};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A span of time in milliseconds.
pub type Millis = u64;

/// A moment on one host's own monotonic clock, in milliseconds since an arbitrary start.
///
/// Moments of different hosts are not comparable: protocols exchange spans, never moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Time(pub u64);

impl Time {
    /// The span from `earlier` to `self`; zero when `earlier` lies later.
    pub fn since(self, earlier: Time) -> Millis {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Millis> for Time {
    type Output = Time;
    fn add(self, span: Millis) -> Time {
        Time(self.0.saturating_add(span))
    }
}

impl Sub<Millis> for Time {
    type Output = Time;
    fn sub(self, span: Millis) -> Time {
        Time(self.0.saturating_sub(span))
    }
}

/// A host's number in the cluster, 1 to 2000; it is also the host's number in every lockspace.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(transparent)]
pub struct HostId(pub u16);

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host {}", self.0)
    }
}

/// The highest host number that the on-disk layout has room for.
pub const MAX_HOSTS: u16 = 2000;

/// How many times a host has taken its delta lease; it rises with every (re)start of the host.
pub type Generation = u64;

/// One life of one host: what a fencing decision or a lock is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Incarnation {
    /// The host.
    pub host: HostId,
    /// Which of its lives.
    pub generation: Generation,
}

/// A virtual machine's number in the cluster.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(transparent)]
pub struct VmId(pub u32);

/// A lockspace: one shared volume that carries leases, by its place in the configuration.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(transparent)]
pub struct LockspaceId(pub u8);

/// A lockable resource (one virtual disk, for example) in a lockspace.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
pub struct ResourceId {
    /// The volume that carries the lease.
    pub lockspace: LockspaceId,
    /// The index of the lease area on that volume.
    pub index: u32,
}

/// A fencing token: it rises with every change of a resource's owner.
///
/// Ordered by `lver` first; two tokens of one resource never have the same `lver`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Token {
    /// The lease version that the owner was chosen for.
    pub lver: u64,
    /// The owner.
    pub owner: Incarnation,
}

/// Processor and memory, of a host's capacity or of a VM's demand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct Resources {
    /// Processor in MHz.
    pub cpu: u64,
    /// Memory in MiB.
    pub memory: u64,
}

impl Resources {
    /// Whether `demand` fits into `self`.
    pub fn fits(self, demand: Resources) -> bool {
        demand.cpu <= self.cpu && demand.memory <= self.memory
    }

    /// `self` without `used`; zero where `used` is more.
    pub fn minus(self, used: Resources) -> Resources {
        Resources { cpu: self.cpu.saturating_sub(used.cpu), memory: self.memory.saturating_sub(used.memory) }
    }

    /// The sum of both.
    pub fn plus(self, other: Resources) -> Resources {
        Resources {
            cpu: self.cpu.saturating_add(other.cpu),
            memory: self.memory.saturating_add(other.memory),
        }
    }
}

/// A small set of hosts, numbered from 1; a bit a host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostSet {
    words: Vec<u64>,
}

impl HostSet {
    /// Adds `host`; numbers above [`MAX_HOSTS`] are ignored, so that a peer cannot make the set grow.
    pub fn insert(&mut self, host: HostId) {
        if host.0 > MAX_HOSTS {
            return;
        }
        let word = usize::from(host.0 / 64);
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (host.0 % 64);
    }

    /// Whether `host` is in the set.
    pub fn contains(&self, host: HostId) -> bool {
        self.words.get(usize::from(host.0 / 64)).is_some_and(|w| w >> (host.0 % 64) & 1 == 1)
    }

    /// How many hosts are in the set.
    pub fn len(&self) -> usize {
        self.words.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// Whether the set has no host.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    /// The hosts in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = HostId> + '_ {
        self.words.iter().enumerate().flat_map(|(i, w)| {
            (0..64u16).filter(move |b| w >> b & 1 == 1).map(move |b| HostId(i as u16 * 64 + b))
        })
    }
}

impl FromIterator<HostId> for HostSet {
    fn from_iter<I: IntoIterator<Item = HostId>>(hosts: I) -> Self {
        let mut set = HostSet::default();
        for h in hosts {
            set.insert(h);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_sets_keep_members_and_refuse_absurd_numbers() {
        let set: HostSet = [HostId(1), HostId(64), HostId(130), HostId(u16::MAX)].into_iter().collect();
        assert_eq!(set.len(), 3);
        assert_eq!(set.iter().collect::<Vec<_>>(), [HostId(1), HostId(64), HostId(130)]);
        assert!(set.contains(HostId(64)) && !set.contains(HostId(2)) && !set.contains(HostId(u16::MAX)));
    }

    #[test]
    fn time_saturates() {
        assert_eq!(Time(5).since(Time(9)), 0);
        assert_eq!(Time(5) - 9, Time(0));
        assert_eq!(Time(u64::MAX) + 1, Time(u64::MAX));
    }
}

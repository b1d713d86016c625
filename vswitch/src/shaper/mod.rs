//! Shapers: bounded queues in front of a port that let frames out at configured rates.
//!
//! A frame that may leave at once is not queued, and its tail in guest memory not copied. One that waits is copied: its
//! sender gets its buffers back.

mod bucket;
mod config;
#[cfg(test)]
mod tests;
mod tree;

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, MutexGuard};

pub use self::config::{ShaperClass, ShaperConfig};
pub use self::tree::ClassStats;
use self::tree::Tree;
use crate::clock::Nanos;
use crate::packet::key::{self, ETH_IPV4, ETH_IPV6, Field};
use crate::packet::vlan::PRESENT;
use crate::packet::{BURST, Packet};

/// What became of a frame that was to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offered {
    /// It may leave now.
    Pass,
    /// It waits.
    Waits,
    /// Its queue is full.
    Full,
}

/// A shaper in operation.
#[derive(Debug)]
pub(crate) struct Shaper {
    config: ShaperConfig,
    tree: Mutex<Tree<Packet>>,
    /// Whether frames wait, for those who do not hold the lock.
    waiting: AtomicBool,
}

impl Shaper {
    /// Empty queues.
    pub fn new(config: ShaperConfig) -> Self {
        Self { tree: Mutex::new(Tree::new(&config)), config, waiting: AtomicBool::new(false) }
    }

    /// What it was made of.
    pub fn config(&self) -> &ShaperConfig {
        &self.config
    }

    /// Whether frames wait.
    pub fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Acquire)
    }

    /// The right to send. It is held until what was let out has been sent, so that no frame overtakes another of its
    /// class.
    pub fn lock(&self) -> Gate<'_> {
        Gate { tree: self.tree.lock(), waiting: &self.waiting }
    }

    /// Counters of the classes.
    pub fn stats(&self) -> Vec<ClassStats> {
        self.tree.lock().stats()
    }
}

/// See [`Shaper::lock`].
pub(crate) struct Gate<'a> {
    tree: MutexGuard<'a, Tree<Packet>>,
    waiting: &'a AtomicBool,
}

impl Gate<'_> {
    /// Asks to send a frame now; one that may not is queued.
    pub fn offer(&mut self, p: &Packet, now: Nanos) -> Offered {
        let leaf = self.leaf(p);
        if self.tree.pass(leaf, p.len(), now) {
            Offered::Pass
        } else if self.tree.enqueue(leaf, p.detached(), p.len()) {
            Offered::Waits
        } else {
            Offered::Full
        }
    }

    fn leaf(&self, p: &Packet) -> usize {
        let k = key::extract(p.head(), 0);
        let ip = matches!(k.get64(Field::EthType) as u16, ETH_IPV4 | ETH_IPV6);
        let tci = k.get64(Field::Vlan) as u16;
        let dscp = ip.then_some((k.get64(Field::IpTos) >> 2) as u8);
        self.tree.leaf(dscp, (tci & PRESENT != 0).then_some((tci >> 13) as u8))
    }

    /// Takes up to a burst of the frames that may leave now.
    pub fn release(&mut self, now: Nanos, out: &mut Vec<Packet>) {
        out.clear();
        out.extend(std::iter::from_fn(|| self.tree.dequeue(now)).take(BURST));
    }

    /// When the next frame may leave; `None`: none waits.
    pub fn next(&self) -> Option<Nanos> {
        self.tree.next()
    }

    /// Takes all frames out.
    pub fn drain(&mut self) -> Vec<Packet> {
        self.tree.drain()
    }

    /// Queues frames of another shaper; returns how many did not fit.
    pub fn adopt(&mut self, frames: Vec<Packet>) -> u64 {
        let mut lost = 0;
        for p in frames {
            let (leaf, len) = (self.leaf(&p), p.len());
            lost += u64::from(!self.tree.enqueue(leaf, p, len));
        }
        lost
    }
}

impl Drop for Gate<'_> {
    fn drop(&mut self) {
        self.waiting.store(!self.tree.is_empty(), Ordering::Release);
    }
}

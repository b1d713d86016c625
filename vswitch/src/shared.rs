//! What the control side and the workers of one switch share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;

use crate::clock::Clock;
use crate::mac_table::MacTable;
use crate::port::{PORT_MAX, Port, PortId};
use crate::port_config::PortConfig;
use crate::stats::StatsCell;

/// A port of a switch. Replaced as a whole when its configuration changes; the port itself and its counters stay.
#[derive(Clone)]
pub(crate) struct PortEntry {
    pub id: PortId,
    pub name: String,
    pub port: Arc<dyn Port>,
    pub config: Arc<PortConfig>,
    pub stats: Arc<StatsCell>,
}

/// All ports by number.
#[derive(Clone, Default)]
pub(crate) struct PortTable {
    slots: Vec<Option<Arc<PortEntry>>>,
}

impl PortTable {
    #[inline]
    pub fn get(&self, id: PortId) -> Option<&Arc<PortEntry>> {
        self.slots.get(id as usize)?.as_ref()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<PortEntry>> {
        self.slots.iter().flatten()
    }

    pub fn by_name(&self, name: &str) -> Option<&Arc<PortEntry>> {
        self.iter().find(|p| p.name == name)
    }

    pub fn set(&mut self, id: PortId, entry: Option<Arc<PortEntry>>) {
        let at = id as usize;
        if self.slots.len() <= at {
            self.slots.resize(at + 1, None);
        }
        self.slots[at] = entry;
    }

    pub fn free_id(&self) -> Option<PortId> {
        (1..=PORT_MAX).find(|id| self.get(*id).is_none())
    }

    /// One more than the largest number in use.
    pub fn end(&self) -> usize {
        self.slots.len()
    }
}

/// The state of a switch.
pub(crate) struct Shared {
    pub clock: Clock,
    pub workers: usize,
    /// Grows with every change that can alter a decision; workers then forget their caches.
    pub generation: AtomicU64,
    pub ports: ArcSwap<PortTable>,
    pub macs: MacTable,
}

impl Shared {
    pub fn new(clock: Clock, workers: usize) -> Self {
        Self {
            clock,
            workers,
            generation: AtomicU64::new(1),
            ports: ArcSwap::default(),
            macs: MacTable::default(),
        }
    }

    /// Makes every cached decision stale. Call it after the change.
    pub fn invalidate(&self) {
        self.generation.fetch_add(1, Ordering::Release);
    }
}

//! What the control side and the workers of one switch share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use parking_lot::{Mutex, RwLock};

use crate::bond::Bond;
use crate::clock::Clock;
use crate::conntrack::Conntrack;
use crate::datapath::verdict::DropReason;
use crate::event::{Event, Events};
use crate::mac_table::MacTable;
use crate::packet::vlan::{TPID_C, VlanOp};
use crate::pipeline::{ChangeLog, FlowChange, FlowEntry, FlowFilter, FlowSpec, Meter, MeterConfig, Tables};
use crate::port::{PORT_MAX, Port, PortId};
use crate::port_config::PortConfig;
use crate::security::SecurityGroups;
use crate::shaper::Shaper;
use crate::stats::StatsCell;
use crate::telemetry::Telemetry;

/// Rate limits of a port, in operation.
#[derive(Debug, Default)]
pub(crate) struct PortLimits {
    pub ingress: Option<Arc<Meter>>,
    pub egress: Option<Arc<Meter>>,
    pub broadcast: Option<Arc<Meter>>,
    pub multicast: Option<Arc<Meter>>,
    pub unknown_unicast: Option<Arc<Meter>>,
    pub arp: Option<Arc<Meter>>,
    pub shaper: Option<Arc<Shaper>>,
}

impl PortLimits {
    /// The limits of a configuration; those that did not change are taken over from `old`.
    pub fn new(config: &PortConfig, old: Option<&PortLimits>) -> Self {
        let keep = |new: Option<MeterConfig>, old: Option<&Option<Arc<Meter>>>| {
            let new = new?;
            let old = old.and_then(Option::as_ref).filter(|m| *m.config() == new).cloned();
            Some(old.unwrap_or_else(|| Arc::new(Meter::new(new))))
        };
        let pps = |pps: Option<u64>| pps.map(|p| MeterConfig { pps: Some(p), ..MeterConfig::default() });
        let s = &config.storm;
        let shaper = config.shaping.as_ref().map(|new| {
            let old = old.and_then(|o| o.shaper.as_ref()).filter(|s| s.config() == new).cloned();
            old.unwrap_or_else(|| Arc::new(Shaper::new(new.clone())))
        });
        Self {
            shaper,
            ingress: keep(config.ingress, old.map(|o| &o.ingress)),
            egress: keep(config.egress, old.map(|o| &o.egress)),
            broadcast: keep(pps(s.broadcast), old.map(|o| &o.broadcast)),
            multicast: keep(pps(s.multicast), old.map(|o| &o.multicast)),
            unknown_unicast: keep(pps(s.unknown_unicast), old.map(|o| &o.unknown_unicast)),
            arp: keep(pps(s.arp), old.map(|o| &o.arp)),
        }
    }
}

/// Copies frames of some ports to another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mirror {
    /// Ports whose incoming frames are copied.
    pub from: Vec<PortId>,
    /// Ports whose outgoing frames are copied.
    pub towards: Vec<PortId>,
    /// Where the copies go. The port takes no other frames.
    pub to: PortId,
    /// VLAN whose tag is pushed on the copies (RSPAN).
    pub vlan: Option<u16>,
}

impl Mirror {
    pub(crate) fn vlan_op(&self) -> VlanOp {
        self.vlan.map_or(VlanOp::None, |v| VlanOp::Push { tpid: TPID_C, tci: v & 0xfff })
    }
}

/// Packets dropped by reason.
#[derive(Debug, Default)]
pub(crate) struct DropCounters([AtomicU64; 16]);

impl DropCounters {
    pub fn add(&self, r: DropReason, n: u64) {
        self.0[r as usize % self.0.len()].fetch_add(n, Ordering::Relaxed);
    }

    pub fn get(&self, r: DropReason) -> u64 {
        self.0[r as usize % self.0.len()].load(Ordering::Relaxed)
    }
}

/// A port of a switch. Replaced as a whole when its configuration changes; the port itself and its counters stay.
#[derive(Clone)]
pub(crate) struct PortEntry {
    pub id: PortId,
    pub name: String,
    pub port: Arc<dyn Port>,
    pub config: Arc<PortConfig>,
    pub limits: Arc<PortLimits>,
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
    /// Grows with every change, other than of rules, that can alter a decision; workers then forget their caches.
    pub generation: AtomicU64,
    /// Changes of rules; workers then forget what these reach.
    pub flow_changes: ChangeLog,
    /// Decisions of the slow path.
    pub decisions: AtomicU64,
    pub ports: ArcSwap<PortTable>,
    pub macs: MacTable,
    pub conntrack: Conntrack,
    pub tables: RwLock<Tables>,
    pub security: ArcSwap<SecurityGroups>,
    pub mirrors: ArcSwap<Vec<Mirror>>,
    pub events: Events,
    pub drops: DropCounters,
    pub bonds: ArcSwap<Vec<Arc<Bond>>>,
    /// Ports whose link was up when last looked at.
    pub links: Mutex<Vec<PortId>>,
    /// Grows when workers are to add up the counters of their flows.
    pub stats_epoch: AtomicU64,
    pub telemetry: Telemetry,
}

impl Shared {
    pub fn new(clock: Clock, workers: usize) -> Self {
        Self {
            telemetry: Telemetry::new(clock.now()),
            clock,
            workers,
            generation: AtomicU64::new(1),
            flow_changes: ChangeLog::default(),
            decisions: AtomicU64::new(0),
            ports: ArcSwap::default(),
            macs: MacTable::default(),
            conntrack: Conntrack::default(),
            tables: RwLock::default(),
            security: ArcSwap::default(),
            mirrors: ArcSwap::default(),
            events: Events::default(),
            drops: DropCounters::default(),
            bonds: ArcSwap::default(),
            links: Mutex::default(),
            stats_epoch: AtomicU64::new(0),
        }
    }

    /// Makes every cached decision stale. Call it after the change, unless that was one of rules only: those are told
    /// to `flow_changes`.
    pub fn invalidate(&self) {
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Adds rules that a packet taught. One that is there already stays as it is.
    pub fn learn(&self, specs: Vec<FlowSpec>) {
        let mut changed = Vec::new();
        let mut tables = self.tables.write();
        for spec in specs {
            if tables.select(&FlowFilter::exactly(&spec)).iter().any(|e| e.spec == spec) {
                continue;
            }
            let change = FlowChange::from(&spec);
            match tables.add(spec, self.clock.now()) {
                Ok(()) => changed.push(change),
                Err(e) => tracing::warn!(error = %e, "cannot learn a rule"),
            }
        }
        drop(tables);
        self.flow_changes.add(changed);
    }

    /// Tells of rules that went.
    pub fn report_removed(&self, removed: &[Arc<FlowEntry>], reason: impl Fn(&FlowEntry) -> u8) {
        let now = self.clock.now();
        for e in removed.iter().filter(|e| e.spec.notify_removal) {
            self.events.publish(|| Event::FlowRemoved {
                spec: Box::new(e.spec.clone()),
                reason: reason(e),
                counts: e.stats.get(),
                duration: now.saturating_sub(e.created),
            });
        }
    }

    /// Looks for links that went up or down: decisions may depend on them.
    pub fn watch_links(&self) {
        let ports = self.ports.load();
        let up: Vec<PortId> = ports.iter().filter(|p| p.port.link_up()).map(|p| p.id).collect();
        let old = std::mem::replace(&mut *self.links.lock(), up.clone());
        if old == up {
            return;
        }
        self.invalidate();
        for id in ports.iter().map(|p| p.id).filter(|id| old.contains(id) != up.contains(id)) {
            self.events.publish(|| Event::PortChanged(id));
        }
    }
}

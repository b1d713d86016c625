//! Bonds: several ports as one. Members are chosen by state of their links and, with LACP, by the partner.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::clock::Nanos;
use crate::lacp::{Member, System};
use crate::port::PortId;
use crate::shared::PortTable;

/// How a bond spreads its frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BondMode {
    /// One member at a time.
    #[default]
    ActiveBackup,
    /// Frame by frame in turn. One flow uses all members, and its frames may overtake each other.
    RoundRobin,
    /// By source MAC address and VLAN.
    BalanceSource,
    /// By source and destination MAC address.
    BalanceMac,
    /// By addresses and ports.
    BalanceFlow,
}

/// Configuration of a bond.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BondConfig {
    /// Spreading.
    pub mode: BondMode,
    /// The member ports.
    pub members: Vec<PortId>,
    /// Whether members are used only as agreed with the partner by LACP (802.1AX).
    pub lacp: bool,
    /// Address that the bond calls itself by in LACP.
    pub system: [u8; 6],
}

/// A bond in operation. Its number is that of the port that stands for it.
#[derive(Debug)]
pub(crate) struct Bond {
    pub id: PortId,
    pub config: BondConfig,
    active: AtomicU32,
    /// Frames sent in turn.
    pub turn: Arc<AtomicUsize>,
    lacp: Mutex<BTreeMap<PortId, Member>>,
}

/// A frame that a bond sends out of one of its members.
pub(crate) type Outgoing = (PortId, Vec<u8>);

impl Bond {
    pub fn new(id: PortId, config: BondConfig) -> Self {
        let system = System { mac: config.system, key: id as u16 };
        let lacp = config.members.iter().map(|m| (*m, Member::new(system, *m as u16))).collect();
        Self { id, config, active: AtomicU32::new(0), turn: Arc::default(), lacp: Mutex::new(lacp) }
    }

    /// Whether a member may carry frames.
    pub fn is_enabled(&self, member: PortId, ports: &PortTable) -> bool {
        ports.get(member).is_some_and(|p| p.port.link_up())
            && (!self.config.lacp || self.lacp.lock().get(&member).is_some_and(Member::is_distributing))
    }

    /// The members that may carry frames.
    pub fn enabled(&self, ports: &PortTable) -> Vec<PortId> {
        self.config.members.iter().copied().filter(|m| self.is_enabled(*m, ports)).collect()
    }

    /// The member for a frame with this hash.
    pub fn choose(&self, ports: &PortTable, hash: u64) -> Option<PortId> {
        let enabled = self.enabled(ports);
        match self.config.mode {
            BondMode::ActiveBackup => {
                let active = self.active.load(Ordering::Relaxed);
                enabled.iter().find(|m| **m == active).or(enabled.first()).copied()
            }
            _ => enabled.get((hash % enabled.len().max(1) as u64) as usize).copied(),
        }
    }

    /// Whether a frame that came in by a member is taken. Only the active member of an active-backup bond receives,
    /// since the partner's floods arrive on all of them.
    pub fn accepts(&self, member: PortId, ports: &PortTable) -> bool {
        match self.config.mode {
            BondMode::ActiveBackup => self.choose(ports, 0) == Some(member),
            _ => self.is_enabled(member, ports),
        }
    }

    /// Takes a LACP frame that came in by a member; says whether members changed.
    pub fn lacp_input(&self, member: PortId, frame: &[u8], now: Nanos) -> bool {
        self.config.lacp && self.update(|all| all.get_mut(&member).is_some_and(|m| m.input(frame, now)))
    }

    fn update(&self, f: impl FnOnce(&mut BTreeMap<PortId, Member>) -> bool) -> bool {
        let mut all = self.lacp.lock();
        let before: Vec<bool> = all.values().map(Member::is_distributing).collect();
        f(&mut all);
        select(&mut all);
        before != all.values().map(Member::is_distributing).collect::<Vec<_>>()
    }

    /// Runs the timers: returns LACP frames to be sent, and whether the use of members changed.
    pub fn tick(&self, ports: &PortTable, now: Nanos) -> (Vec<Outgoing>, bool) {
        let mut out = Vec::new();
        let mut changed = false;
        if self.config.lacp {
            changed = self.update(|all| {
                for (id, m) in all.iter_mut() {
                    let up = ports.get(*id).is_some_and(|p| p.port.link_up());
                    out.extend(m.tick(up, now).map(|f| (*id, f)));
                }
                true
            });
        }
        if self.config.mode == BondMode::ActiveBackup {
            let new = self.choose(ports, 0).unwrap_or(0);
            changed |= self.active.swap(new, Ordering::Relaxed) != new;
        }
        (out, changed)
    }
}

/// Aggregates the members whose partner is that of the first one with a partner.
fn select(all: &mut BTreeMap<PortId, Member>) {
    let partner = all.values().find_map(Member::partner);
    for m in all.values_mut() {
        let selected = m.partner().is_some() && m.partner() == partner;
        m.set_selected(selected);
    }
}

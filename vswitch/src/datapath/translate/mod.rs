//! The slow path: decides what happens to a packet and notes every bit of the packet the decision depends on.
//!
//! The order is: guards of the port it came in by, mirrors, ingress limit, flow tables (which usually say "normal"),
//! and for each output the policies of that port.

mod actions;
mod normal;
mod policy;

use std::sync::Arc;

use crate::bond::BondMode;
use crate::clock::Nanos;
use crate::conntrack::Tracked;
use crate::datapath::verdict::{DropReason, Op, Turns, Verdict};
use crate::lacp::{ETH_SLOW, SLOW_PROTOCOLS};
use crate::packet::key::{Field, FlowKey};
use crate::packet::vlan::VlanOp;
use crate::pipeline::{Action, FlowSpec, Tables};
use crate::port::PortId;
use crate::security::SecurityGroups;
use crate::shared::{PortEntry, PortTable, Shared};
use crate::telemetry::records::flow_mask;

/// A decision in the making.
pub(crate) struct Translation<'a> {
    shared: &'a Shared,
    ports: &'a PortTable,
    tables: &'a Tables,
    security: Arc<SecurityGroups>,
    now: Nanos,
    head: &'a [u8],
    key: FlowKey,
    /// The key of the packet as it came in.
    original: FlowKey,
    /// Bits of the original packet that the decision depends on.
    pub mask: FlowKey,
    pub verdict: Verdict,
    /// Rules that the packet teaches; the caller adds them when the tables are free.
    pub learned: Vec<FlowSpec>,
    /// Explanation for `trace`; filled only when present. A traced packet changes no state.
    pub trace: Option<Vec<String>>,
    ops: Vec<Op>,
    action_set: Vec<Action>,
    tracked: Option<(u16, Tracked)>,
    /// Rule under way: table and cookie, for packets given to controllers.
    rule: (u8, u64),
    depth: u32,
    steps: u32,
}

impl<'a> Translation<'a> {
    pub fn new(
        shared: &'a Shared,
        ports: &'a PortTable,
        tables: &'a Tables,
        now: Nanos,
        head: &'a [u8],
        key: FlowKey,
    ) -> Self {
        let mut mask = FlowKey::default();
        mask.mark(Field::InPort);
        Self {
            shared,
            ports,
            tables,
            security: shared.security.load_full(),
            now,
            head,
            key,
            original: key,
            mask,
            verdict: Verdict::default(),
            learned: Vec::new(),
            trace: None,
            ops: Vec::new(),
            action_set: Vec::new(),
            tracked: None,
            rule: (0, 0),
            depth: 0,
            steps: 0,
        }
    }

    /// Decides about a packet that came in by a port.
    pub fn run(&mut self) {
        if let Some(entry) = self.in_entry() {
            self.ingress(&entry);
        }
        self.finish();
        if self.trace.is_none() && self.shared.telemetry.config().meters_all() {
            self.mask.join(&flow_mask(&self.original));
            self.verdict.record =
                self.shared.telemetry.record(&self.original, self.verdict.output(), self.now);
        }
    }

    /// Decides about a packet that a controller sends with a list of actions.
    pub fn run_actions(&mut self, actions: &[Action]) {
        self.actions(actions, 0);
        self.finish();
    }

    fn finish(&mut self) {
        self.verdict.ops = std::mem::take(&mut self.ops);
        if !self.verdict.ops.is_empty() {
            self.verdict.drop = None;
        }
    }

    fn ingress(&mut self, entry: &Arc<PortEntry>) {
        let Some(entry) = &self.logical(entry) else { return };
        if !self.admit(entry) {
            return;
        }
        let c = &entry.config;
        if c.anti_spoof || c.source_guard || c.dhcp_guard {
            self.note(|| "guards passed".into());
        }
        self.mirror_in(entry.id);
        if let Some(m) = &entry.limits.ingress {
            self.note(|| "ingress rate limit".into());
            self.ops.push(Op::Meter(m.clone()));
        }
        self.storm_control(entry);
        let unmarked = self.ops.len();
        self.mark_priorities(entry);
        let before = self.ops.len();
        self.table(0);
        let set = std::mem::take(&mut self.action_set);
        self.actions(&ordered(set), 0);
        if self.ops.len() == before {
            self.ops.truncate(unmarked);
            if self.verdict.drop.is_none() {
                self.drop_for(DropReason::Pipeline);
            }
        }
    }

    /// The port that counts: of a member of a bond, the bond. `None`: the packet goes no further.
    fn logical(&mut self, entry: &Arc<PortEntry>) -> Option<Arc<PortEntry>> {
        let bonds = self.shared.bonds.load();
        let Some(bond) = bonds.iter().find(|b| b.config.members.contains(&entry.id)) else {
            return Some(entry.clone());
        };
        self.mask.mark(Field::EthDst);
        self.mask.mark(Field::EthType);
        let lacp = self.key.get64(Field::EthDst) == SLOW_PROTOCOLS
            && self.key.get64(Field::EthType) == u64::from(ETH_SLOW);
        if lacp {
            self.ops.push(Op::Lacp);
            return None;
        }
        if !bond.accepts(entry.id, self.ports) {
            self.drop_for(DropReason::BondInactive);
            return None;
        }
        self.key.set(Field::InPort, bond.id.into());
        self.ports.get(bond.id).cloned()
    }

    /// The port that frames for `out` leave by: of a bond, one of its members, or all in turn.
    fn physical(&mut self, out: &PortEntry) -> Option<Way> {
        let bonds = self.shared.bonds.load();
        let Some(bond) = bonds.iter().find(|b| b.id == out.id) else { return Some(Way::One(out.id)) };
        let hash = match bond.config.mode {
            BondMode::RoundRobin => {
                let members = bond.enabled(self.ports);
                return (!members.is_empty())
                    .then(|| Way::Turns(Turns { bond: out.id, members, turn: bond.turn.clone() }));
            }
            BondMode::ActiveBackup => 0,
            BondMode::BalanceMac => {
                self.mask.mark(Field::EthSrc);
                self.mask.mark(Field::EthDst);
                mixed(self.key.get64(Field::EthSrc) ^ self.key.get64(Field::EthDst))
            }
            BondMode::BalanceSource => {
                self.mask.mark(Field::EthSrc);
                self.mask.mark(Field::Vlan);
                mixed(self.key.get64(Field::EthSrc) ^ self.key.get64(Field::Vlan) << 48)
            }
            BondMode::BalanceFlow => self.flow_hash(),
        };
        bond.choose(self.ports, hash).map(Way::One)
    }

    /// The port that the packet came in by.
    fn in_entry(&self) -> Option<Arc<PortEntry>> {
        self.ports.get(self.in_port()).cloned()
    }

    fn in_port(&self) -> PortId {
        self.key.get64(Field::InPort) as PortId
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(t) = &mut self.trace {
            t.push(line());
        }
    }

    fn drop_for(&mut self, reason: DropReason) {
        self.note(|| format!("drop: {reason}"));
        self.verdict.drop.get_or_insert(reason);
    }

    /// Sends out of a port if its policies allow; says whether it did.
    fn output(&mut self, out: &PortEntry, vlan: u16, op: VlanOp) -> bool {
        if !self.may_leave(out, vlan) {
            return false;
        }
        let Some(way) = self.physical(out) else {
            self.note(|| format!("bond {} has no member in use", out.id));
            return false;
        };
        self.mirror_out(out.id);
        self.note(|| format!("output to port {} ({}), tag: {op:?}", out.id, out.name));
        let (vlan, limit) = (op, out.limits.egress.clone());
        self.ops.push(match way {
            Way::One(port) => Op::Output { port, vlan, limit },
            Way::Turns(turns) => Op::OutputInTurn { turns, vlan, limit },
        });
        true
    }
}

/// Where frames for a port leave.
enum Way {
    One(PortId),
    Turns(Turns),
}

/// Spreads the differences between addresses over a hash.
fn mixed(addresses: u64) -> u64 {
    addresses.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32
}

/// The order in which OpenFlow executes an action set: the last action of each kind, outputs at the end.
fn ordered(set: Vec<Action>) -> Vec<Action> {
    let rank = |a: &Action| match a {
        Action::PopVlan => 0,
        Action::PushVlan(_) => 1,
        Action::DecTtl => 2,
        Action::SetField { .. } | Action::Move { .. } => 3,
        Action::Group(_) => 5,
        Action::Output(_) | Action::OutputField(_) => 6,
        _ => 4,
    };
    let mut sorted = set;
    sorted.sort_by_key(rank);
    // A group takes the place of an output.
    if sorted.iter().any(|a| matches!(a, Action::Group(_))) {
        sorted.retain(|a| rank(a) != 6);
    }
    sorted
}

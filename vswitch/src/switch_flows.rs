//! Operations on the flow pipeline and other policies of a [`Switch`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::conntrack::ConnRow;
use crate::datapath::verdict::DropReason;
use crate::datapath::worker::Forwarder;
use crate::error::{Error, Result};
use crate::event::Subscription;
use crate::pipeline::{
    Action, FlowChange, FlowEntry, FlowFilter, FlowSpec, Group, Instructions, Meter, MeterConfig,
};
use crate::port::PortId;
use crate::security::{SecurityGroup, SecurityGroups};
use crate::shared::Mirror;
use crate::switch::{Switch, default_rule};

/// OpenFlow's reason for a rule that was deleted.
const DELETED: u8 = 2;

impl Switch {
    /// Adds a rule; one with the same table, match and priority is replaced.
    ///
    /// A new switch has a single rule: table 0, priority 0, everything, [`Action::Normal`].
    pub fn add_flow(&self, spec: FlowSpec) -> Result<()> {
        self.add_flows([spec])
    }

    /// Adds several rules at once. The first that is refused ends it; those before it stay.
    pub fn add_flows(&self, specs: impl IntoIterator<Item = FlowSpec>) -> Result<()> {
        let now = self.shared.clock.now();
        let mut tables = self.shared.tables.write();
        let mut changes = Vec::new();
        let r = specs.into_iter().try_for_each(|s| {
            let change = FlowChange::from(&s);
            tables.add(s, now).map(|()| changes.push(change))
        });
        drop(tables);
        self.shared.flow_changes.add(changes);
        r
    }

    /// Replaces the rules `old` by `new`; what is in both stays, with its counters. The default rule comes back when
    /// one in its place goes. An error changes nothing.
    pub(crate) fn replace_flows(&self, old: &[FlowSpec], new: &[FlowSpec]) -> Result<()> {
        let place = |s: &FlowSpec| (s.table, s.priority, s.matches);
        let kept: HashSet<_> = new.iter().map(place).collect();
        let same: HashMap<_, _> = old.iter().map(|s| (place(s), s)).collect();
        let added: Vec<&FlowSpec> = new.iter().filter(|s| same.get(&place(s)) != Some(s)).collect();
        let gone: Vec<&FlowSpec> = old.iter().filter(|s| !kept.contains(&place(s))).collect();
        if added.is_empty() && gone.is_empty() {
            return Ok(());
        }
        self.barrier();
        let now = self.shared.clock.now();
        let mut tables = self.shared.tables.write();
        tables.check_room(added.len())?;
        for s in &added {
            tables.add((*s).clone(), now)?;
        }
        let default = default_rule();
        let mut removed = Vec::new();
        for s in gone {
            removed.extend(tables.remove(&FlowFilter::exactly(s)));
            if place(s) == place(&default) {
                tables.add(default.clone(), now)?;
            }
        }
        drop(tables);
        let removed_specs = removed.iter().map(|e| &e.spec);
        self.shared.flow_changes.add(added.into_iter().chain(removed_specs).map(FlowChange::from));
        self.shared.report_removed(&removed, |_| DELETED);
        Ok(())
    }

    /// Changes what the selected rules do; returns how many there were.
    pub fn modify_flows(&self, filter: &FlowFilter, instructions: &Instructions) -> usize {
        let changed = self.shared.tables.write().modify(filter, instructions);
        self.shared.flow_changes.add(changed.iter().map(|e| FlowChange::from(&e.spec)));
        changed.len()
    }

    /// Deletes the selected rules and returns them.
    pub fn delete_flows(&self, filter: &FlowFilter) -> Vec<Arc<FlowEntry>> {
        self.barrier();
        let removed = self.shared.tables.write().remove(filter);
        self.shared.flow_changes.add(removed.iter().map(|e| FlowChange::from(&e.spec)));
        self.shared.report_removed(&removed, |_| DELETED);
        removed
    }

    /// The selected rules by table and falling priority, with fresh counters.
    pub fn flows(&self, filter: &FlowFilter) -> Vec<Arc<FlowEntry>> {
        self.barrier();
        self.shared.tables.read().select(filter)
    }

    /// Number of rules in each table that has any.
    pub fn table_sizes(&self) -> Vec<(u8, usize)> {
        self.shared.tables.read().counts()
    }

    /// Adds or replaces a group.
    pub fn set_group(&self, id: u32, group: Group) -> Result<()> {
        self.shared.tables.write().set_group(id, group)?;
        self.shared.invalidate();
        Ok(())
    }

    /// Removes a group; says whether it was there.
    pub fn remove_group(&self, id: u32) -> bool {
        let removed = self.shared.tables.write().groups.remove(&id).is_some();
        self.shared.invalidate();
        removed
    }

    /// Whether there is a group with this number.
    pub fn has_group(&self, id: u32) -> bool {
        self.shared.tables.read().groups.contains_key(&id)
    }

    /// Whether there is a meter with this number.
    pub fn has_meter(&self, id: u32) -> bool {
        self.shared.tables.read().meters.contains_key(&id)
    }

    /// All groups.
    pub fn groups(&self) -> BTreeMap<u32, Group> {
        self.shared.tables.read().groups.clone()
    }

    /// Adds or replaces a meter.
    pub fn set_meter(&self, id: u32, config: MeterConfig) -> Result<()> {
        self.shared.tables.write().set_meter(id, Meter::new(config))?;
        self.shared.invalidate();
        Ok(())
    }

    /// Removes a meter; says whether it was there.
    pub fn remove_meter(&self, id: u32) -> bool {
        let removed = self.shared.tables.write().meters.remove(&id).is_some();
        self.shared.invalidate();
        removed
    }

    /// All meters with their counters.
    pub fn meters(&self) -> BTreeMap<u32, Arc<Meter>> {
        self.shared.tables.read().meters.clone()
    }

    /// Sends a frame through a list of actions, as if it had come in by `in_port` (0: by none).
    pub fn packet_out(&self, in_port: PortId, frame: &[u8], actions: &[Action]) {
        match &self.manual {
            Some(m) => m.lock().packet_out(in_port, frame, actions),
            // The control side counts apart from the workers, as one more.
            None => {
                Forwarder::new(self.shared.clone(), self.shared.workers).packet_out(in_port, frame, actions)
            }
        }
    }

    /// Subscribes to events; at most `capacity` wait.
    pub fn subscribe(&self, capacity: usize) -> Result<Subscription> {
        self.shared.events.subscribe(capacity).map_err(|e| Error::io("make an event descriptor", e))
    }

    /// Replaces all security groups.
    pub fn set_security_groups(&self, groups: BTreeMap<String, SecurityGroup>) {
        self.shared
            .security
            .rcu(|old| SecurityGroups { groups: groups.clone(), ..SecurityGroups::clone(old) });
        self.shared.invalidate();
    }

    /// Replaces all mirrors.
    pub fn set_mirrors(&self, mirrors: Vec<Mirror>) {
        self.shared.mirrors.store(Arc::new(mirrors));
        self.shared.invalidate();
    }

    /// Tracked connections.
    pub fn connections(&self) -> Vec<ConnRow> {
        self.shared.conntrack.rows(self.shared.clock.now(), |_| true)
    }

    /// Number of tracked connections.
    pub fn connection_count(&self) -> usize {
        self.shared.conntrack.count()
    }

    /// Forgets tracked connections (of one zone).
    pub fn flush_connections(&self, zone: Option<u16>) {
        self.shared.conntrack.flush(zone);
    }

    /// How many packets the slow path decided about; all others met a cached decision.
    pub fn slow_path_decisions(&self) -> u64 {
        self.shared.decisions.load(Ordering::Relaxed)
    }

    /// Packets dropped by each reason that occurred.
    pub fn drops(&self) -> Vec<(DropReason, u64)> {
        let all = DropReason::ALL.iter().map(|r| (*r, self.shared.drops.get(*r)));
        all.filter(|(_, n)| *n > 0).collect()
    }
}

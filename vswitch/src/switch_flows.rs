//! Operations on the flow pipeline and other policies of a [`Switch`].

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::conntrack::ConnRow;
use crate::datapath::verdict::DropReason;
use crate::datapath::worker::Forwarder;
use crate::error::{Error, Result};
use crate::event::Subscription;
use crate::pipeline::{Action, FlowEntry, FlowFilter, FlowSpec, Group, Instructions, Meter, MeterConfig};
use crate::port::PortId;
use crate::security::{SecurityGroup, SecurityGroups};
use crate::shared::Mirror;
use crate::switch::Switch;

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
        let r = specs.into_iter().try_for_each(|s| tables.add(s, now));
        drop(tables);
        self.shared.invalidate();
        r
    }

    /// Changes what the selected rules do; returns how many there were.
    pub fn modify_flows(&self, filter: &FlowFilter, instructions: &Instructions) -> usize {
        let n = self.shared.tables.write().modify(filter, instructions);
        self.shared.invalidate();
        n
    }

    /// Deletes the selected rules and returns them.
    pub fn delete_flows(&self, filter: &FlowFilter) -> Vec<Arc<FlowEntry>> {
        const DELETED: u8 = 2;
        self.barrier();
        let removed = self.shared.tables.write().remove(filter);
        self.shared.invalidate();
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
        let members = self.shared.security.load().members.clone();
        self.shared.security.store(Arc::new(SecurityGroups { groups, members }));
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

    /// Packets dropped by each reason that occurred.
    pub fn drops(&self) -> Vec<(DropReason, u64)> {
        let all = DropReason::ALL.iter().map(|r| (*r, self.shared.drops.get(*r)));
        all.filter(|(_, n)| *n > 0).collect()
    }
}

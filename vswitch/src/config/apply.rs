//! Applying configurations to a [`Switch`], and moving ports between switches.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::flow::PortNumbers;
use super::{PortSpec, SwitchConfig};
use crate::conntrack::ConnRow;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::mac_table::MacRow;
use crate::pipeline::FlowSpec;
use crate::port::{Port, PortId};
use crate::port_config::PortConfig;
use crate::security::SecurityGroups;
use crate::shared::{Mirror, PortEntry, PortLimits, PortTable};
use crate::stats::{PortStats, StatsCell};
use crate::switch::Switch;
use crate::switch_bonds::configured;
use crate::telemetry::Exporters;

/// Everything that belongs to one port, to move with the VM behind it to another switch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortState {
    /// Name.
    pub name: String,
    /// Configuration.
    pub config: PortConfig,
    /// Counters.
    pub stats: PortStats,
    /// Addresses learned on the port, or fixed to it.
    pub macs: Vec<MacRow>,
    /// Connections of the addresses bound to the port.
    pub connections: Vec<ConnRow>,
}

/// The configuration in force, and what came of it that can be taken back.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    whole: SwitchConfig,
    /// What of it is this host's.
    here: SwitchConfig,
    flows: Vec<FlowSpec>,
    /// VLAN, address and port.
    static_macs: Vec<(u16, u64, PortId)>,
}

impl Switch {
    /// Makes the switch what `config` says: ports that are not in it go, new ones come, changed properties change in
    /// place. Ports added by [`Switch::add_port`] are left alone. If anything is wrong, nothing changes.
    ///
    /// Of rules and fixed addresses too only those change that differ from the last configuration. Ports of other
    /// hosts (see [`SwitchBuilder::host`](crate::SwitchBuilder::host)) count as members of security groups only.
    ///
    /// A port whose kind changes is closed and opened anew; it may not take over a socket or interface of a port
    /// that goes in the same step.
    pub fn apply(&self, config: &SwitchConfig) -> Result<()> {
        config.check()?;
        let whole = config;
        let host = self.host.as_deref();
        let config = &whole.of_host(host);
        let mut applied = self.applied.lock();
        let _control = self.control.lock();
        let old = applied.as_ref().map(|a| &a.here.ports);
        let same = |name: &String, spec: &PortSpec| {
            old.and_then(|o| o.get(name)).is_some_and(|o| o.kind == spec.kind && o.number == spec.number)
        };
        let mut table = PortTable::clone(&self.shared.ports.load());
        let mut gone = Vec::new();
        for (name, spec) in old.into_iter().flatten() {
            if config.ports.get(name).is_none_or(|new| new.kind != spec.kind || new.number != spec.number)
                && let Some(id) = table.by_name(name).map(|p| p.id)
            {
                table.set(id, None);
                gone.push(id);
            }
        }
        let mut added = Vec::new();
        // Ports that ask for a number come first, so that no other takes it.
        let mut order: Vec<_> = config.ports.iter().collect();
        order.sort_by_key(|(_, s)| s.number.is_none());
        for (name, spec) in order {
            let properties = config.port_config(spec);
            if same(name, spec) {
                if let Some(entry) = table.by_name(name).filter(|e| *e.config != properties) {
                    let mut entry = PortEntry::clone(entry);
                    entry.limits = Arc::new(PortLimits::new(&properties, Some(&entry.limits)));
                    entry.config = Arc::new(properties);
                    table.set(entry.id, Some(Arc::new(entry)));
                }
                continue;
            }
            let path = format!("ports.{name}");
            let in_use = |what: String| Error::config(path.clone(), what);
            if table.by_name(name).is_some() {
                return Err(in_use("a port that is not configured here has this name".into()));
            }
            let id = match spec.number {
                Some(n) if table.get(n).is_some() => {
                    return Err(in_use(format!("port number {n} is in use")));
                }
                Some(n) => n,
                None => table.free_id().ok_or(Error::TooManyPorts)?,
            };
            let port = spec.kind.open(&self.shared.clock, &self.panel)?;
            table.set(id, Some(Arc::new(self.new_entry(id, name, port, properties, PortStats::default()))));
            added.push(id);
        }
        let numbers: PortNumbers = table.iter().map(|p| (p.name.clone(), p.id)).collect();
        let flows = config.flows.iter().enumerate();
        let flows =
            flows.map(|(i, f)| f.resolve(&format!("flows[{i}]"), &numbers)).collect::<Result<Vec<_>>>()?;
        let static_macs =
            config.static_macs.iter().filter_map(|m| Some((m.vlan, m.mac.to_u64(), *numbers.get(&m.port)?)));
        let static_macs: Vec<_> = static_macs.collect();
        let measured = self.shared.telemetry.config();
        let exporters =
            (*measured != config.telemetry).then(|| Exporters::open(&config.telemetry)).transpose()?;
        self.replace_flows(applied.as_ref().map_or(&[], |a| &a.flows), &flows)?;
        // From here on nothing fails.
        // Publishing the ports adds theirs.
        let (members, elsewhere) = (BTreeMap::new(), whole.members_elsewhere(host));
        let security = SecurityGroups { groups: config.security_groups.clone(), members, elsewhere };
        self.shared.security.store(Arc::new(security));
        self.shared.mirrors.store(Arc::new(mirrors(config, &table)));
        let bonds = configured(config, &table, &self.shared.bonds.load());
        self.shared.bonds.store(Arc::new(bonds));
        self.shared.macs.set_ageing(config.mac_ageing);
        self.shared.conntrack.set_capacity(config.connection_limit);
        self.publish(table);
        for id in &gone {
            self.shared.macs.flush(Some(*id), true);
        }
        let old_macs = applied.as_ref().map_or(&[][..], |a| &a.static_macs);
        for (vlan, mac, port) in old_macs.iter().filter(|m| !static_macs.contains(m)) {
            self.shared.macs.remove_static(*vlan, *mac, *port);
        }
        for (vlan, mac, port) in &static_macs {
            self.shared.macs.add_static(*vlan, *mac, *port);
        }
        if let Some(exporters) = exporters {
            self.shared.telemetry.set(&config.telemetry, exporters, &self.shared.clock);
            self.shared.invalidate();
        }
        *applied = Some(Applied { whole: whole.clone(), here: config.clone(), flows, static_macs });
        gone.into_iter().for_each(|id| self.shared.events.publish(|| Event::PortRemoved(id)));
        added.into_iter().for_each(|id| self.shared.events.publish(|| Event::PortAdded(id)));
        Ok(())
    }

    /// The configuration that was applied last.
    pub fn config(&self) -> Option<SwitchConfig> {
        self.applied.lock().as_ref().map(|a| a.whole.clone())
    }

    pub(crate) fn new_entry(
        &self,
        id: PortId,
        name: &str,
        port: Arc<dyn Port>,
        config: PortConfig,
        history: PortStats,
    ) -> PortEntry {
        PortEntry {
            id,
            name: name.to_string(),
            port,
            limits: Arc::new(PortLimits::new(&config, None)),
            config: Arc::new(config),
            // One set of counters for each worker, and one for packets that controllers send.
            stats: Arc::new(StatsCell::new(self.shared.workers + 1, history)),
        }
    }

    /// The whole state of a port. The port itself goes on.
    pub fn export_port(&self, id: PortId) -> Result<PortState> {
        self.barrier();
        let ports = self.shared.ports.load();
        let p = ports.get(id).ok_or_else(|| Error::NoSuchPort(id.to_string()))?;
        let now = self.shared.clock.now();
        let ips: Vec<_> = p.config.bindings.iter().flat_map(|b| b.ips.iter()).collect();
        let bound = |c: &ConnRow| ips.iter().any(|n| c.has_address(n.value()));
        let mut macs = self.shared.macs.rows(now);
        macs.retain(|r| r.port == id);
        Ok(PortState {
            name: p.name.clone(),
            config: PortConfig::clone(&p.config),
            stats: p.stats.sum(),
            macs,
            connections: self.shared.conntrack.rows(now, bound),
        })
    }

    /// Gives a port that is here already, as by the configuration, what it learned and counted elsewhere: addresses,
    /// connections, counters. Its properties stay those that it has here.
    pub fn restore_port(&self, state: &PortState) -> Result<PortId> {
        let _control = self.control.lock();
        let ports = self.shared.ports.load();
        let p = ports.by_name(&state.name).ok_or_else(|| Error::NoSuchPort(state.name.clone()))?;
        self.restore(p.id, state);
        p.stats.add_history(&state.stats);
        Ok(p.id)
    }

    fn restore(&self, id: PortId, state: &PortState) {
        let now = self.shared.clock.now();
        self.shared.macs.import(&state.macs, id, now);
        self.shared.conntrack.import(&state.connections, now);
    }

    /// Adds a port with the state that it had elsewhere.
    pub fn import_port(&self, state: &PortState, port: Arc<dyn Port>) -> Result<PortId> {
        let _control = self.control.lock();
        let mut table = PortTable::clone(&self.shared.ports.load());
        if table.by_name(&state.name).is_some() {
            return Err(Error::PortExists(state.name.clone()));
        }
        let id = table.free_id().ok_or(Error::TooManyPorts)?;
        let entry = self.new_entry(id, &state.name, port, state.config.clone(), state.stats.clone());
        table.set(id, Some(Arc::new(entry)));
        self.restore(id, state);
        self.publish(table);
        self.shared.events.publish(|| Event::PortAdded(id));
        Ok(id)
    }
}

fn mirrors(config: &SwitchConfig, table: &PortTable) -> Vec<Mirror> {
    let id = |name: &String| table.by_name(name).map(|p| p.id);
    let all = config.mirrors.values().filter_map(|m| {
        Some(Mirror {
            from: m.from.iter().filter_map(id).collect(),
            towards: m.towards.iter().filter_map(id).collect(),
            to: id(&m.to)?,
            vlan: m.vlan,
        })
    });
    all.collect()
}

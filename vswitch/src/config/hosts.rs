//! One configuration for the switches of many hosts: what of it concerns one of them.

use std::collections::BTreeMap;

use super::{PortKind, PortSpec, SwitchConfig};
use crate::address::IpPrefix;

impl PortSpec {
    /// Whether the switch of `host` has the port.
    pub(super) fn is_on(&self, host: Option<&str>) -> bool {
        self.host.as_deref().is_none_or(|h| Some(h) == host)
    }
}

impl SwitchConfig {
    /// The configuration of one host's switch: without the ports of others, and without what names those.
    pub(super) fn of_host(&self, host: Option<&str>) -> Self {
        let here = |port: &String| self.ports.get(port).is_some_and(|p| p.is_on(host));
        let mut c = self.clone();
        c.ports.retain(|_, p| p.is_on(host));
        for p in c.ports.values_mut() {
            if let PortKind::Bond { members, .. } = &mut p.kind {
                members.retain(here);
            }
        }
        c.mirrors.retain(|_, m| {
            m.from.retain(here);
            m.towards.retain(here);
            here(&m.to)
        });
        c.static_macs.retain(|m| here(&m.port));
        c.flows.retain(|f| f.ports().all(here));
        c
    }

    /// The bound addresses of other hosts' ports, by security group.
    pub(super) fn members_elsewhere(&self, host: Option<&str>) -> BTreeMap<String, Vec<IpPrefix>> {
        let mut members: BTreeMap<String, Vec<IpPrefix>> = BTreeMap::new();
        for p in self.ports.values().filter(|p| !p.is_on(host)) {
            self.port_config(p).add_to_groups(&mut members);
        }
        members
    }
}

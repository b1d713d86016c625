//! Bonds of a [`Switch`].

use std::sync::Arc;

use crate::bond::{Bond, BondConfig};
use crate::clock::Nanos;
use crate::config::{PortKind, SHAPED_BOND, SwitchConfig};
use crate::datapath::transmit::send_own;
use crate::error::{Error, Result};
use crate::packet::Packet;
use crate::packet::key::mac_bytes;
use crate::packet::vlan::{TPID_C, VlanOp};
use crate::port::{BondPort, PortId};
use crate::port_config::PortConfig;
use crate::shared::{PortTable, Shared};
use crate::switch::Switch;

/// Most announcements after a fail-over, so that it makes no storm.
const ANNOUNCEMENTS_MAX: usize = 256;

impl Switch {
    /// Joins ports to a bond. The bond is a port itself, whose number is returned and whose properties count; the
    /// members no longer take part in switching on their own.
    pub fn add_bond(&self, name: &str, bond: BondConfig, config: PortConfig) -> Result<PortId> {
        {
            let (ports, bonds) = (self.shared.ports.load(), self.shared.bonds.load());
            for m in &bond.members {
                if ports.get(*m).is_none() {
                    return Err(Error::NoSuchPort(m.to_string()));
                }
                if bonds.iter().any(|b| b.id == *m || b.config.members.contains(m)) {
                    return Err(Error::Invalid(format!("Port {m} belongs to a bond already")));
                }
            }
            if config.shaping.is_some() {
                return Err(Error::config("shaping", SHAPED_BOND));
            }
        }
        let id = self.add_port(name, BondPort, config)?;
        self.shared.bonds.rcu(|old| {
            let mut new = Vec::clone(old);
            new.push(Arc::new(Bond::new(id, bond.clone())));
            new
        });
        tick_bonds(&self.shared, self.shared.clock.now());
        self.shared.invalidate();
        Ok(id)
    }

    /// The members of a bond that are in use at the moment.
    pub fn bond_members_in_use(&self, bond: PortId) -> Vec<PortId> {
        let ports = self.shared.ports.load();
        let bonds = self.shared.bonds.load();
        let Some(b) = bonds.iter().find(|b| b.id == bond) else { return Vec::new() };
        b.config.members.iter().copied().filter(|m| b.accepts(*m, &ports)).collect()
    }
}

/// The bonds of a configuration; unchanged ones go on as they are, as do those made without configuration.
pub(crate) fn configured(config: &SwitchConfig, table: &PortTable, old: &[Arc<Bond>]) -> Vec<Arc<Bond>> {
    let id = |name: &String| table.by_name(name).map(|p| p.id);
    let mut all = Vec::new();
    for (name, spec) in &config.ports {
        let (PortKind::Bond { mode, members, lacp, system }, Some(bond)) = (&spec.kind, id(name)) else {
            continue;
        };
        let members = members.iter().filter_map(id).collect();
        let config = BondConfig { mode: *mode, members, lacp: *lacp, system: system.0 };
        let same = old.iter().find(|b| b.id == bond && b.config == config).cloned();
        all.push(same.unwrap_or_else(|| Arc::new(Bond::new(bond, config))));
    }
    let managed = |b: &Arc<Bond>| table.get(b.id).is_none_or(|p| config.ports.contains_key(&p.name));
    all.extend(old.iter().filter(|b| !managed(b)).cloned());
    all
}

/// Runs the timers of all bonds.
pub(crate) fn tick_bonds(shared: &Shared, now: Nanos) {
    let (ports, bonds) = (shared.ports.load(), shared.bonds.load());
    for b in bonds.iter() {
        let (frames, changed) = b.tick(&ports, now);
        for (member, frame) in frames {
            send(&ports, member, &frame);
        }
        if changed {
            shared.invalidate();
            // A LACP partner knows that the members are one.
            if !b.config.lacp {
                announce(shared, &ports, b);
            }
        }
    }
}

fn send(ports: &PortTable, port: PortId, frame: &[u8]) {
    if let Some(p) = ports.get(port) {
        send_own(&*p.port, &Packet::from_frame(frame));
    }
}

/// Tells the partner's switches that addresses are reached through another member now (RARP, as hypervisors do after
/// a migration).
fn announce(shared: &Shared, ports: &PortTable, bond: &Bond) {
    let Some(entry) = ports.get(bond.id) else { return };
    let native = entry.config.vlan.native();
    let rows = shared.macs.rows(shared.clock.now());
    let ours = rows.iter().filter(|r| r.port != bond.id && entry.config.vlan.carries(r.vlan));
    for r in ours.take(ANNOUNCEMENTS_MAX) {
        let Some(member) = bond.choose(ports, r.mac) else { return };
        let mac = mac_bytes(r.mac);
        let mut f =
            [&[0xff; 6][..], &mac, &[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3], &mac, &[0; 4], &mac].concat();
        f.resize(60, 0);
        let mut packet = Packet::from_frame(&f);
        if r.vlan != native {
            VlanOp::Push { tpid: TPID_C, tci: r.vlan }.apply(&mut packet);
        }
        if let Some(p) = ports.get(member) {
            send_own(&*p.port, &packet);
        }
    }
}

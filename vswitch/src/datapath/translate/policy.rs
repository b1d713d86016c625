//! Policies of ports: guards on the way in, security groups and isolation on the way out, mirrors, storm control.

use super::Translation;
use crate::conntrack::{self, Tracked, state};
use crate::datapath::verdict::{DropReason, Op};
use crate::packet::key::{
    BROADCAST_MAC, ETH_ARP, ETH_IPV4, ETH_IPV6, FRAG_LATER, Field, ICMPV6, UDP, is_group_mac, quoted_packet,
};
use crate::packet::vlan::{PRESENT, VlanOp};
use crate::port::PortId;
use crate::port_config::VlanMode;
use crate::security::Direction;
use crate::shared::PortEntry;

/// Zones of the connections that security groups track: this plus the VLAN.
const SECURITY_ZONES: u16 = 0xf000;

impl Translation<'_> {
    fn ethertype(&mut self) -> u16 {
        self.mask.mark(Field::EthType);
        self.key.get64(Field::EthType) as u16
    }

    fn read(&mut self, f: Field) -> u64 {
        self.mask.mark(f);
        self.key.get64(f)
    }

    /// Applies the guards of the port that the packet came in by; `false`: dropped.
    pub(super) fn admit(&mut self, entry: &PortEntry) -> bool {
        let c = &entry.config;
        if c.anti_spoof {
            let src = self.read(Field::EthSrc);
            if !c.bindings.iter().any(|b| b.mac.to_u64() == src) {
                self.drop_for(DropReason::SpoofedMac);
                return false;
            }
        }
        if c.dhcp_guard && self.is_server_message() {
            self.drop_for(DropReason::RogueServer);
            return false;
        }
        if c.source_guard && !self.source_is_bound(entry) {
            self.drop_for(DropReason::SpoofedAddress);
            return false;
        }
        true
    }

    /// Whether the packet is what only a DHCP server, DHCPv6 server or router sends.
    fn is_server_message(&mut self) -> bool {
        let ethertype = self.ethertype();
        if !matches!(ethertype, ETH_IPV4 | ETH_IPV6) {
            return false;
        }
        let proto = self.read(Field::IpProto) as u8;
        match (ethertype, proto) {
            (ETH_IPV4, UDP) => self.read(Field::TpSrc) == 67,
            (ETH_IPV6, UDP) => self.read(Field::TpSrc) == 547,
            // Router advertisement and redirect.
            (ETH_IPV6, ICMPV6) => matches!(self.read(Field::TpSrc), 134 | 137),
            _ => false,
        }
    }

    /// Whether addresses in IP, ARP and neighbour discovery are bound to the port, together with the MAC address.
    fn source_is_bound(&mut self, entry: &PortEntry) -> bool {
        let ethertype = self.ethertype();
        if !matches!(ethertype, ETH_IPV4 | ETH_IPV6 | ETH_ARP) {
            return true;
        }
        let mac = self.read(Field::EthSrc);
        self.mask.mark(Field::IpSrc);
        let ip = self.key.get(Field::IpSrc);
        let ipv6 = ethertype == ETH_IPV6;
        let bound = |mac: u64, ip: u128| {
            let mut bindings = entry.config.bindings.iter().filter(|b| b.mac.to_u64() == mac);
            bindings.any(|b| b.ips.iter().any(|p| p.is_ipv6() == ipv6 && p.contains(ip)))
        };
        // An IPv6 host owns the link-local address made from its MAC address.
        let link_local = ipv6 && ip == link_local_of(mac);
        if ip != 0 && !link_local && !bound(mac, ip) {
            return false;
        }
        if ethertype == ETH_ARP {
            return self.read(Field::ArpSha) == mac;
        }
        if ipv6 && self.read(Field::IpProto) as u8 == ICMPV6 {
            return match self.read(Field::TpSrc) {
                // Solicitation: the source link-layer address, if any, is the sender's.
                135 => matches!(self.read(Field::ArpSha), a if a == 0 || a == mac),
                // Advertisement: the target is one of the sender's addresses.
                136 => {
                    self.mask.mark(Field::NdTarget);
                    let target = self.key.get(Field::NdTarget);
                    let tll = self.read(Field::ArpTha);
                    (tll == 0 || tll == mac) && (target == link_local_of(mac) || bound(mac, target))
                }
                _ => true,
            };
        }
        true
    }

    /// Limits frames to many by kind.
    pub(super) fn storm_control(&mut self, entry: &PortEntry) {
        let l = &entry.limits;
        if l.broadcast.is_none() && l.multicast.is_none() && l.arp.is_none() {
            return;
        }
        let dst = self.read(Field::EthDst);
        let arp = l.arp.is_some() && self.ethertype() == ETH_ARP;
        let meter = if arp {
            &l.arp
        } else if dst == BROADCAST_MAC {
            &l.broadcast
        } else if is_group_mac(dst) {
            &l.multicast
        } else {
            &None
        };
        if let Some(m) = meter {
            self.note(|| "storm control".into());
            self.ops.push(Op::Meter(m.clone()));
        }
    }

    /// Writes the priorities that the port gives to what comes in.
    pub(super) fn mark_priorities(&mut self, entry: &PortEntry) {
        let m = entry.config.marking;
        if let Some(dscp) = m.dscp
            && matches!(self.ethertype(), ETH_IPV4 | ETH_IPV6)
        {
            self.note(|| format!("marked with code point {dscp}"));
            self.set_field(Field::IpTos, u128::from(dscp) << 2, 0xfc);
        }
        // The tag of a frame that is to be tunnelled is its sender's.
        if let Some(pcp) = m.pcp
            && !matches!(entry.config.vlan, VlanMode::Tunnel(_))
            && self.read(Field::Vlan) & u64::from(PRESENT) != 0
        {
            self.note(|| format!("marked with priority {pcp}"));
            self.set_field(Field::Vlan, u128::from(pcp) << 13, 0xe000);
        }
    }

    /// Copies the packet to the mirrors of a port's input.
    pub(super) fn mirror_in(&mut self, port: PortId) {
        let mirrors = self.shared.mirrors.load();
        for m in mirrors.iter().filter(|m| m.from.contains(&port) && m.to != port) {
            self.mirror(m.to, m.vlan_op());
        }
    }

    /// Copies the packet to the mirrors of a port's output.
    pub(super) fn mirror_out(&mut self, port: PortId) {
        let mirrors = self.shared.mirrors.load();
        let from = self.in_port();
        // A packet that was copied on the way in is not copied again.
        for m in
            mirrors.iter().filter(|m| m.towards.contains(&port) && m.to != port && !m.from.contains(&from))
        {
            self.mirror(m.to, m.vlan_op());
        }
    }

    fn mirror(&mut self, to: PortId, vlan: VlanOp) {
        self.note(|| format!("mirror to port {to}"));
        let copied = |o: &Op| matches!(o, Op::Output { port, .. } if *port == to);
        if !self.ops.iter().any(copied) {
            self.ops.push(Op::Output { port: to, vlan, limit: None });
        }
    }

    /// Whether policies let the packet out of a port.
    pub(super) fn may_leave(&mut self, out: &PortEntry, vlan: u16) -> bool {
        let Some(from) = self.in_entry() else { return true };
        if from.config.isolated && out.config.isolated {
            self.note(|| format!("port {} is isolated, as the source is", out.id));
            return false;
        }
        if self.shared.mirrors.load().iter().any(|m| m.to == out.id) {
            self.note(|| format!("port {} takes mirrored frames only", out.id));
            return false;
        }
        let secured = !from.config.security_groups.is_empty() || !out.config.security_groups.is_empty();
        !secured || self.security_allows(&from, out, vlan)
    }

    fn security_allows(&mut self, from: &PortEntry, out: &PortEntry, vlan: u16) -> bool {
        let ethertype = self.ethertype();
        if ethertype == ETH_ARP {
            return true;
        }
        if !matches!(ethertype, ETH_IPV4 | ETH_IPV6) {
            self.drop_for(DropReason::SecurityGroup);
            return false;
        }
        conntrack::mark_fields(&self.key, &mut self.mask);
        // Without its first fragment a packet is useless, and the first one is checked.
        if self.key.get64(Field::Frag) & FRAG_LATER != 0 || self.is_host_configuration(ethertype) {
            return true;
        }
        let zone = SECURITY_ZONES | (vlan & 0xfff);
        let t = self.track(zone);
        if t.state & (state::ESTABLISHED | state::RELATED) != 0 {
            self.note(|| format!("connection known to security groups: {:#x}", t.state));
            return true;
        }
        let security = self.security.clone();
        let allows = |p: &PortEntry, d| {
            let names = &p.config.security_groups;
            names.is_empty() || security.permit(names, d, &self.key)
        };
        let new = t.state & state::NEW != 0;
        if !new || !allows(from, Direction::Egress) || !allows(out, Direction::Ingress) {
            self.drop_for(DropReason::SecurityGroup);
            return false;
        }
        self.commit(&t, None, None);
        true
    }

    /// Address configuration and neighbour discovery, without which no connection can start.
    fn is_host_configuration(&mut self, ethertype: u16) -> bool {
        let proto = self.key.get64(Field::IpProto) as u8;
        let ports = (self.key.get64(Field::TpSrc), self.key.get64(Field::TpDst));
        match (ethertype, proto) {
            (ETH_IPV4, UDP) => matches!(ports, (68, 67) | (67, 68)),
            (ETH_IPV6, UDP) => matches!(ports, (546, 547) | (547, 546)),
            (ETH_IPV6, ICMPV6) => matches!(ports.0, 130..=136 | 143),
            _ => false,
        }
    }

    /// Tracks the packet's connection in a zone, once.
    pub(super) fn track(&mut self, zone: u16) -> Tracked {
        if let Some((z, t)) = &self.tracked
            && *z == zone
        {
            return t.clone();
        }
        conntrack::mark_fields(&self.key, &mut self.mask);
        let ct = &self.shared.conntrack;
        let readonly = self.trace.is_some();
        let t = match quoted_packet(self.head) {
            // Two errors with one key may quote different packets, so the decision holds for this packet only.
            Some(inner) => {
                self.verdict.once = true;
                ct.track_error(&inner, zone, self.now)
            }
            None => {
                let before = ct.depend(&self.key, zone);
                let mut t = ct.track(&self.key, zone, self.now, readonly);
                let mut depends = before;
                if before.is_some_and(|d| !ct.is_current(d)) {
                    // The packet itself moved the state on. Its successors meet the new state.
                    depends = ct.depend(&self.key, zone);
                    let state = t.state;
                    t = ct.track(&self.key, zone, self.now, true);
                    t.state = state;
                    self.verdict.once = true;
                }
                self.verdict.ct_depends.extend(depends);
                // TCP flags that change the state must be seen by the slow path.
                let tcp = self.key.get64(Field::IpProto) as u8 == crate::packet::key::TCP;
                if tcp && self.key.get64(Field::TcpFlags) & conntrack::TCP_CONTROL != 0 {
                    self.verdict.once = true;
                }
                if t.conn.is_some() {
                    self.verdict.conn = t.conn.clone();
                }
                t
            }
        };
        self.tracked = Some((zone, t.clone()));
        t
    }

    /// Remembers the packet's connection.
    pub(super) fn commit(&mut self, t: &Tracked, mark: Option<(u32, u32)>, label: Option<(u128, u128)>) {
        if self.trace.is_some() {
            return;
        }
        let ct = &self.shared.conntrack;
        if let Some(conn) = ct.commit(t, &self.key, mark, label, self.now) {
            self.verdict.conn = Some(conn);
            // If this changed the version that was read before, the next packet decides anew, with the connection
            // in place.
        }
    }
}

/// The link-local address that a host makes from its MAC address (RFC 4291, appendix A).
fn link_local_of(mac: u64) -> u128 {
    let mac = u128::from(mac);
    let id = ((mac >> 24) ^ 0x02_0000) << 40 | 0xfffe << 24 | (mac & 0xff_ffff);
    0xfe80_u128 << 112 | id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_local_addresses() {
        let a: std::net::Ipv6Addr = "fe80::5054:ff:fe12:3456".parse().unwrap();
        assert_eq!(link_local_of(0x5254_0012_3456), u128::from(a));
    }
}

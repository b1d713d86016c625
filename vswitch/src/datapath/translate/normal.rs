//! "Normal": VLANs, learning, flooding.

use std::sync::Arc;

use super::Translation;
use crate::datapath::verdict::{DropReason, Op};
use crate::mac_table::Learned;
use crate::packet::key::{Field, is_group_mac};
use crate::packet::vlan::{PRESENT, TPID_C, TPID_S, VID_MASK, VlanOp};
use crate::port_config::VlanMode;
use crate::shared::PortEntry;

/// Addresses that a bridge never forwards (802.1Q, table 8-1): spanning tree, pause, LACP, LLDP.
const RESERVED: std::ops::RangeInclusive<u64> = 0x0180_c200_0000..=0x0180_c200_000f;

/// How the outer tag of the frame stands to its VLAN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tag {
    /// There is no tag that names the VLAN.
    Absent,
    /// The outer tag names the VLAN.
    Present,
    /// The outer tag has a priority only.
    Priority,
    /// The VLAN is a service VLAN that the frame does not carry yet.
    Service,
}

/// A frame's VLAN and how it shows.
#[derive(Clone, Copy, Debug)]
pub(super) struct VlanState {
    pub vlan: u16,
    pub tag: Tag,
    tci: u16,
}

impl Translation<'_> {
    /// The frame's VLAN as the port it came in by sees it; `None`: not allowed.
    pub(super) fn vlan_state(&mut self, entry: &PortEntry) -> Option<VlanState> {
        self.mask.mark(Field::Vlan);
        let tci = self.key.get64(Field::Vlan) as u16;
        let (vlan, tag) = ingress_vlan(&entry.config.vlan, tci)?;
        let tci = match tag {
            Tag::Present | Tag::Priority => tci,
            // The priority of the tag that the frame gets where it leaves tagged.
            Tag::Absent | Tag::Service => u16::from(entry.config.marking.pcp.unwrap_or(0)) << 13,
        };
        Some(VlanState { vlan, tag, tci })
    }

    /// Switches as a learning bridge does; without learning it floods.
    pub(super) fn normal(&mut self, learning: bool) {
        let Some(entry) = self.in_entry() else { return self.drop_for(DropReason::NoDestination) };
        let Some(state) = self.vlan_state(&entry) else {
            return self.drop_for(DropReason::VlanNotAllowed);
        };
        let vlan = state.vlan;
        self.mask.mark(Field::EthSrc);
        self.mask.mark(Field::EthDst);
        let (src, dst) = (self.key.get64(Field::EthSrc), self.key.get64(Field::EthDst));
        if is_group_mac(src) || src == 0 {
            return self.drop_for(DropReason::BadSource);
        }
        if RESERVED.contains(&dst) {
            return self.drop_for(DropReason::Reserved);
        }
        if !learning {
            return self.flood(&entry, state);
        }
        if !self.learn_source(&entry, vlan, src) {
            return;
        }
        if is_group_mac(dst) {
            return self.flood(&entry, state);
        }
        self.verdict.depends.push(self.shared.macs.depend(vlan, dst));
        let known = self.shared.macs.lookup(vlan, dst).and_then(|p| self.ports.get(p).cloned());
        match known {
            Some(out) if out.id == entry.id => self.drop_for(DropReason::NoDestination),
            Some(out) => {
                self.note(|| format!("VLAN {vlan}: destination known behind port {} ({})", out.id, out.name));
                if !self.switch_to(&out, state) {
                    self.drop_for(DropReason::NoDestination);
                }
            }
            None => {
                if let Some(m) = &entry.limits.unknown_unicast {
                    self.ops.push(Op::Meter(m.clone()));
                }
                self.flood(&entry, state);
            }
        }
    }

    /// Learns the source; `false` when the packet must be dropped.
    fn learn_source(&mut self, entry: &PortEntry, vlan: u16, src: u64) -> bool {
        let macs = &self.shared.macs;
        if self.trace.is_some() {
            return self.trace_source(entry, vlan, src);
        }
        let limits = macs.depend_on_limits();
        let mut depends = macs.depend(vlan, src);
        let mut learned = macs.learn(vlan, src, entry.id, entry.config.mac_limit, self.now);
        if !macs.is_current(depends) {
            // Learning changed the version itself. Ask again, so that a move by another worker cannot hide.
            depends = macs.depend(vlan, src);
            learned = macs.learn(vlan, src, entry.id, entry.config.mac_limit, self.now);
        }
        self.verdict.depends.push(depends);
        match learned {
            Learned::Here(e) => {
                self.verdict.source = Some(e);
                true
            }
            Learned::LimitReached => {
                self.verdict.depends.push(limits);
                self.drop_for(DropReason::MacLimit);
                false
            }
            Learned::Held | Learned::Fixed => {
                // How long an address is held is a matter of time, which cached decisions do not see.
                self.verdict.once = matches!(learned, Learned::Held);
                self.drop_for(DropReason::MacElsewhere);
                false
            }
        }
    }

    /// Says what learning would do, without doing it.
    fn trace_source(&mut self, entry: &PortEntry, vlan: u16, src: u64) -> bool {
        let macs = &self.shared.macs;
        match macs.lookup(vlan, src) {
            Some(p) if p == entry.id => self.note(|| format!("VLAN {vlan}: source known here")),
            Some(p) if macs.is_static(vlan, src, p) => {
                self.drop_for(DropReason::MacElsewhere);
                return false;
            }
            Some(p) => self.note(|| format!("VLAN {vlan}: source would move here from port {p}")),
            None => self.note(|| format!("VLAN {vlan}: source would be learned")),
        }
        true
    }

    fn flood(&mut self, from: &PortEntry, state: VlanState) {
        self.note(|| format!("VLAN {}: flood", state.vlan));
        let before = self.ops.len();
        let bonds = self.shared.bonds.load();
        let member = |id| bonds.iter().any(|b| b.config.members.contains(&id));
        let ports: Vec<Arc<PortEntry>> =
            self.ports.iter().filter(|p| p.id != from.id && !member(p.id)).cloned().collect();
        for out in ports {
            self.switch_to(&out, state);
        }
        if self.ops.len() == before {
            self.drop_for(DropReason::NoDestination);
        }
    }

    /// Sends out of a port that carries the VLAN; says whether it did.
    fn switch_to(&mut self, out: &PortEntry, state: VlanState) -> bool {
        out.config.vlan.carries(state.vlan)
            && self.output(out, state.vlan, egress_vlan(&out.config.vlan, state))
    }
}

/// The VLAN of a frame that comes in with tag word `tci`; `None`: not allowed.
fn ingress_vlan(mode: &VlanMode, tci: u16) -> Option<(u16, Tag)> {
    let vid = tci & VID_MASK;
    let untagged = if tci & PRESENT == 0 { Tag::Absent } else { Tag::Priority };
    match mode {
        VlanMode::Tunnel(service) => Some((*service, Tag::Service)),
        VlanMode::Access(v) => (vid == 0).then_some((*v, untagged)),
        VlanMode::Trunk { native, .. } if vid == 0 => Some((*native, untagged)),
        VlanMode::Trunk { allowed, .. } => allowed.contains(vid).then_some((vid, Tag::Present)),
    }
}

/// What to do with the tag on the way out of a port that carries the VLAN.
fn egress_vlan(mode: &VlanMode, state: VlanState) -> VlanOp {
    let VlanState { vlan, tag, tci } = state;
    let tci = (tci & 0xe000) | vlan;
    let tagged = match mode {
        VlanMode::Access(_) | VlanMode::Tunnel(_) => false,
        VlanMode::Trunk { native, .. } => vlan != *native,
    };
    match (tag, tagged) {
        (Tag::Present, false) => VlanOp::Pop,
        (Tag::Present, true) | (Tag::Absent | Tag::Service, false) => VlanOp::None,
        (Tag::Absent, true) => VlanOp::Push { tpid: TPID_C, tci },
        (Tag::Service, true) => VlanOp::Push { tpid: TPID_S, tci },
        // A priority tag without VLAN stays only where VLAN 0 is native.
        (Tag::Priority, false) if vlan == 0 => VlanOp::None,
        (Tag::Priority, false) => VlanOp::Pop,
        (Tag::Priority, true) => VlanOp::Set { tci },
    }
}

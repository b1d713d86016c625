//! The slow path: decides what happens to a packet and notes every bit of the packet the decision depends on.

use crate::clock::Nanos;
use crate::datapath::verdict::{DropReason, Op, Verdict};
use crate::mac_table::Learned;
use crate::packet::key::{Field, FlowKey, is_group_mac};
use crate::packet::vlan::{PRESENT, TPID_C, TPID_S, VID_MASK, VlanOp};
use crate::port::PortId;
use crate::port_config::VlanMode;
use crate::shared::{PortEntry, PortTable, Shared};

/// How the outer tag of the frame stands to its VLAN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tag {
    /// There is no tag that names the VLAN.
    Absent,
    /// The outer tag names the VLAN.
    Present,
    /// The outer tag has a priority only.
    Priority,
    /// The VLAN is a service VLAN that the frame does not carry yet.
    Service,
}

/// A decision in the making.
pub(crate) struct Translation<'a> {
    shared: &'a Shared,
    ports: &'a PortTable,
    now: Nanos,
    key: FlowKey,
    /// Bits of the original packet that the decision depends on.
    pub mask: FlowKey,
    pub verdict: Verdict,
    /// Explanation for `trace`; filled only when present. A traced packet changes no state.
    pub trace: Option<Vec<String>>,
}

impl<'a> Translation<'a> {
    pub fn new(shared: &'a Shared, ports: &'a PortTable, now: Nanos, key: FlowKey) -> Self {
        let mut mask = FlowKey::default();
        mask.mark(Field::InPort);
        Self { shared, ports, now, key, mask, verdict: Verdict::default(), trace: None }
    }

    /// Decides.
    pub fn run(&mut self) {
        let in_port = self.key.get64(Field::InPort) as PortId;
        let Some(entry) = self.ports.get(in_port).cloned() else { return };
        self.normal(&entry);
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(t) = &mut self.trace {
            t.push(line());
        }
    }

    fn drop_for(&mut self, reason: DropReason) {
        self.note(|| format!("drop: {reason:?}"));
        if self.verdict.ops.is_empty() {
            self.verdict.drop = Some(reason);
        }
    }

    /// Switches as a learning bridge does.
    fn normal(&mut self, entry: &PortEntry) {
        self.mask.mark(Field::Vlan);
        let tci = self.key.get64(Field::Vlan) as u16;
        let Some((vlan, tag)) = ingress_vlan(&entry.config.vlan, tci) else {
            return self.drop_for(DropReason::VlanNotAllowed);
        };
        self.mask.mark(Field::EthSrc);
        self.mask.mark(Field::EthDst);
        let (src, dst) = (self.key.get64(Field::EthSrc), self.key.get64(Field::EthDst));
        if is_group_mac(src) || src == 0 {
            return self.drop_for(DropReason::BadSource);
        }
        if !self.learn(entry, vlan, src) {
            return;
        }
        if is_group_mac(dst) {
            return self.flood(entry, vlan, tag, tci);
        }
        self.verdict.depends.push(self.shared.macs.depend(vlan, dst));
        match self.shared.macs.lookup(vlan, dst).and_then(|p| self.ports.get(p).cloned()) {
            Some(out) if out.id == entry.id => self.drop_for(DropReason::NoDestination),
            Some(out) => {
                self.note(|| format!("VLAN {vlan}: destination known behind port {} ({})", out.id, out.name));
                if !self.output(entry, &out, vlan, tag, tci) {
                    self.drop_for(DropReason::NoDestination);
                }
            }
            None => self.flood(entry, vlan, tag, tci),
        }
    }

    /// Learns the source; `false` when the packet must be dropped.
    fn learn(&mut self, entry: &PortEntry, vlan: u16, src: u64) -> bool {
        if self.trace.is_some() {
            return true;
        }
        let macs = &self.shared.macs;
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
                self.drop_for(DropReason::MacLimit);
                false
            }
            Learned::Elsewhere => {
                self.drop_for(DropReason::MacElsewhere);
                false
            }
        }
    }

    fn flood(&mut self, from: &PortEntry, vlan: u16, tag: Tag, tci: u16) {
        self.note(|| format!("VLAN {vlan}: flood"));
        let ports = self.ports;
        for out in ports.iter().filter(|p| p.id != from.id) {
            self.output(from, out, vlan, tag, tci);
        }
        if self.verdict.ops.is_empty() {
            self.drop_for(DropReason::NoDestination);
        }
    }

    /// Sends towards a port if policies allow; says whether it did.
    fn output(&mut self, from: &PortEntry, out: &PortEntry, vlan: u16, tag: Tag, tci: u16) -> bool {
        if !out.config.vlan.carries(vlan) || (from.config.isolated && out.config.isolated) {
            return false;
        }
        let op = egress_vlan(&out.config.vlan, vlan, tag, tci);
        self.note(|| format!("output to port {} ({}), tag: {op:?}", out.id, out.name));
        self.verdict.ops.push(Op::Output { port: out.id, vlan: op });
        true
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
fn egress_vlan(mode: &VlanMode, vlan: u16, tag: Tag, tci: u16) -> VlanOp {
    let tci = (tci & 0xe000) | vlan;
    let tagged = match mode {
        VlanMode::Access(_) => vlan == 0 && tag == Tag::Present,
        VlanMode::Tunnel(_) => false,
        VlanMode::Trunk { native, .. } => vlan != *native,
    };
    match (tag, tagged) {
        (Tag::Present, false) => VlanOp::Pop,
        (Tag::Present, true) | (Tag::Absent, false) | (Tag::Service, false) => VlanOp::None,
        (Tag::Absent, true) => VlanOp::Push { tpid: TPID_C, tci },
        (Tag::Service, true) => VlanOp::Push { tpid: TPID_S, tci: vlan },
        // A priority tag without VLAN stays only where VLAN 0 is native.
        (Tag::Priority, false) => {
            if vlan == 0 {
                VlanOp::None
            } else {
                VlanOp::Pop
            }
        }
        (Tag::Priority, true) => VlanOp::Set { tci },
    }
}

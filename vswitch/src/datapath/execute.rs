//! Execution of decisions with several steps.

use super::verdict::{Edit, Op};
use crate::clock::Nanos;
use crate::event::Event;
use crate::packet::vlan::VlanOp;
use crate::packet::{Burst, edit};
use crate::pipeline::Meter;
use crate::port::PortId;
use crate::shared::{PortTable, Shared};

/// Packets that wait to go out of one port, by their place in the burst.
#[derive(Debug, Default)]
pub(super) struct OutQueue {
    pub index: Vec<u16>,
    pub tags: Vec<VlanOp>,
}

#[inline]
pub(super) fn enqueue(out: &mut [OutQueue], active: &mut Vec<PortId>, port: PortId, i: u16, tag: VlanOp) {
    let Some(q) = out.get_mut(port as usize) else { return };
    if q.index.is_empty() {
        active.push(port);
    }
    q.index.push(i);
    q.tags.push(tag);
}

/// What the steps of a decision work on.
pub(super) struct Executor<'a> {
    pub shared: &'a Shared,
    pub ports: &'a PortTable,
    pub worker: usize,
    pub burst: &'a mut Burst,
    pub out: &'a mut [OutQueue],
    pub active: &'a mut Vec<PortId>,
    pub in_port: PortId,
    pub now: Nanos,
}

impl Executor<'_> {
    /// Runs steps on packet `i` of the burst.
    pub fn run(&mut self, ops: &[Op], i: usize) {
        let mut at = i;
        // Whether the packet waits to go out as it is, so that a change needs a copy.
        let mut shared = false;
        for op in ops {
            match op {
                Op::Output { port, vlan, limit } => {
                    shared |= self.output(*port, *vlan, limit.as_deref(), at);
                }
                Op::OutputInTurn { turns, vlan, limit } => {
                    shared |= self.output(turns.take(), *vlan, limit.as_deref(), at);
                }
                Op::Edit(e) => {
                    if std::mem::take(&mut shared) {
                        let Some(copy) = self.burst.duplicate(at) else { return };
                        at = copy;
                    }
                    if !self.edit(e, at) {
                        return;
                    }
                }
                Op::Meter(m) => {
                    if self.limited(Some(m), at) {
                        return;
                    }
                }
                Op::Controller { max_len, reason, table, cookie, key } => {
                    let p = &self.burst.packets()[at];
                    self.shared.events.publish(|| {
                        let mut frame = p.to_vec();
                        frame.truncate(usize::from(*max_len));
                        Event::PacketIn {
                            in_port: self.in_port,
                            reason: *reason,
                            table: *table,
                            cookie: *cookie,
                            length: p.len(),
                            frame,
                            key: key.clone(),
                        }
                    });
                }
                Op::Lacp => {
                    let bonds = self.shared.bonds.load();
                    let bond = bonds.iter().find(|b| b.config.members.contains(&self.in_port));
                    let frame = self.burst.packets()[at].head();
                    if bond.is_some_and(|b| b.lacp_input(self.in_port, frame, self.now)) {
                        self.shared.invalidate();
                    }
                }
                Op::Copy(inner) => {
                    let Some(copy) = self.burst.duplicate(at) else { return };
                    self.run(inner, copy);
                }
            }
        }
    }

    /// Puts a packet into a port's queue; says whether it waits there itself, not as a copy.
    fn output(&mut self, port: PortId, vlan: VlanOp, limit: Option<&Meter>, at: usize) -> bool {
        if self.limited(limit, at) {
            if let Some(e) = self.ports.get(port) {
                e.stats.of(self.worker).tx_limited.add(1);
            }
            return false;
        }
        // A port that gets one packet twice must not find one change of its tag undone by the other.
        let twice = vlan != VlanOp::None
            && self.out.get(port as usize).is_some_and(|q| q.index.last() == Some(&(at as u16)));
        let send = if twice { self.burst.duplicate(at) } else { Some(at) };
        if let Some(send) = send {
            enqueue(self.out, self.active, port, send as u16, vlan);
        }
        send == Some(at)
    }

    fn limited(&self, meter: Option<&Meter>, at: usize) -> bool {
        meter.is_some_and(|m| !m.allow(self.burst.packets()[at].len(), self.now))
    }

    /// Changes a packet; `false`: it must be dropped.
    fn edit(&mut self, e: &Edit, at: usize) -> bool {
        let p = self.burst.packet_mut(at);
        match *e {
            Edit::Vlan(op) => op.apply(p),
            Edit::Set { field, value, mask } => edit::set_field(p, field, value, mask),
            Edit::DecTtl => return edit::decrement_ttl(p),
        }
        true
    }
}

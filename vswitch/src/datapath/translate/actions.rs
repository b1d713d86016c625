//! Flow tables and actions.

use std::sync::Arc;

use super::Translation;
use crate::datapath::verdict::{DropReason, Edit, Op};
use crate::packet::key::{Field, FlowKey};
use crate::packet::vlan::{PRESENT, VlanOp};
use crate::pipeline::{Action, Bucket, ConntrackAction, GroupKind, LearnSpec};
use crate::port::PortId;
use crate::shared::PortEntry;

/// Deepest nesting of resubmits and groups.
const DEPTH_MAX: u32 = 64;
/// Most actions executed for one packet.
const STEPS_MAX: u32 = 4096;

impl Translation<'_> {
    /// Looks the packet up in a table and does what the rule says.
    pub(super) fn table(&mut self, id: u8) {
        let mut id = id;
        loop {
            let rule = self.tables.lookup(id, &self.key, &mut self.mask).cloned();
            let found = rule.as_ref().map(|r| r.spec.priority);
            self.verdict.lookups.note(id, found, &self.key, &self.original);
            let Some(rule) = rule else {
                return self.note(|| format!("table {id}: no rule"));
            };
            let s = &rule.spec;
            self.note(|| {
                let (m, i) = (&s.matches, &s.instructions);
                format!("table {id}: priority {}, cookie {:#x}: {m} -> {i}", s.priority, s.cookie)
            });
            self.verdict.rules.push(rule.stats.clone());
            let outer = std::mem::replace(&mut self.rule, (id, s.cookie));
            let i = &s.instructions;
            if let Some(m) = i.meter {
                self.meter(m);
            }
            self.actions(&i.apply, id);
            self.rule = outer;
            if i.clear {
                self.action_set.clear();
            }
            self.action_set.extend(i.write.iter().cloned());
            if let Some((v, m)) = i.metadata {
                let old = self.key.get64(Field::Metadata);
                self.key.set(Field::Metadata, u128::from((old & !m) | (v & m)));
            }
            match i.goto {
                Some(next) if next > id => id = next,
                _ => return,
            }
        }
    }

    pub(super) fn actions(&mut self, list: &[Action], table: u8) {
        if self.depth >= DEPTH_MAX {
            return self.drop_for(DropReason::TooDeep);
        }
        self.depth += 1;
        for a in list {
            self.steps += 1;
            if self.steps > STEPS_MAX {
                self.drop_for(DropReason::TooDeep);
                break;
            }
            self.action(a, table);
        }
        self.depth -= 1;
    }

    fn action(&mut self, a: &Action, table: u8) {
        match a {
            Action::Output(p) => self.output_to(*p),
            Action::OutputField(l) => {
                self.mark_bits(l.field, l.mask());
                self.output_to(l.get(&self.key) as PortId);
            }
            Action::InPort => {
                if let Some(e) = self.in_entry() {
                    self.output_raw(&e);
                }
            }
            Action::All => {
                let from = self.in_port();
                let all: Vec<Arc<PortEntry>> = self.ports.iter().filter(|p| p.id != from).cloned().collect();
                all.iter().for_each(|p| self.output_raw(p));
            }
            Action::Flood => self.normal(false),
            Action::Normal => self.normal(true),
            Action::Controller { max_len, reason } => {
                let (table, cookie) = self.rule;
                self.note(|| "to the controllers".into());
                let key = Box::new(self.key);
                self.ops.push(Op::Controller { max_len: *max_len, reason: *reason, table, cookie, key });
            }
            Action::PushVlan(tpid) => {
                self.mask.mark(Field::Vlan);
                let outer = self.key.get(Field::Vlan);
                self.key.set(Field::InnerVlan, outer);
                self.key.set(Field::Vlan, PRESENT.into());
                self.edit(Edit::Vlan(VlanOp::Push { tpid: *tpid, tci: 0 }));
            }
            Action::PopVlan => {
                self.mask.mark(Field::Vlan);
                self.mask.mark(Field::InnerVlan);
                let inner = self.key.get(Field::InnerVlan);
                self.key.set(Field::Vlan, inner);
                self.key.set(Field::InnerVlan, 0);
                self.edit(Edit::Vlan(VlanOp::Pop));
            }
            Action::SetField { field, value, mask } => self.set_field(*field, *value, *mask),
            Action::Move { from, to } => {
                self.mark_bits(from.field, from.mask());
                let v = to.place(from.get(&self.key));
                self.set_field(to.field, v, to.mask());
            }
            Action::DecTtl => {
                self.mask.mark(Field::IpTtl);
                let ttl = self.key.get64(Field::IpTtl);
                self.key.set(Field::IpTtl, u128::from(ttl.saturating_sub(1)));
                self.edit(Edit::DecTtl);
            }
            Action::Group(id) => self.group(*id, table),
            Action::Meter(id) => self.meter(*id),
            Action::Resubmit { table: t, in_port } => self.resubmit(t.unwrap_or(table), *in_port),
            Action::Conntrack(c) => self.conntrack(c),
            Action::Learn(spec) => self.learn_rule(spec),
        }
    }

    fn mark_bits(&mut self, field: Field, mask: u128) {
        self.mask.join(&FlowKey::default().with(field, mask));
    }

    fn output_to(&mut self, port: PortId) {
        if port == self.in_port() {
            return self.note(|| "output to the port it came in by: skipped".into());
        }
        match self.ports.get(port).cloned() {
            Some(e) => self.output_raw(&e),
            None => self.note(|| format!("output to port {port}, which does not exist")),
        }
    }

    /// Sends the frame out of a port as it is; policies hold all the same.
    fn output_raw(&mut self, out: &PortEntry) {
        let vlan = self.in_entry().and_then(|e| self.vlan_state(&e)).map_or(0, |s| s.vlan);
        self.output(out, vlan, VlanOp::None);
    }

    fn edit(&mut self, e: Edit) {
        self.ops.push(Op::Edit(e));
    }

    pub(super) fn set_field(&mut self, field: Field, value: u128, mask: u128) {
        let old = self.key.get(field);
        let vlan = field == Field::Vlan;
        if vlan {
            // Whether the frame has a tag decides between rewriting and pushing one.
            self.mask.mark(Field::Vlan);
        }
        let tagged = if vlan { u128::from(PRESENT) } else { 0 };
        self.key.set(field, (old & !mask) | (value & mask) | tagged);
        match field {
            Field::InPort
            | Field::TunId
            | Field::Metadata
            | Field::Reg(_)
            | Field::CtState
            | Field::CtMark
            | Field::CtZone
            | Field::CtLabel => {}
            _ => {
                // What the frame is decides whether it has the field.
                self.mask.mark(Field::EthType);
                self.mask.mark(Field::IpProto);
                self.edit(Edit::Set { field, value, mask });
            }
        }
    }

    fn meter(&mut self, id: u32) {
        if let Some(m) = self.tables.meters.get(&id) {
            self.ops.push(Op::Meter(m.clone()));
        }
    }

    fn group(&mut self, id: u32, table: u8) {
        let tables = self.tables;
        let Some(g) = tables.groups.get(&id) else {
            return self.note(|| format!("group {id} does not exist"));
        };
        let alive =
            |b: &Bucket| b.watch_port.is_none_or(|p| self.ports.get(p).is_some_and(|p| p.port.link_up()));
        let chosen: Vec<&Bucket> = match g.kind {
            GroupKind::All => g.buckets.iter().collect(),
            GroupKind::Indirect => g.buckets.first().into_iter().collect(),
            GroupKind::FastFailover => g.buckets.iter().find(|b| alive(b)).into_iter().collect(),
            GroupKind::Select => {
                let live: Vec<&Bucket> = g.buckets.iter().filter(|b| alive(b) && b.weight > 0).collect();
                self.select_bucket(&live).into_iter().collect()
            }
        };
        self.note(|| format!("group {id}: {} of {} buckets", chosen.len(), g.buckets.len()));
        for b in chosen {
            // Each bucket works on a copy of its own.
            let key = self.key;
            let outer = std::mem::take(&mut self.ops);
            self.actions(&b.actions, table);
            let inner = std::mem::replace(&mut self.ops, outer);
            self.key = key;
            self.append_copy(inner);
        }
    }

    /// Appends steps that must not change the packet for the steps that follow.
    fn append_copy(&mut self, inner: Vec<Op>) {
        if inner.iter().any(|o| matches!(o, Op::Edit(_) | Op::Meter(_))) {
            self.ops.push(Op::Copy(inner));
        } else {
            self.ops.extend(inner);
        }
    }

    fn select_bucket<'b>(&mut self, live: &[&'b Bucket]) -> Option<&'b Bucket> {
        let total: u64 = live.iter().map(|b| u64::from(b.weight)).sum();
        if total == 0 {
            return None;
        }
        let h = self.flow_hash();
        let mut at = h % total;
        live.iter().copied().find(|b| {
            let w = u64::from(b.weight);
            let here = at < w;
            at = at.saturating_sub(w);
            here
        })
    }

    /// A hash over addresses and ports that both directions of a connection share.
    pub(super) fn flow_hash(&mut self) -> u64 {
        for f in [Field::EthSrc, Field::EthDst, Field::EthType, Field::Vlan] {
            self.mask.mark(f);
        }
        for f in [Field::IpSrc, Field::IpDst, Field::IpProto, Field::TpSrc, Field::TpDst] {
            self.mask.mark(f);
        }
        let k = &self.key;
        let fold = |v: u128| (v as u64) ^ (v >> 64) as u64;
        let both = |a: Field, b: Field| {
            fold(k.get(a)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
                ^ fold(k.get(b)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        };
        let h = both(Field::EthSrc, Field::EthDst)
            ^ both(Field::IpSrc, Field::IpDst).rotate_left(17)
            ^ both(Field::TpSrc, Field::TpDst).rotate_left(31)
            ^ k.get64(Field::IpProto);
        (h ^ (h >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93) >> 17
    }

    fn resubmit(&mut self, table: u8, in_port: Option<PortId>) {
        if self.depth >= DEPTH_MAX {
            return self.drop_for(DropReason::TooDeep);
        }
        self.depth += 1;
        let old = self.key.get(Field::InPort);
        if let Some(p) = in_port {
            self.key.set(Field::InPort, p.into());
        }
        let set = std::mem::take(&mut self.action_set);
        self.table(table);
        self.action_set = set;
        self.key.set(Field::InPort, old);
        self.depth -= 1;
    }

    fn conntrack(&mut self, c: &ConntrackAction) {
        let t = self.track(c.zone);
        self.note(|| format!("conntrack zone {}: state {:#x}", c.zone, t.state));
        if c.commit {
            self.commit(&t, c.mark, c.label);
        }
        if let Some(table) = c.table {
            let saved = self.key;
            self.key.set(Field::CtState, t.state.into());
            self.key.set(Field::CtZone, c.zone.into());
            self.key.set(Field::CtMark, t.mark.into());
            self.key.set(Field::CtLabel, t.label);
            if self.depth < DEPTH_MAX {
                self.depth += 1;
                let outer = std::mem::take(&mut self.ops);
                self.table(table);
                let inner = std::mem::replace(&mut self.ops, outer);
                self.append_copy(inner);
                self.depth -= 1;
            }
            self.key = saved;
        }
    }

    fn learn_rule(&mut self, spec: &LearnSpec) {
        let rule = spec.rule(&self.key, &mut self.mask);
        self.note(|| format!("learn a rule in table {}", rule.table));
        if self.trace.is_none() {
            self.learned.push(rule);
        }
    }
}

//! Rules and their lookup: tuple space search, subtables in order of priority.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::{Group, Instructions, Match, Meter};
use crate::clock::{Nanos, SECOND};
use crate::datapath::verdict::RuleStats;
use crate::error::{Error, Result};
use crate::packet::key::FlowKey;
use crate::port::PortId;

/// Most rules in one switch.
pub(crate) const RULES_MAX: usize = 1_000_000;
/// Most groups and most meters.
pub(crate) const GROUPS_MAX: usize = 65_536;

/// A rule as it is added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowSpec {
    /// Table.
    pub table: u8,
    /// Priority; the highest that matches wins.
    pub priority: u16,
    /// What it matches.
    pub matches: Match,
    /// What it does.
    pub instructions: Instructions,
    /// The controller's own number.
    pub cookie: u64,
    /// Seconds without a packet after which it goes; zero: never.
    pub idle_timeout: u16,
    /// Seconds after which it goes; zero: never.
    pub hard_timeout: u16,
    /// Whether the controllers are told when it goes.
    pub notify_removal: bool,
}

/// A rule in force.
#[derive(Debug)]
pub struct FlowEntry {
    /// The rule.
    pub spec: FlowSpec,
    /// When it was added.
    pub created: Nanos,
    /// What it handled.
    pub stats: Arc<RuleStats>,
}

impl FlowEntry {
    fn expired(&self, now: Nanos) -> bool {
        let over = |since: Nanos, seconds: u16| {
            seconds != 0 && now.saturating_sub(since) >= u64::from(seconds) * SECOND
        };
        over(self.created, self.spec.hard_timeout)
            || over(self.stats.used().max(self.created), self.spec.idle_timeout)
    }
}

/// Which rules an operation is about.
#[derive(Clone, Debug, Default)]
pub struct FlowFilter {
    /// Only this table.
    pub table: Option<u8>,
    /// Rules whose match this one covers.
    pub matches: Match,
    /// With a priority: only the rule with exactly this match and priority.
    pub strict: Option<u16>,
    /// Cookie: value and mask.
    pub cookie: (u64, u64),
    /// Only rules that output to this port.
    pub out_port: Option<PortId>,
    /// Only rules that use this group.
    pub out_group: Option<u32>,
}

impl FlowFilter {
    /// Only the rule with the table, match and priority of `spec`.
    pub(crate) fn exactly(spec: &FlowSpec) -> Self {
        Self {
            table: Some(spec.table),
            matches: spec.matches,
            strict: Some(spec.priority),
            ..Self::default()
        }
    }

    fn selects(&self, s: &FlowSpec) -> bool {
        use super::Action;
        let actions = || s.instructions.apply.iter().chain(&s.instructions.write);
        let matched = match self.strict {
            Some(p) => s.priority == p && s.matches == self.matches,
            None => self.matches.covers(&s.matches),
        };
        matched
            && self.table.is_none_or(|t| t == s.table)
            && s.cookie & self.cookie.1 == self.cookie.0 & self.cookie.1
            && self.out_port.is_none_or(|p| actions().any(|a| *a == Action::Output(p)))
            && self.out_group.is_none_or(|g| actions().any(|a| *a == Action::Group(g)))
    }
}

#[derive(Debug, Default)]
struct Subtable {
    mask: FlowKey,
    max_priority: u16,
    /// Rules by masked key; rules with the same key in falling priority.
    rules: HashMap<FlowKey, Vec<Arc<FlowEntry>>>,
}

#[derive(Debug, Default)]
struct Table {
    /// In falling order of `max_priority`.
    subtables: Vec<Subtable>,
}

impl Table {
    fn lookup(&self, key: &FlowKey, mask: &mut FlowKey) -> Option<&Arc<FlowEntry>> {
        let mut best: Option<&Arc<FlowEntry>> = None;
        for s in &self.subtables {
            if best.is_some_and(|b| b.spec.priority >= s.max_priority) {
                break;
            }
            mask.join(&s.mask);
            if let Some(r) = s.rules.get(&key.masked(&s.mask)).and_then(|r| r.first())
                && best.is_none_or(|b| r.spec.priority > b.spec.priority)
            {
                best = Some(r);
            }
        }
        best
    }

    fn insert(&mut self, e: Arc<FlowEntry>) -> Option<Arc<FlowEntry>> {
        let mask = e.spec.matches.mask;
        let at = self.subtables.iter().position(|s| s.mask == mask).unwrap_or_else(|| {
            self.subtables.push(Subtable { mask, ..Subtable::default() });
            self.subtables.len() - 1
        });
        let sub = &mut self.subtables[at];
        sub.max_priority = sub.max_priority.max(e.spec.priority);
        let rules = sub.rules.entry(e.spec.matches.value).or_default();
        let old = match rules.binary_search_by(|r| e.spec.priority.cmp(&r.spec.priority)) {
            Ok(i) => Some(std::mem::replace(&mut rules[i], e)),
            Err(i) => {
                rules.insert(i, e);
                None
            }
        };
        self.sort();
        old
    }

    fn retain(&mut self, mut keep: impl FnMut(&Arc<FlowEntry>) -> bool) {
        for s in &mut self.subtables {
            s.rules.retain(|_, rules| {
                rules.retain(&mut keep);
                !rules.is_empty()
            });
            s.max_priority =
                s.rules.values().filter_map(|r| Some(r.first()?.spec.priority)).max().unwrap_or(0);
        }
        self.subtables.retain(|s| !s.rules.is_empty());
        self.sort();
    }

    fn sort(&mut self) {
        self.subtables.sort_by_key(|s| std::cmp::Reverse(s.max_priority));
    }

    fn iter(&self) -> impl Iterator<Item = &Arc<FlowEntry>> {
        self.subtables.iter().flat_map(|s| s.rules.values().flatten())
    }
}

/// All tables, groups and meters.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    tables: BTreeMap<u8, Table>,
    rules: usize,
    pub groups: BTreeMap<u32, Group>,
    pub meters: BTreeMap<u32, Arc<Meter>>,
}

impl Tables {
    /// The rule that handles a packet; what the search looked at is added to `mask`.
    pub fn lookup(&self, table: u8, key: &FlowKey, mask: &mut FlowKey) -> Option<&Arc<FlowEntry>> {
        self.tables.get(&table)?.lookup(key, mask)
    }

    /// Fails when `n` more rules are too many.
    pub fn check_room(&self, n: usize) -> Result<()> {
        if self.rules + n > RULES_MAX {
            return Err(Error::Invalid(format!(
                "More than {RULES_MAX} rules are too many; delete some first"
            )));
        }
        Ok(())
    }

    /// Adds a rule, replacing the one with the same match and priority.
    pub fn add(&mut self, spec: FlowSpec, now: Nanos) -> Result<()> {
        self.check_room(1)?;
        if spec.instructions.goto.is_some_and(|g| g <= spec.table) {
            return Err(Error::Invalid("A rule can go to later tables only".into()));
        }
        let table = self.tables.entry(spec.table).or_default();
        let entry = Arc::new(FlowEntry { spec, created: now, stats: Arc::default() });
        if table.insert(entry).is_none() {
            self.rules += 1;
        }
        Ok(())
    }

    /// Changes what the selected rules do; their counters stay. Returns the rules as they were.
    pub fn modify(&mut self, filter: &FlowFilter, instructions: &Instructions) -> Vec<Arc<FlowEntry>> {
        let found = self.select(filter);
        for e in &found {
            let spec = FlowSpec { instructions: instructions.clone(), ..e.spec.clone() };
            let new = FlowEntry { spec, created: e.created, stats: e.stats.clone() };
            if let Some(t) = self.tables.get_mut(&e.spec.table) {
                t.insert(Arc::new(new));
            }
        }
        found
    }

    /// Removes the selected rules and returns them.
    pub fn remove(&mut self, filter: &FlowFilter) -> Vec<Arc<FlowEntry>> {
        self.remove_if(|e| filter.selects(&e.spec))
    }

    /// Removes rules whose time is over and returns them.
    pub fn expire(&mut self, now: Nanos) -> Vec<Arc<FlowEntry>> {
        let any = self.tables.values().any(|t| t.iter().any(|e| e.expired(now)));
        if any { self.remove_if(|e| e.expired(now)) } else { Vec::new() }
    }

    fn remove_if(&mut self, gone: impl Fn(&FlowEntry) -> bool) -> Vec<Arc<FlowEntry>> {
        let mut removed = Vec::new();
        for t in self.tables.values_mut() {
            t.retain(|e| {
                let gone = gone(e);
                if gone {
                    removed.push(e.clone());
                }
                !gone
            });
        }
        self.rules -= removed.len();
        removed
    }

    /// The selected rules by table and falling priority.
    pub fn select(&self, filter: &FlowFilter) -> Vec<Arc<FlowEntry>> {
        let all = self.tables.values().flat_map(Table::iter);
        let mut found: Vec<_> = all.filter(|e| filter.selects(&e.spec)).cloned().collect();
        found.sort_by_key(|e| (e.spec.table, std::cmp::Reverse(e.spec.priority)));
        found
    }

    /// Number of rules in each table that has any.
    pub fn counts(&self) -> Vec<(u8, usize)> {
        self.tables.iter().map(|(id, t)| (*id, t.iter().count())).filter(|(_, n)| *n > 0).collect()
    }

    /// Adds or replaces a group.
    pub fn set_group(&mut self, id: u32, group: Group) -> Result<()> {
        if self.groups.len() >= GROUPS_MAX && !self.groups.contains_key(&id) {
            return Err(Error::Invalid(format!("There are {GROUPS_MAX} groups already; delete some first")));
        }
        self.groups.insert(id, group);
        Ok(())
    }

    /// Adds or replaces a meter.
    pub fn set_meter(&mut self, id: u32, meter: Meter) -> Result<()> {
        if self.meters.len() >= GROUPS_MAX && !self.meters.contains_key(&id) {
            return Err(Error::Invalid(format!("There are {GROUPS_MAX} meters already; delete some first")));
        }
        self.meters.insert(id, Arc::new(meter));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::key::Field;
    use proptest::prelude::*;

    fn spec(priority: u16, matches: Match, cookie: u64) -> FlowSpec {
        FlowSpec { priority, matches, cookie, ..FlowSpec::default() }
    }

    #[test]
    fn filters_select_as_openflow_says() {
        let mut t = Tables::default();
        let tcp = Match::default().field(Field::EthType, 0x800).field(Field::IpProto, 6);
        let web = tcp.field(Field::TpDst, 80);
        t.add(spec(5, tcp, 1), 0).unwrap();
        t.add(spec(6, web, 2), 0).unwrap();
        t.add(spec(0, Match::default(), 3), 0).unwrap();
        assert_eq!(t.select(&FlowFilter { matches: tcp, ..FlowFilter::default() }).len(), 2);
        assert_eq!(t.select(&FlowFilter { matches: tcp, strict: Some(5), ..FlowFilter::default() }).len(), 1);
        assert_eq!(t.remove(&FlowFilter { cookie: (2, u64::MAX), ..FlowFilter::default() }).len(), 1);
        assert_eq!(t.counts(), [(0, 2)]);
    }

    #[test]
    fn rules_expire() {
        let mut t = Tables::default();
        t.add(FlowSpec { hard_timeout: 5, ..spec(1, Match::default(), 0) }, 0).unwrap();
        let idle = FlowSpec { idle_timeout: 5, ..spec(2, Match::default(), 0) };
        t.add(idle, 0).unwrap();
        t.select(&FlowFilter::default())[0].stats.add(1, 60, 3 * SECOND);
        assert_eq!(t.expire(5 * SECOND).len(), 1);
        assert_eq!(t.expire(8 * SECOND).len(), 1);
    }

    proptest! {
        /// The search agrees with a scan over all rules, and its mask is wide enough: a packet that differs only
        /// outside of the mask finds the same rule.
        #[test]
        fn search_equals_scan(rules in proptest::collection::vec((0u16..4, 0u8..8, 0u64..3, 0u64..3, 0u64..3), 0..12),
                              key in (0u64..3, 0u64..3, 0u64..3), other in (0u64..3, 0u64..3, 0u64..3)) {
            let fields = [Field::EthDst, Field::IpProto, Field::TpDst];
            let build = |v: (u64, u64, u64)| {
                [v.0, v.1, v.2].iter().zip(fields).fold(FlowKey::default(), |k, (v, f)| k.with(f, (*v).into()))
            };
            let mut t = Tables::default();
            let mut list: Vec<FlowSpec> = Vec::new();
            for (n, (p, which, a, b, c)) in rules.into_iter().enumerate() {
                let mut m = Match::default();
                for (i, v) in [a, b, c].into_iter().enumerate() {
                    if which >> i & 1 != 0 {
                        m = m.field(fields[i], v.into());
                    }
                }
                // Overlapping rules of equal priority have no defined winner.
                if list.iter().any(|s| s.priority == p) {
                    continue;
                }
                list.push(spec(p, m, n as u64));
                t.add(spec(p, m, n as u64), 0).unwrap();
            }
            let scan = |k: &FlowKey| {
                list.iter().filter(|s| s.matches.matches(k)).max_by_key(|s| s.priority).map(|s| s.cookie)
            };
            let k = build(key);
            let mut mask = FlowKey::default();
            let found = t.lookup(0, &k, &mut mask).map(|e| e.spec.cookie);
            prop_assert_eq!(found, scan(&k));
            let o = build(other);
            if o.matches(&k, &mask) {
                prop_assert_eq!(scan(&o), found);
            }
        }
    }
}

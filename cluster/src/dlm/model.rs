//! Exhaustive check of a small lock manager: up to three hosts, one name, every order of messages, views and deaths.

use std::collections::{BTreeMap, VecDeque};

use stateright::{Checker, Model, Property};

use super::host::Dlm;
use super::{DlmInput, DlmOutput, LockId, Message, Mode, View, Wish};
use crate::types::HostId;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Small {
    hosts: Vec<Option<Dlm>>,
    /// Each host's locks that it asked for, and gave back.
    used: Vec<(u8, u8)>,
    queues: BTreeMap<(usize, usize), VecDeque<Message>>,
    views: Vec<VecDeque<View>>,
    view: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Deliver(usize, usize),
    Install(usize),
    Lock(usize),
    Release(usize),
    Die(usize),
}

struct Config {
    hosts: usize,
    deaths: usize,
}

impl Small {
    fn live(&self) -> Vec<usize> {
        (0..self.hosts.len()).filter(|h| self.hosts[*h].is_some()).collect()
    }

    fn new_view(&mut self) {
        self.view += 1;
        let live = self.live();
        let members = live.iter().map(|h| HostId(*h as u16 + 1)).collect();
        for h in live {
            self.views[h].push_back(View::new(self.view, &members));
        }
    }

    fn apply(&mut self, host: usize, out: Vec<DlmOutput>) {
        for output in out {
            if let DlmOutput::Send(to, message) = output {
                let to = usize::from(to.0) - 1;
                if self.hosts[to].is_some() {
                    self.queues.entry((host, to)).or_default().push_back(message);
                }
            }
        }
    }

    /// The lock of a host that is granted and not being given back.
    fn holds(&self, host: usize) -> Option<LockId> {
        let dlm = self.hosts[host].as_ref()?;
        let released = dlm.wishes().any(|(_, _, wish)| matches!(wish, Some(Wish::Release { .. })));
        dlm.locks().find(|l| l.2 == Some(Mode::Exclusive) && !released).map(|l| l.0)
    }
}

impl Model for Config {
    type State = Small;
    type Action = Act;

    fn init_states(&self) -> Vec<Small> {
        let mut s = Small {
            hosts: (1..=self.hosts).map(|n| Some(Dlm::new(HostId(n as u16)))).collect(),
            used: vec![(0, 0); self.hosts],
            queues: BTreeMap::new(),
            views: vec![VecDeque::new(); self.hosts],
            view: 0,
        };
        s.new_view();
        // The first view is installed before anything else happens.
        for h in 0..self.hosts {
            let mut out = Vec::new();
            if let (Some(view), Some(dlm)) = (s.views[h].pop_front(), &mut s.hosts[h]) {
                dlm.step(DlmInput::View(view), &mut out);
            }
            s.apply(h, out);
        }
        while let Some((&(from, to), _)) = s.queues.iter().find(|q| !q.1.is_empty()) {
            s = self.next_state(&s, Act::Deliver(from, to)).expect("it can be delivered");
        }
        s.queues.clear();
        vec![s]
    }

    fn actions(&self, s: &Small, actions: &mut Vec<Act>) {
        actions.extend(s.queues.iter().filter(|q| !q.1.is_empty()).map(|q| Act::Deliver(q.0.0, q.0.1)));
        for h in s.live() {
            if !s.views[h].is_empty() {
                actions.push(Act::Install(h));
            }
            if s.used[h].0 == 0 {
                actions.push(Act::Lock(h));
            }
            if s.holds(h).is_some() {
                actions.push(Act::Release(h));
            }
            if s.live().len() > self.hosts - self.deaths {
                actions.push(Act::Die(h));
            }
        }
    }

    fn next_state(&self, last: &Small, action: Act) -> Option<Small> {
        let mut s = last.clone();
        let mut out = Vec::new();
        let host = match action {
            Act::Deliver(from, to) => {
                let message = s.queues.get_mut(&(from, to))?.pop_front()?;
                s.hosts[to].as_mut()?.step(DlmInput::Message(HostId(from as u16 + 1), message), &mut out);
                to
            }
            Act::Install(h) => {
                let view = s.views[h].pop_front()?;
                s.hosts[h].as_mut()?.step(DlmInput::View(view), &mut out);
                h
            }
            Act::Lock(h) => {
                s.used[h].0 += 1;
                s.hosts[h].as_mut()?.lock("a", Mode::Exclusive, &mut out).ok()?;
                h
            }
            Act::Release(h) => {
                let id = s.holds(h)?;
                s.used[h].1 += 1;
                s.hosts[h].as_mut()?.release(id, None, &mut out).ok()?;
                h
            }
            Act::Die(h) => {
                s.hosts[h] = None;
                s.views[h].clear();
                s.queues.retain(|(_, to), _| *to != h);
                s.new_view();
                h
            }
        };
        s.apply(host, out);
        s.queues.retain(|_, q| !q.is_empty());
        Some(s)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("one owner", |_, s: &Small| {
                s.live().into_iter().filter(|h| s.holds(*h).is_some()).count() <= 1
            }),
            Property::always("one master", |_, s: &Small| {
                let settled =
                    s.hosts.iter().flatten().filter(|h| h.is_settled() && h.view().number == s.view);
                settled.map(|h| h.mastered().count()).sum::<usize>() <= 1
            }),
            // Where nothing can happen any more, everybody has had the lock and given it back.
            Property::always("nobody waits for ever", |m: &Config, s: &Small| {
                let mut actions = Vec::new();
                m.actions(s, &mut actions);
                let over = actions.iter().all(|a| matches!(a, Act::Die(_)));
                !over || s.live().into_iter().all(|h| s.used[h] == (1, 1))
            }),
            Property::sometimes("a survivor gets it", |m: &Config, s: &Small| {
                s.live().len() < m.hosts && s.live().into_iter().all(|h| s.used[h] == (1, 1))
            }),
        ]
    }
}

#[test]
fn two_hosts_one_death() {
    let checker = Config { hosts: 2, deaths: 1 }.checker().spawn_bfs().join();
    checker.assert_properties();
    assert!(checker.is_done() && checker.unique_state_count() > 100);
}

#[test]
fn three_hosts_claim_at_once() {
    // With a death too there are too many states for each run of the tests: the random runs do that.
    let checker = Config { hosts: 3, deaths: 0 }.checker().spawn_bfs().join();
    for property in ["one owner", "one master", "nobody waits for ever"] {
        checker.assert_no_discovery(property);
    }
    assert!(checker.is_done());
}

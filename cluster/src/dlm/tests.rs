//! Random runs of several hosts that lock, convert, release, die and come back; messages take any time.

use std::collections::{BTreeMap, VecDeque};

use super::host::Dlm;
use super::{
    Body, DlmInput, DlmOutput, LockError, LockEvent, LockId, Message, Mode, Told, Value, View, Wish,
};
use crate::mutants::{self, Mutant};
use crate::types::HostId;

const NAMES: [&str; 3] = ["a", "b", "c"];

/// A small deterministic generator (xorshift).
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }
}

/// A host that tells what it has in many small parts.
fn host(number: usize) -> Dlm {
    Dlm::with_part(HostId(number as u16), 1)
}

struct World {
    rng: Rng,
    hosts: Vec<Option<Dlm>>,
    queues: BTreeMap<(usize, usize), VecDeque<Message>>,
    /// Views that a host has yet to install.
    views: Vec<VecDeque<View>>,
    view: u64,
    /// The highest version of a value that anybody was told, while somebody has a lock of the name.
    told: BTreeMap<&'static str, u64>,
    grants: u64,
    violation: Option<String>,
}

impl World {
    fn new(seed: u64, hosts: usize) -> Self {
        let mut world = World {
            rng: Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            hosts: (1..=hosts).map(|n| Some(host(n))).collect(),
            queues: BTreeMap::new(),
            views: vec![VecDeque::new(); hosts],
            view: 0,
            told: BTreeMap::new(),
            grants: 0,
            violation: None,
        };
        world.new_view();
        world
    }

    fn live(&self) -> Vec<usize> {
        (0..self.hosts.len()).filter(|h| self.hosts[*h].is_some()).collect()
    }

    fn new_view(&mut self) {
        self.view += 1;
        let members = self.live().into_iter().map(|h| HostId(h as u16 + 1)).collect();
        for h in self.live() {
            self.views[h].push_back(View::new(self.view, &members));
        }
    }

    fn violate(&mut self, text: String) {
        self.violation.get_or_insert(text);
    }

    fn apply(&mut self, host: usize, out: Vec<DlmOutput>) {
        for output in out {
            match output {
                DlmOutput::Send(to, message) => {
                    self.queues.entry((host, usize::from(to.0) - 1)).or_default().push_back(message);
                }
                DlmOutput::Event(LockEvent::Granted { id, mode, value }) => {
                    self.grants += 1;
                    let name = self.name(host, id);
                    let told = self.told.entry(name).or_default();
                    let protected =
                        matches!(mode, Mode::ProtectedRead | Mode::ProtectedWrite | Mode::Exclusive);
                    if protected && value.valid && value.version < *told {
                        let text = format!("value {} of {name} is valid, but {told} was told", value.version);
                        self.violate(text);
                    } else {
                        *told = value.version.max(*told);
                    }
                }
                DlmOutput::Event(_) => {}
            }
        }
        self.check();
    }

    fn name(&self, host: usize, id: LockId) -> &'static str {
        let found =
            self.hosts[host].as_ref().and_then(|h| h.locks().find(|l| l.0 == id).map(|l| l.1.to_owned()));
        NAMES.into_iter().find(|n| Some(*n) == found.as_deref()).expect("a granted lock exists")
    }

    /// Every lock: name, host, and the mode that its owner may rely on.
    fn modes(&self) -> Vec<(String, usize, Option<Mode>)> {
        let mut modes = Vec::new();
        for (h, dlm) in self.hosts.iter().enumerate() {
            for (name, granted, wish) in dlm.iter().flat_map(Dlm::wishes) {
                let counts = match (granted, wish) {
                    (_, Some(Wish::Release { .. })) => None,
                    (Some(now), Some(Wish::Mode { mode, .. })) => Some(now.meet(*mode)),
                    (granted, _) => granted,
                };
                modes.push((name.to_owned(), h, counts));
            }
        }
        modes
    }

    fn check(&mut self) {
        let modes = self.modes();
        for (i, (name, host, mode)) in modes.iter().enumerate() {
            for (other_name, other, other_mode) in &modes[..i] {
                if let (true, Some(a), Some(b)) = (name == other_name, mode, other_mode)
                    && !a.is_compatible(*b)
                {
                    let text = format!("{name}: {a:?} on host {} and {b:?} on host {}", host + 1, other + 1);
                    self.violate(text);
                }
            }
        }
        // A name that nobody has a lock of is forgotten, and its value with it.
        self.told.retain(|name, _| modes.iter().any(|m| m.0 == *name && m.2.is_some()));
        let settled = self.hosts.iter().flatten().filter(|h| h.is_settled() && h.view().number == self.view);
        let mut masters: Vec<&str> = settled.flat_map(Dlm::mastered).collect();
        masters.sort_unstable();
        if let Some(twice) = masters.windows(2).find(|w| w[0] == w[1]) {
            let text = format!("{} has two masters", twice[0]);
            self.violate(text);
        }
    }

    fn feed(&mut self, host: usize, input: DlmInput) {
        let mut out = Vec::new();
        if let Some(dlm) = &mut self.hosts[host] {
            dlm.step(input, &mut out);
        }
        self.apply(host, out);
    }

    fn deliver(&mut self) -> bool {
        let full: Vec<(usize, usize)> =
            self.queues.iter().filter(|q| !q.1.is_empty()).map(|q| *q.0).collect();
        if full.is_empty() {
            return false;
        }
        let (from, to) = full[self.rng.below(full.len() as u64) as usize];
        if let Some(message) = self.queues.get_mut(&(from, to)).and_then(VecDeque::pop_front) {
            self.feed(to, DlmInput::Message(HostId(from as u16 + 1), message));
        }
        true
    }

    fn install(&mut self) -> bool {
        let waiting: Vec<usize> = (0..self.hosts.len()).filter(|h| !self.views[*h].is_empty()).collect();
        if waiting.is_empty() {
            return false;
        }
        let host = waiting[self.rng.below(waiting.len() as u64) as usize];
        if let Some(view) = self.views[host].pop_front() {
            self.feed(host, DlmInput::View(view));
        }
        true
    }

    fn operate(&mut self) {
        let live = self.live();
        let host = live[self.rng.below(live.len() as u64) as usize];
        let (name, mode) = (NAMES[self.rng.below(3) as usize], Mode::ALL[self.rng.below(6) as usize]);
        let value = (self.rng.below(2) == 0).then(|| vec![self.rng.below(256) as u8]);
        let (choice, pick) = (self.rng.below(3), self.rng.below(64) as usize);
        let mut out = Vec::new();
        let Some(dlm) = &mut self.hosts[host] else { return };
        let free: Vec<LockId> = dlm.locks().filter(|l| !l.3).map(|l| l.0).collect();
        if dlm.locks().count() < 3 && choice == 0 {
            match dlm.lock(name, mode, &mut out) {
                Ok(_) | Err(LockError::NoMember) => {}
                Err(e) => panic!("{e}"),
            }
        } else if let Some(id) = free.get(pick % free.len().max(1)).copied() {
            let done = match choice {
                1 => dlm.convert(id, mode, value, &mut out),
                _ => dlm.release(id, value, &mut out),
            };
            done.expect("the lock exists and is free");
        }
        self.apply(host, out);
    }

    fn kill(&mut self, host: usize) {
        self.hosts[host] = None;
        self.views[host].clear();
        // What it sent may still arrive, up to somewhere; what was sent to it is lost.
        self.queues.retain(|(_, to), _| *to != host);
        for ((from, _), queue) in &mut self.queues {
            if *from == host {
                queue.truncate(self.rng.below(2 * queue.len() as u64 + 1) as usize);
            }
        }
        self.new_view();
    }

    fn restart(&mut self, n: usize) {
        self.hosts[n] = Some(host(n + 1));
        self.queues.retain(|(from, to), _| *from != n && *to != n);
        self.new_view();
    }

    fn drain(&mut self) {
        for _ in 0..100_000 {
            if !(self.install() | self.deliver()) {
                return;
            }
        }
        self.violate("messages without end".into());
    }

    fn run(mut self, steps: u32) -> (Option<String>, u64) {
        for _ in 0..steps {
            if self.violation.is_some() {
                break;
            }
            match self.rng.below(100) {
                0 if self.live().len() > 1 => {
                    let live = self.live();
                    let host = live[self.rng.below(live.len() as u64) as usize];
                    self.kill(host);
                }
                1 | 2 => {
                    let host = self.rng.below(self.hosts.len() as u64) as usize;
                    if self.hosts[host].is_none() {
                        self.restart(host);
                    }
                }
                3..25 => self.operate(),
                25..40 => drop(self.install()),
                _ => drop(self.deliver()),
            }
        }
        // Everybody gives back what he has until nothing is left.
        for _ in 0..64 {
            self.drain();
            if self.violation.is_some() {
                return (self.violation, self.grants);
            }
            for host in self.live() {
                let mut out = Vec::new();
                let Some(dlm) = &mut self.hosts[host] else { continue };
                let free: Vec<LockId> = dlm.locks().filter(|l| !l.3).map(|l| l.0).collect();
                for id in free {
                    dlm.release(id, None, &mut out).expect("the lock exists and is free");
                }
                self.apply(host, out);
            }
        }
        for dlm in self.hosts.iter().flatten() {
            if dlm.locks().count() + dlm.mastered().count() > 0 {
                let text = format!("{:?} never ends", dlm.locks().next());
                return (self.violation.or(Some(text)), self.grants);
            }
        }
        (self.violation, self.grants)
    }
}

fn run(seed: u64) -> (Option<String>, u64) {
    World::new(seed, 2 + (seed % 3) as usize).run(1500)
}

#[test]
fn random_runs_keep_modes_apart_values_true_and_nobody_waits_for_ever() {
    let mut grants = 0;
    for seed in 0..1500 {
        let (violation, granted) = run(seed);
        assert_eq!(violation, None, "seed {seed}");
        grants += granted;
    }
    assert!(grants > 50_000, "{grants}");
}

#[test]
fn planted_bugs_are_found() {
    for mutant in Mutant::DLM {
        mutants::plant(Some(mutant));
        let found = (0..3000).find(|seed| run(*seed).0.is_some());
        mutants::plant(None);
        assert!(found.is_some(), "{mutant:?} was not found");
    }
}

#[test]
fn the_first_one_masters_a_name_and_of_two_the_lower() {
    let mut world = World::new(1, 3);
    world.drain();
    let mut out = Vec::new();
    for host in [2, 1] {
        let dlm = world.hosts[host].as_mut().expect("it lives");
        dlm.lock("a", Mode::Exclusive, &mut out).expect("it is a member");
        world.apply(host, core::mem::take(&mut out));
    }
    world.drain();
    let masters = |w: &World| -> Vec<usize> {
        (0..3).filter(|h| w.hosts[*h].as_ref().is_some_and(|d| d.mastered().count() > 0)).collect()
    };
    assert_eq!(masters(&world), [1], "hosts 2 and 3 claimed it at once");
    // It stays there while it has locks, also when the lowest host asks, and moves when its master dies.
    let dlm = world.hosts[0].as_mut().expect("it lives");
    dlm.lock("a", Mode::Null, &mut out).expect("it is a member");
    world.apply(0, core::mem::take(&mut out));
    world.drain();
    assert_eq!(masters(&world), [1]);
    world.kill(1);
    world.drain();
    assert_eq!(masters(&world), [0]);
    assert!(world.hosts[2].as_ref().expect("it lives").locks().all(|l| l.2 == Some(Mode::Exclusive)));
}

#[test]
fn nothing_of_a_recovery_is_used_before_all_of_it_is_there() {
    let names = ["a", "b", "c"];
    let mut world = World::new(1, 3);
    world.drain();
    let mut out = Vec::new();
    for name in names {
        let dlm = world.hosts[2].as_mut().expect("it lives");
        dlm.lock(name, Mode::Exclusive, &mut out).expect("it is a member");
        world.apply(2, core::mem::take(&mut out));
        world.drain();
    }
    world.new_view();
    while world.install() {}
    // All but the last part of what host 3 tells, of six; then it dies.
    let parts = world.queues.get_mut(&(2, 0)).expect("it tells host 1");
    assert_eq!(parts.len(), 2 * names.len());
    let last = parts.pop_back();
    let number = |m: &Message| match &m.body {
        Body::Recover { part, more, .. } => (*part, *more),
        other => panic!("{other:?}"),
    };
    assert_eq!(last.as_ref().map(number), Some((5, false)));
    // Others that say they are the last are not taken for it.
    for part in [4, 6] {
        let body = Body::Recover { part, more: false, locks: Vec::new(), mastered: Vec::new() };
        parts.push_back(Message { view: 2, body });
    }
    while world.deliver() {}
    let settled = |w: &World, host: usize| w.hosts[host].as_ref().is_some_and(Dlm::is_settled);
    assert!(!settled(&world, 0) && settled(&world, 1));
    let dlm = world.hosts[0].as_mut().expect("it lives");
    let wanted = dlm.lock("a", Mode::Exclusive, &mut out).expect("it is a member");
    assert_eq!(out, []);
    world.kill(2);
    world.drain();
    assert!(settled(&world, 0) && settled(&world, 1));
    let granted = |w: &World| w.hosts[0].as_ref().and_then(|d| d.locks().find(|l| l.0 == wanted)?.2);
    assert_eq!(granted(&world), Some(Mode::Exclusive));
    assert_eq!(world.violation, None);
}

#[test]
fn what_breaks_the_limits_is_ignored_and_the_highest_version_is_no_overflow() {
    let both = [HostId(1), HostId(2)].into_iter().collect();
    let mut dlm = Dlm::new(HostId(1));
    let mut out = Vec::new();
    dlm.step(DlmInput::View(View::new(1, &both)), &mut out);
    let value = Value { bytes: vec![1], version: u64::MAX, valid: true };
    let told = |name: &str, value: &Value| Told {
        name: name.into(),
        id: 1,
        granted: Some(Mode::Exclusive),
        wish: None,
        value: value.clone(),
    };
    let long = Value { bytes: vec![0; 65], ..value.clone() };
    let recover = |told: Told| {
        let body = Body::Recover { part: 0, more: false, locks: vec![told], mastered: Vec::new() };
        DlmInput::Message(HostId(2), Message { view: 1, body })
    };
    for bad in [told("", &value), told(&"x".repeat(256), &value), told("a", &long)] {
        dlm.step(recover(bad), &mut out);
        assert!(!dlm.is_settled());
    }
    // Host 1 masters the name, which host 2 says that it has written for the last time.
    dlm.lock("a", Mode::Null, &mut out).expect("it is a member");
    dlm.step(DlmInput::View(View::new(2, &both)), &mut out);
    let body = Body::Recover { part: 0, more: false, locks: vec![told("a", &value)], mastered: Vec::new() };
    dlm.step(DlmInput::Message(HostId(2), Message { view: 2, body }), &mut out);
    assert!(dlm.is_settled());
    let wish = Wish::Release { value: Some(vec![2]) };
    let body = Body::Request { name: "a".into(), id: 1, wish };
    out.clear();
    dlm.step(DlmInput::Message(HostId(2), Message { view: 2, body }), &mut out);
    assert!(out.contains(&DlmOutput::Send(HostId(2), Message { view: 2, body: Body::Released { id: 1 } })));
}

#[test]
fn mistakes_are_errors_and_strangers_are_ignored() {
    let mut dlm = Dlm::new(HostId(1));
    let mut out = Vec::new();
    assert_eq!(dlm.lock("a", Mode::Null, &mut out), Err(LockError::NoMember));
    let members = [HostId(1)].into_iter().collect();
    dlm.step(DlmInput::View(View::new(1, &members)), &mut out);
    assert_eq!(dlm.lock("", Mode::Null, &mut out), Err(LockError::Name));
    assert_eq!(dlm.lock(&"x".repeat(256), Mode::Null, &mut out), Err(LockError::Name));
    let id = dlm.lock("a", Mode::Exclusive, &mut out).expect("it is a member");
    assert!(
        out.iter().any(|o| matches!(o, DlmOutput::Event(LockEvent::Granted { mode: Mode::Exclusive, .. })))
    );
    assert_eq!(dlm.convert(id, Mode::Null, Some(vec![0; 65]), &mut out), Err(LockError::Value));
    assert_eq!(dlm.convert(99, Mode::Null, None, &mut out), Err(LockError::Unknown));
    out.clear();
    let body = Body::Request { name: "a".into(), id: 1, wish: Wish::Release { value: None } };
    dlm.step(DlmInput::Message(HostId(9), Message { view: 1, body }), &mut out);
    assert_eq!(out, []);
}

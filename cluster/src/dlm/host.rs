//! One host of the lock manager.

use std::collections::{BTreeMap, BTreeSet};

use super::master::{Owner, Resource, Tell};
use super::recovery::{Account, PART, Recovery};
use super::{
    Body, DlmInput, DlmOutput, LockEvent, LockId, Message, Mode, NAME_MAX, Told, VALUE_SIZE, Value, View,
    Wish,
};
use crate::mutants::{self, Mutant};
use crate::types::HostId;

/// Why a lock cannot be asked for or changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LockError {
    /// The name is empty or too long.
    #[error("Lock name must have 1 to {NAME_MAX} bytes")]
    Name,
    /// The value is too long.
    #[error("Value block has more than {VALUE_SIZE} bytes; shorten it")]
    Value,
    /// There is no such lock.
    #[error("Lock does not exist; it was released")]
    Unknown,
    /// The last change is not over.
    #[error("Lock is being changed; wait for the outcome first")]
    Busy,
    /// The host is in no view.
    #[error("Host is not a member; wait for a view that includes it")]
    NoMember,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Local {
    name: String,
    granted: Option<Mode>,
    wish: Option<Wish>,
    /// The master that knows of the wish.
    asked: Option<HostId>,
    value: Value,
}

/// A claim that not everybody has answered.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Claim {
    attempt: u64,
    missing: Vec<HostId>,
    /// Claims of hosts with higher numbers, to be answered when this one is decided.
    deferred: Vec<(HostId, u64)>,
}

/// The lock manager on one host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Dlm {
    me: HostId,
    view: View,
    locks: BTreeMap<LockId, Local>,
    last_id: LockId,
    /// The names that this host masters.
    mastered: BTreeMap<String, Resource>,
    /// Other names' masters, as far as known.
    masters: BTreeMap<String, HostId>,
    claims: BTreeMap<String, Claim>,
    attempt: u64,
    /// What the members have told so far, while not all have.
    recovery: Option<Recovery>,
    /// Messages that wait for the recovery to end, or for a later view.
    held: Vec<(HostId, Message)>,
    /// Entries in one message of a recovery.
    part: usize,
}

impl Dlm {
    /// A host without locks, in no view.
    pub fn new(me: HostId) -> Self {
        Dlm {
            me,
            view: View::default(),
            locks: BTreeMap::new(),
            last_id: 0,
            mastered: BTreeMap::new(),
            masters: BTreeMap::new(),
            claims: BTreeMap::new(),
            attempt: 0,
            recovery: None,
            held: Vec::new(),
            part: PART,
        }
    }

    /// A host that tells at most so many entries in one message.
    #[cfg(test)]
    pub(super) fn with_part(me: HostId, part: usize) -> Self {
        Dlm { part, ..Dlm::new(me) }
    }

    /// Whether the members have told each other their locks; until then nothing is granted.
    pub fn is_settled(&self) -> bool {
        self.recovery.is_none() && self.view.members.contains(&self.me)
    }

    /// The present view.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// This host's locks: name, granted mode, and whether a change is under way.
    pub fn locks(&self) -> impl Iterator<Item = (LockId, &str, Option<Mode>, bool)> {
        self.locks.iter().map(|(id, l)| (*id, l.name.as_str(), l.granted, l.wish.is_some()))
    }

    /// This host's locks: name, granted mode, and what is wanted.
    #[cfg(test)]
    pub(super) fn wishes(&self) -> impl Iterator<Item = (&str, Option<Mode>, Option<&Wish>)> {
        self.locks.values().map(|l| (l.name.as_str(), l.granted, l.wish.as_ref()))
    }

    /// The names that this host masters.
    pub fn mastered(&self) -> impl Iterator<Item = &str> {
        self.mastered.keys().map(String::as_str)
    }

    /// Asks for a new lock; [`LockEvent::Granted`] tells when it is there.
    ///
    /// # Errors
    /// The name is empty or too long, or the host is not a member.
    pub fn lock(&mut self, name: &str, mode: Mode, out: &mut Vec<DlmOutput>) -> Result<LockId, LockError> {
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(LockError::Name);
        }
        if !self.view.members.contains(&self.me) {
            return Err(LockError::NoMember);
        }
        self.last_id += 1;
        let wish = Some(Wish::Mode { mode, value: None });
        let name = name.to_owned();
        let lock = Local { name, granted: None, wish, asked: None, value: Value::default() };
        self.locks.insert(self.last_id, lock);
        self.route(self.last_id, out);
        Ok(self.last_id)
    }

    /// Asks for another mode; a value is written if the present mode may write. Until the answer only what
    /// both modes allow ([`Mode::meet`]) may be relied on: stop using the rest of the present mode first.
    ///
    /// # Errors
    /// There is no such lock, it is being changed, or the value is too long.
    pub fn convert(
        &mut self,
        id: LockId,
        mode: Mode,
        value: Option<Vec<u8>>,
        out: &mut Vec<DlmOutput>,
    ) -> Result<(), LockError> {
        self.change(id, value, |value| Wish::Mode { mode, value }, out)
    }

    /// Gives a lock back; stop using it first. [`LockEvent::Released`] tells when it is gone.
    ///
    /// # Errors
    /// There is no such lock, it is being changed, or the value is too long.
    pub fn release(
        &mut self,
        id: LockId,
        value: Option<Vec<u8>>,
        out: &mut Vec<DlmOutput>,
    ) -> Result<(), LockError> {
        self.change(id, value, |value| Wish::Release { value }, out)
    }

    fn change(
        &mut self,
        id: LockId,
        value: Option<Vec<u8>>,
        wish: impl FnOnce(Option<Vec<u8>>) -> Wish,
        out: &mut Vec<DlmOutput>,
    ) -> Result<(), LockError> {
        if value.as_ref().is_some_and(|v| v.len() > VALUE_SIZE) {
            return Err(LockError::Value);
        }
        let lock = self.locks.get_mut(&id).ok_or(LockError::Unknown)?;
        if lock.wish.is_some() {
            return Err(LockError::Busy);
        }
        lock.wish = Some(wish(value));
        self.route(id, out);
        Ok(())
    }

    /// Advances the lock manager by one input.
    pub fn step(&mut self, input: DlmInput, out: &mut Vec<DlmOutput>) {
        match input {
            DlmInput::View(view) => self.install(view, out),
            DlmInput::Message(from, message) => self.receive(from, message, out),
        }
    }

    fn send(&self, to: HostId, body: Body, out: &mut Vec<DlmOutput>) {
        out.push(DlmOutput::Send(to, Message { view: self.view.number, body }));
    }

    fn others(&self) -> Vec<HostId> {
        self.view.members.iter().copied().filter(|h| *h != self.me).collect()
    }

    /// Brings a lock's wish to the master of its name, or finds the master first.
    fn route(&mut self, id: LockId, out: &mut Vec<DlmOutput>) {
        let Some(lock) = self.locks.get_mut(&id).filter(|l| l.asked.is_none()) else { return };
        let (Some(wish), None) = (lock.wish.clone(), &self.recovery) else { return };
        let name = lock.name.clone();
        if self.mastered.contains_key(&name) {
            lock.asked = Some(self.me);
            self.serve(&name, (self.me, id), wish, out);
            self.tidy(&name);
        } else if let Some(master) = self.masters.get(&name).copied() {
            lock.asked = Some(master);
            self.send(master, Body::Request { name, id, wish }, out);
        } else {
            self.claim(name, out);
        }
    }

    fn route_all(&mut self, name: &str, out: &mut Vec<DlmOutput>) {
        let ids: Vec<LockId> = self.locks.iter().filter(|(_, l)| l.name == name).map(|(id, _)| *id).collect();
        for id in ids {
            self.route(id, out);
        }
    }

    fn claim(&mut self, name: String, out: &mut Vec<DlmOutput>) {
        if self.claims.contains_key(&name) {
            return;
        }
        self.attempt += 1;
        let (attempt, missing) = (self.attempt, self.others());
        for host in &missing {
            self.send(*host, Body::Claim { name: name.clone(), attempt }, out);
        }
        self.claims.insert(name.clone(), Claim { attempt, missing, deferred: Vec::new() });
        self.win(&name, out);
    }

    /// Becomes the master once everybody has consented.
    fn win(&mut self, name: &str, out: &mut Vec<DlmOutput>) {
        if self.claims.get(name).is_none_or(|c| !c.missing.is_empty()) {
            return;
        }
        let Some(claim) = self.claims.remove(name) else { return };
        self.mastered.insert(name.to_owned(), Resource::default());
        for (host, attempt) in claim.deferred {
            self.send(host, Body::Mastered { name: name.to_owned(), attempt }, out);
        }
        self.route_all(name, out);
    }

    /// Gives a claim up, and consents to those that waited for its outcome.
    fn yield_claim(&mut self, name: &str, out: &mut Vec<DlmOutput>) {
        for (host, attempt) in self.claims.remove(name).map(|c| c.deferred).unwrap_or_default() {
            self.send(host, Body::Consent { name: name.to_owned(), attempt }, out);
        }
    }

    fn receive(&mut self, from: HostId, message: Message, out: &mut Vec<DlmOutput>) {
        let stale = message.view < self.view.number && !mutants::active(Mutant::OldViewAccepted);
        let ahead = message.view > self.view.number;
        if stale || (!ahead && !self.view.members.contains(&from)) || !message.body.is_bounded() {
            return;
        }
        if ahead || (self.recovery.is_some() && !matches!(message.body, Body::Recover { .. })) {
            self.held.push((from, message));
            return;
        }
        match message.body {
            Body::Claim { name, attempt } => self.on_claim(from, name, attempt, out),
            Body::Consent { name, attempt } => {
                if let Some(claim) = self.claims.get_mut(&name).filter(|c| c.attempt == attempt) {
                    claim.missing.retain(|h| *h != from);
                    self.win(&name, out);
                }
            }
            Body::Mastered { name, attempt } => {
                if self.claims.get(&name).is_some_and(|c| c.attempt == attempt) {
                    self.yield_claim(&name, out);
                    self.masters.insert(name.clone(), from);
                    self.route_all(&name, out);
                }
            }
            Body::Request { name, id, wish } => {
                if self.mastered.contains_key(&name) {
                    self.serve(&name, (from, id), wish, out);
                    self.tidy(&name);
                } else {
                    self.send(from, Body::NotMaster { name, id }, out);
                }
            }
            Body::NotMaster { name, id } => {
                if self.masters.get(&name) == Some(&from) {
                    self.masters.remove(&name);
                }
                if let Some(lock) = self.locks.get_mut(&id).filter(|l| l.asked == Some(from)) {
                    lock.asked = None;
                    self.route(id, out);
                }
            }
            Body::Granted { id, mode, value } => self.tell(Tell::Granted((self.me, id), mode, value), out),
            Body::Deadlock { id } => self.tell(Tell::Deadlock((self.me, id)), out),
            Body::Released { id } => self.tell(Tell::Released((self.me, id)), out),
            Body::Blocking { id, mode } => self.tell(Tell::Blocking((self.me, id), mode), out),
            Body::Recover { part, more, locks, mastered } => {
                if let Some(recovery) = &mut self.recovery {
                    recovery.entry(from).or_default().take(part, more, locks, mastered);
                    self.settle(out);
                }
            }
        }
    }

    fn on_claim(&mut self, from: HostId, name: String, attempt: u64, out: &mut Vec<DlmOutput>) {
        if self.mastered.contains_key(&name) {
            return self.send(from, Body::Mastered { name, attempt }, out);
        }
        match self.claims.get_mut(&name) {
            Some(claim) if self.me < from => claim.deferred.push((from, attempt)),
            Some(_) if !mutants::active(Mutant::ClaimNeverYields) => {
                self.yield_claim(&name, out);
                self.send(from, Body::Consent { name: name.clone(), attempt }, out);
                // The other one will say that it masters the name.
                self.claim(name, out);
            }
            _ => self.send(from, Body::Consent { name, attempt }, out),
        }
    }

    /// Carries out a wish on a name that this host masters.
    fn serve(&mut self, name: &str, owner: Owner, wish: Wish, out: &mut Vec<DlmOutput>) {
        let Some(resource) = self.mastered.get_mut(name) else { return };
        let mut tells = Vec::new();
        match wish {
            Wish::Mode { mode, value } => resource.want(owner, mode, value, &mut tells),
            Wish::Release { value } => resource.release(owner, value, &mut tells),
        }
        for tell in tells {
            self.tell(tell, out);
        }
    }

    /// Stops mastering a name that nobody locks any more.
    fn tidy(&mut self, name: &str) {
        if self.mastered.get(name).is_some_and(Resource::is_empty) {
            self.mastered.remove(name);
        }
    }

    /// Tells a lock's owner what happened to it.
    fn tell(&mut self, tell: Tell, out: &mut Vec<DlmOutput>) {
        let (Tell::Granted(owner, ..)
        | Tell::Deadlock(owner)
        | Tell::Released(owner)
        | Tell::Blocking(owner, _)) = tell;
        let (host, id) = owner;
        if host != self.me {
            let body = match tell {
                Tell::Granted(_, mode, value) => Body::Granted { id, mode, value },
                Tell::Deadlock(_) => Body::Deadlock { id },
                Tell::Released(_) => Body::Released { id },
                Tell::Blocking(_, mode) => Body::Blocking { id, mode },
            };
            return self.send(host, body, out);
        }
        let Some(lock) = self.locks.get_mut(&id) else { return };
        match tell {
            Tell::Granted(_, mode, value) => {
                (lock.granted, lock.wish, lock.asked) = (Some(mode), None, None);
                lock.value = value.clone();
                out.push(DlmOutput::Event(LockEvent::Granted { id, mode, value }));
            }
            Tell::Deadlock(_) => {
                (lock.wish, lock.asked) = (None, None);
                out.push(DlmOutput::Event(LockEvent::Deadlock(id)));
            }
            Tell::Released(_) => {
                self.locks.remove(&id);
                out.push(DlmOutput::Event(LockEvent::Released(id)));
            }
            Tell::Blocking(_, mode) => out.push(DlmOutput::Event(LockEvent::Blocking { id, mode })),
        }
    }

    /// Begins a new view: tells everybody everything.
    fn install(&mut self, view: View, out: &mut Vec<DlmOutput>) {
        if view.number <= self.view.number {
            return;
        }
        self.view = view;
        self.claims.clear();
        self.masters.clear();
        if !self.view.members.contains(&self.me) {
            // The others act as if this host were gone, and so it has nothing any more.
            self.mastered.clear();
            self.recovery = None;
            for id in core::mem::take(&mut self.locks).into_keys() {
                out.push(DlmOutput::Event(LockEvent::Released(id)));
            }
            return;
        }
        for resource in self.mastered.values_mut() {
            if resource.loses_writer(&self.view.members) && !mutants::active(Mutant::ValueOfTheDeadTrusted) {
                resource.value.valid = false;
            }
        }
        let told = |(id, l): (&LockId, &mut Local)| {
            l.asked = None;
            let (name, granted, wish, value) = (l.name.clone(), l.granted, l.wish.clone(), l.value.clone());
            Told { name, id: *id, granted, wish, value }
        };
        let locks: Vec<Told> = self.locks.iter_mut().map(told).collect();
        let mastered: Vec<(String, Value)> =
            self.mastered.iter().map(|(name, r)| (name.clone(), r.value.clone())).collect();
        let account = Account::whole(locks, mastered);
        let messages = account.messages(self.part);
        for host in self.others() {
            messages.iter().for_each(|body| self.send(host, body.clone(), out));
        }
        self.recovery = Some([(self.me, account)].into());
        self.settle(out);
        self.take_held(out);
    }

    /// Looks again at the messages that were held back.
    fn take_held(&mut self, out: &mut Vec<DlmOutput>) {
        for (from, message) in core::mem::take(&mut self.held) {
            self.receive(from, message, out);
        }
    }

    /// Once everybody has told everything: finds the masters and rebuilds what this host masters.
    fn settle(&mut self, out: &mut Vec<DlmOutput>) {
        let members = &self.view.members;
        let told = |r: &mut Recovery| members.iter().all(|h| r.get(h).is_some_and(Account::is_complete));
        let Some(recovery) = self.recovery.take_if(told) else { return };
        let mut masters: BTreeMap<&str, HostId> = BTreeMap::new();
        let mut values: BTreeMap<&str, &Value> = BTreeMap::new();
        for (host, account) in &recovery {
            for (name, value) in &account.mastered {
                masters.entry(name).or_insert(*host);
                values.entry(name).or_insert(value);
            }
        }
        // In ascending order of hosts: the lowest one with a lock masters a name whose master is gone.
        let all = || recovery.iter().flat_map(|(h, account)| account.locks.iter().map(|l| (*h, l)));
        for (host, lock) in all() {
            masters.entry(&lock.name).or_insert(host);
        }
        self.mastered.clear();
        for (host, lock) in all().filter(|(_, l)| masters.get(l.name.as_str()) == Some(&self.me)) {
            let resource = self.mastered.entry(lock.name.clone()).or_default();
            if let Some(mode) = lock.granted {
                resource.restore((host, lock.id), mode);
            }
            match values.get(lock.name.as_str()) {
                Some(value) => resource.value = (*value).clone(),
                None if lock.value.version >= resource.value.version => resource.value = lock.value.clone(),
                None => {}
            }
        }
        let writers: BTreeSet<&str> =
            all().filter(|(_, l)| l.still_writes()).map(|(_, l)| l.name.as_str()).collect();
        for (name, resource) in &mut self.mastered {
            // The former master is gone. Only a writer that is left knows that nobody wrote after it.
            let known = values.contains_key(name.as_str()) || writers.contains(name.as_str());
            if !known && !mutants::active(Mutant::ValueOfTheDeadTrusted) {
                resource.doubt();
            }
        }
        for (host, lock) in all().filter(|(h, _)| *h == self.me) {
            let master = masters.get(lock.name.as_str()).copied().unwrap_or(host);
            if master != self.me {
                self.masters.insert(lock.name.clone(), master);
            }
            if let Some(mine) = self.locks.get_mut(&lock.id).filter(|_| lock.wish.is_some()) {
                mine.asked = Some(master);
            }
        }
        for (host, lock) in all() {
            let (Some(mut wish), Some(resource)) = (lock.wish.clone(), self.mastered.get(&lock.name)) else {
                continue;
            };
            // A write that the former master, or this one, has carried out already must not come again, over
            // what others wrote after it: while its owner could write, nobody else raised the version.
            if resource.value.version != lock.value.version {
                let (Wish::Mode { value, .. } | Wish::Release { value }) = &mut wish;
                *value = None;
            }
            self.serve(&lock.name, (host, lock.id), wish, out);
        }
        self.mastered.retain(|_, r| !r.is_empty());
        let view = self.view.number;
        self.mastered.values_mut().for_each(|r| r.end_doubt(view));
        let late: Vec<LockId> = self.locks.keys().copied().collect();
        for id in late {
            self.route(id, out);
        }
        self.take_held(out);
    }
}

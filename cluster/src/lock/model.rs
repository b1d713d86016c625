//! The real [`Locker`] checked exhaustively: two hosts, every order of their I/O, hand-overs, and the end
//! of a host at any moment.

use stateright::{Checker, Model, Property};

use super::*;
use crate::lease::{OpId, Timing};
use crate::ondisk::HostBlock;
use crate::types::{Time, Token};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Host {
    locker: Locker,
    generation: Generation,
    /// I/O on its way; it may be carried out in any order with the other host's.
    io: Vec<(OpId, Io)>,
    /// The disk is in use.
    using: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Io {
    ReadLeader,
    ReadBlocks,
    WriteBlock(HostBlock),
    WriteLeader(Leader),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    hosts: Vec<Host>,
    leader: Leader,
    blocks: Vec<HostBlock>,
    /// Everything up to this generation of each host is known to be over.
    gone: Vec<Generation>,
    /// The highest token ever used.
    top: u64,
    /// A token was used that is not above all earlier ones.
    regressed: bool,
    steps: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Act {
    Acquire(usize),
    Release(usize),
    HandOver(usize),
    CarryOut(usize),
    Retry(usize),
    End(usize),
}

struct Protocol {
    steps: u8,
}

struct Ctx<'a> {
    gone: &'a [Generation],
    generation: Generation,
}

impl LockContext for Ctx<'_> {
    fn owner(&self, owner: Incarnation) -> OwnerState {
        let gone = self.gone.get(usize::from(owner.host.0) - 1).is_some_and(|g| *g >= owner.generation);
        if gone { OwnerState::Gone } else { OwnerState::Alive }
    }
    fn fresh_generation(&self) -> Option<Generation> {
        Some(self.generation)
    }
}

fn id(i: usize) -> HostId {
    HostId(i as u16 + 1)
}

impl World {
    fn input(&mut self, i: usize, input: LockInput) {
        self.input_at(Time(0), i, input);
    }

    fn input_at(&mut self, now: Time, i: usize, input: LockInput) {
        let mut out = Vec::new();
        let host = &mut self.hosts[i];
        let ctx = Ctx { gone: &self.gone, generation: host.generation };
        host.locker.step(now, input, &ctx, &mut out);
        for o in out {
            match o {
                LockOutput::ReadLeader { op } => host.io.push((op, Io::ReadLeader)),
                LockOutput::ReadBlocks { op } => host.io.push((op, Io::ReadBlocks)),
                LockOutput::WriteBlock { op, block } => host.io.push((op, Io::WriteBlock(block))),
                LockOutput::WriteLeader { op, leader } => host.io.push((op, Io::WriteLeader(leader))),
                LockOutput::Acquired(Token { lver, .. }) => {
                    self.regressed |= lver <= self.top;
                    self.top = self.top.max(lver);
                    host.using = true;
                }
                LockOutput::HandOverFailed { still_ours } => host.using = still_ours,
                _ => {}
            }
        }
    }
}

impl Model for Protocol {
    type State = World;
    type Action = Act;

    fn init_states(&self) -> Vec<World> {
        let host = |i: usize| Host {
            locker: Locker::new(id(i), Timing::default()),
            generation: 1,
            io: Vec::new(),
            using: false,
        };
        vec![World {
            hosts: (0..2).map(host).collect(),
            leader: Leader::default(),
            blocks: vec![HostBlock::default(); 2],
            gone: vec![0; 2],
            top: 0,
            regressed: false,
            steps: 0,
        }]
    }

    fn actions(&self, w: &World, actions: &mut Vec<Act>) {
        if w.steps >= self.steps {
            return;
        }
        for (i, h) in w.hosts.iter().enumerate() {
            if !h.io.is_empty() {
                actions.push(Act::CarryOut(i));
            } else if h.locker.held().is_some() {
                actions.extend([Act::Release(i), Act::HandOver(i)]);
            } else if h.locker.is_idle() {
                actions.push(Act::Acquire(i));
            } else {
                actions.push(Act::Retry(i));
            }
            if h.generation == 1 {
                actions.push(Act::End(i));
            }
        }
    }

    fn next_state(&self, last: &World, act: Act) -> Option<World> {
        let mut w = last.clone();
        w.steps += 1;
        match act {
            Act::Acquire(i) => w.input(i, LockInput::Acquire(LockMode::Exclusive)),
            Act::Release(i) => {
                w.hosts[i].using = false;
                w.input(i, LockInput::Release);
            }
            Act::HandOver(i) => {
                w.hosts[i].using = false;
                let to = 1 - i;
                let owner = Incarnation { host: id(to), generation: w.hosts[to].generation };
                w.input(i, LockInput::HandOver(owner));
            }
            Act::CarryOut(i) => {
                let (op, io) = w.hosts[i].io.remove(0);
                let input = match io {
                    Io::ReadLeader => LockInput::LeaderRead { op, result: Ok(w.leader) },
                    Io::ReadBlocks => LockInput::BlocksRead { op, result: Ok(w.blocks.clone()) },
                    Io::WriteBlock(block) => {
                        w.blocks[i] = block;
                        LockInput::Wrote { op, result: Ok(()) }
                    }
                    Io::WriteLeader(leader) => {
                        w.leader = leader;
                        LockInput::Wrote { op, result: Ok(()) }
                    }
                };
                w.input(i, input);
            }
            // A host that lost a ballot waited long enough.
            Act::Retry(i) => w.input_at(Time(1 << 30), i, LockInput::Tick),
            // The host ends, with its I/O undone, and starts anew; everyone knows.
            Act::End(i) => {
                w.gone[i] = w.hosts[i].generation;
                w.hosts[i] = Host {
                    locker: Locker::new(id(i), Timing::default()),
                    generation: w.hosts[i].generation + 1,
                    io: Vec::new(),
                    using: false,
                };
            }
        }
        Some(w)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("one user", |_, w: &World| w.hosts.iter().filter(|h| h.using).count() <= 1),
            Property::always("tokens rise", |_, w: &World| !w.regressed),
            Property::sometimes("the lock changes hosts", |_, w: &World| w.top >= 2),
        ]
    }
}

#[test]
fn every_order_of_two_hosts_keeps_one_user() {
    let checker = Protocol { steps: 24 }.checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    assert!(checker.unique_state_count() > 10_000, "{}", checker.unique_state_count());
}

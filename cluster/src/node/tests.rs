//! What one node does with what it is sent.

use std::sync::Arc;

use super::{Config, Message, Node, NodeInput, NodeOutput, VmAction, VmEvent};
use crate::ha::{Ailment, Command, HaConfig, Signs, VmSpec, VmStatus};
use crate::lease::{DeltaRecord, Timing};
use crate::membership::MembershipConfig;
use crate::ondisk::Name;
use crate::types::{HostId, Incarnation, LockspaceId, ResourceId, Resources, Time, VmId};

const ME: HostId = HostId(1);
const VM: VmId = VmId(7);

fn node(boot: u64) -> Node {
    Node::new(Time(1000), config(), boot)
}

fn config() -> Config {
    Config {
        host: ME,
        name: Name::new("a").unwrap(),
        timing: Timing { io_timeout: 5, watchdog: 30 },
        lockspaces: 1,
        watchdog: true,
        capacity: Resources { cpu: 1000, memory: 1024 },
        // Alone, it has quorum.
        membership: MembershipConfig::new(ME, vec![ME]),
        ha: HaConfig::default(),
        fencing: Vec::new(),
        witness: None,
        stop_grace: 20_000,
    }
}

/// A VM without disks needs no locks.
fn spec() -> Arc<VmSpec> {
    let demand = Resources { cpu: 100, memory: 128 };
    let (depends_on, disks, definition) = (Vec::new(), Vec::new(), String::new());
    Arc::new(VmSpec { id: VM, priority: 0, depends_on, demand, disks, definition })
}

fn start(epoch: u64) -> Command {
    Command::Start { spec: spec(), epoch, gone: Vec::new() }
}

fn receive(epoch: u64) -> Command {
    Command::Receive { spec: spec(), epoch, from: Incarnation { host: HostId(2), generation: 1 } }
}

/// What the node does with VMs after a command to a life of its host.
fn obey(node: &mut Node, now: u64, generation: u64, token: u64, command: Command) -> Vec<VmAction> {
    let to = Incarnation { host: ME, generation };
    let mut out = Vec::new();
    node.step(Time(now), NodeInput::Message(Message::Command { token, to, command }), &mut out);
    let action = |o| if let NodeOutput::Vm { action, .. } = o { Some(action) } else { None };
    out.into_iter().filter_map(action).collect()
}

fn tell(node: &mut Node, now: u64, epoch: u64, event: VmEvent) {
    node.step(Time(now), NodeInput::Vm { vm: VM, epoch, event }, &mut Vec::new());
}

fn reported(node: &Node, now: u64) -> Vec<(u64, VmStatus)> {
    node.vm_reports(Time(now)).iter().map(|r| (r.epoch, r.status)).collect()
}

#[test]
fn a_command_to_a_former_life_is_ignored_and_one_to_this_life_obeyed() {
    let mut node = node(2);
    assert_eq!(obey(&mut node, 1001, 1, 9, start(1)), []);
    // Nor does its token count.
    assert_eq!(obey(&mut node, 1001, 2, 5, start(1)), [VmAction::Start(spec())]);
}

#[test]
fn a_command_of_an_older_coordinator_is_ignored() {
    let mut node = node(1);
    assert_eq!(obey(&mut node, 1001, 1, 5, start(1)), [VmAction::Start(spec())]);
    assert_eq!(obey(&mut node, 1002, 1, 4, Command::Stop { vm: VM, epoch: 1 }), []);
    assert_eq!(obey(&mut node, 1003, 1, 5, Command::Stop { vm: VM, epoch: 1 }), [VmAction::Stop]);
}

#[test]
fn a_placement_that_ended_is_not_started_again_and_is_reported_while_it_is_asked_for() {
    let mut node = node(1);
    assert_eq!(obey(&mut node, 1001, 1, 1, start(3)), [VmAction::Start(spec())]);
    tell(&mut node, 1002, 3, VmEvent::Started);
    tell(&mut node, 1003, 3, VmEvent::Exited);
    // The coordinator has not heard of it yet, and repeats.
    assert_eq!(obey(&mut node, 50_000, 1, 1, start(3)), []);
    assert_eq!(reported(&node, 109_000), [(3, VmStatus::Failed)]);
    assert_eq!(reported(&node, 111_000), []);
    assert_eq!(obey(&mut node, 200_000, 1, 1, start(3)), []);
    assert_eq!(reported(&node, 200_001), [(3, VmStatus::Failed)]);
    // The next placement is another matter.
    assert_eq!(obey(&mut node, 200_002, 1, 1, start(4)), [VmAction::Start(spec())]);
}

#[test]
fn a_vm_whose_disks_hang_is_killed_and_its_placement_ends_as_stalled() {
    let mut node = node(1);
    obey(&mut node, 1001, 1, 1, start(1));
    tell(&mut node, 1002, 1, VmEvent::Started);
    let signs = Signs { pending: 1, ..Signs::default() };
    let looked = |node: &mut Node, now| {
        let mut out = Vec::new();
        node.step(Time(now), NodeInput::Signs(vec![(VM, 1, signs)]), &mut out);
        out.retain(|o| matches!(o, NodeOutput::Ailing { .. } | NodeOutput::Vm { .. }));
        out
    };
    // From the first look on for the default of 120 s.
    let early = (5..125).step_by(5).any(|s| !looked(&mut node, s * 1000).is_empty());
    assert!(!early);
    let ailing = NodeOutput::Ailing { vm: VM, epoch: 1, ailment: Ailment::IoStalled };
    let kill = NodeOutput::Vm { vm: VM, epoch: 1, action: VmAction::Kill };
    assert_eq!(looked(&mut node, 125_000), [ailing, kill]);
    assert_eq!(looked(&mut node, 130_000), []);
    tell(&mut node, 131_000, 1, VmEvent::Exited);
    assert_eq!(reported(&node, 131_001), [(1, VmStatus::Stalled)]);
}

#[test]
fn a_move_that_failed_may_be_tried_again_later_and_does_not_stand_in_the_way_of_a_start() {
    let mut node = node(1);
    assert!(matches!(obey(&mut node, 1001, 1, 1, receive(2))[..], [VmAction::Receive { .. }]));
    tell(&mut node, 1002, 2, VmEvent::Exited);
    assert_eq!(reported(&node, 1003), [(2, VmStatus::NotReceived)]);
    assert_eq!(obey(&mut node, 60_000, 1, 1, receive(2)), []);
    assert!(matches!(obey(&mut node, 61_003, 1, 1, receive(2))[..], [VmAction::Receive { .. }]));
    tell(&mut node, 61_004, 2, VmEvent::Exited);
    assert_eq!(obey(&mut node, 61_005, 1, 1, start(2)), [VmAction::Start(spec())]);
}

#[test]
fn the_witness_is_sought_until_it_is_had() {
    let witness = ResourceId { lockspace: LockspaceId(0), index: 0 };
    // Half of the members are heard from the first moment on, when there is no lease to take locks under.
    let membership = MembershipConfig::new(ME, vec![ME, HostId(2)]);
    let mut node = Node::new(Time(1000), Config { membership, witness: Some(witness), ..config() }, 1);
    let mut sector = DeltaRecord::default();
    let sought = (1000..60_000).step_by(500).any(|now| {
        let mut inputs = vec![NodeInput::Tick];
        while let Some(input) = inputs.pop() {
            let mut out = Vec::new();
            node.step(Time(now), input, &mut out);
            for output in out {
                match output {
                    NodeOutput::ReadDelta { lockspace, op } => {
                        inputs.push(NodeInput::DeltaRead { lockspace, op, result: Ok(sector) });
                    }
                    NodeOutput::WriteDelta { lockspace, op, record } => {
                        sector = record;
                        inputs.push(NodeInput::DeltaWrote { lockspace, op, result: Ok(()) });
                    }
                    NodeOutput::ReadLeader { resource, .. } => return resource == witness,
                    _ => {}
                }
            }
        }
        false
    });
    assert!(sought);
}

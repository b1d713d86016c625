//! Any frames and rules through two switches: one whose caches are warm decides as one that takes the slow path for
//! every packet, and neither sends a frame back where it came from unless a rule says so.
#![no_main]

use arbitrary::Arbitrary;
use fuzz::reached;
use libfuzzer_sys::fuzz_target;
use vswitch::packet::key::Field;
use vswitch::pipeline::{Action, ConntrackAction, FlowSpec, Instructions, Location, Match};
use vswitch::{Clock, Endpoint, OffloadCaps, PortConfig, PortId, Switch, VlanMode};

const PORTS: u16 = 4;
const FIELDS: [Field; 24] = [
    Field::InPort,
    Field::Vlan,
    Field::InnerVlan,
    Field::EthDst,
    Field::EthType,
    Field::EthSrc,
    Field::IpProto,
    Field::IpTos,
    Field::TpSrc,
    Field::TpDst,
    Field::IpTtl,
    Field::Frag,
    Field::TcpFlags,
    Field::IpSrc,
    Field::IpDst,
    Field::FlowLabel,
    Field::ArpSha,
    Field::ArpTha,
    Field::NdTarget,
    Field::TunId,
    Field::Metadata,
    Field::Reg(0),
    Field::Reg(5),
    Field::CtState,
];

#[derive(Arbitrary, Debug)]
enum Step {
    Output(u8),
    InPort,
    Flood,
    Normal,
    PushVlan,
    PopVlan,
    Set { field: u8, value: u128, mask: u128 },
    Move { from: u8, to: u8, offset: u8, bits: u8 },
    DecTtl,
    Resubmit(u8),
    Track { commit: bool, table: u8 },
}

#[derive(Arbitrary, Debug)]
struct Rule {
    table: u8,
    field: u8,
    value: u128,
    mask: u128,
    goto: bool,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
struct Case {
    rules: Vec<Rule>,
    frames: Vec<(u8, Vec<u8>)>,
}

fn field(n: u8) -> Field {
    FIELDS[usize::from(n) % FIELDS.len()]
}

impl Step {
    fn action(&self) -> Action {
        match *self {
            Step::Output(port) => Action::Output(PortId::from(port % 6)),
            Step::InPort => Action::InPort,
            Step::Flood => Action::Flood,
            Step::Normal => Action::Normal,
            Step::PushVlan => Action::PushVlan(0x8100),
            Step::PopVlan => Action::PopVlan,
            Step::Set { field: f, value, mask } => Action::SetField { field: field(f), value, mask },
            Step::Move { from, to, offset, bits } => {
                let (from, to) = (field(from), field(to));
                let bits = (1 + u32::from(bits)).min(from.bits()).min(to.bits());
                let offset = u32::from(offset) % (from.bits().min(to.bits()) - bits + 1);
                let location = |field| Location { field, offset, bits };
                Action::Move { from: location(from), to: location(to) }
            }
            Step::DecTtl => Action::DecTtl,
            Step::Resubmit(table) => Action::Resubmit { table: Some(table % 3), in_port: None },
            Step::Track { commit, table } => {
                let table = (table % 4 < 3).then_some(table % 4);
                Action::Conntrack(ConntrackAction { zone: 1, commit, table, ..ConntrackAction::default() })
            }
        }
    }
}

impl Rule {
    /// Distinct priorities: overlapping rules of equal priority have no defined winner.
    fn spec(&self, priority: usize) -> FlowSpec {
        let table = self.table % 3;
        let actions = self.steps.iter().take(8).map(Step::action).collect();
        FlowSpec {
            table,
            priority: priority as u16 + 1,
            matches: Match::default().masked(field(self.field), self.value, self.mask),
            instructions: Instructions {
                goto: self.goto.then_some(table + 1),
                ..Instructions::apply(actions)
            },
            ..FlowSpec::default()
        }
    }
}

struct World {
    switch: Switch,
    ends: Vec<Endpoint>,
}

impl World {
    fn new(rules: &[Rule]) -> Self {
        let switch = Switch::builder().workers(0).clock(Clock::manual()).build().expect("switch");
        let mut ends = Vec::new();
        for i in 0..PORTS {
            let (port, end) = Endpoint::pair(64, OffloadCaps::empty()).expect("pair");
            let vlan = if i == 3 { VlanMode::Access(7) } else { VlanMode::default() };
            let config = PortConfig { vlan, ..PortConfig::default() };
            switch.add_port(&format!("p{i}"), port, config).expect("port");
            ends.push(end);
        }
        for (n, rule) in rules.iter().take(8).enumerate() {
            if switch.add_flow(rule.spec(n)).is_ok() {
                reached("rule");
            }
        }
        Self { switch, ends }
    }

    fn send(&self, from: usize, frame: &[u8]) -> Vec<Vec<Vec<u8>>> {
        self.ends[from].send(frame);
        self.switch.settle(4);
        let received = |end: &Endpoint| end.recv_burst(64).into_iter().map(|(f, _)| f).collect();
        self.ends.iter().map(received).collect()
    }
}

fuzz_target!(|case: Case| {
    let [warm, cold] = [World::new(&case.rules), World::new(&case.rules)];
    for (from, frame) in case.frames.iter().take(32) {
        let from = usize::from(*from) % usize::from(PORTS);
        // The second time by the cache, on one of them.
        for _ in 0..2 {
            // Any change of the configuration empties the caches.
            cold.switch.set_mirrors(Vec::new());
            let got = warm.send(from, frame);
            assert_eq!(got, cold.send(from, frame));
            assert!(!case.rules.is_empty() || got[from].is_empty(), "a frame went back where it came from");
            if got.iter().any(|frames| !frames.is_empty()) {
                reached("frame");
            }
        }
    }
});

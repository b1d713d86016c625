//! Property: a switch whose caches are warm decides as one that takes the slow path for every packet, rules that come,
//! go and change included.
#![expect(clippy::unwrap_used, reason = "a test ends where a step fails")]

mod common;

use std::time::Duration;

use common::{arp, drain, mac, tcp, udp};
use proptest::prelude::*;
use vswitch::packet::key::Field;
use vswitch::pipeline::{Action, ConntrackAction, FlowFilter, FlowSpec, Instructions, Match};
use vswitch::{Binding, Endpoint, MacAddr, Marking, PortConfig, Switch, VlanMode, VlanSet, ct_state};

const PORTS: usize = 4;
const RULES: usize = 6;

fn config() -> impl Strategy<Value = PortConfig> {
    let vlan = prop_oneof![
        Just(VlanMode::default()),
        (5u16..7).prop_map(VlanMode::Access),
        (5u16..7).prop_map(|native| VlanMode::Trunk { native, allowed: VlanSet::parse("5-6").unwrap() }),
        Just(VlanMode::Tunnel(5)),
    ];
    (vlan, any::<[bool; 6]>(), 0u8..4, 0usize..3).prop_map(|(vlan, b, who, mac_limit)| PortConfig {
        vlan,
        mac_limit,
        isolated: b[0],
        bindings: vec![Binding {
            mac: MacAddr(mac(who)),
            ips: vec![format!("10.0.0.{who}").parse().unwrap()],
        }],
        anti_spoof: b[1] && b[2],
        source_guard: b[3] && b[2],
        dhcp_guard: b[4],
        security_groups: if b[5] && b[0] { vec!["g".into()] } else { Vec::new() },
        marking: Marking { dscp: (b[1] && b[5]).then_some(who * 9), pcp: (b[3] && b[5]).then_some(who) },
        ..PortConfig::default()
    })
}

fn matching() -> impl Strategy<Value = Match> {
    let m = prop_oneof![
        (1u128..=4).prop_map(|p| Match::default().field(Field::InPort, p)),
        (0u8..4).prop_map(|d| Match::default().field(Field::EthDst, 0x0200_0000_0000 + u128::from(d))),
        (0u128..2)
            .prop_map(|p| Match::default().field(Field::EthType, 0x800).field(Field::IpProto, 6 + p * 11)),
        (1u128..4).prop_map(|p| Match::default().field(Field::TpDst, p)),
        (0u128..4).prop_map(|a| Match::default().masked(Field::IpSrc, 0x0a00_0000 + a, 0xffff_ffff)),
        Just(Match::default().masked(Field::Vlan, 0x1000, 0x1000)),
        Just(Match::default().masked(Field::CtState, ct_state::NEW.into(), ct_state::NEW.into())),
        Just(Match::default().masked(
            Field::CtState,
            ct_state::ESTABLISHED.into(),
            ct_state::ESTABLISHED.into()
        )),
        (1u128..4).prop_map(|v| Match::default().field(Field::Reg(1), v)),
        Just(Match::default()),
    ];
    proptest::collection::vec(m, 1..3).prop_map(|parts| {
        parts
            .into_iter()
            .reduce(|mut a, b| {
                a.mask.join(&b.mask);
                a.value = b.value.w.iter().zip(&b.mask.w).enumerate().fold(a.value, |mut v, (i, (w, m))| {
                    v.w[i] = (v.w[i] & !m) | w;
                    v
                });
                a
            })
            .unwrap()
    })
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        3 => Just(Action::Normal),
        3 => (1u32..6).prop_map(Action::Output),
        1 => Just(Action::Flood),
        1 => Just(Action::InPort),
        1 => Just(Action::PushVlan(0x8100)),
        1 => Just(Action::PopVlan),
        1 => Just(Action::DecTtl),
        1 => (0u128..4).prop_map(|v| Action::SetField { field: Field::EthDst, value: 0x0200_0000_0000 + v, mask: Field::EthDst.ones() }),
        1 => (0u128..4).prop_map(|v| Action::SetField { field: Field::IpDst, value: 0x0a00_0000 + v, mask: 0xff }),
        1 => (0u128..4).prop_map(|v| Action::SetField { field: Field::TpDst, value: v, mask: 0xffff }),
        1 => (5u128..7).prop_map(|v| Action::SetField { field: Field::Vlan, value: v, mask: 0xfff }),
        1 => (0u128..4).prop_map(|v| Action::SetField { field: Field::Reg(1), value: v, mask: 0xff }),
        2 => (1u8..3).prop_map(|t| Action::Resubmit { table: Some(t), in_port: None }),
        2 => (any::<bool>(), proptest::option::of(1u8..3)).prop_map(|(commit, table)| {
            Action::Conntrack(ConntrackAction { zone: 1, commit, table, ..ConntrackAction::default() })
        }),
    ]
}

fn frame() -> impl Strategy<Value = Vec<u8>> {
    let base = prop_oneof![
        4 => (0u8..4, 0u8..4, 1u16..4, 1u16..4).prop_map(|(s, d, sp, dp)| udp(s, d, sp, dp)),
        4 => (0u8..4, 0u8..4, 1u16..3, 1u16..3, 0usize..6).prop_map(|(s, d, sp, dp, f)| {
            tcp(s, d, sp, dp, ["S", "SA", "A", "FA", "R", ""][f])
        }),
        1 => (0u8..4, 1u8..3, 0u8..4, 0u8..4).prop_map(|(s, op, a, b)| arp(s, op, a, b)),
        1 => (0u8..4).prop_map(|s| udp(s, 255, 67, 68)),
    ];
    (base, 0u16..4).prop_map(|(mut f, tag)| {
        if tag > 1 {
            f.splice(12..12, [0x81, 0, (tag as u8) << 5, tag as u8 + 3]);
        }
        f
    })
}

/// Mostly none; sometimes long enough for connections, addresses and leases to end.
fn pause() -> impl Strategy<Value = Duration> {
    prop_oneof![10 => Just(0), 1 => Just(11), 1 => Just(200), 1 => Just(400)].prop_map(Duration::from_secs)
}

fn build(configs: &[PortConfig], flows: &[FlowSpec]) -> (Switch, Vec<Endpoint>) {
    let s = common::switch();
    let groups =
        r#"{"g":{"rules":[{"direction":"egress"},{"direction":"ingress","protocol":"udp","ports":[1,2]}]}}"#;
    s.set_security_groups(serde_json::from_str(groups).unwrap());
    let ends =
        configs.iter().enumerate().map(|(i, c)| common::port(&s, &i.to_string(), c.clone()).1).collect();
    s.add_flows(flows.to_vec()).unwrap();
    (s, ends)
}

/// What happens to both switches.
#[derive(Clone, Debug)]
enum Step {
    /// A packet comes in by a port after a while.
    Packet(usize, Vec<u8>, Duration),
    /// A rule goes, or comes if it is not there.
    Toggle(usize),
    /// A rule does something else from now on.
    Modify(usize, Vec<Action>),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..PORTS, frame(), pause()).prop_map(|(port, f, pause)| Step::Packet(port, f, pause)),
        1 => (0..RULES).prop_map(Step::Toggle),
        1 => (0..RULES, actions()).prop_map(|(rule, actions)| Step::Modify(rule, actions)),
    ]
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    proptest::collection::vec(action(), 0..4)
}

fn only(spec: &FlowSpec) -> FlowFilter {
    FlowFilter {
        table: Some(spec.table),
        matches: spec.matches,
        strict: Some(spec.priority),
        ..FlowFilter::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if std::env::var_os("NACRE_LONG").is_some() { 20_000 } else { 600 }))]
    #[test]
    fn warm_caches_change_nothing(
        configs in proptest::collection::vec(config(), PORTS),
        flows in proptest::collection::vec((0u8..3, matching(), actions()), RULES),
        at_first in 0..=RULES,
        steps in proptest::collection::vec(step(), 1..60),
    ) {
        // Distinct priorities: overlapping rules of equal priority have no defined winner.
        let mut flows: Vec<FlowSpec> = flows.into_iter().enumerate().map(|(i, (table, matches, actions))| FlowSpec {
            table,
            priority: i as u16 + 1,
            matches,
            instructions: Instructions::apply(actions),
            ..FlowSpec::default()
        }).collect();
        let (warm, warm_ends) = build(&configs, &flows[..at_first]);
        let (cold, cold_ends) = build(&configs, &flows[..at_first]);
        let mut present: Vec<bool> = (0..RULES).map(|i| i < at_first).collect();
        for (n, step) in steps.iter().enumerate() {
            match step {
                Step::Packet(port, f, pause) => {
                    warm.clock().advance(*pause);
                    cold.clock().advance(*pause);
                    warm_ends[*port].send(f);
                    warm.poll();
                    // Any other change of the configuration empties the caches.
                    cold.set_mirrors(Vec::new());
                    cold_ends[*port].send(f);
                    cold.poll();
                }
                Step::Toggle(i) => {
                    for s in [&warm, &cold] {
                        if present[*i] {
                            s.delete_flows(&only(&flows[*i]));
                        } else {
                            s.add_flow(flows[*i].clone()).unwrap();
                        }
                    }
                    present[*i] = !present[*i];
                }
                Step::Modify(i, actions) => {
                    flows[*i].instructions = Instructions::apply(actions.clone());
                    for s in [&warm, &cold] {
                        s.modify_flows(&only(&flows[*i]), &flows[*i].instructions);
                    }
                }
            }
            for (i, (w, c)) in warm_ends.iter().zip(&cold_ends).enumerate() {
                prop_assert_eq!(drain(w), drain(c), "step {} at output {}", n, i + 1);
            }
        }
        prop_assert_eq!(warm.mac_table(), cold.mac_table());
    }
}

#[test]
fn a_rule_leaves_other_flows_in_the_cache() {
    let s = common::switch();
    let (a_id, a) = common::port(&s, "a", PortConfig::default());
    let (b_id, b) = common::port(&s, "b", PortConfig::default());
    let to = |dport: u16, out| FlowSpec {
        priority: 5,
        matches: Match::default()
            .field(Field::InPort, a_id.into())
            .field(Field::EthType, 0x800)
            .field(Field::IpProto, 17)
            .field(Field::TpDst, dport.into()),
        instructions: Instructions::apply(vec![Action::Output(out)]),
        ..FlowSpec::default()
    };
    s.add_flows((0..50).map(|p| to(p, b_id))).unwrap();
    let all = || {
        for p in 0..50 {
            a.send(&udp(1, 2, 7, p));
        }
        s.settle(9);
        (drain(&b).len(), s.slow_path_decisions())
    };
    // The links that come up make all decisions stale once.
    s.poll();
    let (_, before) = all();
    assert_eq!(all(), (50, before));
    // Another table, another destination, a lower priority: nothing is decided anew.
    s.add_flow(FlowSpec { table: 3, ..to(7, b_id) }).unwrap();
    s.add_flow(to(99, b_id)).unwrap();
    s.add_flow(FlowSpec { priority: 1, ..to(7, a_id) }).unwrap();
    assert_eq!(all(), (50, before));
    // One flow is reached.
    s.modify_flows(&only(&to(7, b_id)), &Instructions::default());
    assert_eq!(all(), (49, before + 1));
    s.delete_flows(&only(&to(8, b_id)));
    assert_eq!(all().1, before + 2);
}

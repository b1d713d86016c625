//! Flow tables, actions, groups, meters, conntrack, learn, controllers.

mod common;

use std::time::Duration;

use common::{drain, port, switch, tcp, udp};
use vswitch::packet::key::Field;
use vswitch::pipeline::{
    Action, Bucket, ConntrackAction, FlowFilter, FlowSpec, Group, GroupKind, Instructions, LearnSpec,
    LearnStep, Location, Match, MeterConfig,
};
use vswitch::{Event, PortConfig, ct_state};

fn flow(table: u8, priority: u16, matches: Match, actions: Vec<Action>) -> FlowSpec {
    FlowSpec { table, priority, matches, instructions: Instructions::apply(actions), ..FlowSpec::default() }
}

fn any() -> Match {
    Match::default()
}

#[test]
fn rules_rewrite_and_count() {
    let s = switch();
    let (_, a) = port(&s, "a", PortConfig::default());
    let (b_id, b) = port(&s, "b", PortConfig::default());
    let (c_id, c) = port(&s, "c", PortConfig::default());
    let web = any().field(Field::EthType, 0x800).field(Field::IpProto, 17).field(Field::TpDst, 53);
    s.add_flow(flow(
        0,
        10,
        web,
        vec![
            Action::Output(c_id),
            Action::SetField { field: Field::IpDst, value: 0x0a00_0063, mask: u32::MAX.into() },
            Action::DecTtl,
            Action::PushVlan(0x8100),
            Action::SetField { field: Field::Vlan, value: 7, mask: 0xfff },
            Action::Output(b_id),
        ],
    ))
    .unwrap();
    for _ in 0..3 {
        a.send(&udp(1, 2, 1000, 53));
    }
    s.settle(5);
    assert_eq!(drain(&c), vec![udp(1, 2, 1000, 53); 3], "output before a change sees the packet unchanged");
    let out = drain(&b);
    assert_eq!(out.len(), 3);
    let p = etherparse::SlicedPacket::from_ethernet(&out[0]).unwrap();
    assert_eq!(p.vlan_ids()[0].value(), 7);
    let Some(etherparse::NetSlice::Ipv4(ip)) = p.net else { panic!() };
    assert_eq!((ip.header().destination(), ip.header().ttl()), ([10, 0, 0, 99], 63));
    assert_eq!(ip.header().to_header().calc_header_checksum(), ip.header().header_checksum());
    let flows = s.flows(&FlowFilter { matches: web, ..FlowFilter::default() });
    assert_eq!(flows[0].stats.get(), (3, 3 * udp(1, 2, 1, 1).len() as u64));
    a.send(&udp(1, 2, 1000, 54));
    s.poll();
    assert_eq!((drain(&b).len(), drain(&c).len()), (1, 1), "other packets take the normal rule");
}

#[test]
fn tables_metadata_registers_and_resubmit() {
    let s = switch();
    let (a_id, a) = port(&s, "a", PortConfig::default());
    let (b_id, b) = port(&s, "b", PortConfig::default());
    s.delete_flows(&FlowFilter::default());
    let mut first =
        flow(0, 1, any(), vec![Action::SetField { field: Field::Reg(3), value: 5, mask: u32::MAX.into() }]);
    first.instructions.metadata = Some((0x10, 0xff));
    first.instructions.goto = Some(4);
    first.instructions.write = vec![Action::Output(b_id)];
    s.add_flow(first).unwrap();
    let seen = any().field(Field::Reg(3), 5).masked(Field::Metadata, 0x10, 0xf0);
    s.add_flow(flow(4, 1, seen, vec![Action::Resubmit { table: Some(9), in_port: Some(77) }])).unwrap();
    s.add_flow(flow(9, 1, any().field(Field::InPort, 77), vec![Action::InPort])).unwrap();
    a.send(&udp(1, 2, 3, 4));
    s.poll();
    assert_eq!(drain(&b).len(), 1, "the action set runs at the end");
    let lines = s.trace(a_id, &udp(1, 2, 3, 4)).unwrap().join("\n");
    assert!(lines.contains("table 4") && lines.contains("table 9"), "{lines}");
    assert!(
        s.add_flow(FlowSpec {
            instructions: Instructions { goto: Some(1), ..Instructions::default() },
            table: 1,
            ..FlowSpec::default()
        })
        .is_err()
    );
    // A loop of resubmits ends.
    s.add_flow(flow(4, 9, any(), vec![Action::Resubmit { table: Some(4), in_port: None }; 3])).unwrap();
    a.send(&udp(1, 2, 3, 4));
    s.poll();
}

#[test]
fn groups_choose() {
    let s = switch();
    let (_, a) = port(&s, "a", PortConfig::default());
    let (b_id, b) = port(&s, "b", PortConfig::default());
    let (c_id, c) = port(&s, "c", PortConfig::default());
    let bucket = |id, p| Bucket {
        id,
        weight: 1,
        watch_port: Some(p),
        actions: vec![Action::DecTtl, Action::Output(p)],
    };
    let buckets = vec![bucket(0, b_id), bucket(1, c_id)];
    s.add_flow(flow(0, 5, any(), vec![Action::Group(1)])).unwrap();
    s.set_group(1, Group { kind: GroupKind::All, buckets: buckets.clone() }).unwrap();
    a.send(&udp(1, 2, 3, 4));
    s.poll();
    let (fb, fc) = (drain(&b), drain(&c));
    assert_eq!((fb.len(), &fb), (1, &fc));
    assert_eq!(fb[0][22], 63, "each bucket works on its own copy");
    s.set_group(1, Group { kind: GroupKind::Select, buckets: buckets.clone() }).unwrap();
    for sport in 0..200 {
        a.send(&udp(1, 2, sport, 4));
    }
    s.settle(20);
    let (n, m) = (drain(&b).len(), drain(&c).len());
    assert!(n + m == 200 && n > 50 && m > 50, "{n} and {m}");
    s.set_group(1, Group { kind: GroupKind::FastFailover, buckets }).unwrap();
    a.send(&udp(1, 2, 3, 4));
    s.poll();
    assert_eq!((drain(&b).len(), drain(&c).len()), (1, 0));
    drop(b);
    s.poll();
    a.send(&udp(1, 2, 3, 4));
    s.poll();
    assert_eq!(drain(&c).len(), 1, "the second bucket takes over when the first port's link is down");
}

#[test]
fn meters_limit_and_refill() {
    let s = switch();
    let (_, a) = port(&s, "a", PortConfig::default());
    let (b_id, b) = port(&s, "b", PortConfig::default());
    s.set_meter(3, MeterConfig { pps: Some(10), burst_packets: Some(2), ..MeterConfig::default() }).unwrap();
    s.add_flow(flow(0, 5, any(), vec![Action::Meter(3), Action::Output(b_id)])).unwrap();
    for _ in 0..10 {
        a.send(&udp(1, 2, 3, 4));
    }
    s.settle(5);
    assert_eq!(drain(&b).len(), 2);
    s.clock().advance(Duration::from_millis(100));
    a.send(&udp(1, 2, 3, 4));
    a.send(&udp(1, 2, 3, 4));
    s.settle(5);
    assert_eq!(drain(&b).len(), 1);
    assert_eq!(s.meters()[&3].dropped(), 9);
}

#[test]
fn conntrack_lets_answers_back() {
    let s = switch();
    let (a_id, a) = port(&s, "inside", PortConfig::default());
    let (b_id, b) = port(&s, "outside", PortConfig::default());
    s.delete_flows(&FlowFilter::default());
    let ct = |commit, table| {
        Action::Conntrack(ConntrackAction { zone: 5, commit, table, ..ConntrackAction::default() })
    };
    s.add_flow(flow(0, 1, any(), vec![ct(false, Some(1))])).unwrap();
    let bits = |v: u32| any().masked(Field::CtState, v.into(), v.into());
    let new = bits(ct_state::NEW | ct_state::TRACKED).field(Field::InPort, a_id.into());
    s.add_flow(flow(1, 5, new, vec![ct(true, None), Action::Output(b_id)])).unwrap();
    let known = bits(ct_state::ESTABLISHED);
    s.add_flow(flow(1, 5, known.field(Field::InPort, a_id.into()), vec![Action::Output(b_id)])).unwrap();
    s.add_flow(flow(1, 5, known.field(Field::InPort, b_id.into()), vec![Action::Output(a_id)])).unwrap();
    b.send(&tcp(2, 1, 80, 1000, "SA"));
    b.send(&tcp(2, 1, 80, 1000, "S"));
    s.settle(5);
    assert!(drain(&a).is_empty(), "nothing comes in unasked");
    a.send(&tcp(1, 2, 1000, 80, "S"));
    s.settle(5);
    b.send(&tcp(2, 1, 80, 1000, "SA"));
    s.settle(5);
    assert_eq!(drain(&a).len(), 1);
    for _ in 0..5 {
        a.send(&tcp(1, 2, 1000, 80, "A"));
        b.send(&tcp(2, 1, 80, 1000, "A"));
    }
    s.settle(5);
    assert_eq!((drain(&a).len(), drain(&b).len()), (5, 6));
    assert_eq!(s.connections().len(), 1);
    a.send(&tcp(1, 2, 1000, 80, "R"));
    s.settle(5);
    s.clock().advance(Duration::from_secs(11));
    s.poll();
    assert!(s.connections().is_empty());
    b.send(&tcp(2, 1, 80, 1000, "A"));
    s.settle(5);
    assert!(drain(&a).is_empty());
}

#[test]
fn rules_are_learned_and_expire() {
    let s = switch();
    let (_, a) = port(&s, "a", PortConfig::default());
    let (_, b) = port(&s, "b", PortConfig::default());
    let (_, c) = port(&s, "c", PortConfig::default());
    let eth = |f| Location::whole(f);
    let learn = LearnSpec {
        base: FlowSpec { table: 1, priority: 5, hard_timeout: 30, ..FlowSpec::default() },
        steps: vec![
            LearnStep::Match { from: eth(Field::EthSrc), to: eth(Field::EthDst) },
            LearnStep::Output(Location { field: Field::InPort, offset: 0, bits: 16 }),
        ],
    };
    let forward = Action::Resubmit { table: Some(1), in_port: None };
    s.add_flow(flow(0, 1, any(), vec![Action::Learn(Box::new(learn)), forward])).unwrap();
    s.add_flow(flow(1, 0, any(), vec![Action::All])).unwrap();
    a.send(&udp(1, 2, 3, 4));
    s.poll();
    assert_eq!((drain(&b).len(), drain(&c).len()), (1, 1));
    b.send(&udp(2, 1, 3, 4));
    s.poll();
    assert_eq!((drain(&a).len(), drain(&c).len()), (1, 0));
    assert_eq!(s.table_sizes(), [(0, 2), (1, 3)]);
    s.clock().advance(Duration::from_secs(31));
    s.poll();
    assert_eq!(s.table_sizes(), [(0, 2), (1, 1)]);
}

#[test]
fn controllers_get_packets_and_send_them() {
    let s = switch();
    let (a_id, a) = port(&s, "a", PortConfig::default());
    let (b_id, b) = port(&s, "b", PortConfig::default());
    let events = s.subscribe(4).unwrap();
    let punt = Action::Controller { max_len: 20, reason: 1 };
    let spec =
        FlowSpec { cookie: 99, idle_timeout: 10, notify_removal: true, ..flow(0, 7, any(), vec![punt]) };
    s.add_flow(spec).unwrap();
    for _ in 0..10 {
        a.send(&udp(1, 2, 3, 4));
    }
    s.settle(5);
    let mut n = 0;
    while let Some(e) = events.next_event() {
        let Event::PacketIn { in_port, cookie, frame, length, .. } = e else { panic!("{e:?}") };
        assert_eq!((in_port, cookie, frame.len(), length), (a_id, 99, 20, udp(1, 2, 3, 4).len()));
        n += 1;
    }
    assert_eq!(n, 4, "the queue is bounded");
    s.packet_out(a_id, &udp(1, 2, 3, 4), &[Action::Output(b_id)]);
    assert_eq!(drain(&b).len(), 1);
    s.clock().advance(Duration::from_secs(11));
    s.poll();
    assert!(matches!(events.next_event(), Some(Event::FlowRemoved { reason: 0, counts: (10, _), .. })));
}

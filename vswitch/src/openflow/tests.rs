//! What is written reads back; hostile bytes are answered with the right errors.
#![allow(clippy::unwrap_used, reason = "a test ends where a step fails")]

use proptest::prelude::*;

use super::actions::{Context, take_actions, take_instructions};
use super::actions_out::Encoder;
use super::fields::{put_match_nx, put_match13, take_match_nx, take_match13};
use super::session::{Roles, Session};
use super::wire::{OfError, Put, Reader, Version, put_message};
use super::{match10, wire};
use crate::clock::Clock;
use crate::packet::key::Field;
use crate::pipeline::{
    Action, ConntrackAction, FlowFilter, Instructions, LearnSpec, LearnStep, Location, Match,
};
use crate::switch::Switch;

fn reader(b: &[u8]) -> Reader<'_> {
    Reader::new(b, OfError::BAD_LEN)
}

/// Matches of the kinds that OpenFlow can express.
fn a_match() -> impl Strategy<Value = Match> {
    let base = (any::<u128>(), any::<u128>(), 0..8u8, any::<u16>(), any::<u16>(), any::<u32>());
    (base, any::<u64>(), 0..12u16).prop_map(|((v, mask, shape, p, q, r), extra, bits)| {
        let bit = |n: u16| bits >> n & 1 != 0;
        let mut m = Match::default();
        if bit(0) {
            m = m.field(Field::InPort, u128::from(r % 4096));
        }
        if bit(1) {
            m = m.masked(Field::EthDst, extra.into(), mask | 1);
        }
        if bit(2) {
            m = m.masked(Field::Reg(3), v, mask | 1).masked(Field::Metadata, extra.into(), mask | 1);
        }
        if bit(3) {
            m = m.field(Field::CtState, r.into()).field(Field::Vlan, u128::from(p | 0x1000));
        }
        let ip4 = |m: Match| {
            m.field(Field::EthType, 0x800).masked(Field::IpSrc, v & 0xffff_ffff, mask & 0xffff_ffff)
        };
        let ip6 = |m: Match| m.field(Field::EthType, 0x86dd).masked(Field::IpDst, v, mask);
        let ports = |m: Match| m.field(Field::TpSrc, p.into()).masked(Field::TpDst, q.into(), mask);
        match shape {
            0 => m,
            1 => ip4(m).masked(Field::IpTos, v, 0xfc).field(Field::IpTtl, u128::from(p & 0xff)),
            2 => ports(ip4(m).field(Field::IpProto, 6)).masked(Field::TcpFlags, q.into(), 0xfff),
            3 => ports(ip6(m).field(Field::IpProto, 17)).masked(Field::FlowLabel, v, 0xf_ffff),
            4 => ip4(m).field(Field::IpProto, 1).field(Field::TpSrc, u128::from(p & 0xff)),
            5 => {
                let nd = ip6(m).field(Field::IpProto, 58).field(Field::TpSrc, 135);
                nd.field(Field::NdTarget, v).field(Field::ArpSha, extra.into())
            }
            6 => {
                let arp = m.field(Field::EthType, 0x806).field(Field::IpProto, 2);
                arp.masked(Field::IpSrc, r.into(), u32::MAX.into()).field(Field::ArpTha, extra.into())
            }
            _ => ports(ip4(m).field(Field::IpProto, 132)),
        }
    })
}

fn location() -> impl Strategy<Value = Location> {
    let fields = [Field::Reg(0), Field::Reg(7), Field::EthSrc, Field::TunId, Field::Metadata, Field::CtMark];
    (0..fields.len(), 0..16u32, 1..16u32).prop_map(move |(i, offset, bits)| Location {
        field: fields[i],
        offset,
        bits,
    })
}

/// Actions that both versions can express, for IPv4 TCP packets.
fn an_action() -> impl Strategy<Value = Action> {
    let set = |field: Field, value: u128, mask: u128| Action::SetField { field, value: value & mask, mask };
    prop_oneof![
        (1..4096u32).prop_map(Action::Output),
        Just(Action::InPort),
        Just(Action::All),
        Just(Action::Flood),
        Just(Action::Normal),
        (any::<u16>(), 1..3u8).prop_map(|(max_len, reason)| Action::Controller { max_len, reason }),
        location().prop_map(Action::OutputField),
        Just(Action::PopVlan),
        any::<u64>().prop_map(move |v| set(Field::EthSrc, v.into(), Field::EthSrc.ones())),
        any::<u32>().prop_map(move |v| set(Field::IpDst, v.into(), u32::MAX.into())),
        any::<u16>().prop_map(move |v| set(Field::TpDst, v.into(), 0xffff)),
        any::<u16>().prop_map(move |v| set(Field::Vlan, v.into(), 0xfff)),
        any::<u16>().prop_map(move |v| set(Field::Vlan, v.into(), 0xe000)),
        any::<u8>().prop_map(move |v| set(Field::IpTos, v.into(), 0xfc)),
        any::<u64>().prop_map(move |v| set(Field::TunId, v.into(), u64::MAX.into())),
        (any::<u32>(), 1..u32::MAX).prop_map(move |(v, m)| set(Field::Reg(2), v.into(), m.into())),
        (any::<u128>(), 1..u128::MAX).prop_map(move |(v, m)| set(Field::CtLabel, v, m)),
        (location(), 0..8u32).prop_map(|(from, offset)| {
            let to = Location { field: Field::Reg(5), offset, bits: from.bits };
            Action::Move { from, to }
        }),
        Just(Action::DecTtl),
        (any::<Option<u8>>(), proptest::option::of(1..4096u32)).prop_map(|(table, in_port)| {
            Action::Resubmit { table: table.filter(|t| *t != 255), in_port }
        }),
        (any::<u16>(), any::<bool>(), proptest::option::of(0..254u8), any::<(u32, u32)>(), any::<u128>())
            .prop_map(|(zone, commit, table, (v, m), label)| {
                let mark = (commit && m != 0).then_some((v & m, m));
                let label = (commit && label & 1 == 0).then_some((label, u128::MAX));
                Action::Conntrack(ConntrackAction { zone, commit, table, mark, label })
            }),
        (any::<u64>(), 0..254u8, proptest::collection::vec((location(), any::<u16>()), 0..4)).prop_map(
            |(cookie, table, steps)| {
                let mut spec = LearnSpec::default();
                (spec.base.cookie, spec.base.table) = (cookie, table);
                for (i, (l, v)) in steps.into_iter().enumerate() {
                    spec.steps.push(match i {
                        0 => LearnStep::Match { from: l, to: Location { field: Field::EthDst, ..l } },
                        1 => LearnStep::LoadValue {
                            value: v.into(),
                            to: Location { field: Field::Reg(1), ..l },
                        },
                        2 => LearnStep::MatchValue { value: v.into(), to: l },
                        _ => LearnStep::Output(l),
                    });
                }
                Action::Learn(Box::new(spec))
            }
        ),
    ]
}

fn tcp4() -> Match {
    Match::default().field(Field::EthType, 0x800).field(Field::IpProto, 6)
}

proptest! {
    #[test]
    fn matches_read_back(m in a_match()) {
        let mut oxm = Vec::new();
        put_match13(&mut oxm, &m);
        prop_assert_eq!(oxm.len() % 8, 0);
        prop_assert_eq!(take_match13(&mut reader(&oxm)).unwrap(), m);
        let mut nxm = Vec::new();
        let len = put_match_nx(&mut nxm, &m);
        prop_assert_eq!(take_match_nx(&mut reader(&nxm), len.into()).unwrap(), m);
    }

    #[test]
    fn matches_of_1_0_read_back(m in a_match()) {
        // What the structure cannot say is lost at first, and nothing after that.
        let mut b = Vec::new();
        match10::put(&mut b, &m);
        prop_assert_eq!(b.len(), 40);
        let once = match10::take(&mut reader(&b)).unwrap();
        prop_assert!(once.covers(&m) || m.mask.get(Field::IpSrc) != 0);
        let mut again = Vec::new();
        match10::put(&mut again, &once);
        prop_assert_eq!(match10::take(&mut reader(&again)).unwrap(), once);
    }

    #[test]
    fn actions_read_back(list in proptest::collection::vec(an_action(), 0..6)) {
        let m = tcp4();
        for version in [Version::V10, Version::V13] {
            let mut b = Vec::new();
            Encoder::new(version, &m, &mut b).actions(&list);
            let context = Context { version, matches: Some(&m) };
            prop_assert_eq!(&take_actions(reader(&b), context).unwrap(), &list, "{:?}: {:02x?}", version, b);
        }
    }

    #[test]
    fn instructions_read_back(apply in proptest::collection::vec(an_action(), 0..3), write in proptest::collection::vec(an_action(), 0..3),
                              meter in proptest::option::of(1..100u32), clear: bool, meta: Option<(u64, u64)>, goto in proptest::option::of(4..200u8)) {
        let metadata = meta.map(|(v, m)| (v & m, m));
        let i = Instructions { meter, apply, clear, write, metadata, goto };
        let m = tcp4();
        let mut b = Vec::new();
        Encoder::new(Version::V13, &m, &mut b).instructions(&i);
        prop_assert_eq!(take_instructions(reader(&b), 3, &m).unwrap(), i);
    }

    /// Any bytes in any chunks: the session ends or goes on, and what it answers is well-formed.
    #[test]
    fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0..30u8, v13: bool) {
        let switch = Switch::builder().workers(0).clock(Clock::manual()).build().unwrap();
        let mut roles = Roles::default();
        let mut s = Session::new(&mut roles, 1, false);
        let version = if v13 { 4 } else { 1 };
        let mut input = Vec::new();
        put_message(&mut input, version, 0, 1, &[]);
        put_message(&mut input, version, kind, 2, &bytes);
        input.extend_from_slice(&bytes);
        for chunk in input.chunks(7) {
            s.receive(chunk);
            s.run(&switch, &mut roles, |_| ());
        }
        let mut rest = s.pending();
        while let Some((_, after)) = wire::Message::split(rest).unwrap() {
            rest = after;
        }
        prop_assert!(rest.is_empty());
    }
}

/// A session that has agreed on a version, with what it answered so far taken away.
struct Peer {
    switch: Switch,
    roles: Roles,
    session: Session,
    version: Version,
}

impl Peer {
    fn new(version: Version) -> Self {
        let switch = Switch::builder().workers(0).clock(Clock::manual()).build().unwrap();
        let mut roles = Roles::default();
        let session = Session::new(&mut roles, 0xabc, true);
        let mut p = Self { switch, roles, session, version };
        p.ask(0, &[]);
        p
    }

    /// Sends a message; returns type and body of each answer.
    fn ask(&mut self, kind: u8, body: &[u8]) -> Vec<(u8, Vec<u8>)> {
        let mut m = Vec::new();
        put_message(&mut m, self.version as u8, kind, 7, body);
        self.session.receive(&m);
        self.session.run(&self.switch, &mut self.roles, |_| ());
        let out = self.session.pending().to_vec();
        self.session.sent(out.len());
        let mut rest = &out[..];
        let mut answers = Vec::new();
        while let Some((m, after)) = wire::Message::split(rest).unwrap() {
            answers.push((m.kind, m.body.to_vec()));
            rest = after;
        }
        answers
    }

    /// Sends a message that must fail; returns the error's type and code.
    fn fail(&mut self, kind: u8, body: &[u8]) -> (u16, u16) {
        let answers = self.ask(kind, body);
        let [(1, e)] = &answers[..] else { panic!("{answers:?}") };
        (u16::from_be_bytes([e[0], e[1]]), u16::from_be_bytes([e[2], e[3]]))
    }
}

fn flow_mod(command: u8, table: u8, m: &Match, i: &Instructions, flags: u16) -> Vec<u8> {
    let mut b = vec![0; 16];
    b.extend_from_slice(&[table, command, 0, 0, 0, 0, 0, 5]);
    b.put32(u32::MAX);
    b.put32(u32::MAX);
    b.put32(u32::MAX);
    b.put16(flags);
    b.put16(0);
    put_match13(&mut b, m);
    Encoder::new(Version::V13, m, &mut b).instructions(i);
    b
}

#[test]
fn errors_have_the_codes_of_the_specification() {
    let mut p = Peer::new(Version::V13);
    let any = Match::default();
    let nothing = Instructions::default();
    assert_eq!(p.fail(99, &[]), (1, 1), "type");
    assert_eq!(p.fail(14, &[0; 3]), (1, 6), "length");
    assert_eq!(p.fail(18, &[0, 77, 0, 0, 0, 0, 0, 0]), (1, 2), "statistics");
    assert_eq!(p.fail(4, &[0, 0, 0, 9, 0, 0, 0, 0]), (1, 3), "experimenter");
    assert_eq!(p.fail(14, &flow_mod(9, 0, &any, &nothing, 0)), (5, 6), "command");
    assert_eq!(p.fail(14, &flow_mod(0, 255, &any, &nothing, 0)), (5, 2), "table");
    let group = Instructions::apply(vec![Action::Group(5)]);
    assert_eq!(p.fail(14, &flow_mod(0, 0, &any, &group, 0)), (2, 9), "group");
    let meter = Instructions { meter: Some(5), ..Instructions::default() };
    assert_eq!(p.fail(14, &flow_mod(0, 0, &any, &meter, 0)), (12, 3), "meter");
    let back = Instructions { goto: Some(2), ..Instructions::default() };
    assert_eq!(p.fail(14, &flow_mod(0, 2, &any, &back, 0)), (3, 2), "goto");
    let port = Instructions::apply(vec![Action::Output(70_000)]);
    assert_eq!(p.fail(14, &flow_mod(0, 0, &any, &port, 0)), (2, 4), "port");
    let no_ip = any.field(Field::IpSrc, 1);
    assert_eq!(p.fail(14, &flow_mod(0, 0, &no_ip, &nothing, 0)), (4, 9), "prerequisite");
    let set = Instructions::apply(vec![Action::SetField { field: Field::TpDst, value: 5, mask: 0xffff }]);
    assert_eq!(p.fail(14, &flow_mod(0, 0, &any, &set, 0)), (2, 10), "set-field of another kind of packet");
    assert!(p.ask(14, &flow_mod(0, 0, &tcp4(), &set, 0)).is_empty());
    assert_eq!(p.fail(14, &flow_mod(0, 0, &any.field(Field::InPort, 3), &nothing, 2)), (5, 3), "overlap");
    let mut unknown = flow_mod(0, 0, &any.field(Field::Reg(0), 1), &nothing, 0);
    unknown[44 + 2] = 100 << 1;
    assert_eq!(p.fail(14, &unknown), (4, 6), "field");
    let mut packet = vec![0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(p.fail(13, &packet), (1, 8), "buffer");
    packet[..4].fill(0xff);
    assert_eq!(p.fail(13, &packet), (1, 12), "packet");
    assert_eq!(p.switch.flows(&FlowFilter::default()).len(), 2, "what is refused changes nothing");
    let mut old = Peer::new(Version::V10);
    assert_eq!(old.fail(15, &[0; 24]), (4, 0), "port");
    assert_eq!(old.fail(29, &[]), (1, 1), "a message of later versions");
}

#[test]
fn roles_follow_generations() {
    let mut p = Peer::new(Version::V13);
    let role = |role: u8, generation: u8| [0, 0, 0, role, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, generation];
    assert_eq!(p.ask(24, &role(2, 5))[0].1[..4], [0, 0, 0, 2]);
    assert_eq!(p.fail(24, &role(3, 4)), (11, 0), "stale");
    assert_eq!(p.fail(24, &role(9, 6)), (11, 2));
    // Another controller becomes master: this one is a slave then and may change nothing.
    let mut other = Session::new(&mut p.roles, 0xabc, false);
    let mut m = Vec::new();
    put_message(&mut m, 4, 0, 1, &[]);
    put_message(&mut m, 4, 24, 2, &role(2, 6));
    other.receive(&m);
    other.run(&p.switch, &mut p.roles, |_| ());
    assert_eq!(p.ask(24, &role(0, 0))[0].1[..4], [0, 0, 0, 3]);
    assert_eq!(p.fail(14, &flow_mod(0, 0, &Match::default(), &Instructions::default(), 0)), (1, 10));
}

#[test]
fn long_answers_come_in_pages() {
    let mut p = Peer::new(Version::V13);
    for n in 0..3000u32 {
        let m = tcp4().field(Field::IpSrc, n.into());
        assert!(p.ask(14, &flow_mod(0, 1, &m, &Instructions::apply(vec![Action::Normal]), 0)).is_empty());
    }
    let mut request = vec![0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
    request.extend_from_slice(&[0xff; 8]);
    request.extend_from_slice(&[0; 20]);
    put_match13(&mut request, &Match::default());
    let pages = p.ask(18, &request);
    assert!(pages.len() > 2);
    let (last, first) = pages.split_last().unwrap();
    assert!(first.iter().all(|(k, b)| *k == 19 && b[3] == 1) && last.1[3] == 0);
    let mut flows = 0;
    for (_, b) in &pages {
        let mut at = 8;
        while at < b.len() {
            at += usize::from(u16::from_be_bytes([b[at], b[at + 1]]));
            flows += 1;
        }
    }
    assert_eq!(flows, 3000);
}

#[test]
fn versions_are_agreed_on() {
    for (version, body, opened) in [
        (1, &[][..], Some(1)),
        (4, &[], Some(4)),
        (6, &[], Some(4)),
        (6, &[0, 1, 0, 8, 0, 0, 0, 0x42], Some(1)),
        (3, &[], None),
        (6, &[0, 1, 0, 8, 0, 0, 0, 0x40], None),
    ] {
        let switch = Switch::builder().workers(0).clock(Clock::manual()).build().unwrap();
        let mut roles = Roles::default();
        let mut s = Session::new(&mut roles, 1, true);
        let hello = s.pending().len();
        let mut m = Vec::new();
        put_message(&mut m, version, 0, 1, body);
        s.receive(&m);
        s.run(&switch, &mut roles, |_| ());
        assert_eq!(s.has_failed(), opened.is_none(), "{version} {body:?}");
        assert_eq!(s.is_open().then(|| s.version() as u8), opened);
        // The refusal is an error of type and code zero.
        assert_eq!(s.pending()[hello..].get(8..12), opened.is_none().then_some(&[0; 4][..]));
    }
}

//! Bonds, LACP between two switches, patch ports, capture and metrics.
#![expect(clippy::unwrap_used, reason = "a test ends where a step fails")]

mod common;

use std::time::Duration;

use common::{drain, port, switch, udp};
use vswitch::{BondConfig, BondMode, CapturePort, Mirror, PatchPort, PortConfig, PortId, Switch};

/// Two switches joined by `n` patches, bonded on both sides; the numbers of the members and of the bond on each.
fn bonded(n: usize, mode: BondMode, lacp: bool) -> [(Switch, Vec<PortId>, PortId); 2] {
    let (s, t) = (switch(), switch());
    let mut members = [Vec::new(), Vec::new()];
    for i in 0..n {
        let (a, b) = PatchPort::pair().unwrap();
        members[0].push(s.add_port(&format!("p{i}"), a, PortConfig::default()).unwrap());
        members[1].push(t.add_port(&format!("p{i}"), b, PortConfig::default()).unwrap());
    }
    let [ms, mt] = members;
    let config = |members: &Vec<PortId>, n| BondConfig {
        mode,
        members: members.clone(),
        lacp,
        system: [2, 0, 0, 0, 9, n],
    };
    let bs = s.add_bond("bond", config(&ms, 1), PortConfig::default()).unwrap();
    let bt = t.add_bond("bond", config(&mt, 2), PortConfig::default()).unwrap();
    [(s, ms, bs), (t, mt, bt)]
}

fn run(pair: &[(Switch, Vec<PortId>, PortId); 2], seconds: u64) {
    for _ in 0..seconds * 10 + 1 {
        for (s, ..) in pair {
            s.settle(8);
        }
        for (s, ..) in pair {
            s.clock().advance(Duration::from_millis(100));
        }
    }
}

#[test]
fn lacp_aggregates_and_notices_a_lost_link() {
    let pair = bonded(2, BondMode::BalanceFlow, true);
    let (_, a) = port(&pair[0].0, "a", PortConfig::default());
    let (_, b) = port(&pair[1].0, "b", PortConfig::default());
    a.send(&udp(1, 2, 1, 1));
    pair[0].0.poll();
    pair[1].0.poll();
    assert!(drain(&b).is_empty(), "nothing passes before the partners agree");
    run(&pair, 4);
    assert_eq!(pair[0].0.bond_members_in_use(pair[0].2), pair[0].1);
    drain(&b);
    for sport in 0..100 {
        a.send(&udp(1, 2, sport, 5));
    }
    run(&pair, 1);
    assert_eq!(drain(&b).len(), 100);
    for m in &pair[0].1 {
        assert!(pair[0].0.port_stats(*m).unwrap().tx_packets > 20, "both links carry flows");
    }
    // The peer's address is learned on the bond, not on a member.
    b.send(&udp(2, 1, 5, 5));
    run(&pair, 1);
    assert_eq!(drain(&a).len(), 1);
    assert!(pair[0].0.mac_table().iter().any(|r| r.port == pair[0].2));
    pair[1].0.remove_port(pair[1].1[0]).unwrap();
    run(&pair, 1);
    assert_eq!(pair[0].0.bond_members_in_use(pair[0].2), pair[0].1[1..]);
    for sport in 0..100 {
        a.send(&udp(1, 2, sport, 5));
    }
    run(&pair, 1);
    assert_eq!(drain(&b).len(), 100, "the other link carries everything");
}

#[test]
fn active_backup_fails_over_and_announces() {
    let pair = bonded(2, BondMode::ActiveBackup, false);
    let (_, a) = port(&pair[0].0, "a", PortConfig::default());
    let (_, b) = port(&pair[1].0, "b", PortConfig::default());
    run(&pair, 1);
    a.send(&udp(1, 2, 1, 1));
    run(&pair, 1);
    assert_eq!(drain(&b).len(), 1, "a flood arrives once");
    pair[0].0.remove_port(pair[0].1[0]).unwrap();
    run(&pair, 1);
    let announced = drain(&b);
    assert!(announced.iter().all(|f| f[12..14] == [0x80, 0x35]) && announced.len() == 1, "{announced:?}");
    a.send(&udp(1, 2, 1, 1));
    run(&pair, 1);
    assert_eq!(drain(&b).len(), 1);
    assert!(drain(&a).is_empty(), "nothing comes back");
}

#[test]
fn frames_go_in_turn_or_by_addresses() {
    let uses = |mode, frames: &[Vec<u8>]| {
        let pair = bonded(3, mode, false);
        let (_, a) = port(&pair[0].0, "a", PortConfig::default());
        let (_, b) = port(&pair[1].0, "b", PortConfig::default());
        run(&pair, 1);
        for f in frames {
            a.send(f);
        }
        run(&pair, 1);
        assert_eq!(drain(&b).len(), frames.len());
        assert!(drain(&a).is_empty(), "nothing comes back");
        let mut sent: Vec<u64> =
            pair[0].1.iter().map(|m| pair[0].0.port_stats(*m).unwrap().tx_packets).collect();
        sent.sort_unstable();
        sent
    };
    let one_flow: Vec<_> = (0..30).map(|_| udp(1, 2, 5, 6)).collect();
    let one_pair: Vec<_> = (0..30).map(|n| udp(1, 2, n, 6)).collect();
    let pairs: Vec<_> = (0..90).map(|n| udp(1, 2 + n, 5, 6)).collect();
    assert_eq!(uses(BondMode::RoundRobin, &one_flow), [10, 10, 10]);
    assert_eq!(uses(BondMode::BalanceMac, &one_pair), [0, 0, 30]);
    assert_eq!(uses(BondMode::BalanceSource, &pairs), [0, 0, 90]);
    assert!(uses(BondMode::BalanceMac, &pairs)[0] > 10);
}

#[test]
fn captures_are_readable_and_metrics_complete() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let s = switch();
    let (a_id, a) = port(&s, "a", PortConfig::default());
    let (_, _b) = port(&s, "b", PortConfig::default());
    let capture = CapturePort::new(file.reopen().unwrap(), 65_535, s.clock().clone()).unwrap();
    let c = s.add_port("capture", capture, PortConfig::default()).unwrap();
    s.set_mirrors(vec![Mirror { from: vec![a_id], to: c, ..Mirror::default() }]);
    for i in 0..3 {
        a.send(&udp(1, 2, 1000 + i, 53));
    }
    s.settle(5);
    let out = std::process::Command::new("tshark")
        .args(["-r", file.path().to_str().unwrap(), "-T", "fields", "-e", "udp.srcport", "-e", "ip.src"])
        .output()
        .expect("Debian package tshark is needed");
    assert_eq!(String::from_utf8_lossy(&out.stdout), "1000\t10.0.0.1\n1001\t10.0.0.1\n1002\t10.0.0.1\n");
    let page = s.prometheus();
    assert!(page.contains("nacre_switch_port_rx_packets_total{port=\"a\"} 3"), "{page}");
    for l in page.lines().filter(|l| !l.starts_with('#')) {
        assert!(l.rsplit_once(' ').is_some_and(|(_, v)| v.parse::<u64>().is_ok()), "{l}");
    }
}

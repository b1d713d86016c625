//! Shaping and marking through a whole switch.
#![expect(clippy::unwrap_used, reason = "a test ends where a step fails")]

mod common;

use std::time::{Duration, Instant};

use common::{arp, drain, port, switch, udp};
use vswitch::packet::offload::OffloadCaps;
use vswitch::packet::{Offload, checksum};
use vswitch::{Clock, Endpoint, Marking, PortConfig, Switch, VlanMode, VlanSet};

fn shaped(json: &str) -> PortConfig {
    PortConfig { shaping: Some(serde_json::from_str(json).unwrap()), ..PortConfig::default() }
}

/// A frame of 1000 bytes in a class.
fn frame(dscp: u8, number: u16) -> Vec<u8> {
    let mut f = udp(1, 2, number, 9);
    f.resize(1000, 0);
    f[15] = dscp << 2;
    f
}

fn numbers(frames: &[Vec<u8>], dscp: u8) -> Vec<u16> {
    let of = |f: &&Vec<u8>| f[15] >> 2 == dscp;
    frames.iter().filter(of).map(|f| u16::from_be_bytes([f[34], f[35]])).collect()
}

fn pass(s: &Switch, time: Duration) {
    for _ in 0..time.as_millis() {
        s.clock().advance(Duration::from_millis(1));
        s.settle(9);
    }
}

/// 8 Mbit/s are a frame of 1000 bytes a millisecond.
const TWO_CLASSES: &str = r#"{"kbps":8000,"burst_kb":8,
    "classes":{"voice":{"dscp":[46],"priority":0},"bulk":{"min_kbps":2000,"priority":1}}}"#;

#[test]
fn frames_wait_for_their_turn() {
    let s = switch();
    let (_, a) = port(&s, "a", PortConfig::default());
    let (b_id, b) = port(&s, "b", shaped(TWO_CLASSES));
    for n in 0..40 {
        assert!(a.send(&frame(0, n)) && a.send(&frame(46, n)));
    }
    s.settle(9);
    assert_eq!(drain(&b).len(), 1, "the burst");
    pass(&s, Duration::from_millis(40));
    let got = drain(&b);
    // Three quarters go to the class with priority, what is guaranteed to the other.
    assert_eq!((numbers(&got, 46).len(), numbers(&got, 0).len()), (30, 10));
    pass(&s, Duration::from_millis(39));
    let got = [got, drain(&b)].concat();
    assert_eq!(numbers(&got, 46), (0..40).collect::<Vec<_>>(), "in order");
    assert_eq!(numbers(&got, 0), (1..40).collect::<Vec<_>>());
    assert_eq!(s.port_stats(b_id).unwrap().tx_packets, 80);
    let stats = s.class_stats(b_id).unwrap();
    assert_eq!((stats[0].name.as_str(), stats[0].packets, stats[1].bytes), ("bulk", 40, 40_000));
    let page = s.prometheus();
    let line = "nacre_switch_class_packets_total{port=\"b\",class=\"voice\"} 40";
    assert!(page.lines().any(|l| l == line), "{page}");
}

#[test]
fn a_changed_shaper_keeps_what_waits() {
    let s = switch();
    let (_, a) = port(&s, "a", PortConfig::default());
    let (b_id, b) = port(&s, "b", shaped(TWO_CLASSES));
    for n in 0..20 {
        a.send(&frame(46, n));
    }
    s.settle(9);
    let mut got = drain(&b);
    s.set_port_config(b_id, shaped(r#"{"kbps":16000,"burst_kb":32}"#)).unwrap();
    pass(&s, Duration::from_millis(2));
    got.extend(drain(&b));
    assert_eq!(got.len(), 7, "the old burst, the new one of four, and two a millisecond");
    s.set_port_config(b_id, PortConfig::default()).unwrap();
    got.extend(drain(&b));
    assert_eq!(numbers(&got, 46), (0..20).collect::<Vec<_>>());
    assert!(s.class_stats(b_id).unwrap().is_empty());
}

#[test]
fn a_full_queue_drops_and_unfinished_frames_leave_finished() {
    let s = switch();
    let (p, a) = Endpoint::pair(1024, OffloadCaps::empty()).unwrap();
    s.add_port("a", p, PortConfig::default()).unwrap();
    let (b_id, b) =
        port(&s, "b", shaped(r#"{"kbps":8000,"burst_kb":8,"classes":{"all":{"queue_bytes":8192}}}"#));
    // A frame whose checksum is left to whoever sends it on.
    let mut partial = frame(0, 7);
    partial[40..42].copy_from_slice(&[0, 0]);
    let mut header = [0; 10];
    (header[0], header[6], header[8]) = (1, 34, 6);
    let offload = Offload::parse(&header);
    let all = (0..20).map(|_| (&partial[..], offload));
    assert_eq!(a.send_burst(all), 20);
    s.settle(9);
    assert_eq!(s.port_stats(b_id).unwrap().tx_limited, 11);
    pass(&s, Duration::from_millis(20));
    let got = drain(&b);
    assert_eq!(got.len(), 9);
    // The sum over what the checksum covers is nothing but the checksum's initial value.
    assert!(got.iter().all(|f| f[40..42] != [0, 0] && *f == got[0]));
    assert_eq!(checksum::fold(checksum::sum(&got[0][34..], 0)), 0xffff);
}

/// Nobody but the shaper wakes the worker up.
#[test]
fn a_sleeping_worker_lets_frames_out_when_it_is_time() {
    let s = Switch::builder().workers(1).clock(Clock::monotonic()).build().unwrap();
    let (_, a) = port(&s, "a", PortConfig::default());
    let (_, b) = port(&s, "b", shaped(r#"{"kbps":4000,"burst_kb":8}"#));
    let start = Instant::now();
    for n in 0..100 {
        assert!(a.send(&frame(0, n)));
    }
    let mut got = Vec::new();
    while got.len() < 100 {
        got.extend(drain(&b));
        assert!(start.elapsed() < Duration::from_secs(60), "{} came", got.len());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(numbers(&got, 0), (0..100).collect::<Vec<_>>());
    // A frame lasts two milliseconds; the burst is one, and one may be begun.
    assert!(start.elapsed() >= Duration::from_millis(196), "{:?}", start.elapsed());
}

#[test]
fn ports_mark_what_comes_in() {
    let s = switch();
    let marking = Marking { dscp: Some(46), pcp: Some(5) };
    let trunk = VlanMode::Trunk { native: 1, allowed: VlanSet::all() };
    let (_, plain) =
        port(&s, "plain", PortConfig { marking, vlan: VlanMode::Access(7), ..PortConfig::default() });
    let (_, tagged) =
        port(&s, "tagged", PortConfig { marking, vlan: trunk.clone(), ..PortConfig::default() });
    let (_, tunnel) =
        port(&s, "tunnel", PortConfig { marking, vlan: VlanMode::Tunnel(7), ..PortConfig::default() });
    let (_, end) = port(&s, "end", PortConfig { vlan: trunk, ..PortConfig::default() });
    let mut f = udp(1, 9, 5, 6);
    // Congestion notification stays.
    f[15] = 3;
    checksum::set_ipv4(&mut f[14..34]);
    plain.send(&f);
    s.settle(9);
    let got = drain(&end);
    assert_eq!(got[0][12..16], [0x81, 0, 0xa0, 7], "the tag that it gets has the priority");
    assert_eq!(got[0][19], 46 << 2 | 3);
    assert_eq!(checksum::fold(checksum::sum(&got[0][18..38], 0)), 0xffff, "the header's checksum follows");
    let mut f = udp(2, 9, 5, 6);
    f.splice(12..12, [0x81, 0, 0x20, 7]);
    tagged.send(&f);
    s.settle(9);
    assert_eq!(drain(&end)[0][12..16], [0x81, 0, 0xa0, 7]);
    f[11] = 3;
    tunnel.send(&f);
    s.settle(9);
    assert_eq!(
        drain(&end)[0][12..20],
        [0x88, 0xa8, 0xa0, 7, 0x81, 0, 0x20, 7],
        "the customer's tag is its own"
    );
    // What has no code point is left alone.
    plain.send(&arp(1, 1, 1, 2));
    s.settle(9);
    let got = drain(&end);
    assert_eq!(
        (got[0][12..16].to_vec(), got[0][16..].to_vec()),
        (vec![0x81, 0, 0xa0, 7], arp(1, 1, 1, 2)[12..].to_vec())
    );
    // A frame that goes nowhere is dropped, not lost on the way.
    let before = s.drops().iter().map(|d| d.1).sum::<u64>();
    let mut own = udp(1, 1, 5, 6);
    own[0..6].copy_from_slice(&common::mac(1));
    plain.send(&own);
    s.settle(9);
    assert_eq!(s.drops().iter().map(|d| d.1).sum::<u64>(), before + 1);
}

//! Learning, flooding and VLANs through in-process and stream ports.
#![expect(clippy::unwrap_used, reason = "a test ends where a step fails")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::time::Duration;

use vswitch::{
    Clock, DatagramPort, Endpoint, OffloadCaps, PortConfig, PortId, StreamMode, StreamPort, Switch, VlanMode,
    VlanSet,
};

fn switch() -> Switch {
    Switch::builder().workers(0).clock(Clock::manual()).build().unwrap()
}

fn port(s: &Switch, name: &str, vlan: VlanMode) -> (PortId, Endpoint) {
    let (p, e) = Endpoint::pair(256, OffloadCaps::empty()).unwrap();
    let config = PortConfig { vlan, ..PortConfig::default() };
    (s.add_port(name, p, config).unwrap(), e)
}

fn frame(dst: u8, src: u8, tag: Option<u16>) -> Vec<u8> {
    let mut f = vec![2, 0, 0, 0, 0, dst, 2, 0, 0, 0, 0, src];
    if let Some(t) = tag {
        f.extend_from_slice(&[0x81, 0x00]);
        f.extend_from_slice(&t.to_be_bytes());
    }
    f.extend_from_slice(&[0x12, 0x34]);
    f.extend([src; 186]);
    f
}

#[test]
fn unknown_destinations_flood_and_known_ones_do_not() {
    let s = switch();
    let (_, a) = port(&s, "a", VlanMode::default());
    let (b_id, b) = port(&s, "b", VlanMode::default());
    let (_, c) = port(&s, "c", VlanMode::default());
    a.send(&frame(2, 1, None));
    s.poll();
    assert!(b.recv().is_some() && c.recv().is_some() && a.recv().is_none());
    b.send(&frame(1, 2, None));
    s.poll();
    assert!(a.recv().is_some() && c.recv().is_none());
    for _ in 0..50 {
        a.send(&frame(2, 1, None));
    }
    s.settle(10);
    assert_eq!(b.recv_burst(100).len(), 50);
    assert!(c.recv().is_none());
    assert_eq!(s.port_stats(b_id).unwrap().tx_packets, 51);
    // After ageing the address is unknown again.
    s.clock().advance(Duration::from_secs(301));
    s.poll();
    assert!(s.mac_table().is_empty());
    a.send(&frame(2, 1, None));
    s.poll();
    assert!(c.recv().is_some());
}

#[test]
fn a_moved_address_is_followed_at_once() {
    let s = switch();
    let (_, a) = port(&s, "a", VlanMode::default());
    let (_, b) = port(&s, "b", VlanMode::default());
    let (_, c) = port(&s, "c", VlanMode::default());
    b.send(&frame(1, 2, None));
    a.send(&frame(2, 1, None));
    s.poll();
    a.send(&frame(2, 1, None));
    s.poll();
    b.recv_burst(10);
    c.recv_burst(10);
    c.send(&frame(1, 2, None));
    s.poll();
    a.send(&frame(2, 1, None));
    s.poll();
    assert!(c.recv().is_some() && b.recv().is_none());
}

#[test]
fn vlans_are_kept_apart_and_tags_are_translated() {
    let s = switch();
    let (_, a) = port(&s, "a", VlanMode::Access(10));
    let (_, b) = port(&s, "b", VlanMode::Access(20));
    let trunk = VlanMode::Trunk { native: 20, allowed: VlanSet::parse("10,30").unwrap() };
    let (_, t) = port(&s, "t", trunk);
    let (_, q) = port(&s, "q", VlanMode::Tunnel(30));
    a.send(&frame(9, 1, None));
    s.poll();
    assert_eq!(t.recv().unwrap(), frame(9, 1, Some(10)));
    assert!(b.recv().is_none() && q.recv().is_none());
    t.send(&frame(9, 2, None));
    s.poll();
    assert_eq!(b.recv().unwrap(), frame(9, 2, None));
    assert!(a.recv().is_none());
    t.send(&frame(9, 3, Some(10)));
    t.send(&frame(9, 3, Some(40)));
    s.poll();
    assert_eq!(a.recv_burst(9).into_iter().map(|f| f.0).collect::<Vec<_>>(), [frame(9, 3, None)]);
    q.send(&frame(9, 4, Some(77)));
    s.poll();
    let out = t.recv().unwrap();
    assert_eq!(out[12..20], [0x88, 0xa8, 0, 30, 0x81, 0, 0, 77]);
    t.send(&out.iter().enumerate().map(|(i, b)| if i == 11 { 5 } else { *b }).collect::<Vec<_>>());
    s.poll();
    assert_eq!(q.recv().unwrap()[12..16], [0x81, 0, 0, 77]);
    a.send(&frame(9, 1, Some(10)));
    s.poll();
    assert!(t.recv().is_none(), "an access port takes no tagged frame");
}

#[test]
fn isolated_ports_and_reconfiguration() {
    let s = switch();
    let (a_id, a) = port(&s, "a", VlanMode::default());
    let (b_id, b) = port(&s, "b", VlanMode::default());
    let isolated = PortConfig { isolated: true, ..PortConfig::default() };
    s.set_port_config(a_id, isolated.clone()).unwrap();
    s.set_port_config(b_id, isolated).unwrap();
    a.send(&frame(2, 1, None));
    s.poll();
    assert!(b.recv().is_none());
    assert_eq!(s.port_stats(a_id).unwrap().rx_dropped, 1);
    s.set_port_config(b_id, PortConfig::default()).unwrap();
    a.send(&frame(2, 1, None));
    s.poll();
    assert!(b.recv().is_some());
    s.remove_port(b_id).unwrap();
    assert!(s.remove_port(b_id).is_err());
    a.send(&frame(2, 1, None));
    s.poll();
    let lines = s.trace(a_id, &frame(2, 1, None)).unwrap();
    assert!(lines.iter().any(|l| l.contains("no-destination")), "{lines:?}");
}

#[test]
fn stream_ports_frame_with_a_length_and_survive_their_peer() {
    let dir = tempfile::tempdir().unwrap();
    let (listen, connect) = (dir.path().join("l"), dir.path().join("c"));
    let s = switch();
    s.add_port("l", StreamPort::new(&listen, StreamMode::Listen).unwrap(), PortConfig::default()).unwrap();
    let (_, e) = port(&s, "e", VlanMode::default());
    for round in 0..3 {
        let mut peer = UnixStream::connect(&listen).unwrap();
        let f = frame(9, round, None);
        peer.write_all(&(f.len() as u32).to_be_bytes()).unwrap();
        peer.write_all(&f[..7]).unwrap();
        s.poll();
        peer.write_all(&f[7..]).unwrap();
        s.settle(5);
        assert_eq!(e.recv(), Some(f));
        let mut large = frame(round, 7, None);
        large.resize(60_000, 3);
        e.send(&large);
        s.poll();
        let mut got = vec![0; 60_004];
        peer.read_exact(&mut got).unwrap();
        assert_eq!(got[..4], 60_000u32.to_be_bytes());
        assert_eq!(got[4..], large);
        drop(peer);
        s.poll();
    }
    // A frame longer than any frame can be ends the connection.
    let mut peer = UnixStream::connect(&listen).unwrap();
    peer.write_all(&[0xff; 8]).unwrap();
    s.settle(5);
    assert_eq!(peer.read(&mut [0; 8]).unwrap_or(0), 0);
    // The connecting side finds its peer, whenever it comes.
    s.add_port("c", StreamPort::new(&connect, StreamMode::Connect).unwrap(), PortConfig::default()).unwrap();
    s.poll();
    let l = std::os::unix::net::UnixListener::bind(&connect).unwrap();
    std::thread::sleep(Duration::from_millis(250));
    s.poll();
    let (mut peer, _) = l.accept().unwrap();
    e.send(&frame(9, 7, None));
    s.poll();
    let mut got = [0; 204];
    peer.read_exact(&mut got).unwrap();
    assert_eq!(got[4..], frame(9, 7, None));
}

#[test]
fn datagram_ports_carry_a_frame_a_datagram() {
    let dir = tempfile::tempdir().unwrap();
    let [fixed, open, peer, other] = ["fixed", "open", "peer", "other"].map(|n| dir.path().join(n));
    // A socket file that nobody serves is replaced, one that is served is not.
    drop(UnixDatagram::bind(&fixed).unwrap());
    let s = switch();
    let port_of = |path, peer| s.add_port("p", DatagramPort::new(path, peer).unwrap(), PortConfig::default());
    let id = port_of(&fixed, Some(peer.as_path())).unwrap();
    assert!(DatagramPort::new(&fixed, None).is_err());
    let (_, e) = port(&s, "e", VlanMode::default());
    let link = || s.ports().into_iter().find(|p| p.id == id).unwrap().link_up;
    assert!(!link());
    e.send(&frame(9, 7, None));
    s.poll();
    for round in 0..2 {
        // The peer comes, and comes back.
        let _ = std::fs::remove_file(&peer);
        let socket = UnixDatagram::bind(&peer).unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut long = frame(9, 7, None);
        long.resize(9014, round);
        e.send(&long);
        s.poll();
        assert!(link());
        let mut got = vec![0; 70_000];
        assert_eq!(socket.recv(&mut got).unwrap(), 9014);
        assert_eq!(got[..9014], long);
        socket.send_to(&frame(7, 9, None), &fixed).unwrap();
        s.settle(5);
        assert_eq!(e.recv(), Some(frame(7, 9, None)));
        // Nobody else is heard.
        let stranger = UnixDatagram::unbound().unwrap();
        stranger.send_to(&frame(7, 9, None), &fixed).unwrap();
        s.settle(5);
        assert_eq!(e.recv(), None);
        drop(socket);
        e.send(&frame(9, 7, None));
        s.poll();
        assert!(!link());
    }
    s.remove_port(id).unwrap();
    assert!(!fixed.exists());
    // Without a configured peer the last sender is the peer.
    port_of(&open, None).unwrap();
    let socket = UnixDatagram::bind(&other).unwrap();
    socket.send_to(&frame(7, 9, None), &open).unwrap();
    s.settle(5);
    assert_eq!(e.recv(), Some(frame(7, 9, None)));
    e.send(&frame(9, 7, None));
    s.poll();
    assert_eq!(socket.recv(&mut [0; 2000]).unwrap(), 200);
}

#[test]
fn a_threaded_switch_wakes_from_sleep() {
    let s = Switch::builder().workers(2).build().unwrap();
    let (_, a) = port(&s, "a", VlanMode::default());
    let (b_id, b) = port(&s, "b", VlanMode::default());
    for i in 0..20 {
        a.send(&frame(2, 1, None));
        let start = std::time::Instant::now();
        while b.recv().is_none() {
            assert!(start.elapsed() < Duration::from_secs(20), "frame {i} was lost");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(s.port_stats(b_id).unwrap().tx_packets, 20);
}

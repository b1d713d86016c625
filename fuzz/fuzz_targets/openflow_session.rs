//! Any bytes from an OpenFlow peer, in chunks: the switch answers with well-formed messages or ends the session.
#![no_main]

use fuzz::reached;
use libfuzzer_sys::fuzz_target;
use vswitch::openflow::{Roles, Session};
use vswitch::pipeline::FlowFilter;
use vswitch::{Clock, Endpoint, OffloadCaps, PortConfig, Switch};

/// An IPv4 TCP segment from host `n`, with no checksums, to port 80.
fn tcp_packet(n: u8) -> Vec<u8> {
    let mut p = vec![0; 60];
    p[..14].copy_from_slice(&[2, 0, 0, 0, 0, n ^ 1, 2, 0, 0, 0, 0, n, 8, 0]);
    p[14..34].copy_from_slice(&[0x45, 0, 0, 46, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, n, 10, 0, 0, n ^ 1]);
    p[34..38].copy_from_slice(&[4, 210, 0, 80]);
    p[46..48].copy_from_slice(&[0x50, 2]);
    p
}

fuzz_target!(|data: &[u8]| {
    let [chunk, stream @ ..] = data else { return };
    let switch = Switch::builder().workers(0).clock(Clock::manual()).build().expect("switch");
    let ends = [1, 2, 3].map(|n: u8| {
        let (port, end) = Endpoint::pair(64, OffloadCaps::empty()).expect("pair");
        switch.add_port(&format!("p{n}"), port, PortConfig::default()).expect("port");
        end
    });
    let mut roles = Roles::default();
    let mut session = Session::new(&mut roles, 1, chunk & 1 != 0);
    for part in stream.chunks(usize::from(chunk / 2) + 1) {
        session.receive(part);
        session.run(&switch, &mut roles, |_| ());
        let mut out = session.pending();
        while !out.is_empty() {
            let length = usize::from(u16::from_be_bytes([out[2], out[3]]));
            assert!(matches!(out[0], 1..=6) && (8..=out.len()).contains(&length), "a broken message");
            out = &out[length..];
        }
        let sent = session.pending().len();
        session.sent(sent);
        if session.has_failed() {
            break;
        }
    }
    if switch.table_sizes().iter().any(|(_, rules)| *rules > 0) {
        reached("rule-added");
    }
    if !switch.groups().is_empty() {
        reached("group-added");
    }
    if !switch.meters().is_empty() {
        reached("meter-added");
    }
    // What the peer has set up meets packets, twice: the second time by the cached fast path.
    for (n, end) in ends.iter().enumerate() {
        let frame = tcp_packet(n as u8);
        end.send(&frame);
        end.send(&frame);
        switch.settle(4);
    }
    if switch.flows(&FlowFilter::default()).iter().any(|rule| rule.stats.get().0 > 0) {
        reached("rule-hit");
    }
});

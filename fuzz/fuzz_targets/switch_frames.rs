//! Any frames through a switch: none breaks it, and a frame that is sent again, now by the cached fast path, is
//! treated as the first time.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vswitch::{Clock, Endpoint, OffloadCaps, PortConfig, Switch, VlanMode};

fuzz_target!(|frames: Vec<(u8, Vec<u8>)>| {
    let switch = Switch::builder().workers(0).clock(Clock::manual()).build().expect("switch");
    let mut ends = Vec::new();
    for i in 0..4u16 {
        let (port, end) = Endpoint::pair(64, OffloadCaps::empty()).expect("pair");
        let vlan = if i == 3 { VlanMode::Access(7) } else { VlanMode::default() };
        switch.add_port(&format!("p{i}"), port, PortConfig { vlan, ..PortConfig::default() }).expect("port");
        ends.push(end);
    }
    let mut send = |from: usize, frame: &[u8]| {
        ends[from].send(frame);
        switch.settle(4);
        ends.iter().map(|end| end.recv_burst(64).into_iter().map(|(f, _)| f).collect::<Vec<_>>()).collect::<Vec<_>>()
    };
    for (from, frame) in frames.iter().take(32) {
        let from = usize::from(from % 4);
        // The first time learns the sender's address.
        send(from, frame);
        let slow = send(from, frame);
        let fast = send(from, frame);
        assert_eq!(slow, fast);
        assert!(fast[from].is_empty(), "a frame went back where it came from");
    }
});

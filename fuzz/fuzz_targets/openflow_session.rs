//! Any bytes from an OpenFlow peer, in chunks: the switch answers with well-formed messages or ends the session.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vswitch::openflow::{Roles, Session};
use vswitch::{Clock, Switch};

fuzz_target!(|data: &[u8]| {
    let [chunk, stream @ ..] = data else { return };
    let switch = Switch::builder().workers(0).clock(Clock::manual()).build().expect("switch");
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
});

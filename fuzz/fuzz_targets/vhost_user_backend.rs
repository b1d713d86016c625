//! Any vhost-user front-end against a switch's port: its messages, descriptors, rings and frames. Answers are well
//! formed, and the switch goes on switching for others.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use fuzz::{drain, reached, records};
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vswitch::{Clock, Endpoint, OffloadCaps, PortConfig, Switch, VhostUserPort};

/// Bytes of the guest's memory.
const MEMORY: u64 = 1 << 18;
/// Bytes of another file, large enough for a log of all of them.
const SMALL: u64 = 4096;

/// Kinds of records; those below are requests of this number.
const DESCRIPTORS: u8 = 0x40;
const MEMORY_BYTES: u8 = 0x41;
const FRAME: u8 = 0x42;
const RAW: u8 = 0x43;
/// The request by which a front-end says what features it wants, and one of them.
const SET_FEATURES: u32 = 2;
const RING_PACKED: u64 = 1 << 34;
/// Bit of a request's kind: it asks for an answer.
const NEED_REPLY: u8 = 0x80;

struct FrontEnd<'a> {
    stream: UnixStream,
    memory: File,
    small: File,
    event: EventFd,
    /// Not its own: it would lose answers to who takes it for a queue's event.
    socket: UnixStream,
    /// Descriptors that go with the next message.
    descriptors: Vec<RawFd>,
    /// Whether packed rings were asked for.
    packed: bool,
    switch: &'a Switch,
    end: &'a Endpoint,
}

impl FrontEnd<'_> {
    fn step(&mut self, kind: u8, body: &[u8]) {
        match kind {
            DESCRIPTORS => {
                let choose = |b: &u8| match b % 4 {
                    0 => self.memory.as_raw_fd(),
                    1 => self.event.as_raw_fd(),
                    2 => self.small.as_raw_fd(),
                    _ => self.socket.as_raw_fd(),
                };
                self.descriptors = body.iter().take(16).map(choose).collect();
            }
            MEMORY_BYTES => {
                let Some((at, data)) = body.split_first_chunk::<4>() else { return };
                let at = u64::from(u32::from_le_bytes(*at)) % MEMORY;
                let len = data.len().min((MEMORY - at) as usize);
                self.memory.write_all_at(&data[..len], at).expect("memory");
            }
            FRAME => {
                self.end.send(body);
            }
            RAW => {
                let _ = self.stream.write_all(body);
                // Or the rest of a message would be waited for.
                let _ = self.stream.shutdown(Shutdown::Write);
            }
            _ => {
                let code = u32::from(kind & 0x3f);
                if let (SET_FEATURES, Some(bits)) = (code, body.first_chunk()) {
                    self.packed = u64::from_le_bytes(*bits) & RING_PACKED != 0;
                }
                let flags = if kind & NEED_REPLY != 0 { 9u32 } else { 1 };
                let header = [code, flags, body.len() as u32].map(u32::to_le_bytes).concat();
                let _ = self.stream.send_with_fds(&[&header, body], &self.descriptors);
                self.descriptors.clear();
            }
        }
    }

    /// Lets the packets flow and checks what came back.
    fn settle(&mut self) {
        self.switch.settle(3);
        if !self.end.recv_burst(64).is_empty() {
            if self.packed {
                reached("frame-from-packed-ring");
            } else {
                reached("frame-from-guest");
            }
        }
        let (bytes, _) = drain(&self.stream);
        self.stream.set_nonblocking(false).expect("socket");
        let mut rest = &bytes[..];
        while let Some((header, more)) = rest.split_first_chunk::<12>() {
            let word =
                |i: usize| u32::from_le_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
            assert_eq!(word(4), 5, "an answer has other flags");
            assert!(word(8) as usize <= more.len(), "an answer is cut off");
            rest = &more[word(8) as usize..];
        }
        assert!(rest.is_empty(), "an answer is cut off");
    }
}

fn file(len: u64) -> File {
    let file = tempfile::tempfile_in("/dev/shm").expect("file");
    file.set_len(len).expect("file");
    file
}

fuzz_target!(|data: &[u8]| {
    let [pairs, data @ ..] = data else { return };
    let switch = Switch::builder().workers(0).clock(Clock::manual()).build().expect("switch");
    let mut ends = Vec::new();
    for name in ["a", "b"] {
        let (port, end) = Endpoint::pair(64, OffloadCaps::all()).expect("pair");
        switch.add_port(name, port, PortConfig::default()).expect("port");
        ends.push(end);
    }
    let (port, driver) = VhostUserPort::driven(1 + usize::from(pairs % 3)).expect("port");
    let guest = switch.add_port("guest", port, PortConfig::default()).expect("port");
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let (socket, _peer) = UnixStream::pair().expect("sockets");
    let mut front = FrontEnd {
        stream: ours,
        memory: file(MEMORY),
        small: file(SMALL),
        event: EventFd::new(0).expect("eventfd"),
        socket,
        descriptors: Vec::new(),
        packed: false,
        switch: &switch,
        end: &ends[0],
    };
    let mut steps = records(data).take(128);
    driver.serve(&theirs, || {
        // Until there is a request to serve.
        loop {
            front.settle();
            if switch.ports().iter().any(|p| p.id == guest && p.link_up) {
                reached("queues-run");
            }
            let Some((kind, body)) = steps.next() else {
                let _ = front.stream.shutdown(Shutdown::Write);
                return;
            };
            front.step(kind, body);
            if !matches!(kind, DESCRIPTORS | MEMORY_BYTES | FRAME) {
                return;
            }
        }
    });
    if switch.port_stats(guest).expect("statistics").tx_packets > 0 {
        reached("frame-to-guest");
    }
    assert!(switch.ports().iter().all(|p| p.id != guest || !p.link_up), "queues run without a front-end");
    switch.settle(3);
    ends.iter().for_each(|end| drop(end.recv_burst(64)));
    let mut frame = vec![0xff; 60];
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 77]);
    ends[0].send(&frame);
    switch.settle(3);
    assert!(ends[1].recv_burst(64).iter().any(|(f, _)| *f == frame), "the switch lost a frame of others");
});

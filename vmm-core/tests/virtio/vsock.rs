//! The socket device over the real Unix bridge.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_core::devices::virtio::Vsock;

use crate::conformance::{self, Subject};
use crate::driver::{Buffer, DriverQueue, Guest, TRANSPORTS, Transport};

const CID: u64 = 3;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;
const WINDOW: u32 = 64 << 10;

#[derive(Clone, Debug, Default, PartialEq)]
struct Packet {
    host: u32,
    guest: u32,
    op: u16,
    flags: u32,
    buffer: u32,
    forwarded: u32,
    data: Vec<u8>,
}

impl Packet {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = [CID, 2].map(u64::to_le_bytes).concat();
        bytes.extend([self.guest, self.host, self.data.len() as u32].map(u32::to_le_bytes).concat());
        bytes.extend([1, self.op].map(u16::to_le_bytes).concat());
        bytes.extend([self.flags, self.buffer, self.forwarded].map(u32::to_le_bytes).concat());
        bytes.extend(&self.data);
        bytes
    }

    fn parse(bytes: &[u8]) -> Self {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(8)), (2, CID as u32));
        assert_eq!(word(24) as usize, bytes.len() - 44);
        assert_eq!(bytes[28], 1);
        Self {
            host: word(16),
            guest: word(20),
            op: u16::from_le_bytes([bytes[30], bytes[31]]),
            flags: word(32),
            buffer: word(36),
            forwarded: word(40),
            data: bytes[44..].to_vec(),
        }
    }
}

/// The guest's socket layer, as far as tests need it.
struct Sockets {
    guest: Guest,
    rx: DriverQueue,
    tx: DriverQueue,
    buffers: std::collections::HashMap<u16, Buffer>,
    out: Buffer,
}

impl Sockets {
    fn new(transport: Transport, path: &Path) -> Self {
        let mut guest = Guest::new(transport, Vsock::new(CID, path).unwrap());
        assert_eq!(guest.config_u64(0), CID);
        let mut queues = guest.bring_up(u64::MAX, 32);
        queues.pop();
        let (tx, mut rx) = (queues.pop().unwrap(), queues.pop().unwrap());
        let mut buffers = std::collections::HashMap::new();
        for _ in 0..16 {
            let buffer = guest.writable(4096);
            buffers.insert(rx.submit(&[buffer]), buffer);
        }
        guest.notify(0);
        let out = guest.writable(64 << 10);
        Self { guest, rx, tx, buffers, out: Buffer { writable: false, ..out } }
    }

    fn send(&mut self, packet: &Packet) {
        let bytes = packet.bytes();
        self.guest.memory.write(self.out.address, &bytes).unwrap();
        let buffer = Buffer { len: bytes.len() as u32, ..self.out };
        self.guest.exchange(&mut self.tx, &[buffer]);
    }

    fn recv(&mut self) -> Packet {
        let (id, len) = self.guest.wait_used(&mut self.rx);
        let buffer = self.buffers.remove(&id).unwrap();
        let packet = Packet::parse(&self.guest.bytes(buffer)[..len as usize]);
        self.buffers.insert(self.rx.submit(&[buffer]), buffer);
        self.guest.notify(0);
        packet
    }

    /// The next packet that is about more than credit.
    fn event(&mut self) -> Packet {
        loop {
            let packet = self.recv();
            if packet.op != CREDIT_UPDATE {
                return packet;
            }
        }
    }
}

fn packet(host: u32, guest: u32, op: u16) -> Packet {
    Packet { host, guest, op, buffer: WINDOW, ..Packet::default() }
}

fn fresh_path() -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("vsock-test-{}-{n}", std::process::id()))
}

fn port_path(path: &Path, port: u32) -> PathBuf {
    PathBuf::from(format!("{}_{port}", path.display()))
}

#[test]
fn conforms() {
    conformance::run(&Subject {
        make: || Vsock::new(CID, &fresh_path()).unwrap(),
        device_type: 19,
        queue: 1,
        needs: 0,
        request: |guest| (vec![guest.readable(&packet(1, 1, CREDIT_UPDATE).bytes())], 0),
    });
}

#[test]
fn a_guest_reaches_a_program_of_the_host() {
    for transport in TRANSPORTS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let mut s = Sockets::new(transport, &path);
        s.send(&packet(52, 1000, REQUEST));
        assert_eq!(s.recv().op, RST, "nobody listens");
        let listener = UnixListener::bind(port_path(&path, 52)).unwrap();
        s.send(&packet(52, 1000, REQUEST));
        let answer = s.recv();
        assert_eq!((answer.op, answer.host, answer.guest), (RESPONSE, 52, 1000));
        assert!(answer.buffer >= 4096);
        let (mut program, _) = listener.accept().unwrap();
        s.send(&Packet { data: b"hello".to_vec(), ..packet(52, 1000, RW) });
        let mut bytes = [0; 5];
        program.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello");
        program.write_all(b"world").unwrap();
        let got = s.event();
        assert_eq!((got.op, &got.data[..]), (RW, &b"world"[..]));
        s.send(&packet(52, 1000, CREDIT_REQUEST));
        assert_eq!(s.recv().forwarded, 5);
        // The guest closes for sending, the program answers and closes, the guest closes.
        s.send(&Packet { flags: 2, ..packet(52, 1000, SHUTDOWN) });
        assert_eq!(program.read(&mut bytes).unwrap(), 0);
        program.write_all(b"bye").unwrap();
        assert_eq!(s.event().data, b"bye");
        drop(program);
        let end = s.event();
        assert_eq!(end.op, SHUTDOWN);
        s.send(&Packet { flags: 3, ..packet(52, 1000, SHUTDOWN) });
        while s.event().op != RST {}
        s.send(&Packet { data: vec![1], ..packet(52, 1000, RW) });
        assert_eq!(s.event().op, RST, "the connection is gone");
    }
}

#[test]
fn a_program_of_the_host_reaches_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let mut s = Sockets::new(Transport::PciMsix, &path);
    for round in 0..3 {
        let mut program = BufReader::new(UnixStream::connect(&path).unwrap());
        let greeting = if round == 2 { &b"CONNECT 1234\n"[..] } else { b"CONNECT 1234\nearly" };
        program.get_mut().write_all(greeting).unwrap();
        let request = s.recv();
        assert_eq!((request.op, request.guest), (REQUEST, 1234));
        if round == 2 {
            s.send(&packet(request.host, 1234, RST));
            assert_eq!(program.read_line(&mut String::new()).unwrap(), 0, "refused");
            continue;
        }
        s.send(&packet(request.host, 1234, RESPONSE));
        let mut line = String::new();
        program.read_line(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", request.host));
        assert_eq!(s.event().data, b"early");
        s.send(&Packet { data: b"reply".to_vec(), ..packet(request.host, 1234, RW) });
        let mut bytes = [0; 5];
        program.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"reply");
        s.send(&Packet { flags: 3, ..packet(request.host, 1234, SHUTDOWN) });
        assert_eq!(s.event().op, RST);
        assert_eq!(program.read(&mut bytes).unwrap(), 0);
    }
    for greeting in
        ["GET / HTTP/1.1\n", "CONNECT\n", "CONNECT -1\n", "CONNECT 4294967296\n", &"C".repeat(100)]
    {
        let mut program = UnixStream::connect(&path).unwrap();
        program.write_all(greeting.as_bytes()).unwrap();
        assert!(matches!(program.read(&mut [0]), Ok(0) | Err(_)), "{greeting:?}");
    }
}

/// More than any buffer holds goes through in both directions, under credit.
#[test]
fn credit_holds_in_both_directions() {
    const TOTAL: usize = 2 << 20;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let mut s = Sockets::new(Transport::PciMsix, &path);
    let listener = UnixListener::bind(port_path(&path, 1)).unwrap();
    s.send(&packet(1, 9, REQUEST));
    let response = s.recv();
    assert_eq!(response.op, RESPONSE);
    let (mut program, _) = listener.accept().unwrap();
    let expected: Vec<u8> = (0..TOTAL).map(|i| (i % 253) as u8).collect();
    let echo = {
        let mut input = program.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 10_000];
            let mut all = Vec::new();
            while all.len() < TOTAL {
                let n = input.read(&mut buffer).unwrap();
                all.extend(&buffer[..n]);
            }
            // Only now is anything sent back.
            program.write_all(&all).unwrap();
            program
        })
    };
    let (mut sent, mut taken, mut window) = (0u32, 0u32, (response.buffer, 0u32));
    while (sent as usize) < TOTAL {
        let room = window.0 - (sent - window.1);
        if room == 0 {
            let packet = s.recv();
            assert_eq!(packet.op, CREDIT_UPDATE);
            window = (packet.buffer, packet.forwarded);
            continue;
        }
        let n = (room as usize).min(30_000).min(TOTAL - sent as usize);
        s.send(&Packet { data: expected[sent as usize..][..n].to_vec(), ..packet(1, 9, RW) });
        sent += n as u32;
    }
    let mut back = Vec::new();
    let mut told = 0;
    while back.len() < TOTAL {
        let got = s.event();
        assert_eq!(got.op, RW);
        taken += got.data.len() as u32;
        assert!(taken - told <= WINDOW, "the guest's buffer overflows");
        back.extend(got.data);
        if taken - told == WINDOW {
            told = taken;
            s.send(&Packet { forwarded: taken, ..packet(1, 9, CREDIT_UPDATE) });
        }
    }
    assert!(back == expected);
    drop(echo.join().unwrap());
}

#[test]
fn hostile_packets_end_their_connection_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let mut s = Sockets::new(Transport::Mmio, &path);
    let listener = UnixListener::bind(port_path(&path, 1)).unwrap();
    s.send(&packet(1, 8, REQUEST));
    assert_eq!(s.recv().op, RESPONSE);
    let good = listener.accept().unwrap();
    // More than the buffer, while the program reads nothing.
    s.send(&packet(1, 9, REQUEST));
    assert_eq!(s.recv().op, RESPONSE);
    let idle = listener.accept().unwrap();
    for _ in 0..40 {
        s.send(&Packet { data: vec![0; 60_000], ..packet(1, 9, RW) });
    }
    assert_eq!(s.event().op, RST);
    drop(idle);
    for op in [REQUEST, RESPONSE, 77] {
        s.send(&packet(1, 10, REQUEST));
        while s.event().op != RESPONSE {}
        s.send(&packet(1, 10, op));
        assert_eq!(s.event().op, RST, "{op}");
    }
    // A length beyond the descriptor, a foreign CID, a cut header: ignored.
    let mut bytes = Packet { data: vec![1; 8], ..packet(1, 8, RW) }.bytes();
    bytes.truncate(48);
    let mut foreign = packet(1, 8, RST).bytes();
    foreign[0] = 9;
    for bytes in [bytes, foreign, vec![0; 20]] {
        let buffer = s.guest.readable(&bytes);
        s.guest.exchange(&mut s.tx, &[buffer]);
    }
    let (mut program, _) = good;
    program.write_all(b"alive").unwrap();
    loop {
        let packet = s.event();
        if packet.guest == 8 {
            assert_eq!(packet.data, b"alive");
            break;
        }
    }
    assert!(Vsock::new(2, &path).is_err());
    assert!(Vsock::new(5, &path).is_err(), "the path is taken");
    drop(s);
    assert!(!path.exists());
}

/// Connections outlive a pause; a restore tells the guest that they are gone.
#[test]
fn pauses_keep_connections_and_restores_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let mut s = Sockets::new(Transport::PciMsix, &path);
    let listener = UnixListener::bind(port_path(&path, 1)).unwrap();
    s.send(&packet(1, 8, REQUEST));
    assert_eq!(s.recv().op, RESPONSE);
    let (mut program, _) = listener.accept().unwrap();
    s.guest.lifecycle().pause().unwrap();
    program.write_all(b"while paused").unwrap();
    s.guest.start();
    assert_eq!(s.event().data, b"while paused");
    s.guest.lifecycle().pause().unwrap();
    let saved = s.guest.lifecycle().save().unwrap();
    s.guest.lifecycle().restore(&saved).unwrap();
    s.guest.start();
    s.send(&Packet { data: vec![1], ..packet(1, 8, RW) });
    assert_eq!(s.event().op, RST);
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
}

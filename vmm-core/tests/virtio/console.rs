//! The console and the entropy device.

use std::collections::VecDeque;
use std::io::{Read, Write, pipe};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use vmm_core::devices::virtio::{Console, ConsolePort, Rng};

use crate::conformance::{self, Subject};
use crate::driver::{Buffer, DriverQueue, Guest, TRANSPORTS, Transport};

const SIZE: u64 = 1;
const MULTIPORT: u64 = 2;

#[test]
fn console_conforms() {
    conformance::run(&Subject {
        make: || Console::new(vec![ConsolePort::new("", None, None)]).unwrap(),
        device_type: 3,
        queue: 1,
        needs: 0,
        request: |guest| (vec![guest.readable(b"hello")], 0),
    });
}

#[test]
fn entropy_conforms() {
    conformance::run(&Subject {
        make: || Rng::new().unwrap(),
        device_type: 4,
        queue: 0,
        needs: 0,
        request: |guest| (vec![guest.writable(64)], 64),
    });
}

#[test]
fn entropy_differs() {
    let mut guest = Guest::new(Transport::PciMsix, Rng::new().unwrap());
    let mut queues = guest.bring_up(0, 8);
    let buffers: Vec<Vec<u8>> = (0..2)
        .map(|_| {
            let buffer = guest.writable(100_000);
            assert_eq!(guest.exchange(&mut queues[0], &[buffer]), 65536);
            guest.bytes(buffer)
        })
        .collect();
    assert_ne!(buffers[0][..65536], buffers[1][..65536]);
    assert_eq!(buffers[0][65536..], [0xee; 100_000 - 65536], "beyond the used length");
}

#[test]
fn bytes_go_both_ways() {
    for transport in TRANSPORTS {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let port = ConsolePort::new("", Some(ours.try_clone().unwrap().into()), Some(ours.into()));
        let console = Console::new(vec![port]).unwrap();
        let mut guest = Guest::new(transport, console.clone());
        let mut queues = guest.bring_up(SIZE, 16);
        assert_eq!(queues.len(), 2);
        let text = guest.readable(b"login: ");
        guest.exchange(&mut queues[1], &[text]);
        let mut bytes = [0; 7];
        theirs.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"login: ");
        theirs.write_all(b"root\n").unwrap();
        let input = guest.writable(3);
        assert_eq!(guest.exchange(&mut queues[0], &[input]), 3);
        assert_eq!(guest.bytes(input), b"roo");
        assert_eq!(guest.exchange(&mut queues[0], &[input]), 2);
        assert_eq!(guest.bytes(input), b"t\no");
        console.resize(132, 43);
        guest.wait_interrupt(None);
        assert_eq!(guest.config_u32(0), 43 << 16 | 132);
    }
}

#[test]
fn a_full_pipe_delays_output_and_loses_none() {
    let (mut rx, tx) = pipe().unwrap();
    let port = ConsolePort::new("", None, Some(OwnedFd::from(tx)));
    let mut guest = Guest::new(Transport::Mmio, Console::new(vec![port]).unwrap());
    let mut queues = guest.bring_up(0, 64);
    let expected: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    for piece in expected.chunks(30_000) {
        let buffer = guest.readable(piece);
        queues[1].submit(&[buffer]);
    }
    guest.notify(1);
    // Pausing in the middle loses nothing either.
    guest.lifecycle().pause().unwrap();
    guest.start();
    let mut bytes = vec![0; expected.len()];
    rx.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, expected);
}

/// A driver of several ports, listening on the control queue.
struct Driver {
    guest: Guest,
    queues: Vec<DriverQueue>,
    /// What the device fills with messages, in order.
    buffers: VecDeque<Buffer>,
}

impl Driver {
    fn new(ports: Vec<ConsolePort>) -> Self {
        let mut guest = Guest::new(Transport::PciMsix, Console::new(ports).unwrap());
        let mut queues = guest.bring_up(SIZE | MULTIPORT, 32);
        let buffers: VecDeque<_> = (0..12).map(|_| guest.writable(64)).collect();
        for buffer in &buffers {
            queues[2].submit(&[*buffer]);
        }
        Self { guest, queues, buffers }
    }

    /// Tells the device of an event on a port.
    fn say(&mut self, port: u32, event: u16, value: u16) {
        let message = [&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        self.send(3, &message);
    }

    /// The device's next message.
    fn hear(&mut self) -> Vec<u8> {
        let (_, len) = self.guest.wait_used(&mut self.queues[2]);
        let buffer = self.buffers.pop_front().unwrap();
        self.guest.bytes(buffer)[..len as usize].to_vec()
    }

    /// Sends bytes on a queue and waits until the device has taken them.
    fn send(&mut self, queue: usize, bytes: &[u8]) {
        let buffer = self.guest.readable(bytes);
        self.guest.exchange(&mut self.queues[queue], &[buffer]);
    }

    /// Offers a buffer for the second port's input.
    fn offer(&mut self) -> Buffer {
        let buffer = self.guest.writable(16);
        self.queues[4].submit(&[buffer]);
        self.guest.notify(4);
        buffer
    }

    /// Waits for input in `buffer`.
    fn input(&mut self, buffer: Buffer) -> Vec<u8> {
        let (_, len) = self.guest.wait_used(&mut self.queues[4]);
        self.guest.bytes(buffer)[..len as usize].to_vec()
    }
}

#[test]
fn ports_are_announced_and_opened() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let ports = vec![
        ConsolePort::new("", None, None),
        ConsolePort::new("agent", Some(ours.try_clone().unwrap().into()), Some(ours.into())),
    ];
    let mut driver = Driver::new(ports);
    assert_eq!(driver.queues.len(), 6);
    assert_eq!(driver.guest.config_u32(4), 2);
    // Nonsense first: unknown ports and events.
    driver.say(77, 3, 1);
    driver.say(0, 99, 1);
    driver.say(0, 0, 1);
    assert_eq!(driver.hear(), [0, 0, 0, 0, 1, 0, 1, 0]);
    assert_eq!(driver.hear(), [1, 0, 0, 0, 1, 0, 1, 0]);
    driver.say(0, 3, 1);
    assert_eq!(driver.hear(), [0, 0, 0, 0, 4, 0, 1, 0]);
    assert_eq!(driver.hear(), [0, 0, 0, 0, 5, 0, 0, 0, 80, 0, 25, 0]);
    assert_eq!(driver.hear(), [0, 0, 0, 0, 6, 0, 1, 0]);
    driver.say(1, 3, 1);
    assert_eq!(driver.hear(), b"\x01\0\0\0\x07\0\x01\0agent");
    assert_eq!(driver.hear(), [1, 0, 0, 0, 6, 0, 1, 0]);
    // Input is read only once the guest opened the port.
    theirs.write_all(b"ping").unwrap();
    let input = driver.offer();
    driver.say(1, 6, 1);
    assert_eq!(driver.input(input), b"ping");
    driver.send(5, b"pong");
    let mut bytes = [0; 4];
    theirs.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"pong");
    // The host hangs up: the guest learns it.
    driver.offer();
    drop(theirs);
    assert_eq!(driver.hear(), [1, 0, 0, 0, 6, 0, 0, 0]);
}

/// A client that connects, leaves, and another one: the guest learns of each.
#[test]
fn clients_of_a_listening_port_come_and_go() {
    let path = std::env::temp_dir().join(format!("nacre-port-{}", std::process::id()));
    let listener = UnixListener::bind(&path).unwrap();
    let ports = vec![ConsolePort::new("", None, None), ConsolePort::listening("agent", listener).unwrap()];
    let mut driver = Driver::new(ports);
    driver.say(1, 3, 1);
    assert_eq!(driver.hear(), b"\x01\0\0\0\x07\0\x01\0agent");
    driver.say(1, 6, 1);
    // Nobody is there: what the guest writes is lost, and it does not wait.
    driver.send(5, b"lost");
    let mut input = driver.offer();
    for text in [b"one!", b"two!"] {
        let mut client = UnixStream::connect(&path).unwrap();
        assert_eq!(driver.hear(), [1, 0, 0, 0, 6, 0, 1, 0], "opened");
        driver.send(5, text);
        let mut bytes = [0; 4];
        client.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, text);
        client.write_all(b"ok").unwrap();
        assert_eq!(driver.input(input), b"ok");
        input = driver.offer();
        drop(client);
        assert_eq!(driver.hear(), [1, 0, 0, 0, 6, 0, 0, 0], "closed");
    }
    std::fs::remove_file(&path).unwrap();
}

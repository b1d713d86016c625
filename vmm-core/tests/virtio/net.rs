//! The network device and its back-ends.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_core::devices::virtio::Net;
use vmm_core::devices::virtio::net::{NetOptions, StreamBackend, TapBackend, net_features as f};
use vmm_core::devices::virtio::rate::{Limits, Rate};

use crate::conformance::{self, Subject};
use crate::driver::{Buffer, DriverQueue, Guest, TRANSPORTS, Transport};
use crate::namespace;

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

fn frame(len: usize, tag: u8) -> Vec<u8> {
    let mut frame = vec![tag; len];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&MAC);
    frame
}

fn outgoing(guest: &mut Guest, frame: &[u8]) -> [Buffer; 2] {
    [guest.readable(&[0; 12]), guest.readable(frame)]
}

fn device() -> (Arc<Net>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let options = NetOptions { mac: MAC, mtu: Some(1400), ..Default::default() };
    (Net::new(Arc::new(StreamBackend::from_stream(ours)), &options).unwrap(), theirs)
}

fn read_frame(peer: &mut UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    peer.read_exact(&mut length).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    peer.read_exact(&mut frame).unwrap();
    frame
}

fn write_frame(peer: &mut UnixStream, frame: &[u8]) {
    peer.write_all(&(frame.len() as u32).to_be_bytes()).unwrap();
    peer.write_all(frame).unwrap();
}

#[test]
fn conforms() {
    conformance::run(&Subject {
        make: || device().0,
        device_type: 1,
        queue: 1,
        needs: 0,
        request: |guest| (outgoing(guest, &frame(60, 1)).to_vec(), 0),
    });
}

#[test]
fn control_queue_conforms() {
    conformance::run(&Subject {
        make: || device().0,
        device_type: 1,
        queue: 2,
        needs: f::CTRL_VQ,
        request: |guest| (vec![guest.readable(&[0, 0, 1]), guest.writable(1)], 1),
    });
}

#[test]
fn frames_go_both_ways() {
    for transport in TRANSPORTS {
        for features in [0, f::MRG_RXBUF] {
            let (net, mut peer) = device();
            let mut guest = Guest::new(transport, net);
            let mut queues = guest.bring_up(features | f::MAC | f::MTU | f::STATUS, 64);
            let mut config = [0; 12];
            guest.config(0, &mut config);
            assert_eq!(config[..6], MAC);
            assert_eq!(config[6..8], [1, 0], "link up");
            assert_eq!(config[10..12], 1400u16.to_le_bytes());
            for len in [14, 60, 1514, 9000] {
                let sent = frame(len, 7);
                let buffers = outgoing(&mut guest, &sent);
                guest.exchange(&mut queues[1], &buffers);
                assert_eq!(read_frame(&mut peer), sent);
            }
            // Frames arrive before and after there are buffers for them.
            write_frame(&mut peer, &frame(60, 1));
            let size = if features == 0 { 1600 } else { 100 };
            let buffers: Vec<_> = (0..40).map(|_| guest.writable(size)).collect();
            for buffer in &buffers {
                queues[0].submit(&[*buffer]);
            }
            guest.notify(0);
            write_frame(&mut peer, &frame(1500, 2));
            let mut taken = 0;
            for (len, tag) in [(60, 1), (1500, 2)] {
                let (received, chains) = receive(&guest, &mut queues[0], &buffers[taken..]);
                assert_eq!(received, frame(len, tag));
                taken += chains;
                assert_eq!(chains, if features == 0 { 1 } else { (len + 12).div_ceil(100) });
            }
        }
    }
}

/// Takes one frame from the receive queue, whose buffers are used in order.
fn receive(guest: &Guest, queue: &mut DriverQueue, buffers: &[Buffer]) -> (Vec<u8>, usize) {
    let mut bytes = Vec::new();
    let mut chains = 0;
    loop {
        let (_, len) = guest.wait_used(queue);
        bytes.extend(&guest.bytes(buffers[chains])[..len as usize]);
        chains += 1;
        if chains == usize::from(u16::from_le_bytes([bytes[10], bytes[11]])) {
            return (bytes.split_off(12), chains);
        }
    }
}

#[test]
fn a_full_socket_delays_frames_and_loses_none() {
    let (net, mut peer) = device();
    let mut guest = Guest::new(Transport::PciMsix, net);
    let mut queues = guest.bring_up(0, 256);
    let count = 120;
    let bodies: Vec<Vec<u8>> = (0..count).map(|i| frame(9000 + i, i as u8)).collect();
    for body in &bodies {
        let buffers = outgoing(&mut guest, body);
        queues[1].submit(&buffers);
    }
    guest.notify(1);
    for body in &bodies {
        assert_eq!(&read_frame(&mut peer), body);
    }
    for _ in 0..count {
        guest.wait_used(&mut queues[1]);
    }
}

#[test]
fn malformed_frames_are_dropped_and_counted() {
    let (net, mut peer) = device();
    let mut guest = Guest::new(Transport::Mmio, net.clone());
    let mut queues = guest.bring_up(0, 64);
    for buffers in [
        vec![guest.readable(&[0; 11])],
        vec![guest.readable(&[0; 12])],
        vec![guest.readable(&[0; 25])],
        vec![guest.writable(100)],
        vec![guest.readable(&vec![0; 12 + 14 + 5 + 65536])],
    ] {
        guest.exchange(&mut queues[1], &buffers);
    }
    assert_eq!(net.counters().send_dropped.load(Ordering::SeqCst), 5);
    // A frame too large for the only buffer.
    let small = guest.writable(100);
    queues[0].submit(&[small]);
    guest.notify(0);
    write_frame(&mut peer, &frame(200, 1));
    write_frame(&mut peer, &frame(80, 2));
    assert_eq!(receive(&guest, &mut queues[0], &[small]).0, frame(80, 2));
    assert_eq!(net.counters().receive_dropped.load(Ordering::SeqCst), 1);
    // A peer that talks nonsense is cut off: the link goes down.
    let mut guest = Guest::new(Transport::Mmio, {
        let (net, p) = device();
        peer = p;
        net
    });
    guest.bring_up(f::STATUS, 64);
    peer.write_all(&[0xff; 64]).unwrap();
    while guest.config_u32(4) >> 16 & 1 != 0 {
        guest.wait_interrupt(None);
    }
}

#[test]
fn the_filter_and_the_mac_follow_the_control_queue() {
    let (net, mut peer) = device();
    let mut guest = Guest::new(Transport::PciMsix, net.clone());
    let mut queues = guest.bring_up(u64::MAX, 64);
    let mut command = |guest: &mut Guest, bytes: &[u8]| {
        let buffers = [guest.readable(bytes), guest.writable(1)];
        guest.exchange(&mut queues[2], &buffers);
        guest.bytes(buffers[1])[0]
    };
    let new = [2, 0, 0, 0, 0, 9];
    assert_eq!(command(&mut guest, &[0, 0, 0]), 0, "promiscuous off");
    assert_eq!(command(&mut guest, &[&[1, 1][..], &new].concat()), 0);
    let tables = [&[1, 0, 0, 0, 0, 0, 1, 0, 0, 0][..], &[1, 0, 0x5e, 0, 0, 1]].concat();
    assert_eq!(command(&mut guest, &tables), 0);
    for bad in [&[0, 9, 0][..], &[9, 0], &[0, 0], &[1, 0, 0xff, 0xff, 0xff, 0xff], &[4, 0, 2, 0], &[5, 0, 1]]
    {
        assert_eq!(command(&mut guest, bad), 1, "{bad:?}");
    }
    let mut mac = [0; 6];
    guest.config(0, &mut mac);
    assert_eq!(mac, new);
    let buffers: Vec<_> = (0..4).map(|_| guest.writable(200)).collect();
    for buffer in &buffers {
        queues[0].submit(&[*buffer]);
    }
    guest.notify(0);
    let to = |target: [u8; 6]| [&target[..], &[0; 60]].concat();
    for target in [MAC, [1, 0, 0x5e, 0, 0, 2], new, [1, 0, 0x5e, 0, 0, 1], [0xff; 6]] {
        write_frame(&mut peer, &to(target));
    }
    for (i, target) in [new, [1, 0, 0x5e, 0, 0, 1], [0xff; 6]].into_iter().enumerate() {
        assert_eq!(receive(&guest, &mut queues[0], &buffers[i..]).0, to(target));
    }
    assert_eq!(net.counters().filtered.load(Ordering::SeqCst), 2);
}

#[test]
fn a_lost_peer_takes_the_link_down_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("net.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let backend = StreamBackend::new(&path);
    assert!(backend.is_connected());
    let mut guest =
        Guest::new(Transport::PciMsix, Net::new(Arc::new(backend), &NetOptions::default()).unwrap());
    let mut queues = guest.bring_up(f::STATUS, 64);
    let (peer, _) = listener.accept().unwrap();
    drop(peer);
    let link = |guest: &Guest| guest.config_u32(4) >> 16 & 1;
    while link(&guest) == 1 {
        guest.wait_interrupt(None);
    }
    // Sending meanwhile neither blocks nor fails.
    let buffers = outgoing(&mut guest, &frame(60, 3));
    guest.exchange(&mut queues[1], &buffers);
    let (mut peer, _) = listener.accept().unwrap();
    while link(&guest) == 0 {
        guest.wait_interrupt(None);
    }
    let buffers = outgoing(&mut guest, &frame(60, 4));
    guest.exchange(&mut queues[1], &buffers);
    assert_eq!(read_frame(&mut peer), frame(60, 4));
}

#[test]
fn rate_limits_delay_and_complete() {
    let (ours, mut peer) = UnixStream::pair().unwrap();
    let limits = Limits { bytes: None, operations: Some(Rate { per_second: 200, burst: 3 }) };
    let options = NetOptions { send_limits: limits, receive_limits: limits, ..Default::default() };
    let net = Net::new(Arc::new(StreamBackend::from_stream(ours)), &options).unwrap();
    let mut guest = Guest::new(Transport::Mmio, net.clone());
    let mut queues = guest.bring_up(0, 64);
    let mut incoming = Vec::new();
    for tag in 0..10 {
        let buffers = outgoing(&mut guest, &frame(60, tag));
        queues[1].submit(&buffers);
        incoming.push(guest.writable(100));
        queues[0].submit(&[incoming[usize::from(tag)]]);
        write_frame(&mut peer, &frame(60, tag));
    }
    guest.notify(0);
    guest.notify(1);
    for tag in 0..10 {
        assert_eq!(read_frame(&mut peer), frame(60, tag));
        assert_eq!(receive(&guest, &mut queues[0], &incoming[usize::from(tag)..]).0, frame(60, tag));
    }
    assert_ne!(net.counters().throttled.load(Ordering::SeqCst), 0);
}

fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let mut sum: u32 =
        bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0))).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The host's stack answers through a tap device: ARP, then UDP with offloaded checksums, over several pairs.
#[test]
fn a_tap_device_reaches_the_hosts_stack() {
    namespace::inside(|| {
        for pairs in [1, 2] {
            let name = format!("tap{pairs}");
            let tap = TapBackend::open(&name, pairs).unwrap();
            let host = format!("10.9.{pairs}.1");
            namespace::ip(&["addr", "add", &format!("{host}/24"), "dev", &name]);
            namespace::ip(&["link", "set", &name, "up"]);
            let options = NetOptions { mac: MAC, ..Default::default() };
            let mut guest = Guest::new(Transport::PciMsix, Net::new(Arc::new(tap), &options).unwrap());
            let mut queues = guest.bring_up(u64::MAX, 64);
            if pairs == 2 {
                let buffers = [guest.readable(&[4, 0, 2, 0]), guest.writable(1)];
                guest.exchange(&mut queues[4], &buffers);
                assert_eq!(guest.bytes(buffers[1]), [0], "both pairs are active");
            }
            // The kernel chooses the pair that a frame arrives on.
            let mut incoming = Vec::new();
            for index in 0..usize::from(pairs) {
                let buffers: Vec<_> = (0..60).map(|_| guest.writable(2048)).collect();
                for buffer in &buffers {
                    queues[index * 2].submit(&[*buffer]);
                }
                guest.notify(index as u16 * 2);
                incoming.push(buffers);
            }
            let (us, them) = ([10, 9, pairs as u8, 2], [10, 9, pairs as u8, 1]);
            let arp =
                [&[0xff; 6][..], &MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &MAC, &us, &[0; 6], &them].concat();
            let buffers = outgoing(&mut guest, &arp);
            guest.exchange(&mut queues[1], &buffers);
            let mut at = [0; 2];
            let reply = loop {
                let ready = (0..usize::from(pairs)).find(|&i| queues[i * 2].used_index() as usize != at[i]);
                let Some(i) = ready else {
                    std::thread::yield_now();
                    continue;
                };
                let (frame, chains) = receive(&guest, &mut queues[i * 2], &incoming[i][at[i]..]);
                at[i] += chains;
                if frame[12..14] == [8, 6] && frame[20..22] == [0, 2] {
                    break frame;
                }
            };
            assert_eq!(reply[28..32], them);
            let host_mac = &reply[22..28];
            // UDP whose checksum the kernel completes: only the pseudo header is summed.
            let socket = std::net::UdpSocket::bind((host.as_str(), 7)).unwrap();
            let payload = b"checksummed by the host";
            let length = (8 + payload.len()) as u16;
            let pseudo = checksum(&[&us, &them, &[0, 17], &length.to_be_bytes()]);
            let total = (20 + length).to_be_bytes();
            let mut ip = [&[0x45, 0][..], &total, &[0, 0, 0x40, 0, 64, 17, 0, 0], &us, &them].concat();
            let sum = !checksum(&[&ip]);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            let udp = [
                &4000u16.to_be_bytes()[..],
                &7u16.to_be_bytes(),
                &length.to_be_bytes(),
                &pseudo.to_be_bytes(),
                payload,
            ]
            .concat();
            let packet = [host_mac, &MAC, &[8, 0], &ip, &udp].concat();
            let header = [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
            let buffers = [guest.readable(&header), guest.readable(&packet)];
            guest.exchange(&mut queues[1], &buffers);
            let mut data = [0; 100];
            let (n, from) = socket.recv_from(&mut data).unwrap();
            assert_eq!(&data[..n], payload);
            assert_eq!(from.to_string(), format!("10.9.{pairs}.2:4000"));
        }
        assert!(TapBackend::open("a-name-that-is-too-long", 1).is_err());
        assert!(TapBackend::open("", 1).is_err());
    });
}

//! Segmentation and its reverse, on TCP frames of both IP versions.

use super::super::coalesce::Run;
use super::super::net_features as f;
use super::tcp_flags::ACK;
use super::*;

const ALL: u64 = f::GUEST_CSUM | f::GUEST_TSO4 | f::GUEST_TSO6;

/// The checksum as RFC 1071 describes it, 16 bits at a time.
fn plain_sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0)));
    words.fold(0, |sum, w| if sum + w > 0xffff { sum + w - 0xffff } else { sum + w }) as u16
}

/// A TCP frame with a timestamp option and a partial checksum, as a guest hands it over.
fn large(v6: bool, vlan: bool, len: usize, flags: u8) -> (Header, Vec<u8>) {
    let mut frame = vec![0x52, 0x54, 0, 0, 0, 1, 0x52, 0x54, 0, 0, 0, 2];
    if vlan {
        frame.extend([0x81, 0x00, 0x20, 0x05]);
    }
    let data: Vec<u8> = (0..len).map(|i| (i * 7 + i / 251) as u8).collect();
    let tcp_len = 32 + len;
    let ip = frame.len() + 2;
    if v6 {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend((tcp_len as u16).to_be_bytes());
        frame.extend([6, 64]);
        frame.extend((1..=32).collect::<Vec<u8>>());
    } else {
        frame.extend([0x08, 0x00, 0x45, 0]);
        frame.extend((20 + tcp_len as u16).to_be_bytes());
        frame.extend([0xff, 0xff, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        set_ipv4_checksum(&mut frame[ip..]);
    }
    let transport = frame.len();
    frame.extend([0x13, 0x88, 0xc0, 0x00, 0xff, 0xff, 0xff, 0x00, 0, 0, 0, 9, 0x80, flags, 1, 0]);
    frame.extend([0, 0, 0, 0, 1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]);
    frame.extend(data);
    let packet = Packet::parse(&frame, true).unwrap();
    let partial = fold(packet.pseudo(&frame, tcp_len));
    frame[transport + 16..transport + 18].copy_from_slice(&partial.to_be_bytes());
    let header = Header {
        flags: NEEDS_CSUM,
        gso_type: if v6 { GSO_TCPV6 } else { GSO_TCPV4 },
        header_len: (transport + 32) as u16,
        gso_size: 1400,
        checksum_start: transport as u16,
        checksum_offset: 16,
        buffers: 0,
    };
    (header, frame)
}

fn frames(mut out: &[u8]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    while let Some((length, rest)) = out.split_first_chunk() {
        let (frame, rest) = rest.split_at(u32::from_be_bytes(*length) as usize);
        frames.push(frame.to_vec());
        out = rest;
    }
    frames
}

fn transmitted(header: &Header, frame: &[u8]) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    transmit(header, &mut frame.to_vec(), &mut out).unwrap();
    frames(&out)
}

/// Joins frames as far as they go; the rest is left.
fn join(frames: &[Vec<u8>], features: u64) -> (Header, Vec<u8>, usize) {
    let mut buffer = vec![0; 70_000];
    buffer[..frames[0].len()].copy_from_slice(&frames[0]);
    let mut run = Run::begin(&frames[0], features).unwrap();
    let taken = 1 + frames[1..].iter().take_while(|next| run.join(&mut buffer, next)).count();
    let header = run.finish(&mut buffer);
    buffer.truncate(run.len());
    (header, buffer, taken)
}

#[test]
fn segments_are_valid_and_join_to_what_they_were() {
    for (v6, vlan) in [(false, false), (true, false), (false, true), (true, true)] {
        let (header, frame) = large(v6, vlan, 60_000, ACK | PSH);
        let segments = transmitted(&header, &frame);
        assert_eq!(segments.len(), 43);
        for (index, segment) in segments.iter().enumerate() {
            let packet = Packet::parse(segment, false).unwrap();
            assert_eq!(packet.end, segment.len(), "the IP length covers the segment");
            assert!(packet.verify(segment));
            let transport = &segment[packet.transport..];
            let mut pseudo =
                segment[if v6 { packet.ip + 8 } else { packet.ip + 12 }..packet.transport].to_vec();
            pseudo.extend([0, 6]);
            pseudo.extend((transport.len() as u16).to_be_bytes());
            assert_eq!(plain_sum(&[&pseudo, transport].concat()), 0xffff);
            let last = index + 1 == segments.len();
            assert_eq!(segment[packet.transport + 13], if last { ACK | PSH } else { ACK });
            let expected = 0xffff_ff00u32.wrapping_add(1400 * index as u32);
            assert_eq!(sequence(segment, packet.transport), expected);
        }
        let (back, joined, taken) = join(&segments, ALL);
        assert_eq!((taken, joined), (43, frame));
        assert_eq!((back.flags, back.gso_type, back.gso_size), (NEEDS_CSUM, header.gso_type, 1400));
        assert_eq!((back.checksum_start, back.header_len), (header.checksum_start, header.header_len));
    }
}

#[test]
fn flags_stay_with_the_segment_they_belong_to() {
    let (mut header, frame) = large(false, false, 4000, ACK | PSH | FIN | CWR);
    header.gso_type |= GSO_ECN;
    let flags: Vec<_> = transmitted(&header, &frame).iter().map(|s| s[14 + 20 + 13]).collect();
    assert_eq!(flags, [ACK | CWR, ACK, ACK | PSH | FIN]);
}

#[test]
fn a_partial_checksum_is_completed() {
    let (mut header, frame) = large(false, false, 101, ACK);
    header.gso_type = 0;
    let sent = transmitted(&header, &frame);
    assert_eq!(sent.len(), 1);
    assert!(Packet::parse(&sent[0], false).unwrap().verify(&sent[0]));
    let (told, _, _) = join(&sent, ALL);
    assert_eq!((told.flags, told.gso_type), (DATA_VALID, 0));
    assert!(Run::begin(&sent[0], 0).is_none(), "the driver did not ask for it");
}

#[test]
fn what_a_guest_could_tell_apart_is_not_joined() {
    let (header, frame) = large(false, false, 4200, ACK);
    let segments = transmitted(&header, &frame);
    assert_eq!(join(&segments, ALL).2, 3);
    assert_eq!(join(&segments, f::GUEST_CSUM | f::GUEST_TSO6).2, 1);
    let tcp = 14 + 20;
    // Another address, port, acknowledgement, window, option, time to live; a gap; a flag; a wrong checksum.
    for at in [0, 14 + 12, tcp, tcp + 8, tcp + 14, tcp + 26, 14 + 8, tcp + 7, tcp + 13, tcp + 16] {
        let mut changed = segments.clone();
        changed[1][at] ^= 2;
        if at != tcp + 16 {
            // Only the change itself may be the reason.
            repair(&mut changed[1]);
        }
        assert_eq!(join(&changed, ALL).2, 1, "byte {at}");
    }
    let mut broken = segments[0].clone();
    broken[100] ^= 1;
    assert!(Run::begin(&broken, ALL).is_none());
    let reversed = [segments[1].clone(), segments[0].clone()];
    assert_eq!(join(&reversed, ALL).2, 1);
    let mut fragments = segments.clone();
    for frame in &mut fragments {
        frame[14 + 6] = 0x20;
        repair(frame);
    }
    assert!(Run::begin(&fragments[0], ALL).is_none());
}

fn repair(frame: &mut [u8]) {
    let packet = Packet { ip: 14, v6: false, protocol: TCP, transport: 34, payload: 66, end: frame.len() };
    set_ipv4_checksum(&mut frame[14..34]);
    frame[50..52].fill(0);
    let value = !fold(packet.pseudo(frame, frame.len() - 34) + sum(&frame[34..]));
    frame[50..52].copy_from_slice(&value.to_be_bytes());
}

#[test]
fn nonsense_is_refused() {
    let (good, frame) = large(false, false, 3000, ACK);
    let refused = |header: Header, frame: &[u8]| {
        let mut out = Vec::new();
        transmit(&header, &mut frame.to_vec(), &mut out) == Err(Malformed) && out.is_empty()
    };
    assert!(!refused(good, &frame));
    assert!(refused(Header { gso_size: 1, ..good }, &frame));
    assert!(refused(Header { gso_type: GSO_TCPV6, ..good }, &frame));
    assert!(refused(Header { gso_type: 3, ..good }, &frame));
    let partial = Header { gso_type: 0, ..good };
    assert!(refused(Header { checksum_start: 0xffff, ..partial }, &frame));
    assert!(refused(Header { checksum_offset: 0xffff, ..partial }, &frame));
    // Every prefix of a frame, and every value of each byte of its headers, ends in an answer.
    for len in 14..frame.len().min(120) {
        let _ = transmit(&good, &mut frame[..len].to_vec(), &mut Vec::new());
        let _ = Run::begin(&frame[..len], ALL);
    }
    for at in 12..66 {
        for value in 0..=255 {
            let mut changed = frame.clone();
            changed[at] = value;
            let _ = transmit(&good, &mut changed.clone(), &mut Vec::new());
            if let Some(mut run) = Run::begin(&changed, ALL) {
                run.join(&mut [0; 70_000], &changed);
            }
        }
    }
    assert!(Packet::parse(&[], true).is_none());
}

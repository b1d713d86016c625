//! Checksums, and segmentation of TCP, in software: what a back-end without a header for offloads does on behalf of its
//! guest. A guest that leaves this to the host handles a few large segments instead of many packets.

use super::Header;

/// Header flag: a checksum is to be completed.
pub(super) const NEEDS_CSUM: u8 = 1;
/// Header flag: the checksum was verified.
pub(super) const DATA_VALID: u8 = 2;
/// Segment as TCP over IPv4.
pub(super) const GSO_TCPV4: u8 = 1;
/// Segment as TCP over IPv6.
pub(super) const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;
/// The smallest payload of a segment: it bounds what one frame becomes (Linux sends no smaller ones).
const MIN_SEGMENT: usize = 32;

/// TCP flags, byte 13 of its header.
pub(super) mod tcp_flags {
    /// The sender has no more to send.
    pub(in super::super) const FIN: u8 = 1;
    /// Deliver at once.
    pub(in super::super) const PSH: u8 = 8;
    /// The acknowledgement number is valid.
    pub(in super::super) const ACK: u8 = 0x10;
    /// The congestion window was reduced.
    pub(in super::super) const CWR: u8 = 0x80;
}
use tcp_flags::{CWR, FIN, PSH};

/// A frame that the offloads of its header do not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// A one's complement sum, not folded (RFC 1071). Only the last of several parts may have an odd length.
pub(super) fn sum(data: &[u8]) -> u64 {
    let mut words = data.chunks_exact(4);
    let mut sum: u64 = words.by_ref().map(|w| u64::from(u32::from_be_bytes([w[0], w[1], w[2], w[3]]))).sum();
    let mut tail = [0; 4];
    tail[..words.remainder().len()].copy_from_slice(words.remainder());
    sum += u64::from(u32::from_be_bytes(tail));
    sum
}

/// Folds a sum to 16 bits.
pub(super) fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Where the headers of a TCP or UDP packet over IP are, without fragments and extension headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    /// Offset of the IP header.
    pub(super) ip: usize,
    pub(super) v6: bool,
    /// IP protocol: 6 or 17.
    pub(super) protocol: u8,
    /// Offset of the TCP or UDP header.
    pub(super) transport: usize,
    /// Offset of the payload.
    pub(super) payload: usize,
    /// End of the packet; padding of Ethernet follows.
    pub(super) end: usize,
}

const TCP: u8 = 6;
const UDP: u8 = 17;

pub(super) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]))
}

impl Packet {
    /// Finds the headers. With `whole`, the packet is all of the frame, whatever its IP header says of its length.
    pub(super) fn parse(frame: &[u8], whole: bool) -> Option<Self> {
        let mut ip = 14;
        let mut ethertype = be16(frame, 12)?;
        while matches!(ethertype, 0x8100 | 0x88a8) && ip <= 18 {
            ethertype = be16(frame, ip + 2)?;
            ip += 4;
        }
        let v6 = match ethertype {
            0x0800 => false,
            0x86dd => true,
            _ => return None,
        };
        let (header, length, protocol) = if v6 {
            let header = frame.get(ip..ip + 40)?;
            (40, 40 + usize::from(be16(header, 4)?), header[6])
        } else {
            let header = frame.get(ip..ip + 20)?;
            if be16(header, 6)? & 0x3fff != 0 {
                return None;
            }
            (usize::from(header[0] & 15) * 4, usize::from(be16(header, 2)?), header[9])
        };
        if frame[ip] >> 4 != if v6 { 6 } else { 4 } || header < 20 {
            return None;
        }
        let end = if whole { frame.len() } else { ip + length };
        let transport = ip + header;
        let payload = match protocol {
            TCP => {
                let len = usize::from(frame.get(transport + 12)? >> 4) * 4;
                (len >= 20).then_some(transport + len)?
            }
            UDP => transport + 8,
            _ => return None,
        };
        (payload <= end && end <= frame.len()).then_some(Self { ip, v6, protocol, transport, payload, end })
    }

    pub(super) fn is_tcp(&self) -> bool {
        self.protocol == TCP
    }

    /// The sum of the pseudo header for `len` bytes from the transport header on.
    pub(super) fn pseudo(&self, frame: &[u8], len: usize) -> u64 {
        let addresses = if self.v6 { self.ip + 8..self.ip + 40 } else { self.ip + 12..self.ip + 20 };
        sum(&frame[addresses]) + u64::from(self.protocol) + len as u64
    }

    /// Whether the transport's checksum is right, and IPv4's.
    pub(super) fn verify(&self, frame: &[u8]) -> bool {
        let segment = &frame[self.transport..self.end];
        if self.protocol == UDP
            && (be16(segment, 6) == Some(0) || be16(segment, 4) != Some(segment.len() as u16))
        {
            return false;
        }
        (self.v6 || fold(sum(&frame[self.ip..self.transport])) == 0xffff)
            && fold(self.pseudo(frame, segment.len()) + sum(segment)) == 0xffff
    }
}

/// Computes the checksum of an IPv4 header in place.
pub(super) fn set_ipv4_checksum(header: &mut [u8]) {
    header[10..12].fill(0);
    let value = !fold(sum(header));
    header[10..12].copy_from_slice(&value.to_be_bytes());
}

/// Completes the partial checksum of a frame.
fn complete(header: &Header, frame: &mut [u8]) -> Result<(), Malformed> {
    let start = usize::from(u16::from_le(header.checksum_start));
    let at = start + usize::from(u16::from_le(header.checksum_offset));
    if start >= frame.len() || at + 2 > frame.len() {
        return Err(Malformed);
    }
    // Zero says "none" to UDP, and the other zero is as good for TCP.
    let value = match !fold(sum(&frame[start..])) {
        0 => 0xffff,
        value => value,
    };
    frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
    Ok(())
}

/// Does what `header` asks for: appends to `out` the frames that `frame` becomes, each after its length (4 bytes,
/// big-endian). What is in `frame` afterwards does not matter.
pub(super) fn transmit(header: &Header, frame: &mut [u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
    let kind = header.gso_type & !GSO_ECN;
    if kind == 0 {
        if header.flags & NEEDS_CSUM != 0 {
            complete(header, frame)?;
        }
        out.extend((frame.len() as u32).to_be_bytes());
        out.extend(&*frame);
        return Ok(());
    }
    let packet = Packet::parse(frame, true).filter(Packet::is_tcp).ok_or(Malformed)?;
    let size = usize::from(u16::from_le(header.gso_size));
    if kind != if packet.v6 { GSO_TCPV6 } else { GSO_TCPV4 } || size < MIN_SEGMENT {
        return Err(Malformed);
    }
    segment(&packet, size, frame, out);
    Ok(())
}

/// Cuts a TCP frame into segments of `size` bytes of payload.
fn segment(packet: &Packet, size: usize, frame: &mut [u8], out: &mut Vec<u8>) {
    let &Packet { ip, transport, payload, .. } = packet;
    let (headers, data) = frame.split_at_mut(payload);
    let flags = headers[transport + 13];
    let sequence = sequence(headers, transport);
    let id = be16(headers, ip + 4).unwrap_or(0);
    // A frame without payload stays one.
    let count = data.len().div_ceil(size).max(1);
    out.reserve(data.len() + count * (payload + 4));
    for index in 0..count {
        let part = &data[index * size..data.len().min((index + 1) * size)];
        let last = if index + 1 == count { 0 } else { FIN | PSH };
        let first = if index == 0 { 0 } else { CWR };
        headers[transport + 13] = flags & !(last | first);
        let at = sequence.wrapping_add((index * size) as u32);
        headers[transport + 4..transport + 8].copy_from_slice(&at.to_be_bytes());
        let len = (payload - transport + part.len()) as u16;
        set_length(packet, headers, part.len());
        if !packet.v6 {
            headers[ip + 4..ip + 6].copy_from_slice(&id.wrapping_add(index as u16).to_be_bytes());
            set_ipv4_checksum(&mut headers[ip..transport]);
        }
        headers[transport + 16..transport + 18].fill(0);
        let total = packet.pseudo(headers, len.into()) + sum(&headers[transport..]) + sum(part);
        headers[transport + 16..transport + 18].copy_from_slice(&(!fold(total)).to_be_bytes());
        out.extend(((payload + part.len()) as u32).to_be_bytes());
        out.extend(&*headers);
        out.extend(part);
    }
}

/// The TCP sequence number.
pub(super) fn sequence(frame: &[u8], transport: usize) -> u32 {
    let at = transport + 4;
    u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]])
}

/// Sets the length in the IP header for `data` bytes of payload.
pub(super) fn set_length(packet: &Packet, headers: &mut [u8], data: usize) {
    let (at, from) = if packet.v6 { (packet.ip + 4, packet.ip + 40) } else { (packet.ip + 2, packet.ip) };
    let length = (packet.payload - from + data) as u16;
    headers[at..at + 2].copy_from_slice(&length.to_be_bytes());
}

#[cfg(test)]
#[path = "offload_tests.rs"]
mod tests;

//! Checksum and segmentation offloads: the `virtio_net_hdr` (virtio 1.2, 5.1.6), and the software that does the
//! work towards ports whose peer cannot.

use bitflags::bitflags;

use super::{HEAD_MAX, Packet, checksum, key, vlan};

/// Length of the header without `num_buffers`, as taps use it.
pub const VNET_HDR_LEN: usize = 10;
/// Length of the header with `num_buffers`, as virtio 1.0 devices use it.
pub const VNET_HDR_MRG_LEN: usize = 12;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

const TCP: u8 = 6;
const UDP: u8 = 17;

bitflags! {
    /// What a port's peer can take unfinished.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct OffloadCaps: u8 {
        /// Packets whose TCP or UDP checksum is partial.
        const CSUM = 1;
        /// TCP over IPv4 packets larger than the MTU.
        const TSO4 = 2;
        /// TCP over IPv6 packets larger than the MTU.
        const TSO6 = 4;
        /// Large TCP packets with ECN.
        const ECN = 8;
        /// UDP packets larger than the MTU (segmented, not fragmented).
        const USO = 16;
    }
}

/// What a sender left to be done on a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl Offload {
    /// Reads the first ten bytes of a header in little-endian (virtio 1.0) layout.
    #[inline]
    pub fn parse(h: &[u8; VNET_HDR_LEN]) -> Self {
        let word = |i: usize| u16::from_le_bytes([h[i], h[i + 1]]);
        Self {
            flags: h[0],
            gso_type: h[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }

    /// Writes the header with `num_buffers` set to one.
    #[inline]
    pub fn encode(&self) -> [u8; VNET_HDR_MRG_LEN] {
        let mut h = [0; VNET_HDR_MRG_LEN];
        h[0] = self.flags;
        h[1] = self.gso_type;
        h[2..4].copy_from_slice(&self.hdr_len.to_le_bytes());
        h[4..6].copy_from_slice(&self.gso_size.to_le_bytes());
        h[6..8].copy_from_slice(&self.csum_start.to_le_bytes());
        h[8..10].copy_from_slice(&self.csum_offset.to_le_bytes());
        h[10] = 1;
        h
    }

    /// Whether nothing is left to be done.
    #[inline]
    pub fn is_none(&self) -> bool {
        (self.flags & NEEDS_CSUM) | self.gso_type == 0
    }

    /// Whether a sender's request makes sense for a frame with `head_len` bytes in its head. Anything else is
    /// refused, since receivers act on these numbers.
    pub fn is_valid(&self, head_len: usize) -> bool {
        let csum = self.flags & NEEDS_CSUM != 0;
        if csum && usize::from(self.csum_start) + usize::from(self.csum_offset) + 2 > head_len {
            return false;
        }
        match self.gso_type & !GSO_ECN {
            0 => self.gso_type == 0,
            GSO_TCPV4 | GSO_TCPV6 | GSO_UDP_L4 => csum && self.gso_size >= 8,
            _ => false,
        }
    }

    /// Marks the checksum as verified by the sender's side or leaves it partial.
    pub fn needs_checksum(&self) -> bool {
        self.flags & NEEDS_CSUM != 0
    }

    /// Whether the packet is to be segmented.
    pub fn is_gso(&self) -> bool {
        self.gso_type != 0
    }

    /// Moves the offsets when `by` bytes were added (or removed) in front of the network header.
    pub(super) fn shift(&mut self, by: i16) {
        if self.flags & NEEDS_CSUM != 0 {
            self.csum_start = self.csum_start.saturating_add_signed(by);
        }
        if self.hdr_len != 0 {
            self.hdr_len = self.hdr_len.saturating_add_signed(by);
        }
    }

    /// The request as a receiver may see it: hints that only the sender's host may vouch for are dropped.
    pub fn sanitized(mut self) -> Self {
        self.flags &= NEEDS_CSUM;
        if self.flags == 0 {
            self.csum_start = 0;
            self.csum_offset = 0;
        }
        if self.gso_type == 0 {
            self.hdr_len = 0;
            self.gso_size = 0;
        }
        self
    }

    /// Whether a peer with `caps` can take the packet as it is.
    #[inline]
    pub fn fits(&self, caps: OffloadCaps) -> bool {
        if self.is_none() {
            return true;
        }
        let need = OffloadCaps::CSUM
            | match self.gso_type & !GSO_ECN {
                GSO_TCPV4 => OffloadCaps::TSO4,
                GSO_TCPV6 => OffloadCaps::TSO6,
                GSO_UDP_L4 => OffloadCaps::USO,
                _ => OffloadCaps::empty(),
            }
            | if self.gso_type & GSO_ECN != 0 { OffloadCaps::ECN } else { OffloadCaps::empty() };
        caps.contains(need)
    }

    /// The request a host stack makes for a large TCP packet, for tests and for embedders that build packets.
    pub fn tcp_segmentation(ipv6: bool, gso_size: u16, csum_start: u16, hdr_len: u16) -> Self {
        Self {
            flags: NEEDS_CSUM,
            gso_type: if ipv6 { GSO_TCPV6 } else { GSO_TCPV4 },
            hdr_len,
            gso_size,
            csum_start,
            csum_offset: 16,
        }
    }

    /// The request for a partial checksum.
    pub fn partial_checksum(csum_start: u16, csum_offset: u16) -> Self {
        Self { flags: NEEDS_CSUM, csum_start, csum_offset, ..Self::default() }
    }

    /// Notes that the checksum was verified.
    pub fn data_valid() -> Self {
        Self { flags: DATA_VALID, ..Self::default() }
    }
}

/// Does in software what a peer with `caps` cannot: appends one or more finished packets to `out`. Returns `false`
/// when the packet is malformed and must be dropped.
pub fn finish(p: &Packet, caps: OffloadCaps, out: &mut Vec<Packet>) -> bool {
    let frame = p.to_vec();
    if p.offload.is_gso() && !p.offload.fits(caps) {
        return segment(&frame, &p.offload, out);
    }
    let mut frame = frame;
    if p.offload.needs_checksum() {
        let start = usize::from(p.offload.csum_start);
        let at = start + usize::from(p.offload.csum_offset);
        if at + 2 > frame.len() {
            return false;
        }
        let c = checksum::finish(checksum::sum(&frame[start..], 0));
        let c = if c == 0 && p.offload.csum_offset == 6 { 0xffff } else { c };
        frame[at..at + 2].copy_from_slice(&c.to_be_bytes());
    }
    out.push(Packet::from_frame(&frame));
    true
}

/// Splits one large TCP or UDP frame into frames with at most `gso_size` bytes of payload each.
fn segment(frame: &[u8], offload: &Offload, out: &mut Vec<Packet>) -> bool {
    let Some(l) = key::layers(&frame[..frame.len().min(HEAD_MAX)]) else { return false };
    let (l3, l4) = (l.network, l.transport);
    let udp = offload.gso_type == GSO_UDP_L4;
    let header_len = match (l.proto, udp) {
        (TCP, false) => match frame.get(l4 + 12) {
            Some(b) => l4 + usize::from(b >> 4) * 4,
            None => return false,
        },
        (UDP, true) => l4 + 8,
        _ => return false,
    };
    let size = usize::from(offload.gso_size);
    let minimum = if udp { l4 + 8 } else { l4 + 20 };
    if header_len < minimum || frame.len() <= header_len || size == 0 || l.fragment {
        return false;
    }
    let (header, payload) = frame.split_at(header_len);
    let count = payload.len().div_ceil(size);
    if count > 4096 {
        return false;
    }
    for (i, part) in payload.chunks(size).enumerate() {
        let mut f = Vec::with_capacity(header_len + part.len());
        f.extend_from_slice(header);
        f.extend_from_slice(part);
        fix_segment(&mut f, (l3, l4), l.ipv6, i, (i == 0, i + 1 == count), size, udp);
        out.push(Packet::from_frame(&f));
    }
    true
}

/// Sets lengths, identification, sequence number, flags and checksums of segment number `i`.
fn fix_segment(
    f: &mut [u8],
    (l3, l4): (usize, usize),
    ipv6: bool,
    i: usize,
    (first, last): (bool, bool),
    size: usize,
    udp: bool,
) {
    let total = f.len();
    if ipv6 {
        f[l3 + 4..l3 + 6].copy_from_slice(&((total - l3 - 40) as u16).to_be_bytes());
    } else {
        f[l3 + 2..l3 + 4].copy_from_slice(&((total - l3) as u16).to_be_bytes());
        let id = u16::from_be_bytes([f[l3 + 4], f[l3 + 5]]).wrapping_add(i as u16);
        f[l3 + 4..l3 + 6].copy_from_slice(&id.to_be_bytes());
        let end = l3 + usize::from(f[l3] & 0xf) * 4;
        checksum::set_ipv4(&mut f[l3..end]);
    }
    let field = if udp {
        f[l4 + 4..l4 + 6].copy_from_slice(&((total - l4) as u16).to_be_bytes());
        l4 + 6
    } else {
        let seq = u32::from_be_bytes([f[l4 + 4], f[l4 + 5], f[l4 + 6], f[l4 + 7]]);
        let seq = seq.wrapping_add((i * size) as u32);
        f[l4 + 4..l4 + 8].copy_from_slice(&seq.to_be_bytes());
        if !last {
            f[l4 + 13] &= !0x09; // FIN and PSH belong to the last segment
        }
        if !first {
            f[l4 + 13] &= !0x80; // CWR belongs to the first
        }
        l4 + 16
    };
    f[field..field + 2].fill(0);
    let (src, dst) = if ipv6 {
        (&f[l3 + 8..l3 + 24], &f[l3 + 24..l3 + 40])
    } else {
        (&f[l3 + 12..l3 + 16], &f[l3 + 16..l3 + 20])
    };
    let pseudo = checksum::pseudo(src, dst, if udp { UDP } else { TCP }, total - l4);
    let c = checksum::finish(checksum::sum(&f[l4..], pseudo));
    let c = if udp && c == 0 { 0xffff } else { c };
    f[field..field + 2].copy_from_slice(&c.to_be_bytes());
}

/// Length of the frame as its receiver's MTU counts it: without Ethernet header and tags.
pub fn payload_len(p: &Packet) -> usize {
    let tags = match vlan::outer_tag(p.head()) {
        Some(_) => 4,
        None => 0,
    };
    p.len().saturating_sub(14 + tags)
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};

    fn tcp_frame(payload: usize, ipv6: bool) -> Vec<u8> {
        let b = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        let mut out = Vec::new();
        let data: Vec<u8> = (0..payload).map(|i| (i % 251) as u8).collect();
        if ipv6 {
            b.ipv6([1; 16], [2; 16], 64).tcp(1000, 80, 5, 100).psh().fin().write(&mut out, &data).unwrap();
        } else {
            b.ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
                .tcp(1000, 80, 5, 100)
                .psh()
                .fin()
                .write(&mut out, &data)
                .unwrap();
        }
        out
    }

    fn checksum_is_right(frame: &[u8]) -> bool {
        let p = SlicedPacket::from_ethernet(frame).unwrap();
        let Some(TransportSlice::Tcp(t)) = p.transport else { panic!("not TCP") };
        match p.net.unwrap() {
            etherparse::NetSlice::Ipv4(ip) => {
                t.calc_checksum_ipv4(ip.header().source(), ip.header().destination()).unwrap() == t.checksum()
                    && ip.header().to_header().calc_header_checksum() == ip.header().header_checksum()
            }
            etherparse::NetSlice::Ipv6(ip) => {
                t.calc_checksum_ipv6(ip.header().source(), ip.header().destination()).unwrap() == t.checksum()
            }
            _ => panic!("not IP"),
        }
    }

    #[test]
    fn large_tcp_packets_are_segmented() {
        for (ipv6, l4) in [(false, 34u16), (true, 54)] {
            let mut p = Packet::from_frame(&tcp_frame(4000, ipv6));
            p.offload = Offload::tcp_segmentation(ipv6, 1448, l4, l4 + 20);
            assert!(p.offload.is_valid(p.head().len()));
            let mut out = Vec::new();
            assert!(finish(&p, OffloadCaps::CSUM, &mut out));
            assert_eq!(out.len(), 3);
            let mut data = Vec::new();
            for (i, s) in out.iter().enumerate() {
                let f = s.to_vec();
                assert!(checksum_is_right(&f));
                let tcp = &f[usize::from(l4)..];
                assert_eq!(u32::from_be_bytes(tcp[4..8].try_into().unwrap()), 5 + 1448 * i as u32);
                assert_eq!(tcp[13] & 0x09 == 0x09, i == 2);
                data.extend_from_slice(&tcp[20..]);
            }
            assert_eq!(data, &tcp_frame(4000, ipv6)[usize::from(l4) + 20..]);
        }
    }

    #[test]
    fn partial_checksums_are_completed() {
        let good = tcp_frame(777, false);
        let mut frame = good.clone();
        let pseudo = checksum::fold(checksum::pseudo(&[10, 0, 0, 1], &[10, 0, 0, 2], TCP, frame.len() - 34));
        frame[50..52].copy_from_slice(&pseudo.to_be_bytes());
        let mut p = Packet::from_frame(&frame);
        p.offload = Offload::partial_checksum(34, 16);
        let mut out = Vec::new();
        assert!(finish(&p, OffloadCaps::empty(), &mut out));
        assert_eq!(out[0].to_vec(), good);
    }

    #[test]
    fn senseless_requests_are_refused() {
        assert!(!Offload::partial_checksum(120, 16).is_valid(128));
        let mut o = Offload::tcp_segmentation(false, 0, 34, 54);
        assert!(!o.is_valid(128));
        o.gso_size = 1000;
        assert!(o.is_valid(128));
        o.gso_type = 3;
        assert!(!o.is_valid(128));
    }
}

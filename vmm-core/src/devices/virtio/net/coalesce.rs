//! Joins consecutive TCP segments of one connection into a larger one for a guest that takes those: the reverse of
//! segmentation, which leaves nothing out that the guest could have told apart.

use super::offload::{
    DATA_VALID, GSO_TCPV4, GSO_TCPV6, NEEDS_CSUM, Packet, be16, fold, sequence, set_ipv4_checksum,
    set_length,
    tcp_flags::{ACK, PSH},
};
use super::{Header, net_features as f};

/// The longest IP packet.
const MAX_PACKET: usize = 0xffff;

/// A frame whose checksum was verified, and what was joined to it.
pub(super) struct Run {
    packet: Packet,
    /// Payload of the first segment.
    size: usize,
    segments: usize,
    /// No segment follows the last one.
    closed: bool,
}

impl Run {
    /// Begins with `frame`; `None` when nothing can be said of it to a guest with these features.
    pub(super) fn begin(frame: &[u8], features: u64) -> Option<Self> {
        if features & f::GUEST_CSUM == 0 {
            return None;
        }
        let packet = Packet::parse(frame, false).filter(|p| p.verify(frame))?;
        let wanted = features & if packet.v6 { f::GUEST_TSO6 } else { f::GUEST_TSO4 } != 0;
        let size = packet.end - packet.payload;
        let plain = packet.is_tcp() && frame[packet.transport + 13] == ACK && size != 0;
        // Options of IPv4 are rare, and not all of them may be repeated.
        let options = !packet.v6 && packet.transport - packet.ip != 20;
        Some(Self { packet, size, segments: 1, closed: !wanted || !plain || options })
    }

    /// Bytes of the frame so far.
    pub(super) fn len(&self) -> usize {
        self.packet.end
    }

    /// Whether nothing more can be joined.
    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Joins `next` to `frame`, whose buffer has room for any packet; false when it does not continue it.
    pub(super) fn join(&mut self, frame: &mut [u8], next: &[u8]) -> bool {
        let Some(other) = Packet::parse(next, false) else { return false };
        let &Packet { ip, transport, payload, end, v6, .. } = &self.packet;
        let data = other.end.saturating_sub(payload);
        let from = if v6 { ip + 40 } else { ip };
        if self.closed
            || (other.ip, other.v6, other.protocol) != (ip, v6, self.packet.protocol)
            || (other.transport, other.payload) != (transport, payload)
            || data == 0
            || data > self.size
            || end - from + data > MAX_PACKET
            || end + data > frame.len()
            || !self.continues(frame, next)
            || !other.verify(next)
        {
            return false;
        }
        frame[end..end + data].copy_from_slice(&next[payload..other.end]);
        frame[transport + 13] |= next[transport + 13];
        self.packet.end += data;
        self.segments += 1;
        self.closed = data < self.size || next[transport + 13] & PSH != 0;
        true
    }

    /// Whether the headers say the same, and the sequence goes on.
    fn continues(&self, frame: &[u8], next: &[u8]) -> bool {
        let &Packet { ip, transport, payload, end, v6, .. } = &self.packet;
        let same = |from: usize, to: usize| frame[from..to] == next[from..to];
        let network = if v6 {
            same(ip, ip + 4) && same(ip + 6, ip + 40)
        } else {
            // An identification means something only to a packet that may be fragmented (RFC 6864).
            let counted =
                be16(next, ip + 4) == be16(frame, ip + 4).map(|id| id.wrapping_add(self.segments as u16));
            let whole = frame[ip + 6] & 0x40 != 0;
            same(ip, ip + 2) && same(ip + 6, ip + 10) && same(ip + 12, ip + 20) && (whole || counted)
        };
        let expected = sequence(frame, transport).wrapping_add((end - payload) as u32);
        network
            && same(0, ip)
            && same(transport, transport + 4)
            && same(transport + 8, transport + 13)
            && next[transport + 13] & !PSH == ACK
            && same(transport + 14, transport + 16)
            && same(transport + 18, payload)
            && sequence(next, transport) == expected
    }

    /// Completes the headers in `frame`; the result is what the guest is told of it.
    pub(super) fn finish(&self, frame: &mut [u8]) -> Header {
        if self.segments == 1 {
            return Header { flags: DATA_VALID, ..Header::default() };
        }
        let &Packet { ip, transport, payload, end, v6, .. } = &self.packet;
        set_length(&self.packet, frame, end - payload);
        if !v6 {
            set_ipv4_checksum(&mut frame[ip..transport]);
        }
        // A partial checksum, as a segment has that is still to be cut.
        let partial = fold(self.packet.pseudo(frame, end - transport));
        frame[transport + 16..transport + 18].copy_from_slice(&partial.to_be_bytes());
        Header {
            flags: NEEDS_CSUM,
            gso_type: if v6 { GSO_TCPV6 } else { GSO_TCPV4 },
            header_len: (payload as u16).to_le(),
            gso_size: (self.size as u16).to_le(),
            checksum_start: (transport as u16).to_le(),
            checksum_offset: 16u16.to_le(),
            buffers: 0,
        }
    }
}

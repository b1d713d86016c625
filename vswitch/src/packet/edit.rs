//! Changes of header fields in a frame, with the checksums that cover them.

use super::key::{self, ETH_ARP, ETH_IPV4, ETH_IPV6, Field, TCP, UDP};
use super::vlan::{TPID_C, VlanOp, outer_tag};
use super::{Packet, checksum};

/// Sets the bits `mask` of a field to those of `value` in the frame. A field that the frame does not have is left
/// alone, as are fields that live in the pipeline only.
pub fn set_field(p: &mut Packet, field: Field, value: u128, mask: u128) {
    match field {
        Field::EthDst => put(p.head_mut(), 0, 6, value, mask),
        Field::EthSrc => put(p.head_mut(), 6, 6, value, mask),
        Field::Vlan => set_vlan(p, value as u16, mask as u16),
        _ => {
            set_upper(p, field, value, mask);
        }
    }
}

/// Replaces the masked bits of the `n` bytes at `at`.
fn put(head: &mut [u8], at: usize, n: usize, value: u128, mask: u128) {
    let Some(bytes) = head.get_mut(at..at + n) else { return };
    let (value, mask) = (value.to_be_bytes(), mask.to_be_bytes());
    for ((b, v), m) in bytes.iter_mut().zip(&value[16 - n..]).zip(&mask[16 - n..]) {
        *b = (*b & !m) | (v & m);
    }
}

fn set_vlan(p: &mut Packet, value: u16, mask: u16) {
    // Bit 12 is the key's "tagged" mark, not part of the tag.
    let mask = mask & 0xefff;
    match outer_tag(p.head()) {
        Some((_, tci)) => VlanOp::Set { tci: (tci & !mask) | (value & mask) }.apply(p),
        None => VlanOp::Push { tpid: TPID_C, tci: value & mask }.apply(p),
    }
}

/// Changes a field behind the Ethernet header.
fn set_upper(p: &mut Packet, field: Field, value: u128, mask: u128) -> Option<()> {
    let partial = p.offload.needs_checksum();
    let mut k = key::FlowKey::default();
    let at = key::extract_l2(p.head(), 0, &mut k);
    let head = p.head_mut();
    match k.get64(Field::EthType) as u16 {
        ETH_ARP => {
            let (offset, n) = match field {
                Field::IpProto => (6, 2),
                Field::ArpSha => (8, 6),
                Field::IpSrc => (14, 4),
                Field::ArpTha => (18, 6),
                Field::IpDst => (24, 4),
                _ => return None,
            };
            put(head, at + offset, n, value, mask);
            Some(())
        }
        ETH_IPV4 | ETH_IPV6 => set_ip(head, field, value, mask, partial),
        _ => None,
    }
}

fn set_ip(head: &mut [u8], field: Field, value: u128, mask: u128, partial: bool) -> Option<()> {
    let l = key::layers(head)?;
    // Offset, length, and which checksums cover the bytes: the IPv4 header's, the transport's.
    let (at, n, in_header, in_transport) = match (field, l.ipv6) {
        (Field::IpSrc, false) => (l.network + 12, 4, true, true),
        (Field::IpDst, false) => (l.network + 16, 4, true, true),
        (Field::IpTtl, false) => (l.network + 8, 1, true, false),
        (Field::IpTos, false) => (l.network + 1, 1, true, false),
        (Field::IpSrc, true) => (l.network + 8, 16, false, true),
        (Field::IpDst, true) => (l.network + 24, 16, false, true),
        (Field::IpTtl, true) => (l.network + 7, 1, false, false),
        (Field::IpTos, true) => {
            put(head, l.network, 2, value << 4, mask << 4);
            return Some(());
        }
        (Field::FlowLabel, true) => {
            put(head, l.network, 4, value, mask & 0xf_ffff);
            return Some(());
        }
        (Field::TpSrc, _) if matches!(l.proto, TCP | UDP | key::SCTP) => (l.transport, 2, false, true),
        (Field::TpDst, _) if matches!(l.proto, TCP | UDP | key::SCTP) => (l.transport + 2, 2, false, true),
        _ => return None,
    };
    // Checksums work on 16-bit words: take the whole words around the bytes. IP headers start at even offsets.
    let (start, end) = (at & !1, (at + n + 1) & !1);
    let mut old = [0u8; 20];
    let len = end - start;
    old[..len].copy_from_slice(head.get(start..end)?);
    put(head, at, n, value, mask);
    let mut new = [0u8; 20];
    new[..len].copy_from_slice(&head[start..end]);
    if in_header {
        let field = head.get_mut(l.network + 10..l.network + 12)?;
        checksum::update(field, &old[..len], &new[..len], false);
    }
    let later = l.fragment && key::extract(head, 0).get64(Field::Frag) & key::FRAG_LATER != 0;
    let field = match l.proto {
        TCP => l.transport + 16,
        UDP => l.transport + 6,
        key::ICMPV6 => l.transport + 2,
        _ => return Some(()),
    };
    if in_transport && !later {
        let field = head.get_mut(field..field + 2)?;
        if !partial {
            checksum::update(field, &old[..len], &new[..len], l.proto == UDP);
        } else if at < l.transport {
            // A partial checksum holds the sum of the pseudo header, not its complement.
            let sum = u64::from(u16::from_be_bytes([field[0], field[1]]));
            let removed = u64::from(!checksum::fold(checksum::sum(&old[..len], 0)));
            let c = checksum::fold(checksum::sum(&new[..len], sum + removed));
            field.copy_from_slice(&c.to_be_bytes());
        }
    }
    Some(())
}

/// Decrements the time to live; `false` when it has run out or the frame has none.
pub fn decrement_ttl(p: &mut Packet) -> bool {
    let ttl = key::extract(p.head(), 0).get64(Field::IpTtl);
    if ttl <= 1 {
        return false;
    }
    set_field(p, Field::IpTtl, u128::from(ttl - 1), 0xff);
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    fn checksums_hold(frame: &[u8]) -> bool {
        let p = SlicedPacket::from_ethernet(frame).unwrap();
        let Some(TransportSlice::Udp(u)) = p.transport else { panic!("not UDP") };
        match p.net.unwrap() {
            etherparse::NetSlice::Ipv4(ip) => {
                let h = ip.header().to_header();
                h.calc_header_checksum() == h.header_checksum
                    && u.to_header().calc_checksum_ipv4(&h, u.payload()).unwrap() == u.checksum()
            }
            etherparse::NetSlice::Ipv6(ip) => {
                let h = ip.header().to_header();
                u.to_header().calc_checksum_ipv6(&h, u.payload()).unwrap() == u.checksum()
            }
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn a_set_field_reads_back_and_checksums_hold(which in 0usize..9, value: u128, mask: u128, ipv6: bool, tag: bool) {
            let fields = [Field::EthDst, Field::EthSrc, Field::IpSrc, Field::IpDst, Field::IpTtl, Field::IpTos,
                          Field::TpSrc, Field::TpDst, Field::FlowLabel];
            let field = fields[which];
            let mut f = Vec::new();
            let b = PacketBuilder::ethernet2([2; 6], [4; 6]);
            match (ipv6, tag) {
                (false, false) => b.ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64).udp(1, 2).write(&mut f, b"payload").unwrap(),
                (false, true) => b.single_vlan(5.try_into().unwrap()).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64).udp(1, 2)
                    .write(&mut f, b"payload").unwrap(),
                (true, _) => b.ipv6([1; 16], [2; 16], 64).udp(1, 2).write(&mut f, b"payload").unwrap(),
            }
            let mut p = Packet::from_frame(&f);
            let before = key::extract(p.head(), 1);
            // IPv4 addresses are 32 bits in a 128-bit field.
            let width = if matches!(field, Field::IpSrc | Field::IpDst) && !ipv6 { u128::from(u32::MAX) } else { field.ones() };
            let (value, mask) = (value & width, mask & width);
            set_field(&mut p, field, value, mask);
            let after = key::extract(p.head(), 1);
            let exists = field != Field::FlowLabel || ipv6;
            let expected = if exists { (before.get(field) & !mask) | (value & mask) } else { 0 };
            prop_assert_eq!(after.get(field), expected);
            prop_assert_eq!(before.with(field, 0), after.with(field, 0));
            prop_assert!(checksums_hold(&p.to_vec()));
        }
    }

    #[test]
    fn time_to_live_runs_out() {
        let mut f = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([1; 4], [2; 4], 2)
            .udp(1, 2)
            .write(&mut f, &[])
            .unwrap();
        let mut p = Packet::from_frame(&f);
        assert!(decrement_ttl(&mut p));
        assert!(checksums_hold(&p.to_vec()));
        assert!(!decrement_ttl(&mut p));
    }
}

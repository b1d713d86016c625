//! The flow key: what the switch can match on, as an array of 64-bit words, and its extraction from a frame.
//!
//! A word array makes masks, masked hashes and comparisons uniform. Words `0..L2_WORDS` come from the Ethernet
//! header, words up to `CACHE_WORDS` from the whole packet, the rest lives only while the packet is in the pipeline
//! (metadata, registers, conntrack).

use std::fmt;

use super::vlan::{self, PRESENT};

/// Words of a key.
pub const WORDS: usize = 23;
/// Words that the packet alone determines: what the flow cache hashes.
pub const CACHE_WORDS: usize = 14;

/// ARP's EtherType.
pub const ETH_ARP: u16 = 0x0806;
/// IPv4's EtherType.
pub const ETH_IPV4: u16 = 0x0800;
/// IPv6's EtherType.
pub const ETH_IPV6: u16 = 0x86dd;
/// IP protocol number of ICMP.
pub const ICMP: u8 = 1;
/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;
/// IP protocol number of ICMPv6.
pub const ICMPV6: u8 = 58;
/// IP protocol number of SCTP.
pub const SCTP: u8 = 132;

/// Values of [`Field::Frag`]: bit 0 is set in every fragment, bit 1 in all but the first.
pub const FRAG_ANY: u64 = 1;
/// See [`FRAG_ANY`].
pub const FRAG_LATER: u64 = 2;

/// A place in the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Field {
    /// Number of the port the packet came in by.
    InPort,
    /// Outer VLAN tag: priority and VLAN, and [`PRESENT`] when the frame is tagged; zero when not.
    Vlan,
    /// Inner VLAN tag of a frame with two, in the same form.
    InnerVlan,
    /// Destination MAC address.
    EthDst,
    /// EtherType behind the tags; a length (802.3) counts as 0x05ff.
    EthType,
    /// Source MAC address.
    EthSrc,
    /// IP protocol, or the ARP operation.
    IpProto,
    /// DSCP (upper six bits) and ECN.
    IpTos,
    /// Source port of TCP, UDP, SCTP; type of ICMP and ICMPv6.
    TpSrc,
    /// Destination port of TCP, UDP, SCTP; code of ICMP and ICMPv6.
    TpDst,
    /// Time to live, hop limit.
    IpTtl,
    /// Fragment bits, see [`FRAG_ANY`].
    Frag,
    /// The twelve TCP flag bits.
    TcpFlags,
    /// IPv4 or IPv6 source; sender's protocol address of ARP.
    IpSrc,
    /// IPv4 or IPv6 destination; target's protocol address of ARP.
    IpDst,
    /// IPv6 flow label.
    FlowLabel,
    /// Sender's hardware address of ARP; source link-layer address of neighbour discovery.
    ArpSha,
    /// Target's hardware address of ARP; target link-layer address of neighbour discovery.
    ArpTha,
    /// Target address of neighbour discovery.
    NdTarget,
    /// Tunnel identifier.
    TunId,
    /// Pipeline metadata.
    Metadata,
    /// Registers 0 to 7.
    Reg(u8),
    /// Conntrack state bits.
    CtState,
    /// Conntrack mark.
    CtMark,
    /// Conntrack zone.
    CtZone,
    /// Conntrack label.
    CtLabel,
}

impl Field {
    /// First word, shift within it, width in bits.
    #[inline]
    const fn place(self) -> (usize, u32, u32) {
        match self {
            Field::InPort => (0, 0, 32),
            Field::Vlan => (0, 32, 16),
            Field::InnerVlan => (0, 48, 16),
            Field::EthDst => (1, 0, 48),
            Field::EthType => (1, 48, 16),
            Field::EthSrc => (2, 0, 48),
            Field::IpProto => (2, 48, 8),
            Field::IpTos => (2, 56, 8),
            Field::TpSrc => (3, 0, 16),
            Field::TpDst => (3, 16, 16),
            Field::IpTtl => (3, 32, 8),
            Field::Frag => (3, 40, 8),
            Field::TcpFlags => (3, 48, 16),
            Field::IpSrc => (4, 0, 128),
            Field::IpDst => (6, 0, 128),
            Field::FlowLabel => (8, 0, 20),
            Field::ArpSha => (9, 0, 48),
            Field::ArpTha => (10, 0, 48),
            Field::NdTarget => (11, 0, 128),
            Field::TunId => (13, 0, 64),
            Field::Metadata => (14, 0, 64),
            Field::Reg(n) => (15 + (n as usize & 7) / 2, (n as u32 & 1) * 32, 32),
            Field::CtState => (19, 0, 32),
            Field::CtMark => (19, 32, 32),
            Field::CtZone => (20, 0, 16),
            Field::CtLabel => (21, 0, 128),
        }
    }

    /// The field's name in text.
    pub(crate) fn name(self) -> &'static str {
        const REGISTERS: [&str; 8] = ["reg0", "reg1", "reg2", "reg3", "reg4", "reg5", "reg6", "reg7"];
        match self {
            Field::InPort => "in_port",
            Field::Vlan => "vlan",
            Field::InnerVlan => "inner_vlan",
            Field::EthDst => "eth_dst",
            Field::EthType => "eth_type",
            Field::EthSrc => "eth_src",
            Field::IpProto => "protocol",
            Field::IpTos => "tos",
            Field::TpSrc => "src_port",
            Field::TpDst => "dst_port",
            Field::IpTtl => "ttl",
            Field::Frag => "frag",
            Field::TcpFlags => "tcp_flags",
            Field::IpSrc => "ip_src",
            Field::IpDst => "ip_dst",
            Field::FlowLabel => "flow_label",
            Field::ArpSha => "arp_sha",
            Field::ArpTha => "arp_tha",
            Field::NdTarget => "nd_target",
            Field::TunId => "tun_id",
            Field::Metadata => "metadata",
            Field::Reg(n) => REGISTERS[usize::from(n & 7)],
            Field::CtState => "ct_state",
            Field::CtMark => "ct_mark",
            Field::CtZone => "ct_zone",
            Field::CtLabel => "ct_label",
        }
    }

    /// Width in bits.
    pub const fn bits(self) -> u32 {
        self.place().2
    }

    /// A value with every bit of the field set.
    pub const fn ones(self) -> u128 {
        if self.bits() == 128 { u128::MAX } else { (1 << self.bits()) - 1 }
    }
}

/// Values of all fields; also a mask over them.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The words, see [`Field`] for what lies where.
    pub w: [u64; WORDS],
}

impl Default for FlowKey {
    fn default() -> Self {
        Self { w: [0; WORDS] }
    }
}

impl FlowKey {
    /// The value of `f`.
    #[inline]
    pub fn get(&self, f: Field) -> u128 {
        let (w, shift, bits) = f.place();
        if bits == 128 {
            (u128::from(self.w[w]) << 64) | u128::from(self.w[w + 1])
        } else {
            u128::from(self.w[w] >> shift) & f.ones()
        }
    }

    /// The value of a field of at most 64 bits.
    #[inline]
    pub fn get64(&self, f: Field) -> u64 {
        self.get(f) as u64
    }

    /// Sets `f`; bits beyond its width are ignored.
    #[inline]
    pub fn set(&mut self, f: Field, v: u128) {
        let (w, shift, bits) = f.place();
        if bits == 128 {
            self.w[w] = (v >> 64) as u64;
            self.w[w + 1] = v as u64;
        } else {
            let ones = f.ones() as u64;
            self.w[w] = (self.w[w] & !(ones << shift)) | ((v as u64 & ones) << shift);
        }
    }

    /// The key with `f` set, for building matches.
    #[must_use]
    pub fn with(mut self, f: Field, v: u128) -> Self {
        self.set(f, v);
        self
    }

    /// Adds all bits of `other`, as masks are joined.
    #[inline]
    pub fn join(&mut self, other: &FlowKey) {
        for (a, b) in self.w.iter_mut().zip(&other.w) {
            *a |= b;
        }
    }

    /// Marks all bits of `f`.
    #[inline]
    pub fn mark(&mut self, f: Field) {
        self.set(f, f.ones());
    }

    /// The key with only the bits of `mask`.
    #[must_use]
    pub fn masked(&self, mask: &FlowKey) -> Self {
        let mut k = *self;
        for (a, b) in k.w.iter_mut().zip(&mask.w) {
            *a &= b;
        }
        k
    }

    /// Whether the bits of `mask` equal those of `value`.
    #[inline]
    pub fn matches(&self, value: &FlowKey, mask: &FlowKey) -> bool {
        self.w.iter().zip(&value.w).zip(&mask.w).all(|((k, v), m)| k & m == v & m)
    }

    /// Whether a mask looks at nothing behind the Ethernet header and its tags.
    pub fn is_l2_mask(&self) -> bool {
        self.w[2] >> 48 == 0 && self.w[3..].iter().all(|w| *w == 0)
    }
}

impl fmt::Debug for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut s = f.debug_struct("FlowKey");
        for field in ALL_FIELDS {
            let v = self.get(field);
            if v != 0 {
                s.field(&format!("{field:?}"), &format_args!("{v:#x}"));
            }
        }
        s.finish()
    }
}

/// Every field once, registers included.
pub const ALL_FIELDS: [Field; 33] = [
    Field::InPort,
    Field::Vlan,
    Field::InnerVlan,
    Field::EthDst,
    Field::EthType,
    Field::EthSrc,
    Field::IpProto,
    Field::IpTos,
    Field::TpSrc,
    Field::TpDst,
    Field::IpTtl,
    Field::Frag,
    Field::TcpFlags,
    Field::IpSrc,
    Field::IpDst,
    Field::FlowLabel,
    Field::ArpSha,
    Field::ArpTha,
    Field::NdTarget,
    Field::TunId,
    Field::Metadata,
    Field::Reg(0),
    Field::Reg(1),
    Field::Reg(2),
    Field::Reg(3),
    Field::Reg(4),
    Field::Reg(5),
    Field::Reg(6),
    Field::Reg(7),
    Field::CtState,
    Field::CtMark,
    Field::CtZone,
    Field::CtLabel,
];

/// A MAC address as a number, first byte highest.
#[inline]
pub fn mac_u64(b: &[u8]) -> u64 {
    u64::from(u32::from_be_bytes([b[0], b[1], b[2], b[3]])) << 16
        | u64::from(u16::from_be_bytes([b[4], b[5]]))
}

/// The six bytes of a MAC address given as a number.
#[inline]
pub fn mac_bytes(mac: u64) -> [u8; 6] {
    let b = mac.to_be_bytes();
    [b[2], b[3], b[4], b[5], b[6], b[7]]
}

/// Whether a MAC address names a group (broadcast included).
#[inline]
pub fn is_group_mac(mac: u64) -> bool {
    mac >> 40 & 1 != 0
}

/// The broadcast address.
pub const BROADCAST_MAC: u64 = 0xffff_ffff_ffff;

#[inline]
fn be16(h: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*h.get(at..)?.first_chunk()?))
}

#[inline]
fn be32(h: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*h.get(at..)?.first_chunk()?))
}

/// Reads the Ethernet header and up to two tags into words 0 to 2; returns the offset of the network header.
#[inline]
pub fn extract_l2(head: &[u8], in_port: u32, key: &mut FlowKey) -> usize {
    let Some(eth) = head.first_chunk::<14>() else { return head.len() };
    let mut at = 12;
    let mut tags = [0u16; 2];
    let mut ethertype = u16::from_be_bytes([eth[12], eth[13]]);
    if vlan::is_tpid(ethertype) {
        for tag in &mut tags {
            let (true, Some(tci), Some(next)) =
                (vlan::is_tpid(ethertype), be16(head, at + 2), be16(head, at + 4))
            else {
                break;
            };
            *tag = tci | PRESENT;
            ethertype = next;
            at += 4;
        }
    }
    if ethertype < 0x600 {
        ethertype = 0x05ff;
    }
    key.w[0] = u64::from(in_port) | u64::from(tags[0]) << 32 | u64::from(tags[1]) << 48;
    key.w[1] = mac_u64(&eth[0..6]) | u64::from(ethertype) << 48;
    key.w[2] = mac_u64(&eth[6..12]);
    at + 2
}

/// Reads everything behind the Ethernet header. Headers that are cut off leave their fields at zero.
#[inline]
pub fn extract_l3(head: &[u8], at: usize, key: &mut FlowKey) {
    // A header that ends early is no error: the fields read so far stand.
    let _ = match (key.w[1] >> 48) as u16 {
        ETH_IPV4 => ipv4(head, at, key),
        ETH_IPV6 => ipv6(head, at, key),
        ETH_ARP => arp(head, at, key),
        _ => None,
    };
}

/// Extracts the whole key of a frame.
pub fn extract(head: &[u8], in_port: u32) -> FlowKey {
    let mut key = FlowKey::default();
    let at = extract_l2(head, in_port, &mut key);
    extract_l3(head, at, &mut key);
    key
}

#[inline]
fn ipv4(h: &[u8], at: usize, key: &mut FlowKey) -> Option<()> {
    let ip = h.get(at..)?.first_chunk::<20>()?;
    let header = usize::from(ip[0] & 0xf) * 4;
    if ip[0] >> 4 != 4 || header < 20 {
        return None;
    }
    key.w[2] |= u64::from(ip[9]) << 48 | u64::from(ip[1]) << 56;
    key.w[5] = u64::from(u32::from_be_bytes([ip[12], ip[13], ip[14], ip[15]]));
    key.w[7] = u64::from(u32::from_be_bytes([ip[16], ip[17], ip[18], ip[19]]));
    let frag = u16::from_be_bytes([ip[6], ip[7]]);
    let later = frag & 0x1fff != 0;
    let any = frag & 0x3fff != 0;
    key.w[3] = u64::from(ip[8]) << 32 | (u64::from(any) | u64::from(later) << 1) << 40;
    if later { Some(()) } else { transport(h, at + header, ip[9], key) }
}

#[inline]
fn ipv6(h: &[u8], at: usize, key: &mut FlowKey) -> Option<()> {
    let ip = h.get(at..)?.first_chunk::<40>()?;
    if ip[0] >> 4 != 6 {
        return None;
    }
    let word = |i: usize| {
        u64::from_be_bytes([
            ip[i],
            ip[i + 1],
            ip[i + 2],
            ip[i + 3],
            ip[i + 4],
            ip[i + 5],
            ip[i + 6],
            ip[i + 7],
        ])
    };
    (key.w[4], key.w[5], key.w[6], key.w[7]) = (word(8), word(16), word(24), word(32));
    key.w[8] = u64::from(u32::from_be_bytes([0, ip[1] & 0xf, ip[2], ip[3]]));
    key.w[3] = u64::from(ip[7]) << 32;
    let tos = ip[0] << 4 | ip[1] >> 4;
    let x = skip_extensions(h, at + 40, ip[6]);
    key.w[2] |= u64::from(x.proto) << 48 | u64::from(tos) << 56;
    key.w[3] |= (u64::from(x.fragment) | u64::from(x.later) << 1) << 40;
    if x.later { Some(()) } else { transport(h, x.at, x.proto, key) }
}

struct Extensions {
    at: usize,
    proto: u8,
    fragment: bool,
    later: bool,
}

/// Walks over hop-by-hop, routing, destination, fragment and authentication headers, eight at most.
fn skip_extensions(h: &[u8], mut at: usize, mut proto: u8) -> Extensions {
    let (mut fragment, mut later) = (false, false);
    for _ in 0..8 {
        let len = match proto {
            0 | 43 | 60 => h.get(at + 1).map(|n| usize::from(*n) * 8 + 8),
            51 => h.get(at + 1).map(|n| usize::from(*n) * 4 + 8),
            44 => be16(h, at + 2).map(|f| {
                fragment = f & 0xfff9 != 0;
                later = f & 0xfff8 != 0;
                8
            }),
            _ => break,
        };
        let (Some(len), Some(next)) = (len, h.get(at)) else { break };
        proto = *next;
        at += len;
        if later {
            break;
        }
    }
    Extensions { at, proto, fragment, later }
}

#[inline]
fn transport(h: &[u8], at: usize, proto: u8, key: &mut FlowKey) -> Option<()> {
    match proto {
        TCP => {
            let ports = be32(h, at)?;
            let flags = be16(h, at + 12)? & 0x0fff;
            key.w[3] |= u64::from(ports >> 16) | u64::from(ports & 0xffff) << 16 | u64::from(flags) << 48;
        }
        UDP | SCTP => {
            let ports = be32(h, at)?;
            key.w[3] |= u64::from(ports >> 16) | u64::from(ports & 0xffff) << 16;
        }
        ICMP => {
            let tc = be16(h, at)?;
            key.w[3] |= u64::from(tc >> 8) | u64::from(tc & 0xff) << 16;
        }
        ICMPV6 => {
            let tc = be16(h, at)?;
            key.w[3] |= u64::from(tc >> 8) | u64::from(tc & 0xff) << 16;
            if matches!(tc >> 8, 135 | 136) {
                neighbour(h, at, key);
            }
        }
        _ => {}
    }
    Some(())
}

/// Target and link-layer option of a neighbour solicitation or advertisement (RFC 4861).
fn neighbour(h: &[u8], at: usize, key: &mut FlowKey) -> Option<()> {
    let target = h.get(at + 8..)?.first_chunk::<16>()?;
    key.set(Field::NdTarget, u128::from_be_bytes(*target));
    let mut opt = at + 24;
    for _ in 0..4 {
        let (kind, len) = (*h.get(opt)?, usize::from(*h.get(opt + 1)?) * 8);
        let mac = h.get(opt + 2..)?.first_chunk::<6>()?;
        match kind {
            1 => key.w[9] = mac_u64(mac),
            2 => key.w[10] = mac_u64(mac),
            _ => {}
        }
        if len == 0 {
            return None;
        }
        opt += len;
    }
    Some(())
}

fn arp(h: &[u8], at: usize, key: &mut FlowKey) -> Option<()> {
    let a = h.get(at..)?.first_chunk::<28>()?;
    if a[0..6] != [0, 1, 8, 0, 6, 4] {
        return None;
    }
    let op = u16::from_be_bytes([a[6], a[7]]);
    key.w[2] |= u64::from(op.min(255)) << 48;
    key.w[9] = mac_u64(&a[8..14]);
    key.w[10] = mac_u64(&a[18..24]);
    key.w[5] = u64::from(u32::from_be_bytes([a[14], a[15], a[16], a[17]]));
    key.w[7] = u64::from(u32::from_be_bytes([a[24], a[25], a[26], a[27]]));
    Some(())
}

/// The key of the packet that an ICMP or ICMPv6 error quotes; `None` when the frame is no such error.
pub fn quoted_packet(head: &[u8]) -> Option<FlowKey> {
    let l = layers(head)?;
    let kind = *head.get(l.transport)?;
    let error = match l.proto {
        ICMP => matches!(kind, 3 | 11 | 12),
        ICMPV6 => kind < 128,
        _ => false,
    };
    if !error || l.fragment {
        return None;
    }
    let mut key = FlowKey::default();
    key.w[1] = u64::from(if l.ipv6 { ETH_IPV6 } else { ETH_IPV4 }) << 48;
    extract_l3(head, l.transport + 8, &mut key);
    Some(key)
}

/// Where the headers of an IP packet lie.
#[derive(Clone, Copy, Debug)]
pub struct Layers {
    /// Offset of the IP header.
    pub network: usize,
    /// Offset of the transport header.
    pub transport: usize,
    /// IP protocol of the transport header.
    pub proto: u8,
    /// Whether the packet is IPv6 (else IPv4).
    pub ipv6: bool,
    /// Whether the packet is a fragment.
    pub fragment: bool,
}

/// Finds the headers of an IP packet; `None` when the frame is not IP or is cut off.
pub fn layers(head: &[u8]) -> Option<Layers> {
    let mut k = FlowKey::default();
    let network = extract_l2(head, 0, &mut k);
    match k.get64(Field::EthType) as u16 {
        ETH_IPV4 => {
            let ip = head.get(network..)?.first_chunk::<20>()?;
            let len = usize::from(ip[0] & 0xf) * 4;
            let fragment = u16::from_be_bytes([ip[6], ip[7]]) & 0x3fff != 0;
            let ok = ip[0] >> 4 == 4 && len >= 20 && network + len <= head.len();
            ok.then_some(Layers { network, transport: network + len, proto: ip[9], ipv6: false, fragment })
        }
        ETH_IPV6 => {
            let ip = head.get(network..)?.first_chunk::<40>()?;
            let x = skip_extensions(head, network + 40, ip[6]);
            (ip[0] >> 4 == 6 && x.at <= head.len()).then_some(Layers {
                network,
                transport: x.at,
                proto: x.proto,
                ipv6: true,
                fragment: x.fragment,
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    #[test]
    fn fields_do_not_overlap() {
        for a in ALL_FIELDS {
            let mut k = FlowKey::default();
            k.mark(a);
            assert_eq!(k.get(a), a.ones());
            for b in ALL_FIELDS {
                assert!(a == b || k.get(b) == 0, "{a:?} overlaps {b:?}");
            }
        }
    }

    #[test]
    fn a_tagged_udp_packet() {
        let mut f = Vec::new();
        PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
            .single_vlan(100.try_into().unwrap())
            .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 63)
            .udp(53, 1053)
            .write(&mut f, &[0; 20])
            .unwrap();
        let k = extract(&f, 7);
        assert_eq!(k.get64(Field::InPort), 7);
        assert_eq!(k.get64(Field::Vlan), 100 | u64::from(PRESENT));
        assert_eq!(k.get64(Field::EthSrc), 0x0200_0000_0001);
        assert_eq!(k.get64(Field::IpSrc), 0x0a00_0001);
        assert_eq!((k.get64(Field::TpSrc), k.get64(Field::TpDst)), (53, 1053));
        assert_eq!((k.get64(Field::IpProto), k.get64(Field::IpTtl)), (17, 63));
    }

    #[test]
    fn ipv6_tcp_flags_and_extension_headers() {
        let mut f = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv6([1; 16], [2; 16], 5)
            .tcp(1, 2, 3, 4)
            .syn()
            .write(&mut f, &[])
            .unwrap();
        let k = extract(&f, 1);
        assert_eq!(k.get(Field::IpDst), u128::from_be_bytes([2; 16]));
        assert_eq!(k.get64(Field::TcpFlags), 2);
        // A hop-by-hop header in front of the TCP header changes nothing but offsets.
        let mut g = f.clone();
        g[20] = 0;
        g.splice(54..54, [6, 0, 1, 4, 0, 0, 0, 0]);
        let l = extract(&g, 1);
        assert_eq!((l.get64(Field::TpDst), l.get64(Field::IpProto)), (2, 6));
    }

    proptest! {
        #[test]
        fn no_input_panics(data in proptest::collection::vec(any::<u8>(), 0..128), kind in 0usize..6) {
            let mut data = data;
            let t = [ETH_IPV4, ETH_IPV6, ETH_ARP, vlan::TPID_C, vlan::TPID_S, 5][kind];
            if data.len() >= 14 {
                data[12..14].copy_from_slice(&t.to_be_bytes());
            }
            extract(&data, 3);
            layers(&data);
        }
    }
}

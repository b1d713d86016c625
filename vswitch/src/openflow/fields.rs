//! Fields of extensible matches (OXM and Nicira's NXM) and where they lie in the flow key.

use super::wire::{NICIRA, ONF, OfError, Put, Reader, Result, port_from_16, port_to_16};
use crate::packet::key::{self, Field, FlowKey};
use crate::packet::vlan::PRESENT;
use crate::pipeline::{Location, Match};

const NXM0: u16 = 0x0000;
const NXM1: u16 = 0x0001;
const OXM: u16 = 0x8000;
/// Class of fields whose header is followed by an experimenter number.
const EXPERIMENTER: u16 = 0xffff;

/// What a packet must be to have a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Needs {
    Nothing,
    Vlan,
    Ip,
    Ip4,
    Ip6,
    Arp,
    Proto(u8),
    Icmp4,
    Icmp6,
    NdSolicit,
    NdAdvert,
    Nd,
}

/// One field on the wire.
#[derive(Debug)]
pub(crate) struct WireField {
    class: u16,
    number: u8,
    /// Length of the value on the wire.
    pub bytes: usize,
    /// Bits of the key.
    field: Field,
    offset: u32,
    bits: u32,
    /// Zero bits below the value on the wire.
    shift: u32,
    /// Whether OpenFlow allows a mask.
    maskable: bool,
    pub needs: Needs,
}

const fn f(
    class: u16,
    number: u8,
    bytes: usize,
    (field, offset, bits): (Field, u32, u32),
    maskable: bool,
    needs: Needs,
) -> WireField {
    WireField { class, number, bytes, field, offset, bits, shift: 0, maskable, needs }
}

use Field::{
    ArpSha, ArpTha, CtLabel, CtMark, CtState, CtZone, EthDst, EthSrc, EthType, FlowLabel, Frag, InPort,
    IpDst, IpProto, IpSrc, IpTos, IpTtl, Metadata, NdTarget, Reg, TcpFlags, TpDst, TpSrc, TunId, Vlan,
};

/// OpenFlow 1.3's fields, in the order in which they are written.
static OXM_FIELDS: [WireField; 37] = [
    f(OXM, 0, 4, (InPort, 0, 32), false, Needs::Nothing),
    f(OXM, 2, 8, (Metadata, 0, 64), true, Needs::Nothing),
    f(OXM, 3, 6, (EthDst, 0, 48), true, Needs::Nothing),
    f(OXM, 4, 6, (EthSrc, 0, 48), true, Needs::Nothing),
    f(OXM, 5, 2, (EthType, 0, 16), false, Needs::Nothing),
    f(OXM, 6, 2, (Vlan, 0, 13), true, Needs::Nothing),
    f(OXM, 7, 1, (Vlan, 13, 3), false, Needs::Vlan),
    f(OXM, 8, 1, (IpTos, 2, 6), false, Needs::Ip),
    f(OXM, 9, 1, (IpTos, 0, 2), false, Needs::Ip),
    f(OXM, 10, 1, (IpProto, 0, 8), false, Needs::Ip),
    f(OXM, 11, 4, (IpSrc, 0, 32), true, Needs::Ip4),
    f(OXM, 12, 4, (IpDst, 0, 32), true, Needs::Ip4),
    f(OXM, 13, 2, (TpSrc, 0, 16), true, Needs::Proto(key::TCP)),
    f(OXM, 14, 2, (TpDst, 0, 16), true, Needs::Proto(key::TCP)),
    f(OXM, 15, 2, (TpSrc, 0, 16), true, Needs::Proto(key::UDP)),
    f(OXM, 16, 2, (TpDst, 0, 16), true, Needs::Proto(key::UDP)),
    f(OXM, 17, 2, (TpSrc, 0, 16), true, Needs::Proto(key::SCTP)),
    f(OXM, 18, 2, (TpDst, 0, 16), true, Needs::Proto(key::SCTP)),
    f(OXM, 19, 1, (TpSrc, 0, 16), false, Needs::Icmp4),
    f(OXM, 20, 1, (TpDst, 0, 16), false, Needs::Icmp4),
    f(OXM, 21, 2, (IpProto, 0, 8), false, Needs::Arp),
    f(OXM, 22, 4, (IpSrc, 0, 32), true, Needs::Arp),
    f(OXM, 23, 4, (IpDst, 0, 32), true, Needs::Arp),
    f(OXM, 24, 6, (ArpSha, 0, 48), true, Needs::Arp),
    f(OXM, 25, 6, (ArpTha, 0, 48), true, Needs::Arp),
    f(OXM, 26, 16, (IpSrc, 0, 128), true, Needs::Ip6),
    f(OXM, 27, 16, (IpDst, 0, 128), true, Needs::Ip6),
    f(OXM, 28, 4, (FlowLabel, 0, 20), true, Needs::Ip6),
    f(OXM, 29, 1, (TpSrc, 0, 16), false, Needs::Icmp6),
    f(OXM, 30, 1, (TpDst, 0, 16), false, Needs::Icmp6),
    f(OXM, 31, 16, (NdTarget, 0, 128), true, Needs::Nd),
    f(OXM, 32, 6, (ArpSha, 0, 48), true, Needs::NdSolicit),
    f(OXM, 33, 6, (ArpTha, 0, 48), true, Needs::NdAdvert),
    f(OXM, 38, 8, (TunId, 0, 64), true, Needs::Nothing),
    // TCP flags as an extension of 1.3, and as OpenFlow 1.5 has them.
    f(EXPERIMENTER, 42, 2, (TcpFlags, 0, 12), true, Needs::Proto(key::TCP)),
    f(OXM, 42, 2, (TcpFlags, 0, 12), true, Needs::Proto(key::TCP)),
    f(NXM1, 26, 1, (Frag, 0, 2), true, Needs::Ip),
];

/// Nicira's fields, in the order in which they are written.
static NXM_FIELDS: [WireField; 47] = [
    f(NXM0, 0, 2, (InPort, 0, 32), false, Needs::Nothing),
    f(NXM0, 1, 6, (EthDst, 0, 48), true, Needs::Nothing),
    f(NXM0, 2, 6, (EthSrc, 0, 48), true, Needs::Nothing),
    f(NXM0, 3, 2, (EthType, 0, 16), false, Needs::Nothing),
    f(NXM0, 4, 2, (Vlan, 0, 16), true, Needs::Nothing),
    WireField { shift: 2, ..f(NXM0, 5, 1, (IpTos, 2, 6), false, Needs::Ip) },
    f(NXM1, 28, 1, (IpTos, 0, 2), false, Needs::Ip),
    f(NXM0, 6, 1, (IpProto, 0, 8), false, Needs::Ip),
    f(NXM0, 7, 4, (IpSrc, 0, 32), true, Needs::Ip4),
    f(NXM0, 8, 4, (IpDst, 0, 32), true, Needs::Ip4),
    f(NXM0, 9, 2, (TpSrc, 0, 16), true, Needs::Proto(key::TCP)),
    f(NXM0, 10, 2, (TpDst, 0, 16), true, Needs::Proto(key::TCP)),
    f(NXM0, 11, 2, (TpSrc, 0, 16), true, Needs::Proto(key::UDP)),
    f(NXM0, 12, 2, (TpDst, 0, 16), true, Needs::Proto(key::UDP)),
    f(NXM0, 13, 1, (TpSrc, 0, 16), false, Needs::Icmp4),
    f(NXM0, 14, 1, (TpDst, 0, 16), false, Needs::Icmp4),
    f(NXM0, 15, 2, (IpProto, 0, 8), false, Needs::Arp),
    f(NXM0, 16, 4, (IpSrc, 0, 32), true, Needs::Arp),
    f(NXM0, 17, 4, (IpDst, 0, 32), true, Needs::Arp),
    f(NXM1, 17, 6, (ArpSha, 0, 48), true, Needs::Arp),
    f(NXM1, 18, 6, (ArpTha, 0, 48), true, Needs::Arp),
    f(NXM1, 19, 16, (IpSrc, 0, 128), true, Needs::Ip6),
    f(NXM1, 20, 16, (IpDst, 0, 128), true, Needs::Ip6),
    f(NXM1, 21, 1, (TpSrc, 0, 16), false, Needs::Icmp6),
    f(NXM1, 22, 1, (TpDst, 0, 16), false, Needs::Icmp6),
    f(NXM1, 23, 16, (NdTarget, 0, 128), true, Needs::Nd),
    f(NXM1, 24, 6, (ArpSha, 0, 48), true, Needs::NdSolicit),
    f(NXM1, 25, 6, (ArpTha, 0, 48), true, Needs::NdAdvert),
    f(NXM1, 26, 1, (Frag, 0, 2), true, Needs::Ip),
    f(NXM1, 27, 4, (FlowLabel, 0, 20), true, Needs::Ip6),
    f(NXM1, 29, 1, (IpTtl, 0, 8), true, Needs::Ip),
    f(NXM1, 34, 2, (TcpFlags, 0, 12), true, Needs::Proto(key::TCP)),
    f(NXM1, 16, 8, (TunId, 0, 64), true, Needs::Nothing),
    f(NXM1, 0, 4, (Reg(0), 0, 32), true, Needs::Nothing),
    f(NXM1, 1, 4, (Reg(1), 0, 32), true, Needs::Nothing),
    f(NXM1, 2, 4, (Reg(2), 0, 32), true, Needs::Nothing),
    f(NXM1, 3, 4, (Reg(3), 0, 32), true, Needs::Nothing),
    f(NXM1, 4, 4, (Reg(4), 0, 32), true, Needs::Nothing),
    f(NXM1, 5, 4, (Reg(5), 0, 32), true, Needs::Nothing),
    f(NXM1, 6, 4, (Reg(6), 0, 32), true, Needs::Nothing),
    f(NXM1, 7, 4, (Reg(7), 0, 32), true, Needs::Nothing),
    f(NXM1, 105, 4, (CtState, 0, 32), true, Needs::Nothing),
    f(NXM1, 106, 2, (CtZone, 0, 16), false, Needs::Nothing),
    f(NXM1, 107, 4, (CtMark, 0, 32), true, Needs::Nothing),
    f(NXM1, 108, 16, (CtLabel, 0, 128), true, Needs::Nothing),
    f(OXM, 2, 8, (Metadata, 0, 64), true, Needs::Nothing),
    f(OXM, 17, 2, (TpSrc, 0, 16), true, Needs::Proto(key::SCTP)),
];

/// Which fields are preferred when writing; all are understood in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// OpenFlow 1.3's.
    Oxm,
    /// Nicira's, with OpenFlow 1.0.
    Nxm,
}

impl Dialect {
    fn fields(self) -> impl Iterator<Item = &'static WireField> + Clone {
        let (a, b): (&[WireField], &[WireField]) = match self {
            Dialect::Oxm => (&OXM_FIELDS, &NXM_FIELDS),
            Dialect::Nxm => (&NXM_FIELDS, &OXM_FIELDS),
        };
        a.iter().chain(b)
    }
}

impl Needs {
    /// Whether every packet that `m` matches has what is needed.
    pub fn met(self, m: &Match) -> bool {
        let exact = |f: Field| (m.mask.get(f) == f.ones()).then(|| m.value.get(f));
        let eth = exact(EthType).map(|v| v as u16);
        let ip = matches!(eth, Some(key::ETH_IPV4 | key::ETH_IPV6));
        let icmp6 = eth == Some(key::ETH_IPV6) && exact(IpProto) == Some(key::ICMPV6.into());
        let kind = exact(TpSrc);
        match self {
            Needs::Nothing => true,
            Needs::Vlan => m.mask.get(Vlan) & m.value.get(Vlan) & u128::from(PRESENT) != 0,
            Needs::Ip => ip,
            Needs::Ip4 => eth == Some(key::ETH_IPV4),
            Needs::Ip6 => eth == Some(key::ETH_IPV6),
            Needs::Arp => eth == Some(key::ETH_ARP),
            Needs::Proto(p) => ip && exact(IpProto) == Some(p.into()),
            Needs::Icmp4 => eth == Some(key::ETH_IPV4) && exact(IpProto) == Some(key::ICMP.into()),
            Needs::Icmp6 => icmp6,
            Needs::NdSolicit => icmp6 && kind == Some(135),
            Needs::NdAdvert => icmp6 && kind == Some(136),
            Needs::Nd => icmp6 && matches!(kind, Some(135 | 136)),
        }
    }
}

impl WireField {
    fn find(class: u16, number: u8) -> Option<&'static WireField> {
        Dialect::Oxm.fields().find(|w| w.class == class && w.number == number)
    }

    /// The whole field.
    pub fn location(&self) -> Location {
        Location { field: self.field, offset: self.offset, bits: self.bits }
    }

    /// A part of the field, as actions name it; `None`: it lies outside.
    pub fn part(&self, offset: u32, bits: u32) -> Option<Location> {
        // Ports are 32 bits in the key, whatever their width on the wire; values are translated.
        let offset = offset.checked_sub(self.shift)?;
        let width = self.bits.min(self.bytes as u32 * 8);
        let fits = bits > 0 && offset.checked_add(bits)? <= width;
        // A longer part of a field with unused upper bits (the 12 TCP flags in 16) means the bits there are.
        let padded = bits > 0 && offset.checked_add(bits)? <= self.bytes as u32 * 8 && offset < width;
        let bits = if fits {
            bits
        } else if padded {
            width - offset
        } else {
            return None;
        };
        Some(Location { field: self.field, offset: self.offset + offset, bits })
    }

    /// A value from the wire, in the field's place in the key.
    fn value_in(&self, v: u128) -> Option<u128> {
        if self.field == InPort && self.bytes == 2 {
            return Some(port_from_16(v as u16).into());
        }
        let low = v >> self.shift;
        let fits = low << self.shift == v && (self.bits == 128 || low >> self.bits == 0);
        fits.then_some(low << self.offset)
    }

    /// The bits of the key's field as a value for the wire.
    fn value_out(&self, v: u128) -> u128 {
        if self.field == InPort && self.bytes == 2 {
            return port_to_16(v as u32).into();
        }
        ((v & self.location().mask()) >> self.offset) << self.shift
    }

    fn put_header(&self, out: &mut Vec<u8>, has_mask: bool) {
        let exp = if self.class == EXPERIMENTER { 4 } else { 0 };
        let len = exp + self.bytes * (1 + usize::from(has_mask));
        out.put16(self.class);
        out.put8(self.number << 1 | u8::from(has_mask));
        out.put8(len as u8);
        if exp != 0 {
            out.put32(ONF);
        }
    }

    /// Appends the field with bits of the key's field.
    pub fn put(&self, out: &mut Vec<u8>, value: u128, mask: Option<u128>) {
        self.put_header(out, mask.is_some());
        out.put_number(self.value_out(value), self.bytes);
        if let Some(m) = mask {
            out.put_number(self.value_out(m), self.bytes);
        }
    }

    /// Appends the field's header alone, as actions name fields.
    pub fn put_name(&self, out: &mut Vec<u8>) {
        out.put16(self.class);
        out.put8(self.number << 1);
        out.put8(self.bytes as u8 + if self.class == EXPERIMENTER { 4 } else { 0 });
        if self.class == EXPERIMENTER {
            out.put32(ONF);
        }
    }

    /// Whether the bits are the whole field.
    pub fn is_whole(&self, mask: u128) -> bool {
        mask & self.location().mask() == self.location().mask()
    }
}

/// A field with its value, as matches and set-field actions carry it.
#[derive(Debug)]
pub(crate) struct Entry {
    pub wire: &'static WireField,
    /// In the place of the key's field.
    pub value: u128,
    /// In the place of the key's field; all ones of the field when the wire had no mask.
    pub mask: u128,
    pub masked: bool,
}

/// Reads the header of a field: class and number looked up, whether there is a mask, length of the payload.
fn header(r: &mut Reader<'_>) -> Result<(&'static WireField, bool, usize)> {
    let (class, number, mut len) = (r.u16()?, r.u8()?, usize::from(r.u8()?));
    if class == EXPERIMENTER {
        len = len.checked_sub(4).ok_or(OfError::MATCH_LEN)?;
        if !matches!(r.u32()?, ONF | NICIRA) {
            return Err(OfError::MATCH_FIELD);
        }
    }
    let wire = WireField::find(class, number >> 1).ok_or(OfError::MATCH_FIELD)?;
    Ok((wire, number & 1 != 0, len))
}

/// Reads a field's name, as actions hold it.
pub(crate) fn take_name(r: &mut Reader<'_>) -> Result<&'static WireField> {
    let (wire, _, _) = header(r)?;
    Ok(wire)
}

/// Reads a field with its value.
pub(crate) fn take_entry(r: &mut Reader<'_>) -> Result<Entry> {
    let (wire, masked, len) = header(r)?;
    if len != wire.bytes * (1 + usize::from(masked)) {
        return Err(OfError::MATCH_LEN);
    }
    let value = r.number(wire.bytes)?;
    let value = wire.value_in(value).ok_or(OfError::MATCH_VALUE)?;
    let whole = wire.location().mask();
    if !masked {
        return Ok(Entry { wire, value, mask: whole, masked });
    }
    let raw = r.number(wire.bytes)?;
    let ones = if wire.bytes == 16 { u128::MAX } else { (1 << (wire.bytes * 8)) - 1 };
    // Bits beyond the field may be masked (a full mask of a field with unused bits).
    let mask = if raw == ones { whole } else { wire.value_in(raw).ok_or(OfError::MATCH_MASK)? };
    Ok(Entry { wire, value, mask, masked })
}

/// Reads the fields of a match.
pub(crate) fn take_fields(mut r: Reader<'_>) -> Result<Match> {
    let mut m = Match::default();
    while !r.is_empty() {
        let e = take_entry(&mut r)?;
        let field = e.wire.field;
        if e.masked && !e.wire.maskable && !e.wire.is_whole(e.mask) {
            return Err(OfError::MATCH_MASK);
        }
        if e.value & !e.mask != 0 {
            return Err(OfError::MATCH_VALUE);
        }
        if !e.wire.needs.met(&m) {
            return Err(OfError::MATCH_PREREQUISITE);
        }
        let old = (m.value.get(field), m.mask.get(field));
        // A tag's priority field repeats the "tagged" mark of the VLAN field, no other bit may come twice.
        if old.1 & e.mask != 0 {
            return Err(OfError::MATCH_DUPLICATE);
        }
        m = m.masked(field, old.0 | e.value, old.1 | e.mask);
    }
    Ok(m)
}

/// Appends the fields of a match.
pub(crate) fn put_fields(out: &mut Vec<u8>, m: &Match, dialect: Dialect) {
    let mut left: FlowKey = m.mask;
    if Needs::Ip4.met(m) || Needs::Arp.met(m) {
        // The key holds IPv4 addresses in the low bits of longer fields, whose other bits are zero anyway.
        for f in [IpSrc, IpDst] {
            left.set(f, left.get(f) & u128::from(u32::MAX));
        }
    }
    // First the fields that a packet surely has, then what a match made by other means may hold beyond them.
    for strict in [true, false] {
        for w in dialect.fields() {
            let here = left.get(w.field) & w.location().mask();
            let needs = w.needs.met(m) || !strict;
            let precise = w.maskable || w.is_whole(here) || !strict;
            // An IPv6 address must not be written as an IPv4 one.
            let all = left.get(w.field) & !w.location().mask() == 0 || matches!(w.field, Vlan | IpTos);
            if here == 0 || !needs || !precise || !all {
                continue;
            }
            let mask = (!w.is_whole(here)).then_some(here);
            w.put(out, m.value.get(w.field) & here, mask);
            left.set(w.field, left.get(w.field) & !here);
        }
    }
}

/// The field to name bits of the key by, given what the packets are known to be.
pub(crate) fn field_for(at: &Location, context: &Match, dialect: Dialect) -> Option<&'static WireField> {
    let holds = |w: &&WireField| {
        let l = w.location();
        l.field == at.field && l.offset <= at.offset && at.offset + at.bits <= l.offset + l.bits
    };
    let met = |w: &&WireField| w.needs.met(context);
    // Best is a field of just this width.
    let exact = |w: &&WireField| w.bits.min(w.bytes as u32 * 8) == at.bits;
    let known = || dialect.fields().filter(holds).filter(met);
    known().find(exact).or_else(|| known().next()).or_else(|| dialect.fields().find(holds))
}

/// OpenFlow 1.3's match with its header and padding.
pub(crate) fn put_match13(out: &mut Vec<u8>, m: &Match) {
    let start = out.len();
    out.put16(1);
    out.put16(0);
    put_fields(out, m, Dialect::Oxm);
    out.put_len(start + 2, start);
    out.pad8(start);
}

/// See [`put_match13`].
pub(crate) fn take_match13(r: &mut Reader<'_>) -> Result<Match> {
    const TYPE_OXM: u16 = 1;
    let (kind, len) = (r.u16()?, usize::from(r.u16()?));
    if kind != TYPE_OXM {
        return Err(OfError::MATCH_TYPE);
    }
    let fields = r.sub(len.checked_sub(4).ok_or(OfError::MATCH_LEN)?)?.failing(OfError::MATCH_LEN);
    r.skip(len.next_multiple_of(8) - len)?;
    take_fields(fields)
}

/// Nicira's match of `len` bytes with its padding.
pub(crate) fn take_match_nx(r: &mut Reader<'_>, len: usize) -> Result<Match> {
    let fields = r.sub(len)?.failing(OfError::MATCH_LEN);
    r.skip(len.next_multiple_of(8) - len)?;
    take_fields(fields)
}

/// Appends Nicira's match with padding; returns its length without.
pub(crate) fn put_match_nx(out: &mut Vec<u8>, m: &Match) -> u16 {
    let start = out.len();
    put_fields(out, m, Dialect::Nxm);
    let len = (out.len() - start) as u16;
    out.pad8(start);
    len
}

impl WireField {
    /// Where a part of the key's field begins, counted in bits of the value on the wire.
    pub fn wire_offset(&self, l: &Location) -> u32 {
        l.offset.saturating_sub(self.offset) + self.shift
    }
}

/// Appends the headers of all fields of OpenFlow 1.3's own class, as table features list them.
pub(crate) fn feature_names(out: &mut Vec<u8>) {
    for w in OXM_FIELDS.iter().filter(|w| w.class == OXM) {
        w.put_name(out);
    }
}

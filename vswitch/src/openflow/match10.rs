//! OpenFlow 1.0's fixed match structure (`ofp_match`, section 5.2.3 of the 1.0.0 specification).

use super::wire::{Put, Reader, Result, port_from_16, port_to_16};
use crate::packet::key::{self, Field};
use crate::packet::vlan::{PRESENT, VID_MASK};
use crate::pipeline::Match;

const W_IN_PORT: u32 = 1;
const W_VLAN: u32 = 1 << 1;
const W_SRC: u32 = 1 << 2;
const W_DST: u32 = 1 << 3;
const W_TYPE: u32 = 1 << 4;
const W_PROTO: u32 = 1 << 5;
const W_TP_SRC: u32 = 1 << 6;
const W_TP_DST: u32 = 1 << 7;
const W_NW_SRC_SHIFT: u32 = 8;
const W_NW_DST_SHIFT: u32 = 14;
const W_PCP: u32 = 1 << 20;
const W_TOS: u32 = 1 << 21;
/// "No tag" in the VLAN field.
const VLAN_NONE: u16 = 0xffff;
const VID: u128 = (VID_MASK | PRESENT) as u128;
const PCP: u128 = 0xe000;

fn prefix_mask(wild_bits: u32) -> u128 {
    u128::from(u32::MAX.checked_shl(wild_bits).unwrap_or(0))
}

/// Reads the structure. Fields that the packet cannot have by its EtherType or protocol are ignored, as OpenFlow 1.0
/// wants it.
pub(crate) fn take(r: &mut Reader<'_>) -> Result<Match> {
    let w = r.u32()?;
    let in_port = r.u16()?;
    let (src, dst) = (r.number(6)?, r.number(6)?);
    let (vlan, pcp) = (r.u16()?, r.u8()?);
    r.skip(1)?;
    let (eth_type, tos, proto) = (r.u16()?, r.u8()?, r.u8()?);
    r.skip(2)?;
    let (nw_src, nw_dst) = (r.u32()?, r.u32()?);
    let (tp_src, tp_dst) = (r.u16()?, r.u16()?);
    let mut m = Match::default();
    let mut exact = |wild: u32, f: Field, v: u128| {
        if w & wild == 0 {
            m = m.field(f, v);
        }
    };
    exact(W_IN_PORT, Field::InPort, port_from_16(in_port).into());
    exact(W_SRC, Field::EthSrc, src);
    exact(W_DST, Field::EthDst, dst);
    exact(W_TYPE, Field::EthType, eth_type.into());
    let typed = w & W_TYPE == 0;
    let ip = typed && matches!(eth_type, key::ETH_IPV4);
    let arp = typed && eth_type == key::ETH_ARP;
    if ip || arp {
        exact(W_PROTO, Field::IpProto, proto.into());
    }
    if ip && w & W_PROTO == 0 && matches!(proto, key::TCP | key::UDP | key::SCTP | key::ICMP) {
        exact(W_TP_SRC, Field::TpSrc, tp_src.into());
        exact(W_TP_DST, Field::TpDst, tp_dst.into());
    }
    if ip && w & W_TOS == 0 {
        m = m.masked(Field::IpTos, tos.into(), 0xfc);
    }
    if ip || arp {
        for (f, v, shift) in [(Field::IpSrc, nw_src, W_NW_SRC_SHIFT), (Field::IpDst, nw_dst, W_NW_DST_SHIFT)]
        {
            let mask = prefix_mask(w >> shift & 0x3f);
            if mask != 0 {
                m = m.masked(f, v.into(), mask);
            }
        }
    }
    let (mut v, mut mask) = (0, 0);
    if w & W_VLAN == 0 {
        mask |= VID;
        v |= if vlan == VLAN_NONE { 0 } else { u128::from(vlan & VID_MASK | PRESENT) };
    }
    if w & W_PCP == 0 && !(w & W_VLAN == 0 && vlan == VLAN_NONE) {
        mask |= PCP | u128::from(PRESENT);
        v |= u128::from(pcp & 7) << 13 | u128::from(PRESENT);
    }
    if mask != 0 {
        m = m.masked(Field::Vlan, v, mask);
    }
    Ok(m)
}

/// Appends the structure. What it cannot express is left out; clients that want more ask for Nicira's matches.
pub(crate) fn put(out: &mut Vec<u8>, m: &Match) {
    let mut w = 0;
    let mut get = |wild: u32, f: Field| {
        if m.mask.get(f) == f.ones() {
            m.value.get(f)
        } else {
            w |= wild;
            0
        }
    };
    let in_port = get(W_IN_PORT, Field::InPort) as u32;
    let (src, dst) = (get(W_SRC, Field::EthSrc), get(W_DST, Field::EthDst));
    let eth_type = get(W_TYPE, Field::EthType) as u16;
    let proto = get(W_PROTO, Field::IpProto) as u8;
    let (tp_src, tp_dst) = (get(W_TP_SRC, Field::TpSrc) as u16, get(W_TP_DST, Field::TpDst) as u16);
    let (vlan, mask) = (m.value.get(Field::Vlan), m.mask.get(Field::Vlan));
    let dl_vlan = match mask & VID {
        VID if vlan & u128::from(PRESENT) == 0 => VLAN_NONE,
        VID => vlan as u16 & VID_MASK,
        _ => {
            w |= W_VLAN;
            0
        }
    };
    if mask & PCP != PCP {
        w |= W_PCP;
    }
    if m.mask.get(Field::IpTos) & 0xfc != 0xfc {
        w |= W_TOS;
    }
    for (f, shift) in [(Field::IpSrc, W_NW_SRC_SHIFT), (Field::IpDst, W_NW_DST_SHIFT)] {
        w |= (m.mask.get(f) as u32).trailing_zeros() << shift;
    }
    out.put32(w);
    out.put16(port_to_16(in_port));
    out.put_number(src, 6);
    out.put_number(dst, 6);
    out.put16(dl_vlan);
    out.put8((vlan >> 13 & 7) as u8);
    out.put8(0);
    out.put16(eth_type);
    out.put8(m.value.get(Field::IpTos) as u8 & 0xfc);
    out.put8(proto);
    out.put16(0);
    out.put32(m.value.get(Field::IpSrc) as u32);
    out.put32(m.value.get(Field::IpDst) as u32);
    out.put16(tp_src);
    out.put16(tp_dst);
}

//! Rules as text, for people.

use std::fmt;

use super::{Action, Instructions, Location, Match};
use crate::address::MacAddr;
use crate::packet::key::{ALL_FIELDS, Field, FlowKey};
use crate::packet::vlan::PRESENT;

/// Writes a list with commas, or `none` if it is empty.
fn list<T: fmt::Display>(
    f: &mut fmt::Formatter<'_>,
    items: impl Iterator<Item = T>,
    none: &str,
) -> fmt::Result {
    let mut empty = true;
    for i in items {
        if !std::mem::take(&mut empty) {
            f.write_str(",")?;
        }
        write!(f, "{i}")?;
    }
    if empty { f.write_str(none) } else { Ok(()) }
}

/// A field's value, as people write it.
struct Value(Field, u128);

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Value(field, v) = *self;
        match field {
            Field::EthSrc | Field::EthDst | Field::ArpSha | Field::ArpTha => {
                write!(f, "{}", MacAddr::from_u64(v as u64))
            }
            Field::IpSrc | Field::IpDst if v <= u32::MAX.into() => {
                write!(f, "{}", std::net::Ipv4Addr::from(v as u32))
            }
            Field::IpSrc | Field::IpDst | Field::NdTarget => write!(f, "{}", std::net::Ipv6Addr::from(v)),
            Field::InPort | Field::IpProto | Field::TpSrc | Field::TpDst | Field::IpTtl => write!(f, "{v}"),
            _ => write!(f, "{v:#x}"),
        }
    }
}

/// A field's value where only the bits of the mask count.
struct Masked(Field, u128, u128);

impl fmt::Display for Masked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Masked(field, v, mask) = *self;
        write!(f, "{}=", field.name())?;
        let vlan_mask = u128::from(PRESENT) | 0xfff;
        if matches!(field, Field::Vlan | Field::InnerVlan) && mask == vlan_mask {
            return write!(f, "{}", v & 0xfff);
        }
        write!(f, "{}", Value(field, v))?;
        if mask == field.ones() { Ok(()) } else { write!(f, "/{mask:#x}") }
    }
}

/// The fields of a key of which the mask has bits.
pub(crate) struct Fields<'a>(pub &'a FlowKey, pub &'a FlowKey);

impl fmt::Display for Fields<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Fields(value, mask) = *self;
        let fields = ALL_FIELDS.iter().filter(|f| mask.get(**f) != 0);
        list(f, fields.map(|f| Masked(*f, value.get(*f) & mask.get(*f), mask.get(*f))), "any")
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Fields(&self.value, &self.mask).fmt(f)
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}..{}]", self.field.name(), self.offset, self.offset + self.bits)
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Output(p) => write!(f, "output:{p}"),
            Action::OutputField(l) => write!(f, "output:{l}"),
            Action::InPort => f.write_str("in_port"),
            Action::All => f.write_str("all"),
            Action::Flood => f.write_str("flood"),
            Action::Normal => f.write_str("normal"),
            Action::Controller { .. } => f.write_str("controller"),
            Action::PushVlan(tpid) => write!(f, "push_vlan:{tpid:#x}"),
            Action::PopVlan => f.write_str("pop_vlan"),
            Action::SetField { field, value, mask } => write!(f, "set({})", Masked(*field, *value, *mask)),
            Action::Move { from, to } => write!(f, "move({from}->{to})"),
            Action::DecTtl => f.write_str("dec_ttl"),
            Action::Group(g) => write!(f, "group:{g}"),
            Action::Meter(m) => write!(f, "meter:{m}"),
            Action::Resubmit { table, in_port } => {
                f.write_str("resubmit(")?;
                in_port.map_or(Ok(()), |p| write!(f, "in_port={p},"))?;
                match table {
                    Some(t) => write!(f, "table={t})"),
                    None => f.write_str("this table)"),
                }
            }
            Action::Conntrack(c) => {
                let commit = if c.commit { ",commit" } else { "" };
                write!(f, "ct(zone={}{commit}", c.zone)?;
                c.table.map_or(Ok(()), |t| write!(f, ",table={t}"))?;
                f.write_str(")")
            }
            Action::Learn(l) => write!(f, "learn(table={},priority={})", l.base.table, l.base.priority),
        }
    }
}

impl fmt::Display for Instructions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts: Vec<String> = self.meter.iter().map(|m| format!("meter:{m}")).collect();
        parts.extend(self.apply.iter().map(ToString::to_string));
        parts.extend(self.clear.then(|| "clear_actions".into()));
        parts.extend(self.write.iter().map(|a| format!("write({a})")));
        parts.extend(self.metadata.map(|(v, m)| format!("set(metadata={v:#x}/{m:#x})")));
        parts.extend(self.goto.map(|t| format!("goto:{t}")));
        list(f, parts.iter(), "drop")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::key::ETH_IPV4;

    #[test]
    fn rules_read_as_people_write_them() {
        let m = Match::default()
            .field(Field::InPort, 3)
            .masked(Field::Vlan, 0x1005, 0x1fff)
            .field(Field::EthType, ETH_IPV4.into())
            .masked(Field::IpSrc, 0x0a00_0000, 0xff00_0000);
        assert_eq!(m.to_string(), "in_port=3,vlan=5,eth_type=0x800,ip_src=10.0.0.0/0xff000000");
        assert_eq!(Match::default().to_string(), "any");
        let i = Instructions {
            goto: Some(2),
            ..Instructions::apply(vec![
                Action::SetField { field: Field::EthDst, value: 5, mask: Field::EthDst.ones() },
                Action::Output(4),
            ])
        };
        assert_eq!(i.to_string(), "set(eth_dst=00:00:00:00:00:05),output:4,goto:2");
        assert_eq!(Instructions::default().to_string(), "drop");
    }
}

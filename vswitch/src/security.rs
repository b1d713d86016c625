//! Security groups: stateful rules that ports refer to by name.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::address::IpPrefix;
use crate::packet::key::{ETH_IPV4, ETH_IPV6, Field, FlowKey, ICMP, ICMPV6, TCP, UDP};

/// Which way a rule's packets flow, seen from the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Towards the port's owner.
    Ingress,
    /// From the port's owner.
    Egress,
}

/// Protocol of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP for IPv4, ICMPv6 for IPv6.
    Icmp,
    /// An IP protocol by number.
    Number(u8),
}

impl Protocol {
    pub(crate) fn number(self, ipv6: bool) -> u8 {
        match self {
            Protocol::Tcp => TCP,
            Protocol::Udp => UDP,
            Protocol::Icmp if ipv6 => ICMPV6,
            Protocol::Icmp => ICMP,
            Protocol::Number(n) => n,
        }
    }
}

/// The other side of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Remote {
    /// Addresses.
    Network(IpPrefix),
    /// The bound addresses of all ports in a group.
    Group(String),
}

/// Permits new connections; what belongs to a connection is always permitted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SecurityRule {
    /// Direction.
    pub direction: Direction,
    /// Protocol; absent: any.
    #[serde(default)]
    pub protocol: Option<Protocol>,
    /// First and last destination port (for ICMP: the type); absent: any.
    #[serde(default)]
    pub ports: Option<(u16, u16)>,
    /// The other side; absent: any.
    #[serde(default)]
    pub remote: Option<Remote>,
}

/// A named set of rules.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SecurityGroup {
    /// The rules.
    #[serde(default)]
    pub rules: Vec<SecurityRule>,
}

/// All groups of a switch, with the addresses of their members.
#[derive(Clone, Debug, Default)]
pub(crate) struct SecurityGroups {
    pub groups: BTreeMap<String, SecurityGroup>,
    /// Those of ports that other hosts' switches have included.
    pub members: BTreeMap<String, Vec<IpPrefix>>,
    /// Those of such ports alone.
    pub elsewhere: BTreeMap<String, Vec<IpPrefix>>,
}

impl SecurityGroups {
    /// Whether the groups called `names` permit a new connection. The caller has marked the fields that connection
    /// tracking looks at, which are all that is looked at here.
    pub fn permit(&self, names: &[String], direction: Direction, key: &FlowKey) -> bool {
        names
            .iter()
            .filter_map(|n| self.groups.get(n))
            .flat_map(|g| &g.rules)
            .any(|r| r.direction == direction && self.rule_matches(r, key))
    }

    fn rule_matches(&self, r: &SecurityRule, key: &FlowKey) -> bool {
        let ipv6 = match key.get64(Field::EthType) as u16 {
            ETH_IPV4 => false,
            ETH_IPV6 => true,
            _ => return false,
        };
        let proto = key.get64(Field::IpProto) as u8;
        if r.protocol.is_some_and(|p| p.number(ipv6) != proto) {
            return false;
        }
        let port = key.get64(if matches!(proto, ICMP | ICMPV6) { Field::TpSrc } else { Field::TpDst }) as u16;
        if r.ports.is_some_and(|(a, b)| !(a..=b).contains(&port)) {
            return false;
        }
        let other = key.get(if r.direction == Direction::Ingress { Field::IpSrc } else { Field::IpDst });
        let holds = |n: &IpPrefix| n.is_ipv6() == ipv6 && n.contains(other);
        match &r.remote {
            None => true,
            Some(Remote::Network(n)) => holds(n),
            Some(Remote::Group(g)) => self.members.get(g).is_some_and(|m| m.iter().any(holds)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_match_protocol_port_and_peer() {
        let json = r#"{"rules":[
            {"direction":"ingress","protocol":"tcp","ports":[80,90],"remote":{"network":"10.0.0.0/8"}},
            {"direction":"ingress","protocol":"icmp","remote":{"group":"web"}}]}"#;
        let mut s = SecurityGroups::default();
        s.groups.insert("web".into(), serde_json::from_str(json).unwrap());
        s.members.insert("web".into(), vec!["192.168.0.1".parse().unwrap()]);
        let key = |src: u128, proto: u8, port: u16| {
            FlowKey::default()
                .with(Field::EthType, ETH_IPV4.into())
                .with(Field::IpProto, proto.into())
                .with(Field::IpSrc, src)
                .with(Field::TpDst, port.into())
        };
        let names = ["web".to_string()];
        let ok = |k: &FlowKey| s.permit(&names, Direction::Ingress, k);
        assert!(ok(&key(0x0a00_0001, TCP, 85)));
        assert!(!ok(&key(0x0a00_0001, TCP, 91)));
        assert!(!ok(&key(0x0b00_0001, TCP, 85)));
        assert!(ok(&key(0xc0a8_0001, ICMP, 0)));
        assert!(!s.permit(&names, Direction::Egress, &key(0x0a00_0001, TCP, 85)));
    }
}

//! Rules of the flow pipeline in the configuration.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::address::{IpPrefix, MacAddr};
use crate::error::{Error, Result};
use crate::packet::key::{ETH_IPV4, ETH_IPV6, Field};
use crate::packet::vlan::{PRESENT, TPID_C};
use crate::pipeline::{Action, FlowSpec, Instructions, Match, TABLES};
use crate::port::PortId;
use crate::port_config::VLAN_MAX;
use crate::security::Protocol;

/// Most bytes of a frame that are given to controllers.
const CONTROLLER_BYTES: u16 = u16::MAX;
/// OpenFlow's reason for a packet that an action gives to controllers.
const BY_ACTION: u8 = 1;

/// One rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FlowConfig {
    /// Table.
    #[serde(default)]
    pub table: u8,
    /// Priority; the highest that matches wins. A new switch has one rule: table 0, priority 0, everything, normal.
    #[serde(default)]
    pub priority: u16,
    /// A number of the user's own.
    #[serde(default)]
    pub cookie: u64,
    /// What it matches; absent: everything.
    #[serde(default, rename = "match")]
    pub matches: MatchConfig,
    /// What it does, in order; none: drop.
    #[serde(default)]
    pub actions: Vec<ActionConfig>,
    /// A later table in which the packet goes on.
    #[serde(default)]
    pub goto: Option<u8>,
}

/// What a rule matches; fields that are absent may have any value.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MatchConfig {
    /// Name of the port that the packet comes in by.
    pub in_port: Option<String>,
    /// VLAN of the outer tag; zero: no tag.
    pub vlan: Option<u16>,
    /// Source MAC address.
    pub eth_src: Option<MacAddr>,
    /// Destination MAC address.
    pub eth_dst: Option<MacAddr>,
    /// EtherType; those of IPv4 and IPv6 follow from addresses.
    pub eth_type: Option<u16>,
    /// Source address or network.
    pub ip_src: Option<IpPrefix>,
    /// Destination address or network.
    pub ip_dst: Option<IpPrefix>,
    /// IP protocol; needs `eth_type` or an address.
    pub protocol: Option<Protocol>,
    /// Differentiated services code point.
    pub dscp: Option<u8>,
    /// Source port of TCP, UDP, SCTP; type of ICMP. Needs `protocol`.
    pub src_port: Option<u16>,
    /// Destination port of TCP, UDP, SCTP; code of ICMP. Needs `protocol`.
    pub dst_port: Option<u16>,
}

/// One step of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ActionConfig {
    /// Switch as a learning bridge does.
    Normal,
    /// Flood within the VLAN, without learning.
    Flood,
    /// Send back out of the port it came in by.
    InPort,
    /// Send out of the port with this name.
    Output(String),
    /// Give to OpenFlow controllers.
    Controller,
    /// Add a tag with this VLAN.
    PushVlan(u16),
    /// Remove the outer tag.
    PopVlan,
    /// Set the VLAN of the outer tag; a frame without one gets one.
    SetVlan(u16),
    /// Set the source MAC address.
    SetEthSrc(MacAddr),
    /// Set the destination MAC address.
    SetEthDst(MacAddr),
    /// Set the differentiated services code point.
    SetDscp(u8),
    /// Decrement the time to live.
    DecTtl,
    /// Look the packet up in another table and come back.
    Resubmit(u8),
}

/// Numbers of the ports by their names.
pub(crate) type PortNumbers = BTreeMap<String, PortId>;

impl FlowConfig {
    /// The ports that the rule names.
    pub(super) fn ports(&self) -> impl Iterator<Item = &String> {
        let outputs = self.actions.iter().filter_map(|a| match a {
            ActionConfig::Output(p) => Some(p),
            _ => None,
        });
        self.matches.in_port.iter().chain(outputs)
    }

    /// The rule for ports with these numbers; `path` names the rule in errors.
    pub(crate) fn resolve(&self, path: &str, ports: &PortNumbers) -> Result<FlowSpec> {
        if self.goto.is_some_and(|g| g <= self.table) {
            return Err(Error::config(format!("{path}.goto"), "a rule can go to later tables only"));
        }
        below(format!("{path}.table"), self.table.into(), TABLES.into())?;
        let mut apply = Vec::new();
        for (i, a) in self.actions.iter().enumerate() {
            a.resolve(&format!("{path}.actions[{i}]"), ports, &mut apply)?;
        }
        Ok(FlowSpec {
            table: self.table,
            priority: self.priority,
            matches: self.matches.resolve(&format!("{path}.match"), ports)?,
            instructions: Instructions { apply, goto: self.goto, ..Instructions::default() },
            cookie: self.cookie,
            ..FlowSpec::default()
        })
    }
}

fn port(path: impl Into<String>, name: &str, ports: &PortNumbers) -> Result<PortId> {
    ports.get(name).copied().ok_or_else(|| Error::config(path, format!("there is no port \"{name}\"")))
}

/// A value below `end`, or an error.
fn below(path: impl Into<String>, value: u16, end: u16) -> Result<u128> {
    let ok = value < end;
    ok.then_some(value.into())
        .ok_or_else(|| Error::config(path, format!("{value} is too large; use less than {end}")))
}

impl MatchConfig {
    fn resolve(&self, path: &str, ports: &PortNumbers) -> Result<Match> {
        let mut m = Match::default();
        if let Some(p) = &self.in_port {
            m = m.field(Field::InPort, port(format!("{path}.in_port"), p, ports)?.into());
        }
        if let Some(v) = self.vlan {
            let vlan = below(format!("{path}.vlan"), v, VLAN_MAX + 1)?;
            let tag = if v == 0 { 0 } else { vlan | u128::from(PRESENT) };
            m = m.masked(Field::Vlan, tag, u128::from(PRESENT) | 0xfff);
        }
        for (field, mac) in [(Field::EthSrc, self.eth_src), (Field::EthDst, self.eth_dst)] {
            if let Some(mac) = mac {
                m = m.field(field, mac.to_u64().into());
            }
        }
        let mut eth_type = self.eth_type;
        for (name, field, prefix) in
            [("ip_src", Field::IpSrc, self.ip_src), ("ip_dst", Field::IpDst, self.ip_dst)]
        {
            let Some(p) = prefix else { continue };
            let family = if p.is_ipv6() { ETH_IPV6 } else { ETH_IPV4 };
            if *eth_type.get_or_insert(family) != family {
                return Err(Error::config(format!("{path}.{name}"), "the address is of another EtherType"));
            }
            m = m.masked(field, p.value(), p.mask());
        }
        if let Some(t) = eth_type {
            m = m.field(Field::EthType, t.into());
        }
        let is_ip = matches!(eth_type, Some(ETH_IPV4 | ETH_IPV6));
        if (self.protocol.is_some() || self.dscp.is_some()) && !is_ip {
            let reason = "protocol and dscp need an address or the eth_type of IPv4 or IPv6";
            return Err(Error::config(path, reason));
        }
        if let Some(p) = self.protocol {
            m = m.field(Field::IpProto, p.number(eth_type == Some(ETH_IPV6)).into());
        }
        if let Some(d) = self.dscp {
            m = m.masked(Field::IpTos, below(format!("{path}.dscp"), d.into(), 64)? << 2, 0xfc);
        }
        for (field, port) in [(Field::TpSrc, self.src_port), (Field::TpDst, self.dst_port)] {
            let Some(port) = port else { continue };
            if self.protocol.is_none() {
                return Err(Error::config(path, "src_port and dst_port need a protocol"));
            }
            m = m.field(field, port.into());
        }
        Ok(m)
    }
}

impl ActionConfig {
    fn resolve(&self, path: &str, ports: &PortNumbers, out: &mut Vec<Action>) -> Result<()> {
        let set = |field: Field, value: u128, mask: u128| Action::SetField { field, value, mask };
        let vlan = |v: u16| below(path, v, VLAN_MAX + 1).map(|v| set(Field::Vlan, v, 0xfff));
        let action = match self {
            ActionConfig::Normal => Action::Normal,
            ActionConfig::Flood => Action::Flood,
            ActionConfig::InPort => Action::InPort,
            ActionConfig::Output(p) => Action::Output(port(path, p, ports)?),
            ActionConfig::Controller => Action::Controller { max_len: CONTROLLER_BYTES, reason: BY_ACTION },
            ActionConfig::PushVlan(v) => {
                out.push(Action::PushVlan(TPID_C));
                vlan(*v)?
            }
            ActionConfig::PopVlan => Action::PopVlan,
            ActionConfig::SetVlan(v) => vlan(*v)?,
            ActionConfig::SetEthSrc(m) => set(Field::EthSrc, m.to_u64().into(), Field::EthSrc.ones()),
            ActionConfig::SetEthDst(m) => set(Field::EthDst, m.to_u64().into(), Field::EthDst.ones()),
            ActionConfig::SetDscp(d) => set(Field::IpTos, below(path, (*d).into(), 64)? << 2, 0xfc),
            ActionConfig::DecTtl => Action::DecTtl,
            ActionConfig::Resubmit(t) => Action::Resubmit { table: Some(*t), in_port: None },
        };
        out.push(action);
        Ok(())
    }
}

//! What is configured on a port, apart from its kind.

use std::collections::BTreeMap;
use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::address::{IpPrefix, MacAddr};
use crate::pipeline::MeterConfig;
use crate::shaper::ShaperConfig;

/// Largest VLAN identifier.
pub const VLAN_MAX: u16 = 4094;

/// A set of VLANs, written as text: `"1-99,200"`.
#[derive(Clone, PartialEq, Eq)]
pub struct VlanSet(Box<[u64; 64]>);

impl VlanSet {
    /// No VLAN.
    pub fn none() -> Self {
        Self(Box::new([0; 64]))
    }

    /// Every VLAN.
    pub fn all() -> Self {
        Self(Box::new([u64::MAX; 64]))
    }

    /// Whether the set holds `vlan`.
    #[inline]
    pub fn contains(&self, vlan: u16) -> bool {
        self.0[usize::from(vlan >> 6) & 63] >> (vlan & 63) & 1 != 0
    }

    /// Adds one VLAN.
    pub fn insert(&mut self, vlan: u16) {
        self.0[usize::from(vlan >> 6) & 63] |= 1 << (vlan & 63);
    }

    /// The VLANs that are in both sets.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        let mut both = self.clone();
        both.0.iter_mut().zip(other.0.iter()).for_each(|(a, b)| *a &= b);
        both
    }

    /// Reads `"1-99,200"`; `"all"` and the empty text are allowed.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self::all());
        }
        let number = |s: &str| match s.trim().parse::<u16>() {
            Ok(v) if v <= VLAN_MAX => Ok(v),
            _ => Err(format!("\"{s}\" is not a VLAN; use 0 to {VLAN_MAX}")),
        };
        let mut set = Self::none();
        for part in text.split(',').filter(|p| !p.trim().is_empty()) {
            let (a, b) = part.split_once('-').unwrap_or((part, part));
            let (a, b) = (number(a)?, number(b)?);
            if a > b {
                return Err(format!("\"{part}\" is an empty range"));
            }
            (a..=b).for_each(|v| set.insert(v));
        }
        Ok(set)
    }
}

impl fmt::Display for VlanSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::all() {
            return f.write_str("all");
        }
        let mut first = true;
        let mut v = 0;
        while v <= VLAN_MAX {
            if !self.contains(v) {
                v += 1;
                continue;
            }
            let start = v;
            while v <= VLAN_MAX && self.contains(v) {
                v += 1;
            }
            let comma = if std::mem::take(&mut first) { "" } else { "," };
            if start == v - 1 { write!(f, "{comma}{start}")? } else { write!(f, "{comma}{start}-{}", v - 1)? }
        }
        Ok(())
    }
}

impl fmt::Debug for VlanSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VlanSet({self})")
    }
}

impl Serialize for VlanSet {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for VlanSet {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(d)?).map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for VlanSet {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "VlanSet".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "description": "VLANs as numbers and ranges, for example \"1-99,200\"; \"all\" for every VLAN",
            "pattern": "^(all|[0-9, -]*)$"
        })
    }
}

/// How a port treats VLAN tags. VLAN 0 stands for "untagged" throughout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum VlanMode {
    /// Untagged frames belong to this VLAN; frames of no other VLAN pass.
    Access(u16),
    /// Tagged frames of the allowed VLANs pass; untagged ones belong to the native VLAN.
    Trunk {
        /// VLAN of untagged frames.
        #[serde(default)]
        native: u16,
        /// VLANs that pass.
        #[serde(default = "VlanSet::all")]
        allowed: VlanSet,
    },
    /// Whatever tags a frame has, it is carried in this service VLAN (802.1ad).
    Tunnel(u16),
}

impl Default for VlanMode {
    fn default() -> Self {
        Self::Trunk { native: 0, allowed: VlanSet::all() }
    }
}

impl VlanMode {
    /// The VLAN of frames without a tag that names one.
    pub fn native(&self) -> u16 {
        match self {
            VlanMode::Access(v) | VlanMode::Tunnel(v) | VlanMode::Trunk { native: v, .. } => *v,
        }
    }

    /// Whether the port carries frames of `vlan`.
    #[inline]
    pub fn carries(&self, vlan: u16) -> bool {
        match self {
            VlanMode::Access(v) | VlanMode::Tunnel(v) => *v == vlan,
            VlanMode::Trunk { native, allowed } => *native == vlan || allowed.contains(vlan),
        }
    }
}

/// The addresses that belong to a port's owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Binding {
    /// MAC address.
    pub mac: MacAddr,
    /// IP addresses and networks.
    #[serde(default)]
    pub ips: Vec<IpPrefix>,
}

/// Packets a second above which a port's frames of one kind are dropped. Absent: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct StormControl {
    /// Broadcast, ARP excluded.
    pub broadcast: Option<u64>,
    /// Multicast.
    pub multicast: Option<u64>,
    /// Unicast to an unknown address.
    pub unknown_unicast: Option<u64>,
    /// ARP.
    pub arp: Option<u64>,
}

/// What is written into frames that come in by a port. Absent: what they carry stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Marking {
    /// Differentiated services code point of IP packets.
    pub dscp: Option<u8>,
    /// Priority (802.1Q) of frames with a tag, and of the tag that frames without get where they leave tagged.
    pub pcp: Option<u8>,
}

/// Configuration of one port; the defaults are those of a plain learning switch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PortConfig {
    /// Treatment of VLAN tags.
    pub vlan: VlanMode,
    /// Name of the VLAN pool, in the switch's configuration, that the port's VLANs are of. A trunk that allows every
    /// VLAN allows those of the pool.
    pub vlan_pool: Option<String>,
    /// Most addresses learned on the port; zero: no limit.
    pub mac_limit: usize,
    /// Largest frame sent out of the port, without Ethernet header and tag; absent: no limit.
    pub mtu: Option<u16>,
    /// Isolated ports reach only ports that are not isolated.
    pub isolated: bool,
    /// Addresses of the port's owner, for the guards below and for security groups.
    pub bindings: Vec<Binding>,
    /// Frames come in only from a bound MAC address.
    pub anti_spoof: bool,
    /// IP packets, ARP and neighbour discovery come in only with bound addresses (IP source guard, dynamic ARP
    /// inspection). The unspecified address passes, as DHCP and duplicate address detection need it.
    pub source_guard: bool,
    /// The port's owner may not act as a DHCP server, DHCPv6 server or IPv6 router.
    pub dhcp_guard: bool,
    /// Limits of frames that are copied to many ports.
    pub storm: StormControl,
    /// Limit of what comes in by the port.
    pub ingress: Option<MeterConfig>,
    /// Limit of what goes out of the port: frames above it are dropped.
    pub egress: Option<MeterConfig>,
    /// Shaping of what goes out of the port: frames above the rate wait.
    pub shaping: Option<ShaperConfig>,
    /// Priorities that frames get where they come in.
    pub marking: Marking,
    /// Names of security groups. With at least one, only what a rule permits passes.
    pub security_groups: Vec<String>,
}

impl PortConfig {
    /// Adds the bound addresses to those of the port's security groups.
    pub(crate) fn add_to_groups(&self, members: &mut BTreeMap<String, Vec<IpPrefix>>) {
        for g in &self.security_groups {
            let ips = self.bindings.iter().flat_map(|b| b.ips.iter().copied());
            members.entry(g.clone()).or_default().extend(ips);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vlan_sets_read_and_write_the_same_text() {
        for t in ["", "0", "1-99,200", "all", "4094", "5,7-9"] {
            assert_eq!(VlanSet::parse(t).unwrap().to_string(), t);
        }
        for t in ["5-3", "4095", "x", "1--2"] {
            assert!(VlanSet::parse(t).is_err(), "{t}");
        }
    }

    #[test]
    fn modes_in_json() {
        let m: VlanMode = serde_json::from_str(r#"{"trunk":{"native":5,"allowed":"10-20"}}"#).unwrap();
        assert!(m.carries(5) && m.carries(15) && !m.carries(21));
        let m: VlanMode = serde_json::from_str(r#"{"access":7}"#).unwrap();
        assert_eq!(m, VlanMode::Access(7));
    }
}

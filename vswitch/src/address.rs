//! MAC addresses and IP prefixes in configuration: written as text.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::packet::key::{mac_bytes, mac_u64};

/// A MAC address, written `02:00:00:00:00:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// As a number, first byte highest.
    pub fn to_u64(self) -> u64 {
        mac_u64(&self.0)
    }

    /// From a number, first byte highest.
    pub fn from_u64(mac: u64) -> Self {
        Self(mac_bytes(mac))
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddr {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let wrong = || format!("\"{s}\" is not a MAC address; write 02:00:00:00:00:01");
        let mut mac = [0; 6];
        let mut parts = s.split(':');
        for b in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(wrong)?;
            *b = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() { Err(wrong()) } else { Ok(Self(mac)) }
    }
}

/// An IPv4 or IPv6 network, written `10.0.0.0/8`; without a length it is one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IpPrefix {
    address: IpAddr,
    len: u8,
}

impl IpPrefix {
    /// Whether the network is IPv6.
    pub fn is_ipv6(&self) -> bool {
        self.address.is_ipv6()
    }

    /// The first address as the flow key holds it.
    pub fn value(&self) -> u128 {
        match self.address {
            IpAddr::V4(a) => u32::from(a).into(),
            IpAddr::V6(a) => a.into(),
        }
    }

    /// The bits of the address that count, as the flow key holds it.
    pub fn mask(&self) -> u128 {
        let all = if self.is_ipv6() { u128::MAX } else { u32::MAX.into() };
        all & !all.checked_shr(u32::from(self.len)).unwrap_or(0)
    }

    /// Whether the network holds an address given as the flow key holds it.
    pub fn contains(&self, ip: u128) -> bool {
        ip & self.mask() == self.value() & self.mask()
    }
}

impl fmt::Display for IpPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.len)
    }
}

impl FromStr for IpPrefix {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let wrong = || format!("\"{s}\" is not a network; write 10.0.0.0/8 or 2001:db8::/32");
        let (address, len) = s.split_once('/').map_or((s, None), |(a, l)| (a, Some(l)));
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let max = if address.is_ipv6() { 128 } else { 32 };
        let len = len.map_or(Ok(max), |l| l.parse::<u8>().map_err(|_| wrong()))?;
        if len > max { Err(wrong()) } else { Ok(Self { address, len }) }
    }
}

impl From<Ipv4Addr> for IpPrefix {
    fn from(a: Ipv4Addr) -> Self {
        Self { address: a.into(), len: 32 }
    }
}

impl From<Ipv6Addr> for IpPrefix {
    fn from(a: Ipv6Addr) -> Self {
        Self { address: a.into(), len: 128 }
    }
}

macro_rules! as_text {
    ($t:ident, $pattern:literal, $what:literal) => {
        impl Serialize for $t {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $t {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
            }
        }

        impl JsonSchema for $t {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($t).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": "string", "description": $what, "pattern": $pattern })
            }
        }
    };
}

as_text!(MacAddr, "^([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}$", "A MAC address, as 02:00:00:00:00:01");
as_text!(IpPrefix, "^[0-9a-fA-F.:]+(/[0-9]+)?$", "A network or an address, as 10.0.0.0/8 or 2001:db8::1");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_goes_both_ways() {
        for t in ["10.0.0.0/8", "0.0.0.0/0", "2001:db8::/32", "::/0", "::1/128", "1.2.3.4/32"] {
            assert_eq!(t.parse::<IpPrefix>().unwrap().to_string(), t);
        }
        for t in ["10.0.0.0/33", "x", "1.2.3.4/", "::/129"] {
            assert!(t.parse::<IpPrefix>().is_err(), "{t}");
        }
        assert_eq!("02:00:0a:00:00:ff".parse::<MacAddr>().unwrap().to_string(), "02:00:0a:00:00:ff");
        assert!("02:00:0a:00:00".parse::<MacAddr>().is_err());
    }

    #[test]
    fn prefixes_hold_their_addresses() {
        let p: IpPrefix = "10.1.0.0/16".parse().unwrap();
        assert!(p.contains(0x0a01_ffff) && !p.contains(0x0a02_0000));
        assert_eq!(p.mask(), 0xffff_0000);
        assert_eq!("0.0.0.0/0".parse::<IpPrefix>().unwrap().mask(), 0);
        assert_eq!("::/0".parse::<IpPrefix>().unwrap().mask(), 0);
        assert_eq!("::1".parse::<IpPrefix>().unwrap().mask(), u128::MAX);
    }
}

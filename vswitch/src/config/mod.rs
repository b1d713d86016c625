//! The declarative configuration: what a switch should be, as one JSON document. Applying it changes only what
//! differs from what is there, or nothing at all when any part of it is wrong.

mod apply;
mod flow;
mod hosts;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub(crate) use self::apply::Applied;
pub use self::apply::PortState;
use self::flow::PortNumbers;
pub use self::flow::{ActionConfig, FlowConfig, MatchConfig};
use crate::address::MacAddr;
use crate::bond::BondMode;
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::port::{
    BondPort, CapturePort, DatagramPort, NetdevPort, PORT_MAX, PatchPanel, Port, PortId, StreamMode,
    StreamPort, VhostUserOptions, VhostUserPort,
};
use crate::port_config::{PortConfig, VLAN_MAX, VlanMode, VlanSet};
use crate::security::{Remote, SecurityGroup};
use crate::service::{GatewayConfig, GatewayPort};
use crate::telemetry::TelemetryConfig;

/// Smallest limit of a capture's file: the largest frame fits.
const CAPTURE_MIN: u64 = 128 << 10;
/// Most files of a capture.
const CAPTURE_FILES_MAX: u32 = 1000;

/// A whole switch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SwitchConfig {
    /// Seconds after which an unseen MAC address is forgotten; zero: never.
    pub mac_ageing: u64,
    /// Most tracked connections.
    pub connection_limit: usize,
    /// Named sets of VLANs that ports and port groups take theirs from.
    pub vlan_pools: BTreeMap<String, VlanSet>,
    /// Named sets of properties that ports share. A change reaches all their ports at once.
    pub port_groups: BTreeMap<String, PortConfig>,
    /// The ports by name.
    pub ports: BTreeMap<String, PortSpec>,
    /// Security groups by name.
    pub security_groups: BTreeMap<String, SecurityGroup>,
    /// Mirrors by name.
    pub mirrors: BTreeMap<String, MirrorConfig>,
    /// Addresses fixed to ports: they are neither learned elsewhere nor forgotten.
    pub static_macs: Vec<StaticMac>,
    /// Rules of the flow pipeline. Rules added in other ways are left alone.
    pub flows: Vec<FlowConfig>,
    /// What is measured and exported.
    pub telemetry: TelemetryConfig,
}

/// An address fixed to a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StaticMac {
    /// VLAN; zero where there are none.
    #[serde(default)]
    pub vlan: u16,
    /// The address.
    pub mac: MacAddr,
    /// Name of the port.
    pub port: String,
}

impl Default for SwitchConfig {
    fn default() -> Self {
        Self {
            mac_ageing: 300,
            connection_limit: 1_000_000,
            vlan_pools: BTreeMap::new(),
            port_groups: BTreeMap::new(),
            ports: BTreeMap::new(),
            security_groups: BTreeMap::new(),
            mirrors: BTreeMap::new(),
            static_macs: Vec::new(),
            flows: Vec::new(),
            telemetry: TelemetryConfig::default(),
        }
    }
}

/// One port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortSpec {
    /// What the port is.
    pub kind: PortKind,
    /// Its number; absent: the lowest free one.
    #[serde(default)]
    pub number: Option<PortId>,
    /// Port group that its properties come from.
    #[serde(default)]
    pub group: Option<String>,
    /// Its own properties, instead of a group's.
    #[serde(default)]
    pub config: Option<PortConfig>,
    /// Host whose switch has the port; absent: every host's. The others count its bound addresses as those of a member
    /// of its security groups, and leave out mirrors, fixed addresses and rules that name it.
    #[serde(default)]
    pub host: Option<String>,
}

fn bond_system() -> MacAddr {
    MacAddr([0x52, 0x54, 0x00, 0xff, 0xff, 0x02])
}

fn snap() -> u32 {
    65_535
}

fn capture_files() -> u32 {
    10
}

fn one() -> usize {
    1
}

/// Kinds of ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PortKind {
    /// vhost-user back-end.
    VhostUser {
        /// The socket.
        socket: PathBuf,
        /// Which side waits.
        #[serde(default)]
        mode: StreamMode,
        /// Pairs of queues.
        #[serde(default = "one")]
        queue_pairs: usize,
        /// Whether packed rings are offered besides split ones. Only for front-ends that support them.
        #[serde(default)]
        packed_rings: bool,
    },
    /// Unix stream with QEMU's and passt's framing.
    UnixStream {
        /// The socket.
        socket: PathBuf,
        /// Which side waits.
        #[serde(default)]
        mode: StreamMode,
    },
    /// Unix datagrams, one frame each, as of QEMU's `-netdev dgram`.
    UnixDatagram {
        /// The switch's socket.
        socket: PathBuf,
        /// The peer's socket; absent: whoever sent last.
        #[serde(default)]
        peer: Option<PathBuf>,
    },
    /// Tap interface.
    Tap {
        /// Name of the interface.
        interface: String,
        /// Queues.
        #[serde(default = "one")]
        queues: usize,
    },
    /// An existing interface.
    Uplink {
        /// Name of the interface.
        interface: String,
    },
    /// One end of a cable to another port, of this switch or of another one of the process.
    Patch {
        /// Name of the cable: two ports with the same are joined.
        cable: String,
    },
    /// Writes the frames sent to it into a pcapng file, as the target of a mirror.
    Capture {
        /// The file; one that exists is overwritten.
        file: PathBuf,
        /// Most bytes of each frame that are kept.
        #[serde(default = "snap")]
        snap: u32,
        /// Most bytes of the file; absent: no limit. A full file is renamed, with `.1` behind its name, and a new one
        /// begun.
        #[serde(default)]
        limit_bytes: Option<u64>,
        /// How many files are kept, the one being written included. With one the capture ends when it is full.
        #[serde(default = "capture_files")]
        files: u32,
    },
    /// DHCP server and gateway address.
    Gateway(GatewayConfig),
    /// Several other ports as one.
    Bond {
        /// Spreading.
        #[serde(default)]
        mode: BondMode,
        /// Names of the member ports.
        members: BTreeSet<String>,
        /// Whether members are used only as agreed with the partner by LACP.
        #[serde(default)]
        lacp: bool,
        /// Address that the bond calls itself by in LACP.
        #[serde(default = "bond_system")]
        system: MacAddr,
    },
}

impl PortKind {
    /// Opens the port; cables of patch ports are those of `panel`.
    pub fn open(&self, clock: &Clock, panel: &PatchPanel) -> Result<Arc<dyn Port>> {
        Ok(match self {
            PortKind::VhostUser { socket, mode, queue_pairs, packed_rings } => {
                Arc::new(VhostUserPort::new(&VhostUserOptions {
                    path: socket.clone(),
                    mode: *mode,
                    queue_pairs: *queue_pairs,
                    packed_rings: *packed_rings,
                })?)
            }
            PortKind::UnixStream { socket, mode } => Arc::new(StreamPort::new(socket, *mode)?),
            PortKind::UnixDatagram { socket, peer } => Arc::new(DatagramPort::new(socket, peer.as_deref())?),
            PortKind::Tap { interface, queues } => Arc::new(NetdevPort::tap(interface, *queues)?),
            PortKind::Uplink { interface } => Arc::new(NetdevPort::uplink(interface)?),
            PortKind::Bond { .. } => Arc::new(BondPort),
            PortKind::Patch { cable } => Arc::new(panel.plug(cable)?),
            PortKind::Capture { file, snap, limit_bytes, files } => {
                let limit = limit_bytes.unwrap_or(u64::MAX);
                let port = CapturePort::files(file, *snap, clock.clone(), limit, *files);
                Arc::new(port.map_err(|e| Error::io(format!("write the capture {}", file.display()), e))?)
            }
            PortKind::Gateway(g) => Arc::new(GatewayPort::new(g.clone(), clock.clone())?),
        })
    }
}

/// Copies the frames of some ports to another, which takes no other frames.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MirrorConfig {
    /// Ports whose incoming frames are copied.
    #[serde(default)]
    pub from: BTreeSet<String>,
    /// Ports whose outgoing frames are copied.
    #[serde(default)]
    pub towards: BTreeSet<String>,
    /// Port that gets the copies.
    pub to: String,
    /// VLAN whose tag the copies get (RSPAN).
    #[serde(default)]
    pub vlan: Option<u16>,
}

impl SwitchConfig {
    /// Reads and checks a document. The error names the wrong field.
    pub fn parse(json: &str) -> Result<Self> {
        let mut d = serde_json::Deserializer::from_str(json);
        let config: Self = serde_path_to_error::deserialize(&mut d)
            .map_err(|e| Error::config(e.path().to_string(), e.inner().to_string()))?;
        d.end().map_err(|e| Error::config(".", e.to_string()))?;
        config.check()?;
        Ok(config)
    }

    /// The schema of the document.
    pub fn schema() -> serde_json::Value {
        schemars::schema_for!(SwitchConfig).to_value()
    }

    /// Checks everything that can be checked without opening a port.
    pub fn check(&self) -> Result<()> {
        for (name, c) in &self.port_groups {
            self.check_port_config(&format!("port_groups.{name}"), c)?;
        }
        let mut numbers = BTreeSet::new();
        for (name, p) in &self.ports {
            let path = format!("ports.{name}");
            if let Some(n) = p.number
                && (!(1..=PORT_MAX).contains(&n) || !numbers.insert(n))
            {
                let reason = format!("{n} is not within 1 to {PORT_MAX}, or another port has it");
                return Err(Error::config(format!("{path}.number"), reason));
            }
            match (&p.group, &p.config) {
                (Some(_), Some(_)) => {
                    return Err(Error::config(
                        format!("{path}.config"),
                        "a port of a group has no properties of its own",
                    ));
                }
                (Some(g), None) if !self.port_groups.contains_key(g) => {
                    return Err(Error::config(
                        format!("{path}.group"),
                        format!("there is no port group \"{g}\""),
                    ));
                }
                (None, Some(c)) => self.check_port_config(&format!("{path}.config"), c)?,
                _ => {}
            }
            if let PortKind::Bond { members, .. } = &p.kind {
                self.check_members(name, &format!("{path}.kind.bond.members"), members)?;
                if self.port_config(p).shaping.is_some() {
                    return Err(Error::config(path, SHAPED_BOND));
                }
            }
            if let PortKind::Capture { limit_bytes, files, .. } = &p.kind {
                let wrong =
                    |field: &str, reason| Err(Error::config(format!("{path}.kind.capture.{field}"), reason));
                if limit_bytes.is_some_and(|l| l < CAPTURE_MIN) {
                    return wrong("limit_bytes", format!("use {CAPTURE_MIN} or more"));
                }
                if !(1..=CAPTURE_FILES_MAX).contains(files) {
                    return wrong("files", format!("use 1 to {CAPTURE_FILES_MAX}"));
                }
            }
            if let PortKind::Gateway(g) = &p.kind {
                g.check(&format!("{path}.kind.gateway."))?;
            }
        }
        for (name, g) in &self.security_groups {
            for (i, r) in g.rules.iter().enumerate() {
                let path = format!("security_groups.{name}.rules[{i}]");
                if r.ports.is_some_and(|(a, b)| a > b) {
                    return Err(Error::config(format!("{path}.ports"), "the first port is above the last"));
                }
                if let Some(Remote::Group(g)) = &r.remote
                    && !self.security_groups.contains_key(g)
                {
                    return Err(Error::config(
                        format!("{path}.remote"),
                        format!("there is no security group \"{g}\""),
                    ));
                }
            }
        }
        for (i, m) in self.static_macs.iter().enumerate() {
            let path = format!("static_macs[{i}]");
            check_vlan(&format!("{path}.vlan"), m.vlan)?;
            if m.mac.0[0] & 1 != 0 {
                return Err(Error::config(format!("{path}.mac"), "this is a group address"));
            }
            if !self.ports.contains_key(&m.port) {
                return Err(Error::config(
                    format!("{path}.port"),
                    format!("there is no port \"{}\"", m.port),
                ));
            }
            if self.static_macs[..i].iter().any(|o| (o.vlan, o.mac) == (m.vlan, m.mac)) {
                return Err(Error::config(format!("{path}.mac"), "the address is fixed already"));
            }
        }
        // Any numbers will do here, so long as they differ.
        let names: PortNumbers = self.ports.keys().cloned().zip(1..).collect();
        let mut rules = HashSet::new();
        for (i, f) in self.flows.iter().enumerate() {
            let rule = f.resolve(&format!("flows[{i}]"), &names)?;
            if !rules.insert((rule.table, rule.priority, rule.matches)) {
                let reason = "another rule has the same table, priority and match";
                return Err(Error::config(format!("flows[{i}].match"), reason));
            }
        }
        self.telemetry.check("telemetry")?;
        self.check_mirrors()
    }

    fn check_members(&self, bond: &str, path: &str, members: &BTreeSet<String>) -> Result<()> {
        for m in members {
            match self.ports.get(m).map(|p| &p.kind) {
                None => return Err(Error::config(path, format!("there is no port \"{m}\""))),
                Some(PortKind::Bond { .. }) => return Err(Error::config(path, "a bond cannot be a member")),
                Some(_) => {}
            }
            if let (Some(a), Some(b)) = (&self.ports[bond].host, &self.ports[m].host)
                && a != b
            {
                return Err(Error::config(path, format!("port \"{m}\" is on host \"{b}\"")));
            }
            let holds =
                |p: &PortSpec| matches!(&p.kind, PortKind::Bond { members, .. } if members.contains(m));
            if self.ports.iter().any(|(other, p)| other != bond && holds(p)) {
                return Err(Error::config(path, format!("port \"{m}\" is in another bond")));
            }
        }
        if members.is_empty() { Err(Error::config(path, "a bond needs members")) } else { Ok(()) }
    }

    fn check_mirrors(&self) -> Result<()> {
        for (name, m) in &self.mirrors {
            let path = format!("mirrors.{name}");
            let known = |field: &str, port: &String| {
                let reason = format!("there is no port \"{port}\"");
                self.ports.get(port).map(drop).ok_or_else(|| Error::config(format!("{path}.{field}"), reason))
            };
            m.from.iter().try_for_each(|p| known("from", p))?;
            m.towards.iter().try_for_each(|p| known("towards", p))?;
            known("to", &m.to)?;
            if m.from.contains(&m.to) || m.towards.contains(&m.to) {
                return Err(Error::config(format!("{path}.to"), "a port cannot be mirrored to itself"));
            }
            check_vlan(&format!("{path}.vlan"), m.vlan.unwrap_or(0))?;
        }
        Ok(())
    }

    /// Checks that the VLANs of a port are of its pool.
    fn check_pool(&self, path: &str, c: &PortConfig) -> Result<()> {
        let Some(name) = &c.vlan_pool else { return Ok(()) };
        let Some(pool) = self.vlan_pools.get(name) else {
            return Err(Error::config(
                format!("{path}.vlan_pool"),
                format!("there is no VLAN pool \"{name}\""),
            ));
        };
        let native = c.vlan.native();
        // A trunk without native VLAN has zero.
        let tagged_only = matches!(c.vlan, VlanMode::Trunk { native: 0, .. });
        if !tagged_only && !pool.contains(native) {
            let reason = format!("VLAN {native} is not in the pool \"{name}\" ({pool})");
            return Err(Error::config(format!("{path}.vlan"), reason));
        }
        if let VlanMode::Trunk { allowed, .. } = &c.vlan
            && *allowed != VlanSet::all()
            && allowed.intersection(pool) != *allowed
        {
            let reason = format!("not all of {allowed} are in the pool \"{name}\" ({pool})");
            return Err(Error::config(format!("{path}.vlan.trunk.allowed"), reason));
        }
        Ok(())
    }

    fn check_port_config(&self, path: &str, c: &PortConfig) -> Result<()> {
        check_vlan(&format!("{path}.vlan"), c.vlan.native())?;
        self.check_pool(path, c)?;
        for (i, g) in c.security_groups.iter().enumerate() {
            if !self.security_groups.contains_key(g) {
                let reason = format!("there is no security group \"{g}\"");
                return Err(Error::config(format!("{path}.security_groups[{i}]"), reason));
            }
        }
        for (i, b) in c.bindings.iter().enumerate() {
            if b.mac.0[0] & 1 != 0 {
                return Err(Error::config(format!("{path}.bindings[{i}].mac"), "this is a group address"));
            }
        }
        if (c.anti_spoof || c.source_guard) && c.bindings.is_empty() {
            return Err(Error::config(
                format!("{path}.bindings"),
                "the guards need at least one bound address",
            ));
        }
        for (name, m) in [("ingress", c.ingress), ("egress", c.egress)] {
            if m.is_some_and(|m| m.kbps == Some(0) || m.pps == Some(0)) {
                return Err(Error::config(format!("{path}.{name}"), "a rate of zero would stop the port"));
            }
        }
        for (name, value, limit) in [("dscp", c.marking.dscp, 64), ("pcp", c.marking.pcp, 8)] {
            if value.is_some_and(|v| v >= limit) {
                return Err(Error::config(
                    format!("{path}.marking.{name}"),
                    format!("use 0 to {}", limit - 1),
                ));
            }
        }
        c.shaping.as_ref().map_or(Ok(()), |s| s.check(&format!("{path}.shaping")))
    }

    /// The properties of a port: its own or its group's, a trunk's VLANs limited to its pool.
    pub fn port_config(&self, port: &PortSpec) -> PortConfig {
        let group = port.group.as_ref().and_then(|g| self.port_groups.get(g));
        let mut config = port.config.as_ref().or(group).cloned().unwrap_or_default();
        let pool = config.vlan_pool.as_ref().and_then(|p| self.vlan_pools.get(p));
        if let (Some(pool), VlanMode::Trunk { allowed, .. }) = (pool, &mut config.vlan) {
            *allowed = allowed.intersection(pool);
        }
        config
    }
}

/// Why a bond is refused.
pub(crate) const SHAPED_BOND: &str = "what leaves a bond is shaped by its members; give them the shaping";

fn check_vlan(path: &str, vlan: u16) -> Result<()> {
    if vlan > VLAN_MAX {
        return Err(Error::config(path, format!("{vlan} is not a VLAN; use 0 to {VLAN_MAX}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_documents_are_refused_with_the_path() {
        for (json, path) in [
            (r#"{"ports":{"a":{"kind":{"tap":{"interface":5}}}}}"#, "ports.a.kind.tap.interface"),
            (r#"{"mac_aging":5}"#, "mac_aging"),
            (r#"{"ports":{"a":{"kind":{"tap":{"interface":"t"}},"group":"x"}}}"#, "ports.a.group"),
            (
                r#"{"ports":{"a":{"kind":{"tap":{"interface":"t"}},"config":{"vlan":{"access":5000}}}}}"#,
                "ports.a.config.vlan",
            ),
            (
                r#"{"ports":{"a":{"kind":{"tap":{"interface":"t"}},"config":{"vlan":{"trunk":{"allowed":"9-1"}}}}}}"#,
                "ports.a.config.vlan.trunk.allowed",
            ),
            (r#"{"port_groups":{"g":{"security_groups":["no"]}}}"#, "port_groups.g.security_groups[0]"),
            (r#"{"port_groups":{"g":{"vlan_pool":"no"}}}"#, "port_groups.g.vlan_pool"),
            (
                r#"{"vlan_pools":{"p":"5-9"},"port_groups":{"g":{"vlan_pool":"p","vlan":{"access":4}}}}"#,
                "port_groups.g.vlan",
            ),
            (
                r#"{"vlan_pools":{"p":"5-9"},"port_groups":{"g":{"vlan_pool":"p","vlan":{"trunk":{"allowed":"9-10"}}}}}"#,
                "port_groups.g.vlan.trunk.allowed",
            ),
            (r#"{"vlan_pools":{"p":"9-5"}}"#, "vlan_pools.p"),
            (r#"{"mirrors":{"m":{"to":"p"}}}"#, "mirrors.m.to"),
            (r#"{"static_macs":[{"mac":"02:00:00:00:00:01","port":"p"}]}"#, "static_macs[0].port"),
            (r#"{"flows":[{"actions":[{"output":"p"}]}]}"#, "flows[0].actions[0]"),
            (r#"{"flows":[{"match":{"vlan":5000}}]}"#, "flows[0].match.vlan"),
            (r#"{"flows":[{"match":{"ip_src":"10.0.0.1","ip_dst":"::1"}}]}"#, "flows[0].match.ip_dst"),
            (r#"{"flows":[{},{}]}"#, "flows[1].match"),
            (r#"{"port_groups":{"g":{"marking":{"dscp":64}}}}"#, "port_groups.g.marking.dscp"),
            (r#"{"port_groups":{"g":{"shaping":{"kbps":0}}}}"#, "port_groups.g.shaping.kbps"),
            (r#"{"flows":[{"actions":[{"set_dscp":64}]}]}"#, "flows[0].actions[0]"),
            (r#"{"telemetry":{"sflow":{"collectors":[]}}}"#, "telemetry.sflow.collectors"),
            (
                r#"{"telemetry":{"flow_export":{"collectors":["127.0.0.1:1"],"idle_timeout":0}}}"#,
                "telemetry.flow_export.idle_timeout",
            ),
            (
                r#"{"security_groups":{"s":{"rules":[{"direction":"in"}]}}}"#,
                "security_groups.s.rules[0].direction",
            ),
        ] {
            match SwitchConfig::parse(json) {
                Err(Error::Config { path: p, .. }) => assert_eq!(p, path, "{json}"),
                r => panic!("{json}: {r:?}"),
            }
        }
    }

    #[test]
    fn the_schema_names_every_section() {
        let schema = SwitchConfig::schema();
        for section in [
            "ports",
            "vlan_pools",
            "port_groups",
            "security_groups",
            "mirrors",
            "mac_ageing",
            "static_macs",
            "flows",
            "telemetry",
        ] {
            assert!(schema["properties"][section].is_object(), "{section}");
        }
    }
}

//! The agent's configuration file.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::adapters::{FenceAgent, Rule};
use crate::drs;
use crate::fence::FenceConfig;
use crate::ha::{AdmissionPolicy, HaConfig, HealthConfig, RestartConfig};
use crate::lease::Timing;
use crate::membership::MembershipConfig;
use crate::node::{self, FenceTarget};
use crate::ondisk::{Geometry, LayoutError, Name};
use crate::types::{HostId, LockspaceId, MAX_HOSTS, Millis, ResourceId, Resources};

/// The configuration of one host's agent, as its JSON file spells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// This host's number.
    pub host: HostId,
    /// This host's name in its leases; another machine that takes the number over needs another name.
    pub name: String,
    /// Every host of the cluster, this one included.
    pub hosts: Vec<HostConfig>,
    /// This host's network links, in the order of the addresses in `hosts`.
    pub links: Vec<LinkConfig>,
    /// A file with the secret that authenticates the hosts' messages; at least 16 bytes.
    pub key: PathBuf,
    /// The directory for what the agent has to remember: boot number, journal, VM files.
    pub state: PathBuf,
    /// The Unix socket of the API.
    pub socket: PathBuf,
    /// The API over TCP for other machines, encrypted, with certificates on both sides.
    #[serde(default)]
    pub remote: Option<RemoteConfig>,
    /// How VMs move between hosts while they run. Without it a VM stays where it was started.
    #[serde(default)]
    pub migration: Option<MigrationConfig>,
    /// Where the cluster's state is kept.
    pub store: StoreConfig,
    /// The shared volumes that carry leases; the same order on every host.
    pub volumes: Vec<VolumeConfig>,
    /// I/O timeout and watchdog timeout in seconds; the same on every host.
    #[serde(default)]
    pub timing: Timing,
    /// What resets this host when its agent no longer can.
    #[serde(default)]
    pub watchdog: Option<WatchdogConfig>,
    /// Run without a watchdog. Nobody takes over this host's VMs then before it was seen switched off.
    #[serde(default)]
    pub without_watchdog: bool,
    /// The lock that decides between two halves of the cluster.
    #[serde(default)]
    pub witness: Option<ResourceId>,
    /// What this host has for VMs: MHz and MiB.
    pub capacity: Resources,
    /// The heartbeat over the network.
    #[serde(default)]
    pub heartbeat: HeartbeatConfig,
    /// Restart and admission.
    #[serde(default)]
    pub ha: HaSection,
    /// The balancer.
    #[serde(default)]
    pub balance: BalanceConfig,
    /// How a host is fenced: timers.
    #[serde(default)]
    pub fencing: FenceTimers,
    /// How long a VM may take to stop before it is killed, in milliseconds.
    #[serde(default = "default_grace")]
    pub stop_grace: Millis,
    /// Actions that answer events.
    #[serde(default)]
    pub rules: Vec<Rule>,
}

/// A host as every host of the cluster sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// Its number, from 1.
    pub id: HostId,
    /// Its address on each link.
    pub addresses: Vec<SocketAddr>,
    /// How to switch it off: levels in order, each a list of devices that must all report off.
    #[serde(default)]
    pub fence: Vec<Vec<FenceAgent>>,
}

/// The API over TLS. A client needs a certificate that the authority has signed; it may then do everything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RemoteConfig {
    /// Where to listen.
    pub address: SocketAddr,
    /// A directory with `ca-cert.pem`, `server-cert.pem` and `server-key.pem`.
    pub certificates: PathBuf,
}

/// Moves of VMs between hosts. Without certificates their memory crosses the network neither encrypted nor
/// authenticated: the first link of the hosts must be one that only they use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationConfig {
    /// The first of a thousand TCP ports at each host's first address; a VM has the port of its number. The same on
    /// every host.
    pub port: u16,
    /// A directory with `ca-cert.pem`, `server-cert.pem` and `server-key.pem`, `client-cert.pem` and `client-key.pem`: then
    /// VMs move over TLS, between hosts that both have a certificate of that authority. The server's names the host's
    /// first address. On every host, or on none.
    #[serde(default)]
    pub certificates: Option<PathBuf>,
    /// Bytes a second at most for each VM while its guest runs.
    #[serde(default)]
    pub bandwidth: Option<u64>,
}

/// One of this host's network links.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LinkConfig {
    /// The address and UDP port to use here.
    pub local: SocketAddr,
    /// A multicast group to send heartbeats to, beside unicast.
    #[serde(default)]
    pub group: Option<SocketAddr>,
}

/// Where the cluster's state is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum StoreConfig {
    /// A database file in the state directory; for a cluster of one host.
    Local,
    /// An etcd cluster.
    Etcd {
        /// Its members, for example `http://10.0.0.1:2379`.
        endpoints: Vec<String>,
        /// What all keys begin with.
        prefix: String,
    },
}

/// A shared volume with leases.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeConfig {
    /// The file or block device.
    pub path: PathBuf,
    /// The lockspace's name.
    pub space: String,
    /// Where the lockspace begins, in bytes.
    #[serde(default)]
    pub offset: u64,
    /// The sector size: 512 or 4096 bytes.
    #[serde(default = "default_sector")]
    pub sector: u32,
    /// The size of a lease area in bytes.
    #[serde(default = "default_area")]
    pub area: u32,
}

/// What resets a host that its agent no longer guards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum WatchdogConfig {
    /// A watchdog device, for example `/dev/watchdog`.
    Device(PathBuf),
    /// A named pipe whose reader (a supervisor or a hypervisor) resets this host unless a byte arrives
    /// within the watchdog timeout; `V` ends that.
    Pipe(PathBuf),
}

/// Heartbeat and arbitration, in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HeartbeatConfig {
    /// A heartbeat is sent this often.
    pub interval: Millis,
    /// A host is lost after this many intervals without one.
    pub misses: u32,
    /// How long a lost quorum may take to return before VMs are stopped.
    pub settle: Millis,
    /// How long stopping the VMs may take before the host resets itself.
    pub stop: Millis,
}

impl Default for HeartbeatConfig {
    fn default() -> Self {
        let m = MembershipConfig::new(HostId(0), Vec::new());
        HeartbeatConfig { interval: m.interval, misses: m.misses, settle: m.settle, stop: m.stop }
    }
}

/// Restart and admission; times in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HaSection {
    /// Restart limits.
    pub restart: RestartConfig,
    /// When a VM whose process is there counts as failed.
    pub health: HealthConfig,
    /// Room kept for the VMs of failed hosts.
    pub admission: AdmissionPolicy,
    /// How long a host that lost the network may keep its VMs.
    pub isolation: Millis,
    /// Reports and commands are repeated this often.
    pub repeat: Millis,
    /// How long a start or a move may take.
    pub patience: Millis,
}

impl Default for HaSection {
    fn default() -> Self {
        let HaConfig { restart, health, admission, isolation, repeat, patience, .. } = HaConfig::default();
        HaSection { restart, health, admission, isolation, repeat, patience }
    }
}

/// Fencing timers, in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FenceTimers {
    /// How long one call of an agent may take.
    pub deadline: Millis,
    /// How often the power state is looked at after "off".
    pub poll: Millis,
    /// How long the power may take to go off.
    pub confirm: Millis,
    /// How often a level is tried before the next one.
    pub attempts: u32,
    /// How long to wait before the levels start over.
    pub pause: Millis,
}

impl Default for FenceTimers {
    fn default() -> Self {
        let FenceConfig { deadline, poll, confirm, attempts, pause, .. } = FenceConfig::default();
        FenceTimers { deadline, poll, confirm, attempts, pause }
    }
}

/// Whether plans are carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BalanceMode {
    /// No sampling.
    Off,
    /// Plans are made and noted in the journal.
    #[default]
    Recommend,
    /// Plans are carried out by live migration.
    Automatic,
}

/// The balancer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BalanceConfig {
    /// Whether plans are carried out.
    pub mode: BalanceMode,
    /// How often the load is looked at, in milliseconds.
    pub interval: Millis,
    /// Thresholds and costs.
    pub planner: drs::Config,
    /// Which VMs run together, apart, or on which hosts.
    pub rules: Vec<drs::Rule>,
}

impl Default for BalanceConfig {
    fn default() -> Self {
        BalanceConfig {
            mode: BalanceMode::default(),
            interval: 60_000,
            planner: drs::Config::default(),
            rules: Vec::new(),
        }
    }
}

fn default_grace() -> Millis {
    30_000
}

fn default_sector() -> u32 {
    512
}

fn default_area() -> u32 {
    1 << 20
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("Cannot read {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// It is not the JSON of a configuration.
    #[error("Configuration {} is malformed; see `nacre-node --schema`", .path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// A value does not fit the others.
    #[error("Configuration is wrong: {0}")]
    Value(String),
    /// A lockspace's name or geometry is wrong.
    #[error("Configuration of volume {0} is wrong")]
    Volume(String, #[source] LayoutError),
    /// There is no watchdog.
    #[error(
        "No watchdog is configured: after a failure nothing would stop this host's VMs. Name a watchdog, or set \
         without_watchdog to let others take over only after this host was seen switched off"
    )]
    NoWatchdog,
}

/// The name of lease area `index` on every volume: `nacre-<index>`.
pub fn resource_name(index: u32) -> Name {
    // At most 16 bytes: it always fits.
    Name::new(&format!("nacre-{index}")).unwrap_or_default()
}

impl VolumeConfig {
    /// The lockspace's name and geometry.
    pub fn layout(&self) -> Result<(Name, Geometry), ConfigError> {
        let wrong = |e| ConfigError::Volume(self.space.clone(), e);
        let name = Name::new(&self.space).map_err(wrong)?;
        Ok((name, Geometry::new(self.sector, self.area).map_err(wrong)?))
    }
}

impl AgentConfig {
    /// Reads and checks a configuration file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(read)?;
        let parse = |source| ConfigError::Syntax { path: path.to_owned(), source };
        let config: AgentConfig = serde_json::from_str(&text).map_err(parse)?;
        config.check()?;
        Ok(config)
    }

    /// The JSON schema of a configuration file.
    pub fn schema() -> serde_json::Value {
        schemars::schema_for!(Self).to_value()
    }

    /// Checks what the syntax cannot.
    pub fn check(&self) -> Result<(), ConfigError> {
        let wrong = |text: String| Err(ConfigError::Value(text));
        let mut seen = BTreeMap::new();
        for h in &self.hosts {
            if h.id.0 == 0 || h.id.0 > MAX_HOSTS {
                return wrong(format!("{} is not between 1 and {MAX_HOSTS}", h.id));
            }
            if seen.insert(h.id, ()).is_some() {
                return wrong(format!("{} is listed twice", h.id));
            }
            if h.addresses.len() != self.links.len() {
                return wrong(format!(
                    "{} needs one address for each of the {} links",
                    h.id,
                    self.links.len()
                ));
            }
            if h.fence.iter().map(Vec::len).sum::<usize>() > usize::from(u16::MAX) {
                return wrong(format!("{} has too many fence devices", h.id));
            }
        }
        if !seen.contains_key(&self.host) {
            return wrong(format!("{} is not among the hosts", self.host));
        }
        if self.volumes.is_empty() || self.volumes.len() > 64 {
            return wrong("there must be 1 to 64 volumes with leases".into());
        }
        for v in &self.volumes {
            let (_, geometry) = v.layout()?;
            if let Some(h) = self.hosts.iter().find(|h| h.id.0 > geometry.max_hosts()) {
                return wrong(format!("{} does not fit on volume {}; use larger areas", h.id, v.space));
            }
        }
        if let Some(w) = self.witness
            && usize::from(w.lockspace.0) >= self.volumes.len()
        {
            return wrong("the witness is on a volume that is not listed".into());
        }
        if self.timing.io_timeout == 0 || self.timing.watchdog == 0 {
            return wrong("timing has a zero".into());
        }
        let intervals = [
            self.heartbeat.interval,
            self.heartbeat.misses.into(),
            self.balance.interval,
            self.ha.health.interval,
        ];
        if intervals.contains(&0) {
            return wrong("an interval is zero".into());
        }
        if self.store == StoreConfig::Local && self.hosts.len() > 1 {
            return wrong("the local store is for one host; use etcd".into());
        }
        if self.watchdog.is_none() && !self.without_watchdog {
            return Err(ConfigError::NoWatchdog);
        }
        Name::new(&self.name).map(|_| ()).or_else(|_| wrong("the host's name is longer than 48 bytes".into()))
    }

    /// The highest host number.
    pub fn top_host(&self) -> u16 {
        self.hosts.iter().map(|h| h.id.0).max().unwrap_or(0)
    }

    /// The device that a fence configuration of [`AgentConfig::node`] means.
    pub fn fence_device(&self, host: HostId, device: u16) -> Option<&FenceAgent> {
        let host = self.hosts.iter().find(|h| h.id == host)?;
        host.fence.iter().flatten().nth(usize::from(device))
    }

    /// What the state machines want to know.
    pub fn node(&self) -> node::Config {
        let members: Vec<HostId> = self.hosts.iter().map(|h| h.id).collect();
        let HeartbeatConfig { interval, misses, settle, stop } = self.heartbeat;
        let membership = MembershipConfig { host: self.host, members, interval, misses, settle, stop };
        let HaSection { restart, health, admission, isolation, repeat, patience } = self.ha.clone();
        let ha = HaConfig { restart, health, admission, isolation, repeat, patience, ..HaConfig::default() };
        let FenceTimers { deadline, poll, confirm, attempts, pause } = self.fencing;
        let levels = |h: &HostConfig| {
            let mut next = 0..;
            h.fence.iter().map(|l| l.iter().filter_map(|_| next.next()).collect()).collect()
        };
        let target = |h: &HostConfig| FenceTarget {
            host: h.id,
            config: FenceConfig { levels: levels(h), deadline, poll, confirm, attempts, pause },
        };
        node::Config {
            host: self.host,
            // Checked to be short enough.
            name: Name::new(&self.name).unwrap_or_default(),
            timing: self.timing,
            lockspaces: self.volumes.len() as u8,
            watchdog: self.watchdog.is_some(),
            capacity: self.capacity,
            membership,
            ha,
            fencing: self.hosts.iter().map(target).collect(),
            witness: self.witness,
            stop_grace: self.stop_grace,
        }
    }

    /// The volume that carries a lockspace.
    pub fn volume(&self, lockspace: LockspaceId) -> Option<&VolumeConfig> {
        self.volumes.get(usize::from(lockspace.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{
        "host": 2, "name": "b", "key": "/etc/nacre/key", "state": "/var/lib/nacre-node",
        "socket": "/run/nacre-node.sock",
        "links": [{"local": "10.0.0.2:7400", "group": "239.7.7.7:7401"}],
        "hosts": [
            {"id": 1, "addresses": ["10.0.0.1:7400"],
             "fence": [[{"program": "/usr/sbin/fence_ipmilan"}], [{"program": "/a"}, {"program": "/b"}]]},
            {"id": 2, "addresses": ["10.0.0.2:7400"]}],
        "store": {"etcd": {"endpoints": ["http://10.0.0.1:2379"], "prefix": "/nacre"}},
        "volumes": [{"path": "/dev/leases", "space": "vms"}],
        "watchdog": {"device": "/dev/watchdog"},
        "capacity": {"cpu": 8000, "memory": 16384}}"#;

    fn parse(text: &str) -> AgentConfig {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_configuration_is_read_with_safe_defaults() {
        let config = parse(GOOD);
        config.check().unwrap();
        let node = config.node();
        assert_eq!((node.timing.dead(), node.membership.timeout()), (140_000, 30_000));
        assert!(node.watchdog);
        assert_eq!(node.fencing[0].config.levels, [vec![0], vec![1, 2]]);
        assert_eq!(config.fence_device(HostId(1), 2).unwrap().program, Path::new("/b"));
        assert_eq!(config.fence_device(HostId(2), 0), None);
    }

    #[test]
    fn mistakes_are_told() {
        let wrong: [(&str, &str, &str); 7] = [
            ("\"host\": 2", "\"host\": 3", "not among the hosts"),
            ("{\"id\": 2", "{\"id\": 1", "listed twice"),
            ("{\"id\": 2", "{\"id\": 0", "between 1 and"),
            ("[\"10.0.0.2:7400\"]}],", "[]}],", "one address"),
            ("\"vms\"}", "\"vms\", \"sector\": 4096, \"area\": 3145728}", "volume vms"),
            ("\"watchdog\": {\"device\": \"/dev/watchdog\"},", "", "No watchdog"),
            (
                "{\"etcd\": {\"endpoints\": [\"http://10.0.0.1:2379\"], \"prefix\": \"/nacre\"}}",
                "\"local\"",
                "one host",
            ),
        ];
        for (from, to, expected) in wrong {
            assert!(GOOD.contains(from), "{from}");
            let error = parse(&GOOD.replace(from, to)).check().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(serde_json::from_str::<AgentConfig>(&GOOD.replace("\"name\"", "\"nam\"")).is_err());
        assert!(AgentConfig::schema()["properties"]["volumes"].is_object());
    }
}

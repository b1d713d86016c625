//! Configuration of telemetry.

use std::net::{IpAddr, SocketAddr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::packet::HEAD_MAX;

/// Most collectors of one kind.
const COLLECTORS_MAX: usize = 8;

/// What is measured and exported.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// Keep a record of each flow, for the list of top talkers, even when none is exported.
    pub meter_flows: bool,
    /// Export flow records.
    pub flow_export: Option<FlowExportConfig>,
    /// Export sampled packets and interface counters as sFlow version 5.
    pub sflow: Option<SflowConfig>,
}

/// Form of exported flow records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FlowProtocol {
    /// RFC 7011.
    #[default]
    Ipfix,
    /// NetFlow version 9, RFC 3954.
    Netflow9,
}

/// Export of flow records. Only IP flows are exported; octets are those of the IP packets, padding of short Ethernet
/// frames included.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FlowExportConfig {
    /// UDP addresses of the collectors; all get the same datagrams.
    pub collectors: Vec<SocketAddr>,
    /// Form of the records.
    #[serde(default)]
    pub protocol: FlowProtocol,
    /// Seconds after which a flow that goes on is reported.
    #[serde(default = "sixty")]
    pub active_timeout: u64,
    /// Seconds without a packet after which a flow is reported as ended.
    #[serde(default = "fifteen")]
    pub idle_timeout: u64,
    /// Measure one packet in so many, at random; 1: every packet.
    #[serde(default = "one")]
    pub sampling: u32,
    /// Observation domain (NetFlow: source identifier).
    #[serde(default)]
    pub domain: u32,
}

/// Export by sFlow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SflowConfig {
    /// UDP addresses of the collectors; all get the same datagrams.
    pub collectors: Vec<SocketAddr>,
    /// Address that the agent calls itself by; absent: the one from which the first collector is reached.
    #[serde(default)]
    pub agent: Option<IpAddr>,
    /// Sample one packet in so many, at random.
    #[serde(default = "thousand")]
    pub sampling: u32,
    /// Bytes of a sampled frame that are sent, 128 at most.
    #[serde(default = "header")]
    pub header: u16,
    /// Seconds between two reports of a port's counters; zero: none.
    #[serde(default = "twenty")]
    pub polling: u64,
}

fn one() -> u32 {
    1
}

fn fifteen() -> u64 {
    15
}

fn twenty() -> u64 {
    20
}

fn sixty() -> u64 {
    60
}

fn thousand() -> u32 {
    1000
}

fn header() -> u16 {
    HEAD_MAX as u16
}

impl TelemetryConfig {
    /// Checks all that can be checked without a socket; `path` names the section in errors.
    pub(crate) fn check(&self, path: &str) -> Result<()> {
        let collectors = |section: &str, list: &[SocketAddr]| {
            if (1..=COLLECTORS_MAX).contains(&list.len()) {
                return Ok(());
            }
            let reason = format!("there must be 1 to {COLLECTORS_MAX} collectors");
            Err(Error::config(format!("{path}.{section}.collectors"), reason))
        };
        if let Some(f) = &self.flow_export {
            collectors("flow_export", &f.collectors)?;
            for (name, v) in [("active_timeout", f.active_timeout), ("idle_timeout", f.idle_timeout)] {
                if !(1..=86_400).contains(&v) {
                    let reason = "use 1 to 86400 seconds";
                    return Err(Error::config(format!("{path}.flow_export.{name}"), reason));
                }
            }
            if f.sampling == 0 || (f.sampling > 1 && self.meter_flows) {
                let reason = "sampling is 1 or more, and 1 when all flows are metered";
                return Err(Error::config(format!("{path}.flow_export.sampling"), reason));
            }
        }
        if let Some(s) = &self.sflow {
            collectors("sflow", &s.collectors)?;
            if s.sampling == 0 {
                return Err(Error::config(format!("{path}.sflow.sampling"), "sampling is 1 or more"));
            }
            if !(14..=HEAD_MAX as u16).contains(&s.header) {
                return Err(Error::config(
                    format!("{path}.sflow.header"),
                    format!("use 14 to {HEAD_MAX} bytes"),
                ));
            }
        }
        Ok(())
    }

    /// Whether each flow has a cache entry of its own, which counts for its record.
    pub(crate) fn meters_all(&self) -> bool {
        self.meter_flows || self.flow_export.as_ref().is_some_and(|f| f.sampling == 1)
    }
}

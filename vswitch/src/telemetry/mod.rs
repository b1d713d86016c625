//! What the switch tells collectors of its traffic: flow records (NetFlow version 9, RFC 3954; IPFIX, RFC 7011) and
//! sFlow version 5; and the list of top talkers made from the same records.
//!
//! A metered flow has a cache entry of its own, whose counts the workers add to its record as they add them to rules:
//! metering costs nothing a packet, but more entries. With sampling the cache stays as it is, and records are made
//! from one packet in so many.

mod collectors;
mod config;
mod netflow;
pub(crate) mod records;
pub(crate) mod sampler;
mod sflow;

use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

pub use self::config::{FlowExportConfig, FlowProtocol, SflowConfig, TelemetryConfig};
use self::netflow::FlowExporter;
pub use self::records::Talker;
use self::records::{FlowRecord, Records};
use self::sampler::{Sample, Sampler, Use};
use self::sflow::SflowExporter;
use crate::clock::{Clock, Nanos, SECOND};
use crate::error::{Error, Result};
use crate::packet::key::FlowKey;
use crate::shared::Shared;
use crate::switch::Switch;

/// How often records are looked through.
const SCAN: Nanos = SECOND;
/// Samples that may wait for the housekeeping thread; more are counted as lost.
const SAMPLES_MAX: usize = 8192;

/// The exporters in operation.
#[derive(Debug, Default)]
pub(crate) struct Exporters {
    flows: Option<FlowExporter>,
    sflow: Option<SflowExporter>,
}

impl Exporters {
    /// Opens the sockets towards all collectors.
    pub fn open(config: &TelemetryConfig) -> Result<Self> {
        Ok(Self {
            flows: config.flow_export.as_ref().map(FlowExporter::new).transpose()?,
            sflow: config.sflow.as_ref().map(SflowExporter::new).transpose()?,
        })
    }
}

#[derive(Debug, Default)]
struct Samples {
    waiting: Vec<Sample>,
    lost: u32,
}

/// The telemetry of one switch.
#[derive(Debug)]
pub(crate) struct Telemetry {
    config: ArcSwap<TelemetryConfig>,
    exporters: Mutex<Exporters>,
    records: Records,
    samples: Mutex<Samples>,
    scanned: Mutex<Nanos>,
    /// When the switch was made: what uptimes in datagrams count from.
    started: Nanos,
}

impl Telemetry {
    pub fn new(now: Nanos) -> Self {
        Self {
            config: ArcSwap::default(),
            exporters: Mutex::default(),
            records: Records::default(),
            samples: Mutex::default(),
            scanned: Mutex::new(now),
            started: now,
        }
    }

    pub fn config(&self) -> Arc<TelemetryConfig> {
        self.config.load_full()
    }

    /// Changes the configuration; what was measured so far is exported by the old one first. The caller then makes
    /// all cached decisions stale.
    pub fn set(&self, config: &TelemetryConfig, exporters: Exporters, clock: &Clock) {
        self.flush(clock);
        *self.exporters.lock() = exporters;
        self.config.store(Arc::new(config.clone()));
        self.records.clear();
    }

    /// The record that counts the packets of a cached decision; `None` when flows are not metered one by one.
    pub fn record(&self, key: &FlowKey, output: Output, now: Nanos) -> Option<Arc<FlowRecord>> {
        self.records.open(key, output, now)
    }

    /// Samplers for one worker.
    pub fn samplers(&self) -> Vec<Sampler> {
        let c = self.config.load();
        let flows = c
            .flow_export
            .as_ref()
            .filter(|f| f.sampling > 1)
            .map(|f| Sampler::new(Use::Flows, f.sampling, 0));
        let sflow = c.sflow.as_ref().map(|s| Sampler::new(Use::Sflow, s.sampling, s.header.into()));
        flows.into_iter().chain(sflow).collect()
    }

    /// Takes samples from a worker.
    pub fn give(&self, samples: Vec<Sample>) {
        let mut s = self.samples.lock();
        let room = SAMPLES_MAX.saturating_sub(s.waiting.len());
        s.lost = s.lost.wrapping_add(samples.len().saturating_sub(room) as u32);
        s.waiting.extend(samples.into_iter().take(room));
    }

    /// Timed work: exports what is due.
    pub fn tick(&self, shared: &Shared, now: Nanos) {
        let (samples, lost) = {
            let mut s = self.samples.lock();
            (std::mem::take(&mut s.waiting), s.lost)
        };
        for s in samples.iter().filter(|s| s.purpose == Use::Flows) {
            if let Some(r) = self.records.open(&s.key, s.output, s.at) {
                r.add(1, s.length as u64, s.at, s.tcp_flags());
            }
        }
        let mut exporters = self.exporters.lock();
        if let Some(sflow) = &mut exporters.sflow {
            let ports = shared.ports.load();
            sflow.export(&samples, lost, &ports, now, self.started);
        }
        let mut scanned = self.scanned.lock();
        if now.saturating_sub(*scanned) >= SCAN {
            let since = std::mem::replace(&mut *scanned, now);
            self.scan(exporters.flows.as_mut(), now, since, &shared.clock, false);
        }
    }

    /// Exports every record, whether or not it is due.
    pub fn flush(&self, clock: &Clock) {
        let now = clock.now();
        let since = std::mem::replace(&mut *self.scanned.lock(), now);
        self.scan(self.exporters.lock().flows.as_mut(), now, since, clock, true);
    }

    fn scan(&self, exporter: Option<&mut FlowExporter>, now: Nanos, since: Nanos, clock: &Clock, all: bool) {
        let config = self.config.load();
        let timeouts =
            config.flow_export.as_ref().map(|f| (f.active_timeout * SECOND, f.idle_timeout * SECOND));
        let (active, idle) = timeouts.unwrap_or((Nanos::MAX, records::FORGET));
        let (active, idle) = if all { (0, 0) } else { (active, idle) };
        let due = self.records.scan(now, since, active, idle, exporter.is_some());
        if let Some(e) = exporter {
            e.export(&due, now, clock, self.started);
        }
    }
}

/// Where the packets of a flow go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Output {
    /// Nowhere.
    #[default]
    None,
    /// Out of this port.
    One(u32),
    /// Out of so many ports.
    Many(u32),
}

impl Switch {
    /// Sets what is measured and exported.
    pub fn set_telemetry(&self, config: &TelemetryConfig) -> Result<()> {
        config.check("telemetry")?;
        let exporters = Exporters::open(config)?;
        let _control = self.control.lock();
        self.barrier();
        self.shared.telemetry.set(config, exporters, &self.shared.clock);
        self.shared.invalidate();
        Ok(())
    }

    /// The flows that moved most bytes in the last second, `limit` at most, and how many flows have records. An error
    /// when flows are not metered.
    pub fn top_talkers(&self, limit: usize) -> Result<(Vec<Talker>, usize)> {
        let telemetry = &self.shared.telemetry;
        let config = telemetry.config();
        if !config.meter_flows && config.flow_export.is_none() {
            return Err(Error::Invalid("Flows are not metered; set telemetry.meter_flows".into()));
        }
        self.barrier();
        let scale = config.flow_export.as_ref().map_or(1, |f| f.sampling.max(1));
        Ok(telemetry.records.top(limit, scale.into(), self.shared.clock.now()))
    }
}

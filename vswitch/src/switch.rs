//! The switch: ports, workers and control operations.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::Mutex;

use crate::clock::{Clock, SECOND};
use crate::config::Applied;
use crate::datapath::thread::WorkerHandle;
use crate::datapath::translate::Translation;
use crate::datapath::transmit::hand_over;
use crate::datapath::worker::Forwarder;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::mac_table::MacRow;
use crate::packet::key;
use crate::pipeline::{Action, Fields, FlowChange, FlowEntry, FlowSpec, Instructions};
use crate::port::{PORT_MAX, PatchPanel, Port, PortId};
use crate::port_config::PortConfig;
use crate::security::SecurityGroups;
use crate::shaper::{ClassStats, Shaper};
use crate::shared::{PortEntry, PortLimits, PortTable, Shared};
use crate::stats::PortStats;
use crate::switch_bonds::tick_bonds;
use crate::sys::{EventFd, poll_readable};

/// How often the housekeeping thread runs.
const HOUSEKEEPING: Duration = Duration::from_millis(100);
/// Most workers.
const WORKERS_MAX: usize = 64;

/// Makes a [`Switch`].
#[derive(Clone, Debug, Default)]
pub struct SwitchBuilder {
    workers: Option<usize>,
    cores: Vec<usize>,
    clock: Clock,
    panel: PatchPanel,
    host: Option<String>,
}

impl SwitchBuilder {
    /// Number of worker threads (default: one). With zero there is no thread at all: the owner calls
    /// [`Switch::poll`], which makes every step deterministic.
    #[must_use]
    pub fn workers(mut self, n: usize) -> Self {
        self.workers = Some(n.min(WORKERS_MAX));
        self
    }

    /// Cores that the workers are pinned to, in order; workers beyond the list float.
    #[must_use]
    pub fn cores(mut self, cores: Vec<usize>) -> Self {
        self.cores = cores;
        self
    }

    /// The time source.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Where configurations find the cables of their patch ports. Switches with the same panel can be patched to each
    /// other.
    #[must_use]
    pub fn patch_panel(mut self, panel: PatchPanel) -> Self {
        self.panel = panel;
        self
    }

    /// Name of this host in configurations that describe the switches of several.
    #[must_use]
    pub fn host(mut self, name: impl Into<String>) -> Self {
        self.host = Some(name.into());
        self
    }

    /// Starts the switch, with no port yet.
    pub fn build(self) -> Result<Switch> {
        let workers = self.workers.unwrap_or(1);
        let shared = Arc::new(Shared::new(self.clock, workers.max(1)));
        shared.tables.write().add(default_rule(), shared.clock.now())?;
        let mut handles = Vec::new();
        for id in 0..workers {
            handles.push(WorkerHandle::start(shared.clone(), id, self.cores.get(id).copied())?);
        }
        let manual = (workers == 0).then(|| Mutex::new(Forwarder::new(shared.clone(), 0)));
        let housekeeper = if workers > 0 { Some(Housekeeper::start(shared.clone())?) } else { None };
        Ok(Switch {
            shared,
            control: Mutex::default(),
            applied: Mutex::default(),
            panel: self.panel,
            host: self.host,
            manual,
            _housekeeper: housekeeper,
            workers: handles,
        })
    }
}

/// A virtual switch. Many can live in one process. Dropping one stops its threads and closes its ports.
pub struct Switch {
    pub(crate) shared: Arc<Shared>,
    /// Held by operations that change the configuration.
    pub(crate) control: Mutex<()>,
    /// The configuration applied last.
    pub(crate) applied: Mutex<Option<Applied>>,
    /// Cables of patch ports in configurations.
    pub(crate) panel: PatchPanel,
    /// This host, in configurations.
    pub(crate) host: Option<String>,
    pub(crate) manual: Option<Mutex<Forwarder>>,
    _housekeeper: Option<Housekeeper>,
    workers: Vec<WorkerHandle>,
}

/// What [`Switch::ports`] tells of a port.
#[derive(Clone, Debug)]
pub struct PortInfo {
    /// Number.
    pub id: PortId,
    /// Name.
    pub name: String,
    /// Kind, as `vhost-user`.
    pub kind: &'static str,
    /// Whether a peer is there.
    pub link_up: bool,
    /// Configuration.
    pub config: PortConfig,
    /// Counters.
    pub stats: PortStats,
}

impl Switch {
    /// Starts to describe a switch.
    pub fn builder() -> SwitchBuilder {
        SwitchBuilder::default()
    }

    /// The switch's clock.
    pub fn clock(&self) -> &Clock {
        &self.shared.clock
    }

    /// Adds a port under the lowest free number.
    pub fn add_port(&self, name: &str, port: impl Port + 'static, config: PortConfig) -> Result<PortId> {
        self.add_port_as(None, name, Arc::new(port), config)
    }

    /// Adds a port, under the number `id` if given.
    pub fn add_port_as(
        &self,
        id: Option<PortId>,
        name: &str,
        port: Arc<dyn Port>,
        config: PortConfig,
    ) -> Result<PortId> {
        let _control = self.control.lock();
        let mut table = PortTable::clone(&self.shared.ports.load());
        let id = match id {
            Some(id) if !(1..=PORT_MAX).contains(&id) => {
                return Err(Error::Invalid(format!("Port number {id} is not within 1 to {PORT_MAX}")));
            }
            Some(id) if table.get(id).is_some() => return Err(Error::PortExists(id.to_string())),
            Some(id) => id,
            None => table.free_id().ok_or(Error::TooManyPorts)?,
        };
        if table.by_name(name).is_some() {
            return Err(Error::PortExists(name.to_string()));
        }
        let entry = self.new_entry(id, name, port, config, PortStats::default());
        table.set(id, Some(Arc::new(entry)));
        self.publish(table);
        self.shared.events.publish(|| Event::PortAdded(id));
        Ok(id)
    }

    /// Removes a port and forgets the addresses learned on it. No worker uses it any more on return.
    pub fn remove_port(&self, id: PortId) -> Result<()> {
        let _control = self.control.lock();
        let mut table = PortTable::clone(&self.shared.ports.load());
        if table.get(id).is_none() {
            return Err(Error::NoSuchPort(id.to_string()));
        }
        table.set(id, None);
        self.publish(table);
        self.shared.bonds.rcu(|old| old.iter().filter(|b| b.id != id).cloned().collect::<Vec<_>>());
        self.shared.macs.flush(Some(id), true);
        self.shared.events.publish(|| Event::PortRemoved(id));
        Ok(())
    }

    /// Changes a port's configuration in place; its link and counters stay.
    pub fn set_port_config(&self, id: PortId, config: PortConfig) -> Result<()> {
        let _control = self.control.lock();
        let mut table = PortTable::clone(&self.shared.ports.load());
        let mut entry = PortEntry::clone(table.get(id).ok_or_else(|| Error::NoSuchPort(id.to_string()))?);
        entry.limits = Arc::new(PortLimits::new(&config, Some(&entry.limits)));
        entry.config = Arc::new(config);
        table.set(id, Some(Arc::new(entry)));
        self.publish(table);
        self.shared.events.publish(|| Event::PortChanged(id));
        Ok(())
    }

    /// Number of the port called `name`.
    pub fn port_id(&self, name: &str) -> Option<PortId> {
        self.shared.ports.load().by_name(name).map(|p| p.id)
    }

    /// All ports by number, with fresh counters.
    pub fn ports(&self) -> Vec<PortInfo> {
        self.shared
            .ports
            .load()
            .iter()
            .map(|p| PortInfo {
                id: p.id,
                name: p.name.clone(),
                kind: p.port.kind(),
                link_up: p.port.link_up(),
                config: PortConfig::clone(&p.config),
                stats: p.stats.sum(),
            })
            .collect()
    }

    /// Counters of one port.
    pub fn port_stats(&self, id: PortId) -> Result<PortStats> {
        let ports = self.shared.ports.load();
        let port = ports.get(id).ok_or_else(|| Error::NoSuchPort(id.to_string()))?;
        Ok(port.stats.sum())
    }

    /// Counters of the classes that a port's shaper has; none without a shaper.
    pub fn class_stats(&self, id: PortId) -> Result<Vec<ClassStats>> {
        let ports = self.shared.ports.load();
        let port = ports.get(id).ok_or_else(|| Error::NoSuchPort(id.to_string()))?;
        Ok(port.limits.shaper.as_ref().map_or_else(Vec::new, |s| s.stats()))
    }

    /// The MAC address table.
    pub fn mac_table(&self) -> Vec<MacRow> {
        self.shared.macs.rows(self.shared.clock.now())
    }

    /// Fixes an address to a port.
    pub fn add_static_mac(&self, vlan: u16, mac: [u8; 6], port: PortId) -> Result<()> {
        if self.shared.ports.load().get(port).is_none() {
            return Err(Error::NoSuchPort(port.to_string()));
        }
        self.shared.macs.add_static(vlan, key::mac_u64(&mac), port);
        Ok(())
    }

    /// Forgets the learned addresses of a port (`None`: of all).
    pub fn flush_macs(&self, port: Option<PortId>) {
        self.shared.macs.flush(port, false);
    }

    /// Sets after how many seconds an unseen address is forgotten; zero: never.
    pub fn set_mac_ageing(&self, seconds: u64) {
        self.shared.macs.set_ageing(seconds);
    }

    /// Explains, a line a step, what would happen to `frame` if it came in by `port`. Nothing is changed or sent.
    pub fn trace(&self, port: PortId, frame: &[u8]) -> Result<Vec<String>> {
        let ports = self.shared.ports.load_full();
        let entry = ports.get(port).ok_or_else(|| Error::NoSuchPort(port.to_string()))?;
        let head = &frame[..frame.len().min(crate::packet::HEAD_MAX)];
        let key = key::extract(head, port);
        let tables = self.shared.tables.read();
        let mut t = Translation::new(&self.shared, &ports, &tables, self.shared.clock.now(), head, key);
        let mut present = key::FlowKey::default();
        key::ALL_FIELDS.iter().filter(|f| key.get(**f) != 0).for_each(|f| present.mark(*f));
        t.trace = Some(vec![format!("in by port {port} ({}): {}", entry.name, Fields(&key, &present))]);
        t.run();
        let mut lines = t.trace.take().unwrap_or_default();
        lines.push(format!("decided by: {}", Fields(&key, &t.mask)));
        Ok(lines)
    }

    /// Forwards what waits in all ports, without threads: for a switch built with zero workers. Returns the number
    /// of packets; call it again until that is zero to let answers pass.
    pub fn poll(&self) -> usize {
        let Some(manual) = &self.manual else { return 0 };
        let mut f = manual.lock();
        f.refresh();
        let ports = f.ports().clone();
        let mut n = 0;
        for entry in ports.iter() {
            for queue in 0..entry.port.rx_queues() {
                n += f.run_queue(entry, queue);
            }
        }
        n += f.release().0;
        f.notify();
        // Polled queues want no wake-ups; this also gives back what was received.
        for entry in ports.iter() {
            for queue in 0..entry.port.rx_queues() {
                entry.port.arm(queue, false);
            }
        }
        drop(f);
        housekeep(&self.shared);
        n
    }

    /// Polls until no packet moves any more, but at most `rounds` times.
    pub fn settle(&self, rounds: usize) {
        for _ in 0..rounds {
            if self.poll() == 0 {
                break;
            }
        }
    }

    /// How often a MAC address was found to move to and fro.
    pub fn mac_flaps(&self) -> u64 {
        self.shared.macs.flaps()
    }

    /// Waits until every worker has passed a point between two bursts and has collected its counters.
    pub fn barrier(&self) {
        if let Some(m) = &self.manual {
            m.lock().collect_stats();
        }
        let requests: Vec<u64> = self.workers.iter().map(WorkerHandle::request_quiet).collect();
        for (w, r) in self.workers.iter().zip(requests) {
            w.wait_quiet(r);
        }
    }

    pub(crate) fn publish(&self, table: PortTable) {
        let mut groups = SecurityGroups::clone(&self.shared.security.load());
        groups.members = groups.elsewhere.clone();
        table.iter().for_each(|p| p.config.add_to_groups(&mut groups.members));
        self.shared.security.store(Arc::new(groups));
        let old = self.shared.ports.swap(Arc::new(table));
        self.shared.invalidate();
        if let Some(m) = &self.manual {
            m.lock().refresh();
        }
        self.barrier();
        // No worker fills the old shapers any more.
        let ports = self.shared.ports.load();
        for (port, shaper) in old.iter().filter_map(|p| Some((p, p.limits.shaper.as_ref()?))) {
            let same = |new: &Arc<Shaper>| Arc::ptr_eq(new, shaper);
            if let Some(entry) = ports.get(port.id).filter(|e| Arc::ptr_eq(&e.port, &port.port))
                && !entry.limits.shaper.as_ref().is_some_and(same)
            {
                hand_over(entry, shaper, self.shared.workers);
            }
        }
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.barrier();
        self.shared.telemetry.flush(&self.shared.clock);
        // Workers first: they use the ports.
        self.workers.clear();
    }
}

/// The rule that a new switch has: it switches as a learning bridge does.
pub(crate) fn default_rule() -> FlowSpec {
    FlowSpec { instructions: Instructions::apply(vec![Action::Normal]), ..FlowSpec::default() }
}

/// Timed work: ageing and expiry.
fn housekeep(shared: &Shared) {
    let now = shared.clock.now();
    tick_bonds(shared, now);
    shared.watch_links();
    shared.macs.age(now);
    shared.conntrack.expire(now);
    shared.stats_epoch.fetch_add(1, Ordering::Relaxed);
    shared.telemetry.tick(shared, now);
    let expired = shared.tables.write().expire(now);
    if !expired.is_empty() {
        shared.flow_changes.add(expired.iter().map(|e| FlowChange::from(&e.spec)));
        let hard = |e: &FlowEntry| {
            let limit = u64::from(e.spec.hard_timeout) * SECOND;
            u8::from(limit != 0 && now.saturating_sub(e.created) >= limit)
        };
        shared.report_removed(&expired, hard);
    }
}

/// The thread that runs [`housekeep`].
struct Housekeeper {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Housekeeper {
    fn start(shared: Arc<Shared>) -> Result<Self> {
        use std::os::fd::AsRawFd;
        let fail = |e| Error::io("start the housekeeping thread", e);
        let stop = Arc::new(EventFd::new().map_err(fail)?);
        let s = stop.clone();
        let thread = thread::Builder::new()
            .name("nacre-switch-hk".into())
            .spawn(move || {
                while let Ok([false]) = poll_readable([s.as_raw_fd()], HOUSEKEEPING.as_millis() as i32) {
                    housekeep(&shared);
                }
            })
            .map_err(fail)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Housekeeper {
    fn drop(&mut self) {
        self.stop.signal();
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

//! Workers: each polls its share of the receive queues and carries every burst from receive to transmit.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::cache::{CacheKey, FlowCache};
use super::execute::{Executor, OutQueue, enqueue};
use super::translate::Translation;
use super::transmit::{self, Scratch};
use super::verdict::{DropReason, Op, Verdict};
use crate::clock::{MILLISECOND, Nanos, SECOND};
use crate::packet::key::{self, CACHE_WORDS, Field, FlowKey};
use crate::packet::vlan::VlanOp;
use crate::packet::{BURST, Burst, Packet};
use crate::pipeline::Action;
use crate::port::PortId;
use crate::shared::{PortEntry, PortTable, Shared};
use crate::stats::{WorkerStats, size_class};
use crate::telemetry::Output;
use crate::telemetry::sampler::{Sample, Sampler};

/// A cached decision and what it handled since the counters were last collected.
#[derive(Debug)]
struct Flow {
    verdict: Verdict,
    packets: u64,
    bytes: u64,
    /// Time of the last packet.
    used: Nanos,
    /// TCP flags seen since then. Meaningless while no decision looks beyond the Ethernet header.
    tcp_flags: u64,
}

/// How often a flow notes its use and keeps its MAC address and connection alive.
const TOUCH_INTERVAL: Nanos = 10 * MILLISECOND;

/// How long a decision is kept without packets.
const IDLE: Nanos = 30 * SECOND;
/// Most comparisons of a decision with a change of a rule before a worker takes up packets again; rather than more it
/// forgets everything.
const PRECISE_MAX: usize = 1 << 20;

/// The packet-handling part of a worker, without its thread.
pub(crate) struct Forwarder {
    shared: Arc<Shared>,
    id: usize,
    ports: Arc<PortTable>,
    generation: u64,
    /// Changes of rules that the cache reflects.
    flow_position: u64,
    stats_epoch: u64,
    cache: FlowCache<Flow>,
    burst: Burst,
    keys: Box<[FlowKey; BURST]>,
    out: Vec<OutQueue>,
    active: Vec<PortId>,
    scratch: Scratch,
    /// Ports whose shapers this worker looks at: its share of them, and those where it left packets.
    shaped: Vec<PortId>,
    undo: Vec<(u16, VlanOp)>,
    samplers: Vec<Sampler>,
    /// Whether flows are metered: their records want the flags of every packet.
    metered: bool,
}

impl Forwarder {
    pub fn new(shared: Arc<Shared>, id: usize) -> Self {
        Self {
            ports: shared.ports.load_full(),
            shared,
            id,
            generation: 0,
            flow_position: 0,
            stats_epoch: 0,
            cache: FlowCache::new(),
            burst: Burst::new(),
            keys: Box::new([FlowKey::default(); BURST]),
            out: Vec::new(),
            active: Vec::new(),
            scratch: Scratch::default(),
            shaped: Vec::new(),
            undo: Vec::new(),
            samplers: Vec::new(),
            metered: false,
        }
    }

    /// The ports as this worker sees them.
    pub fn ports(&self) -> &Arc<PortTable> {
        &self.ports
    }

    /// The present time.
    pub fn now(&self) -> Nanos {
        self.shared.clock.now()
    }

    /// Takes notice of configuration changes; says whether there was one.
    #[inline]
    pub fn refresh(&mut self) -> bool {
        let epoch = self.shared.stats_epoch.load(Ordering::Relaxed);
        if epoch != self.stats_epoch {
            self.stats_epoch = epoch;
            self.collect_stats();
        }
        let position = self.shared.flow_changes.position();
        let generation = self.shared.generation.load(Ordering::Acquire);
        if generation == self.generation {
            if position != self.flow_position {
                self.follow_flow_changes();
            }
            return false;
        }
        // By the ports that the packets went out of.
        self.notify();
        self.collect_stats();
        self.cache.clear();
        self.flow_position = position;
        self.generation = generation;
        self.ports = self.shared.ports.load_full();
        self.out.resize_with(self.ports.end(), OutQueue::default);
        let mine = |p: &&Arc<PortEntry>| p.limits.shaper.is_some() && self.owns(p.id);
        self.shaped = self.ports.iter().filter(mine).map(|p| p.id).collect();
        self.samplers = self.shared.telemetry.samplers();
        self.metered = self.shared.telemetry.config().meters_all();
        true
    }

    /// Forgets the decisions that changes of rules reach.
    #[cold]
    fn follow_flow_changes(&mut self) {
        let (changes, position) = self.shared.flow_changes.since(self.flow_position);
        self.flow_position = position;
        let Some(changes) = changes.filter(|c| c.len() * self.cache.len() <= PRECISE_MAX) else {
            self.collect_stats();
            return self.cache.clear();
        };
        let keep = |key: &CacheKey, mask: &CacheKey, f: &mut Flow| {
            !changes.iter().any(|c| f.verdict.lookups.reached_by(c, key, mask))
        };
        self.cache.retain(keep, |mut f| settle(&mut f));
    }

    /// Notifies the peers that packets were sent to. Call it before sleeping.
    #[inline]
    pub fn notify(&mut self) {
        self.scratch.notify(&self.ports);
    }

    /// Adds what flows counted to their rules and records, and forgets flows that ended.
    pub fn collect_stats(&mut self) {
        // Guests that are gone by now need their memory back.
        self.burst.release();
        let now = self.shared.clock.now();
        let keep = |_: &CacheKey, _: &CacheKey, f: &mut Flow| {
            settle(f);
            now.saturating_sub(f.used) < IDLE
        };
        self.cache.retain(keep, drop);
    }

    /// Receives one burst from a queue and forwards it; returns the number of packets.
    pub fn run_queue(&mut self, entry: &PortEntry, queue: usize) -> usize {
        self.burst.clear();
        entry.port.receive(queue, &mut self.burst);
        // Of the burst before, whose stores had time to finish while this one was read.
        self.notify();
        let n = self.burst.len();
        if n > 0 {
            let now = self.shared.clock.now();
            self.classify(entry, n, now);
            self.flush();
        }
        if n > 0 || self.burst.errors > 0 {
            entry.stats.of(self.id).rx_errors.add(u64::from(self.burst.errors));
            entry.port.complete(queue);
            self.burst.clear();
        }
        n
    }

    fn classify(&mut self, entry: &PortEntry, n: usize, now: Nanos) {
        let stats = entry.stats.of(self.id);
        let l2_only = self.cache.is_l2_only() && !self.metered;
        let mut bytes = 0;
        for (p, key) in self.burst.packets()[..n].iter().zip(self.keys.iter_mut()) {
            let at = key::extract_l2(p.head(), entry.id, key);
            if !l2_only {
                key.w[3..CACHE_WORDS].fill(0);
                key::extract_l3(p.head(), at, key);
            }
            bytes += count_received(stats, p, key);
        }
        stats.rx_packets.add(n as u64);
        stats.rx_bytes.add(bytes);
        let mut found = [None; BURST];
        self.cache.lookup_burst(&self.keys[..n], &mut found[..n]);
        // Before decisions change the packets.
        let samples = self.sample(entry.id, n, now);
        for (i, hit) in found.iter().enumerate().take(n) {
            self.decide(entry, i, *hit, now);
        }
        if !samples.is_empty() {
            self.give(samples);
        }
    }

    /// Copies the packets that samplers choose.
    #[inline]
    fn sample(&mut self, in_port: PortId, n: usize, now: Nanos) -> Vec<Sample> {
        let mut samples = Vec::new();
        for s in &mut self.samplers {
            let mut from = 0;
            while let Some(at) = s.next(from, n) {
                from = at + 1;
                let p = &self.burst.packets()[at];
                samples.push(Sample {
                    purpose: s.purpose,
                    at: now,
                    in_port,
                    output: Output::None,
                    length: p.len(),
                    header: p.head()[..s.header.min(p.head().len())].to_vec(),
                    key: key::extract(p.head(), in_port),
                });
            }
        }
        samples
    }

    #[cold]
    fn give(&mut self, mut samples: Vec<Sample>) {
        for s in &mut samples {
            let flow = self.cache.lookup(&s.key).and_then(|hit| self.cache.value(hit));
            s.output = flow.map_or(Output::None, |f| f.verdict.output());
        }
        self.shared.telemetry.give(samples);
    }

    /// Applies the cached decision to packet `i`, or asks the slow path for one.
    #[inline]
    fn decide(&mut self, entry: &PortEntry, i: usize, hit: Option<u32>, now: Nanos) {
        let hit = match hit {
            Some(h) if self.is_current(h) => h,
            _ => self.miss(entry, i, now),
        };
        let Some(flow) = self.cache.value_mut(hit) else { return };
        flow.packets += 1;
        flow.bytes += self.burst.packets()[i].len() as u64;
        flow.tcp_flags |= self.keys[i].get64(Field::TcpFlags);
        if now.wrapping_sub(flow.used) > TOUCH_INTERVAL {
            if let Some(e) = &flow.verdict.source {
                e.touch(now);
            }
            if let Some(c) = &flow.verdict.conn {
                c.touch(now);
            }
            flow.used = now;
        }
        // The usual case, one output, needs no copy of the steps.
        if let [Op::Output { port, vlan, limit: None }] = flow.verdict.ops[..] {
            enqueue(&mut self.out, &mut self.active, port, i as u16, vlan);
        } else if flow.verdict.ops.is_empty() {
            entry.stats.of(self.id).rx_dropped.add(1);
            self.shared.drops.add(flow.verdict.drop.unwrap_or(DropReason::Pipeline), 1);
        } else {
            self.execute(entry, hit, i, now);
        }
    }

    #[inline]
    fn is_current(&self, hit: u32) -> bool {
        self.cache.value(hit).is_some_and(|f| {
            let v = &f.verdict;
            !v.once
                && v.depends.iter().all(|d| self.shared.macs.is_current(*d))
                && v.ct_depends.iter().all(|d| self.shared.conntrack.is_current(*d))
        })
    }

    #[cold]
    fn miss(&mut self, entry: &PortEntry, i: usize, now: Nanos) -> u32 {
        // The key in `keys` may lack the upper layers.
        let key = key::extract(self.burst.packets()[i].head(), entry.id);
        // Another packet of this burst may have brought the entry already.
        if let Some(h) = self.cache.lookup(&key) {
            if self.is_current(h) {
                return h;
            }
            if let Some(mut old) = self.cache.remove(h) {
                settle(&mut old);
            }
        }
        self.shared.decisions.fetch_add(1, Ordering::Relaxed);
        let tables = self.shared.tables.read();
        let head = self.burst.packets()[i].head();
        let mut t = Translation::new(&self.shared, &self.ports, &tables, now, head, key);
        t.run();
        let (mask, verdict, learned) = (t.mask, t.verdict, t.learned);
        drop(tables);
        if !learned.is_empty() {
            self.shared.learn(learned);
        }
        let flow = Flow { verdict, packets: 0, bytes: 0, used: now, tcp_flags: 0 };
        self.cache.insert(&key, &mask, flow, |mut old| settle(&mut old))
    }

    /// Runs all steps of a decision with several.
    fn execute(&mut self, entry: &PortEntry, hit: u32, i: usize, now: Nanos) {
        let Some(flow) = self.cache.value(hit) else { return };
        let mut x = Executor {
            shared: &self.shared,
            ports: &self.ports,
            worker: self.id,
            burst: &mut self.burst,
            out: &mut self.out,
            active: &mut self.active,
            in_port: entry.id,
            now,
        };
        x.run(&flow.verdict.ops, i);
    }

    /// Runs the actions that a controller sends with a packet.
    pub fn packet_out(&mut self, in_port: PortId, frame: &[u8], actions: &[Action]) {
        self.refresh();
        self.burst.clear();
        if !self.burst.push_frame(frame) || self.burst.is_empty() {
            return;
        }
        let now = self.shared.clock.now();
        let key = key::extract(self.burst.packets()[0].head(), in_port);
        let tables = self.shared.tables.read();
        let head = self.burst.packets()[0].head().to_vec();
        let mut t = Translation::new(&self.shared, &self.ports, &tables, now, &head, key);
        t.run_actions(actions);
        let (verdict, learned) = (t.verdict, t.learned);
        drop(tables);
        if !learned.is_empty() {
            self.shared.learn(learned);
        }
        let mut x = Executor {
            shared: &self.shared,
            ports: &self.ports,
            worker: self.id,
            burst: &mut self.burst,
            out: &mut self.out,
            active: &mut self.active,
            in_port,
            now,
        };
        x.run(&verdict.ops, 0);
        self.flush();
        self.notify();
        self.burst.release();
    }

    /// Whether this worker looks after the shaper of a port whoever fills it.
    fn owns(&self, port: PortId) -> bool {
        port as usize % self.shared.workers == self.id
    }

    /// Sends what shapers let out by now; returns the number of packets, and when to call again at the latest.
    #[inline]
    pub fn release(&mut self) -> (usize, Option<Nanos>) {
        if self.shaped.is_empty() { (0, None) } else { self.release_shaped() }
    }

    #[cold]
    fn release_shaped(&mut self) -> (usize, Option<Nanos>) {
        let (mut n, mut first) = (0, None);
        let mut shaped = std::mem::take(&mut self.shaped);
        shaped.retain(|port| {
            let Some(entry) = self.ports.get(*port) else { return false };
            let Some(shaper) = &entry.limits.shaper else { return false };
            if shaper.is_waiting() {
                let now = self.shared.clock.now();
                let (sent, next) = transmit::release(entry, shaper, self.id, now, &mut self.scratch);
                n += sent;
                first = first.into_iter().chain(next).min();
            }
            self.owns(*port) || shaper.is_waiting()
        });
        self.shaped = shaped;
        (n, first)
    }

    /// Sends everything that was enqueued.
    fn flush(&mut self) {
        while let Some(port) = self.active.pop() {
            let q = &mut self.out[port as usize];
            if let Some(entry) = self.ports.get(port) {
                self.undo.clear();
                for (&i, &tag) in q.index.iter().zip(&q.tags) {
                    if tag != VlanOp::None {
                        let p = self.burst.packet_mut(usize::from(i));
                        self.undo.push((i, tag.inverse(p)));
                        tag.apply(p);
                    }
                }
                let packets = self.burst.packets();
                match &entry.limits.shaper {
                    None => transmit::send(entry, self.id, packets, &q.index, &mut self.scratch),
                    Some(shaper) => {
                        let now = self.shared.clock.now();
                        transmit::shape(entry, shaper, self.id, packets, &q.index, now, &mut self.scratch);
                        if shaper.is_waiting() && !self.shaped.contains(&entry.id) {
                            self.shaped.push(entry.id);
                        }
                    }
                }
                for (i, op) in self.undo.drain(..) {
                    op.apply(self.burst.packet_mut(usize::from(i)));
                }
            }
            q.index.clear();
            q.tags.clear();
        }
    }
}

/// Moves a flow's counts to its rules.
fn settle(f: &mut Flow) {
    if f.packets != 0 {
        for r in &f.verdict.rules {
            r.add(f.packets, f.bytes, f.used);
        }
        if let Some(r) = &f.verdict.record {
            r.add(f.packets, f.bytes, f.used, f.tcp_flags as u16);
        }
        (f.packets, f.bytes, f.tcp_flags) = (0, 0, 0);
    }
}

#[inline]
fn count_received(stats: &WorkerStats, p: &Packet, key: &FlowKey) -> u64 {
    let len = p.len();
    stats.rx_size[size_class(len)].add(1);
    let dst = key.w[1] & key::BROADCAST_MAC;
    if key::is_group_mac(dst) {
        if dst == key::BROADCAST_MAC { stats.rx_broadcast.add(1) } else { stats.rx_multicast.add(1) }
    }
    len as u64
}

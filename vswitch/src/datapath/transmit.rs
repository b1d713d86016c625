//! The way out of a port: what the peer does not finish is finished here, what is too long dropped, what a shaper holds
//! back queued.

use crate::clock::Nanos;
use crate::packet::offload::{self, OffloadCaps};
use crate::packet::{BURST, Packet};
use crate::port::{Batch, Port, PortId};
use crate::shaper::{Offered, Shaper};
use crate::shared::{PortEntry, PortTable};
use crate::stats::WorkerStats;

/// Most bursts that one look at a shaper lets out, so that others get their turn.
const RELEASES_MAX: usize = 8;
/// All places of a burst.
const ALL: [u16; BURST] = {
    let mut all = [0; BURST];
    let mut i = 0;
    while i < BURST {
        all[i] = i as u16;
        i += 1;
    }
    all
};

/// Buffers of one worker.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    finished: Vec<Packet>,
    released: Vec<Packet>,
    passed: Vec<u16>,
    /// Ports and queues whose peers are to be notified.
    owed: Vec<(PortId, usize)>,
}

impl Scratch {
    /// Notifies the peers that packets were sent to. A while after sending is best, see [`Port::notify`].
    #[inline]
    pub fn notify(&mut self, ports: &PortTable) {
        for (port, queue) in self.owed.drain(..) {
            if let Some(entry) = ports.get(port) {
                entry.port.notify(queue);
            }
        }
    }
}

/// Sends a packet of the switch's own.
pub(crate) fn send_own(port: &dyn Port, packet: &Packet) {
    port.transmit(0, &Batch::all(std::slice::from_ref(packet)));
    port.notify(0);
}

/// Sends the packets at the places in `index`.
pub(super) fn send(entry: &PortEntry, worker: usize, packets: &[Packet], index: &[u16], s: &mut Scratch) {
    let stats = entry.stats.of(worker);
    let queue = worker % entry.port.tx_queues().max(1);
    let caps = entry.port.offloads();
    // Runs of packets that can go as they are; between them, packets that need work first.
    let mut start = 0;
    for (at, &i) in index.iter().enumerate() {
        let p = &packets[usize::from(i)];
        let too_long =
            entry.config.mtu.is_some_and(|m| !p.offload.is_gso() && offload::payload_len(p) > m.into());
        if p.offload.fits(caps) && !too_long {
            continue;
        }
        transmit(entry, queue, stats, &Batch::select(packets, &index[start..at]));
        start = at + 1;
        if too_long {
            stats.tx_too_long.add(1);
        } else {
            finish_and_transmit(entry, queue, stats, p, caps, &mut s.finished);
        }
    }
    transmit(entry, queue, stats, &Batch::select(packets, &index[start..]));
    if !s.owed.contains(&(entry.id, queue)) {
        s.owed.push((entry.id, queue));
    }
}

/// Sends what the port's shaper lets out, and queues the rest.
#[cold]
pub(super) fn shape(
    entry: &PortEntry,
    shaper: &Shaper,
    worker: usize,
    packets: &[Packet],
    index: &[u16],
    now: Nanos,
    s: &mut Scratch,
) {
    let mut gate = shaper.lock();
    let mut passed = std::mem::take(&mut s.passed);
    passed.clear();
    for &i in index {
        match gate.offer(&packets[usize::from(i)], now) {
            Offered::Pass => passed.push(i),
            Offered::Waits => {}
            Offered::Full => entry.stats.of(worker).tx_limited.add(1),
        }
    }
    send(entry, worker, packets, &passed, s);
    s.passed = passed;
}

/// Sends what the port's shaper lets out by now; returns the number of packets and when to look again.
pub(super) fn release(
    entry: &PortEntry,
    shaper: &Shaper,
    worker: usize,
    now: Nanos,
    s: &mut Scratch,
) -> (usize, Option<Nanos>) {
    let mut gate = shaper.lock();
    let mut released = std::mem::take(&mut s.released);
    let mut n = 0;
    for _ in 0..RELEASES_MAX {
        gate.release(now, &mut released);
        send(entry, worker, &released, &ALL[..released.len()], s);
        n += released.len();
        if released.len() < BURST {
            break;
        }
    }
    released.clear();
    s.released = released;
    (n, gate.next())
}

/// Takes over what waits in the shaper that a port had before.
pub(crate) fn hand_over(entry: &PortEntry, old: &Shaper, worker: usize) {
    let waiting = old.lock().drain();
    match &entry.limits.shaper {
        Some(new) => {
            let lost = new.lock().adopt(waiting);
            entry.stats.of(worker).tx_limited.add(lost);
        }
        None => {
            let mut s = Scratch::default();
            for burst in waiting.chunks(BURST) {
                send(entry, worker, burst, &ALL[..burst.len()], &mut s);
            }
            s.owed.into_iter().for_each(|(_, queue)| entry.port.notify(queue));
        }
    }
}

fn transmit(entry: &PortEntry, queue: usize, stats: &WorkerStats, batch: &Batch<'_>) {
    let n = batch.len();
    if n == 0 {
        return;
    }
    let sent = entry.port.transmit(queue, batch).min(n);
    let bytes: usize = (0..sent).map(|i| batch.get(i).len()).sum();
    stats.tx_packets.add(sent as u64);
    stats.tx_bytes.add(bytes as u64);
    if sent < n {
        stats.tx_dropped.add((n - sent) as u64);
    }
}

#[cold]
fn finish_and_transmit(
    entry: &PortEntry,
    queue: usize,
    stats: &WorkerStats,
    p: &Packet,
    caps: OffloadCaps,
    finished: &mut Vec<Packet>,
) {
    finished.clear();
    if !offload::finish(p, caps, finished) {
        return stats.tx_dropped.add(1);
    }
    for part in finished.chunks(BURST) {
        transmit(entry, queue, stats, &Batch::all(part));
    }
}

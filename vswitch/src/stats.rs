//! Counters of ports. Each worker writes a set of its own, so counting needs no atomic read-modify-write.

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_utils::CachePadded;
use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Upper bounds of the RMON size classes (RFC 2819), counted with the frame check sequence; the last is open.
pub const SIZE_CLASSES: [usize; 7] = [64, 127, 255, 511, 1023, 1518, usize::MAX];

/// A counter with a single writer.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    #[inline(always)]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// One worker's counters of one port.
        #[derive(Debug, Default)]
        pub(crate) struct WorkerStats {
            $(pub $name: Counter,)*
            pub rx_size: [Counter; SIZE_CLASSES.len()],
        }

        /// Counters of a port since it was added.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
        #[serde(default)]
        pub struct PortStats {
            $($(#[$doc])* pub $name: u64,)*
            /// Received frames by size class, see [`SIZE_CLASSES`].
            pub rx_size: [u64; SIZE_CLASSES.len()],
        }

        impl PortStats {
            fn add(&mut self, w: &WorkerStats) {
                $(self.$name = self.$name.wrapping_add(w.$name.get());)*
                for (sum, c) in self.rx_size.iter_mut().zip(&w.rx_size) {
                    *sum = sum.wrapping_add(c.get());
                }
            }

            /// Adds the counters of `other`, as when a port moves here with its history.
            pub fn merge(&mut self, other: &PortStats) {
                $(self.$name = self.$name.wrapping_add(other.$name);)*
                for (sum, c) in self.rx_size.iter_mut().zip(&other.rx_size) {
                    *sum = sum.wrapping_add(*c);
                }
            }

            /// Name and value of each counter.
            pub fn fields(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

counters! {
    /// Frames received.
    rx_packets,
    /// Bytes received.
    rx_bytes,
    /// Malformed frames and descriptors received.
    rx_errors,
    /// Received frames that a policy or the pipeline dropped.
    rx_dropped,
    /// Received broadcast frames.
    rx_broadcast,
    /// Received multicast frames, broadcast excluded.
    rx_multicast,
    /// Frames sent.
    tx_packets,
    /// Bytes sent.
    tx_bytes,
    /// Frames not sent because the peer was absent or its queue full.
    tx_dropped,
    /// Frames not sent because they exceed the port's MTU.
    tx_too_long,
    /// Frames not sent because of a rate limit.
    tx_limited,
}

/// The counters of a port, one set a worker.
#[derive(Debug)]
pub(crate) struct StatsCell {
    workers: Box<[CachePadded<WorkerStats>]>,
    /// What the port counted elsewhere.
    history: Mutex<PortStats>,
}

impl StatsCell {
    pub fn new(workers: usize, history: PortStats) -> Self {
        let history = Mutex::new(history);
        Self { workers: (0..workers.max(1)).map(|_| CachePadded::default()).collect(), history }
    }

    /// Adds what the port counted elsewhere.
    pub fn add_history(&self, more: &PortStats) {
        self.history.lock().merge(more);
    }

    #[inline]
    pub fn of(&self, worker: usize) -> &WorkerStats {
        &self.workers[worker % self.workers.len()]
    }

    pub fn sum(&self) -> PortStats {
        let mut s = self.history.lock().clone();
        self.workers.iter().for_each(|w| s.add(w));
        s
    }
}

/// Index of the size class of a frame of `len` bytes without frame check sequence.
#[inline]
pub(crate) fn size_class(len: usize) -> usize {
    match len + 4 {
        0..=64 => 0,
        65..=127 => 1,
        128..=255 => 2,
        256..=511 => 3,
        512..=1023 => 4,
        1024..=1518 => 5,
        _ => 6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_classes_match_their_bounds() {
        for len in 60..1600 {
            let class = SIZE_CLASSES.iter().position(|max| len + 4 <= *max).unwrap();
            assert_eq!(size_class(len), class, "length {len}");
        }
    }

    #[test]
    fn sums_span_workers_and_history() {
        let base = PortStats { rx_packets: 5, ..PortStats::default() };
        let c = StatsCell::new(2, base);
        c.of(0).rx_packets.add(1);
        c.of(1).rx_packets.add(2);
        assert_eq!(c.sum().rx_packets, 8);
    }
}

//! Rate limits: token buckets on the switch's clock.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::clock::{Nanos, SECOND};

/// A rate limit. Limits that are absent do not limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MeterConfig {
    /// Kilobits a second.
    pub kbps: Option<u64>,
    /// Kilobits that may pass at once after a pause; absent: a tenth of a second's worth.
    pub burst_kb: Option<u64>,
    /// Packets a second.
    pub pps: Option<u64>,
    /// Packets that may pass at once after a pause; absent: a tenth of a second's worth, one at least.
    pub burst_packets: Option<u64>,
}

/// A running rate limit.
#[derive(Debug)]
pub struct Meter {
    config: MeterConfig,
    bucket: Mutex<Buckets>,
    dropped: AtomicU64,
    passed: AtomicU64,
}

/// Tokens in billionths of a bit and of a packet, so that slow rates lose nothing to rounding.
#[derive(Debug, Default)]
struct Buckets {
    bits: u128,
    packets: u128,
    filled: Nanos,
    started: bool,
}

impl Meter {
    /// A limit whose buckets are full.
    pub fn new(config: MeterConfig) -> Self {
        Self { config, bucket: Mutex::default(), dropped: AtomicU64::new(0), passed: AtomicU64::new(0) }
    }

    /// The limit.
    pub fn config(&self) -> &MeterConfig {
        &self.config
    }

    /// Packets dropped.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Packets passed.
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }

    /// Whether a packet of `bytes` may pass now; if so it is paid for.
    pub fn allow(&self, bytes: usize, now: Nanos) -> bool {
        let c = &self.config;
        let bits_per_second = c.kbps.map(|k| u128::from(k) * 1000);
        let bits_max = c.burst_kb.map_or(bits_per_second.unwrap_or(0) / 10, |k| u128::from(k) * 1000);
        // One full frame must always fit, or nothing would ever pass.
        let bits_max = bits_max.max(bytes as u128 * 8) * u128::from(SECOND);
        let packets_max = c.burst_packets.or(c.pps.map(|p| p / 10)).unwrap_or(0).max(1);
        let packets_max = u128::from(packets_max) * u128::from(SECOND);
        let mut b = self.bucket.lock();
        if b.started {
            let dt = u128::from(now.saturating_sub(b.filled));
            b.bits = (b.bits + bits_per_second.unwrap_or(0) * dt).min(bits_max);
            b.packets = (b.packets + u128::from(c.pps.unwrap_or(0)) * dt).min(packets_max);
        } else {
            *b = Buckets { bits: bits_max, packets: packets_max, filled: now, started: true };
        }
        b.filled = b.filled.max(now);
        let cost = bytes as u128 * 8 * u128::from(SECOND);
        let packet = u128::from(SECOND);
        let ok = (c.kbps.is_none() || b.bits >= cost) && (c.pps.is_none() || b.packets >= packet);
        if ok {
            b.bits = b.bits.saturating_sub(cost);
            b.packets = b.packets.saturating_sub(packet);
            self.passed.fetch_add(1, Ordering::Relaxed);
        } else {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        ok
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_over_time_and_the_burst_at_once() {
        let m = Meter::new(MeterConfig { kbps: Some(8000), burst_kb: Some(80), ..MeterConfig::default() });
        let mut now = 5 * SECOND;
        let at_once = (0..100).filter(|_| m.allow(1000, now)).count();
        assert_eq!(at_once, 10);
        let mut passed = 0;
        for _ in 0..10_000 {
            now += SECOND / 1000 / 10;
            passed += usize::from(m.allow(1000, now));
        }
        // One second at 8 Mbit/s is a thousand kilobytes.
        assert_eq!(passed, 1000);
        assert_eq!(m.passed() + m.dropped(), 10_100);
    }

    #[test]
    fn packets_are_limited_too() {
        let m = Meter::new(MeterConfig { pps: Some(100), ..MeterConfig::default() });
        assert_eq!((0..100).filter(|_| m.allow(60, SECOND)).count(), 10);
        assert_eq!((0..100).filter(|_| m.allow(60, 2 * SECOND)).count(), 10);
    }
}

//! Token buckets as times: instead of how many tokens there are, a bucket knows when it will be full again.

use crate::clock::Nanos;

/// Picoseconds on the switch's clock: at 400 Gbit/s the shortest frame lasts 1200.
pub(super) type Picos = u128;

/// Picoseconds in a nanosecond.
const PER_NANO: Picos = 1000;
const PER_SECOND: Picos = 1_000_000_000_000;

/// The same time in picoseconds.
pub(super) fn picos(t: Nanos) -> Picos {
    Picos::from(t) * PER_NANO
}

/// The same time in nanoseconds, rounded up.
pub(super) fn nanos(t: Picos) -> Nanos {
    Nanos::try_from(t.div_ceil(PER_NANO)).unwrap_or(Nanos::MAX)
}

/// See the module's documentation. A bucket that is not empty lets a frame through; what the frame takes beyond its
/// content is a debt.
#[derive(Clone, Debug)]
pub(super) struct Bucket {
    bits_per_second: u128,
    /// How long it takes to fill the empty bucket.
    depth: Picos,
    /// When it is full.
    full: Picos,
}

impl Bucket {
    /// A full bucket.
    pub fn new(kbps: u64, depth: Picos) -> Self {
        Self { bits_per_second: u128::from(kbps.max(1)) * 1000, depth: depth.max(1), full: 0 }
    }

    /// Whether it is not empty.
    pub fn is_open(&self, now: Picos) -> bool {
        self.full < now + self.depth
    }

    /// From when on it is not empty.
    pub fn opens_at(&self) -> Picos {
        (self.full + 1).saturating_sub(self.depth)
    }

    /// Takes out the tokens of a frame.
    pub fn charge(&mut self, bytes: usize, now: Picos) {
        // Rounded up, so that the rate is never exceeded.
        let lasts = (bytes as u128 * 8 * PER_SECOND).div_ceil(self.bits_per_second);
        self.full = self.full.max(now) + lasts;
    }
}

/// How long a number of kilobits lasts at a rate.
pub(super) fn duration(kilobits: u64, kbps: u64) -> Picos {
    u128::from(kilobits) * PER_SECOND / u128::from(kbps.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SECOND;

    #[test]
    fn a_bucket_opens_at_the_time_it_says() {
        // 1 Mbit/s, 1000 bits deep.
        let mut b = Bucket::new(1000, duration(1, 1000));
        let now = picos(5 * SECOND);
        assert!(b.is_open(now));
        b.charge(100, now);
        assert!(b.is_open(now), "200 bits are left");
        b.charge(1000, now);
        assert!(!b.is_open(now));
        // The debt of 7800 bits lasts 7.8 ms.
        assert_eq!(nanos(b.opens_at()), 5 * SECOND + 7_800_001);
        assert!(!b.is_open(b.opens_at() - 1) && b.is_open(b.opens_at()));
    }
}

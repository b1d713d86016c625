//! Random sampling of packets.

use std::hash::{BuildHasher, RandomState};

use super::Output;
use crate::clock::Nanos;
use crate::packet::key::{Field, FlowKey};
use crate::port::PortId;

/// What a sample is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// A flow record.
    Flows,
    /// An sFlow datagram.
    Sflow,
}

/// One sampled packet.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub purpose: Use,
    pub at: Nanos,
    pub in_port: PortId,
    pub output: Output,
    /// Length of the frame.
    pub length: usize,
    /// Its first bytes.
    pub header: Vec<u8>,
    pub key: FlowKey,
}

impl Sample {
    pub fn tcp_flags(&self) -> u16 {
        self.key.get64(Field::TcpFlags) as u16
    }
}

/// Chooses one packet in `rate` at random.
#[derive(Debug)]
pub(crate) struct Sampler {
    pub purpose: Use,
    /// Bytes of the frame that are kept.
    pub header: usize,
    rate: u32,
    /// Packets to pass until the next sample.
    left: u64,
    random: u64,
}

impl Sampler {
    pub fn new(purpose: Use, rate: u32, header: usize) -> Self {
        let mut s = Self {
            purpose,
            header,
            rate: rate.max(1),
            left: 0,
            random: RandomState::new().hash_one(rate) | 1,
        };
        s.left = s.skip();
        s
    }

    /// Packets between two samples: evenly spread, `rate` on average, so that no regular pattern escapes.
    fn skip(&mut self) -> u64 {
        // Marsaglia's xorshift.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % (2 * u64::from(self.rate) - 1)
    }

    /// The place of the next sample among the packets `from..n` of a burst.
    #[inline]
    pub fn next(&mut self, from: usize, n: usize) -> Option<usize> {
        let rest = (n - from) as u64;
        if self.left >= rest {
            self.left -= rest;
            return None;
        }
        let at = from + self.left as usize;
        self.left = self.skip();
        Some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_is_the_rate() {
        for rate in [1, 2, 10, 100] {
            let mut s = Sampler::new(Use::Sflow, rate, 128);
            let (mut samples, bursts) = (0u32, 20_000 * rate / 32 + 1);
            for _ in 0..bursts {
                let mut from = 0;
                while let Some(at) = s.next(from, 32) {
                    assert!((from..32).contains(&at));
                    samples += 1;
                    from = at + 1;
                }
            }
            let expected = f64::from(bursts * 32) / f64::from(rate);
            // Twenty thousand draws: a tenth is more than ten deviations.
            assert!(
                (f64::from(samples) - expected).abs() < expected / 10.0,
                "{rate}: {samples} of {expected}"
            );
        }
    }
}

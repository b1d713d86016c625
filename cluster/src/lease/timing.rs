//! The timers of a lockspace, all derived from the I/O timeout and the watchdog.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::mutants::{self, Mutant};
use crate::types::Millis;

/// I/O timeout and watchdog timeout; every other timer follows from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct Timing {
    /// How long one lease I/O may take, in seconds.
    pub io_timeout: u16,
    /// How long after its last feeding the watchdog resets the host, in seconds.
    pub watchdog: u16,
}

impl Default for Timing {
    /// 10 s and 60 s: a dead-time of 140 s.
    fn default() -> Self {
        Timing { io_timeout: 10, watchdog: 60 }
    }
}

impl Timing {
    /// The I/O timeout.
    pub fn io(self) -> Millis {
        u64::from(self.io_timeout) * 1000
    }

    /// The watchdog timeout.
    pub fn watchdog(self) -> Millis {
        u64::from(self.watchdog) * 1000
    }

    /// The holder renews this often.
    pub fn renew(self) -> Millis {
        2 * self.io()
    }

    /// The holder warns after this long without a successful renewal.
    pub fn warn(self) -> Millis {
        6 * self.io()
    }

    /// The lease has expired after this long without a successful renewal; its users must stop.
    pub fn fail(self) -> Millis {
        8 * self.io()
    }

    /// A host whose sector did not change for this long, seen by others, is dead.
    pub fn dead(self) -> Millis {
        if mutants::active(Mutant::DeadTimeWithoutWatchdog) {
            return self.fail();
        }
        self.fail() + self.watchdog()
    }

    /// How much earlier than [`Timing::fail`] the holder stops trusting its lease, so that clocks that
    /// drift and a watchdog that fires a little late stay within the dead-time.
    pub fn margin(self) -> Millis {
        self.dead() / 20
    }

    /// How long after its submission a write whose outcome is unknown may still reach the disk.
    pub fn drain(self) -> Millis {
        2 * self.io()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_dead_times() {
        for (io_timeout, watchdog, dead) in [(10, 60, 140), (5, 30, 70), (2, 10, 26)] {
            assert_eq!(Timing { io_timeout, watchdog }.dead(), dead * 1000);
        }
    }
}

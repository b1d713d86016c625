//! How often and how soon a VM is restarted.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::mutants::{self, Mutant};
use crate::types::{Millis, Time, VmId};

/// Limits of restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RestartConfig {
    /// A VM that fails this often within `window` is given up.
    pub limit: u32,
    /// The window of `limit`.
    pub window: Millis,
    /// The wait before the second restart; it doubles with each further one.
    pub backoff: Millis,
    /// The longest wait.
    pub longest: Millis,
    /// How many VMs may be starting on one host at once.
    pub parallel: u32,
}

impl Default for RestartConfig {
    fn default() -> Self {
        RestartConfig { limit: 5, window: 3_600_000, backoff: 10_000, longest: 300_000, parallel: 2 }
    }
}

/// When each VM failed.
#[derive(Clone, Debug, Default)]
pub struct RestartHistory {
    failures: BTreeMap<VmId, Vec<Time>>,
}

impl RestartHistory {
    /// Notes a failure; false when the VM has to be given up.
    pub fn note(&mut self, now: Time, vm: VmId, config: &RestartConfig) -> bool {
        let list = self.failures.entry(vm).or_default();
        list.retain(|t| now.since(*t) < config.window);
        list.push(now);
        list.len() <= config.limit as usize || mutants::active(Mutant::NoRestartLimit)
    }

    /// When the VM may be started again.
    pub fn earliest(&self, vm: VmId, config: &RestartConfig) -> Time {
        let Some((last, count)) = self.failures.get(&vm).and_then(|l| Some((*l.last()?, l.len()))) else {
            return Time(0);
        };
        if count < 2 || mutants::active(Mutant::NoRestartLimit) {
            return last;
        }
        let factor = 1u64.checked_shl(count as u32 - 2).unwrap_or(u64::MAX);
        last + config.backoff.saturating_mul(factor).min(config.longest)
    }

    /// Forgets a VM.
    pub fn forget(&mut self, vm: VmId) {
        self.failures.remove(&vm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_wait_longer_each_time_and_end() {
        let (mut h, c, vm) = (RestartHistory::default(), RestartConfig::default(), VmId(1));
        assert_eq!(h.earliest(vm, &c), Time(0));
        let waits: Vec<u64> = (0..5)
            .map(|_| {
                assert!(h.note(Time(1000), vm, &c));
                h.earliest(vm, &c).0 - 1000
            })
            .collect();
        assert_eq!(waits, [0, 10_000, 20_000, 40_000, 80_000]);
        assert!(!h.note(Time(1000), vm, &c));
        assert!(h.note(Time(1000 + c.window), vm, &c), "failures are forgotten after the window");
    }
}

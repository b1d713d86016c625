//! What a guest knows of its processors: where it moves to it must find as much.

use serde::{Deserialize, Serialize};

/// The words of CPUID that hold feature flags (leaf, sub-leaf, register: 0 for EAX to 3 for EDX), and which bits of them
/// say something else: what the guest itself switched on, or how many processors there are.
const WORDS: [(u32, u32, u8, u32); 10] = [
    (1, 0, 2, 1 << 27 | 1 << 31),
    (1, 0, 3, 1 << 28),
    (7, 0, 1, 0),
    (7, 0, 2, 1 << 4),
    (7, 0, 3, 0),
    (7, 1, 0, 0),
    (0xd, 0, 0, 0),
    (0xd, 1, 0, 0),
    (0x8000_0001, 0, 2, 1 << 1),
    (0x8000_0001, 0, 3, 0),
];

/// A register of CPUID with feature flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureWord {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input.
    pub subleaf: u32,
    /// The register on output: 0 for EAX to 3 for EDX.
    pub register: u8,
    /// The flags.
    pub bits: u32,
}

impl std::fmt::Display for FeatureWord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let register = ["EAX", "EBX", "ECX", "EDX"].get(usize::from(self.register)).unwrap_or(&"?");
        write!(f, "{:#x}.{}:{register} {:#x}", self.leaf, self.subleaf, self.bits)
    }
}

/// Processor features and the frequency of the time-stamp counter. The processor's vendor and model are not part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuProfile {
    /// Frequency of the time-stamp counter in kHz.
    pub tsc_khz: u32,
    /// The words with feature flags.
    pub features: Vec<FeatureWord>,
}

impl CpuProfile {
    /// A profile with the flags that `cpuid` (leaf and sub-leaf to EAX, EBX, ECX, EDX) shows.
    pub(super) fn new(tsc_khz: u32, cpuid: impl Fn(u32, u32) -> [u32; 4]) -> Self {
        let word = |(leaf, subleaf, register, other): (u32, u32, u8, u32)| FeatureWord {
            leaf,
            subleaf,
            register,
            bits: cpuid(leaf, subleaf)[usize::from(register)] & !other,
        };
        Self { tsc_khz, features: WORDS.into_iter().map(word).collect() }
    }

    /// The flags that `needed` has and this profile lacks.
    pub fn lacks(&self, needed: &Self) -> Vec<FeatureWord> {
        let has = |word: &FeatureWord| {
            let same = |w: &&FeatureWord| {
                (w.leaf, w.subleaf, w.register) == (word.leaf, word.subleaf, word.register)
            };
            self.features.iter().find(same).map_or(0, |w| w.bits)
        };
        let missing = |word: &FeatureWord| FeatureWord { bits: word.bits & !has(word), ..*word };
        needed.features.iter().map(missing).filter(|word| word.bits != 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_missing_features_are_named() {
        let old = CpuProfile::new(1, |leaf, _| if leaf == 1 { [0, 0, 0b11, 1] } else { [0; 4] });
        let new = CpuProfile::new(1, |leaf, _| if leaf == 1 { [0, 0, 0b111, 1] } else { [0; 4] });
        assert_eq!(new.lacks(&old), []);
        let missing = old.lacks(&new);
        assert_eq!(missing, [FeatureWord { leaf: 1, subleaf: 0, register: 2, bits: 0b100 }]);
        assert_eq!(missing[0].to_string(), "0x1.0:ECX 0x4");
        let started = CpuProfile::new(1, |leaf, _| if leaf == 1 { [0, 0, 1 << 27, 1 << 28] } else { [0; 4] });
        assert_eq!(old.lacks(&started), [], "what the guest switched on is no feature");
    }
}

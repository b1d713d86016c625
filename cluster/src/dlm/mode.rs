//! The six modes.

use serde::{Deserialize, Serialize};

/// How a name is locked, from the weakest to the strongest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// No access; keeps the name and its value alive.
    Null,
    /// Read while others may write.
    ConcurrentRead,
    /// Write while others may write.
    ConcurrentWrite,
    /// Read while nobody writes.
    ProtectedRead,
    /// Write while nobody else does; others may read concurrently.
    ProtectedWrite,
    /// Alone.
    Exclusive,
}

impl Mode {
    /// Every mode.
    pub const ALL: [Mode; 6] = [
        Mode::Null,
        Mode::ConcurrentRead,
        Mode::ConcurrentWrite,
        Mode::ProtectedRead,
        Mode::ProtectedWrite,
        Mode::Exclusive,
    ];

    /// The modes that may be granted beside this one, a bit each.
    const fn beside(self) -> u8 {
        // From bit 0: Null, CR, CW, PR, PW, EX.
        match self {
            Mode::Null => 0b11_1111,
            Mode::ConcurrentRead => 0b01_1111,
            Mode::ConcurrentWrite => 0b00_0111,
            Mode::ProtectedRead => 0b00_1011,
            Mode::ProtectedWrite => 0b00_0011,
            Mode::Exclusive => 0b00_0001,
        }
    }

    /// Whether two hosts may have these modes at once.
    pub fn is_compatible(self, other: Mode) -> bool {
        self.beside() >> other as u8 & 1 == 1
    }

    /// Whether a change to `other` can hurt nobody: it allows at least what this mode allows beside it.
    pub fn allows_all_of(self, other: Mode) -> bool {
        self.beside() & !other.beside() == 0
    }

    /// The strongest mode that both allow: what may be relied on during a conversion from one to the other.
    pub fn meet(self, other: Mode) -> Mode {
        let weaker = |m: &Mode| self.allows_all_of(*m) && other.allows_all_of(*m);
        Mode::ALL.into_iter().rev().find(weaker).unwrap_or(Mode::Null)
    }

    /// Whether the value block may be written in this mode.
    pub fn writes_value(self) -> bool {
        matches!(self, Mode::ProtectedWrite | Mode::Exclusive)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_compatible_modes() {
        let rows = ["yyyyyy", "yyyyyn", "yyynnn", "yynynn", "yynnnn", "ynnnnn"];
        for (a, row) in Mode::ALL.into_iter().zip(rows) {
            for (b, want) in Mode::ALL.into_iter().zip(row.chars()) {
                assert_eq!(a.is_compatible(b), want == 'y', "{a:?} beside {b:?}");
                assert_eq!(a.is_compatible(b), b.is_compatible(a));
            }
        }
    }

    #[test]
    fn what_hurts_nobody_is_a_weaker_mode_but_not_cw_for_pr() {
        use Mode::*;
        assert!(Exclusive.allows_all_of(ProtectedWrite) && ProtectedWrite.allows_all_of(Null));
        assert!(!ProtectedRead.allows_all_of(ConcurrentWrite));
        assert!(!ConcurrentWrite.allows_all_of(ProtectedRead));
        assert!(!Null.allows_all_of(ConcurrentRead) && Null.allows_all_of(Null));
        assert_eq!(ProtectedRead.meet(ConcurrentWrite), ConcurrentRead);
        assert_eq!((Exclusive.meet(ProtectedRead), Null.meet(Exclusive)), (ProtectedRead, Null));
    }
}

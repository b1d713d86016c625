//! Where a packed ring stands whose device died.
//!
//! Its last note says where it stood before the batch that it may have been giving back. What it gave back since then
//! follows, and is marked as used, with all of its descriptors. The driver may have reused some of it, from the note on:
//! then it has made everything else available, and such descriptors are available in the next lap already.
//!
//! Of a packet in several buffers the last were given back first. A successor cannot use them again, so it completes the
//! packet, which is all there: each buffer but the last is full.

use super::{AVAIL, PackedRing, Position, USED, Used};
use crate::port::vhost::memory::GuestMemory;

/// What became of a descriptor, in the lap of a position.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// It was not made available yet.
    Before,
    Available,
    Used,
    /// It is available again, in the next lap; or was in the lap before, as part of a chain that a device gave back
    /// without marking all of it.
    Reused,
}

impl PackedRing {
    fn state(&self, at: Position) -> State {
        let flags = self.descriptor(at.index).flags & (AVAIL | USED);
        match if at.wrap { flags } else { flags ^ (AVAIL | USED) } {
            0 => State::Before,
            AVAIL => State::Available,
            USED => State::Reused,
            _ => State::Used,
        }
    }

    /// Where a device has got to whose last note is `noted`.
    pub(super) fn recover(&mut self, memory: &GuestMemory, noted: Position) -> Position {
        let reused = self.state(noted) == State::Reused;
        let (mut at, mut left) = (noted, self.size);
        while left > 0 {
            let passed = match self.state(at) {
                State::Used => 1,
                State::Reused if reused => 1,
                State::Available => match self.complete_packet(memory, at, left) {
                    0 => return at,
                    n => n,
                },
                // A driver that comes round has made everything available: these are remains of the lap before.
                State::Before if reused => return noted,
                State::Before | State::Reused => return at,
            };
            at = at.advanced(passed, self.size);
            left -= passed;
        }
        at
    }

    /// Gives back the first buffers of a packet whose last ones were, if one begins at a place; returns how many
    /// descriptors they take, of `left` at most.
    fn complete_packet(&mut self, memory: &GuestMemory, at: Position, left: u16) -> u16 {
        let (mut missing, mut count, mut place) = (Vec::new(), 0, at);
        while count < left && self.state(place) == State::Available {
            self.segments.clear();
            // What is wrong with a chain is found when it is taken.
            let Ok(Some(chain)) = self.walk(memory, place, true) else { return 0 };
            let capacity = self.segments.iter().map(|s| s.len).sum::<usize>();
            let Ok(len) = u32::try_from(capacity) else { return 0 };
            if chain.count > left - count {
                return 0;
            }
            count += chain.count;
            place = place.advanced(chain.count, self.size);
            missing.push(Used { chain, len, more: true });
        }
        if count == left || self.state(place) != State::Used {
            return 0;
        }
        missing.iter().rev().for_each(|u| self.give_back(memory, u));
        count
    }
}

//! One host's side of one Disk Paxos ballot, as pure decisions over the blocks that it read.

use crate::mutants::{self, Mutant};
use crate::ondisk::{DBlock, HostBlock};
use crate::types::{HostId, Incarnation, MAX_HOSTS};

/// What the host does next after reading everyone's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Write the own block with this content.
    Write(DBlock),
    /// The owner of this version is chosen.
    Chosen(DBlock),
    /// Another host is ahead: start over from the leader record.
    Restart,
}

/// Which version to vote on: the one after the leader's, or a later one that a block already knows.
///
/// A leader record can be older than the blocks when a late write of a former life landed on it.
pub(super) fn target_version(leader_lver: u64, blocks: &[HostBlock]) -> u64 {
    let top = blocks.iter().map(|b| b.paxos.lver).max().unwrap_or(0);
    if top <= leader_lver {
        return leader_lver + 1;
    }
    let released = blocks.iter().any(|b| b.paxos.lver == top && b.paxos.released);
    if released { top + 1 } else { top }
}

/// The block that opens a ballot of `me` for `lver`: a promise above every ballot seen.
pub(super) fn open(me: HostId, lver: u64, blocks: &[HostBlock]) -> DBlock {
    let own = own_block(me, blocks);
    let top = blocks.iter().filter(|b| b.paxos.lver == lver).map(|b| b.paxos.mbal).max().unwrap_or(0);
    let step = u64::from(MAX_HOSTS);
    let mbal = u64::from(me.0) + (top / step + u64::from(top > 0)) * step;
    if own.lver == lver {
        DBlock { mbal, released: false, ..own }
    } else {
        DBlock { mbal, lver, ..DBlock::default() }
    }
}

fn own_block(me: HostId, blocks: &[HostBlock]) -> DBlock {
    blocks.get(usize::from(me.0) - 1).map(|b| b.paxos).unwrap_or_default()
}

fn overtaken(me: HostId, mine: &DBlock, blocks: &[HostBlock]) -> bool {
    blocks.iter().enumerate().any(|(i, b)| {
        i + 1 != usize::from(me.0)
            && (b.paxos.lver > mine.lver
                || (b.paxos.lver == mine.lver && (b.paxos.mbal > mine.mbal || b.paxos.released)))
    }) || own_block(me, blocks) != *mine
}

/// After the first phase: adopt the value of the highest accepted ballot, or propose `wish`.
pub(super) fn after_first(
    me: HostId,
    mine: DBlock,
    wish: Incarnation,
    wish_timestamp: u64,
    blocks: &[HostBlock],
) -> Verdict {
    if overtaken(me, &mine, blocks) {
        return Verdict::Restart;
    }
    let accepted = blocks
        .iter()
        .map(|b| b.paxos)
        .filter(|p| p.lver == mine.lver && p.bal > 0 && !mutants::active(Mutant::BallotIgnoresAccepted))
        .max_by_key(|p| p.bal);
    let (input, input_timestamp) = accepted.map_or((wish, wish_timestamp), |p| (p.input, p.input_timestamp));
    Verdict::Write(DBlock { bal: mine.mbal, input, input_timestamp, ..mine })
}

/// After the second phase: the value is chosen unless somebody promised a higher ballot.
pub(super) fn after_second(me: HostId, mine: DBlock, blocks: &[HostBlock]) -> Verdict {
    if overtaken(me, &mine, blocks) && !mutants::active(Mutant::NoSecondPhaseCheck) {
        Verdict::Restart
    } else {
        Verdict::Chosen(mine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(lver: u64, mbal: u64, bal: u64, owner: u16) -> HostBlock {
        let input = Incarnation { host: HostId(owner), generation: 1 };
        HostBlock {
            paxos: DBlock { lver, mbal, bal, input, input_timestamp: 1, released: false },
            ..Default::default()
        }
    }

    #[test]
    fn versions_follow_the_leader_or_the_blocks_that_know_more() {
        assert_eq!(target_version(4, &[block(4, 1, 1, 1)]), 5);
        assert_eq!(target_version(4, &[block(6, 1, 1, 1)]), 6);
        let mut released = block(6, 1, 1, 1);
        released.paxos.released = true;
        assert_eq!(target_version(4, &[released]), 7);
    }

    #[test]
    fn the_highest_numbers_of_a_disk_have_successors() {
        let highest = u64::MAX / 2;
        let mut block = block(highest, highest, 1, 1);
        assert_eq!(target_version(highest, &[block]), highest + 1);
        assert!(open(HostId(2000), highest, &[block]).mbal > highest);
        block.paxos.released = true;
        assert_eq!(target_version(4, &[block]), highest + 1);
    }

    #[test]
    fn ballots_rise_and_stay_distinct() {
        let blocks = [block(5, 2001, 0, 1), block(5, 2, 0, 2)];
        let a = open(HostId(1), 5, &blocks);
        let b = open(HostId(2), 5, &blocks);
        assert!(a.mbal > 2001 && b.mbal > 2001 && a.mbal != b.mbal);
        assert_eq!(a.mbal % u64::from(MAX_HOSTS), 1);
    }

    #[test]
    fn an_accepted_value_is_adopted_and_a_higher_promise_wins() {
        let me = HostId(1);
        let wish = Incarnation { host: me, generation: 3 };
        let mine = DBlock { mbal: 2001, lver: 5, ..Default::default() };
        let own = HostBlock { paxos: mine, ..Default::default() };
        let Verdict::Write(w) = after_first(me, mine, wish, 9, &[own, block(5, 2, 2, 2)]) else { panic!() };
        assert_eq!(w.input.host, HostId(2));
        let Verdict::Write(w) = after_first(me, mine, wish, 9, &[own, block(5, 2, 0, 0)]) else { panic!() };
        assert_eq!((w.input, w.bal), (wish, 2001));
        assert_eq!(after_first(me, mine, wish, 9, &[own, block(5, 4002, 0, 0)]), Verdict::Restart);
        assert_eq!(after_first(me, mine, wish, 9, &[own, block(6, 2, 0, 0)]), Verdict::Restart);
        // A late write clobbered our own promise.
        assert_eq!(after_first(me, mine, wish, 9, &[block(5, 1, 0, 0)]), Verdict::Restart);
    }
}

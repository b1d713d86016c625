//! A host's sector of a resource area: its Disk Paxos block and its mode block.

use super::{LayoutError, checksum, get_rising, get_u32, get_u64, put_u32, put_u64};
use crate::types::{Generation, Incarnation};

const CHECKSUM_AT: usize = 48;
const FLAGS_AT: usize = 52;
const MODE_AT: usize = 128;
const RELEASED: u32 = 1;
const SHARED: u32 = 1;

/// What one host has promised and accepted in the ballot for one lease version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DBlock {
    /// The highest ballot that the host has promised.
    pub mbal: u64,
    /// The ballot in which it accepted `input`; zero when none.
    pub bal: u64,
    /// The accepted owner.
    pub input: Incarnation,
    /// The accepted owner's clock in seconds.
    pub input_timestamp: u64,
    /// The lease version that the ballot is for.
    pub lver: u64,
    /// The host owned `lver` and has released it.
    pub released: bool,
}

/// Whether a host holds the lease shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ModeBlock {
    /// The host holds the lease shared.
    pub shared: bool,
    /// The generation of the host that set `shared`.
    pub generation: Generation,
}

/// The two blocks of a host's sector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HostBlock {
    /// The Paxos block.
    pub paxos: DBlock,
    /// The mode block.
    pub mode: ModeBlock,
}

impl HostBlock {
    /// Writes both blocks into the start of `sector`, zeroing the rest.
    pub fn encode(&self, sector: &mut [u8]) -> Result<(), LayoutError> {
        if sector.len() < 512 {
            return Err(LayoutError::Truncated);
        }
        sector.fill(0);
        let (b, p) = (sector, &self.paxos);
        put_u64(b, 0, p.mbal);
        put_u64(b, 8, p.bal);
        put_u64(b, 16, u64::from(p.input.host.0));
        put_u64(b, 24, p.input.generation);
        put_u64(b, 32, p.input_timestamp);
        put_u64(b, 40, p.lver);
        if *p != DBlock::default() {
            let sum = checksum(&b[..CHECKSUM_AT]);
            put_u32(b, CHECKSUM_AT, sum);
        }
        put_u32(b, FLAGS_AT, if p.released { RELEASED } else { 0 });
        put_u32(b, MODE_AT, if self.mode.shared { SHARED } else { 0 });
        put_u64(b, MODE_AT + 8, self.mode.generation);
        Ok(())
    }

    /// Reads both blocks, checking that the ballot and the version can rise. A sector of zeros is a host that never took
    /// part.
    pub fn decode(b: &[u8]) -> Result<Self, LayoutError> {
        if b.len() < 512 {
            return Err(LayoutError::Truncated);
        }
        let found = get_u32(b, CHECKSUM_AT);
        let blank = found == 0 && b[..CHECKSUM_AT].iter().all(|x| *x == 0);
        let expected = checksum(&b[..CHECKSUM_AT]);
        if !blank && found != expected {
            return Err(LayoutError::Checksum { found, expected });
        }
        let host = u16::try_from(get_u64(b, 16)).unwrap_or(u16::MAX);
        Ok(HostBlock {
            paxos: DBlock {
                mbal: get_rising(b, 0)?,
                bal: get_u64(b, 8),
                input: Incarnation { host: crate::types::HostId(host), generation: get_u64(b, 24) },
                input_timestamp: get_u64(b, 32),
                lver: get_rising(b, 40)?,
                released: get_u32(b, FLAGS_AT) & RELEASED != 0,
            },
            mode: ModeBlock {
                shared: get_u32(b, MODE_AT) & SHARED != 0,
                generation: get_u64(b, MODE_AT + 8),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::HIGHEST;
    use super::*;
    use crate::types::HostId;

    #[test]
    fn blocks_survive_the_disk_and_damage_is_seen() {
        let block = HostBlock {
            paxos: DBlock {
                mbal: 2003,
                bal: 2003,
                input: Incarnation { host: HostId(3), generation: 7 },
                input_timestamp: 99,
                lver: 5,
                released: true,
            },
            mode: ModeBlock { shared: true, generation: 7 },
        };
        let mut buf = vec![0; 512];
        block.encode(&mut buf).unwrap();
        assert_eq!(HostBlock::decode(&buf).unwrap(), block);
        buf[9] ^= 4;
        assert!(HostBlock::decode(&buf).is_err());
        assert_eq!(HostBlock::decode(&[0; 512]).unwrap(), HostBlock::default());
        assert!(HostBlock::decode(&[0; 60]).is_err());
    }

    #[test]
    fn a_ballot_or_version_that_cannot_rise_is_refused() {
        let read = |paxos: DBlock| {
            let mut buf = [0; 512];
            HostBlock { paxos, ..HostBlock::default() }.encode(&mut buf).unwrap();
            HostBlock::decode(&buf).map(drop)
        };
        for number in [HIGHEST + 1, u64::MAX] {
            assert_eq!(read(DBlock { mbal: number, ..DBlock::default() }), Err(LayoutError::Number(number)));
            assert_eq!(read(DBlock { lver: number, ..DBlock::default() }), Err(LayoutError::Number(number)));
        }
        assert_eq!(read(DBlock { mbal: HIGHEST, lver: HIGHEST, ..DBlock::default() }), Ok(()));
    }
}

//! Any sector as a lease record, as it is and with the checksum that it needs: decoding gives a record that encodes to
//! itself, or an error.
#![no_main]

use cluster::ondisk::{Geometry, HostBlock, LeaderRecord};
use fuzz::reached;
use libfuzzer_sys::fuzz_target;

/// Bytes that the checksums of a host's block and of a leader record cover; the checksum follows.
const BLOCK: usize = 48;
const LEADER: usize = 168;

fn sealed(sector: &[u8], covered: usize) -> Vec<u8> {
    let mut sealed = sector.to_vec();
    if let Some((head, rest)) = sealed.split_at_mut_checked(covered)
        && let Some(sum) = rest.first_chunk_mut::<4>()
    {
        *sum = (!crc32c::crc32c_append(1, head)).to_le_bytes();
    }
    sealed
}

fuzz_target!(|sector: &[u8]| {
    for bytes in [sector, &sealed(sector, BLOCK)] {
        if let Ok(block) = HostBlock::decode(bytes) {
            reached("host-block");
            let mut again = vec![0; bytes.len()];
            block.encode(&mut again).expect("what was decoded can be encoded");
            assert_eq!(HostBlock::decode(&again).expect("decode"), block);
        }
    }
    for bytes in [sector, &sealed(sector, LEADER)] {
        if let Ok(record) = LeaderRecord::decode(bytes) {
            reached("leader");
            let mut again = [0; 512];
            record.encode(Geometry::S512, &mut again).expect("what was decoded can be encoded");
            assert_eq!(LeaderRecord::decode(&again).expect("decode"), record);
            let _ = format!("{} {}", record.space_name, record.resource_name);
        }
    }
});

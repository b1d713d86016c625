//! Any sector as a lease record: decoding gives a record that encodes to itself, or an error.
#![no_main]

use cluster::ondisk::{HostBlock, LeaderRecord};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|sector: &[u8]| {
    if let Ok(block) = HostBlock::decode(sector) {
        let mut again = vec![0; sector.len()];
        block.encode(&mut again).expect("what was decoded can be encoded");
        assert_eq!(HostBlock::decode(&again).expect("decode"), block);
    }
    let _ = LeaderRecord::decode(sector);
});

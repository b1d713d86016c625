//! How large the file of an image will be.

use crate::disk::Preallocation;
use crate::{CreateOptions, Disk, Format, Result, Source};

/// Sizes of a file in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Measure {
    /// With what the source holds now.
    pub required: u64,
    /// With every byte of the disk written.
    pub fully_allocated: u64,
}

/// Measures an image that [`convert`](super::convert) would make of `source` without compression.
pub fn measure(source: &Disk, create: &CreateOptions) -> Result<Measure> {
    let size = source.size();
    if create.format != Format::Qcow2 {
        return Ok(Measure { required: size, fully_allocated: size });
    }
    let cluster = create.qcow2.cluster();
    let all = size.div_ceil(cluster);
    let mut used = 0;
    let (mut at, mut counted_to) = (0, 0);
    while at < size {
        let (extent, _) = source.map(at, size - at)?;
        if matches!(extent.source, Source::Data { .. } | Source::Opaque { .. }) {
            let first = (at / cluster).max(counted_to);
            counted_to = (at + extent.len).div_ceil(cluster);
            used += counted_to.saturating_sub(first);
        }
        at += extent.len;
    }
    if create.preallocation != Preallocation::Off {
        used = all;
    }
    // QEMU counts the L2 tables of the whole disk, too: the image may grow to them without moving.
    let metadata = metadata_clusters(all, create);
    Ok(Measure { required: (metadata + used) * cluster, fully_allocated: (metadata + all) * cluster })
}

/// Clusters of header, L1 table, L2 tables, refcount table and blocks of a full image.
fn metadata_clusters(data: u64, create: &CreateOptions) -> u64 {
    let cluster = create.qcow2.cluster();
    let l2_entries = cluster / if create.qcow2.subclusters() { 16 } else { 8 };
    let l2 = data.div_ceil(l2_entries);
    let l1 = (l2 * 8).div_ceil(cluster);
    let per_block = cluster * 8 / u64::from(create.qcow2.refcount_bits);
    let fixed = 1 + l1 + l2 + data;
    let (mut blocks, mut table) = (1, 1);
    loop {
        let needed = (fixed + blocks + table).div_ceil(per_block);
        let table_needed = (needed * 8).div_ceil(cluster);
        if (needed, table_needed) == (blocks, table) {
            return 1 + l1 + l2 + blocks + table;
        }
        (blocks, table) = (needed.max(blocks), table_needed.max(table));
        if needed <= blocks && table_needed <= table && (fixed + blocks + table).div_ceil(per_block) <= blocks
        {
            return 1 + l1 + l2 + blocks + table;
        }
    }
}

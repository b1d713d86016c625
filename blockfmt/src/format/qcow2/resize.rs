//! Changing the size.

use super::Qcow2;
use super::header::MAX_L1_BYTES;
use crate::{Below, Error, Result};
use std::sync::atomic::Ordering;

impl Qcow2 {
    pub(super) fn resize_image(&self, size: u64, below: Below<'_>) -> Result<()> {
        let old = self.virtual_size();
        if self.data.is_some() && size > old {
            self.payload().truncate(size)?;
        }
        if size > old {
            self.grow_l1(size)?;
        } else if size < old {
            // What is cut must not come back when the disk grows again.
            let start = size.next_multiple_of(self.p.cluster);
            if start < old {
                let _pass = self.gate.enter();
                self.zero_guest(start, old - start, true, below)?;
            }
        }
        {
            let mut header = self.header.lock();
            header.size = size;
            self.write_header(&mut header)?;
        }
        self.size.store(size, Ordering::Release);
        if size > old {
            // Neither the rest of the last cluster nor a longer backing file may show in the new space.
            let deepest = below.size().max(old.next_multiple_of(self.p.cluster));
            let end = deepest.min(size);
            if end > old {
                let _pass = self.gate.enter();
                self.zero_guest(old, end - old, true, below)?;
            }
        }
        self.flush_all()
    }

    /// Moves the L1 table to a larger place if it is too small for a disk of `size` bytes.
    fn grow_l1(&self, size: u64) -> Result<()> {
        let shift = self.p.cluster_bits + self.p.l2_bits;
        let needed = size.div_ceil(1 << shift);
        let (old_len, old_offset) = {
            let header = self.header.lock();
            (u64::from(header.l1_size), header.l1_offset)
        };
        if needed <= old_len {
            return Ok(());
        }
        if needed * 8 > MAX_L1_BYTES {
            return Err(Error::InvalidOption(format!(
                "With clusters of {} bytes a disk has at most {} bytes",
                self.p.cluster,
                (MAX_L1_BYTES / 8) << shift
            )));
        }
        self.flush_all()?;
        let clusters = (needed * 8).div_ceil(self.p.cluster);
        let run = self.allocate_metadata(clusters)?;
        let offset = run.start << self.p.cluster_bits;
        let mut bytes = vec![0; (clusters * self.p.cluster) as usize];
        for index in 0..old_len as usize {
            bytes[index * 8..index * 8 + 8].copy_from_slice(&self.l1.get(index).to_be_bytes());
        }
        // Where nothing was ever written, there are zeros.
        let written = if run.fresh { old_len as usize * 8 } else { bytes.len() };
        self.storage.write_at(&bytes[..written], offset)?;
        // Refcounts and the new table are durable before the header points to it.
        self.write_back()?;
        let mut header = self.header.lock();
        (header.l1_offset, header.l1_size) = (offset, needed as u32);
        self.write_header(&mut header)?;
        self.storage.sync()?;
        if old_len > 0 {
            self.unlink(old_offset >> self.p.cluster_bits, (old_len * 8).div_ceil(self.p.cluster));
        }
        Ok(())
    }
}

//! Internal snapshots.
//!
//! A snapshot is a copy of the L1 table; the clusters below it are shared by refcount. While refcounts and
//! the "copied" flags of the tables disagree, version 3 images carry the dirty bit, so that whoever opens
//! the image after a crash rebuilds both.

use super::header::{be32, be64, incompatible};
use super::map::COMPRESSED;
use super::tables::{COPIED, OFFSET_MASK};
use super::walk::Reference;
use super::{Header, Qcow2};
use crate::{Error, Result};
use std::collections::{BTreeSet, HashMap};
use std::time::{SystemTime, UNIX_EPOCH};

/// Largest snapshot table in bytes.
const MAX_TABLE: u64 = 64 << 20;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Snapshot {
    /// Unique identifier.
    pub id: String,
    /// Name given by the user.
    pub name: String,
    /// Time of creation, seconds since 1970.
    pub date_sec: u32,
    /// Nanoseconds of the time of creation.
    pub date_nsec: u32,
    /// Running time of the guest at the snapshot, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Size of the saved machine state in bytes.
    pub vm_state_size: u64,
    /// Size of the disk at the snapshot, in bytes.
    pub disk_size: u64,
    #[serde(skip)]
    pub(super) l1_offset: u64,
    #[serde(skip)]
    pub(super) l1_size: u32,
    /// Extra data that this version does not know.
    #[serde(skip)]
    more: Vec<u8>,
}

impl Qcow2 {
    /// The snapshots, in order of their table.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        let header = self.header.lock().clone();
        self.read_snapshots(&header).map(|(list, _)| list)
    }

    /// The snapshots and the length of their table in bytes.
    pub(super) fn read_snapshots(&self, header: &Header) -> Result<(Vec<Snapshot>, u64)> {
        let mut out = Vec::new();
        let mut at = header.snapshots_offset;
        // Every L1 table has clusters of its own, so all of them fit into the file.
        let mut room = self.storage.length()?.next_multiple_of(self.p.cluster);
        for _ in 0..header.snapshot_count {
            let mut fixed = [0; 40];
            self.storage.read_at(&mut fixed, at)?;
            let (id_len, name_len) = (be32(&fixed, 12) >> 16, be32(&fixed, 12) & 0xffff);
            let extra_len = be32(&fixed, 36);
            if extra_len > 1024 {
                return Err(self.corrupt("a snapshot has too much extra data"));
            }
            let mut rest = vec![0; (extra_len + id_len + name_len) as usize];
            self.storage.read_at(&mut rest, at + 40)?;
            let (extra, names) = rest.split_at(extra_len as usize);
            let (id, name) = names.split_at(id_len as usize);
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            room = match room.checked_sub(u64::from(be32(&fixed, 8)) * 8) {
                Some(room) => room,
                None => return Err(self.corrupt("the L1 tables of its snapshots are too large")),
            };
            out.push(Snapshot {
                id: text(id),
                name: text(name),
                date_sec: be32(&fixed, 16),
                date_nsec: be32(&fixed, 20),
                vm_clock_nsec: be64(&fixed, 24),
                vm_state_size: if extra.len() >= 8 { be64(extra, 0) } else { be32(&fixed, 32).into() },
                disk_size: if extra.len() >= 16 { be64(extra, 8) } else { header.size },
                l1_offset: be64(&fixed, 0),
                l1_size: be32(&fixed, 8),
                more: extra.get(16..).unwrap_or_default().to_vec(),
            });
            at = (at + 40 + rest.len() as u64).next_multiple_of(8);
            if at - header.snapshots_offset > MAX_TABLE {
                return Err(self.corrupt("the snapshot table is too large"));
            }
        }
        Ok((out, at - header.snapshots_offset))
    }

    fn encode_snapshots(list: &[Snapshot]) -> Vec<u8> {
        let mut out = Vec::new();
        for s in list {
            out.extend_from_slice(&s.l1_offset.to_be_bytes());
            out.extend_from_slice(&s.l1_size.to_be_bytes());
            out.extend_from_slice(&(s.id.len() as u16).to_be_bytes());
            out.extend_from_slice(&(s.name.len() as u16).to_be_bytes());
            out.extend_from_slice(&s.date_sec.to_be_bytes());
            out.extend_from_slice(&s.date_nsec.to_be_bytes());
            out.extend_from_slice(&s.vm_clock_nsec.to_be_bytes());
            out.extend_from_slice(&u32::try_from(s.vm_state_size).unwrap_or(0).to_be_bytes());
            out.extend_from_slice(&(16 + s.more.len() as u32).to_be_bytes());
            out.extend_from_slice(&s.vm_state_size.to_be_bytes());
            out.extend_from_slice(&s.disk_size.to_be_bytes());
            out.extend_from_slice(&s.more);
            out.extend_from_slice(s.id.as_bytes());
            out.extend_from_slice(s.name.as_bytes());
            out.resize(out.len().next_multiple_of(8), 0);
        }
        out
    }

    /// Writes a new snapshot table and makes the header point to it; the old one is released.
    fn store_snapshots(&self, list: &[Snapshot]) -> Result<()> {
        let mut header = self.header.lock();
        let old = (header.snapshots_offset, self.read_snapshots(&header)?.1);
        let bytes = Self::encode_snapshots(list);
        let offset = match bytes.is_empty() {
            true => 0,
            false => {
                let run = self.allocate_metadata((bytes.len() as u64).div_ceil(self.p.cluster))?;
                let offset = run.start << self.p.cluster_bits;
                self.storage.write_at(&bytes, offset)?;
                offset
            }
        };
        drop(header);
        self.write_back()?;
        header = self.header.lock();
        (header.snapshots_offset, header.snapshot_count) = (offset, list.len() as u32);
        self.write_header(&mut header)?;
        self.storage.sync()?;
        if old.1 > 0 {
            self.unlink(old.0 >> self.p.cluster_bits, old.1.div_ceil(self.p.cluster));
        }
        Ok(())
    }

    /// Sets or clears the dirty bit (version 3 only) and makes it durable.
    pub(super) fn set_dirty(&self, dirty: bool) -> Result<()> {
        let mut header = self.header.lock();
        if header.version < 3 {
            return Ok(());
        }
        let bits = header.incompatible & !incompatible::DIRTY;
        header.incompatible = if dirty { bits | incompatible::DIRTY } else { bits };
        self.write_header(&mut header)?;
        self.storage.sync()
    }

    /// Runs `f` while nobody is inside of the image, everything is on the disk, and the dirty bit is set.
    fn exclusively<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        let _directory = self.use_bitmaps()?;
        if self.data.is_some() {
            return Err(Error::unsupported(&self.name, "snapshots with an external data file"));
        }
        self.close_image()?;
        let result = {
            let _closed = self.gate.close();
            self.write_back()?;
            self.set_dirty(true)?;
            let result = f()?;
            self.write_back()?;
            result
        };
        self.flush_all()?;
        self.set_dirty(false)?;
        Ok(result)
    }

    /// Takes a snapshot.
    pub fn create_snapshot(&self, name: &str) -> Result<Snapshot> {
        let mut list = self.snapshots()?;
        if list.iter().any(|s| s.name == name) {
            return Err(Error::Exists { what: "snapshot", name: name.into() });
        }
        if name.is_empty() || name.len() > 255 {
            return Err(Error::InvalidOption("A snapshot's name has 1 to 255 bytes".into()));
        }
        self.flush_all()?;
        self.check_room(&self.active_l1())?;
        self.exclusively(|| {
            let l1 = self.active_l1();
            let clusters = (l1.len() as u64 * 8).div_ceil(self.p.cluster).max(1);
            let run = self.allocate_metadata(clusters)?;
            let mut bytes: Vec<u8> = l1.iter().flat_map(|e| e.to_be_bytes()).collect();
            bytes.resize((clusters * self.p.cluster) as usize, 0);
            self.storage.write_at(&bytes, run.start << self.p.cluster_bits)?;
            self.count_tree(&l1, 1)?;
            self.update_flags()?;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let snapshot = Snapshot {
                id: unused_id(&list).to_string(),
                name: name.into(),
                date_sec: now.as_secs() as u32,
                date_nsec: now.subsec_nanos(),
                vm_clock_nsec: 0,
                vm_state_size: 0,
                disk_size: self.virtual_size(),
                l1_offset: run.start << self.p.cluster_bits,
                l1_size: l1.len() as u32,
                more: Vec::new(),
            };
            list.push(snapshot.clone());
            self.store_snapshots(&list)?;
            Ok(snapshot)
        })
    }

    /// The position of a snapshot by name or identifier.
    fn find_snapshot(&self, list: &[Snapshot], key: &str) -> Result<usize> {
        let by_name = list.iter().position(|s| s.name == key);
        by_name
            .or_else(|| list.iter().position(|s| s.id == key))
            .ok_or_else(|| Error::NotFound { what: "snapshot", name: key.into() })
    }

    /// Deletes a snapshot, named or identified by `key`.
    pub fn delete_snapshot(&self, key: &str) -> Result<()> {
        let mut list = self.snapshots()?;
        let snapshot = list.remove(self.find_snapshot(&list, key)?);
        self.exclusively(|| {
            self.store_snapshots(&list)?;
            let l1 = self.read_l1(snapshot.l1_offset, snapshot.l1_size)?;
            self.count_tree(&l1, -1)?;
            let clusters = (l1.len() as u64 * 8).div_ceil(self.p.cluster).max(1);
            self.unlink(snapshot.l1_offset >> self.p.cluster_bits, clusters);
            self.update_flags()
        })
    }

    /// Makes the disk what it was at a snapshot. Everything since is lost.
    pub fn revert_to_snapshot(&self, key: &str) -> Result<()> {
        let list = self.snapshots()?;
        let snapshot = &list[self.find_snapshot(&list, key)?];
        if snapshot.disk_size != self.virtual_size() {
            return Err(Error::unsupported(
                &self.name,
                "a snapshot of another disk size; resize the disk first",
            ));
        }
        self.check_room(&self.read_l1(snapshot.l1_offset, snapshot.l1_size)?)?;
        self.exclusively(|| {
            let old = self.active_l1();
            let mut new = self.read_l1(snapshot.l1_offset, snapshot.l1_size)?;
            if new.len() > old.len() {
                return Err(self.corrupt("a snapshot's L1 table is larger than the active one"));
            }
            new.resize(old.len(), 0);
            new.iter_mut().for_each(|e| *e &= OFFSET_MASK);
            self.count_tree(&new, 1)?;
            self.write_back()?;
            // Whatever becomes of the rest, this may change everything.
            self.record(0, self.virtual_size());
            let bytes: Vec<u8> = new.iter().flat_map(|e| e.to_be_bytes()).collect();
            self.storage.write_at(&bytes, self.header.lock().l1_offset)?;
            self.storage.sync()?;
            for (index, entry) in new.iter().enumerate() {
                self.l1.set(index, *entry);
            }
            self.cache.clear();
            self.compressed.forget();
            self.count_tree(&old, -1)?;
            self.update_flags()
        })
    }

    /// Fails if refcounts are too narrow for one more reference to everything below an L1 table, before any is changed.
    fn check_room(&self, l1: &[u64]) -> Result<()> {
        let max = self.refcounts.lock().max();
        if max >= u16::MAX.into() {
            return Ok(());
        }
        // Only compressed clusters share host clusters.
        let mut shared = HashMap::new();
        self.walk(l1, |reference| {
            let (clusters, compressed) = match reference {
                Reference::Table { entry, .. } => (self.host_clusters(entry), false),
                Reference::Payload { entry, .. } => (self.host_clusters(entry), entry & COMPRESSED != 0),
                Reference::Invalid { what } => return Err(self.corrupt(what)),
            };
            for cluster in clusters {
                let more = match compressed {
                    true => {
                        let references = shared.entry(cluster).or_insert(0);
                        *references += 1;
                        *references
                    }
                    false => 1,
                };
                if self.refcounts.lock().get(cluster)?.saturating_add(more) > max {
                    return Err(Error::unsupported(&self.name, format!("refcounts above {max}")));
                }
            }
            Ok(())
        })
    }

    /// Adds `delta` to the refcount of every cluster below an L1 table. Clusters that nobody refers to any
    /// more become free.
    fn count_tree(&self, l1: &[u64], delta: i64) -> Result<()> {
        self.walk(l1, |reference| {
            let clusters = match reference {
                Reference::Table { entry, .. } => {
                    let cluster = (entry & OFFSET_MASK) >> self.p.cluster_bits;
                    cluster..=cluster
                }
                Reference::Payload { entry, .. } => self.host_clusters(entry),
                Reference::Invalid { what } => return Err(self.corrupt(what)),
            };
            let mut refcounts = self.refcounts.lock();
            for cluster in clusters {
                if refcounts.add(cluster, delta)? == 0 {
                    refcounts.metadata.remove(&cluster);
                }
            }
            Ok(())
        })
    }

    /// Makes the "copied" flags of the active tables agree with the refcounts.
    pub(super) fn update_flags(&self) -> Result<()> {
        let mut changes = Vec::new();
        self.walk(&self.active_l1(), |reference| {
            let mut refcounts = self.refcounts.lock();
            match reference {
                Reference::Table { index, entry } => {
                    let cluster = (entry & OFFSET_MASK) >> self.p.cluster_bits;
                    let right = flagged(entry, refcounts.get(cluster)? == 1);
                    refcounts.metadata.insert(cluster);
                    if right != entry {
                        self.l1.set(index, right);
                        self.l1.dirty.lock().push(index);
                    }
                }
                Reference::Payload { cluster, entry } if entry & COMPRESSED == 0 => {
                    let host = (entry & OFFSET_MASK) >> self.p.cluster_bits;
                    let right = flagged(entry, refcounts.get(host)? == 1);
                    if right != entry {
                        changes.push((cluster, right & COPIED));
                    }
                }
                _ => {}
            }
            Ok(())
        })?;
        for (cluster, flag) in changes {
            let (slice, index) = self.slice_of(cluster);
            let (entry, bitmap) = self.entries(slice, index, 1)?[0];
            self.with_slice(slice, |s| s.set(index, entry & !COPIED | flag, bitmap))?;
        }
        Ok(())
    }
}

fn flagged(entry: u64, copied: bool) -> u64 {
    if copied { entry | COPIED } else { entry & !COPIED }
}

/// An identifier for a new snapshot: the highest number in use and one, or the lowest unused one if there is none
/// higher. What is not a number is no number of ours.
fn unused_id(list: &[Snapshot]) -> u64 {
    let used: BTreeSet<u64> = list.iter().filter_map(|s| s.id.parse().ok()).collect();
    let next = used.last().map_or(Some(1), |last| last.checked_add(1));
    next.unwrap_or_else(|| (1..).find(|n| !used.contains(n)).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_identifier_is_unused() {
        let with = |ids: &[&str]| {
            let empty = Snapshot {
                id: String::new(),
                name: String::new(),
                date_sec: 0,
                date_nsec: 0,
                vm_clock_nsec: 0,
                vm_state_size: 0,
                disk_size: 0,
                l1_offset: 0,
                l1_size: 0,
                more: Vec::new(),
            };
            let list: Vec<_> = ids.iter().map(|id| Snapshot { id: (*id).into(), ..empty.clone() }).collect();
            unused_id(&list)
        };
        assert_eq!((with(&[]), with(&["7", "name", "3"])), (1, 8));
        assert_eq!(with(&["1", "18446744073709551615", "3"]), 2);
    }
}

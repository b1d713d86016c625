//! Bitmaps that record changes.
//!
//! While an image is open for writing, its enabled bitmaps are in memory, and what counts is there. On the disk they
//! are marked as in use: after a crash they are inconsistent, and nobody trusts them. Closing the image stores them.
//! A bitmap must never claim to be complete while it lacks a change that was acknowledged, so:
//!
//! * What changes the image is inside of its gate, with the directory saying "in use", until it has marked the change.
//!   It marks after the change: whoever clears a bitmap and looks at the disk afterwards sees the change or its mark.
//! * Closing first makes later changes wait until the directory says "in use" again, then waits until everyone has left
//!   the gate, and stores the bitmaps then.
//! * A bitmap begins to record when it is in use on the disk; whoever may have missed it has left the gate when
//!   [`add_bitmap`](Qcow2::add_bitmap) and [`enable_bitmap`](Qcow2::enable_bitmap) return.
//! * The map of a bitmap stays the same one as long as the bitmap records: others hold it, too.

use super::bitmap::{AUTO, Draft, Entry, IN_USE, MAX_BYTES};
use super::{Qcow2, Repair};
use crate::gate::Pass;
use crate::job::DirtyMap;
use crate::{Error, Result};
use parking_lot::{Mutex, MutexGuard, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A persistent bitmap.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapInfo {
    /// Name.
    pub name: String,
    /// Bytes of the disk that one bit stands for.
    pub granularity: u64,
    /// Whether it records changes.
    pub enabled: bool,
    /// Whether it was not stored properly, so that it says nothing.
    pub inconsistent: bool,
}

/// What the directory on the disk says of the bitmaps that record changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum OnDisk {
    /// They are marked as in use.
    #[default]
    InUse,
    /// They may be marked as complete, wrongly.
    Unsure,
    /// They are complete.
    Stored,
}

/// Bitmaps by their names.
type Maps = Vec<(Vec<u8>, Arc<DirtyMap>)>;

/// The bitmaps that record changes now.
#[derive(Debug, Default)]
pub(super) struct Recording {
    /// Held by whoever reads or changes the directory. Nobody waits for it inside of the gate.
    directory: Mutex<OnDisk>,
    maps: RwLock<Maps>,
    /// Whether there are any.
    active: AtomicBool,
    /// Whether `directory` is anything but [`OnDisk::InUse`], or about to be: nothing may change until it is.
    stored: AtomicBool,
}

impl Recording {
    fn find(&self, name: &str) -> Option<Arc<DirtyMap>> {
        self.maps.read().iter().find(|(n, _)| n == name.as_bytes()).map(|(_, map)| map.clone())
    }

    fn change(&self, change: impl FnOnce(&mut Maps)) {
        let mut maps = self.maps.write();
        change(&mut maps);
        self.active.store(!maps.is_empty(), Ordering::Release);
    }
}

impl Qcow2 {
    /// The persistent bitmaps.
    pub fn bitmaps(&self) -> Result<Vec<BitmapInfo>> {
        let _directory = self.recording.directory.lock();
        let maps = self.recording.maps.read();
        let list = self.read_directory()?.into_iter().map(|e| BitmapInfo {
            granularity: 1 << e.granularity_bits,
            enabled: e.flags & AUTO != 0,
            // One that we record ourselves is in use for a good reason.
            inconsistent: e.flags & IN_USE != 0 && !maps.iter().any(|(name, _)| *name == e.name),
            name: String::from_utf8_lossy(&e.name).into_owned(),
        });
        Ok(list.collect())
    }

    /// The contents of a bitmap: live if it records changes, otherwise a copy.
    pub fn bitmap(&self, name: &str) -> Result<Arc<DirtyMap>> {
        let _directory = self.recording.directory.lock();
        match self.recording.find(name) {
            Some(map) => Ok(map),
            None => {
                let draft = self.draft()?;
                self.load_map(&draft.entries[draft.find(name)?]).map(Arc::new)
            }
        }
    }

    /// Whether `map` is one of the image's bitmaps and records changes.
    pub fn records(&self, map: &DirtyMap) -> bool {
        self.recording.maps.read().iter().any(|(_, ours)| std::ptr::eq(&**ours, map))
    }

    /// Adds an empty bitmap. Every change that begins after this has returned is marked in it, and those that are under
    /// way unless whoever reads the disk sees them already.
    pub fn add_bitmap(&self, name: &str, granularity: u64) -> Result<()> {
        if self.p.version < 3 {
            return Err(Error::unsupported(&self.name, "bitmaps in version 2 (compat=0.10)"));
        }
        if name.is_empty() || name.len() > 1023 || !(512..=1 << 31).contains(&granularity) {
            return Err(Error::InvalidOption("A bitmap has a name and a granularity from 512 to 2G".into()));
        }
        self.change_bitmaps(
            |draft| {
                if draft.find(name).is_ok() {
                    return Err(Error::Exists { what: "bitmap", name: name.into() });
                }
                let map = Arc::new(self.new_map(granularity)?);
                draft.entries.push(Entry::new(name, granularity));
                let at = draft.entries.len() - 1;
                self.store_map(draft, at, &map)?;
                draft.entries[at].flags |= IN_USE;
                Ok(map)
            },
            |maps, map| maps.push((name.into(), map)),
        )
    }

    /// Removes a bitmap.
    ///
    /// # Errors
    /// [`Error::Busy`] while a backup has taken its marks; so with the other changes of a bitmap.
    pub fn remove_bitmap(&self, name: &str) -> Result<()> {
        self.change_bitmaps(
            |draft| {
                self.check_idle(name)?;
                draft.remove(draft.find(name)?);
                Ok(())
            },
            |maps, ()| maps.retain(|(n, _)| n != name.as_bytes()),
        )
    }

    /// Clears a bitmap: it says that nothing changed. If it records changes, those that are under way are marked in it
    /// unless whoever reads the disk sees them already. To copy the disk and clear the bitmap at one instant is what
    /// [`backup_changes`](crate::job::backup_changes) does.
    pub fn clear_bitmap(&self, name: &str) -> Result<()> {
        self.change_map(name, DirtyMap::clear)
    }

    /// Marks in a bitmap what another one has marked, of this image or of one of the same size. Their granularities may
    /// differ.
    pub fn merge_bitmap(&self, name: &str, other: &DirtyMap) -> Result<()> {
        let size = self.virtual_size();
        self.change_map(name, |map| {
            // What a backup has taken may come back.
            let marks = other.all_marks();
            let list = std::iter::successors(marks.next(0), |granule| marks.next(granule + 1));
            for (offset, len) in list.map(|granule| other.bytes(granule, size)) {
                map.mark(offset, len);
            }
            Ok(())
        })
    }

    /// Lets a bitmap record changes from now on, as [`add_bitmap`](Self::add_bitmap) does, or stay as it is.
    pub fn enable_bitmap(&self, name: &str, enabled: bool) -> Result<()> {
        self.change_bitmaps(
            |draft| {
                let at = draft.find(name)?;
                match (self.recording.find(name), enabled) {
                    (Some(map), true) => return Ok(Some(map)),
                    (Some(map), false) => {
                        self.check_idle(name)?;
                        self.store_map(draft, at, &map)?;
                        draft.entries[at].flags &= !IN_USE;
                    }
                    (None, true) => {
                        let map = Arc::new(self.load_map(&draft.entries[at])?);
                        draft.entries[at].flags |= AUTO | IN_USE;
                        return Ok(Some(map));
                    }
                    (None, false) => self.check_stored(&draft.entries[at])?,
                }
                draft.entries[at].flags &= !AUTO;
                Ok(None)
            },
            |maps, map| {
                maps.retain(|(n, _)| n != name.as_bytes());
                maps.extend(map.map(|map| (name.into(), map)));
            },
        )
    }

    /// Fails while a backup has taken the marks of a bitmap.
    fn check_idle(&self, name: &str) -> Result<()> {
        match self.recording.find(name).is_some_and(|map| map.is_lent()) {
            true => Err(Error::Busy(format!("bitmap {name:?} of {}", self.name))),
            false => Ok(()),
        }
    }

    /// Changes the contents of a bitmap.
    fn change_map(&self, name: &str, change: impl FnOnce(&DirtyMap) -> Result<()>) -> Result<()> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        let mut directory = self.use_bitmaps()?;
        if let Some(map) = self.recording.find(name) {
            self.check_idle(name)?;
            return change(&map); // the disk learns of it when the image is closed
        }
        self.change_directory(&mut directory, |draft| {
            let at = draft.find(name)?;
            let map = self.load_map(&draft.entries[at])?;
            change(&map)?;
            self.store_map(draft, at, &map)
        })
    }

    /// Changes the directory, and then what records, with the result of that.
    fn change_bitmaps<R>(
        &self,
        change: impl FnOnce(&mut Draft) -> Result<R>,
        publish: impl FnOnce(&mut Maps, R),
    ) -> Result<()> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        let mut directory = self.use_bitmaps()?;
        let changed = self.change_directory(&mut directory, change)?;
        self.recording.change(|maps| publish(maps, changed));
        // Whoever looked for bitmaps before that has ended when this returns.
        self.gate.synchronize();
        Ok(())
    }

    fn change_directory<R>(
        &self,
        directory: &mut OnDisk,
        change: impl FnOnce(&mut Draft) -> Result<R>,
    ) -> Result<R> {
        let mut draft = self.draft()?;
        let changed = change(&mut draft).inspect_err(|_| self.abandon_bitmaps(&draft))?;
        self.commit_bitmaps(draft).inspect_err(|_| {
            *directory = OnDisk::Unsure;
            self.recording.stored.store(true, Ordering::Release);
        })?;
        Ok(changed)
    }

    /// Locks the directory, in which the bitmaps that record changes are marked as in use. The caller is not inside the
    /// gate.
    pub(super) fn use_bitmaps(&self) -> Result<MutexGuard<'_, OnDisk>> {
        let mut directory = self.recording.directory.lock();
        if *directory != OnDisk::InUse {
            let maps = self.recording.maps.read().clone();
            let ours = |name: &[u8]| maps.iter().any(|(n, _)| n == name);
            self.mark_bitmaps(ours, *directory == OnDisk::Unsure)?;
            *directory = OnDisk::InUse;
            self.recording.stored.store(false, Ordering::Release);
        }
        Ok(directory)
    }

    /// Whether the disk may say that the bitmaps are complete, so that nothing may change now.
    pub(super) fn bitmaps_are_stored(&self) -> bool {
        self.recording.stored.load(Ordering::Acquire)
    }

    /// Enters the gate to change the image.
    pub(super) fn enter_to_change(&self) -> Result<Pass<'_, ()>> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        loop {
            if self.bitmaps_are_stored() {
                drop(self.use_bitmaps()?);
            }
            let pass = self.gate.enter();
            if !self.bitmaps_are_stored() {
                return Ok(pass);
            }
            // It was closed in between.
        }
    }

    /// Marks a change in the bitmaps, which has happened. The caller is inside the gate.
    pub(super) fn record(&self, offset: u64, len: u64) {
        if self.recording.active.load(Ordering::Acquire) {
            self.recording.maps.read().iter().for_each(|(_, map)| map.mark(offset, len));
        }
    }

    /// Stores the bitmaps as complete, unless they are.
    pub(super) fn store_bitmaps(&self) -> Result<()> {
        let mut directory = self.recording.directory.lock();
        let maps = self.recording.maps.read().clone();
        if maps.is_empty() || *directory == OnDisk::Stored {
            return Ok(());
        }
        // Changes wait from here on. Those that did not have marked what they changed when all have left.
        self.recording.stored.store(true, Ordering::Release);
        *directory = OnDisk::Unsure;
        self.gate.synchronize();
        self.change_directory(&mut directory, |draft| {
            for (name, map) in &maps {
                let Some(at) = draft.entries.iter().position(|e| e.name == *name) else { continue };
                self.store_map(draft, at, map)?;
                draft.entries[at].flags &= !IN_USE;
            }
            Ok(())
        })?;
        *directory = OnDisk::Stored;
        Ok(())
    }

    /// Repairs the image if it was left dirty, then starts to record.
    pub(super) fn prepare_for_writing(&self, stale: bool) -> Result<()> {
        if stale {
            // Whoever wrote last did not come to update the refcounts.
            let report = self.check(Repair::All)?;
            if report.corruptions != 0 {
                return Err(self.corrupt("it was not closed properly and cannot be repaired automatically"));
            }
        }
        self.load_bitmaps()
    }

    /// Loads the enabled bitmaps and marks them as in use.
    fn load_bitmaps(&self) -> Result<()> {
        let _directory = self.recording.directory.lock();
        let mut maps = Maps::new();
        for entry in self.read_directory()?.iter().filter(|e| e.flags & (AUTO | IN_USE) == AUTO) {
            maps.push((entry.name.clone(), Arc::new(self.load_map(entry)?)));
            let granules: u64 = maps.iter().map(|(_, map)| map.granules()).sum();
            if granules > MAX_BYTES * 8 {
                return Err(Error::unsupported(&self.name, "enabled bitmaps of so fine a granularity"));
            }
        }
        if !maps.is_empty() {
            self.mark_bitmaps(|name| maps.iter().any(|(n, _)| n == name), false)?;
            self.recording.change(|recording| *recording = maps);
        }
        Ok(())
    }
}

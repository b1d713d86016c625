//! Copying the state of a disk at one instant while it changes.

use super::parallel::each_dirty;
use super::{DirtyMap, JobControl, copy};
use crate::disk::{Observer, State};
use crate::ranges::RangeLocks;
use crate::{Below, Disk, Error, Result};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const GRANULE: u64 = 64 << 10;

struct Shared {
    /// Granules that still have to be copied.
    todo: DirtyMap,
    ranges: RangeLocks,
    target: Disk,
    size: u64,
    failed: AtomicBool,
    error: Mutex<Option<Error>>,
}

impl Shared {
    /// Copies a granule unless that has happened.
    fn save(&self, source: Below<'_>, granule: u64, buffer: &mut Vec<u8>) -> Result<()> {
        let _range = self.ranges.lock(granule..granule + 1);
        if !self.todo.get(granule) {
            return Ok(());
        }
        let (offset, len) = self.todo.bytes(granule, self.size);
        copy::copy_range(source, None, &self.target, offset, len, buffer)?;
        self.todo.take(granule);
        Ok(())
    }
}

impl Observer for Shared {
    /// The guest is about to change a range: its old contents go to the backup first.
    fn before_change(&self, disk: Below<'_>, offset: u64, len: u64) -> Result<()> {
        if len == 0 || self.failed.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut buffer = Vec::new();
        for granule in offset / GRANULE..=(offset + len - 1) / GRANULE {
            if let Err(error) = self.save(disk, granule, &mut buffer) {
                // The backup is lost, not the guest's request.
                *self.error.lock() = Some(error);
                self.failed.store(true, Ordering::Release);
                break;
            }
        }
        Ok(())
    }
}

/// Copies `source` as it is at one instant of the call to `target`. With `changed`, only the granules that it
/// marks (an incremental backup); it is not modified.
pub fn backup(source: &Disk, target: &Disk, changed: Option<&DirtyMap>, control: &JobControl) -> Result<()> {
    let size = source.size();
    run(source, target, control, |_, todo| {
        match changed {
            None => todo.mark(0, size),
            Some(map) => map.marked().for_each(|granule| {
                let (offset, len) = map.bytes(granule, size);
                todo.mark(offset, len);
            }),
        }
        Ok(())
    })
}

/// Copies the granules that `changes` marks, as they are at one instant of the call, and takes the marks at
/// this instant: afterwards they tell what changed since this backup. If it fails, they are put back; until it has
/// succeeded, an image that is closed stores them.
///
/// # Errors
/// `changes` does not record the changes of `source`, as an enabled bitmap of its uppermost image or an [`Observer`]
/// does, or another backup has taken its marks.
pub fn backup_changes(source: &Disk, target: &Disk, changes: &DirtyMap, control: &JobControl) -> Result<()> {
    let size = source.size();
    let lent = changes.lend()?;
    run(source, target, control, |state, todo| {
        let observes = |o: &Arc<dyn Observer>| std::ptr::addr_eq(Arc::as_ptr(o), changes);
        let records = state.layers[0].as_qcow2().is_some_and(|image| image.records(changes));
        if !records && !state.observers.iter().any(observes) {
            return Err(Error::InvalidOption("The bitmap does not record what changes on this disk".into()));
        }
        lent.take(|granule| {
            let (offset, len) = changes.bytes(granule, size);
            todo.mark(offset, len);
        });
        Ok(())
    })?;
    lent.keep();
    Ok(())
}

/// Runs a backup of what `choose` marks. It is called at the instant that the backup shows.
fn run(
    source: &Disk,
    target: &Disk,
    control: &JobControl,
    choose: impl FnOnce(&State, &DirtyMap) -> Result<()>,
) -> Result<()> {
    let size = source.size();
    if target.size() < size {
        return Err(Error::InvalidOption("The target is smaller than the source".into()));
    }
    let shared = Arc::new(Shared {
        todo: DirtyMap::new(size, GRANULE)?,
        ranges: RangeLocks::default(),
        target: target.clone(),
        size,
        failed: AtomicBool::new(false),
        error: Mutex::default(),
    });
    let observer: Arc<dyn Observer> = shared.clone();
    source.add_observer_after(observer.clone(), |state| choose(state, &shared.todo))?;
    control.begin(shared.todo.count() * GRANULE);
    let result = save_all(source, &shared, control);
    source.remove_observer(&observer);
    result?;
    target.flush()
}

fn save_all(source: &Disk, shared: &Shared, control: &JobControl) -> Result<()> {
    // Granules that the guest saved first are not marked any more.
    each_dirty(
        &shared.todo,
        1,
        || Ok(Vec::new()),
        |run, buffer| {
            let granule = run.start;
            control.step(shared.todo.bytes(granule, shared.size).1)?;
            let layers = source.layers();
            shared.save(Below::new(&layers), granule, buffer)?;
            match shared.error.lock().take() {
                Some(error) => Err(error),
                None => Ok(()),
            }
        },
    )?;
    match shared.error.lock().take() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

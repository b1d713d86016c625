//! Copying a disk that is in use, and switching over to the copy.

use super::parallel::each_dirty;
use super::{DirtyMap, JobControl, copy};
use crate::disk::{Claim, Observer};
use crate::ranges::RangeLocks;
use crate::{Below, Disk, Error, Result};
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Unit in which changes are tracked.
const GRANULE: u64 = 256 << 10;
/// Most granules that are copied at once.
const RUN: u64 = 4;

/// When the guest's writes reach the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MirrorMode {
    /// Later: writes are noted and copied by the job. A guest that writes faster than the job copies keeps
    /// it from ending.
    Background,
    /// Before they are acknowledged.
    WriteBlocking,
}

/// What the job and the guest's requests share.
struct Shared {
    dirty: DirtyMap,
    ranges: RangeLocks,
    target: Disk,
    depth: Option<usize>,
    /// Whether the target may hold a part of the copy.
    resumed: bool,
    blocking: bool,
    /// Set when a blocking copy failed: from then on changes are only noted.
    failed: AtomicBool,
    error: Mutex<Option<Error>>,
}

impl Shared {
    /// Copies a run of granules whose marks were taken.
    fn copy(&self, source: Below<'_>, run: Range<u64>, buffer: &mut Vec<u8>) -> Result<()> {
        let size = source.size().min(self.target.size());
        let (offset, end) = (self.dirty.bytes(run.start, size).0, self.dirty.bytes(run.end, size).0);
        // Two copies of the same granule in the wrong order would leave old data in the target.
        let _range = self.ranges.lock(run);
        let result = match self.resumed {
            true => copy::copy_difference(source, &self.target, offset, end - offset, buffer),
            false => copy::copy_range(source, self.depth, &self.target, offset, end - offset, buffer),
        };
        if result.is_err() {
            self.dirty.mark(offset, end - offset);
        }
        result
    }
}

impl Observer for Shared {
    fn after_change(&self, disk: Below<'_>, offset: u64, len: u64) {
        self.dirty.mark(offset, len);
        if !self.blocking || self.failed.load(Ordering::Acquire) || len == 0 {
            return;
        }
        let granularity = self.dirty.granularity();
        let mut buffer = Vec::new();
        for granule in offset / granularity..=(offset + len - 1) / granularity {
            if self.dirty.take(granule)
                && let Err(error) = self.copy(disk, granule..granule + 1, &mut buffer)
            {
                self.failed.store(true, Ordering::Release);
                *self.error.lock() = Some(error);
                return;
            }
        }
    }
}

/// A copy in progress: changes of the source are tracked as long as this lives.
pub struct Mirror {
    source: Disk,
    shared: Arc<Shared>,
    observer: Arc<dyn Observer>,
    _claim: Claim,
}

impl std::fmt::Debug for Mirror {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mirror")
            .field("source", &self.source)
            .field("dirty", &self.shared.dirty.count())
            .finish()
    }
}

impl Mirror {
    /// Starts to track changes. With `depth`, only what the uppermost `depth` layers of the source hold is
    /// copied: the target already shows the rest. The source's chain cannot be changed by others as long as this
    /// lives.
    pub fn start(source: &Disk, target: &Disk, mode: MirrorMode, depth: Option<usize>) -> Result<Self> {
        Self::start_claimed(source.claim()?, source, target, mode, depth, false)
    }

    /// [`start`](Mirror::start) for a target that may hold a part of an earlier copy, which a crash ended for example,
    /// or anything else: it is read, and only what differs is written.
    pub fn resume(source: &Disk, target: &Disk, mode: MirrorMode) -> Result<Self> {
        Self::start_claimed(source.claim()?, source, target, mode, None, true)
    }

    pub(super) fn start_claimed(
        claim: Claim,
        source: &Disk,
        target: &Disk,
        mode: MirrorMode,
        depth: Option<usize>,
        resumed: bool,
    ) -> Result<Self> {
        if target.size() < source.size() {
            return Err(Error::InvalidOption("The target is smaller than the source".into()));
        }
        let dirty = DirtyMap::new(source.size(), GRANULE)?;
        let shared = Arc::new(Shared {
            dirty,
            ranges: RangeLocks::default(),
            target: target.clone(),
            depth,
            resumed,
            blocking: mode == MirrorMode::WriteBlocking,
            failed: AtomicBool::new(false),
            error: Mutex::default(),
        });
        let observer: Arc<dyn Observer> = shared.clone();
        source.add_observer(observer.clone());
        // Everything that exists now; later changes mark themselves.
        shared.dirty.mark(0, source.size());
        Ok(Mirror { source: source.clone(), shared, observer, _claim: claim })
    }

    /// Copies until the target is equal, except for what the guest changes in this moment.
    pub fn run(self, control: &JobControl) -> Result<Self> {
        control.begin(self.source.size());
        let mut counted = self.shared.dirty.count();
        while self.shared.dirty.next(0).is_some() {
            let layers = self.source.layers();
            self.copy_marked(Below::new(&layers), |bytes| control.step(bytes))?;
            if let Some(error) = self.shared.error.lock().take() {
                return Err(error);
            }
            let now = self.shared.dirty.count();
            control.add_total(now * GRANULE);
            if !self.shared.blocking && now != 0 && now >= counted && now <= 8 {
                break; // the guest keeps a few granules dirty; the rest is copied while it waits
            }
            counted = now;
        }
        Ok(self)
    }

    /// Bytes that may differ between source and target.
    pub fn dirty_bytes(&self) -> u64 {
        self.shared.dirty.count() * GRANULE
    }

    /// Completes the copy while the source takes no requests, then ends; the source stays in use.
    pub fn finish(self, control: &JobControl) -> Result<()> {
        let source = self.source.clone();
        source.while_closed(|layers| self.complete(Below::new(layers), control))
    }

    /// Completes the copy and makes the source disk use the target's layers from the next request on. They belong to
    /// the source then: handles to the target are to be dropped, which does not close the layers any more.
    pub fn pivot(self, control: &JobControl) -> Result<()> {
        let target = self.shared.target.layers();
        let source = self.source.clone();
        // A request on the target's layers that this observer saw would copy them to themselves, and undo others.
        source.switch_layers(target, Some(&self.observer), |layers| {
            self.complete(Below::new(layers), control)?;
            self.shared.target.give_layers_away();
            Ok(())
        })
    }

    /// Copies every granule that is marked, after `before` allowed that many bytes.
    fn copy_marked(&self, source: Below<'_>, before: impl Fn(u64) -> Result<()> + Sync) -> Result<()> {
        let dirty = &self.shared.dirty;
        each_dirty(
            dirty,
            RUN,
            || Ok(Vec::new()),
            |run, buffer| {
                let (first, end) =
                    (dirty.bytes(run.start, source.size()).0, dirty.bytes(run.end, source.size()).0);
                before(end - first)?;
                // A guest that blocks on its copies may have taken some of them.
                let mut from = run.start;
                while from < run.end {
                    let taken = (from..run.end).take_while(|granule| dirty.take(*granule)).count() as u64;
                    if taken > 0 {
                        self.shared.copy(source, from..from + taken, buffer)?;
                    }
                    from += taken.max(1);
                }
                Ok(())
            },
        )
    }

    fn complete(&self, source: Below<'_>, control: &JobControl) -> Result<()> {
        while self.shared.dirty.next(0).is_some() {
            self.copy_marked(source, |_| control.check())?;
        }
        self.shared.target.flush()
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.source.remove_observer(&self.observer);
    }
}

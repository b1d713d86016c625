//! Moving a disk by redirecting it first.

use super::JobControl;
use super::chain::{commit, stream};
use crate::{Disk, Error, Layer, Result};
use std::sync::Arc;

/// Moves a disk to another place: what is written from now on goes to a child there, what the old images hold is
/// merged into it meanwhile, and at last the dependency on them is removed.
///
/// Unlike a [`Mirror`](super::Mirror) with its switch-over at the end, it writes nothing twice and ends however fast
/// the guest writes; but the disk needs both places until then.
///
/// After a crash, or if [`run`](Migration::run) fails or is cancelled, the disk consists of the new image on top of the
/// old ones: open the new image and [`resume`](Migration::resume), or [`undo`](Migration::undo).
#[derive(Debug)]
pub struct Migration {
    disk: Disk,
    keep: Option<Arc<dyn Layer>>,
}

impl Migration {
    /// Redirects the disk to `target`, an empty child of its active layer as [`Disk::create_child`] makes. With
    /// `base`, the disk goes on to depend on this layer, counted before the call, and on those below.
    ///
    /// When this returns the target is durable, and the active image: after a crash the disk is to be opened by it.
    /// If it fails, the disk is what it was and the target of no use.
    pub fn start(disk: &Disk, target: Arc<dyn Layer>, base: Option<usize>) -> Result<Self> {
        let keep = layer(disk, base)?;
        disk.push_layer(target)?;
        Ok(Migration { disk: disk.clone(), keep })
    }

    /// Goes on with an earlier migration of a disk, whose active image is the target. `base` counts this image, too.
    pub fn resume(disk: &Disk, base: Option<usize>) -> Result<Self> {
        Ok(Migration { disk: disk.clone(), keep: layer(disk, base)? })
    }

    /// Merges the old images into the new one and removes the dependency on them. They stay where they are; nobody
    /// refers to them any more. A second run has nothing to do.
    pub fn run(&self, control: &JobControl) -> Result<()> {
        let layers = self.disk.layers();
        let find = |keep: &Arc<dyn Layer>| {
            let at = layers.iter().position(|layer| Arc::ptr_eq(layer, keep));
            at.ok_or_else(|| Error::InvalidOption("The base is not below the layer".into()))
        };
        stream(&self.disk, 0, self.keep.as_ref().map(find).transpose()?, control)
    }

    /// Brings the disk back to where it was: merges what was written since into the old active image and continues
    /// there. The migration must not have been completed.
    pub fn undo(self, control: &JobControl) -> Result<()> {
        commit(&self.disk, 0, control)
    }
}

fn layer(disk: &Disk, index: Option<usize>) -> Result<Option<Arc<dyn Layer>>> {
    let find = |n| disk.layers().get(n).cloned().ok_or_else(|| Error::no_layer(n));
    index.map(find).transpose()
}

//! Merging layers of a chain while the disk is in use.

use super::parallel::each_piece;
use super::{JobControl, Mirror, MirrorMode, copy};
use crate::disk::Claim;
use crate::{Below, Disk, Error, Extent, Layer, Result, Source};
use std::ops::Range;
use std::sync::Arc;

/// Unit of work in bytes.
const PIECE: u64 = 1 << 20;

/// Merges layer number `index` into its parent and removes it from the chain.
///
/// Layer 0 is the active one: the guest's writes during the job are merged too, and the parent becomes the
/// active layer. The file of the merged layer stays where it is; nobody refers to it any more.
pub fn commit(disk: &Disk, index: usize, control: &JobControl) -> Result<()> {
    commit_claimed(disk.claim()?, disk, index..index + 1, control)
}

/// Merges the active layer and all others above layer number `base` into this one, which becomes the active layer. Every
/// byte is copied once, from the uppermost layer that holds it.
///
/// While the job runs and afterwards, what the disk shows does not change; but the layers between do not show any more
/// what they did, as their parent changes. Their files stay where they are, of no use.
pub fn commit_into(disk: &Disk, base: usize, control: &JobControl) -> Result<()> {
    if base == 0 {
        return Err(Error::InvalidOption("The active layer is not merged into itself".into()));
    }
    commit_claimed(disk.claim()?, disk, 0..base, control)
}

/// Merges some layers into the one below them.
fn commit_claimed(claim: Claim, disk: &Disk, merged: Range<usize>, control: &JobControl) -> Result<()> {
    let layers = disk.layers();
    let (index, base) = (merged.start, merged.end);
    if base >= layers.len() {
        return Err(Error::InvalidOption("The layer has no parent to commit to".into()));
    }
    let parent = disk.make_writable(base)?;
    if parent.size() < layers[index].size() {
        parent.resize(layers[index].size(), Below::new(&layers[base + 1..]))?;
    }
    let mut target = vec![parent.clone()];
    target.extend_from_slice(&layers[base + 1..]);
    let target = Disk::borrow_layers(target)?;
    let depth = Some(merged.len());
    if index == 0 {
        let mirror = Mirror::start_claimed(claim, disk, &target, MirrorMode::Background, depth, false)?;
        return mirror.run(control)?.pivot(control);
    }
    let size = layers[index].size();
    control.begin(size);
    let source = Below::new(&layers[index..]);
    each_piece(
        size,
        PIECE,
        0,
        || Ok(Vec::new()),
        |offset, len, buffer| {
            control.step(len)?;
            copy::copy_range(source, depth, &target, offset, len, buffer)
        },
    )?;
    parent.flush()?;
    disk.drop_layers(index, base)
}

/// Pulls what the layers between number `index` and number `base` hold up into layer `index`, and removes
/// them from the chain. Without `base`, all layers below are pulled up and the layer depends on nothing.
pub fn stream(disk: &Disk, index: usize, base: Option<usize>, control: &JobControl) -> Result<()> {
    stream_claimed(&disk.claim()?, disk, index, base, control)
}

fn stream_claimed(
    _claim: &Claim,
    disk: &Disk,
    index: usize,
    base: Option<usize>,
    control: &JobControl,
) -> Result<()> {
    let end = base.unwrap_or(disk.layers().len());
    if end > disk.layers().len() || end <= index {
        return Err(Error::InvalidOption("The base is not below the layer".into()));
    }
    disk.make_writable(index)?;
    let layers = disk.layers();
    let top = &layers[index];
    check_snapshots(top)?;
    control.begin(top.size());
    // Zeros of intermediate layers hide what the base holds.
    let hide = base.is_some();
    populate(top, &layers[index + 1..], control, |holder, zero| {
        holder.is_some_and(|h| h + index + 1 < end) && (hide || !zero)
    })?;
    top.flush()?;
    disk.drop_layers(index + 1, end)
}

/// Puts the active layer on top of another chain, with unchanged contents. `new` are the layers of the new
/// chain, as opened for reading; `reference` is how the image names the first of them.
pub fn rebase(
    disk: &Disk,
    new: &[Arc<dyn Layer>],
    reference: Option<&crate::BackingRef>,
    control: &JobControl,
) -> Result<()> {
    let _claim = disk.claim()?;
    let layers = disk.layers();
    let top = &layers[0];
    check_snapshots(top)?;
    control.begin(top.size());
    let old = Below::new(&layers[1..]);
    each_below(top, control, |offset, len, (a, b): &mut (Vec<u8>, Vec<u8>)| {
        a.resize(len as usize, 0);
        b.resize(len as usize, 0);
        old.read(crate::Scatter::new(a), offset)?;
        Below::new(new).read(crate::Scatter::new(b), offset)?;
        if a != b { top.populate(offset, len, old) } else { Ok(()) }
    })?;
    top.flush()?;
    disk.replace_below(new, reference)
}

/// Deletes the snapshot that layer number `index` keeps, the contents of the disk at the time when the layer above
/// was put on top of it. All other states of the chain stay. Returns the name of the image that nobody refers to
/// any more.
///
/// Either the layer above takes what it lacks out of this one, or it is merged into this one: what is less work, and
/// possible. In the second case this image takes the place of the one above; it must not have other children, and
/// those that share a [`Registry`](crate::Registry) with this disk or are in use are seen, others are not.
pub fn remove(disk: &Disk, index: usize, control: &JobControl) -> Result<String> {
    let claim = disk.claim()?;
    let layers = disk.layers();
    if index == 0 || index >= layers.len() {
        return Err(Error::InvalidOption("Only a layer below the active one is a snapshot".into()));
    }
    let (upper, lower) = (&layers[index - 1], &layers[index]);
    let base = Some(index + 1).filter(|base| *base < layers.len());
    match work_to_remove(upper, lower)? {
        // The size of the disk is that of the layer that remains.
        (pull, merge) if pull <= merge || upper.size() < lower.size() => {
            match stream_claimed(&claim, disk, index - 1, base, control) {
                Ok(()) => Ok(lower.storage().name()),
                // Found out before anything is moved.
                Err(Error::Unsupported { .. }) => {
                    commit_claimed(claim, disk, index - 1..index, control).map(|()| upper.storage().name())
                }
                Err(error) => Err(error),
            }
        }
        _ => match disk.make_writable(index) {
            Ok(_) => commit_claimed(claim, disk, index - 1..index, control).map(|()| upper.storage().name()),
            // Others use it.
            Err(Error::Locked { .. } | Error::NoLease { .. } | Error::Unsupported { .. }) => {
                stream_claimed(&claim, disk, index - 1, base, control).map(|()| lower.storage().name())
            }
            Err(error) => Err(error),
        },
    }
}

/// The bytes that have to be moved to remove `lower`: by pulling them up into `upper`, and by merging `upper` into it.
fn work_to_remove(upper: &Arc<dyn Layer>, lower: &Arc<dyn Layer>) -> Result<(u64, u64)> {
    let held = |source| matches!(source, Source::Data { .. } | Source::Opaque { .. });
    let map = |layer: &Arc<dyn Layer>, offset, end: u64| match layer.size() {
        size if offset < size => {
            let _pass = layer.enter();
            layer.map(offset, end.min(size) - offset)
        }
        _ => Ok(Extent { len: end - offset, source: Source::Zero { allocated: false } }),
    };
    let (mut pull, mut merge, mut offset) = (0, 0, 0);
    let size = upper.size();
    while offset < size {
        let extent = map(upper, offset, size)?;
        let end = offset + extent.len;
        if held(extent.source) {
            merge += extent.len;
        }
        while offset < end {
            let below = map(lower, offset, end)?;
            if extent.source == Source::Below && held(below.source) {
                pull += below.len;
            }
            offset += below.len;
        }
    }
    Ok((pull, merge))
}

/// Internal snapshots read from the parent, too, and would lose it.
fn check_snapshots(top: &Arc<dyn Layer>) -> Result<()> {
    match top.as_qcow2().map(|image| image.snapshots()).transpose()? {
        Some(list) if !list.is_empty() => {
            Err(Error::unsupported(top.storage().name(), "another parent below internal snapshots"))
        }
        _ => Ok(()),
    }
}

/// Copies into `top` what it does not hold and `wanted` (by the layer below that holds it, and whether it
/// is zero) says.
fn populate(
    top: &Arc<dyn Layer>,
    rest: &[Arc<dyn Layer>],
    control: &JobControl,
    wanted: impl Fn(Option<usize>, bool) -> bool + Sync,
) -> Result<()> {
    let below = Below::new(rest);
    each_below(top, control, |offset, len, _: &mut ()| {
        let mut done = 0;
        while done < len {
            let (extent, holder) = below.map(offset + done, len - done)?;
            let zero = matches!(extent.source, Source::Zero { .. } | Source::Below);
            if wanted(holder, zero) {
                top.populate(offset + done, extent.len, below)?;
            }
            done += extent.len;
        }
        Ok(())
    })
}

/// Calls `f` with every range, of at most [`PIECE`] bytes, that a layer does not hold. Several threads do so,
/// each with a state of its own.
fn each_below<S: Default>(
    top: &Arc<dyn Layer>,
    control: &JobControl,
    f: impl Fn(u64, u64, &mut S) -> Result<()> + Sync,
) -> Result<()> {
    each_piece(
        top.size(),
        PIECE,
        0,
        || Ok(S::default()),
        |start, len, state| {
            let end = start + len;
            let mut offset = start;
            while offset < end {
                let extent = {
                    let _pass = top.enter();
                    top.resolve_read(offset, end - offset)?
                };
                if extent.source == Source::Below {
                    control.step(extent.len)?;
                    f(offset, extent.len, state)?;
                } else {
                    control.skip(extent.len)?;
                }
                offset += extent.len;
            }
            Ok(())
        },
    )
}

//! Changing the chain of a disk that is in use.

use super::open::as_path;
use super::{CreateOptions, Disk, Observer, State};
use crate::storage::LockMode;
use crate::{BackingRef, Error, Layer, Result, Storage};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Keeps others from changing the chain of a disk as long as it lives.
#[derive(Debug)]
pub(crate) struct Claim(Disk);

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.0.claimed.store(false, Ordering::Release);
    }
}

impl Disk {
    /// Reserves the chain for a job: layers are known by their numbers, which others must not change meanwhile.
    pub(crate) fn claim(&self) -> Result<Claim> {
        match self.0.claimed.swap(true, Ordering::AcqRel) {
            true => Err(Error::Busy(self.layers()[0].storage().name())),
            false => Ok(Claim(self.clone())),
        }
    }

    /// Runs `f` on the layers while no request is in flight; requests wait meanwhile.
    pub(crate) fn while_closed<R>(&self, f: impl FnOnce(&[Arc<dyn Layer>]) -> Result<R>) -> Result<R> {
        let closed = self.0.gate.close();
        f(&closed.get().layers)
    }

    /// Replaces the layers between two requests, after `prepare` succeeded. Of what happens to the new ones, `observer`
    /// sees nothing.
    pub(crate) fn switch_layers(
        &self,
        layers: Vec<Arc<dyn Layer>>,
        observer: Option<&Arc<dyn Observer>>,
        prepare: impl FnOnce(&[Arc<dyn Layer>]) -> Result<()>,
    ) -> Result<()> {
        let mut closed = self.0.gate.close();
        prepare(&closed.get().layers)?;
        let old = closed.get().layers[0].clone();
        if !old.read_only() && !layers.iter().any(|l| Arc::ptr_eq(l, &old)) {
            old.close()?;
        }
        let mut observers = closed.get().observers.clone();
        observers.retain(|o| !observer.is_some_and(|gone| Arc::ptr_eq(o, gone)));
        closed.set(Arc::new(State { layers, observers }));
        Ok(())
    }

    /// Puts an empty layer that names the present one as its parent on top: what was written so far is
    /// frozen in the present layer, from this instant on. The new layer is durable when this returns: after a
    /// crash the disk is to be opened by it.
    pub fn push_layer(&self, layer: Arc<dyn Layer>) -> Result<()> {
        Disk::push_layers(&[(self.clone(), layer)])
    }

    /// [`push_layer`](Disk::push_layer) for several disks at one instant: no request of any of them falls
    /// between.
    pub fn push_layers(group: &[(Disk, Arc<dyn Layer>)]) -> Result<()> {
        let mut order: Vec<_> = group.iter().collect();
        // Everyone closes gates in the same order, so that two groups cannot wait for each other.
        order.sort_by_key(|(disk, _)| Arc::as_ptr(&disk.0).cast::<u8>() as usize);
        if order.windows(2).any(|w| Arc::ptr_eq(&w[0].0.0, &w[1].0.0)) {
            return Err(Error::InvalidOption("A disk is in the group twice".into()));
        }
        for (disk, layer) in &order {
            if disk.0.read_only || layer.read_only() {
                return Err(Error::ReadOnly);
            }
            if layer.size() != disk.size() {
                return Err(Error::InvalidOption("The new layer has another size than the disk".into()));
            }
        }
        let _claims = order.iter().map(|(disk, _)| disk.claim()).collect::<Result<Vec<_>>>()?;
        let mut gates: Vec<_> = order.iter().map(|(disk, _)| disk.0.gate.close()).collect();
        for (closed, (_, layer)) in gates.iter().zip(&order) {
            closed.get().layers[0].close()?;
            layer.note_parent(Some(&*closed.get().layers[0]))?;
            layer.flush()?;
        }
        for (closed, (_, layer)) in gates.iter_mut().zip(&order) {
            let mut state = State::clone(closed.get());
            state.layers.insert(0, layer.clone());
            closed.set(Arc::new(state));
        }
        Ok(())
    }

    /// Takes an external snapshot: creates the image `path` on top of the present layer and continues in it.
    /// Format and options are those of `options`; size and parent are set here, and what nothing is said of suits
    /// [overlays](crate::format::qcow2::Qcow2Options::overlay).
    pub fn snapshot(&self, path: &Path, options: &CreateOptions) -> Result<()> {
        self.with_child_of(0, path, options, |layer| self.push_layer(layer))
    }

    /// Creates and opens the image that [`snapshot`](Disk::snapshot) would continue in.
    pub fn create_child(&self, path: &Path, options: &CreateOptions) -> Result<Arc<dyn Layer>> {
        self.create_child_of(0, path, options)
    }

    /// Creates and opens an image on top of layer number `index`.
    fn create_child_of(&self, index: usize, path: &Path, options: &CreateOptions) -> Result<Arc<dyn Layer>> {
        let layers = self.layers();
        let layer = layers.get(index).ok_or_else(|| Error::no_layer(index))?;
        let parent = layer.storage().name();
        if index == 0 && self.0.options.temporary.is_some() {
            return Err(Error::unsupported(parent, "a child of a temporary layer"));
        }
        let create = CreateOptions {
            size: layer.size(),
            backing: Some(BackingRef {
                path: parent_name(Path::new(&parent), path)?,
                format: Some(layer.format().name().into()),
            }),
            qcow2: options.qcow2.clone().overlay(),
            ..options.clone()
        };
        create.create(path)?;
        let open = self.0.options.for_layer(create.format);
        create.secret.iter().cloned().fold(open, |open, secret| open.secret(secret)).open_layer_alone(path)
    }

    /// Rolls back to the snapshot that layer number `index` keeps: the disk continues in the new image `path` on
    /// top of it, and the layers above are left, with what they hold. Format and options are as for
    /// [`snapshot`](Disk::snapshot).
    ///
    /// Fails while a job sees the disk's changes. The size becomes that of the layer.
    pub fn roll_back(&self, index: usize, path: &Path, options: &CreateOptions) -> Result<()> {
        let _claim = self.claim_to_roll_back(index)?;
        self.with_child_of(index, path, options, |layer| self.continue_in(index, layer))
    }

    /// [`roll_back`](Disk::roll_back) to an empty layer that names layer number `index` as its parent. The new layer is
    /// durable when this returns: after a crash the disk is to be opened by it.
    pub fn roll_back_to(&self, index: usize, layer: Arc<dyn Layer>) -> Result<()> {
        let _claim = self.claim_to_roll_back(index)?;
        self.continue_in(index, layer)
    }

    fn claim_to_roll_back(&self, index: usize) -> Result<Claim> {
        if self.0.read_only {
            return Err(Error::ReadOnly);
        }
        if index == 0 {
            return Err(Error::InvalidOption("The active image is no snapshot".into()));
        }
        self.claim()
    }

    /// Puts `layer` on top of layer number `index`, in the place of those above.
    fn continue_in(&self, index: usize, layer: Arc<dyn Layer>) -> Result<()> {
        let before = self.size();
        {
            let mut closed = self.0.gate.close();
            let mut state = State::clone(closed.get());
            state.check_unobserved()?;
            let parent = state.layers.get(index).ok_or_else(|| Error::no_layer(index))?;
            if layer.size() != parent.size() {
                return Err(Error::InvalidOption("The new layer has another size than its parent".into()));
            }
            layer.note_parent(Some(&**parent))?;
            layer.flush()?;
            state.top().close()?;
            state.layers.splice(..index, [layer]);
            closed.set(Arc::new(state));
        }
        let after = self.size();
        if after != before {
            self.report_size(after);
        }
        Ok(())
    }

    /// Calls `f` with a new image on top of layer number `index`, which is removed again if `f` fails.
    fn with_child_of(
        &self,
        index: usize,
        path: &Path,
        options: &CreateOptions,
        f: impl FnOnce(Arc<dyn Layer>) -> Result<()>,
    ) -> Result<()> {
        f(self.create_child_of(index, path, options)?).inspect_err(|_| {
            // The error is what matters; a file that cannot be removed is left as it is.
            let _ = std::fs::remove_file(path);
        })
    }

    /// A disk over layers that belong to another one; they are not closed with it.
    pub(crate) fn borrow_layers(layers: Vec<Arc<dyn Layer>>) -> Result<Self> {
        let disk = Disk::from_layers(layers, false)?;
        disk.give_layers_away();
        Ok(disk)
    }

    /// From now on the layers belong to another disk, whose requests a close of this one must not meet.
    pub(crate) fn give_layers_away(&self) {
        self.0.close_on_drop.store(false, Ordering::Release);
    }

    /// Makes layer number `index` writable, by opening its file again if it was opened for reading, and those above it,
    /// which must not expect it to stay as it is. [`settle`](Self::settle) ends that.
    pub(crate) fn make_writable(&self, index: usize) -> Result<Arc<dyn Layer>> {
        let layer = self.open_for_writing(index)?;
        if index > 0 {
            let unguarded = self.make_writable(index - 1).and_then(|child| child.note_parent(None));
            if let Err(error) = unguarded {
                if let Err(error) = self.settle() {
                    tracing::warn!(%error, "Images that are no longer written stay open for writing");
                }
                return Err(error);
            }
        }
        Ok(layer)
    }

    fn open_for_writing(&self, index: usize) -> Result<Arc<dyn Layer>> {
        if self.0.read_only {
            return Err(Error::ReadOnly);
        }
        let layer = self.layers()[index].clone();
        if !layer.read_only() {
            if index > 0 {
                // An earlier job may have let others read it. A lock that cannot be had is given up as a whole.
                set_lock(&layer, LockMode::Write).inspect_err(|_| lock_again(&layer))?;
            }
            return Ok(layer);
        }
        if self.0.options.registry.is_some() {
            return Err(Error::unsupported(
                layer.storage().name(),
                "writing to a base that other disks share",
            ));
        }
        let open = || {
            let path = layer.storage().name();
            let options = self.0.options.for_layer(layer.format());
            let storage = Arc::new(options.open_for_writing(Path::new(&path))?);
            if storage.file_id() != layer.storage().file_id() || storage.file_id().is_none() {
                let (what, remedy) = ("is not the file that was opened", "open the disk again".into());
                return Err(Error::ParentChanged { parent: path, what, remedy });
            }
            options.open_layer(layer.format(), storage, Path::new(&path), false)
        };
        // Our own lock for reading would keep us from writing.
        set_lock(&layer, LockMode::None)?;
        let writable = open().inspect_err(|_| lock_again(&layer))?;
        let mut closed = self.0.gate.close();
        let mut state = State::clone(closed.get());
        state.layers[index] = writable.clone();
        closed.set(Arc::new(state));
        Ok(writable)
    }

    /// Removes layers `from..to` (not the active one) from the chain; the layer above refers to number `to`
    /// from now on.
    pub(crate) fn drop_layers(&self, from: usize, to: usize) -> Result<()> {
        let child = self.make_writable(from - 1)?;
        let layers = self.layers();
        let name = |parent: &Arc<dyn Layer>| {
            parent_name(Path::new(&parent.storage().name()), Path::new(&child.storage().name()))
        };
        let reference = layers.get(to).map(|parent| {
            Ok(BackingRef { path: name(parent)?, format: Some(parent.format().name().into()) })
        });
        let reference = reference.transpose()?;
        if let Some(parent) = layers.get(to).filter(|parent| !parent.read_only()) {
            parent.close()?; // the child remembers its final state
        }
        child.set_backing(reference.as_ref())?;
        let mut rest = layers[..from].to_vec();
        rest.extend_from_slice(layers.get(to..).unwrap_or_default());
        self.switch_layers(rest, None, |_| Ok(()))?;
        self.settle()
    }

    /// Replaces everything below the active layer.
    pub(crate) fn replace_below(&self, new: &[Arc<dyn Layer>], reference: Option<&BackingRef>) -> Result<()> {
        let top = self.layers().remove(0);
        top.set_backing(reference)?;
        let mut layers = vec![top];
        layers.extend_from_slice(new);
        self.switch_layers(layers, None, |_| Ok(()))
    }

    /// Closes the layers below the active one that a job made writable, and lets others read them.
    pub(crate) fn settle(&self) -> Result<()> {
        // From the bottom up: a child notes what its parent became.
        for pair in self.layers().windows(2).rev().filter(|pair| !pair[1].read_only()) {
            pair[1].close()?;
            if !pair[0].read_only() {
                pair[0].note_parent(Some(&*pair[1]))?;
            }
            set_lock(&pair[1], LockMode::Read)?;
        }
        Ok(())
    }
}

/// Locks the files of a layer: the image, and the one with its payload if that is another.
fn set_lock(layer: &Arc<dyn Layer>, mode: LockMode) -> Result<()> {
    layer.storage().set_lock(mode)?;
    layer.data_file(0).set_lock(mode)
}

/// Takes the lock of a layer that is read, after an attempt to write it failed.
fn lock_again(layer: &Arc<dyn Layer>) {
    if let Err(error) = set_lock(layer, LockMode::Read) {
        tracing::warn!(%error, "Cannot take the lock of a backing file again");
    }
}

/// How the header of an image at `child` names the file `parent`. Both are relative to the working directory.
///
/// Fails with [`Error::InvalidOption`] if the name is not UTF-8, which no header can hold.
pub fn parent_name(parent: &Path, child: &Path) -> Result<String> {
    let full = |p: &Path| std::path::absolute(p).unwrap_or_else(|_| p.to_owned());
    let (parent, child) = (full(parent), full(child));
    let name = match (parent.file_name(), parent.parent() == child.parent()) {
        // Images in one directory move together.
        (Some(name), true) => name,
        _ => parent.as_os_str(),
    };
    let name = name.to_str().ok_or_else(|| {
        Error::InvalidOption(format!("The name of the parent {} is not UTF-8", parent.display()))
    })?;
    Ok(as_path(name.to_owned()))
}

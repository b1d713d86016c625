//! Bases that several disks of a process share.

use crate::storage::FileId;
use crate::{Error, Format, Layer, Result};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::{Arc, Weak};

#[derive(Debug)]
struct Base {
    layer: Weak<dyn Layer>,
    /// Time of last modification when the base was opened.
    modified: Option<i128>,
}

#[derive(Debug, Default)]
struct State {
    bases: HashMap<(FileId, Format), Base>,
    shared: u64,
    opened: u64,
}

/// How well sharing works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RegistryStats {
    /// Bases that are open now.
    pub bases: u64,
    /// Opens that found their base open.
    pub shared: u64,
    /// Opens that did not.
    pub opened: u64,
    /// Lookups of mapping slices in the open bases.
    pub lookups: u64,
    /// Lookups that had to read metadata.
    pub misses: u64,
}

/// Open bases of linked clones, by inode. All disks that are opened with the same registry share one open
/// base and its cache of metadata. It owns nothing: a base is closed with its last disk.
#[derive(Clone, Debug, Default)]
pub struct Registry(Arc<Mutex<State>>);

impl Registry {
    /// An empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    /// How well sharing works.
    pub fn stats(&self) -> RegistryStats {
        let state = self.0.lock();
        let mut stats = RegistryStats { shared: state.shared, opened: state.opened, ..Default::default() };
        for layer in state.bases.values().filter_map(|base| base.layer.upgrade()) {
            stats.bases += 1;
            if let Some(qcow2) = layer.as_qcow2() {
                let (lookups, misses) = qcow2.cache_stats();
                stats.lookups += lookups;
                stats.misses += misses;
            }
        }
        stats
    }

    /// The open layer of a file, or the one that `open` makes. A base that was written since it was opened
    /// is refused: its readers hold stale metadata.
    pub(crate) fn share(
        &self,
        id: FileId,
        format: Format,
        modified: Option<i128>,
        open: impl FnOnce() -> Result<Arc<dyn Layer>>,
    ) -> Result<Arc<dyn Layer>> {
        let mut state = self.0.lock();
        state.bases.retain(|_, base| base.layer.strong_count() > 0);
        if let Some(base) = state.bases.get(&(id, format))
            && let Some(layer) = base.layer.upgrade()
        {
            if base.modified != modified {
                return Err(Error::ParentChanged {
                    parent: layer.storage().name(),
                    what: "changed since it was opened",
                    remedy: "close the disks that are based on it, and open them again".into(),
                });
            }
            state.shared += 1;
            return Ok(layer);
        }
        let layer = open()?;
        state.opened += 1;
        state.bases.insert((id, format), Base { layer: Arc::downgrade(&layer), modified });
        Ok(layer)
    }
}

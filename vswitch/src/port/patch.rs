//! Patch ports: two ports, usually of different switches, joined in memory.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::endpoint::Lane;
use super::{Batch, Port};
use crate::error::{Error, Result};
use crate::packet::Burst;
use crate::packet::offload::OffloadCaps;

/// Frames that may wait in each direction.
const CAPACITY: usize = 1024;

/// A cable: what goes into one end comes out of the other.
#[derive(Debug)]
struct Cable {
    /// Lane n carries frames towards end n.
    lanes: [Lane; 2],
    plugged: [AtomicBool; 2],
}

/// One end of a patch.
#[derive(Debug)]
pub struct PatchPort {
    cable: Arc<Cable>,
    end: usize,
}

/// Cables by name, for switches that are patched by their configurations. Clones share the cables.
#[derive(Clone, Debug, Default)]
pub struct PatchPanel(Arc<Mutex<HashMap<String, Weak<Cable>>>>);

impl Cable {
    fn new() -> Result<Self> {
        let lane = || Lane::new(CAPACITY).map_err(|e| Error::io("make a patch port", e));
        Ok(Self { lanes: [lane()?, lane()?], plugged: Default::default() })
    }

    /// Plugs into a free end.
    fn plug(cable: &Arc<Self>) -> Option<PatchPort> {
        let end = (0..2).find(|e| !cable.plugged[*e].swap(true, Ordering::AcqRel))?;
        // What was on the way to the end's last owner.
        cable.lanes[end].clear();
        Some(PatchPort { cable: cable.clone(), end })
    }
}

impl PatchPanel {
    /// Plugs into the cable called `name`. When one end's port is dropped, another port may take its place.
    pub fn plug(&self, name: &str) -> Result<PatchPort> {
        let mut cables = self.0.lock();
        cables.retain(|_, c| c.strong_count() > 0);
        let cable = match cables.get(name).and_then(Weak::upgrade) {
            Some(c) => c,
            None => {
                let c = Arc::new(Cable::new()?);
                cables.insert(name.into(), Arc::downgrade(&c));
                c
            }
        };
        Cable::plug(&cable)
            .ok_or_else(|| Error::Invalid(format!("Both ends of the patch cable {name} are in use")))
    }
}

impl PatchPort {
    /// Makes both ends. When one is dropped the other's link goes down.
    pub fn pair() -> Result<(Self, Self)> {
        let cable = Arc::new(Cable::new()?);
        cable.plugged.iter().for_each(|p| p.store(true, Ordering::Release));
        Ok((Self { cable: cable.clone(), end: 0 }, Self { cable, end: 1 }))
    }

    fn incoming(&self) -> &Lane {
        &self.cable.lanes[self.end]
    }
}

impl Drop for PatchPort {
    fn drop(&mut self) {
        self.cable.plugged[self.end].store(false, Ordering::Release);
    }
}

impl Port for PatchPort {
    fn kind(&self) -> &'static str {
        "patch"
    }

    fn offloads(&self) -> OffloadCaps {
        OffloadCaps::all()
    }

    fn link_up(&self) -> bool {
        self.cable.plugged[1 - self.end].load(Ordering::Acquire)
    }

    fn receive(&self, _queue: usize, burst: &mut Burst) {
        self.incoming().take(burst);
    }

    fn transmit(&self, _queue: usize, batch: &Batch<'_>) -> usize {
        if !self.link_up() {
            return 0;
        }
        self.cable.lanes[1 - self.end].push(batch.iter().map(|p| (p.to_vec(), p.offload)))
    }

    fn ready_fd(&self, _queue: usize) -> Option<RawFd> {
        Some(self.incoming().as_raw_fd())
    }

    fn arm(&self, _queue: usize, on: bool) -> bool {
        if on {
            return self.incoming().arm();
        }
        self.incoming().disarm();
        false
    }

    fn is_cheap_to_poll(&self) -> bool {
        true
    }
}

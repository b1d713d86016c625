//! Patch ports: two ports, usually of different switches, joined in memory.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Batch, Endpoint, EndpointPort, Port};
use crate::error::{Error, Result};
use crate::packet::Burst;
use crate::packet::offload::OffloadCaps;

/// Frames that may wait in each direction.
const CAPACITY: usize = 1024;

/// One end of a patch.
#[derive(Debug)]
pub struct PatchPort {
    /// Brings frames from the other end.
    receiver: EndpointPort,
    /// Takes frames to the other end.
    sender: Endpoint,
    alive: Arc<AtomicBool>,
}

impl PatchPort {
    /// Makes both ends. When one is dropped the other's link goes down.
    pub fn pair() -> Result<(Self, Self)> {
        let fail = |e| Error::io("make a patch port", e);
        let (a_in, to_a) = Endpoint::pair(CAPACITY, OffloadCaps::all()).map_err(fail)?;
        let (b_in, to_b) = Endpoint::pair(CAPACITY, OffloadCaps::all()).map_err(fail)?;
        let alive = Arc::new(AtomicBool::new(true));
        let a = Self { receiver: a_in, sender: to_b, alive: alive.clone() };
        Ok((a, Self { receiver: b_in, sender: to_a, alive }))
    }
}

impl Drop for PatchPort {
    fn drop(&mut self) {
        self.alive.store(false, Ordering::Release);
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
        self.alive.load(Ordering::Acquire)
    }

    fn receive(&self, queue: usize, burst: &mut Burst) {
        self.receiver.receive(queue, burst);
    }

    fn transmit(&self, _queue: usize, batch: &Batch<'_>) -> usize {
        if !self.link_up() {
            return 0;
        }
        self.sender.send_packets(batch)
    }

    fn ready_fd(&self, queue: usize) -> Option<RawFd> {
        self.receiver.ready_fd(queue)
    }

    fn arm(&self, queue: usize, on: bool) -> bool {
        self.receiver.arm(queue, on)
    }

    fn is_cheap_to_poll(&self) -> bool {
        true
    }
}

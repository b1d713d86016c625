//! The port that stands for a bond. Its frames go through the members.

use std::os::fd::RawFd;

use super::{Batch, Port};
use crate::packet::Burst;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct BondPort;

impl Port for BondPort {
    fn kind(&self) -> &'static str {
        "bond"
    }

    fn receive(&self, _queue: usize, _burst: &mut Burst) {}

    fn transmit(&self, _queue: usize, _batch: &Batch<'_>) -> usize {
        0
    }

    fn ready_fd(&self, _queue: usize) -> Option<RawFd> {
        None
    }

    fn arm(&self, _queue: usize, _on: bool) -> bool {
        false
    }
}

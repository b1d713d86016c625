//! In-process port: an embedder's end of a link to the switch.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::{Batch, Port};
use crate::packet::offload::OffloadCaps;
use crate::packet::{Burst, FRAME_MAX, FRAME_MIN, Offload, Packet};
use crate::sys::EventFd;

/// One direction of the link: a bounded queue and the descriptor that says it is not empty.
#[derive(Debug)]
pub(super) struct Lane {
    queue: Mutex<VecDeque<(Vec<u8>, Offload)>>,
    capacity: usize,
    armed: AtomicBool,
    ready: EventFd,
}

impl Lane {
    pub fn new(capacity: usize) -> io::Result<Self> {
        Ok(Self { queue: Mutex::default(), capacity, armed: AtomicBool::new(true), ready: EventFd::new()? })
    }

    /// Adds frames until the queue is full; returns how many went in.
    pub fn push(&self, frames: impl Iterator<Item = (Vec<u8>, Offload)>) -> usize {
        let mut queue = self.queue.lock();
        let mut n = 0;
        for f in frames {
            if queue.len() >= self.capacity {
                break;
            }
            queue.push_back(f);
            n += 1;
        }
        drop(queue);
        if n > 0 && self.armed.swap(false, Ordering::AcqRel) {
            self.ready.signal();
        }
        n
    }

    /// Asks for a signal at the next push; returns whether the queue holds something already.
    pub fn arm(&self) -> bool {
        self.ready.clear();
        self.armed.store(true, Ordering::Release);
        !self.queue.lock().is_empty()
    }

    /// Asks for no signal any more.
    pub fn disarm(&self) {
        self.armed.store(false, Ordering::Release);
        self.ready.clear();
    }

    /// Moves frames into a burst, as many as fit.
    pub fn take(&self, burst: &mut Burst) {
        let mut queue = self.queue.lock();
        while burst.room() > 0
            && let Some((frame, offload)) = queue.pop_front()
        {
            if !(FRAME_MIN..=FRAME_MAX).contains(&frame.len()) {
                burst.errors += 1;
                continue;
            }
            let Some(p) = burst.push() else { break };
            p.set_frame(&frame);
            if offload.is_valid(p.head().len()) {
                p.offload = offload.sanitized();
            } else {
                burst.pop();
                burst.errors += 1;
            }
        }
    }

    /// Drops what waits.
    pub fn clear(&self) {
        self.queue.lock().clear();
    }
}

impl AsRawFd for Lane {
    /// Readable when an armed lane holds something.
    fn as_raw_fd(&self) -> RawFd {
        self.ready.as_raw_fd()
    }
}

#[derive(Debug)]
struct Link {
    to_switch: Lane,
    to_owner: Lane,
    owner_present: AtomicBool,
}

/// The switch's end: add it to a switch with [`crate::Switch::add_port`].
#[derive(Debug)]
pub struct EndpointPort {
    link: Arc<Link>,
    offloads: OffloadCaps,
}

/// The embedder's end. Dropping it takes the port's link down.
#[derive(Debug)]
pub struct Endpoint(Arc<Link>);

impl Endpoint {
    /// Makes both ends of a link that holds up to `capacity` frames a direction; `offloads` says which unfinished
    /// packets the embedder is able to take.
    pub fn pair(capacity: usize, offloads: OffloadCaps) -> io::Result<(EndpointPort, Self)> {
        let capacity = capacity.max(1);
        let link = Arc::new(Link {
            to_switch: Lane::new(capacity)?,
            to_owner: Lane::new(capacity)?,
            owner_present: AtomicBool::new(true),
        });
        Ok((EndpointPort { link: link.clone(), offloads }, Self(link)))
    }

    /// Gives a frame to the switch; `false` when the link is full and the frame was dropped.
    pub fn send(&self, frame: &[u8]) -> bool {
        self.send_burst([(frame, Offload::default())]) == 1
    }

    /// Gives several frames to the switch; returns how many were taken. Frames of impossible length are dropped
    /// and count as taken.
    pub fn send_burst<'a>(&self, frames: impl IntoIterator<Item = (&'a [u8], Offload)>) -> usize {
        self.0.to_switch.push(frames.into_iter().map(|(f, o)| (f.to_vec(), o)))
    }

    /// Takes a frame from the switch.
    pub fn recv(&self) -> Option<Vec<u8>> {
        self.recv_burst(1).pop().map(|(f, _)| f)
    }

    /// Takes up to `max` frames from the switch, each with what is left to be done on it.
    pub fn recv_burst(&self, max: usize) -> Vec<(Vec<u8>, Offload)> {
        let mut queue = self.0.to_owner.queue.lock();
        let n = max.min(queue.len());
        queue.drain(..n).collect()
    }

    /// Asks that [`Endpoint::as_fd`] become readable at the next frame; returns whether frames wait already. The
    /// usual loop is: take frames until there are none, arm, take again if that says so, then wait.
    pub fn arm(&self) -> bool {
        self.0.to_owner.arm()
    }
}

impl AsFd for Endpoint {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.to_owner.ready.as_fd()
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.0.owner_present.store(false, Ordering::Release);
    }
}

impl Port for EndpointPort {
    fn kind(&self) -> &'static str {
        "endpoint"
    }

    fn offloads(&self) -> OffloadCaps {
        self.offloads
    }

    fn link_up(&self) -> bool {
        self.link.owner_present.load(Ordering::Acquire)
    }

    fn receive(&self, _queue: usize, burst: &mut Burst) {
        self.link.to_switch.take(burst);
    }

    fn transmit(&self, _queue: usize, batch: &Batch<'_>) -> usize {
        if !self.link_up() {
            return 0;
        }
        self.link.to_owner.push(batch.iter().map(|p: &Packet| (p.to_vec(), p.offload)))
    }

    fn ready_fd(&self, _queue: usize) -> Option<RawFd> {
        Some(self.link.to_switch.as_raw_fd())
    }

    fn arm(&self, _queue: usize, on: bool) -> bool {
        if on {
            return self.link.to_switch.arm();
        }
        self.link.to_switch.disarm();
        false
    }

    fn is_cheap_to_poll(&self) -> bool {
        true
    }
}

//! In-process port: an embedder's end of a link to the switch.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::{Batch, Port};
use crate::packet::offload::OffloadCaps;
use crate::packet::{Burst, FRAME_MAX, FRAME_MIN, Offload, Packet};
use crate::sys::EventFd;

/// One direction of the link: a bounded queue and the descriptor that says it is not empty.
#[derive(Debug)]
pub(super) struct Lane {
    queue: Mutex<VecDeque<(Vec<u8>, Offload)>>,
    /// Length of the queue, for who polls it: a taker that asked the lock each time would keep the giver out of it.
    waiting: AtomicUsize,
    capacity: usize,
    armed: AtomicBool,
    ready: EventFd,
}

impl Lane {
    pub fn new(capacity: usize) -> io::Result<Self> {
        Ok(Self {
            queue: Mutex::default(),
            waiting: AtomicUsize::new(0),
            capacity,
            armed: AtomicBool::new(true),
            ready: EventFd::new()?,
        })
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
        self.waiting.store(queue.len(), Ordering::Release);
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

    /// Whether there is nothing to take, to the best knowledge of a thread that polls.
    fn seems_empty(&self) -> bool {
        self.waiting.load(Ordering::Acquire) == 0
    }

    /// Takes up to `max` frames.
    fn pop(&self, max: usize) -> Vec<(Vec<u8>, Offload)> {
        if self.seems_empty() {
            return Vec::new();
        }
        let mut queue = self.queue.lock();
        let n = max.min(queue.len());
        let frames = queue.drain(..n).collect();
        self.waiting.store(queue.len(), Ordering::Release);
        frames
    }

    /// Moves frames into a burst, as many as fit.
    pub fn take(&self, burst: &mut Burst) {
        if self.seems_empty() {
            return;
        }
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
        self.waiting.store(queue.len(), Ordering::Release);
    }

    /// Drops what waits.
    pub fn clear(&self) {
        let mut queue = self.queue.lock();
        queue.clear();
        self.waiting.store(0, Ordering::Release);
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
        self.0.to_owner.pop(max)
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    /// A thread that polls for frames gets in the way of no thread that brings some.
    #[test]
    fn polling_an_empty_link_takes_no_lock() {
        let (port, end) = Endpoint::pair(4, OffloadCaps::empty()).unwrap();
        let link = port.link.clone();
        let (owner, switch) = (link.to_owner.queue.lock(), link.to_switch.queue.lock());
        let (done, polled) = channel();
        let poller = std::thread::spawn(move || {
            let mut burst = Burst::new();
            port.receive(0, &mut burst);
            done.send(end.recv().is_none() && burst.is_empty()).unwrap();
        });
        let polled = polled.recv_timeout(Duration::from_secs(20));
        drop((owner, switch));
        poller.join().unwrap();
        assert_eq!(polled, Ok(true));
    }
}

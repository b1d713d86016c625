//! Events for controllers and other watchers: packets, removed rules, port changes.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::clock::Nanos;
use crate::packet::key::FlowKey;
use crate::pipeline::FlowSpec;
use crate::port::PortId;
use crate::sys::EventFd;

/// Something that happened in the switch.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// A rule gave a packet to the controllers.
    PacketIn {
        /// Port it came in by.
        in_port: PortId,
        /// Why, in OpenFlow's numbers.
        reason: u8,
        /// Table of the rule.
        table: u8,
        /// Cookie of the rule.
        cookie: u64,
        /// Whole length of the frame.
        length: usize,
        /// The frame, perhaps cut.
        frame: Vec<u8>,
        /// Key at the time, with metadata and registers.
        key: Box<FlowKey>,
    },
    /// A rule went that was to be reported.
    FlowRemoved {
        /// The rule.
        spec: Box<FlowSpec>,
        /// Why, in OpenFlow's numbers: 0 idle, 1 hard, 2 delete.
        reason: u8,
        /// Packets and bytes it handled.
        counts: (u64, u64),
        /// How long it was there.
        duration: Nanos,
    },
    /// A port was added.
    PortAdded(PortId),
    /// A port was removed.
    PortRemoved(PortId),
    /// A port's configuration or link changed.
    PortChanged(PortId),
}

#[derive(Debug)]
struct Queue {
    list: Mutex<VecDeque<Event>>,
    capacity: usize,
    ready: EventFd,
}

/// Receives events; they wait in a bounded queue and are lost when it is full. Dropping it ends the subscription.
#[derive(Debug)]
pub struct Subscription(Arc<Queue>);

impl Subscription {
    /// Takes the oldest event.
    pub fn next_event(&self) -> Option<Event> {
        let mut list = self.0.list.lock();
        let e = list.pop_front();
        if list.is_empty() {
            self.0.ready.clear();
        }
        e
    }
}

impl AsFd for Subscription {
    /// Readable while events wait.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.ready.as_fd()
    }
}

/// All subscribers of one switch.
#[derive(Debug, Default)]
pub(crate) struct Events(Mutex<Vec<Weak<Queue>>>);

impl Events {
    pub fn subscribe(&self, capacity: usize) -> io::Result<Subscription> {
        let q = Arc::new(Queue { list: Mutex::default(), capacity: capacity.max(1), ready: EventFd::new()? });
        self.0.lock().push(Arc::downgrade(&q));
        Ok(Subscription(q))
    }

    /// Tells everyone; `make` is called only if there is anyone.
    pub fn publish(&self, make: impl FnOnce() -> Event) {
        let mut queues = self.0.lock();
        queues.retain(|q| q.strong_count() > 0);
        if queues.is_empty() {
            return;
        }
        let e = make();
        for q in queues.iter().filter_map(Weak::upgrade) {
            let mut list = q.list.lock();
            if list.len() < q.capacity {
                list.push_back(e.clone());
                q.ready.signal();
            }
        }
    }
}

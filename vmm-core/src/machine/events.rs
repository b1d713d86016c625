//! What a machine tells its owner.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why a machine stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel panicked.
    Panic,
    /// The guest caused a triple fault.
    TripleFault,
    /// A test guest ended with this code.
    Exit(u8),
    /// The owner stopped it.
    Stopped,
    /// It goes on elsewhere: a live migration succeeded.
    Moved,
    /// A vCPU or a device failed; the text says what and what to do.
    Error(String),
}

/// Something that happened to a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VmEvent {
    /// vCPUs began to run.
    Started,
    /// vCPUs and devices are quiet.
    Paused,
    /// vCPUs run again.
    Resumed,
    /// The serial console is at this pseudo-terminal, or a port of the virtio console: the serial console comes first,
    /// then the ports in their order.
    ConsolePty(PathBuf),
    /// The guest's kernel panicked.
    Panicked,
    /// The machine stopped, for this reason. The last event.
    Stopped(StopReason),
}

/// Events that nobody takes are dropped beyond this number, the oldest first.
const MAX_EVENTS: usize = 1024;

/// A queue of events with a descriptor that polls as readable while it is not empty.
pub struct Events {
    queue: Mutex<VecDeque<VmEvent>>,
    ready: EventFd,
}

impl Events {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { queue: Mutex::default(), ready: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? })
    }

    pub(super) fn push(&self, event: VmEvent) {
        let mut queue = self.queue.lock();
        if queue.len() == MAX_EVENTS {
            queue.pop_front();
        }
        queue.push_back(event);
        // The counter overflows after 2^64 writes at the earliest.
        let _ = self.ready.write(1);
    }

    /// The oldest event that has not been taken, if there is one.
    pub fn take(&self) -> Option<VmEvent> {
        let mut queue = self.queue.lock();
        let event = queue.pop_front();
        if queue.is_empty() {
            // Empties the counter; an empty one is no error.
            let _ = self.ready.read();
        }
        event
    }

    /// A descriptor that polls as readable while there are events.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor lives as long as `self`, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.ready.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readable(events: &Events) -> bool {
        let mut p = libc::pollfd { fd: events.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        unsafe { libc::poll(&mut p, 1, 0) == 1 }
    }

    #[test]
    fn the_descriptor_follows_the_queue() {
        let events = Events::new().unwrap();
        assert!(!readable(&events));
        events.push(VmEvent::Started);
        events.push(VmEvent::Paused);
        assert!(readable(&events));
        assert_eq!(events.take(), Some(VmEvent::Started));
        assert!(readable(&events));
        assert_eq!(events.take(), Some(VmEvent::Paused));
        assert!(!readable(&events));
        assert_eq!(events.take(), None);
        for _ in 0..2 * MAX_EVENTS {
            events.push(VmEvent::Resumed);
        }
        assert_eq!(std::iter::from_fn(|| events.take()).count(), MAX_EVENTS);
    }
}

//! A bounded queue of events with a descriptor that is readable while it is not empty.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::KeeperEvent;

const KEPT: usize = 1024;

#[derive(Debug)]
pub(super) struct Events {
    queue: Mutex<VecDeque<KeeperEvent>>,
    reader: UnixStream,
    writer: UnixStream,
}

impl Events {
    pub(super) fn new() -> io::Result<Self> {
        let (reader, writer) = UnixStream::pair()?;
        reader.set_nonblocking(true)?;
        writer.set_nonblocking(true)?;
        Ok(Events { queue: Mutex::default(), reader, writer })
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<KeeperEvent>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, event: KeeperEvent) {
        let mut queue = self.queue();
        if queue.is_empty() {
            // One byte at most is ever in the socket, so there is room for it.
            let _ = (&self.writer).write(&[1]);
        }
        if event == KeeperEvent::Renewed && queue.back() == Some(&event) {
            return;
        }
        if queue.len() == KEPT {
            queue.pop_front();
        }
        queue.push_back(event);
    }

    pub(super) fn take(&self) -> Option<KeeperEvent> {
        let mut queue = self.queue();
        let event = queue.pop_front()?;
        if queue.is_empty() {
            let _ = (&self.reader).read(&mut [0]);
        }
        Some(event)
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    fn readable(events: &Events) -> bool {
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn the_descriptor_is_readable_while_there_are_events_and_the_queue_is_bounded() {
        let events = Events::new().unwrap();
        assert!(!readable(&events));
        events.push(KeeperEvent::Acquired(1));
        events.push(KeeperEvent::Renewed);
        events.push(KeeperEvent::Renewed);
        assert!(readable(&events));
        assert_eq!(events.take(), Some(KeeperEvent::Acquired(1)));
        assert!(readable(&events));
        assert_eq!(events.take(), Some(KeeperEvent::Renewed));
        assert!(!readable(&events) && events.take().is_none());
        for n in 0..2 * KEPT as u64 {
            events.push(KeeperEvent::Acquired(n));
        }
        assert_eq!(events.take(), Some(KeeperEvent::Acquired(KEPT as u64)));
    }
}

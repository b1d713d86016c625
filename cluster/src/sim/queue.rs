//! The event queue: what happens next, and in which order when it happens at once.

use core::cmp::Reverse;
use std::collections::BinaryHeap;

/// When an event is due, how many were queued before it, and where it is kept. The heap moves only these.
type Entry = Reverse<(u64, u32, u32)>;

/// Events by time; those of one moment in the order in which they were queued.
pub(super) struct Queue<E> {
    heap: BinaryHeap<Entry>,
    events: Vec<Option<E>>,
    free: Vec<u32>,
    order: u32,
    end: u64,
}

impl<E> Queue<E> {
    /// A queue that forgets at once what would happen after `end`.
    pub(super) fn new(end: u64) -> Self {
        Queue { heap: BinaryHeap::new(), events: Vec::new(), free: Vec::new(), order: 0, end }
    }

    pub(super) fn push(&mut self, at: u64, event: E) {
        self.order += 1;
        if at > self.end {
            return;
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.events.push(None);
            self.events.len() as u32 - 1
        });
        self.events[slot as usize] = Some(event);
        self.heap.push(Reverse((at, self.order, slot)));
    }

    /// The next event with its time and its number.
    pub(super) fn pop(&mut self) -> Option<(u64, u32, E)> {
        let Reverse((at, order, slot)) = self.heap.pop()?;
        self.free.push(slot);
        Some((at, order, self.events[slot as usize].take()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_by_time_and_then_in_the_order_of_their_queueing() {
        let mut queue = Queue::new(10);
        for (at, event) in [(5, 'a'), (3, 'b'), (11, 'c'), (3, 'd'), (10, 'e')] {
            queue.push(at, event);
        }
        assert_eq!(queue.pop(), Some((3, 2, 'b')));
        queue.push(3, 'f');
        let rest: Vec<_> = std::iter::from_fn(|| queue.pop()).map(|(_, _, event)| event).collect();
        assert_eq!(rest, ['d', 'f', 'a', 'e']);
    }
}

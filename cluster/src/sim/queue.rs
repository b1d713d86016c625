//! The event queue: what happens next, and in which order when it happens at once.

use core::cmp::Reverse;
use std::collections::BinaryHeap;

/// So many milliseconds from now on have a list of events each; what is later is in a heap.
const NEAR: usize = 64 * 64;
/// No event.
const NONE: u32 = u32::MAX;

/// The events of one moment, the first queued first.
#[derive(Clone, Copy)]
struct Moment {
    first: u32,
    last: u32,
}

#[derive(Clone, Copy)]
struct Place {
    /// How many events were queued before the one here.
    order: u32,
    /// The next one of the same moment.
    next: u32,
}

/// Events by time; those of one moment in the order in which they were queued.
pub(super) struct Queue<E> {
    /// The time of the last event that was taken.
    now: u64,
    /// The moments from `now` on, each at its time modulo their number.
    near: Vec<Moment>,
    /// Which of those have events, a bit each, and which words of that are not zero.
    busy: [u64; 64],
    busy_words: u64,
    /// When an event is due, how many were queued before it, and where it is kept.
    far: BinaryHeap<Reverse<(u64, u32, u32)>>,
    events: Vec<Option<E>>,
    places: Vec<Place>,
    free: Vec<u32>,
    order: u32,
    end: u64,
}

impl<E> Queue<E> {
    /// A queue that forgets at once what would happen after `end`.
    pub(super) fn new(end: u64) -> Self {
        Queue {
            now: 0,
            near: vec![Moment { first: NONE, last: NONE }; NEAR],
            busy: [0; 64],
            busy_words: 0,
            far: BinaryHeap::new(),
            events: Vec::new(),
            places: Vec::new(),
            free: Vec::new(),
            order: 0,
            end,
        }
    }

    pub(super) fn push(&mut self, at: u64, event: E) {
        self.order += 1;
        if at > self.end {
            return;
        }
        let place = Place { order: self.order, next: NONE };
        let slot = self.free.pop().unwrap_or_else(|| {
            self.events.push(None);
            self.places.push(place);
            self.events.len() as u32 - 1
        });
        self.events[slot as usize] = Some(event);
        self.places[slot as usize] = place;
        if at < self.now || at - self.now >= NEAR as u64 {
            self.far.push(Reverse((at, self.order, slot)));
            return;
        }
        let index = at as usize % NEAR;
        let moment = &mut self.near[index];
        if moment.first == NONE {
            moment.first = slot;
            self.busy[index / 64] |= 1 << (index % 64);
            self.busy_words |= 1 << (index / 64);
        } else {
            self.places[moment.last as usize].next = slot;
        }
        moment.last = slot;
    }

    /// The first near moment with events.
    fn next_near(&self) -> Option<u64> {
        let index = self.now as usize % NEAR;
        let (word, bit) = (index / 64, index as u32 % 64);
        let here = self.busy[word] >> bit;
        if here != 0 {
            return Some(self.now + u64::from(here.trailing_zeros()));
        }
        // From the next word around to the lower bits of this one.
        let others = self.busy_words.rotate_right(word as u32 + 1);
        let skipped = (others != 0).then(|| others.trailing_zeros())?;
        let bits = self.busy[(word + 1 + skipped as usize) % 64].trailing_zeros();
        Some(self.now + u64::from(64 - bit + 64 * skipped + bits))
    }

    /// The next event with its time and its number.
    pub(super) fn pop(&mut self) -> Option<(u64, u32, E)> {
        let near = self.next_near().map(|at| {
            let slot = self.near[at as usize % NEAR].first;
            (at, self.places[slot as usize].order, slot)
        });
        let far = self.far.peek().map(|Reverse(entry)| *entry);
        let (at, order, slot) = match (near, far) {
            (Some(near), far) if far.is_none_or(|far| near < far) => {
                self.take_near(near.0);
                near
            }
            _ => self.far.pop()?.0,
        };
        self.now = self.now.max(at);
        self.free.push(slot);
        Some((at, order, self.events[slot as usize].take()?))
    }

    /// Takes the first event of a near moment off its list.
    fn take_near(&mut self, at: u64) {
        let index = at as usize % NEAR;
        let moment = &mut self.near[index];
        moment.first = self.places[moment.first as usize].next;
        if moment.first == NONE {
            let word = &mut self.busy[index / 64];
            *word &= !(1 << (index % 64));
            if *word == 0 {
                self.busy_words &= !(1 << (index / 64));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::schedule::Rng;
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

    #[test]
    fn near_and_far_events_come_as_from_one_heap() {
        let mut rng = Rng::new(7);
        for _ in 0..50 {
            let (mut queue, mut heap, mut order, mut now) = (Queue::new(100_000), BinaryHeap::new(), 0, 0);
            for _ in 0..3000 {
                if rng.chance(55) {
                    let most = [2, 70, 4097, 20_000][rng.range(0, 4) as usize];
                    let at = now + rng.range(0, most);
                    order += 1;
                    queue.push(at, order);
                    if at <= 100_000 {
                        heap.push(Reverse((at, order)));
                    }
                } else {
                    let expected = heap.pop().map(|Reverse((at, order))| (at, order, order));
                    assert_eq!(queue.pop(), expected);
                    now = expected.map_or(now, |(at, ..)| at);
                }
            }
            while let Some(Reverse((at, order))) = heap.pop() {
                assert_eq!(queue.pop(), Some((at, order, order)));
            }
            assert_eq!(queue.pop(), None);
        }
    }
}

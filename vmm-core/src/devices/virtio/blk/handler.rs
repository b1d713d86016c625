//! Serves one queue of a block device: does its requests, or leaves them to a queue of the back-end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use blockfmt::queue::Pace;
use vmm_sys_util::epoll::EventSet;

use super::super::chain::{Chain, Segment};
use super::super::device::{DeviceError, QueueHandler};
use super::super::iov::IoVectors;
use super::super::worker::Context;
use super::Core;
use super::deferred::{Deferred, Flight, Step};
use super::request::{Action, Erase, Outcome, Reply, Transfer, parse};

/// What the event of the back-end's queue is watched as.
const ENDED: u32 = 0;
/// Requests that are taken before what has ended meanwhile is answered.
const BATCH: u32 = 16;

/// The queue of the back-end.
enum Later {
    /// Nothing was left to it yet: it costs threads and memory.
    Unused,
    /// There is none.
    Never,
    Queue(Box<Deferred>),
}

impl Later {
    fn deferred(&mut self) -> Option<&mut Deferred> {
        match self {
            Later::Queue(deferred) => Some(deferred),
            Later::Unused | Later::Never => None,
        }
    }

    /// Gets a queue from the back-end.
    fn make(core: &Core, index: usize, context: &Context) -> Self {
        let size = context.queues[index].as_ref().map_or(1, |queue| queue.layout().size);
        let made = Deferred::new(&*core.backend, &context.memory, size).and_then(|deferred| {
            deferred.iter().try_for_each(|d| context.watch(d.event(), ENDED, EventSet::IN))?;
            Ok(deferred)
        });
        match made {
            Ok(deferred) => deferred.map_or(Later::Never, |deferred| Later::Queue(Box::new(deferred))),
            Err(error) => {
                tracing::warn!(%error, "The disk gets no queue: its requests are done one after the other");
                Later::Never
            }
        }
    }
}

/// The handler of queue `index`.
pub(super) struct Requests {
    core: Arc<Core>,
    can_flush: bool,
    index: usize,
    later: Later,
    transfers: Pace,
    /// For flushes, discards and write-zeroes.
    others: Pace,
    chain: Chain,
    parts: Vec<Segment>,
    vectors: IoVectors,
    ended: Vec<(Flight, io::Result<()>)>,
}

/// Does something with the back-end if `pace` wants that, or there is no queue to leave it to; otherwise returns that
/// queue.
fn direct_or_later<'a>(
    later: &'a mut Later,
    pace: &mut Pace,
    more: bool,
    make: impl FnOnce() -> Later,
    mut run: impl FnMut() -> io::Result<()>,
) -> Result<io::Result<()>, &'a mut Deferred> {
    if !matches!(later, Later::Never) {
        let done = pace.run(more, || {
            if let Later::Queue(deferred) = later {
                // What was left to it does not wait for us.
                deferred.submit();
            }
            run()
        });
        if let Some(result) = done {
            return Ok(result);
        }
        if matches!(later, Later::Unused) {
            *later = make();
        }
    }
    match later {
        Later::Queue(deferred) => Err(deferred),
        Later::Unused | Later::Never => Ok(run()),
    }
}

impl Requests {
    pub(super) fn new(core: Arc<Core>, can_flush: bool, index: usize) -> Self {
        Self {
            core,
            can_flush,
            index,
            later: Later::Unused,
            transfers: Pace::new(),
            others: Pace::of_long_requests(),
            chain: Chain::default(),
            parts: Vec::new(),
            vectors: IoVectors::default(),
            ended: Vec::new(),
        }
    }

    /// Begins a request; returns where its answer goes and, unless it is under way now, the outcome. `more` tells
    /// whether others wait.
    fn execute(
        &mut self,
        chain: &Chain,
        context: &Context,
        more: bool,
    ) -> Result<(Reply, Option<Outcome>), DeviceError> {
        let (reply, action) = parse(&self.core, chain, &context.memory, &mut self.parts)?;
        let outcome = match action {
            Action::Transfer(transfer) => self.transfer(reply, transfer, context, more),
            Action::Flush => self.flush(reply, context, more),
            Action::Erase(ranges) => self.erase(reply, ranges.into_iter(), context, more),
            Action::End(outcome) => Some(outcome),
        };
        Ok((reply, outcome))
    }

    /// Reads into or writes from `self.parts`.
    fn transfer(
        &mut self,
        reply: Reply,
        transfer: Transfer,
        context: &Context,
        more: bool,
    ) -> Option<Outcome> {
        let Self { core, later, transfers, parts, vectors, .. } = self;
        let Transfer { read, offset, len } = transfer;
        let make = || Later::make(core, self.index, context);
        let run = || {
            let mut vectors = vectors.resolve(&context.memory, parts).map_err(io::Error::other)?;
            if read {
                let result = core.backend.read(vectors.scatter(), offset);
                // A read that fails may have written a part.
                vectors.mark_written(len as usize);
                result
            } else {
                core.backend.write(vectors.gather(), offset)
            }
        };
        let outcome = match direct_or_later(later, transfers, more, make, run) {
            Ok(result) => core.transferred(result, read, len),
            Err(deferred) => return core.deferred(deferred.transfer(reply, transfer, parts)),
        };
        if outcome == Outcome::Ok && !read { self.settle(reply, context, more) } else { Some(outcome) }
    }

    fn flush(&mut self, reply: Reply, context: &Context, more: bool) -> Option<Outcome> {
        let Self { core, later, others, .. } = self;
        let make = || Later::make(core, self.index, context);
        match direct_or_later(later, others, more, make, || core.backend.flush()) {
            Ok(result) => Some(core.done(result, &core.counters.flushes)),
            Err(deferred) => core.deferred(deferred.flush(reply)),
        }
    }

    /// Erases one range after the other.
    fn erase(
        &mut self,
        reply: Reply,
        mut ranges: std::vec::IntoIter<Erase>,
        context: &Context,
        more: bool,
    ) -> Option<Outcome> {
        let Self { core, later, others, .. } = self;
        while let Some(range) = ranges.next() {
            let make = || Later::make(core, self.index, context);
            match direct_or_later(later, others, more, make, || core.erase(range)) {
                Ok(result) => match core.done(result, &core.counters.discards) {
                    Outcome::Ok => {}
                    failed => return Some(failed),
                },
                Err(deferred) => return core.deferred(deferred.erase(reply, range, ranges)),
            }
        }
        self.settle(reply, context, more)
    }

    /// Writes through, after a change, when the driver does not flush.
    fn settle(&mut self, reply: Reply, context: &Context, more: bool) -> Option<Outcome> {
        if self.writes_through() { self.flush(reply, context, more) } else { Some(Outcome::Ok) }
    }

    fn writes_through(&self) -> bool {
        !(self.can_flush && self.core.writeback.load(Ordering::Acquire))
    }

    /// A part of a deferred request has ended: begins the next, or returns the outcome.
    fn advance(&mut self, flight: Flight, result: io::Result<()>, context: &Context) -> Option<Outcome> {
        let Flight { reply, step, .. } = flight;
        let core = &self.core;
        let through = self.writes_through();
        let changed = |deferred: &mut Deferred| match through {
            true => core.deferred(deferred.flush(reply)),
            false => Some(Outcome::Ok),
        };
        let deferred = self.later.deferred()?;
        match step {
            Step::Transfer(Transfer { read, len, .. }, filled) => {
                for part in filled {
                    context.memory.mark_written(part.address, u64::from(part.len));
                }
                match core.transferred(result, read, len) {
                    Outcome::Ok if !read => changed(deferred),
                    outcome => Some(outcome),
                }
            }
            Step::Erase(mut ranges) => match core.done(result, &core.counters.discards) {
                Outcome::Ok => match ranges.next() {
                    Some(next) => core.deferred(deferred.erase(reply, next, ranges)),
                    None => changed(deferred),
                },
                failed => Some(failed),
            },
            Step::Flush => Some(core.done(result, &core.counters.flushes)),
        }
    }

    /// Answers deferred requests that have ended. With `wait`, waits for one if some are under way.
    fn collect(&mut self, context: &mut Context, mut wait: bool) -> Result<(), DeviceError> {
        let mut ended = std::mem::take(&mut self.ended);
        let mut first_error = None;
        let mut answered = false;
        // What ends may begin something, which may end at once.
        while let Some(deferred) = self.later.deferred()
            && !deferred.is_empty()
            && deferred.ended(std::mem::take(&mut wait), &mut ended)
        {
            for (flight, result) in ended.drain(..) {
                let reply = flight.reply;
                if let Some(outcome) = self.advance(flight, result, context) {
                    answered = true;
                    if let Err(error) = self.give_back(reply, outcome, context) {
                        first_error.get_or_insert(error);
                    }
                }
            }
        }
        self.ended = ended;
        if let Some(error) = first_error {
            return Err(error);
        }
        if answered && let Some(queue) = &mut context.queues[self.index] {
            queue.publish()?;
            context.signal(self.index)?;
        }
        Ok(())
    }

    /// Answers a request. The driver sees it when the queue is published.
    fn give_back(&self, reply: Reply, outcome: Outcome, context: &mut Context) -> Result<(), DeviceError> {
        self.core.answer(reply, outcome, &context.memory)?;
        if let Some(queue) = &mut context.queues[self.index] {
            queue.add_used(reply.head, reply.used)?;
        }
        Ok(())
    }

    /// Charges a request, or says when it may go on.
    fn admit(&self, chain: &Chain) -> Result<(), Instant> {
        let mut limiter = self.core.limiter.lock();
        if limiter.is_unlimited() {
            return Ok(());
        }
        let bytes = u64::from(chain.readable_len()) + u64::from(chain.writable_len());
        limiter.take(bytes.saturating_sub(17), Instant::now())
    }

    fn is_full(&self) -> bool {
        matches!(&self.later, Later::Queue(deferred) if deferred.is_full())
    }

    fn is_busy(&self) -> bool {
        matches!(&self.later, Later::Queue(deferred) if !deferred.is_empty())
    }

    /// Takes up to [`BATCH`] requests; false when there are no more, or they have to wait.
    fn take(&mut self, chain: &mut Chain, context: &mut Context) -> Result<bool, DeviceError> {
        for _ in 0..BATCH {
            if context.stopping() || self.is_full() {
                return Ok(false);
            }
            let Some(queue) = &mut context.queues[self.index] else { return Ok(false) };
            if !queue.pop(chain)? {
                return Ok(false);
            }
            if let Err(at) = self.admit(chain) {
                queue.unpop();
                self.core.counters.throttled.fetch_add(1, Ordering::Relaxed);
                context.deadline = Some(at);
                return Ok(false);
            }
            let more = queue.available().is_ok_and(|n| n > 0) || self.is_busy();
            self.core.counters.requests.fetch_add(1, Ordering::Relaxed);
            match self.execute(chain, context, more) {
                Ok((reply, Some(outcome))) => {
                    self.give_back(reply, outcome, context)?;
                    if let Some(queue) = &mut context.queues[self.index] {
                        queue.publish()?;
                    }
                    context.signal(self.index)?;
                }
                Ok((_, None)) => {}
                Err(error) => {
                    self.core.counters.answered.fetch_add(1, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
        Ok(true)
    }

    fn serve(&mut self, chain: &mut Chain, context: &mut Context) -> Result<(), DeviceError> {
        loop {
            let Some(queue) = &mut context.queues[self.index] else { return Ok(()) };
            queue.disable_notification()?;
            while self.take(chain, context)? {
                self.collect(context, false)?;
            }
            self.collect(context, false)?;
            // Who waits for time or for an end need not be told of more requests.
            if context.stopping() || context.deadline.is_some() || self.is_full() {
                return Ok(());
            }
            let Some(queue) = &mut context.queues[self.index] else { return Ok(()) };
            if !queue.enable_notification()? {
                return Ok(());
            }
        }
    }
}

impl QueueHandler for Requests {
    fn queue(&mut self, _index: usize, context: &mut Context) -> Result<(), DeviceError> {
        let mut chain = std::mem::take(&mut self.chain);
        let result = self.serve(&mut chain, context);
        self.chain = chain;
        result
    }

    fn event(&mut self, _token: u32, _ready: EventSet, context: &mut Context) -> Result<(), DeviceError> {
        self.collect(context, false)?;
        // The driver goes on as it is answered: here is more to do, as a rule. While a rate limit holds requests back,
        // they wait for their time.
        if context.deadline.is_some() { Ok(()) } else { self.queue(self.index, context) }
    }

    fn timer(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        self.queue(self.index, context)
    }

    fn stop(&mut self, context: &mut Context) {
        while self.is_busy() {
            // Whatever is wrong with the driver's queue, the back-end is not left before all of it has ended.
            if let Err(error) = self.collect(context, true) {
                tracing::warn!(%error, "Requests that have ended cannot be answered");
            }
        }
        // The back-end may be closed, and another one opened in its place, before the next start.
        self.later = Later::Unused;
    }
}

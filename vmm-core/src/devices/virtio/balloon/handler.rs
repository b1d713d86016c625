//! Serves all queues of a balloon.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_sys_util::epoll::EventSet;
use zerocopy::{FromBytes, IntoBytes};

use super::super::chain::{Chain, Segment};
use super::super::device::{DeviceError, QueueHandler};
use super::super::worker::Context;
use super::discard::discard;
use super::{Core, FIRST_HINT, HINT_DONE, MemoryStatistics, PAGE};
use crate::memory::GuestMemory;

const INFLATE: usize = 0;
const WAKE: u32 = 0;
/// Page numbers read at once.
const BATCH: usize = 256;

/// Indices of the optional queues.
#[derive(Clone, Copy)]
pub(super) struct Queues {
    pub(super) statistics: Option<usize>,
    pub(super) hints: Option<usize>,
    pub(super) reports: Option<usize>,
}

#[derive(Clone, Copy, FromBytes, IntoBytes)]
#[repr(C, packed)]
struct Statistic {
    tag: u16,
    value: u64,
}

pub(super) struct Pages {
    core: Arc<Core>,
    queues: Queues,
    /// The statistics buffer that the driver waits for.
    held: Option<u16>,
    /// Whether the pages that the driver names answer the current request.
    hinting: bool,
    chain: Chain,
}

impl Pages {
    pub(super) fn new(core: Arc<Core>, queues: Queues) -> Self {
        Self { core, queues, held: None, hinting: false, chain: Chain::default() }
    }

    fn free(&self, memory: &GuestMemory, address: u64, len: u64) {
        let freed = discard(memory, address, len);
        self.core.discarded.fetch_add(freed, Ordering::Relaxed);
    }

    /// Frees the pages whose numbers the driver wrote; neighbours together.
    fn inflate(&self, memory: &GuestMemory) -> Result<(), DeviceError> {
        let mut reader = self.chain.reader(memory);
        let mut run: Option<(u64, u64)> = None;
        loop {
            let mut numbers = [0; BATCH];
            let bytes = reader.read(numbers.as_mut_bytes())?;
            for number in &numbers[..bytes / size_of::<u32>()] {
                let address = u64::from(u32::from_le(*number)) * PAGE;
                run = match run {
                    Some((start, end)) if end == address => Some((start, end + PAGE)),
                    // Drivers also count downwards.
                    Some((start, end)) if address + PAGE == start => Some((address, end)),
                    other => {
                        if let Some((start, end)) = other {
                            self.free(memory, start, end - start);
                        }
                        Some((address, address + PAGE))
                    }
                };
            }
            if bytes == 0 {
                break;
            }
        }
        if let Some((start, end)) = run {
            self.free(memory, start, end - start);
        }
        Ok(())
    }

    fn free_writable(&self, memory: &GuestMemory) {
        for Segment { address, len } in self.chain.writable() {
            self.free(memory, *address, u64::from(*len));
        }
    }

    /// The driver says which request its pages belong to, names pages, or says that it is done.
    fn hint(&mut self, memory: &GuestMemory) -> Result<(), DeviceError> {
        let id = self.chain.reader(memory).read_obj::<u32>()?.map(u32::from_le);
        if let Some(id) = id {
            let wanted = self.core.config.lock().hint;
            self.hinting = id == wanted && id >= FIRST_HINT;
            if id < FIRST_HINT && wanted >= FIRST_HINT {
                // All are named; the driver keeps them from use until it hears this.
                self.core.config.lock().hint = HINT_DONE;
                self.core.changed();
            }
        }
        if self.hinting {
            self.free_writable(memory);
        }
        Ok(())
    }

    fn learn(&self, memory: &GuestMemory) -> Result<(), DeviceError> {
        let mut reader = self.chain.reader(memory);
        let mut all = MemoryStatistics::default();
        // A driver may send more kinds than are known, but not without end.
        for _ in 0..64 {
            let Some(statistic) = reader.read_obj::<Statistic>()? else { break };
            let slot = match u16::from_le(statistic.tag) {
                0 => &mut all.swap_in,
                1 => &mut all.swap_out,
                2 => &mut all.major_faults,
                3 => &mut all.minor_faults,
                4 => &mut all.free,
                5 => &mut all.total,
                6 => &mut all.available,
                7 => &mut all.caches,
                8 => &mut all.huge_allocated,
                9 => &mut all.huge_failed,
                _ => continue,
            };
            *slot = Some(u64::from_le(statistic.value));
        }
        *self.core.statistics.lock() = Some(all);
        Ok(())
    }

    /// Gives the statistics buffer back: that asks the driver to fill it anew.
    fn fetch(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        let Some(index) = self.queues.statistics else { return Ok(()) };
        if let Some(queue) = &mut context.queues[index]
            && let Some(head) = self.held
            && self.core.wanted.swap(false, Ordering::AcqRel)
        {
            queue.push(head, 0)?;
            self.held = None;
        }
        Ok(context.signal(index)?)
    }
}

impl QueueHandler for Pages {
    fn start(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        Ok(context.watch(self.core.wake.as_raw_fd(), WAKE, EventSet::IN)?)
    }

    fn queue(&mut self, index: usize, context: &mut Context) -> Result<(), DeviceError> {
        loop {
            while !context.stopping()
                && let Some(queue) = &mut context.queues[index]
                && queue.pop(&mut self.chain)?
            {
                let memory = &context.memory;
                if index == INFLATE {
                    self.inflate(memory)?;
                } else if Some(index) == self.queues.statistics {
                    self.learn(memory)?;
                    if let Some(old) = self.held.replace(self.chain.head()) {
                        // A driver sends one buffer; a second one frees the first.
                        queue.push(old, 0)?;
                    }
                    self.fetch(context)?;
                    continue;
                } else if Some(index) == self.queues.hints {
                    self.hint(memory)?;
                } else if Some(index) == self.queues.reports {
                    self.free_writable(memory);
                }
                let Some(queue) = &mut context.queues[index] else { return Ok(()) };
                queue.push(self.chain.head(), 0)?;
                context.signal(index)?;
            }
            let Some(queue) = &mut context.queues[index] else { return Ok(()) };
            if !queue.enable_notification()? || context.stopping() {
                return Ok(());
            }
        }
    }

    fn event(&mut self, _token: u32, _ready: EventSet, context: &mut Context) -> Result<(), DeviceError> {
        // The count does not matter.
        let _ = self.core.wake.read();
        self.fetch(context)
    }

    fn stop(&mut self, context: &mut Context) {
        // The driver's waiting buffer is taken again at the next start, here or where the state moves to.
        if let Some(index) = self.queues.statistics
            && self.held.take().is_some()
            && let Some(queue) = &mut context.queues[index]
        {
            queue.unpop();
        }
    }
}

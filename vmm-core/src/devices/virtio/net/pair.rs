//! Serves one pair of receive and transmit queues, and the control queue with the first.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;
use zerocopy::IntoBytes;

use super::super::chain::{Chain, Segment};
use super::super::device::{DeviceError, QueueHandler};
use super::super::iov::IoVectors;
use super::super::worker::Context;
use super::{Core, HEADER_LEN, Header, LINK_UP, NetPort, Sent, control, net_features as f};

/// Room for the largest frame a port may deliver, with its header.
const FRAME_MAX: usize = HEADER_LEN + 14 + 4 + 65536;
const PORT: u32 = 0;
const WAKE: u32 = 1;
/// How often a lost connection is tried again.
const RETRY: Duration = Duration::from_millis(500);
/// Frames taken from one side before the other gets its turn.
const BURST: usize = 64;

pub(super) struct Pair {
    core: Arc<Core>,
    port: Box<dyn NetPort>,
    index: usize,
    mergeable: bool,
    control: Option<usize>,
    /// A frame that waits for buffers of the driver, or for the rate limit: its length within `frame`.
    held: Option<usize>,
    /// Allocated with the first frame.
    frame: Vec<u8>,
    /// Whether the transmit queue waits for the port.
    send_blocked: bool,
    connected: bool,
    retry: Option<Instant>,
    chain: Chain,
    chains: Vec<Chain>,
    parts: Vec<Segment>,
    vectors: IoVectors,
}

impl Pair {
    pub(super) fn new(
        core: Arc<Core>,
        port: Box<dyn NetPort>,
        index: usize,
        features: u64,
        control: Option<usize>,
    ) -> Self {
        Self {
            core,
            port,
            index,
            mergeable: features & f::MRG_RXBUF != 0,
            control,
            held: None,
            frame: Vec::new(),
            send_blocked: false,
            connected: true,
            retry: None,
            chain: Chain::default(),
            chains: Vec::new(),
            parts: Vec::new(),
            vectors: IoVectors::default(),
        }
    }

    fn rx(&self) -> usize {
        self.index * 2
    }

    fn tx(&self) -> usize {
        self.index * 2 + 1
    }

    /// Watches the port for what this pair can use now.
    fn watch(&self, context: &Context) -> Result<(), DeviceError> {
        let Some(fd) = self.port.descriptor().filter(|_| self.connected) else { return Ok(()) };
        if self.index >= usize::from(self.core.active.load(Ordering::Acquire)) {
            // An inactive queue of a tap device reports nothing but an error.
            context.unwatch(fd);
            return Ok(());
        }
        let mut events = EventSet::empty();
        if self.held.is_none() {
            events |= EventSet::IN;
        }
        if self.send_blocked || self.port.wants_write() {
            events |= EventSet::OUT;
        }
        Ok(context.watch(fd, PORT, events)?)
    }

    fn lost(&mut self, error: &std::io::Error, context: &mut Context) {
        if self.connected {
            tracing::info!(%error, "The network back-end went away; waiting for it");
        }
        if let Some(fd) = self.port.descriptor() {
            context.unwatch(fd);
        }
        self.connected = false;
        self.core.set_status(LINK_UP, false);
        self.retry = Some(Instant::now() + RETRY);
        self.schedule(self.retry, context);
    }

    fn schedule(&self, at: Option<Instant>, context: &mut Context) {
        context.deadline = match (context.deadline, at) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
    }

    fn connect(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        self.retry = None;
        match self.port.reconnect() {
            Ok(()) => {
                self.connected = true;
                self.core.set_status(LINK_UP, true);
                self.watch(context)
            }
            Err(error) => {
                self.lost(&error, context);
                Ok(())
            }
        }
    }

    /// Delivers the frame in `self.frame`; false when the driver must provide buffers first.
    fn deliver(&mut self, len: usize, context: &mut Context) -> Result<bool, DeviceError> {
        let counters = &self.core.counters;
        let Some(queue) = &mut context.queues[self.index * 2] else {
            // A queue that the driver took away drops its frames.
            counters.receive_dropped.fetch_add(1, Ordering::Relaxed);
            return Ok(true);
        };
        let limit = if self.mergeable { usize::from(queue.layout().size) } else { 1 };
        let (mut taken, mut room) = (0, 0);
        while room < len && taken < limit {
            if self.chains.len() == taken {
                self.chains.push(Chain::default());
            }
            if !queue.pop(&mut self.chains[taken])? {
                break;
            }
            room += self.chains[taken].writable_len() as usize;
            taken += 1;
        }
        if room < len {
            let hopeless = taken == limit;
            (0..taken).for_each(|_| queue.unpop());
            if hopeless {
                counters.receive_dropped.fetch_add(1, Ordering::Relaxed);
                return Ok(true);
            }
            // A buffer may have come between the look and the request for a notification.
            return if queue.enable_notification()? && usize::from(queue.available()?) > taken {
                self.deliver(len, context)
            } else {
                Ok(false)
            };
        }
        // The last field of the header.
        self.frame[HEADER_LEN - 2..HEADER_LEN].copy_from_slice(&(taken as u16).to_le_bytes());
        let mut done = 0;
        for chain in &self.chains[..taken] {
            let mut writer = chain.writer(&context.memory);
            done += writer.write(&self.frame[done..len])?;
            queue.add_used(chain.head(), writer.written())?;
        }
        queue.publish()?;
        counters.received.fetch_add(1, Ordering::Relaxed);
        counters.received_bytes.fetch_add((len - HEADER_LEN) as u64, Ordering::Relaxed);
        Ok(true)
    }

    /// Moves frames from the port to the driver.
    fn receive(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        for _ in 0..BURST {
            if context.stopping() {
                break;
            }
            let len = match self.held.take() {
                Some(len) => len,
                None => {
                    if self.frame.is_empty() {
                        self.frame = vec![0; FRAME_MAX];
                    }
                    match self.port.receive(&mut self.frame) {
                        Ok(Some(len)) => len,
                        Ok(None) => break,
                        Err(error) => {
                            self.lost(&error, context);
                            break;
                        }
                    }
                }
            };
            if !self.core.filter.lock().accepts(&self.frame[HEADER_LEN..len]) {
                self.core.counters.filtered.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let bytes = (len - HEADER_LEN) as u64;
            let admitted = {
                let mut limiter = self.core.receive_limiter.lock();
                if limiter.is_unlimited() { Ok(()) } else { limiter.take(bytes, Instant::now()) }
            };
            if let Err(at) = admitted {
                self.core.counters.throttled.fetch_add(1, Ordering::Relaxed);
                self.held = Some(len);
                self.schedule(Some(at), context);
                break;
            }
            if !self.deliver(len, context)? {
                self.held = Some(len);
                break;
            }
        }
        context.signal(self.rx())?;
        self.resume_soon(context);
        self.watch(context)
    }

    /// The descriptor is silent about frames that the port holds already: they go on after the others had their turn.
    fn resume_soon(&self, context: &mut Context) {
        if self.held.is_none() && self.connected && self.port.is_ready() {
            self.schedule(Some(Instant::now()), context);
        }
    }

    /// Sends the frame in `chain`; false when the port has no room.
    fn send(&mut self, chain: &Chain, context: &mut Context) -> Result<bool, DeviceError> {
        let counters = &self.core.counters;
        let mut reader = chain.reader(&context.memory);
        // The header is copied: the driver may change it between a check and its use.
        let header = reader.read_obj::<Header>()?;
        let len = reader.remaining() as usize;
        let Some(header) = header.filter(|_| (14..=FRAME_MAX - HEADER_LEN).contains(&len)) else {
            counters.send_dropped.fetch_add(1, Ordering::Relaxed);
            return Ok(true);
        };
        if !self.connected {
            counters.send_dropped.fetch_add(1, Ordering::Relaxed);
            return Ok(true);
        }
        self.parts.clear();
        reader.take(len, &mut self.parts);
        let mut vectors = self.vectors.resolve(&context.memory, &self.parts)?;
        match self.port.send(&header, &mut vectors) {
            Ok(Sent::Yes) => {
                counters.sent.fetch_add(1, Ordering::Relaxed);
                counters.sent_bytes.fetch_add(len as u64, Ordering::Relaxed);
            }
            Ok(Sent::Later) => return Ok(false),
            Ok(Sent::Dropped) => {
                counters.send_dropped.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => {
                counters.send_dropped.fetch_add(1, Ordering::Relaxed);
                self.lost(&error, context);
            }
        }
        Ok(true)
    }

    /// Moves frames from the driver to the port.
    fn transmit(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        let mut chain = std::mem::take(&mut self.chain);
        let result = self.transmit_with(&mut chain, context);
        self.chain = chain;
        context.signal(self.tx())?;
        result
    }

    fn transmit_with(&mut self, chain: &mut Chain, context: &mut Context) -> Result<(), DeviceError> {
        let tx = self.tx();
        self.send_blocked = false;
        loop {
            let Some(queue) = &mut context.queues[tx] else { return Ok(()) };
            queue.disable_notification()?;
            while !context.stopping()
                && let Some(queue) = &mut context.queues[tx]
                && queue.pop(chain)?
            {
                let bytes = u64::from(chain.readable_len());
                let admitted = {
                    let mut limiter = self.core.send_limiter.lock();
                    if limiter.is_unlimited() { Ok(()) } else { limiter.take(bytes, Instant::now()) }
                };
                if let Err(at) = admitted {
                    queue.unpop();
                    self.core.counters.throttled.fetch_add(1, Ordering::Relaxed);
                    self.schedule(Some(at), context);
                    return Ok(());
                }
                let sent = self.send(chain, context)?;
                let Some(queue) = &mut context.queues[tx] else { return Ok(()) };
                if !sent {
                    queue.unpop();
                    self.send_blocked = true;
                    return self.watch(context);
                }
                queue.push(chain.head(), 0)?;
            }
            let Some(queue) = &mut context.queues[tx] else { return Ok(()) };
            if !queue.enable_notification()? || context.stopping() {
                break;
            }
        }
        if self.port.wants_write() { self.watch(context) } else { Ok(()) }
    }

    fn command(&mut self, index: usize, context: &mut Context) -> Result<(), DeviceError> {
        loop {
            while let Some(queue) = &mut context.queues[index]
                && queue.pop(&mut self.chain)?
            {
                let len = control::execute(&self.core, &self.chain, &context.memory)?;
                queue.push(self.chain.head(), len)?;
            }
            context.signal(index)?;
            let Some(queue) = &mut context.queues[index] else { return Ok(()) };
            if !queue.enable_notification()? || context.stopping() {
                return Ok(());
            }
        }
    }
}

impl QueueHandler for Pair {
    fn start(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        context.watch(self.core.wakes[self.index].as_raw_fd(), WAKE, EventSet::IN)?;
        if self.port.descriptor().is_none() {
            return self.connect(context);
        }
        self.resume_soon(context);
        self.watch(context)
    }

    fn queue(&mut self, index: usize, context: &mut Context) -> Result<(), DeviceError> {
        if Some(index) == self.control {
            self.command(index, context)
        } else if index == self.tx() {
            self.transmit(context)
        } else if self.held.is_some() || !self.connected {
            // New receive buffers matter only to a frame that waits for them.
            if self.held.is_some() { self.receive(context) } else { Ok(()) }
        } else {
            if let Some(queue) = &mut context.queues[index] {
                // What is available now was not asked for; only a lack of buffers asks.
                queue.disable_notification()?;
            }
            Ok(())
        }
    }

    fn event(&mut self, token: u32, _ready: EventSet, context: &mut Context) -> Result<(), DeviceError> {
        if token == WAKE {
            // The count does not matter.
            let _ = self.core.wakes[self.index].read();
            return self.watch(context);
        }
        if let Err(error) = self.port.flush() {
            self.lost(&error, context);
            return Ok(());
        }
        if self.send_blocked {
            self.transmit(context)?;
        }
        if self.held.is_none() && self.connected { self.receive(context) } else { self.watch(context) }
    }

    fn timer(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        if self.retry.is_some_and(|at| at <= Instant::now()) {
            self.connect(context)?;
        }
        if self.held.is_some() || (self.connected && self.port.is_ready()) {
            self.receive(context)?;
        }
        self.transmit(context)?;
        self.schedule(self.retry, context);
        Ok(())
    }
}

const _: () = assert!(size_of::<Header>() == HEADER_LEN);

/// Puts a header in front of a received frame.
pub(super) fn put_header(header: &Header, frame: &mut [u8]) {
    frame[..HEADER_LEN].copy_from_slice(header.as_bytes());
}

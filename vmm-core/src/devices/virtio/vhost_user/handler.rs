//! Hands the queues to the back-end and takes them back.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::chain::Chain;
use super::super::device::{DeviceError, QueueHandler};
use super::super::queue::Queue;
use super::super::worker::Context;
use super::connection::{Connection, F_PROTOCOL_FEATURES, Request};
use super::relay::Relay;
use super::{Core, IN_ORDER, VhostUserError};

/// How often a lost back-end is looked for.
const RETRY: Duration = Duration::from_millis(200);
const CONNECTION: u32 = u32::MAX;
/// Class and command of the control queue that set the number of pairs.
const SET_PAIRS: [u8; 2] = [4, 0];

/// Serves the queues by another process.
pub(super) struct External {
    core: Arc<Core>,
    features: u64,
    kicks: Vec<EventFd>,
    /// For queues without an interrupt descriptor of the transport, and those that are relayed: the back-end signals
    /// these.
    calls: Vec<Option<EventFd>>,
    /// Whether buffers have to pass by here on their way back.
    relays: bool,
    /// While there is a connection.
    relay: Option<Relay>,
    chain: Chain,
}

impl External {
    pub(super) fn new(core: Arc<Core>, features: u64, kicks: Vec<EventFd>, relays: bool) -> Self {
        let calls = kicks.iter().map(|_| None).collect();
        Self { core, features, kicks, calls, relays, relay: None, chain: Chain::default() }
    }

    /// Describes everything to the back-end.
    fn hand_over(&mut self, connection: &mut Connection, context: &Context) -> Result<(), DeviceError> {
        // The protocol bit is acknowledged only where it was offered.
        let features = self.features & (connection.features | !F_PROTOCOL_FEATURES);
        if features & !connection.features & !super::super::features::RING_RESET & !local(self.core.is_net)
            != 0
        {
            return Err(VhostUserError::Lacks("features that the driver uses").into());
        }
        if self.relays {
            self.relay = Some(Relay::new(self.core.ring_memory(&context.memory)?, context)?);
        }
        // A relay puts buffers in order by itself, and has to see each of them.
        let hidden = if self.relays { IN_ORDER } else { 0 };
        let accepted = features & connection.features & !hidden;
        connection.send(Request::SetFeatures, &accepted.to_le_bytes(), &[])?;
        connection.set_memory(&context.memory, self.relay.as_ref().map(Relay::memory))?;
        for index in 0..self.kicks.len() {
            let Some(queue) = &context.queues[index] else { continue };
            self.set_up(connection, index, queue, context)?;
        }
        let active = usize::from(self.core.active.load(Ordering::Acquire)) * 2;
        for index in 0..self.kicks.len() {
            if context.queues[index].is_some() && features & connection.features & F_PROTOCOL_FEATURES != 0 {
                let on = !self.core.is_net || index < active;
                connection.vring(Request::SetVringEnable, index, u32::from(on))?;
            }
        }
        Ok(())
    }

    fn set_up(
        &mut self,
        connection: &mut Connection,
        index: usize,
        queue: &Queue,
        context: &Context,
    ) -> Result<(), DeviceError> {
        let relay = self.relay.as_ref().and_then(|relay| Some((relay.memory(), relay.ring(index)?)));
        let (memory, layout, base, kick) = match relay {
            Some((memory, (layout, kick))) => (memory, layout, 0, kick),
            None => (&context.memory, queue.layout(), queue.position().0, &self.kicks[index]),
        };
        let host = |address: u64| Ok::<_, DeviceError>(memory.slice(address, 1)?.host_ptr().addr() as u64);
        let rings = [host(layout.descriptors)?, host(layout.driver)?, host(layout.device)?];
        connection.vring(Request::SetVringNum, index, u32::from(layout.size))?;
        connection.vring(Request::SetVringBase, index, u32::from(base))?;
        connection.vring_address(index, rings)?;
        let interrupt = if self.relays { None } else { context.interrupt().queue_event(index)? };
        match interrupt {
            Some(fd) => connection.vring_fd(Request::SetVringCall, index, fd.as_raw_fd())?,
            None => {
                let call = self.calls[index].insert(EventFd::new(EFD_NONBLOCK)?).as_raw_fd();
                context.watch(call, index as u32, EventSet::IN)?;
                connection.vring_fd(Request::SetVringCall, index, call)?;
            }
        }
        connection.vring_fd(Request::SetVringKick, index, kick.as_raw_fd())?;
        // The back-end does not see what was signalled before it had the descriptor.
        kick.write(1)?;
        Ok(())
    }

    /// Connects if there is no connection, and hands the queues over.
    fn reach(&mut self, held: &mut Option<Connection>, context: &mut Context) -> Result<(), DeviceError> {
        let connection = match held {
            Some(connection) => connection,
            None => held.insert(Connection::open(&self.core.path, self.core.wanted)?),
        };
        self.hand_over(connection, context)?;
        // Not for being readable: an answer to the control queue's thread is no loss of the connection.
        context.watch(connection.descriptor(), CONNECTION, EventSet::READ_HANG_UP)?;
        // What the driver made available before.
        (0..self.kicks.len()).try_for_each(|index| self.forward(index, context))
    }

    /// Passes on to the back-end what the driver made available, where it does not look itself.
    fn forward(&mut self, index: usize, context: &mut Context) -> Result<(), DeviceError> {
        self.relay.as_mut().map_or(Ok(()), |relay| relay.forward(index, &mut self.chain, context))
    }

    /// Ends the connection, or notices that it has ended.
    fn disconnect(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        if let Some(connection) = self.core.connection.lock().take() {
            context.unwatch(connection.descriptor());
        }
        self.lost(context)
    }

    /// Hands the queues over, or looks for the back-end again later.
    fn try_hand_over(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        let core = Arc::clone(&self.core);
        let mut held = core.connection.lock();
        match self.reach(&mut held, context) {
            Ok(()) => {
                drop(held);
                core.set_link(true);
                Ok(())
            }
            Err(DeviceError::Backend(error)) => {
                if held.take().is_some() {
                    tracing::warn!(%error, "The back-end does not take the device");
                } else {
                    tracing::debug!(%error, "The back-end is not there");
                }
                drop(held);
                self.lost(context)
            }
            Err(error) => Err(error),
        }
    }

    /// Shows the driver that the connection is gone, at whatever step of the protocol that happened, and looks for the
    /// back-end again later.
    fn lost(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        self.core.set_link(false);
        // The back-end may hold on to these and signal them for ever.
        for call in self.calls.iter_mut().filter_map(Option::take) {
            context.unwatch(call.as_raw_fd());
        }
        self.end_relay(context);
        // Go on behind what the driver was given back; what was in flight is done again.
        for index in 0..self.kicks.len() {
            let Some(queue) = &mut context.queues[index] else { continue };
            let used = queue.used_index()?;
            let signalled = queue.position().1;
            queue.set_position((used, used));
            // It may have gone before it told the driver.
            if used != signalled {
                context.interrupt().queue(index);
            }
        }
        context.deadline = Some(Instant::now() + RETRY);
        Ok(())
    }

    /// Gives the driver what the back-end was done with.
    fn end_relay(&mut self, context: &mut Context) {
        if let Some(mut relay) = self.relay.take() {
            for index in 0..self.kicks.len() {
                if let Err(error) = relay.give_back(index, context) {
                    tracing::warn!(%error, "The last buffers of the back-end are done again");
                }
            }
        }
    }
}

/// Features that this process provides itself.
fn local(is_net: bool) -> u64 {
    use super::f;
    if is_net { f::MAC | f::STATUS | f::MTU | f::MQ | f::CTRL_VQ } else { 0 }
}

impl QueueHandler for External {
    fn start(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        self.try_hand_over(context)
    }

    fn queue(&mut self, index: usize, context: &mut Context) -> Result<(), DeviceError> {
        self.forward(index, context)
    }

    fn event(&mut self, token: u32, _ready: EventSet, context: &mut Context) -> Result<(), DeviceError> {
        if token == CONNECTION {
            tracing::warn!(path = %self.core.path.display(), "The vhost-user back-end went away; waiting for it");
            return self.disconnect(context);
        }
        let index = token as usize;
        let Some(Some(call)) = self.calls.get(index) else { return Ok(()) };
        // The count does not matter.
        let _ = call.read();
        match &mut self.relay {
            Some(relay) => match relay.give_back(index, context) {
                Err(DeviceError::Backend(error)) => {
                    tracing::warn!(%error, "Connecting to the vhost-user back-end again");
                    self.disconnect(context)
                }
                result => result,
            },
            None => {
                context.interrupt().queue(index);
                Ok(())
            }
        }
    }

    fn timer(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        self.try_hand_over(context)
    }

    fn stop(&mut self, context: &mut Context) {
        self.calls.fill_with(|| None);
        let core = Arc::clone(&self.core);
        let mut held = core.connection.lock();
        let mut bases = vec![None; context.queues.len()];
        for (index, base) in
            bases.iter_mut().enumerate().filter(|(index, _)| context.queues[*index].is_some())
        {
            let Some(connection) = &mut *held else { break };
            match connection.vring_base(index) {
                Ok(next) => *base = Some(next),
                Err(error) => {
                    tracing::warn!(%error, "The back-end did not stop in an orderly way");
                    *held = None;
                }
            }
        }
        self.end_relay(context);
        for (queue, base) in context.queues.iter_mut().zip(bases) {
            let Some(queue) = queue else { continue };
            let used = queue.used_index().unwrap_or(0);
            // The back-end counts in the relay's ring, which returns buffers in order.
            let base = base.filter(|_| !self.relays).unwrap_or(used);
            queue.set_position((base, used));
        }
    }
}

/// The control queue of a network device: only the number of pairs.
pub(super) struct Control {
    core: Arc<Core>,
    pairs: u16,
    chain: Chain,
}

impl Control {
    pub(super) fn new(core: Arc<Core>, pairs: u16) -> Self {
        Self { core, pairs, chain: Chain::default() }
    }

    fn set_pairs(&self, pairs: u16) -> bool {
        if !(1..=self.pairs).contains(&pairs) {
            return false;
        }
        self.core.active.store(pairs, Ordering::Release);
        if let Some(connection) = &mut *self.core.connection.lock() {
            for index in 0..self.pairs * 2 {
                let on = u32::from(index < pairs * 2);
                if let Err(error) = connection.vring(Request::SetVringEnable, usize::from(index), on) {
                    tracing::warn!(%error, "The back-end did not change its queues");
                    return false;
                }
            }
        }
        true
    }
}

impl QueueHandler for Control {
    fn queue(&mut self, index: usize, context: &mut Context) -> Result<(), DeviceError> {
        loop {
            while let Some(queue) = &mut context.queues[index]
                && queue.pop(&mut self.chain)?
            {
                let mut reader = self.chain.reader(&context.memory);
                let command = reader.read_obj::<[u8; 2]>()?;
                let value = reader.read_obj::<u16>()?.map(u16::from_le);
                let done = command == Some(SET_PAIRS) && value.is_some_and(|pairs| self.set_pairs(pairs));
                if self.chain.writer(&context.memory).write(&[u8::from(!done)])? == 0 {
                    return Err(DeviceError::Request("a network command has no room for its status"));
                }
                queue.push(self.chain.head(), 1)?;
            }
            context.signal(index)?;
            let Some(queue) = &mut context.queues[index] else { return Ok(()) };
            if !queue.enable_notification()? || context.stopping() {
                return Ok(());
            }
        }
    }
}

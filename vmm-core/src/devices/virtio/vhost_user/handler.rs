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
use super::{Core, VhostUserError};

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
    /// For queues without an interrupt descriptor of the transport: the back-end signals these.
    calls: Vec<Option<EventFd>>,
}

impl External {
    pub(super) fn new(core: Arc<Core>, features: u64, kicks: Vec<EventFd>) -> Self {
        let calls = kicks.iter().map(|_| None).collect();
        Self { core, features, kicks, calls }
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
        connection.send(Request::SetFeatures, &(features & connection.features).to_le_bytes(), &[])?;
        connection.set_memory(&context.memory)?;
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
        let layout = queue.layout();
        let host =
            |address: u64| Ok::<_, DeviceError>(context.memory.slice(address, 1)?.host_ptr().addr() as u64);
        let rings = [host(layout.descriptors)?, host(layout.driver)?, host(layout.device)?];
        connection.vring(Request::SetVringNum, index, u32::from(layout.size))?;
        connection.vring(Request::SetVringBase, index, u32::from(queue.position().0))?;
        connection.vring_address(index, rings)?;
        match context.interrupt().queue_event(index)? {
            Some(fd) => connection.vring_fd(Request::SetVringCall, index, fd.as_raw_fd())?,
            None => {
                let call = self.calls[index].insert(EventFd::new(EFD_NONBLOCK)?).as_raw_fd();
                context.watch(call, index as u32, EventSet::IN)?;
                connection.vring_fd(Request::SetVringCall, index, call)?;
            }
        }
        connection.vring_fd(Request::SetVringKick, index, self.kicks[index].as_raw_fd())?;
        // The back-end does not see what was signalled before it had the descriptor.
        self.kicks[index].write(1)?;
        Ok(())
    }

    /// Connects if there is no connection, and hands the queues over.
    fn reach(&mut self, held: &mut Option<Connection>, context: &Context) -> Result<(), DeviceError> {
        let connection = match held {
            Some(connection) => connection,
            None => held.insert(Connection::open(&self.core.path, self.core.wanted)?),
        };
        self.hand_over(connection, context)?;
        // Not for being readable: an answer to the control queue's thread is no loss of the connection.
        context.watch(connection.descriptor(), CONNECTION, EventSet::READ_HANG_UP)?;
        Ok(())
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
        // Go on behind what the driver was given back; what was in flight is done again.
        for queue in context.queues.iter_mut().flatten() {
            let used = queue.used_index()?;
            queue.set_position((used, used));
        }
        context.deadline = Some(Instant::now() + RETRY);
        Ok(())
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

    fn queue(&mut self, _index: usize, _context: &mut Context) -> Result<(), DeviceError> {
        Ok(())
    }

    fn event(&mut self, token: u32, _ready: EventSet, context: &mut Context) -> Result<(), DeviceError> {
        if token != CONNECTION {
            if let Some(Some(call)) = self.calls.get(token as usize) {
                // The count does not matter.
                let _ = call.read();
                context.interrupt().queue(token as usize);
            }
            return Ok(());
        }
        tracing::warn!(path = %self.core.path.display(), "The vhost-user back-end went away; waiting for it");
        if let Some(connection) = self.core.connection.lock().take() {
            context.unwatch(connection.descriptor());
        }
        self.lost(context)
    }

    fn timer(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        self.try_hand_over(context)
    }

    fn stop(&mut self, context: &mut Context) {
        self.calls.fill_with(|| None);
        let mut held = self.core.connection.lock();
        for (index, slot) in context.queues.iter_mut().enumerate() {
            let Some(queue) = slot else { continue };
            let Some(connection) = &mut *held else {
                let used = queue.used_index().unwrap_or(0);
                queue.set_position((used, used));
                continue;
            };
            match connection.vring_base(index) {
                Ok(base) => queue.set_position((base, queue.used_index().unwrap_or(base))),
                Err(error) => {
                    tracing::warn!(%error, "The back-end did not stop in an orderly way");
                    *held = None;
                    let used = queue.used_index().unwrap_or(0);
                    queue.set_position((used, used));
                }
            }
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

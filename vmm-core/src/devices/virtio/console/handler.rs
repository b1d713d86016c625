//! Serves all queues of a console.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::super::chain::Chain;
use super::super::device::{DeviceError, QueueHandler};
use super::super::worker::Context;
use super::{Core, input_queue};

const CONTROL_IN: usize = 2;
const CONTROL_OUT: usize = 3;
const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;
/// Messages that wait for the driver's buffers; more are dropped.
const MAX_MESSAGES: usize = 256;
const WAKE: u32 = u32::MAX;
/// Added to the number of a port: somebody wants to connect to it.
const LISTEN: u32 = 1 << 16;
/// Bytes moved at once.
const CHUNK: usize = 1024;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Message {
    port: u32,
    event: u16,
    value: u16,
}

pub(super) struct Ports {
    core: Arc<Core>,
    multiport: bool,
    messages: VecDeque<Vec<u8>>,
    /// By port: the input ended.
    ended: Vec<bool>,
    /// By port: bytes of the current chain that were written already.
    written: Vec<u32>,
    chain: Chain,
}

fn queue_port(index: usize) -> usize {
    if index < 2 { 0 } else { index / 2 - 1 }
}

impl Ports {
    pub(super) fn new(core: Arc<Core>, multiport: bool) -> Self {
        let count = core.ports.len();
        Self {
            core,
            multiport,
            messages: VecDeque::new(),
            ended: vec![false; count],
            written: vec![0; count],
            chain: Chain::default(),
        }
    }

    fn is_open(&self, port: usize) -> bool {
        !self.multiport || self.core.opened.lock()[port]
    }

    fn token(port: usize, output: bool) -> u32 {
        port as u32 * 2 + u32::from(output)
    }

    fn say(&mut self, port: usize, event: u16, value: u16, tail: &[u8]) {
        if self.messages.len() < MAX_MESSAGES {
            let message = Message { port: port as u32, event: event.to_le(), value: value.to_le() };
            self.messages.push_back([message.as_bytes(), tail].concat());
        }
    }

    fn say_size(&mut self) {
        let config = *self.core.config.lock();
        let tail = [config.columns.to_le_bytes(), config.rows.to_le_bytes()].concat();
        self.say(0, RESIZE, 0, &tail);
    }

    fn deliver_messages(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        let Some(queue) = &mut context.queues[CONTROL_IN] else { return Ok(()) };
        while let Some(message) = self.messages.front() {
            if !queue.pop(&mut self.chain)? {
                if queue.enable_notification()? {
                    continue;
                }
                break;
            }
            let mut writer = self.chain.writer(&context.memory);
            writer.write(message)?;
            queue.push(self.chain.head(), writer.written())?;
            self.messages.pop_front();
        }
        Ok(context.signal(CONTROL_IN)?)
    }

    fn hear(&mut self, message: Message, context: &mut Context) -> Result<(), DeviceError> {
        let (event, value) = (u16::from_le(message.event), u16::from_le(message.value));
        let count = self.core.ports.len();
        if event == DEVICE_READY && value == 1 {
            for port in 0..count {
                self.say(port, DEVICE_ADD, 1, &[]);
            }
            return Ok(());
        }
        let port = u32::from_le(message.port) as usize;
        if port >= count {
            return Ok(());
        }
        match event {
            PORT_READY if value == 1 => {
                if port == 0 {
                    self.say(port, CONSOLE_PORT, 1, &[]);
                    self.say_size();
                }
                let name = self.core.ports[port].name.clone();
                if !name.is_empty() {
                    self.say(port, PORT_NAME, 1, name.as_bytes());
                }
                if self.core.ports[port].is_connected() {
                    self.say(port, PORT_OPEN, 1, &[]);
                }
            }
            PORT_OPEN => {
                self.core.opened.lock()[port] = value != 0;
                self.input(port, context)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn control(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        loop {
            while !context.stopping()
                && let Some(queue) = &mut context.queues[CONTROL_OUT]
                && queue.pop(&mut self.chain)?
            {
                let message = self.chain.reader(&context.memory).read_obj::<Message>()?;
                queue.push(self.chain.head(), 0)?;
                if let Some(message) = message {
                    self.hear(message, context)?;
                }
            }
            context.signal(CONTROL_OUT)?;
            self.deliver_messages(context)?;
            let Some(queue) = &mut context.queues[CONTROL_OUT] else { return Ok(()) };
            if !queue.enable_notification()? || context.stopping() {
                return Ok(());
            }
        }
    }

    /// Watches a port's input while the driver has buffers for it, and not otherwise.
    fn input(&mut self, port: usize, context: &mut Context) -> Result<(), DeviceError> {
        let Some(fd) = self.core.ports[port].input() else { return Ok(()) };
        let wanted = self.is_open(port) && !self.ended[port];
        let ready = match &mut context.queues[input_queue(port)] {
            Some(queue) if wanted => queue.available()? != 0 || queue.enable_notification()?,
            _ => false,
        };
        if !ready {
            context.unwatch(fd);
            return Ok(());
        }
        match context.watch(fd, Self::token(port, false), EventSet::IN) {
            // A regular file is always readable.
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => self.read(port, context),
            other => Ok(other?),
        }
    }

    fn read(&mut self, port: usize, context: &mut Context) -> Result<(), DeviceError> {
        let index = input_queue(port);
        let Some(queue) = &mut context.queues[index] else { return Ok(()) };
        if queue.pop(&mut self.chain)? {
            let mut bytes = [0; CHUNK];
            let room = (self.chain.writable_len() as usize).min(CHUNK);
            match self.core.ports[port].read(&mut bytes[..room]) {
                Ok(0) if room != 0 => {
                    queue.unpop();
                    self.end(port, context)?;
                }
                Ok(n) => {
                    self.chain.writer(&context.memory).write(&bytes[..n])?;
                    queue.push(self.chain.head(), n as u32)?;
                    context.signal(index)?;
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    queue.unpop();
                }
                Err(error) => {
                    tracing::info!(port, %error, "Console input ended");
                    queue.unpop();
                    self.end(port, context)?;
                }
            }
        }
        self.input(port, context)
    }

    /// The host's end of a port hung up.
    fn end(&mut self, port: usize, context: &mut Context) -> Result<(), DeviceError> {
        let end = Arc::clone(&self.core.ports[port]);
        if end.listener().is_some() {
            for fd in end.input().into_iter().chain(end.output()) {
                context.unwatch(fd);
            }
            end.hang_up();
            self.listen(port, context)?;
            // What waited for the client is lost, and must not wait any more.
            self.write(port, context)?;
        } else {
            self.ended[port] = true;
        }
        self.say_open(port, false, context)
    }

    fn say_open(&mut self, port: usize, open: bool, context: &mut Context) -> Result<(), DeviceError> {
        if self.multiport {
            self.say(port, PORT_OPEN, open.into(), &[]);
            self.deliver_messages(context)?;
        }
        Ok(())
    }

    /// Watches for a client while there is none.
    fn listen(&self, port: usize, context: &Context) -> Result<(), DeviceError> {
        let end = &self.core.ports[port];
        if let Some(fd) = end.listener().filter(|_| !end.is_connected()) {
            context.watch(fd, LISTEN | port as u32, EventSet::IN)?;
        }
        Ok(())
    }

    fn accept(&mut self, port: usize, context: &mut Context) -> Result<(), DeviceError> {
        let end = Arc::clone(&self.core.ports[port]);
        if !end.accept() {
            return Ok(());
        }
        if let Some(fd) = end.listener() {
            context.unwatch(fd);
        }
        self.say_open(port, true, context)?;
        self.input(port, context)
    }

    fn write(&mut self, port: usize, context: &mut Context) -> Result<(), DeviceError> {
        let index = input_queue(port) + 1;
        let end = Arc::clone(&self.core.ports[port]);
        if let Some(fd) = end.output() {
            context.unwatch(fd);
        }
        loop {
            while !context.stopping()
                && let Some(queue) = &mut context.queues[index]
                && queue.pop(&mut self.chain)?
            {
                let mut reader = self.chain.reader(&context.memory);
                reader.take(self.written[port] as usize, &mut Vec::new());
                let mut bytes = [0; CHUNK];
                let (mut blocked, mut lost) = (false, false);
                loop {
                    let n = reader.read(&mut bytes)?;
                    if n == 0 {
                        break;
                    }
                    match end.write(&bytes[..n]) {
                        Ok(done) => {
                            self.written[port] += done as u32;
                            blocked = done < n;
                        }
                        Err(e)
                            if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) =>
                        {
                            blocked = true;
                        }
                        // Nobody listens any more: what the guest writes is lost.
                        Err(_) => {
                            lost = true;
                            break;
                        }
                    }
                    if blocked {
                        break;
                    }
                }
                if blocked {
                    queue.unpop();
                    context.signal(index)?;
                    if let Some(fd) = end.output() {
                        context.watch(fd, Self::token(port, true), EventSet::OUT)?;
                    }
                    return Ok(());
                }
                self.written[port] = 0;
                queue.push(self.chain.head(), 0)?;
                context.signal(index)?;
                if lost && end.listener().is_some() && end.is_connected() {
                    return self.end(port, context);
                }
            }
            let Some(queue) = &mut context.queues[index] else { return Ok(()) };
            if !queue.enable_notification()? || context.stopping() {
                return Ok(());
            }
        }
    }
}

impl QueueHandler for Ports {
    fn start(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        for port in 0..self.core.ports.len() {
            self.listen(port, context)?;
        }
        Ok(context.watch(self.core.wake.as_raw_fd(), WAKE, EventSet::IN)?)
    }

    fn queue(&mut self, index: usize, context: &mut Context) -> Result<(), DeviceError> {
        match index {
            CONTROL_IN => self.deliver_messages(context),
            CONTROL_OUT => self.control(context),
            _ if index.is_multiple_of(2) => self.input(queue_port(index), context),
            _ => self.write(queue_port(index), context),
        }
    }

    fn event(&mut self, token: u32, _ready: EventSet, context: &mut Context) -> Result<(), DeviceError> {
        if token == WAKE {
            // The count does not matter.
            let _ = self.core.wake.read();
            if self.multiport && self.is_open(0) {
                self.say_size();
                self.deliver_messages(context)?;
            }
            return Ok(());
        }
        if token & LISTEN != 0 {
            return self.accept((token & !LISTEN) as usize, context);
        }
        let port = token as usize / 2;
        if token.is_multiple_of(2) { self.read(port, context) } else { self.write(port, context) }
    }
}

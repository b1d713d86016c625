//! Moves packets between the guest's queues and the host's sockets.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_sys_util::epoll::EventSet;
use zerocopy::IntoBytes;

use super::super::chain::Chain;
use super::super::device::{DeviceError, QueueHandler};
use super::super::worker::Context;
use super::Core;
use super::connection::{Connection, Stage};
use super::packet::{HOST_CID, NO_RECEIVE, NO_SEND, PACKET, Packet, Ports, STREAM, op};

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// Connections at once, each with a descriptor of the host.
const MAX_CONNECTIONS: usize = 1023;
/// Packets that wait for the guest's buffers; while there are more the guest's own are not looked at.
const MAX_WAITING: usize = 256;
/// Payload of one packet to the guest.
const CHUNK: usize = 16 << 10;
/// The longest greeting: `CONNECT 4294967295\n`.
const MAX_GREETING: usize = 32;
/// The first port that connections from the host get.
const FIRST_PORT: u32 = 1 << 30;
const LISTENER: u32 = 0;

pub(super) struct Bridge {
    core: Arc<Core>,
    connections: BTreeMap<Ports, Connection>,
    /// Programs that connected and did not say which port they want yet.
    greetings: BTreeMap<u32, (UnixStream, Vec<u8>)>,
    /// What each watched descriptor's token means.
    tokens: BTreeMap<u32, Ports>,
    next_token: u32,
    next_port: u32,
    waiting: VecDeque<Packet>,
    /// Whether the guest has buffers for packets.
    room: bool,
    chain: Chain,
    bytes: Vec<u8>,
}

impl Bridge {
    pub(super) fn new(core: Arc<Core>) -> Self {
        Self {
            core,
            connections: BTreeMap::new(),
            greetings: BTreeMap::new(),
            tokens: BTreeMap::new(),
            next_token: LISTENER + 1,
            next_port: FIRST_PORT,
            waiting: VecDeque::new(),
            room: true,
            chain: Chain::default(),
            bytes: Vec::new(),
        }
    }

    fn packet(&self, ports: Ports, op: u16) -> Packet {
        Packet {
            source_cid: HOST_CID.to_le(),
            target_cid: self.core.cid.to_le(),
            source_port: ports.host.to_le(),
            target_port: ports.guest.to_le(),
            kind: STREAM.to_le(),
            op: op.to_le(),
            ..Packet::default()
        }
    }

    fn say(&mut self, ports: Ports, op: u16, flags: u32) {
        let mut packet = self.packet(ports, op);
        packet.flags = flags.to_le();
        if let Some(connection) = self.connections.get_mut(&ports) {
            connection.stamp(&mut packet);
        }
        self.waiting.push_back(packet);
    }

    fn fresh_token(&mut self) -> u32 {
        loop {
            let token = self.next_token;
            self.next_token = self.next_token.checked_add(1).unwrap_or(LISTENER + 1);
            if !self.tokens.contains_key(&token) && !self.greetings.contains_key(&token) {
                return token;
            }
        }
    }

    fn is_full(&self) -> bool {
        self.connections.len() + self.greetings.len() >= MAX_CONNECTIONS
    }

    fn watch(&self, ports: Ports, context: &Context) -> Result<(), DeviceError> {
        let Some(connection) = self.connections.get(&ports) else { return Ok(()) };
        let interest = connection.interest(self.room);
        // Whatever is asked for, the host reports that the other end hung up, again and again.
        if interest.is_empty() && connection.hung_up {
            context.unwatch(connection.descriptor());
            return Ok(());
        }
        Ok(context.watch(connection.descriptor(), connection.token, interest)?)
    }

    fn remove(&mut self, ports: Ports, context: &Context) {
        if let Some(connection) = self.connections.remove(&ports) {
            context.unwatch(connection.descriptor());
            self.tokens.remove(&connection.token);
        }
    }

    /// Ends a connection at once and tells the guest.
    fn abort(&mut self, ports: Ports, context: &Context) {
        self.remove(ports, context);
        self.say(ports, op::RST, 0);
    }

    fn set_room(&mut self, room: bool, context: &Context) -> Result<(), DeviceError> {
        if self.room != room {
            self.room = room;
            for ports in self.connections.keys() {
                self.watch(*ports, context)?;
            }
        }
        Ok(())
    }

    /// Takes a receive buffer that has room for a packet into `self.chain`.
    fn pop_buffer(&mut self, context: &mut Context) -> Result<bool, DeviceError> {
        loop {
            let Some(queue) = &mut context.queues[RX] else { return Ok(false) };
            if queue.pop(&mut self.chain)? {
                if (self.chain.writable_len() as usize) < PACKET {
                    return Err(DeviceError::Request("a vsock buffer is too small for a packet"));
                }
                return Ok(true);
            }
            if !queue.enable_notification()? {
                self.set_room(false, context)?;
                return Ok(false);
            }
        }
    }

    fn deliver_waiting(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        while !self.waiting.is_empty() && self.pop_buffer(context)? {
            if let Some(packet) = self.waiting.pop_front() {
                self.chain.writer(&context.memory).write(packet.as_bytes())?;
            }
            if let Some(queue) = &mut context.queues[RX] {
                queue.push(self.chain.head(), PACKET as u32)?;
            }
        }
        Ok(context.signal(RX)?)
    }

    /// Passes on what a socket has for the guest.
    fn receive(&mut self, ports: Ports, context: &mut Context) -> Result<(), DeviceError> {
        if !self.waiting.is_empty() || !self.pop_buffer(context)? {
            return Ok(());
        }
        let Some(queue) = &mut context.queues[RX] else { return Ok(()) };
        let Some(connection) = self.connections.get_mut(&ports) else {
            queue.unpop();
            return Ok(());
        };
        let room = self.chain.writable_len() as usize - PACKET;
        let limit = CHUNK.min(room).min(connection.credit() as usize);
        self.bytes.resize(CHUNK, 0);
        match connection.read(&mut self.bytes[..limit]) {
            Ok(Some(n)) if n != 0 => {
                let mut packet = self.packet(ports, op::RW);
                packet.len = (n as u32).to_le();
                if let Some(connection) = self.connections.get_mut(&ports) {
                    connection.stamp(&mut packet);
                }
                let mut writer = self.chain.writer(&context.memory);
                writer.write(packet.as_bytes())?;
                writer.write(&self.bytes[..n])?;
                queue.push(self.chain.head(), writer.written())?;
                return Ok(context.signal(RX)?);
            }
            Ok(Some(_)) if limit != 0 => {
                queue.unpop();
                connection.ended = true;
                self.say(ports, op::SHUTDOWN, NO_SEND);
            }
            Ok(_) => queue.unpop(),
            Err(_) => {
                queue.unpop();
                self.abort(ports, context);
            }
        }
        Ok(())
    }

    /// A socket is ready.
    fn serve(&mut self, ports: Ports, ready: EventSet, context: &mut Context) -> Result<(), DeviceError> {
        let Some(connection) = self.connections.get_mut(&ports) else { return Ok(()) };
        let interest = connection.interest(self.room);
        if connection.flush().is_err() || connection.is_finished() {
            self.abort(ports, context);
        } else if connection.owes_credit() {
            self.say(ports, op::CREDIT_UPDATE, 0);
        } else if interest.contains(EventSet::IN) {
            self.receive(ports, context)?;
        } else if ready.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.hang_up(ports, context);
        }
        self.deliver_waiting(context)?;
        self.watch(ports, context)
    }

    /// The host's program closed its end altogether.
    fn hang_up(&mut self, ports: Ports, context: &Context) {
        let Some(connection) = self.connections.get_mut(&ports) else { return };
        connection.hung_up = true;
        match connection.stage {
            Stage::Requested => self.abort(ports, context),
            // Bytes may be left for a guest that has no room for them now.
            Stage::Open if !connection.ended => {}
            Stage::Open => {
                connection.stage = Stage::Closing;
                self.say(ports, op::SHUTDOWN, NO_SEND | NO_RECEIVE);
            }
            Stage::Closing => {}
        }
    }

    fn accept(&mut self, context: &Context) -> Result<(), DeviceError> {
        loop {
            match self.core.listener.accept() {
                Ok((stream, _)) if !self.is_full() && stream.set_nonblocking(true).is_ok() => {
                    let token = self.fresh_token();
                    context.watch(stream.as_raw_fd(), token, EventSet::IN)?;
                    self.greetings.insert(token, (stream, Vec::new()));
                }
                Ok(_) => tracing::warn!("Too many vsock connections; one is refused"),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => {
                    tracing::warn!(%error, "Cannot accept a vsock connection");
                    return Ok(());
                }
            }
        }
    }

    /// Reads a greeting byte by byte: what follows its line belongs to the connection.
    fn greet(&mut self, token: u32, context: &mut Context) -> Result<(), DeviceError> {
        let Some((mut stream, mut line)) = self.greetings.remove(&token) else { return Ok(()) };
        loop {
            let mut byte = [0];
            match stream.read(&mut byte) {
                Ok(1) if byte != *b"\n" && line.len() < MAX_GREETING => line.push(byte[0]),
                Ok(1) if byte == *b"\n" => break,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.greetings.insert(token, (stream, line));
                    return Ok(());
                }
                // It closed, failed, or talks something else: dropping the stream says so.
                _ => return Ok(()),
            }
        }
        let text = std::str::from_utf8(&line).unwrap_or_default();
        let Some(guest) = text.trim_end_matches('\r').strip_prefix("CONNECT ").and_then(|p| p.parse().ok())
        else {
            return Ok(());
        };
        let ports = loop {
            let ports = Ports { host: self.next_port, guest };
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.connections.contains_key(&ports) {
                break ports;
            }
        };
        self.tokens.insert(token, ports);
        self.connections.insert(ports, Connection::new(stream, token, Stage::Requested));
        self.say(ports, op::REQUEST, 0);
        self.deliver_waiting(context)?;
        self.watch(ports, context)
    }

    /// The guest wants to connect to a program of the host.
    fn connect(&mut self, ports: Ports, packet: &Packet, context: &Context) -> Result<(), DeviceError> {
        let mut path = self.core.path.clone().into_os_string();
        path.push(format!("_{}", ports.host));
        let stream =
            if self.is_full() { Err(io::ErrorKind::QuotaExceeded.into()) } else { UnixStream::connect(path) };
        match stream.and_then(|s| s.set_nonblocking(true).map(|()| s)) {
            Ok(stream) => {
                let token = self.fresh_token();
                let mut connection = Connection::new(stream, token, Stage::Open);
                connection.learn_credit(packet);
                self.tokens.insert(token, ports);
                self.connections.insert(ports, connection);
                self.say(ports, op::RESPONSE, 0);
                self.watch(ports, context)
            }
            Err(_) => {
                self.say(ports, op::RST, 0);
                Ok(())
            }
        }
    }

    /// Executes one packet of the guest, whose payload is in `self.bytes`.
    fn hear(&mut self, packet: &Packet, len: usize, context: &Context) -> Result<(), DeviceError> {
        let ports = Ports { host: u32::from_le(packet.target_port), guest: u32::from_le(packet.source_port) };
        let op = u16::from_le(packet.op);
        if u64::from_le(packet.source_cid) != self.core.cid {
            return Ok(());
        }
        let proper = u64::from_le(packet.target_cid) == HOST_CID && u16::from_le(packet.kind) == STREAM;
        let Some(connection) = self.connections.get_mut(&ports).filter(|_| proper) else {
            return match op {
                op::REQUEST if proper => self.connect(ports, packet, context),
                op::RST => Ok(()),
                _ => {
                    self.say(ports, op::RST, 0);
                    Ok(())
                }
            };
        };
        connection.learn_credit(packet);
        let keep = match (op, connection.stage) {
            (op::RESPONSE, Stage::Requested) => {
                connection.stage = Stage::Open;
                connection.welcome(ports.host).is_ok()
            }
            (op::RW, Stage::Open | Stage::Closing) => connection.write(&self.bytes[..len]).is_ok(),
            (op::SHUTDOWN, _) => matches!(connection.shut_down(u32::from_le(packet.flags)), Ok(false)),
            (op::CREDIT_UPDATE, _) => true,
            (op::CREDIT_REQUEST, _) => {
                self.say(ports, op::CREDIT_UPDATE, 0);
                true
            }
            (op::RST, _) => {
                self.remove(ports, context);
                return Ok(());
            }
            _ => false,
        };
        if !keep {
            self.abort(ports, context);
            return Ok(());
        }
        if self.connections.get(&ports).is_some_and(Connection::owes_credit) {
            self.say(ports, op::CREDIT_UPDATE, 0);
        }
        self.watch(ports, context)
    }

    fn transmit(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        loop {
            while !context.stopping()
                && self.waiting.len() < MAX_WAITING
                && let Some(queue) = &mut context.queues[TX]
                && queue.pop(&mut self.chain)?
            {
                let mut reader = self.chain.reader(&context.memory);
                let packet = reader.read_obj::<Packet>()?;
                let len = packet.map_or(0, |p| u32::from_le(p.len) as usize);
                let fits = len <= reader.remaining() as usize && len <= super::connection::BUFFER as usize;
                if fits {
                    self.bytes.resize(len.max(self.bytes.len()), 0);
                    reader.read(&mut self.bytes[..len])?;
                }
                queue.push(self.chain.head(), 0)?;
                context.signal(TX)?;
                if let Some(packet) = packet.filter(|_| fits) {
                    self.hear(&packet, len, context)?;
                }
            }
            self.deliver_waiting(context)?;
            let Some(queue) = &mut context.queues[TX] else { return Ok(()) };
            if self.waiting.len() >= MAX_WAITING {
                // Goes on when the guest provides buffers.
                return Ok(());
            }
            if !queue.enable_notification()? || context.stopping() {
                return Ok(());
            }
        }
    }

    /// Tells the guest that its connections are gone.
    fn announce_reset(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        let Some(queue) = &mut context.queues[EVENT] else { return Ok(()) };
        if self.core.transport_reset.load(Ordering::Acquire) && queue.pop(&mut self.chain)? {
            let mut writer = self.chain.writer(&context.memory);
            writer.write(&0u32.to_le_bytes())?;
            queue.push(self.chain.head(), writer.written())?;
            self.core.transport_reset.store(false, Ordering::Release);
        }
        Ok(context.signal(EVENT)?)
    }
}

impl QueueHandler for Bridge {
    fn start(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        context.watch(self.core.listener.as_raw_fd(), LISTENER, EventSet::IN)?;
        for (token, (stream, _)) in &self.greetings {
            context.watch(stream.as_raw_fd(), *token, EventSet::IN)?;
        }
        for ports in self.connections.keys() {
            self.watch(*ports, context)?;
        }
        Ok(())
    }

    fn queue(&mut self, index: usize, context: &mut Context) -> Result<(), DeviceError> {
        match index {
            RX => {
                self.set_room(true, context)?;
                self.deliver_waiting(context)?;
                self.transmit(context)
            }
            TX => self.transmit(context),
            _ => self.announce_reset(context),
        }
    }

    fn event(&mut self, token: u32, ready: EventSet, context: &mut Context) -> Result<(), DeviceError> {
        if token == LISTENER {
            return self.accept(context);
        }
        match self.tokens.get(&token) {
            Some(ports) => self.serve(*ports, ready, context),
            None => self.greet(token, context),
        }
    }
}

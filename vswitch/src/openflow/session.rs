//! One OpenFlow connection, free of sockets: negotiation, configuration, roles, dispatch of messages.

use super::notify::AsyncMasks;
use super::wire::{Message, NICIRA, OfError, Put, Reader, Result, Version, put_message};
use crate::switch::Switch;

/// Bytes of output beyond which no further message is handled until the peer has read.
const OUTPUT_HIGH: usize = 1 << 20;
/// Versions offered, as bits.
const VERSIONS: u32 = 1 << Version::V10 as u32 | 1 << Version::V13 as u32;
/// Bytes of a packet that a controller gets unless it says otherwise.
const MISS_SEND_LEN: u16 = 128;

/// Message types that both versions share.
pub(super) mod kind {
    pub const HELLO: u8 = 0;
    pub const ERROR: u8 = 1;
    pub const ECHO_REQUEST: u8 = 2;
    pub const ECHO_REPLY: u8 = 3;
    pub const EXPERIMENTER: u8 = 4;
    pub const FEATURES_REQUEST: u8 = 5;
    pub const FEATURES_REPLY: u8 = 6;
    pub const GET_CONFIG_REQUEST: u8 = 7;
    pub const GET_CONFIG_REPLY: u8 = 8;
    pub const SET_CONFIG: u8 = 9;
    pub const PACKET_IN: u8 = 10;
    pub const FLOW_REMOVED: u8 = 11;
    pub const PORT_STATUS: u8 = 12;
    pub const PACKET_OUT: u8 = 13;
    pub const FLOW_MOD: u8 = 14;
}

/// Nicira's message numbers.
pub(super) mod nxt {
    pub const ROLE_REQUEST: u32 = 10;
    pub const ROLE_REPLY: u32 = 11;
    pub const SET_FLOW_FORMAT: u32 = 12;
    pub const FLOW_MOD: u32 = 13;
    pub const FLOW_REMOVED: u32 = 14;
    pub const FLOW_MOD_TABLE_ID: u32 = 15;
    pub const SET_PACKET_IN_FORMAT: u32 = 16;
    pub const PACKET_IN: u32 = 17;
    pub const FLOW_AGE: u32 = 18;
    pub const SET_ASYNC_CONFIG: u32 = 19;
    pub const SET_CONTROLLER_ID: u32 = 20;
}

/// What a controller is to the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Equal,
    Master,
    Slave,
}

/// What the sessions of one switch share: which of them is the master.
#[derive(Debug, Default)]
pub struct Roles {
    master: Option<u64>,
    /// Largest generation seen (1.3, section 6.3.5).
    generation: Option<u64>,
    sessions: u64,
}

/// One connection of a controller or a tool.
#[derive(Debug)]
pub struct Session {
    id: u64,
    version: Option<Version>,
    input: Vec<u8>,
    pub(super) output: Vec<u8>,
    wish: Role,
    pub(super) masks: AsyncMasks,
    pub(super) miss_send_len: u16,
    config_flags: u16,
    /// 1.0: rules are told in Nicira's format.
    pub(super) nicira_rules: bool,
    /// 1.0: the upper byte of a rule's command is its table.
    pub(super) table_in_command: bool,
    /// 1.0: packets are told in Nicira's format.
    pub(super) nicira_packets: bool,
    pub(super) datapath: u64,
    failed: bool,
}

impl Session {
    /// Starts a session with a hello. A `service` (a tool that connected to the switch) is told of no packets or
    /// changes until it asks; a controller that the switch itself connected to is told at once.
    pub fn new(roles: &mut Roles, datapath: u64, service: bool) -> Self {
        roles.sessions += 1;
        let mut s = Self {
            id: roles.sessions,
            version: None,
            input: Vec::new(),
            output: Vec::new(),
            wish: Role::Equal,
            masks: AsyncMasks::default(),
            miss_send_len: if service { 0 } else { MISS_SEND_LEN },
            config_flags: 0,
            nicira_rules: false,
            table_in_command: false,
            nicira_packets: false,
            datapath,
            failed: false,
        };
        const BITMAP: u16 = 1;
        let mut hello = Vec::new();
        hello.put16(BITMAP);
        hello.put16(8);
        hello.put32(VERSIONS);
        put_message(&mut s.output, Version::V13 as u8, kind::HELLO, 0, &hello);
        s
    }

    /// Adds bytes from the peer; [`Session::run`] handles them.
    pub fn receive(&mut self, bytes: &[u8]) {
        if !self.failed {
            self.input.extend_from_slice(bytes);
        }
    }

    /// Handles the messages that are complete, until the peer has much to read. `seen` is shown
    /// every message and every answer.
    pub fn run(&mut self, switch: &Switch, roles: &mut Roles, mut seen: impl FnMut(&[u8])) {
        let input = std::mem::take(&mut self.input);
        let mut rest = &input[..];
        while !self.failed && self.output.len() < OUTPUT_HIGH {
            match Message::split(rest) {
                Ok(None) => break,
                Ok(Some((m, after))) => {
                    seen(m.whole);
                    let start = self.output.len();
                    self.handle(switch, roles, m);
                    if self.output.len() > start {
                        seen(&self.output[start..]);
                    }
                    rest = after;
                }
                Err(e) => {
                    let body = e.body(self.version.unwrap_or(Version::V10), rest);
                    self.send(kind::ERROR, 0, &body);
                    self.failed = true;
                }
            }
        }
        self.input = rest.to_vec();
    }

    /// Whether more bytes from the peer can be taken: it reads what it is sent.
    pub fn wants_input(&self) -> bool {
        !self.failed && self.output.len() < OUTPUT_HIGH
    }

    /// What waits to be sent.
    pub fn pending(&self) -> &[u8] {
        &self.output
    }

    /// Says that the first `n` bytes of [`Session::pending`] are sent.
    pub fn sent(&mut self, n: usize) {
        self.output.drain(..n.min(self.output.len()));
    }

    /// Whether the peer broke the protocol, so that the connection is to be closed once everything is sent.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// Whether versions are agreed.
    pub fn is_open(&self) -> bool {
        self.version.is_some()
    }

    /// Shows a snooping peer messages of other sessions.
    pub(super) fn show(&mut self, messages: &[u8]) {
        self.output.extend_from_slice(messages);
    }

    /// Asks the peer for a sign of life.
    pub fn ping(&mut self) {
        self.send(kind::ECHO_REQUEST, 0, &[]);
    }

    pub(super) fn version(&self) -> Version {
        self.version.unwrap_or(Version::V13)
    }

    pub(super) fn role(&self, roles: &Roles) -> Role {
        match self.wish {
            Role::Master if roles.master != Some(self.id) => Role::Slave,
            r => r,
        }
    }

    pub(super) fn send(&mut self, kind: u8, xid: u32, body: &[u8]) {
        let version = self.version() as u8;
        put_message(&mut self.output, version, kind, xid, body);
    }

    /// Sends one of Nicira's messages.
    pub(super) fn send_nicira(&mut self, subtype: u32, xid: u32, body: &[u8]) {
        let mut b = Vec::with_capacity(body.len() + 8);
        b.put32(NICIRA);
        b.put32(subtype);
        b.extend_from_slice(body);
        self.send(kind::EXPERIMENTER, xid, &b);
    }

    fn handle(&mut self, switch: &Switch, roles: &mut Roles, m: Message<'_>) {
        let result = match self.version {
            _ if m.kind == kind::HELLO => self.hello(m),
            None => Err(OfError::BAD_VERSION),
            Some(v) if m.version != v as u8 => Err(OfError::BAD_VERSION),
            Some(v) => self.dispatch(switch, roles, m, v),
        };
        if let Err(e) = result {
            let body = e.body(self.version(), m.whole);
            self.send(kind::ERROR, m.xid, &body);
        }
    }

    fn hello(&mut self, m: Message<'_>) -> Result<()> {
        if self.version.is_some() {
            return Ok(());
        }
        let mut theirs = None;
        let mut r = Reader::new(m.body, OfError::BAD_LEN);
        while r.len() >= 4 {
            let (kind, len) = (r.u16()?, usize::from(r.u16()?));
            let mut body = r.sub(len.checked_sub(4).ok_or(OfError::BAD_LEN)?)?;
            r.skip((len.next_multiple_of(8) - len).min(r.len()))?;
            if kind == 1 {
                theirs = Some(body.u32()?);
            }
        }
        let version = match theirs.map(|t| t & VERSIONS) {
            Some(common) if common & 1 << 4 != 0 => Some(Version::V13),
            Some(common) if common & 1 << 1 != 0 => Some(Version::V10),
            Some(_) => None,
            None if m.version >= Version::V13 as u8 => Some(Version::V13),
            None => (m.version == Version::V10 as u8).then_some(Version::V10),
        };
        self.version = version;
        if version.is_none() {
            self.failed = true;
            // Told in the peer's own version, or it could not read it.
            let mut body = OfError::HELLO_INCOMPATIBLE.body(Version::V10, &[]);
            body.extend_from_slice(b"This switch speaks OpenFlow 1.0 and 1.3");
            put_message(&mut self.output, m.version.clamp(1, 6), kind::ERROR, m.xid, &body);
        }
        Ok(())
    }

    fn dispatch(&mut self, switch: &Switch, roles: &mut Roles, m: Message<'_>, v: Version) -> Result<()> {
        let r = Reader::new(m.body, OfError::BAD_LEN);
        match m.kind {
            kind::ERROR | kind::ECHO_REPLY => return Ok(()),
            kind::ECHO_REQUEST => {
                self.send(kind::ECHO_REPLY, m.xid, m.body);
                return Ok(());
            }
            kind::EXPERIMENTER => return self.experimenter(switch, roles, m, r),
            kind::FEATURES_REQUEST => return self.features(switch, m.xid),
            kind::GET_CONFIG_REQUEST => {
                let mut b = Vec::new();
                b.put16(self.config_flags);
                b.put16(self.miss_send_len);
                self.send(kind::GET_CONFIG_REPLY, m.xid, &b);
                return Ok(());
            }
            kind::SET_CONFIG => return self.set_config(r),
            kind::PACKET_OUT => {
                self.check_writable(roles)?;
                return self.packet_out(switch, r);
            }
            kind::FLOW_MOD => {
                self.check_writable(roles)?;
                return if v == Version::V10 {
                    self.flow_mod_10(switch, r)
                } else {
                    self.flow_mod_13(switch, r)
                };
            }
            _ => {}
        }
        match (v, m.kind) {
            (Version::V10, 15) | (Version::V13, 16) => {
                self.check_writable(roles)?;
                self.port_mod(switch, r)
            }
            (Version::V10, 16) | (Version::V13, 18) => self.statistics(switch, m.xid, r),
            (Version::V10, 18) | (Version::V13, 20) => {
                // Everything before is done: each message takes effect before the next is read. What is left is
                // that no worker still handles a burst by the old rules.
                switch.barrier();
                self.send(m.kind + 1, m.xid, &[]);
                Ok(())
            }
            (Version::V10, 20) | (Version::V13, 22) => self.queue_config(switch, m.xid, m.kind + 1, r),
            (Version::V13, 15) => {
                self.check_writable(roles)?;
                self.group_mod(switch, r)
            }
            (Version::V13, 17) => {
                self.check_writable(roles)?;
                self.table_mod(r)
            }
            (Version::V13, 24) => self.role_request(roles, m.xid, r),
            (Version::V13, 26) => {
                let body = self.masks.encode();
                self.send(27, m.xid, &body);
                Ok(())
            }
            (Version::V13, 28) => {
                self.masks = AsyncMasks::decode(r)?;
                self.wake_service();
                Ok(())
            }
            (Version::V13, 29) => {
                self.check_writable(roles)?;
                self.meter_mod(switch, r)
            }
            _ => Err(OfError::BAD_TYPE),
        }
    }

    fn check_writable(&self, roles: &Roles) -> Result<()> {
        if self.role(roles) == Role::Slave { Err(OfError::IS_SLAVE) } else { Ok(()) }
    }

    /// A tool that asks to be told of something is told.
    fn wake_service(&mut self) {
        if self.miss_send_len == 0 {
            self.miss_send_len = MISS_SEND_LEN;
        }
    }

    fn set_config(&mut self, mut r: Reader<'_>) -> Result<()> {
        /// 1.0 with Nicira's extension, 1.1, 1.2: packets whose time to live runs out are wanted.
        const INVALID_TTL: u16 = 4;
        let (flags, miss_send_len) = (r.u16()?, r.u16()?);
        // Fragments are switched as they are; nothing is put together or dropped.
        if flags & !INVALID_TTL != 0 {
            return Err(OfError::CONFIG_FLAGS);
        }
        self.config_flags = flags;
        self.miss_send_len = miss_send_len;
        Ok(())
    }

    fn experimenter(
        &mut self,
        switch: &Switch,
        roles: &mut Roles,
        m: Message<'_>,
        mut r: Reader<'_>,
    ) -> Result<()> {
        if r.u32()? != NICIRA {
            return Err(OfError::BAD_EXPERIMENTER);
        }
        match r.u32()? {
            nxt::SET_FLOW_FORMAT => match r.u32()? {
                format @ (0 | 2) => self.nicira_rules = format == 2,
                _ => return Err(OfError::BAD_EXP_TYPE),
            },
            nxt::FLOW_MOD_TABLE_ID => {
                self.table_in_command = r.u8()? != 0;
            }
            nxt::FLOW_MOD => {
                self.check_writable(roles)?;
                self.flow_mod_nicira(switch, r)?;
            }
            nxt::SET_PACKET_IN_FORMAT => match r.u32()? {
                format @ (0 | 1) => self.nicira_packets = format == 1,
                _ => return Err(OfError::BAD_EXP_TYPE),
            },
            nxt::SET_ASYNC_CONFIG => {
                self.masks = AsyncMasks::decode(r)?;
                self.wake_service();
            }
            nxt::ROLE_REQUEST => {
                let role = r.u32()?;
                let wish =
                    [Role::Equal, Role::Master, Role::Slave].get(role as usize).ok_or(OfError::ROLE_BAD)?;
                self.take_role(roles, *wish);
                let mut b = Vec::new();
                b.put32(role);
                self.send_nicira(nxt::ROLE_REPLY, m.xid, &b);
            }
            // Taken as said: ages are told anyway, and there are no further controller numbers to tell apart.
            nxt::FLOW_AGE | nxt::SET_CONTROLLER_ID => {}
            _ => return Err(OfError::BAD_EXP_TYPE),
        }
        Ok(())
    }

    fn take_role(&mut self, roles: &mut Roles, wish: Role) {
        if wish == Role::Master {
            roles.master = Some(self.id);
        } else if roles.master == Some(self.id) {
            roles.master = None;
        }
        self.wish = wish;
    }

    fn role_request(&mut self, roles: &mut Roles, xid: u32, mut r: Reader<'_>) -> Result<()> {
        let role = r.u32()?;
        r.skip(4)?;
        let generation = r.u64()?;
        let wish = match role {
            0 => None,
            1 => Some(Role::Equal),
            2 => Some(Role::Master),
            3 => Some(Role::Slave),
            _ => return Err(OfError::ROLE_BAD),
        };
        if let Some(wish) = wish {
            if wish != Role::Equal {
                // Compared as a distance, since it may wrap around.
                let stale = roles.generation.is_some_and(|old| (generation.wrapping_sub(old) as i64) < 0);
                if stale {
                    return Err(OfError::ROLE_STALE);
                }
                roles.generation = Some(generation);
            }
            self.take_role(roles, wish);
        }
        let mut b = Vec::new();
        b.put32(match self.role(roles) {
            Role::Equal => 1,
            Role::Master => 2,
            Role::Slave => 3,
        });
        b.put32(0);
        b.put64(roles.generation.unwrap_or(u64::MAX));
        self.send(25, xid, &b);
        Ok(())
    }
}

//! The vhost-user protocol's messages: header, requests, feature bits, payloads.

use bitflags::bitflags;

use super::memory::RegionInfo;

/// Length of a message's header.
pub const HEADER: usize = 12;
/// Longest payload that is accepted. The longest that is defined, a memory table, is well below.
pub const PAYLOAD_MAX: usize = 4096;

const VERSION_MASK: u32 = 3;
const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

bitflags! {
    /// Virtio and vhost feature bits.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Features: u64 {
        /// The device takes packets with partial checksums.
        const CSUM = 1;
        /// The driver takes packets with partial checksums.
        const GUEST_CSUM = 1 << 1;
        /// The device reports its MTU.
        const MTU = 1 << 3;
        /// The driver takes large IPv4 TCP packets.
        const GUEST_TSO4 = 1 << 7;
        /// The driver takes large IPv6 TCP packets.
        const GUEST_TSO6 = 1 << 8;
        /// The driver takes large TCP packets with ECN.
        const GUEST_ECN = 1 << 9;
        /// The device takes large IPv4 TCP packets.
        const HOST_TSO4 = 1 << 11;
        /// The device takes large IPv6 TCP packets.
        const HOST_TSO6 = 1 << 12;
        /// The device takes large TCP packets with ECN.
        const HOST_ECN = 1 << 13;
        /// A packet may span several receive buffers.
        const MRG_RXBUF = 1 << 15;
        /// There is a control queue (the front-end serves it).
        const CTRL_VQ = 1 << 17;
        /// The driver can announce itself after a migration.
        const GUEST_ANNOUNCE = 1 << 21;
        /// There are several pairs of queues.
        const MQ = 1 << 22;
        /// Writes to guest memory are logged.
        const LOG_ALL = 1 << 26;
        /// Indirect descriptors.
        const INDIRECT_DESC = 1 << 28;
        /// Notifications are governed by event indices.
        const EVENT_IDX = 1 << 29;
        /// The vhost-user protocol has features of its own.
        const PROTOCOL_FEATURES = 1 << 30;
        /// The layout of virtio 1.0.
        const VERSION_1 = 1 << 32;
        /// Rings have the packed layout.
        const RING_PACKED = 1 << 34;
        /// Buffers are used in the order in which they were made available.
        const IN_ORDER = 1 << 35;
    }
}

bitflags! {
    /// Protocol feature bits.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ProtocolFeatures: u64 {
        /// Several pairs of queues.
        const MQ = 1;
        /// The dirty log comes as a file.
        const LOG_SHMFD = 1 << 1;
        /// The back-end sends announcements for the guest.
        const RARP = 1 << 2;
        /// Any request may ask for a reply.
        const REPLY_ACK = 1 << 3;
        /// The front-end tells the MTU.
        const MTU = 1 << 4;
        /// The device can be reset without a new connection.
        const RESET_DEVICE = 1 << 13;
        /// Memory regions are added and removed one by one.
        const CONFIGURE_MEM_SLOTS = 1 << 15;
        /// The virtio status is told.
        const STATUS = 1 << 16;
    }
}

macro_rules! requests {
    ($($name:ident = $n:literal,)*) => {
        /// Requests of the front-end.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Request { $($name,)* }

        impl Request {
            fn new(n: u32) -> Option<Self> {
                match n { $($n => Some(Self::$name),)* _ => None }
            }
        }
    };
}

requests! {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    ResetOwner = 4,
    SetMemTable = 5,
    SetLogBase = 6,
    SetLogFd = 7,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    SetVringErr = 14,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    SendRarp = 19,
    NetSetMtu = 20,
    ResetDevice = 34,
    GetMaxMemSlots = 36,
    AddMemReg = 37,
    RemMemReg = 38,
    SetStatus = 39,
    GetStatus = 40,
}

/// A request's header.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// Number of the request.
    pub code: u32,
    /// The request, if it is known.
    pub request: Option<Request>,
    /// Whether the front-end waits for an answer.
    pub need_reply: bool,
    /// Length of the payload.
    pub size: usize,
}

impl Header {
    /// Reads a header; `None` when it breaks the protocol.
    pub fn parse(b: &[u8; HEADER]) -> Option<Self> {
        let word = |i: usize| u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
        let (code, flags, size) = (word(0), word(4), word(8) as usize);
        if flags & VERSION_MASK != VERSION || flags & REPLY != 0 || size > PAYLOAD_MAX {
            return None;
        }
        Some(Self { code, request: Request::new(code), need_reply: flags & NEED_REPLY != 0, size })
    }

    /// A whole answer.
    pub fn reply(&self, payload: &[u8]) -> Vec<u8> {
        let mut m = Vec::with_capacity(HEADER + payload.len());
        for w in [self.code, VERSION | REPLY, payload.len() as u32] {
            m.extend_from_slice(&w.to_le_bytes());
        }
        m.extend_from_slice(payload);
        m
    }
}

/// Reads the 64-bit number at `at`.
pub fn u64_at(p: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*p.get(at..)?.first_chunk()?))
}

/// Reads the 32-bit number at `at`.
pub fn u32_at(p: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*p.get(at..)?.first_chunk()?))
}

/// Reads one memory region.
pub fn region_at(p: &[u8], at: usize) -> Option<RegionInfo> {
    Some(RegionInfo {
        guest: u64_at(p, at)?,
        size: u64_at(p, at + 8)?,
        user: u64_at(p, at + 16)?,
        offset: u64_at(p, at + 24)?,
    })
}

/// Payload of `SET_VRING_ADDR`.
#[derive(Clone, Copy, Debug, Default)]
pub struct VringAddr {
    /// Whether the used ring's pages are logged.
    pub log: bool,
    /// Descriptor table, in the front-end's addresses.
    pub desc: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub avail: u64,
    /// Guest address of the used ring, for the log.
    pub used_guest: u64,
}

impl VringAddr {
    /// Reads queue number and addresses.
    pub fn parse(p: &[u8]) -> Option<(usize, Self)> {
        let addr = Self {
            log: u32_at(p, 4)? & 1 != 0,
            desc: u64_at(p, 8)?,
            used: u64_at(p, 16)?,
            avail: u64_at(p, 24)?,
            used_guest: u64_at(p, 32)?,
        };
        Some((u32_at(p, 0)? as usize, addr))
    }
}

//! What every OpenFlow structure is built from: versions, errors, a bounds-checked reader, big-endian writing, ports.

use crate::port::PortId;
pub(crate) use crate::put::Put;

/// Nicira's experimenter number (Open vSwitch extensions).
pub const NICIRA: u32 = 0x2320;
/// The Open Networking Foundation's experimenter number.
pub const ONF: u32 = 0x4f4e_4600;
/// "The packet is not buffered."
pub const NO_BUFFER: u32 = u32::MAX;
/// Length of a message's header.
pub const HEADER: usize = 8;

/// A protocol version, by its number on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Version {
    /// OpenFlow 1.0.
    V10 = 1,
    /// OpenFlow 1.3.
    V13 = 4,
}

/// Ports with a meaning of their own, numbered as OpenFlow 1.1 and later do (`OFPP_*`).
pub mod reserved {
    /// The port the packet came in by.
    pub const IN_PORT: u32 = 0xffff_fff8;
    /// Start of the pipeline.
    pub const TABLE: u32 = 0xffff_fff9;
    /// Switch as a bridge.
    pub const NORMAL: u32 = 0xffff_fffa;
    /// Flood within the VLAN.
    pub const FLOOD: u32 = 0xffff_fffb;
    /// All ports but the one the packet came in by.
    pub const ALL: u32 = 0xffff_fffc;
    /// The controllers.
    pub const CONTROLLER: u32 = 0xffff_fffd;
    /// The host's own port.
    pub const LOCAL: u32 = 0xffff_fffe;
    /// No port, or any.
    pub const ANY: u32 = 0xffff_ffff;
}

/// First reserved number among 16-bit ports.
const MAX_16: u16 = 0xff00;

/// A 16-bit port as 32 bits.
pub fn port_from_16(p: u16) -> PortId {
    if p >= MAX_16 { 0xffff_0000 | u32::from(p) } else { p.into() }
}

/// A port as 16 bits; one that does not fit becomes "none".
pub fn port_to_16(p: PortId) -> u16 {
    let fits = p < MAX_16.into() || p >= 0xffff_0000 | u32::from(MAX_16);
    if fits { p as u16 } else { u16::MAX }
}

/// An error as both versions number it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OfError {
    v13: (u16, u16),
    v10: Code10,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Code10 {
    Plain(u16, u16),
    Nicira(u16, u16),
}

macro_rules! errors {
    ($($name:ident = $t:literal, $c:literal; $kind:ident $t10:literal, $c10:literal;)*) => {
        impl OfError {
            $(pub(crate) const $name: OfError = OfError { v13: ($t, $c), v10: Code10::$kind($t10, $c10) };)*
        }
    };
}

// Where 1.0 has no such error the nearest one that it has stands in, or the one Nicira added.
errors! {
    HELLO_INCOMPATIBLE = 0, 0; Plain 0, 0;
    BAD_VERSION = 1, 0; Plain 1, 0;
    BAD_TYPE = 1, 1; Plain 1, 1;
    BAD_MULTIPART = 1, 2; Plain 1, 2;
    BAD_EXPERIMENTER = 1, 3; Plain 1, 3;
    BAD_EXP_TYPE = 1, 4; Plain 1, 4;
    BAD_LEN = 1, 6; Plain 1, 6;
    BUFFER_UNKNOWN = 1, 8; Plain 1, 8;
    IS_SLAVE = 1, 10; Plain 1, 5;
    BAD_PORT = 1, 11; Nicira 1, 514;
    BAD_PACKET = 1, 12; Plain 1, 6;
    MULTIPART_OVERFLOW = 1, 13; Plain 1, 6;
    ACTION_TYPE = 2, 0; Plain 2, 0;
    ACTION_LEN = 2, 1; Plain 2, 1;
    ACTION_EXPERIMENTER = 2, 2; Plain 2, 2;
    ACTION_EXP_TYPE = 2, 3; Plain 2, 3;
    ACTION_OUT_PORT = 2, 4; Plain 2, 4;
    ACTION_ARGUMENT = 2, 5; Plain 2, 5;
    ACTION_TOO_MANY = 2, 7; Plain 2, 7;
    ACTION_QUEUE = 2, 8; Plain 2, 8;
    ACTION_OUT_GROUP = 2, 9; Plain 2, 5;
    ACTION_MATCH_INCONSISTENT = 2, 10; Plain 2, 5;
    ACTION_SET_TYPE = 2, 13; Plain 2, 5;
    ACTION_SET_LEN = 2, 14; Plain 2, 1;
    ACTION_SET_ARGUMENT = 2, 15; Plain 2, 5;
    INSTRUCTION_UNKNOWN = 3, 0; Plain 2, 0;
    INSTRUCTION_TABLE = 3, 2; Plain 2, 5;
    INSTRUCTION_LEN = 3, 7; Plain 2, 1;
    MATCH_TYPE = 4, 0; Nicira 1, 256;
    MATCH_LEN = 4, 1; Nicira 1, 256;
    MATCH_FIELD = 4, 6; Nicira 1, 257;
    MATCH_VALUE = 4, 7; Nicira 1, 258;
    MATCH_MASK = 4, 8; Nicira 1, 259;
    MATCH_PREREQUISITE = 4, 9; Nicira 1, 260;
    MATCH_DUPLICATE = 4, 10; Nicira 1, 261;
    FLOW_TABLE_FULL = 5, 1; Plain 3, 0;
    FLOW_TABLE_ID = 5, 2; Nicira 1, 512;
    FLOW_OVERLAP = 5, 3; Plain 3, 1;
    FLOW_COMMAND = 5, 6; Plain 3, 4;
    FLOW_FLAGS = 5, 7; Plain 3, 2;
    GROUP_EXISTS = 6, 0; Plain 1, 1;
    GROUP_INVALID = 6, 1; Plain 1, 1;
    GROUP_FULL = 6, 3; Plain 1, 1;
    GROUP_LOOP = 6, 7; Plain 1, 1;
    GROUP_UNKNOWN = 6, 8; Plain 1, 1;
    GROUP_TYPE = 6, 10; Plain 1, 1;
    GROUP_COMMAND = 6, 11; Plain 1, 1;
    GROUP_BUCKET = 6, 12; Plain 1, 1;
    PORT_MOD_PORT = 7, 0; Plain 4, 0;
    PORT_MOD_CONFIG = 7, 2; Plain 4, 0;
    TABLE_MOD_CONFIG = 8, 1; Plain 1, 1;
    QUEUE_PORT = 9, 0; Plain 5, 0;
    QUEUE_QUEUE = 9, 1; Plain 5, 1;
    CONFIG_FLAGS = 10, 0; Plain 1, 5;
    ROLE_STALE = 11, 0; Plain 1, 5;
    ROLE_BAD = 11, 2; Plain 1, 5;
    METER_EXISTS = 12, 1; Plain 1, 1;
    METER_INVALID = 12, 2; Plain 1, 1;
    METER_UNKNOWN = 12, 3; Plain 1, 1;
    METER_COMMAND = 12, 4; Plain 1, 1;
    METER_FLAGS = 12, 5; Plain 1, 1;
    METER_RATE = 12, 6; Plain 1, 1;
    METER_BAND = 12, 8; Plain 1, 1;
    METER_FULL = 12, 10; Plain 1, 1;
    METER_BANDS = 12, 11; Plain 1, 1;
    TABLE_FEATURES_LEN = 13, 4; Plain 1, 6;
}

impl OfError {
    /// The body of an error message about the message `cause`.
    pub(crate) fn body(self, version: Version, cause: &[u8]) -> Vec<u8> {
        /// Type of Nicira's errors in OpenFlow 1.0.
        const NXET_VENDOR: u16 = 0xb0c2;
        let mut b = Vec::new();
        match (version, self.v10) {
            (Version::V10, Code10::Nicira(t, c)) => {
                b.put16(NXET_VENDOR);
                b.put16(0);
                b.put32(NICIRA);
                b.put16(t);
                b.put16(c);
            }
            (Version::V10, Code10::Plain(t, c)) => {
                b.put16(t);
                b.put16(c);
            }
            (Version::V13, _) => {
                b.put16(self.v13.0);
                b.put16(self.v13.1);
            }
        }
        // The specification wants 64 bytes of the message at least.
        b.extend_from_slice(&cause[..cause.len().min(1024)]);
        b
    }
}

pub(crate) type Result<T> = std::result::Result<T, OfError>;

/// Reads big-endian fields; running out of bytes is the error given at the start.
#[derive(Clone, Debug)]
pub(crate) struct Reader<'a> {
    data: &'a [u8],
    short: OfError,
}

impl<'a> Reader<'a> {
    pub fn new(data: &'a [u8], short: OfError) -> Self {
        Self { data, short }
    }

    pub fn bytes(&mut self, n: usize) -> Result<&'a [u8]> {
        let (a, b) = self.data.split_at_checked(n).ok_or(self.short)?;
        self.data = b;
        Ok(a)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (a, b) = self.data.split_first_chunk::<N>().ok_or(self.short)?;
        self.data = b;
        Ok(*a)
    }

    pub fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    pub fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// A number of up to 16 bytes.
    pub fn number(&mut self, bytes: usize) -> Result<u128> {
        Ok(self.bytes(bytes)?.iter().fold(0, |v, b| v << 8 | u128::from(*b)))
    }

    pub fn skip(&mut self, n: usize) -> Result<()> {
        self.bytes(n).map(drop)
    }

    /// The next `n` bytes as a reader of their own.
    pub fn sub(&mut self, n: usize) -> Result<Reader<'a>> {
        Ok(Reader { data: self.bytes(n)?, short: self.short })
    }

    /// The same bytes with another error.
    pub fn failing(self, short: OfError) -> Self {
        Self { short, ..self }
    }

    pub fn rest(&self) -> &'a [u8] {
        self.data
    }

    pub fn len(&self) -> usize {
        self.data.len()
    }

    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Fails unless everything was read.
    pub fn end(&self) -> Result<()> {
        if self.is_empty() { Ok(()) } else { Err(self.short) }
    }
}

/// A message's header and body.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message<'a> {
    pub version: u8,
    pub kind: u8,
    pub xid: u32,
    pub body: &'a [u8],
    /// Header and body, to be quoted in errors.
    pub whole: &'a [u8],
}

impl<'a> Message<'a> {
    /// Takes the first message off `data`; `Ok(None)`: it is not complete yet. A length below that of the header
    /// is an error after which the stream cannot be read on.
    pub fn split(data: &'a [u8]) -> Result<Option<(Self, &'a [u8])>> {
        let Some(h) = data.first_chunk::<HEADER>() else { return Ok(None) };
        let len = usize::from(u16::from_be_bytes([h[2], h[3]]));
        if len < HEADER {
            return Err(OfError::BAD_LEN);
        }
        let Some((whole, rest)) = data.split_at_checked(len) else { return Ok(None) };
        let xid = u32::from_be_bytes([h[4], h[5], h[6], h[7]]);
        Ok(Some((Self { version: h[0], kind: h[1], xid, body: &whole[HEADER..], whole }, rest)))
    }
}

/// Longest body that a message's 16-bit length allows.
pub const BODY_MAX: usize = u16::MAX as usize - HEADER;

/// Appends a message. A body that is too long would break the stream, so it is cut to an empty one.
pub(crate) fn put_message(out: &mut Vec<u8>, version: u8, kind: u8, xid: u32, body: &[u8]) {
    debug_assert!(body.len() <= BODY_MAX);
    let body = if body.len() <= BODY_MAX { body } else { &[] };
    out.extend_from_slice(&[version, kind]);
    out.put16((HEADER + body.len()) as u16);
    out.put32(xid);
    out.extend_from_slice(body);
}

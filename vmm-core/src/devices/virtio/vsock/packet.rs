//! The header of every packet (virtio 1.2, section 5.10.6). Fields are little-endian.

use zerocopy::{FromBytes, Immutable, IntoBytes};

pub(super) const HOST_CID: u64 = 2;
pub(super) const STREAM: u16 = 1;
/// The peer receives no more.
pub(super) const NO_RECEIVE: u32 = 1;
/// The peer sends no more.
pub(super) const NO_SEND: u32 = 2;

pub(super) mod op {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RST: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const RW: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C, packed)]
pub(super) struct Packet {
    pub(super) source_cid: u64,
    pub(super) target_cid: u64,
    pub(super) source_port: u32,
    pub(super) target_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buffer: u32,
    pub(super) forwarded: u32,
}

pub(super) const PACKET: usize = size_of::<Packet>();
const _: () = assert!(PACKET == 44);

/// Both ports of a connection, which name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

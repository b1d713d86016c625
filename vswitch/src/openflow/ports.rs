//! Ports: description, counters, packets from controllers.

use super::actions::{Context, take_actions};
use super::session::Session;
use super::wire::{NO_BUFFER, OfError, Put, Reader, Result, Version, port_from_16, port_to_16, reserved};
use crate::port::{PORT_MAX, PortId};
use crate::switch::{PortInfo, Switch};

/// The link is down (`OFPPS_LINK_DOWN`).
const LINK_DOWN: u32 = 1;
/// The port can be used for fast failover (`OFPPS_LIVE`).
const LIVE: u32 = 4;
/// Ten gigabits a second, full duplex, copper: what virtual ports are said to be.
const FEATURES: u32 = 1 << 6 | 1 << 11;
const FEATURES_10: u32 = 1 << 6 | 1 << 7;
const SPEED_KBPS: u32 = 10_000_000;

/// The address a port is said to have: ports of this switch have none of their own.
fn address(id: PortId) -> [u8; 6] {
    let b = id.to_be_bytes();
    [0x02, 0x6e, 0x63, b[1], b[2], b[3]]
}

/// A name of at most 15 bytes: sockets are known by the end of their path.
fn short_name(name: &str) -> &str {
    let base = name.rsplit('/').next().unwrap_or(name);
    let mut start = base.len().saturating_sub(15);
    while !base.is_char_boundary(start) {
        start += 1;
    }
    &base[start..]
}

pub(super) fn put_port_13(out: &mut Vec<u8>, p: &PortInfo) {
    out.put32(p.id);
    out.put32(0);
    out.extend_from_slice(&address(p.id));
    out.put16(0);
    out.put_text(short_name(&p.name), 16);
    out.put32(0);
    out.put32(if p.link_up { LIVE } else { LINK_DOWN });
    out.put32(FEATURES);
    out.zeros(12);
    out.put32(SPEED_KBPS);
    out.put32(SPEED_KBPS);
}

pub(super) fn put_port_10(out: &mut Vec<u8>, p: &PortInfo) {
    out.put16(port_to_16(p.id));
    out.extend_from_slice(&address(p.id));
    out.put_text(short_name(&p.name), 16);
    out.put32(0);
    out.put32(if p.link_up { 0 } else { LINK_DOWN });
    out.put32(FEATURES_10);
    out.zeros(12);
}

/// Counters of a port; what is not counted is told as all ones.
pub(super) fn put_port_stats(out: &mut Vec<u8>, p: &PortInfo, version: Version) {
    if version == Version::V10 {
        out.put16(port_to_16(p.id));
        out.zeros(6);
    } else {
        out.put32(p.id);
        out.put32(0);
    }
    let s = &p.stats;
    let tx_dropped = s.tx_dropped + s.tx_limited + s.tx_too_long;
    for n in [s.rx_packets, s.tx_packets, s.rx_bytes, s.tx_bytes, s.rx_dropped, tx_dropped, s.rx_errors, 0] {
        out.put64(n);
    }
    // Frame, overrun and check sequence errors, collisions.
    for _ in 0..4 {
        out.put64(u64::MAX);
    }
    if version == Version::V13 {
        // Age of the port.
        out.put32(u32::MAX);
        out.put32(u32::MAX);
    }
}

impl Session {
    /// A port number in the session's version.
    pub(super) fn take_port(&self, r: &mut Reader<'_>) -> Result<PortId> {
        Ok(if self.version() == Version::V10 { port_from_16(r.u16()?) } else { r.u32()? })
    }

    pub(super) fn packet_out(&mut self, switch: &Switch, mut r: Reader<'_>) -> Result<()> {
        let buffer = r.u32()?;
        let in_port = self.take_port(&mut r)?;
        let len = usize::from(r.u16()?);
        if self.version() == Version::V13 {
            r.skip(6)?;
        }
        if buffer != NO_BUFFER {
            return Err(OfError::BUFFER_UNKNOWN);
        }
        let list = r.sub(len)?.failing(OfError::ACTION_LEN);
        let actions = take_actions(list, Context { version: self.version(), matches: None })?;
        let in_port = match in_port {
            1..=PORT_MAX => in_port,
            0 | reserved::CONTROLLER | reserved::LOCAL | reserved::ANY => 0,
            _ => return Err(OfError::BAD_PORT),
        };
        if r.len() < crate::packet::FRAME_MIN {
            return Err(OfError::BAD_PACKET);
        }
        switch.packet_out(in_port, r.rest(), &actions);
        Ok(())
    }

    /// Ports have no administrative state here, so nothing but "change nothing" is accepted.
    pub(super) fn port_mod(&mut self, switch: &Switch, mut r: Reader<'_>) -> Result<()> {
        let port = self.take_port(&mut r)?;
        if self.version() == Version::V13 {
            r.skip(4)?;
        }
        r.skip(6)?;
        if self.version() == Version::V13 {
            r.skip(2)?;
        }
        let (_config, mask) = (r.u32()?, r.u32()?);
        if switch.port_stats(port).is_err() {
            return Err(OfError::PORT_MOD_PORT);
        }
        if mask != 0 { Err(OfError::PORT_MOD_CONFIG) } else { Ok(()) }
    }

    /// No port has queues.
    pub(super) fn queue_config(
        &mut self,
        switch: &Switch,
        xid: u32,
        kind: u8,
        mut r: Reader<'_>,
    ) -> Result<()> {
        let port = self.take_port(&mut r)?;
        if port != reserved::ANY && switch.port_stats(port).is_err() {
            return Err(OfError::QUEUE_PORT);
        }
        let mut b = Vec::new();
        if self.version() == Version::V10 {
            b.put16(port_to_16(port));
            b.zeros(6);
        } else {
            b.put32(port);
            b.put32(0);
        }
        self.send(kind, xid, &b);
        Ok(())
    }
}

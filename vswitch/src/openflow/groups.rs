//! Groups and meters: setting them up, and telling of them.

use super::actions::{Context, take_actions};
use super::actions_out::Encoder;
use super::flows::ANY_GROUP;
use super::session::Session;
use super::wire::{OfError, Put, Reader, Result, Version, reserved};
use crate::pipeline::{
    Action, Bucket, FlowFilter, FlowSpec, Group, GroupKind, Instructions, Match, Meter, MeterConfig,
};
use crate::switch::Switch;

/// "All groups" (`OFPG_ALL`).
const ALL_GROUPS: u32 = 0xffff_fffc;
/// Largest group number (`OFPG_MAX`).
const GROUP_MAX: u32 = 0xffff_ff00;
/// "All meters" (`OFPM_ALL`).
const ALL_METERS: u32 = 0xffff_ffff;
/// Largest meter number (`OFPM_MAX`).
const METER_MAX: u32 = 0xffff_0000;
const BAND_DROP: u16 = 1;
const METER_KBPS: u16 = 1;
const METER_PKTPS: u16 = 2;
const METER_BURST: u16 = 4;
const METER_STATS: u16 = 8;
/// Most buckets of a group.
const BUCKETS_MAX: usize = 1024;

fn take_buckets(mut r: Reader<'_>, kind: GroupKind) -> Result<Vec<Bucket>> {
    let mut list = Vec::new();
    while !r.is_empty() {
        let len = usize::from(r.u16()?);
        let mut b = r.sub(len.checked_sub(2).ok_or(OfError::BAD_LEN)?)?;
        let (weight, port, group) = (b.u16()?, b.u32()?, b.u32()?);
        b.skip(4)?;
        let actions =
            take_actions(b.failing(OfError::ACTION_LEN), Context { version: Version::V13, matches: None })?;
        // A bucket is alive by its port alone.
        if group != ANY_GROUP || list.len() >= BUCKETS_MAX {
            return Err(OfError::GROUP_BUCKET);
        }
        let watch_port = (port != reserved::ANY).then_some(port);
        if kind == GroupKind::FastFailover && watch_port.is_none() {
            return Err(OfError::GROUP_BUCKET);
        }
        list.push(Bucket { id: list.len() as u32, weight, watch_port, actions });
    }
    if kind == GroupKind::Indirect && list.len() != 1 {
        return Err(OfError::GROUP_INVALID);
    }
    Ok(list)
}

pub(super) fn put_group(out: &mut Vec<u8>, id: u32, g: &Group) {
    let start = out.len();
    out.put16(0);
    out.put8(match g.kind {
        GroupKind::All => 0,
        GroupKind::Select => 1,
        GroupKind::Indirect => 2,
        GroupKind::FastFailover => 3,
    });
    out.put8(0);
    out.put32(id);
    let any = Match::default();
    for b in &g.buckets {
        let at = out.len();
        out.put16(0);
        out.put16(b.weight);
        out.put32(b.watch_port.unwrap_or(reserved::ANY));
        out.put32(ANY_GROUP);
        out.put32(0);
        Encoder::new(Version::V13, &any, out).actions(&b.actions);
        out.put_len(at, at);
    }
    out.put_len(start, start);
}

/// Packets through groups are not counted apart from their rules.
pub(super) fn put_group_stats(out: &mut Vec<u8>, id: u32, g: &Group, references: u32) {
    let start = out.len();
    out.put16(0);
    out.put16(0);
    out.put32(id);
    out.put32(references);
    out.put32(0);
    out.put64(u64::MAX);
    out.put64(u64::MAX);
    out.put32(u32::MAX);
    out.put32(u32::MAX);
    for _ in &g.buckets {
        out.put64(u64::MAX);
        out.put64(u64::MAX);
    }
    out.put_len(start, start);
}

pub(super) fn put_group_features(out: &mut Vec<u8>) {
    const WEIGHTS_AND_LIVENESS: u32 = 0b11;
    /// Output, VLAN tags, groups, time to live, set-field.
    const ACTIONS: u32 = 1 | 1 << 17 | 1 << 18 | 1 << 22 | 1 << 23 | 1 << 24 | 1 << 25;
    out.put32(0b1111);
    out.put32(WEIGHTS_AND_LIVENESS);
    (0..4).for_each(|_| out.put32(GROUP_MAX));
    (0..4).for_each(|_| out.put32(ACTIONS));
}

fn take_meter(mut r: Reader<'_>, flags: u16) -> Result<MeterConfig> {
    if flags & !(METER_KBPS | METER_PKTPS | METER_BURST | METER_STATS) != 0
        || flags & METER_KBPS != 0 && flags & METER_PKTPS != 0
    {
        return Err(OfError::METER_FLAGS);
    }
    let (kind, len, rate, burst) = (r.u16()?, r.u16()?, r.u32()?, r.u32()?);
    r.skip(4)?;
    if kind != BAND_DROP || len != 16 {
        return Err(OfError::METER_BAND);
    }
    if !r.is_empty() {
        return Err(OfError::METER_BANDS);
    }
    if rate == 0 {
        return Err(OfError::METER_RATE);
    }
    let burst = (flags & METER_BURST != 0 && burst != 0).then_some(u64::from(burst));
    let rate = Some(u64::from(rate));
    Ok(if flags & METER_PKTPS != 0 {
        MeterConfig { pps: rate, burst_packets: burst, ..MeterConfig::default() }
    } else {
        MeterConfig { kbps: rate, burst_kb: burst, ..MeterConfig::default() }
    })
}

pub(super) fn put_meter(out: &mut Vec<u8>, id: u32, c: &MeterConfig) {
    let start = out.len();
    let (unit, rate, burst) = match c.pps {
        Some(pps) if c.kbps.is_none() => (METER_PKTPS, pps, c.burst_packets),
        _ => (METER_KBPS, c.kbps.unwrap_or(0), c.burst_kb),
    };
    out.put16(0);
    out.put16(unit | METER_STATS | if burst.is_some() { METER_BURST } else { 0 });
    out.put32(id);
    out.put16(BAND_DROP);
    out.put16(16);
    out.put32(rate.min(u32::MAX.into()) as u32);
    out.put32(burst.unwrap_or(0).min(u32::MAX.into()) as u32);
    out.put32(0);
    out.put_len(start, start);
}

pub(super) fn put_meter_stats(out: &mut Vec<u8>, id: u32, m: &Meter, flows: u32) {
    let start = out.len();
    out.put32(id);
    let len_at = out.len();
    out.put16(0);
    out.zeros(6);
    out.put32(flows);
    out.put64(m.passed() + m.dropped());
    // Bytes are not counted.
    out.put64(u64::MAX);
    out.put32(u32::MAX);
    out.put32(u32::MAX);
    out.put64(m.dropped());
    out.put64(u64::MAX);
    out.put_len(len_at, start);
}

pub(super) fn put_meter_features(out: &mut Vec<u8>) {
    out.put32(crate::pipeline::GROUPS_MAX as u32);
    out.put32(1 << BAND_DROP);
    out.put32(u32::from(METER_KBPS | METER_PKTPS | METER_BURST | METER_STATS));
    // One band, no colours.
    out.put8(1);
    out.put8(0);
    out.put16(0);
}

/// Number of rules for which `uses` holds.
pub(super) fn references(switch: &Switch, uses: impl Fn(&Instructions) -> bool) -> u32 {
    switch.flows(&FlowFilter::default()).iter().filter(|e| uses(&e.spec.instructions)).count() as u32
}

pub(super) fn uses_group(i: &Instructions, id: u32) -> bool {
    i.apply.iter().chain(&i.write).any(|a| *a == Action::Group(id))
}

pub(super) fn uses_meter(i: &Instructions, id: u32) -> bool {
    i.meter == Some(id) || i.apply.contains(&Action::Meter(id))
}

/// Deletes the rules for which `uses` holds.
fn delete_users(switch: &Switch, uses: impl Fn(&Instructions) -> bool) {
    for e in switch.flows(&FlowFilter::default()).iter().filter(|e| uses(&e.spec.instructions)) {
        let FlowSpec { table, priority, matches, .. } = e.spec;
        let only =
            FlowFilter { table: Some(table), strict: Some(priority), matches, ..FlowFilter::default() };
        switch.delete_flows(&only);
    }
}

impl Session {
    pub(super) fn group_mod(&mut self, switch: &Switch, mut r: Reader<'_>) -> Result<()> {
        let (command, kind) = (r.u16()?, r.u8()?);
        r.skip(1)?;
        let id = r.u32()?;
        let remove = |id| {
            delete_users(switch, |i| uses_group(i, id));
            switch.remove_group(id);
        };
        match command {
            0 | 1 => {}
            2 if id == ALL_GROUPS => {
                switch.groups().into_keys().for_each(remove);
                return Ok(());
            }
            2 => {
                remove(id);
                return Ok(());
            }
            _ => return Err(OfError::GROUP_COMMAND),
        }
        if id > GROUP_MAX {
            return Err(OfError::GROUP_INVALID);
        }
        let kind = match kind {
            0 => GroupKind::All,
            1 => GroupKind::Select,
            2 => GroupKind::Indirect,
            3 => GroupKind::FastFailover,
            _ => return Err(OfError::GROUP_TYPE),
        };
        let buckets = take_buckets(r, kind)?;
        match (command, switch.has_group(id)) {
            (0, true) => return Err(OfError::GROUP_EXISTS),
            (1, false) => return Err(OfError::GROUP_UNKNOWN),
            _ => {}
        }
        if buckets.iter().any(|b| b.actions.contains(&Action::Group(id))) {
            return Err(OfError::GROUP_LOOP);
        }
        switch.set_group(id, Group { kind, buckets }).map_err(|_| OfError::GROUP_FULL)
    }

    pub(super) fn meter_mod(&mut self, switch: &Switch, mut r: Reader<'_>) -> Result<()> {
        let (command, flags, id) = (r.u16()?, r.u16()?, r.u32()?);
        let remove = |id| {
            delete_users(switch, |i| uses_meter(i, id));
            switch.remove_meter(id);
        };
        match command {
            0 | 1 => {}
            2 if id == ALL_METERS => {
                switch.meters().into_keys().for_each(remove);
                return Ok(());
            }
            2 => {
                remove(id);
                return Ok(());
            }
            _ => return Err(OfError::METER_COMMAND),
        }
        if id == 0 || id > METER_MAX {
            return Err(OfError::METER_INVALID);
        }
        let config = take_meter(r, flags)?;
        match (command, switch.has_meter(id)) {
            (0, true) => return Err(OfError::METER_EXISTS),
            (1, false) => return Err(OfError::METER_UNKNOWN),
            _ => {}
        }
        switch.set_meter(id, config).map_err(|_| OfError::METER_FULL)
    }
}

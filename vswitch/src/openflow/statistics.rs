//! Statistics (multipart) requests and their paged answers.

use super::actions_out::Encoder;
use super::features::put_table_features;
use super::fields::{put_match_nx, put_match13, take_match_nx, take_match13};
use super::flows::{ALL_TABLES, ANY_GROUP, out_port};
use super::groups::{
    put_group, put_group_features, put_group_stats, put_meter, put_meter_features, put_meter_stats,
    references, uses_group, uses_meter,
};
use super::match10;
use super::notify::split_time;
use super::ports::{put_port_10, put_port_13, put_port_stats};
use super::session::Session;
use super::wire::{NICIRA, OfError, Put, Reader, Result, Version, port_from_16, put_message, reserved};
use crate::clock::{Nanos, SECOND};
use crate::pipeline::{FlowEntry, FlowFilter, Match, RULES_MAX, TABLES};
use crate::switch::Switch;

/// Bytes of entries in one message of an answer.
const PAGE: usize = 60_000;
const VENDOR: u16 = 0xffff;
const MORE: u16 = 1;
/// Wildcards of a table that can match everything (1.0).
const WILDCARDS_10: u32 = 0x3f_ffff;

/// An answer in the making: entries that are spread over messages.
struct Pages<'a> {
    session: &'a mut Session,
    xid: u32,
    /// What follows the message's header: type, flags, and what the version adds.
    head: Vec<u8>,
    body: Vec<u8>,
}

impl<'a> Pages<'a> {
    fn new(session: &'a mut Session, xid: u32, kind: u16, nicira: Option<u32>) -> Self {
        let mut head = Vec::new();
        head.put16(kind);
        head.put16(0);
        if session.version() == Version::V13 {
            head.put32(0);
        }
        if let Some(subtype) = nicira {
            head.put32(NICIRA);
            head.put32(subtype);
            head.put32(0);
        }
        Self { session, xid, head, body: Vec::new() }
    }

    /// Adds what `put` writes, which stays within one message.
    fn add(&mut self, put: impl FnOnce(&mut Vec<u8>)) {
        let start = self.body.len();
        put(&mut self.body);
        if self.body.len() > PAGE {
            let entry = self.body.split_off(start);
            if start > 0 {
                self.flush(MORE);
            }
            // An entry that no message can hold is left out.
            if entry.len() <= PAGE {
                self.body = entry;
            }
        }
    }

    fn flush(&mut self, flags: u16) {
        let kind = if self.session.version() == Version::V10 { 17 } else { 19 };
        let mut b = self.head.clone();
        b[2..4].copy_from_slice(&flags.to_be_bytes());
        b.append(&mut self.body);
        let version = self.session.version() as u8;
        put_message(&mut self.session.output, version, kind, self.xid, &b);
    }

    fn finish(mut self) {
        self.flush(0);
    }
}

impl Session {
    pub(super) fn statistics(&mut self, switch: &Switch, xid: u32, mut r: Reader<'_>) -> Result<()> {
        let v10 = self.version() == Version::V10;
        let (kind, flags) = (r.u16()?, r.u16()?);
        if !v10 {
            r.skip(4)?;
        }
        if flags & MORE != 0 {
            return Err(OfError::MULTIPART_OVERFLOW);
        }
        let (mut kind_known, mut nicira) = (kind, None);
        if kind == VENDOR {
            if r.u32()? != NICIRA || !v10 {
                return Err(OfError::BAD_EXPERIMENTER);
            }
            let subtype = r.u32()?;
            r.skip(4)?;
            nicira = Some(subtype);
            kind_known = match subtype {
                0 => 1,
                1 => 2,
                _ => return Err(OfError::BAD_EXP_TYPE),
            };
        }
        match kind_known {
            1 | 2 => {
                let filter = self.flow_filter(&mut r, nicira.is_some())?;
                let flows = switch.flows(&filter);
                let now = switch.clock().now();
                let version = self.version();
                let mut pages = Pages::new(self, xid, kind, nicira);
                if kind_known == 1 {
                    for e in &flows {
                        pages.add(|out| put_flow(out, e, now, version, nicira.is_some()));
                    }
                } else {
                    let sum = flows.iter().map(|e| e.stats.get()).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
                    pages.add(|out| {
                        out.put64(sum.0);
                        out.put64(sum.1);
                        out.put32(flows.len() as u32);
                        out.put32(0);
                    });
                }
                pages.finish();
                Ok(())
            }
            _ => self.other_statistics(switch, xid, kind, r),
        }
    }

    fn other_statistics(&mut self, switch: &Switch, xid: u32, kind: u16, mut r: Reader<'_>) -> Result<()> {
        let version = self.version();
        let v10 = version == Version::V10;
        let port = |s: &Session, r: &mut Reader<'_>| {
            // In 1.0 "all ports" stands for any, too.
            let port = Some(s.take_port(r)?).filter(|p| !v10 || *p != reserved::ALL).unwrap_or(reserved::ANY);
            let known = port == reserved::ANY || switch.port_stats(port).is_ok();
            if known { Ok(port) } else { Err(OfError::BAD_PORT) }
        };
        // Whether a request is about a number, of which `all` stands for every one.
        match kind {
            0 => {
                let mut p = Pages::new(self, xid, kind, None);
                p.add(put_description);
                p.finish();
            }
            3 => {
                let rows = table_rows(switch);
                let mut p = Pages::new(self, xid, kind, None);
                rows.iter().for_each(|row| p.add(|out| put_table(out, row, version)));
                p.finish();
            }
            4 => {
                let port = port(self, &mut r)?;
                switch.barrier();
                let mut p = Pages::new(self, xid, kind, None);
                for info in switch.ports().iter().filter(|i| port == reserved::ANY || i.id == port) {
                    p.add(|out| put_port_stats(out, info, version));
                }
                p.finish();
            }
            5 => {
                let port = port(self, &mut r).map_err(|_| OfError::QUEUE_PORT)?;
                if v10 {
                    r.skip(2)?;
                }
                let queue = r.u32()?;
                if port != reserved::ANY && queue != u32::MAX {
                    return Err(OfError::QUEUE_QUEUE);
                }
                Pages::new(self, xid, kind, None).finish();
            }
            13 => {
                let ports = switch.ports();
                let mut p = Pages::new(self, xid, kind, None);
                for info in &ports {
                    p.add(|out| if v10 { put_port_10(out, info) } else { put_port_13(out, info) });
                }
                p.finish();
            }
            6..=12 if !v10 => self.statistics_13(switch, xid, kind, r)?,
            _ => return Err(OfError::BAD_MULTIPART),
        }
        Ok(())
    }

    /// Groups, meters, table features.
    fn statistics_13(&mut self, switch: &Switch, xid: u32, kind: u16, mut r: Reader<'_>) -> Result<()> {
        const ALL_GROUPS: u32 = 0xffff_fffc;
        const ALL_METERS: u32 = 0xffff_ffff;
        match kind {
            6 | 7 => {
                let id = if kind == 6 { r.u32()? } else { ALL_GROUPS };
                let groups = switch.groups();
                if id < ALL_GROUPS && !groups.contains_key(&id) && kind == 6 {
                    return Err(OfError::GROUP_UNKNOWN);
                }
                let mut p = Pages::new(self, xid, kind, None);
                for (n, g) in groups.iter().filter(|(n, _)| id >= ALL_GROUPS || **n == id) {
                    if kind == 7 {
                        p.add(|out| put_group(out, *n, g));
                    } else {
                        let users = references(switch, |i| uses_group(i, *n));
                        p.add(|out| put_group_stats(out, *n, g, users));
                    }
                }
                p.finish();
            }
            9 | 10 => {
                let id = r.u32()?;
                let meters = switch.meters();
                if id != ALL_METERS && !meters.contains_key(&id) {
                    return Err(OfError::METER_UNKNOWN);
                }
                let mut p = Pages::new(self, xid, kind, None);
                for (n, m) in meters.iter().filter(|(n, _)| id == ALL_METERS || **n == id) {
                    if kind == 10 {
                        p.add(|out| put_meter(out, *n, m.config()));
                    } else {
                        let users = references(switch, |i| uses_meter(i, *n));
                        p.add(|out| put_meter_stats(out, *n, m, users));
                    }
                }
                p.finish();
            }
            8 | 11 => {
                let mut p = Pages::new(self, xid, kind, None);
                p.add(if kind == 8 { put_group_features } else { put_meter_features });
                p.finish();
            }
            _ => {
                // Features can be read, not set.
                if !r.is_empty() {
                    return Err(OfError::TABLE_FEATURES_LEN);
                }
                let mut p = Pages::new(self, xid, kind, None);
                (0..TABLES).for_each(|t| p.add(|out| put_table_features(out, t)));
                p.finish();
            }
        }
        Ok(())
    }

    /// Which rules a request is about.
    fn flow_filter(&self, r: &mut Reader<'_>, nicira: bool) -> Result<FlowFilter> {
        let mut f = FlowFilter::default();
        let table;
        if self.version() == Version::V13 {
            table = r.u8()?;
            r.skip(3)?;
            f.out_port = out_port(r.u32()?);
            f.out_group = Some(r.u32()?).filter(|g| *g != ANY_GROUP);
            r.skip(4)?;
            f.cookie = (r.u64()?, r.u64()?);
            f.matches = take_match13(r)?;
        } else if nicira {
            f.out_port = out_port(port_from_16(r.u16()?));
            let len = usize::from(r.u16()?);
            table = r.u8()?;
            r.skip(3)?;
            f.matches = take_match_nx(r, len)?;
        } else {
            f.matches = match10::take(r)?;
            table = r.u8()?;
            r.skip(1)?;
            f.out_port = out_port(port_from_16(r.u16()?));
        }
        f.table = (table != ALL_TABLES).then_some(table);
        Ok(f)
    }
}

fn put_flow(out: &mut Vec<u8>, e: &FlowEntry, now: Nanos, version: Version, nicira: bool) {
    let s = &e.spec;
    let (packets, bytes) = e.stats.get();
    let age = now.saturating_sub(e.created);
    let (seconds, nanos) = split_time(age);
    let start = out.len();
    out.put16(0);
    out.put8(s.table);
    out.put8(0);
    if version == Version::V10 && !nicira {
        match10::put(out, &s.matches);
    }
    out.put32(seconds);
    out.put32(nanos);
    for v in [s.priority, s.idle_timeout, s.hard_timeout] {
        out.put16(v);
    }
    let match_at = out.len();
    if nicira {
        out.put16(0);
        // Ages count from one; zero stands for unknown.
        let idle = now.saturating_sub(e.stats.used().max(e.created));
        for t in [idle, age] {
            out.put16((t / SECOND + 1).min(0xffff) as u16);
        }
    } else if version == Version::V10 {
        out.zeros(6);
    } else {
        out.put16(u16::from(s.notify_removal));
        out.put32(0);
    }
    out.put64(s.cookie);
    out.put64(packets);
    out.put64(bytes);
    if nicira {
        let len = put_match_nx(out, &s.matches);
        out[match_at..match_at + 2].copy_from_slice(&len.to_be_bytes());
    } else if version == Version::V13 {
        put_match13(out, &s.matches);
    }
    let is_miss = s.priority == 0 && s.matches == Match::default();
    let mut encoder = Encoder::new(version, &s.matches, out).of_miss(is_miss);
    if version == Version::V10 {
        encoder.instructions_10(&s.instructions);
    } else {
        encoder.instructions(&s.instructions);
    }
    out.put_len(start, start);
}

fn put_description(out: &mut Vec<u8>) {
    out.put_text("Nacre", 256);
    out.put_text("Userspace virtual switch", 256);
    out.put_text(concat!("vswitch ", env!("CARGO_PKG_VERSION")), 256);
    out.put_text("None", 32);
    out.put_text("", 256);
}

/// A table: number, rules, packets that matched.
type TableRow = (u8, u32, u64);

fn table_rows(switch: &Switch) -> Vec<TableRow> {
    let mut rows: Vec<TableRow> = (0..TABLES).map(|t| (t, 0, 0)).collect();
    for e in switch.flows(&FlowFilter::default()) {
        if let Some(row) = rows.get_mut(usize::from(e.spec.table)) {
            row.1 += 1;
            row.2 += e.stats.get().0;
        }
    }
    rows
}

fn put_table(out: &mut Vec<u8>, (table, rules, matched): &TableRow, version: Version) {
    out.put8(*table);
    out.zeros(3);
    if version == Version::V10 {
        out.put_text(&format!("table{table}"), 32);
        out.put32(WILDCARDS_10);
        out.put32(RULES_MAX as u32);
    }
    out.put32(*rules);
    // Packets that found no rule are not counted by table.
    out.put64(*matched);
    out.put64(*matched);
}

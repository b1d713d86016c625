//! What the switch can do: features, table features.

use super::fields::feature_names;
use super::ports::put_port_10;
use super::session::{Session, kind};
use super::wire::{OfError, Put, Reader, Result, Version};
use crate::pipeline::{RULES_MAX, TABLES};
use crate::switch::Switch;

/// Flow, table, port and group statistics.
const CAPABILITIES_13: u32 = 0b1111;
/// Flow, table and port statistics; addresses inside ARP can be matched.
const CAPABILITIES_10: u32 = 0b111 | 1 << 7;
/// All actions of OpenFlow 1.0 but enqueue.
const ACTIONS_10: u32 = 0x7ff;

impl Session {
    pub(super) fn features(&mut self, switch: &Switch, xid: u32) -> Result<()> {
        let v10 = self.version() == Version::V10;
        let mut b = Vec::new();
        b.put64(self.datapath);
        // No packet is kept for a controller.
        b.put32(0);
        b.put8(TABLES);
        b.zeros(3);
        if v10 {
            b.put32(CAPABILITIES_10);
            b.put32(ACTIONS_10);
            // A message has room for some 1300 ports; more are told by the port description request.
            switch.ports().iter().take(1300).for_each(|p| put_port_10(&mut b, p));
        } else {
            b.put32(CAPABILITIES_13);
            b.put32(0);
        }
        self.send(kind::FEATURES_REPLY, xid, &b);
        Ok(())
    }

    /// The only configuration of a table that 1.3 knows is none.
    pub(super) fn table_mod(&mut self, mut r: Reader<'_>) -> Result<()> {
        let _table = r.u8()?;
        r.skip(3)?;
        if r.u32()? != 0 { Err(OfError::TABLE_MOD_CONFIG) } else { Ok(()) }
    }
}

/// One table's features (1.3, section 7.3.5.5).
pub(super) fn put_table_features(out: &mut Vec<u8>, table: u8) {
    let start = out.len();
    out.put16(0);
    out.put8(table);
    out.zeros(5);
    out.put_text(&format!("table{table}"), 32);
    out.put64(u64::MAX);
    out.put64(u64::MAX);
    out.put32(0);
    out.put32(RULES_MAX as u32);
    let mut property = |kind: u16, body: &dyn Fn(&mut Vec<u8>)| {
        let at = out.len();
        out.put16(kind);
        out.put16(0);
        body(out);
        out.put_len(at + 2, at);
        out.pad8(at);
    };
    let headers = |list: &'static [u16]| {
        move |out: &mut Vec<u8>| {
            for n in list {
                out.put16(*n);
                out.put16(4);
            }
        }
    };
    const INSTRUCTIONS: [u16; 6] = [1, 2, 3, 4, 5, 6];
    const ACTIONS: [u16; 7] = [0, 17, 18, 22, 23, 24, 25];
    property(0, &headers(&INSTRUCTIONS));
    property(2, &|out| (table + 1..TABLES).for_each(|t| out.put8(t)));
    property(4, &headers(&ACTIONS));
    property(6, &headers(&ACTIONS));
    // Match, wildcards, set-field in the action set and at once.
    for kind in [8, 10, 12, 14] {
        property(kind, &|out| feature_names(out));
    }
    out.put_len(start, start);
}

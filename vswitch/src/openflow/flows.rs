//! Rules: adding, changing and deleting them.

use super::actions::{Context, REASON_ACTION, REASON_MISS, take_actions, take_instructions};
use super::fields::{take_match_nx, take_match13};
use super::match10;
use super::session::Session;
use super::wire::{NO_BUFFER, OfError, Reader, Result, Version, port_from_16, reserved};
use crate::pipeline::{Action, FlowFilter, FlowSpec, Instructions, Match, TABLES};
use crate::switch::Switch;

/// "All tables", in requests that select.
pub(super) const ALL_TABLES: u8 = 255;
/// "Any group" (`OFPG_ANY`).
pub(super) const ANY_GROUP: u32 = u32::MAX;

const SEND_FLOW_REMOVED: u16 = 1;
const CHECK_OVERLAP: u16 = 2;
/// 1.0: the rule is for emergencies.
const EMERGENCY: u16 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    Add,
    Modify,
    ModifyStrict,
    Delete,
    DeleteStrict,
}

impl Command {
    fn from_wire(v: u8) -> Result<Self> {
        use Command::{Add, Delete, DeleteStrict, Modify, ModifyStrict};
        [Add, Modify, ModifyStrict, Delete, DeleteStrict]
            .get(usize::from(v))
            .copied()
            .ok_or(OfError::FLOW_COMMAND)
    }
}

/// A rule message in either version.
struct FlowMod {
    command: Command,
    /// `ALL_TABLES`: any, in commands that select; the first, in those that add.
    table: u8,
    priority: u16,
    matches: Match,
    instructions: Instructions,
    cookie: u64,
    cookie_mask: u64,
    /// Seconds without packets, and in all, after which the rule goes.
    timeouts: (u16, u16),
    flags: u16,
    out_port: u32,
    out_group: u32,
    /// Whether a change that finds no rule adds one (OpenFlow 1.0).
    adds_missing: bool,
}

impl Session {
    pub(super) fn flow_mod_13(&mut self, switch: &Switch, mut r: Reader<'_>) -> Result<()> {
        let (cookie, cookie_mask) = (r.u64()?, r.u64()?);
        let (table, command) = (r.u8()?, Command::from_wire(r.u8()?)?);
        let (timeouts, priority) = ((r.u16()?, r.u16()?), r.u16()?);
        let buffer = r.u32()?;
        let (out_port, out_group, flags) = (r.u32()?, r.u32()?, r.u16()?);
        r.skip(2)?;
        if flags & !0x1f != 0 {
            return Err(OfError::FLOW_FLAGS);
        }
        let matches = take_match13(&mut r)?;
        let selects = matches!(command, Command::Delete | Command::DeleteStrict);
        let mut instructions = if selects {
            Instructions::default()
        } else {
            take_instructions(r.failing(OfError::INSTRUCTION_LEN), table, &matches)?
        };
        check_buffer(buffer, command)?;
        if priority == 0 && matches == Match::default() {
            name_misses(&mut instructions);
        }
        let m = FlowMod {
            command,
            table,
            priority,
            matches,
            instructions,
            cookie,
            cookie_mask,
            timeouts,
            flags,
            out_port,
            out_group,
            adds_missing: false,
        };
        run(switch, m)
    }

    pub(super) fn flow_mod_10(&mut self, switch: &Switch, mut r: Reader<'_>) -> Result<()> {
        let matches = match10::take(&mut r)?;
        let cookie = r.u64()?;
        self.flow_mod_common(switch, r, Some(matches), cookie)
    }

    pub(super) fn flow_mod_nicira(&mut self, switch: &Switch, mut r: Reader<'_>) -> Result<()> {
        let cookie = r.u64()?;
        self.flow_mod_common(switch, r, None, cookie)
    }

    /// What OpenFlow 1.0's and Nicira's message have in common. Nicira's has its match behind the flags.
    fn flow_mod_common(
        &mut self,
        switch: &Switch,
        mut r: Reader<'_>,
        matches: Option<Match>,
        cookie: u64,
    ) -> Result<()> {
        let command = r.u16()?;
        let (table, command) = match self.table_in_command {
            true => ((command >> 8) as u8, command & 0xff),
            false => (ALL_TABLES, command),
        };
        let command = Command::from_wire(u8::try_from(command).map_err(|_| OfError::FLOW_COMMAND)?)?;
        let (timeouts, priority) = ((r.u16()?, r.u16()?), r.u16()?);
        let buffer = r.u32()?;
        let (out_port, flags) = (port_from_16(r.u16()?), r.u16()?);
        if flags & EMERGENCY != 0 {
            return Err(OfError::FLOW_TABLE_FULL);
        }
        let matches = match matches {
            Some(m) => m,
            None => {
                let len = usize::from(r.u16()?);
                r.skip(6)?;
                take_match_nx(&mut r, len)?
            }
        };
        let context = Context { version: Version::V10, matches: Some(&matches) };
        let actions = take_actions(r.failing(OfError::ACTION_LEN), context)?;
        check_buffer(buffer, command)?;
        let instructions = Instructions::apply(actions);
        let (cookie_mask, out_group, adds_missing) = (0, ANY_GROUP, true);
        let m = FlowMod {
            command,
            table,
            priority,
            matches,
            instructions,
            cookie,
            cookie_mask,
            timeouts,
            flags,
            out_port,
            out_group,
            adds_missing,
        };
        run(switch, m)
    }
}

/// What the rule for packets that no other matches gives to controllers is a table miss.
fn name_misses(i: &mut Instructions) {
    for a in i.apply.iter_mut().chain(&mut i.write) {
        if let Action::Controller { reason, .. } = a
            && *reason == REASON_ACTION
        {
            *reason = REASON_MISS;
        }
    }
}

fn check_buffer(buffer: u32, command: Command) -> Result<()> {
    let ignored = matches!(command, Command::Delete | Command::DeleteStrict);
    if buffer == NO_BUFFER || ignored { Ok(()) } else { Err(OfError::BUFFER_UNKNOWN) }
}

/// The condition "outputs to this port" of selecting requests.
pub(super) fn out_port(port: u32) -> Option<u32> {
    (port != reserved::ANY).then_some(port)
}

fn run(switch: &Switch, m: FlowMod) -> Result<()> {
    let strict = matches!(m.command, Command::ModifyStrict | Command::DeleteStrict);
    let deletes = matches!(m.command, Command::Delete | Command::DeleteStrict);
    if m.table >= TABLES && m.table != ALL_TABLES {
        return Err(OfError::FLOW_TABLE_ID);
    }
    let mut spec = FlowSpec {
        table: m.table,
        priority: m.priority,
        matches: m.matches,
        instructions: m.instructions,
        cookie: m.cookie,
        idle_timeout: m.timeouts.0,
        hard_timeout: m.timeouts.1,
        notify_removal: m.flags & SEND_FLOW_REMOVED != 0,
    };
    let filter = FlowFilter {
        table: (m.table != ALL_TABLES).then_some(m.table),
        matches: spec.matches,
        strict: strict.then_some(spec.priority),
        cookie: (spec.cookie, m.cookie_mask),
        out_port: deletes.then(|| out_port(m.out_port)).flatten(),
        out_group: (deletes && m.out_group != ANY_GROUP).then_some(m.out_group),
    };
    if deletes {
        switch.delete_flows(&filter);
        return Ok(());
    }
    if m.table == ALL_TABLES {
        if !m.adds_missing {
            return Err(OfError::FLOW_TABLE_ID);
        }
        spec.table = 0;
    }
    check_references(switch, &spec.instructions)?;
    let add = match m.command {
        Command::Add => true,
        _ => switch.modify_flows(&filter, &spec.instructions) == 0 && m.adds_missing,
    };
    if !add {
        return Ok(());
    }
    if m.flags & CHECK_OVERLAP != 0 {
        let table = FlowFilter { table: Some(spec.table), ..FlowFilter::default() };
        let meets = |s: &FlowSpec| s.priority == spec.priority && s.matches.overlaps(&spec.matches);
        if switch.flows(&table).iter().any(|e| meets(&e.spec)) {
            return Err(OfError::FLOW_OVERLAP);
        }
    }
    switch.add_flow(spec).map_err(|_| OfError::FLOW_TABLE_FULL)
}

/// Groups and meters that a rule uses must be there.
fn check_references(switch: &Switch, i: &Instructions) -> Result<()> {
    let mut groups = i.apply.iter().chain(&i.write).filter_map(|a| match a {
        Action::Group(g) => Some(*g),
        _ => None,
    });
    if groups.any(|g| !switch.has_group(g)) {
        return Err(OfError::ACTION_OUT_GROUP);
    }
    if i.meter.is_some_and(|m| !switch.has_meter(m)) {
        return Err(OfError::METER_UNKNOWN);
    }
    Ok(())
}

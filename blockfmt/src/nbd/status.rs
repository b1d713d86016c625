//! What block status tells.

use super::handshake::{Context, Session};
use super::proto::{STATE_HOLE, STATE_ZERO, command_flag};
use super::reply::Extents;
use super::transmission::Request;
use crate::job::DirtyMap;
use crate::{Result, Source};

/// Most extents in one reply.
const MAX_EXTENTS: usize = 1024;

/// The extents at the start of a range in every context.
pub(super) fn statuses(session: &Session, r: &Request) -> Result<Vec<(u32, Extents)>> {
    let of = |context: &Context| {
        let extents = match &context.bitmap {
            None => status(session, r)?,
            Some(map) => {
                session.export.disk.map(r.offset, r.len)?; // the range exists
                dirty(map, session, r)
            }
        };
        Ok((context.id, extents))
    };
    session.contexts.iter().map(of).collect()
}

/// Longest range that a status reply describes: lengths have 32 bits unless headers are extended.
fn status_limit(session: &Session, r: &Request) -> u64 {
    if session.extended { r.len } else { r.len.min(u64::from(u32::MAX) & !0xffff) }
}

/// Lengths and states of what a bitmap says about the start of a range.
fn dirty(map: &DirtyMap, session: &Session, r: &Request) -> Extents {
    let (size, end) = (map.granularity(), r.offset + status_limit(session, r));
    let most = if r.flags & command_flag::REQ_ONE != 0 { 1 } else { MAX_EXTENTS };
    let mut out = Vec::new();
    let mut at = r.offset;
    while at < end && out.len() < most {
        let granule = at / size;
        let marked = granule < map.granules() && map.get(granule);
        let stop = match marked {
            true => (granule..map.granules()).find(|g| !map.get(*g)).unwrap_or(map.granules()),
            false => map.next(granule).unwrap_or(u64::MAX),
        };
        let stop = stop.saturating_mul(size).min(end).max(at + 1);
        out.push((stop - at, u64::from(marked)));
        at = stop;
    }
    out
}

/// Lengths and states of the extents at the start of a range.
fn status(session: &Session, r: &Request) -> Result<Extents> {
    let mut out = Extents::new();
    let limit = status_limit(session, r);
    let mut done = 0;
    while done < limit {
        let (extent, _) = session.export.disk.map(r.offset + done, limit - done)?;
        let state = match extent.source {
            Source::Data { .. } | Source::Opaque { .. } => 0,
            Source::Zero { allocated: true } => STATE_ZERO,
            Source::Zero { allocated: false } | Source::Below => STATE_ZERO | STATE_HOLE,
        };
        let full = out.len() == MAX_EXTENTS || r.flags & command_flag::REQ_ONE != 0;
        match out.last_mut() {
            Some(last) if last.1 == state => last.0 += extent.len,
            Some(_) if full => break,
            _ => out.push((extent.len, state)),
        }
        done += extent.len;
    }
    Ok(out)
}

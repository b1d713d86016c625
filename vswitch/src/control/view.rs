//! Lists that can be shown, as JSON and as text.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::View;
use crate::address::MacAddr;
use crate::clock::SECOND;
use crate::error::Result;
use crate::pipeline::FlowFilter;
use crate::switch::Switch;

/// The first `limit` rows of a list, and how many there are.
pub(super) fn rows(switch: &Switch, what: View, limit: usize) -> Result<Value> {
    let (rows, total): (Vec<Value>, usize) = match what {
        View::Ports => {
            let all = switch.ports();
            let row = |p: &crate::switch::PortInfo| {
                json!({ "id": p.id, "name": p.name, "kind": p.kind, "link": if p.link_up { "up" } else { "down" },
                        "config": p.config, "stats": p.stats })
            };
            (all.iter().take(limit).map(row).collect(), all.len())
        }
        View::Macs => {
            let names: HashMap<_, _> = switch.ports().into_iter().map(|p| (p.id, p.name)).collect();
            let all = switch.mac_table();
            let row = |r: &crate::mac_table::MacRow| {
                json!({ "vlan": r.vlan, "mac": MacAddr::from_u64(r.mac), "port": r.port,
                        "name": names.get(&r.port), "age": r.age, "static": r.fixed })
            };
            (all.iter().take(limit).map(row).collect(), all.len())
        }
        View::Flows => {
            let now = switch.clock().now();
            let all = switch.flows(&FlowFilter::default());
            let row = |e: &crate::pipeline::FlowEntry| {
                let (packets, bytes) = e.stats.get();
                let seconds = |since: u64| now.saturating_sub(since) / SECOND;
                json!({ "table": e.spec.table, "priority": e.spec.priority, "cookie": e.spec.cookie,
                        "packets": packets, "bytes": bytes, "age": seconds(e.created),
                        "idle": seconds(e.stats.used().max(e.created)),
                        "match": e.spec.matches.to_string(), "actions": e.spec.instructions.to_string() })
            };
            (all.iter().take(limit).map(|e| row(e)).collect(), all.len())
        }
        View::Top => {
            let (top, total) = switch.top_talkers(limit)?;
            (top.iter().map(|t| json!(t)).collect(), total)
        }
    };
    Ok(json!({ "rows": rows, "total": total }))
}

/// Columns of a list: heading, and where the value is found.
fn columns(what: View) -> &'static [(&'static str, &'static str)] {
    match what {
        View::Ports => &[
            ("id", "/id"),
            ("name", "/name"),
            ("kind", "/kind"),
            ("link", "/link"),
            ("rx-packets", "/stats/rx_packets"),
            ("rx-bytes", "/stats/rx_bytes"),
            ("rx-dropped", "/stats/rx_dropped"),
            ("tx-packets", "/stats/tx_packets"),
            ("tx-bytes", "/stats/tx_bytes"),
            ("tx-dropped", "/stats/tx_dropped"),
        ],
        View::Macs => &[
            ("vlan", "/vlan"),
            ("mac", "/mac"),
            ("port", "/port"),
            ("name", "/name"),
            ("age", "/age"),
            ("static", "/static"),
        ],
        View::Flows => &[
            ("table", "/table"),
            ("priority", "/priority"),
            ("packets", "/packets"),
            ("bytes", "/bytes"),
            ("idle", "/idle"),
            ("match", "/match"),
            ("actions", "/actions"),
        ],
        View::Top => &[
            ("port", "/in_port"),
            ("bit/s", "/bits_per_second"),
            ("packet/s", "/packets_per_second"),
            ("bytes", "/bytes"),
            ("eth-src", "/eth_src"),
            ("eth-dst", "/eth_dst"),
            ("type", "/eth_type"),
            ("source", "/ip_src"),
            ("sport", "/src_port"),
            ("destination", "/ip_dst"),
            ("dport", "/dst_port"),
            ("proto", "/protocol"),
        ],
    }
}

/// The answer to [`super::Request::Show`] as a table with aligned columns.
pub fn table(what: View, answer: &Value) -> String {
    let columns = columns(what);
    let empty = Vec::new();
    let rows = answer["rows"].as_array().unwrap_or(&empty);
    let cell = |row: &Value, at: &str| match row.pointer(at) {
        Some(Value::String(s)) => s.clone(),
        None | Some(Value::Null) => "-".into(),
        Some(v) => v.to_string(),
    };
    let mut lines: Vec<Vec<String>> = vec![columns.iter().map(|c| c.0.to_string()).collect()];
    lines.extend(rows.iter().map(|r| columns.iter().map(|c| cell(r, c.1)).collect()));
    let width = |i: usize| lines.iter().map(|l| l[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let mut text = String::new();
    for l in &lines {
        let cells = l.iter().zip(&widths).map(|(c, w)| format!("{c:w$}"));
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    let total = answer["total"].as_u64().unwrap_or(0);
    if total > rows.len() as u64 {
        text += &format!("{} of {total}\n", rows.len());
    }
    text
}

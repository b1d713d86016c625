//! Answers of the agent, for people.

use ::cluster::agent::{ApiReply, HostEntry, Status, VmEntry};
use ::cluster::ha::VmPhase;

/// Prints an answer; refusals go to standard error.
pub fn print(reply: &ApiReply) {
    match reply {
        ApiReply::Status(status) => print_status(status),
        ApiReply::Hosts(hosts) => {
            table(&["HOST", "STATE", "BOOT", "CPU", "MEMORY", "NOTES"], hosts, host_row)
        }
        ApiReply::Vms(vms) => table(&["VM", "STATE", "HOST", "PRIORITY", "CPU", "MEMORY"], vms, vm_row),
        ApiReply::Locks(locks) => table(&["LOCK", "TOKEN", "GENERATION"], locks, |l| {
            let name = format!("{}:{}", l.resource.lockspace.0, l.resource.index);
            vec![name, l.token.lver.to_string(), l.token.owner.generation.to_string()]
        }),
        ApiReply::Events(events) => {
            table(&["ID", "TIME", "SEVERITY", "KIND", "SUBJECT", "MESSAGE"], events, |e| {
                let severity = format!("{:?}", e.severity).to_lowercase();
                vec![
                    e.id.to_string(),
                    clock(e.time),
                    severity,
                    e.kind.clone(),
                    e.subject.clone(),
                    e.message.clone(),
                ]
            })
        }
        ApiReply::Plan(plan) => {
            table(&["VM", "FROM", "TO", "MIB"], &plan.moves, |m| {
                vec![m.vm.0.to_string(), m.from.0.to_string(), m.to.0.to_string(), m.size.to_string()]
            });
            for host in &plan.unsolved {
                daemons::outln!("{host} stays overloaded: no host has room that the rules allow");
            }
        }
        ApiReply::Done => {}
        ApiReply::Error { message, coordinator } => {
            let hint = coordinator.map(|h| format!(" (the coordinator is {h})")).unwrap_or_default();
            eprintln!("nacre: {message}{hint}");
        }
    }
}

fn print_status(s: &Status) {
    daemons::outln!("{} ({}), boot {}", s.host.host, s.name, s.host.generation);
    daemons::outln!("quorate      {}", if s.quorate { "yes" } else { "NO" });
    daemons::outln!("coordinator  {}", s.coordinator.map_or("none".into(), |h| h.to_string()));
    if s.halted == Some(true) {
        daemons::outln!("halted       yes: no VM is started before `nacre cluster halt off`");
    }
    daemons::outln!("watchdog     {}", if s.watchdog { "yes" } else { "NO" });
    for l in &s.leases {
        match l.generation {
            Some(g) => {
                daemons::outln!("lease        {}: generation {g}, {} s left", l.space, l.expires_in / 1000)
            }
            None => daemons::outln!("lease        {}: NOT HELD", l.space),
        }
    }
    for v in &s.vms {
        daemons::outln!("vm           {}: {}", v.vm.0, format!("{:?}", v.status).to_lowercase());
    }
}

fn host_row(h: &HostEntry) -> Vec<String> {
    let mut row = vec![h.host.0.to_string(), format!("{:?}", h.verdict).to_lowercase()];
    match &h.record {
        Some(r) => {
            let notes = [(r.maintenance, "maintenance"), (r.spare, "spare"), (!r.watchdog, "no watchdog")];
            let notes: Vec<&str> = notes.iter().filter(|n| n.0).map(|n| n.1).collect();
            row.extend([r.boot.to_string(), format!("{} MHz", r.capacity.cpu)]);
            row.extend([format!("{} MiB", r.capacity.memory), notes.join(", ")]);
        }
        None => row.extend(["-", "-", "-", ""].map(String::from)),
    }
    row
}

fn vm_row(v: &VmEntry) -> Vec<String> {
    let r = &v.record;
    let state = match r.phase {
        _ if !r.wanted && r.place.is_none() => "stopped".into(),
        _ if !r.wanted => "stopping".into(),
        VmPhase::Moving { to } => format!("moving to {}", to.host),
        phase => format!("{phase:?}").to_lowercase(),
    };
    let host = r.place.map_or("-".into(), |p| p.host.0.to_string());
    let of = |used: Option<u64>, need: u64| used.map_or(format!("{need}"), |u| format!("{u}/{need}"));
    let (cpu, memory) = (v.usage.map(|u| u.cpu), v.usage.map(|u| u.memory));
    vec![
        r.spec.id.0.to_string(),
        state,
        host,
        r.spec.priority.to_string(),
        format!("{} MHz", of(cpu, r.spec.demand.cpu)),
        format!("{} MiB", of(memory, r.spec.demand.memory)),
    ]
}

/// Milliseconds since 1970 as the time of day, UTC.
fn clock(millis: u64) -> String {
    let s = millis / 1000;
    format!("{:02}:{:02}:{:02}.{:03}", s / 3600 % 24, s / 60 % 60, s % 60, millis % 1000)
}

fn table<T>(head: &[&str], rows: &[T], row: impl Fn(&T) -> Vec<String>) {
    let mut lines: Vec<Vec<String>> = vec![head.iter().map(|h| (*h).to_owned()).collect()];
    lines.extend(rows.iter().map(row));
    let width = |n: usize| lines.iter().map(|l| l[n].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    for line in &lines {
        let cells: Vec<String> = line.iter().zip(&widths).map(|(c, w)| format!("{c:w$}")).collect();
        daemons::outln!("{}", cells.join("  ").trim_end());
    }
}

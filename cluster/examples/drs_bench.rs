//! Plan time and memory sent for 100 hosts x 1000 VMs and 1000 x 10,000.
//!
//! `cargo run --release -p cluster --example drs_bench`

use std::time::Instant;

use cluster::drs::{Config, HostLoad, Rule, Snapshot, VmLoad, balance};
use cluster::types::{HostId, Resources, VmId};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

fn main() {
    for (hosts, vms) in [(100u16, 1000u32), (1000, 10_000)] {
        let mut rng = SmallRng::seed_from_u64(1);
        let capacity = Resources { cpu: 40_000, memory: 262_144 };
        let mut s = Snapshot {
            hosts: (1..=hosts).map(|n| HostLoad { id: HostId(n), capacity, maintenance: false }).collect(),
            ..Snapshot::default()
        };
        for n in 1..=vms {
            let memory = 1024 * [2u64, 4, 8, 16, 32][rng.random_range(0..5)];
            s.vms.push(VmLoad {
                id: VmId(n),
                host: Some(HostId(rng.random_range(1..=hosts))),
                demand: Resources { cpu: rng.random_range(200..4700), memory: memory / 2 },
                reservation: Resources::default(),
                limit: None,
                shares: 1000,
                size: memory,
            });
        }
        // A tenth of the VMs in groups of five that should run apart.
        for group in 0..vms / 50 {
            let vms = (1..=5).map(|i| VmId(group * 5 + i)).collect();
            s.rules.push(Rule::Apart { vms, must: false });
        }
        let count = |s: &Snapshot| {
            let mut used = vec![Resources::default(); usize::from(hosts) + 1];
            for v in &s.vms {
                if let Some(h) = v.host {
                    used[usize::from(h.0)] = used[usize::from(h.0)].plus(v.need());
                }
            }
            let over =
                |u: &&Resources| u.cpu * 100 > capacity.cpu * 80 || u.memory * 100 > capacity.memory * 80;
            used.iter().filter(over).count()
        };
        for failures in [0, 1] {
            let config = Config { cost: 0, margin: 0, failures, ..Config::default() };
            let start = Instant::now();
            let plan = balance(&s, config);
            let time = start.elapsed();
            let mut after = s.clone();
            for m in &plan.moves {
                if let Some(v) = after.vms.iter_mut().find(|v| v.id == m.vm) {
                    v.host = Some(m.to);
                }
            }
            println!(
                "{hosts} hosts x {vms} VMs, N+{failures}: {} overloaded -> {} in {} moves, {} GB, {:.1} ms; a second run plans {} moves",
                count(&s),
                count(&after),
                plan.moves.len(),
                plan.size() / 1024,
                time.as_secs_f64() * 1000.0,
                balance(&after, config).moves.len()
            );
        }
    }
}

//! Plan time and memory sent of the balancer, and its distance from the optimum; see `--help`.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on ends")]

use std::fmt::Write as _;
use std::process::Command;
use std::time::Instant;

use clap::Parser;
use cluster::drs::{Config, HostLoad, Plan, Rule, Snapshot, VmLoad, balance};
use cluster::types::{HostId, Resources, VmId};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Measure the balancer: no host above 80 % with the least memory sent.
#[derive(Parser)]
#[command(after_help = "\
The oracle is a mixed-integer programme of the same task (without rules and reserve, which only the planner
keeps) that the Debian package coinor-cbc solves. It prints what it found and the bound that no plan can go below.

Examples:
  cargo run --release -p cluster --example drs_bench
  cargo run --release -p cluster --example drs_bench -- --oracle 300
  cargo run --release -p cluster --example drs_bench -- --oracle 300 --hosts 30 --vms 300")]
struct Args {
    /// Compare with the oracle instead, which gets this long.
    #[arg(long, value_name = "SECONDS")]
    oracle: Option<u32>,
    /// How many hosts the oracle plans for.
    #[arg(long, value_name = "N", default_value_t = 100)]
    hosts: u16,
    /// How many VMs the oracle plans for.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    vms: u32,
    /// The seed of the cluster that the oracle plans for.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

const CAPACITY: Resources = Resources { cpu: 40_000, memory: 262_144 };
const THRESHOLD: Resources = Resources { cpu: CAPACITY.cpu * 80 / 100, memory: CAPACITY.memory * 80 / 100 };

/// VMs of 2 to 32 GiB thrown at random hosts.
fn random(hosts: u16, vms: u32, seed: u64) -> Snapshot {
    let mut rng = SmallRng::seed_from_u64(seed);
    let host = |n| HostLoad { id: HostId(n), capacity: CAPACITY, maintenance: false };
    let mut s = Snapshot { hosts: (1..=hosts).map(host).collect(), ..Snapshot::default() };
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
    s
}

fn overloaded(s: &Snapshot) -> usize {
    let mut used = vec![Resources::default(); s.hosts.len() + 1];
    for v in &s.vms {
        if let Some(h) = v.host {
            used[usize::from(h.0)] = used[usize::from(h.0)].plus(v.need());
        }
    }
    used.iter().filter(|u| !THRESHOLD.fits(**u)).count()
}

fn apply(s: &Snapshot, plan: &Plan) -> Snapshot {
    let mut after = s.clone();
    for m in &plan.moves {
        if let Some(v) = after.vms.iter_mut().find(|v| v.id == m.vm) {
            v.host = Some(m.to);
        }
    }
    after
}

/// The task in CPLEX's LP format: `m_V_H` moves VM V to host H, `o_V` says that V moves at all.
fn programme(s: &Snapshot) -> String {
    let mut text = String::from("Minimize\n obj:");
    for v in &s.vms {
        write!(text, " + {} o_{}", v.size / 1024, v.id.0).unwrap();
        text.push_str(if v.id.0 % 20 == 0 { "\n" } else { "" });
    }
    text.push_str("\nSubject To\n");
    let elsewhere = |v: &VmLoad| {
        let here = v.host;
        s.hosts.iter().map(|h| h.id).filter(move |h| Some(*h) != here)
    };
    for v in &s.vms {
        write!(text, " v{}:", v.id.0).unwrap();
        for (n, h) in elsewhere(v).enumerate() {
            write!(text, " + m_{}_{}{}", v.id.0, h.0, if n % 20 == 19 { "\n" } else { "" }).unwrap();
        }
        writeln!(text, " - o_{} = 0", v.id.0).unwrap();
    }
    for h in &s.hosts {
        for (row, limit) in [("c", THRESHOLD.cpu), ("m", THRESHOLD.memory)] {
            let amount = |r: Resources| if row == "c" { r.cpu } else { r.memory };
            let mut used = 0;
            write!(text, " {row}{}:", h.id.0).unwrap();
            for (n, v) in s.vms.iter().enumerate() {
                let need = amount(v.need());
                if v.host == Some(h.id) {
                    used += need;
                    write!(text, " - {need} o_{}", v.id.0).unwrap();
                } else {
                    write!(text, " + {need} m_{}_{}", v.id.0, h.id.0).unwrap();
                }
                text.push_str(if n % 20 == 19 { "\n" } else { "" });
            }
            writeln!(text, " <= {}", limit as i64 - used as i64).unwrap();
        }
    }
    text.push_str("Binary\n");
    for v in &s.vms {
        writeln!(text, " o_{}", v.id.0).unwrap();
        for h in elsewhere(v) {
            writeln!(text, " m_{}_{}", v.id.0, h.0).unwrap();
        }
    }
    text.push_str("End\n");
    text
}

/// What cbc found in time, and the bound that it proved, in GB.
fn oracle(s: &Snapshot, seconds: u32) -> (Option<f64>, Option<f64>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("plan.lp");
    std::fs::write(&path, programme(s)).unwrap();
    let out = Command::new("cbc")
        .arg(&path)
        .args(["-seconds", &seconds.to_string(), "-ratio", "0.005", "-solve", "-quit"])
        .output()
        .expect("cbc is missing: install the Debian package coinor-cbc");
    let text = String::from_utf8_lossy(&out.stdout);
    let number = |name: &str| {
        let line = text.lines().rev().find(|l| l.trim_start().starts_with(name))?;
        line.split_whitespace().last()?.parse::<f64>().ok()
    };
    let found = number("Objective value:");
    // Solved to the end, cbc prints no bound of its own.
    let proved = text.contains("Optimal solution found").then_some(found).flatten().map(|f| f / 1.005);
    (found, number("Lower bound:").or(proved))
}

fn compare(args: &Args, seconds: u32) {
    let s = random(args.hosts, args.vms, args.seed);
    let config = Config { cost: 0, margin: 0, failures: 0, ..Config::default() };
    let start = Instant::now();
    let plan = balance(&s, config);
    let time = start.elapsed();
    let ours = plan.size() as f64 / 1024.0;
    println!(
        "{} hosts x {} VMs, seed {}: {} overloaded -> {}, {ours} GB in {:.1} ms",
        args.hosts,
        args.vms,
        args.seed,
        overloaded(&s),
        overloaded(&apply(&s, &plan)),
        time.as_secs_f64() * 1000.0
    );
    let start = Instant::now();
    let (found, bound) = oracle(&s, seconds);
    let time = start.elapsed().as_secs_f64();
    let show = |what: &str, gb: Option<f64>| match gb {
        Some(gb) => println!("  {what}: {gb:.0} GB; ours is {:.3} of it", ours / gb.max(1.0)),
        None => println!("  {what}: none in {time:.0} s"),
    };
    show(&format!("cbc's best plan after {time:.0} s"), found);
    show("what no plan can go below", bound);
}

fn measure(hosts: u16, vms: u32) {
    let mut s = random(hosts, vms, 1);
    // A tenth of the VMs in groups of five that should run apart.
    for group in 0..vms / 50 {
        let vms = (1..=5).map(|i| VmId(group * 5 + i)).collect();
        s.rules.push(Rule::Apart { vms, must: false });
    }
    for failures in [0, 1] {
        let config = Config { cost: 0, margin: 0, failures, ..Config::default() };
        let start = Instant::now();
        let plan = balance(&s, config);
        let time = start.elapsed();
        let after = apply(&s, &plan);
        println!(
            "{hosts} hosts x {vms} VMs, N+{failures}: {} overloaded -> {} in {} moves, {} GB, {:.1} ms; a second run plans {} moves",
            overloaded(&s),
            overloaded(&after),
            plan.moves.len(),
            plan.size() / 1024,
            time.as_secs_f64() * 1000.0,
            balance(&after, config).moves.len()
        );
    }
}

fn main() {
    let args = Args::parse();
    match args.oracle {
        Some(seconds) => compare(&args, seconds),
        None => {
            measure(100, 1000);
            measure(1000, 10_000);
        }
    }
}

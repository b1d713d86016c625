//! Seeds and faults.

use core::fmt;

/// A small deterministic generator (SplitMix64); the simulator needs no more.
#[derive(Clone, Debug)]
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Rng(seed ^ 0x5851_f42d_4c95_7f2d)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from `low` to below `high`.
    pub(super) fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low).max(1)
    }

    /// True in `percent` of 100 cases.
    pub(super) fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// All packets between the host and the others are lost, in both directions; the store too.
    Isolate(u8),
    /// Packets from the first host to the second are lost.
    CutOneWay(u8, u8),
    /// The host's packets arrive, but none from the others or the store reach it.
    Deaf(u8),
    /// The host hears the others and the store, but none of its packets arrive.
    Mute(u8),
    /// Hosts up to the number cannot talk to those above it; the store stays with the upper side.
    Split(u8),
    /// The host loses this percentage of its packets; others are late and doubled.
    Lossy(u8, u8),
    /// The host stops altogether and goes on later, as if nothing had happened.
    PauseHost(u8),
    /// The agent stops while its VMs run on.
    PauseAgent(u8),
    /// The host resets and boots again.
    Reset(u8),
    /// The host hangs for good; only its watchdog or its power controller ends that.
    Hang(u8),
    /// The host loses power for good, and its power controller with it.
    PowerLoss(u8),
    /// The host's I/O to the volume fails.
    VolumeFails(u8, u8),
    /// The host's I/O to the volume is slow: seconds instead of milliseconds.
    VolumeSlow(u8, u8),
    /// The host's writes land, but half of their completions are lost.
    CompletionLost(u8, u8),
    /// The host's writes land at once, but their completions are seen seconds later.
    CompletionLate(u8, u8),
    /// The host's writes land seconds late, even after it was reset.
    WritesLate(u8, u8),
    /// The host's I/O to every volume fails.
    StorageFails(u8),
    /// The volume fails for every host.
    VolumeLost(u8),
    /// The host's power controller does not answer.
    BmcDead(u8),
    /// The host's power controller answers late.
    BmcSlow(u8),
    /// The host's power controller accepts "off" but does nothing.
    BmcLies(u8),
    /// The host's VMs cannot be killed.
    Unkillable(u8),
    /// The VM fails a few seconds after each start.
    CrashLoop(u8),
    /// The VM fails once.
    CrashVm(u8),
    /// The VM's guest does nothing any more, while its process is there.
    VmHangs(u8),
    /// The VM's guest does nothing for a while.
    VmFreezes(u8),
    /// The VM's guest sends no heartbeats any more, but works.
    BeatsEnd(u8),
    /// The disks of the host's VMs complete nothing.
    IoStalls(u8),
    /// The host cannot reach the store.
    StoreCut(u8),
    /// Answers of the store are lost after half of the writes were carried out.
    StoreAmbiguous,
    /// The coordinator's store lease ends early.
    LeaseRevoked,
    /// Store leases end late.
    LeaseLate,
    /// An operator moves a VM while it runs.
    Move(u8, u8),
    /// An operator empties the host.
    Maintenance(u8),
    /// An operator shuts the cluster down, and lets it start again.
    Halt,
    /// An operator starts more VMs than fit.
    StartMany,
}

/// A fault with its time and its length in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// When it begins.
    pub at: u64,
    /// How long it lasts.
    pub length: u64,
    /// What it is.
    pub kind: FaultKind,
}

/// A seed and the faults of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Seeds every random choice of the run.
    pub seed: u64,
    /// How many hosts there are.
    pub hosts: u8,
    /// Which of the hosts have no watchdog, a bit each.
    pub no_watchdog: u32,
    /// What goes wrong.
    pub faults: Vec<Fault>,
}

/// How long a run lasts, in milliseconds.
pub(super) const END: u64 = 600_000;
/// Faults begin after this.
const FIRST: u64 = 50_000;
/// Temporary faults are over by then.
pub(super) const HEALED: u64 = 320_000;
/// How many VMs there are at the start.
pub(super) const VMS: u8 = 6;
/// How many volumes there are.
pub(super) const VOLUMES: u8 = 2;

impl Schedule {
    /// The schedule that `seed` stands for: 5 hosts (sometimes 4), six faults and for every other seed one of a
    /// guest. Of odd seeds all six strike one host and one volume, close together.
    pub fn random(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let hosts: u8 = if rng.chance(15) { 4 } else { 5 };
        let no_watchdog = if rng.chance(35) { 1 << rng.range(1, u64::from(hosts) + 1) } else { 0 };
        let mut faults = match seed % 2 {
            0 => Schedule::scattered(&mut rng, hosts),
            _ => Schedule::focused(&mut rng, hosts, no_watchdog),
        };
        if rng.chance(50) {
            faults.push(guest_fault(&mut rng, hosts));
        }
        Schedule { seed, hosts, no_watchdog, faults }
    }

    fn scattered(rng: &mut Rng, hosts: u8) -> Vec<Fault> {
        let mut down = 0;
        (0..6)
            .map(|_| {
                let at = rng.range(FIRST, 240_000);
                let longest = if rng.chance(50) { 15_000 } else { 220_000 };
                let length = rng.range(500, longest);
                let kind = random_kind(rng, hosts, &mut down);
                Fault { at, length: length.min(HEALED - at), kind }
            })
            .collect()
    }

    fn focused(rng: &mut Rng, hosts: u8, no_watchdog: u32) -> Vec<Fault> {
        let victim = if no_watchdog > 0 && rng.chance(60) {
            no_watchdog.trailing_zeros() as u8
        } else {
            rng.range(1, u64::from(hosts) + 1) as u8
        };
        let volume = rng.range(0, u64::from(VOLUMES)) as u8;
        let start = rng.range(FIRST, 140_000);
        (0..6)
            .map(|_| {
                let at = start + rng.range(0, 40_000);
                let longest = if rng.chance(30) { 15_000 } else { 220_000 };
                let length = rng.range(500, longest).min(HEALED - at);
                Fault { at, length, kind: focused_kind(rng, hosts, victim, volume) }
            })
            .collect()
    }
}

/// Faults that make each other worse on one host.
fn focused_kind(rng: &mut Rng, hosts: u8, victim: u8, volume: u8) -> FaultKind {
    match rng.range(0, 22) {
        0 | 1 => FaultKind::Isolate(victim),
        2 => FaultKind::Split(if victim > hosts / 2 { hosts - 1 } else { victim }),
        3 | 4 => FaultKind::StorageFails(victim),
        5 => FaultKind::VolumeFails(victim, volume),
        6 | 7 => FaultKind::Unkillable(victim),
        8 => FaultKind::PauseAgent(victim),
        9 => FaultKind::PauseHost(victim),
        10 => FaultKind::Reset(victim),
        11 => FaultKind::CompletionLost(victim, volume),
        12 => FaultKind::CompletionLate(victim, volume),
        13 => FaultKind::WritesLate(victim, volume),
        14 => FaultKind::BmcDead(victim),
        15 | 16 => FaultKind::BmcLies(victim),
        17 => FaultKind::Hang(victim),
        18 => FaultKind::Maintenance(victim),
        19 => FaultKind::Deaf(victim),
        20 => FaultKind::Mute(victim),
        _ => {
            FaultKind::Move(rng.range(1, u64::from(VMS) + 1) as u8, rng.range(1, u64::from(hosts) + 1) as u8)
        }
    }
}

/// A guest that stops, or looks as if it had, or all of them on purpose.
fn guest_fault(rng: &mut Rng, hosts: u8) -> Fault {
    let at = rng.range(FIRST, 240_000);
    let longest = if rng.chance(50) { 25_000 } else { 220_000 };
    let length = rng.range(500, longest).min(HEALED - at);
    let vm = rng.range(1, u64::from(VMS) + 1) as u8;
    let host = rng.range(1, u64::from(hosts) + 1) as u8;
    let kind = match rng.range(0, 6) {
        0 => FaultKind::VmHangs(vm),
        1 => FaultKind::VmFreezes(vm),
        2 => FaultKind::BeatsEnd(vm),
        3 => FaultKind::IoStalls(host),
        4 => FaultKind::Halt,
        // So long that its guests would be given up, and so short that the host is not.
        _ => return Fault { at, length: rng.range(20_000, 29_000), kind: FaultKind::PauseAgent(host) },
    };
    Fault { at, length, kind }
}

fn random_kind(rng: &mut Rng, hosts: u8, down: &mut u32) -> FaultKind {
    let host = |rng: &mut Rng| rng.range(1, u64::from(hosts) + 1) as u8;
    let volume = |rng: &mut Rng| rng.range(0, u64::from(VOLUMES)) as u8;
    let vm = |rng: &mut Rng| rng.range(1, u64::from(VMS) + 1) as u8;
    match rng.range(0, 39) {
        0 | 1 => FaultKind::Isolate(host(rng)),
        2 | 36 => {
            let from = host(rng);
            let other = rng.range(0, u64::from(hosts) - 1) as u8;
            FaultKind::CutOneWay(from, (from + other) % hosts + 1)
        }
        3 => FaultKind::Split(rng.range(1, u64::from(hosts)) as u8),
        4 => FaultKind::Lossy(host(rng), rng.range(10, 70) as u8),
        5 | 6 => FaultKind::PauseHost(host(rng)),
        7 => FaultKind::PauseAgent(host(rng)),
        8 | 9 => FaultKind::Reset(host(rng)),
        // At most one host for good, so that a majority with room is left.
        10 if *down == 0 => {
            *down = 1;
            FaultKind::PowerLoss(host(rng))
        }
        10 => FaultKind::Reset(host(rng)),
        11 | 12 => FaultKind::VolumeFails(host(rng), volume(rng)),
        13 => FaultKind::VolumeSlow(host(rng), volume(rng)),
        14 | 15 => FaultKind::CompletionLost(host(rng), volume(rng)),
        16 => FaultKind::CompletionLate(host(rng), volume(rng)),
        17 => FaultKind::WritesLate(host(rng), volume(rng)),
        18 => FaultKind::VolumeLost(volume(rng)),
        19 => FaultKind::BmcDead(host(rng)),
        20 => FaultKind::BmcSlow(host(rng)),
        21 | 22 => FaultKind::BmcLies(host(rng)),
        23 => FaultKind::Unkillable(host(rng)),
        24 => FaultKind::CrashLoop(vm(rng)),
        25 => FaultKind::CrashVm(vm(rng)),
        26 => FaultKind::StoreCut(host(rng)),
        27 => FaultKind::StoreAmbiguous,
        28 => FaultKind::LeaseRevoked,
        29 => FaultKind::LeaseLate,
        30 => FaultKind::Move(vm(rng), host(rng)),
        31 => FaultKind::Maintenance(host(rng)),
        32 | 33 => FaultKind::Hang(host(rng)),
        34 => FaultKind::Move(vm(rng), host(rng)),
        37 => FaultKind::Deaf(host(rng)),
        38 => FaultKind::Mute(host(rng)),
        _ => FaultKind::StartMany,
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {}: {} hosts", self.seed, self.hosts)?;
        for h in 1..=self.hosts {
            if self.no_watchdog >> h & 1 == 1 {
                write!(f, ", host {h} without watchdog")?;
            }
        }
        for fault in &self.faults {
            let (at, until) = (fault.at as f64 / 1000.0, (fault.at + fault.length) as f64 / 1000.0);
            write!(f, "\n  {at:.1} s to {until:.1} s: {:?}", fault.kind)?;
        }
        Ok(())
    }
}

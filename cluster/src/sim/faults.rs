//! Faults come and go.

use std::sync::Arc;

use super::exec::ProcEvent;
use super::schedule::{END, Fault, FaultKind, VOLUMES};
use super::state::{Bmc, IoFaults, ProcState};
use super::world::{EXTRA, World, spec};
use crate::ha::Request;
use crate::types::{HostId, VmId};

impl World {
    pub(super) fn fault(&mut self, fault: Fault, on: bool) {
        self.note(|| format!("fault {} {:?}", if on { "begins" } else { "ends" }, fault.kind));
        let n = self.hosts.len();
        let ix = |h: u8| usize::from(h) - 1;
        let until = fault.at + fault.length;
        let io = |world: &mut World, h: u8, v: u8, set: &dyn Fn(&mut IoFaults)| {
            set(&mut world.volumes[usize::from(v)].faults[ix(h)]);
        };
        match fault.kind {
            FaultKind::Isolate(h) => {
                self.cut_from(usize::from(h), on);
                self.cut_to(usize::from(h), on);
            }
            FaultKind::Deaf(h) => self.cut_to(usize::from(h), on),
            FaultKind::Mute(h) => self.cut_from(usize::from(h), on),
            FaultKind::CutOneWay(a, b) => self.cut(usize::from(a), usize::from(b), on),
            FaultKind::Split(at) => {
                for low in 1..=usize::from(at) {
                    for high in (usize::from(at) + 1..=n).chain([0]) {
                        self.cut(low, high, on);
                        self.cut(high, low, on);
                    }
                }
            }
            FaultKind::Lossy(h, percent) => {
                self.network.loss[ix(h)] = if on { u64::from(percent) } else { 0 };
            }
            FaultKind::PauseHost(h) if on => {
                let h = &mut self.hosts[ix(h)];
                h.paused_until = h.paused_until.max(until);
            }
            FaultKind::Hang(h) if on => self.hosts[ix(h)].paused_until = END + 1,
            FaultKind::PauseAgent(h) if on => {
                let h = &mut self.hosts[ix(h)];
                h.agent_paused_until = h.agent_paused_until.max(until);
            }
            FaultKind::Reset(h) if on => self.reset(ix(h)),
            FaultKind::PowerLoss(h) if on => {
                self.power_off(ix(h));
                self.hosts[ix(h)].dead = true;
                self.hosts[ix(h)].bmc = Bmc::Dead;
            }
            FaultKind::PauseHost(_)
            | FaultKind::Hang(_)
            | FaultKind::PauseAgent(_)
            | FaultKind::Reset(_)
            | FaultKind::PowerLoss(_) => {}
            FaultKind::VolumeFails(h, v) => {
                io(self, h, v, &|f| f.fails = if on { f.fails + 1 } else { f.fails - 1 });
            }
            FaultKind::VolumeLost(v) => {
                for h in 1..=n as u8 {
                    io(self, h, v, &|f| f.fails = if on { f.fails + 1 } else { f.fails - 1 });
                }
            }
            FaultKind::StorageFails(h) => {
                for v in 0..VOLUMES {
                    io(self, h, v, &|f| f.fails = if on { f.fails + 1 } else { f.fails - 1 });
                }
            }
            FaultKind::VolumeSlow(h, v) => io(self, h, v, &|f| f.slow = on),
            FaultKind::CompletionLost(h, v) => io(self, h, v, &|f| f.completion_lost = on),
            FaultKind::CompletionLate(h, v) => io(self, h, v, &|f| f.completion_late = on),
            FaultKind::WritesLate(h, v) => io(self, h, v, &|f| f.writes_late = on),
            FaultKind::BmcDead(h) => self.set_bmc(ix(h), if on { Bmc::Dead } else { Bmc::Good }),
            FaultKind::BmcSlow(h) => self.set_bmc(ix(h), if on { Bmc::Slow } else { Bmc::Good }),
            FaultKind::BmcLies(h) => self.set_bmc(ix(h), if on { Bmc::Lies } else { Bmc::Good }),
            FaultKind::Unkillable(h) => {
                self.hosts[ix(h)].unkillable = on;
                if !on {
                    self.reap(ix(h));
                }
            }
            FaultKind::CrashLoop(vm) => {
                self.crash_loops =
                    if on { self.crash_loops | 1 << vm } else { self.crash_loops & !(1 << vm) };
                if on {
                    self.crash(VmId(u32::from(vm)));
                }
            }
            FaultKind::CrashVm(vm) if on => self.crash(VmId(u32::from(vm))),
            FaultKind::CrashVm(_) => {}
            FaultKind::VmHangs(vm) if on => self.with_guest(vm, |g| g.freeze(fault.at, u64::MAX)),
            FaultKind::VmFreezes(vm) if on => self.with_guest(vm, |g| g.freeze(fault.at, until)),
            FaultKind::BeatsEnd(vm) if on => self.with_guest(vm, |g| g.beats_ended = true),
            FaultKind::VmHangs(_) | FaultKind::VmFreezes(_) | FaultKind::BeatsEnd(_) => {}
            FaultKind::IoStalls(h) => self.hosts[ix(h)].stall.set(self.now, on),
            FaultKind::StoreCut(h) => {
                self.cut(usize::from(h), 0, on);
                self.cut(0, usize::from(h), on);
            }
            FaultKind::StoreAmbiguous => self.store.ambiguous = on,
            FaultKind::LeaseLate => self.store.late = on,
            FaultKind::LeaseRevoked => {
                if on {
                    self.store.leases.clear();
                    self.store.key = None;
                }
            }
            FaultKind::Move(vm, h) => {
                if on {
                    let request = Request::Move(VmId(u32::from(vm)), HostId(u16::from(h)));
                    self.operator(request, 5);
                }
            }
            FaultKind::Maintenance(h) => {
                self.operator(Request::Maintenance(HostId(u16::from(h)), on), 30);
            }
            FaultKind::Halt => self.operator(Request::Halt(on), 60),
            FaultKind::StartMany => {
                for vm in EXTRA..EXTRA + 16 {
                    if on {
                        self.operator(Request::Start(Arc::new(spec(vm))), 3);
                    }
                }
            }
        }
    }

    fn set_bmc(&mut self, host: usize, bmc: Bmc) {
        if !self.hosts[host].dead {
            self.hosts[host].bmc = bmc;
        }
    }

    fn cut(&mut self, from: usize, to: usize, on: bool) {
        if from != to {
            let c = &mut self.network.cut[from][to];
            *c = if on { *c + 1 } else { c.saturating_sub(1) };
        }
    }

    fn cut_from(&mut self, host: usize, on: bool) {
        for other in 0..=self.hosts.len() {
            self.cut(host, other, on);
        }
    }

    fn cut_to(&mut self, host: usize, on: bool) {
        for other in 0..=self.hosts.len() {
            self.cut(other, host, on);
        }
    }

    /// Processes that could not be killed may die now; each has an exit on its way.
    fn reap(&mut self, host: usize) {
        self.hosts[host].unkillable = false;
    }

    fn crash(&mut self, vm: VmId) {
        for host in 0..self.hosts.len() {
            let found = self.hosts[host].procs.iter().find(|p| p.vm == vm && p.state == ProcState::Live);
            if let Some(serial) = found.map(|p| p.serial) {
                self.later(host, serial, 0, ProcEvent::Crash);
            }
        }
    }
}

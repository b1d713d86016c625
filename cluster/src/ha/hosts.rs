//! What the coordinator makes of the hosts: who joined, who is lost, who is gone.

use super::io::{ClusterView, HaOutput};
use super::manager::{HaManager, HostInfo};
use super::records::Report;
use crate::membership::Verdict;
use crate::mutants::{self, Mutant};
use crate::types::{HostId, Incarnation, Time};

impl HaManager {
    pub(super) fn on_report(&mut self, now: Time, report: Box<Report>) {
        let host = report.from.host;
        let known = self.reports.get(&host).map(|i| (i.report.from.generation, i.report.seq));
        if known.is_some_and(|known| (report.from.generation, report.seq) <= known) {
            return;
        }
        if self.loaded && self.pending.is_none() {
            let record = self.host_mut(host);
            if (record.boot, record.capacity, record.watchdog)
                != (report.from.generation, report.capacity, report.watchdog)
            {
                let mut new = record.clone();
                new.boot = report.from.generation;
                new.capacity = report.capacity;
                new.watchdog = report.watchdog;
                self.write_host(host, new);
            }
        }
        self.reports.insert(host, HostInfo { report, at: now });
    }

    pub(super) fn on_gone(&mut self, target: Incarnation, generations: &[u64]) {
        if !self.loaded {
            return;
        }
        let mut record = self.host_mut(target.host).clone();
        record.gone_boot = record.gone_boot.max(target.generation);
        if record.gone.len() < generations.len() {
            record.gone.resize(generations.len(), 0);
        }
        for (old, new) in record.gone.iter_mut().zip(generations) {
            *old = (*old).max(*new);
        }
        self.write_host(target.host, record);
    }

    /// Asks for fencing where a host is lost.
    pub(super) fn judge_hosts(&mut self, now: Time, view: &dyn ClusterView, out: &mut Vec<HaOutput>) {
        if mutants::active(Mutant::FailureIgnored) {
            return;
        }
        let may_fence = view.is_quorate() || mutants::active(Mutant::FenceWithoutQuorum);
        let hosts: Vec<HostId> = self.state.hosts.keys().copied().collect();
        for host in hosts {
            let verdict = view.verdict(host);
            let record = &self.state.hosts[&host];
            let boot = record.boot.max(view.boot(host));
            let over = record.gone_boot >= boot;
            // A host that does not hear us cannot be told anything: it is isolated in one direction.
            let deaf = verdict == Verdict::Online && !view.is_mutual(host);
            // A life whose report came before its first heartbeat is not the one that the verdict is on.
            let unjudged =
                self.reports.get(&host).is_some_and(|i| i.report.from.generation > view.boot(host));
            let isolated = verdict == Verdict::Isolated || deaf || unjudged;
            let isolated_for = if isolated {
                let since = self.isolated_since.entry(host).or_insert((boot, now));
                // A new life does not hear us at once either: it has all of the patience again.
                if since.0 != boot && !mutants::active(Mutant::IsolationOutlivesReboot) {
                    *since = (boot, now);
                }
                now.since(since.1)
            } else {
                self.isolated_since.remove(&host);
                0
            };
            let lost = matches!(verdict, Verdict::Suspect | Verdict::Dead) && !unjudged
                || isolated && isolated_for >= self.config.isolation;
            // A host without VMs may still own locks, so it is fenced too.
            if lost && !over && may_fence {
                out.push(HaOutput::Fence(Incarnation { host, generation: boot }));
            } else if !lost {
                out.push(HaOutput::CancelFence(host));
            }
        }
    }
}

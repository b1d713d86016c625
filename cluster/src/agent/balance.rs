//! The balancer on the coordinator: samples, plans, and the moves of a plan one after the other.

use std::collections::VecDeque;

use super::config::{BalanceConfig, BalanceMode};
use crate::drs::{Balancer, HostLoad, Move, Plan, Snapshot, VmLoad};
use crate::ha::{Request, VmPhase};
use crate::membership::Verdict;
use crate::node::Node;
use crate::types::Time;

/// A planned move is given up after this long: the load has changed since.
const MOVE_PATIENCE: u64 = 600_000;

#[derive(Debug)]
pub(super) struct Balance {
    config: BalanceConfig,
    balancer: Balancer,
    next: Time,
    moves: VecDeque<Move>,
    until: Time,
}

impl Balance {
    pub(super) fn new(now: Time, config: BalanceConfig) -> Self {
        let balancer = Balancer::new(config.planner);
        let next = now + config.interval;
        Balance { config, balancer, next, moves: VecDeque::new(), until: now }
    }

    /// When to call [`Balance::step`] at the latest.
    pub(super) fn wake(&self) -> Time {
        self.next
    }

    /// What a plan would do now; none unless this host coordinates.
    pub(super) fn plan(&self, node: &Node) -> Option<Plan> {
        Some(crate::drs::balance(&self.snapshot(node)?, self.config.planner))
    }

    /// The cluster as the coordinator sees it: hosts that are online, and VMs with what they use, or else
    /// what they were admitted with.
    fn snapshot(&self, node: &Node) -> Option<Snapshot> {
        let state = node.ha().state()?;
        let online = state.hosts.iter().filter(|(id, _)| node.verdict(**id) == Verdict::Online);
        let hosts = online
            .map(|(id, h)| HostLoad { id: *id, capacity: h.capacity, maintenance: h.maintenance })
            .collect();
        let running = state.vms.values().filter(|v| v.phase == VmPhase::Running);
        let vms = running
            .map(|v| VmLoad {
                id: v.spec.id,
                host: v.place.map(|p| p.host),
                demand: node.ha().usage(v.spec.id).unwrap_or(v.spec.demand),
                reservation: Default::default(),
                limit: Some(v.spec.demand),
                shares: 1000,
                size: v.spec.demand.memory,
            })
            .collect();
        Some(Snapshot { hosts, vms, rules: self.config.rules.clone() })
    }

    /// Takes a sample when it is due and gives a new plan, if there is one; carries a plan on.
    pub(super) fn step(&mut self, now: Time, node: &mut Node) -> Option<Plan> {
        if self.config.mode == BalanceMode::Off || node.token().is_none() {
            self.moves.clear();
            self.next = self.next.max(now + self.config.interval);
            return None;
        }
        self.carry_on(now, node);
        if now < self.next {
            return None;
        }
        self.next = now + self.config.interval;
        let plan = self.balancer.step(&self.snapshot(node)?);
        if plan.moves.is_empty() {
            return None;
        }
        if self.config.mode == BalanceMode::Automatic {
            self.moves = plan.moves.iter().copied().collect();
            self.until = now + MOVE_PATIENCE;
        }
        Some(plan)
    }

    /// Starts the next move once the last one is over.
    fn carry_on(&mut self, now: Time, node: &mut Node) {
        let Some(next) = self.moves.front().copied() else { return };
        if now >= self.until {
            self.moves.clear();
            return;
        }
        let Some(state) = node.ha().state() else { return };
        if state.vms.values().any(|v| matches!(v.phase, VmPhase::Moving { .. })) {
            return;
        }
        // What was planned may no longer fit: then the next sample plans anew.
        match node.request(now, Request::Move(next.vm, next.to)) {
            Ok(()) => drop(self.moves.pop_front()),
            Err(crate::ha::RequestError::NotCoordinator) => {}
            Err(_) => self.moves.clear(),
        }
    }
}

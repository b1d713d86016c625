//! Placement and balance: where a VM starts, which VMs move when a host is overloaded or goes into
//! maintenance.
//!
//! All of it is pure computation over a [`Snapshot`]. The planner is greedy: it moves what relieves an
//! overloaded host most for each GB sent over the network, respects rules and the fail-over reserve after
//! every single move, and leaves a balanced cluster alone.

mod balance;
mod entitlement;
mod load;
mod model;
mod placement;

pub use balance::{Balancer, balance};
pub use entitlement::entitlements;
pub use model::{Config, HostLoad, Move, NoPlace, Plan, Rule, Snapshot, VmLoad};
pub use placement::{evacuate, place};

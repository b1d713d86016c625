//! Leases, heartbeats, coordination, fencing, HA and placement for a cluster of hosts.
//!
//! The core is a set of *sans-IO* state machines: each has a `step(now, input, out)` that neither reads a
//! clock nor touches a disk or a socket. Thin adapters drive them in production, a deterministic
//! simulator drives the same code in the tests.
#![deny(unsafe_code)]

pub mod adapters;
pub mod agent;
pub mod dlm;
pub mod drs;
pub mod fence;
pub mod ha;
pub mod keeper;
pub mod lease;
pub mod lock;
pub mod membership;
pub mod mutants;
pub mod node;
pub mod ondisk;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod store;
pub mod types;

//! Leases, heartbeats, coordination, fencing, HA and placement for a cluster of hosts.
//!
//! The core is a set of *sans-IO* state machines: each has a `step(now, input, out)` that neither reads a
//! clock nor touches a disk or a socket. Thin adapters drive them in production, a deterministic
//! simulator drives the same code in the tests.
//!
//! A host that only wants to share a disk safely uses a [`keeper::LeaseKeeper`]. The balancer answers questions of
//! its own: see [`drs`].
//!
//! ```
//! use cluster::lease::Timing;
//!
//! // How long after its last renewal a host with a watchdog is certainly gone.
//! assert_eq!(Timing::default().dead(), 140_000);
//! ```
//!
//! # Specifications
//!
//! The on-disk layout and the timers are those of [sanlock](https://pagure.io/sanlock) (`ondisk`, `lease`); a lock's
//! owner is chosen by Disk Paxos (Gafni and Lamport, 2002); fencing uses the
//! [agent interface](https://github.com/ClusterLabs/fence-agents/blob/main/doc/FenceAgentAPI.md) of ClusterLabs.
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

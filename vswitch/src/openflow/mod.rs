//! OpenFlow 1.0 and 1.3, with the Nicira extensions that `ovs-ofctl` uses: a [`Switch`](crate::Switch)'s flow
//! pipeline for controllers and tools.
//!
//! [`Session`] is the protocol without sockets: bytes in, bytes out. [`OpenFlowServer`] serves sessions on sockets
//! from a thread of its own.
//!
//! | module | holds |
//! |---|---|
//! | `wire` | versions, errors, readers and writers |
//! | `fields`, `match10` | matches: OXM, NXM, the fixed structure of 1.0 |
//! | `actions`, `actions_out` | actions and instructions, read and written |
//! | `session` | one connection: negotiation, roles, dispatch |
//! | `flows`, `groups`, `statistics`, `ports`, `features` | what the messages do |
//! | `notify` | packets, removed rules and port changes towards controllers |
//! | `server` | sockets |
//!
//! Not offered: queues, MPLS and PBB, NAT, bundles, flow monitors, chained groups as liveness, port administration.

mod actions;
mod actions_out;
mod features;
mod fields;
mod flows;
mod groups;
mod match10;
mod notify;
mod ports;
mod server;
mod session;
mod statistics;
mod wire;

#[cfg(test)]
mod tests;

pub use server::{OpenFlowConfig, OpenFlowServer, OpenFlowTarget};
pub use session::{Roles, Session};

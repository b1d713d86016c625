//! A userspace virtual switch with vhost-user, tap and in-process ports.
//!
//! ```
//! use vswitch::{Clock, Endpoint, OffloadCaps, PortConfig, Switch};
//!
//! // With no workers the owner moves the packets; with one or more, threads do.
//! let switch = Switch::builder().workers(0).clock(Clock::manual()).build()?;
//! let (port, a) = Endpoint::pair(64, OffloadCaps::empty())?;
//! switch.add_port("a", port, PortConfig::default())?;
//! let (port, b) = Endpoint::pair(64, OffloadCaps::empty())?;
//! switch.add_port("b", port, PortConfig::default())?;
//!
//! let mut frame = vec![0xff; 60];
//! frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
//! a.send(&frame);
//! switch.poll();
//! assert_eq!(b.recv(), Some(frame));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A packet comes in by a [`Port`], in a burst with others. Its key is looked up in the worker's flow cache; only the
//! first packet of a flow takes the slow path, which decides and says on which bits of the packet the decision
//! depends. The burst then goes out, one transmit call a port.
#![deny(unsafe_code)]

mod clock;
mod datapath;
mod error;
mod mac_table;
pub mod packet;
mod port;
mod port_config;
mod service;
mod shared;
mod stats;
mod switch;
mod sys;

pub use clock::{Clock, MILLISECOND, Nanos, SECOND};
pub use datapath::verdict::DropReason;
pub use error::{Error, Result};
pub use mac_table::MacRow;
pub use packet::offload::OffloadCaps;
pub use packet::{Burst, Offload, Packet};
pub use port::{
    Batch, Endpoint, EndpointPort, NetdevPort, PORT_MAX, Port, PortId, StreamMode, StreamPort,
    VhostUserOptions, VhostUserPort,
};
pub use port_config::{PortConfig, VLAN_MAX, VlanMode, VlanSet};
pub use service::{GatewayConfig, GatewayPort, Lease};
pub use stats::{PortStats, SIZE_CLASSES};
pub use switch::{PortInfo, Switch, SwitchBuilder};

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
//!
//! # Specifications
//!
//! [Virtio 1.2](https://docs.oasis-open.org/virtio/virtio/v1.2/virtio-v1.2.html) split virtqueues (2.7) and network
//! device (5.1); the [vhost-user protocol](https://qemu-project.gitlab.io/qemu/interop/vhost-user.html) (back-end);
//! IEEE 802.1Q (VLANs), 802.1AX (LACP); RFC 2131 (DHCP).
#![deny(unsafe_code)]

mod address;
mod bond;
mod clock;
mod config;
mod conntrack;
pub mod control;
mod datapath;
mod error;
mod event;
mod lacp;
mod mac_table;
mod metrics;
pub mod openflow;
pub mod packet;
pub mod pipeline;
mod port;
mod port_config;
mod put;
mod security;
mod service;
mod shaper;
mod shared;
mod spin;
mod stats;
mod switch;
mod switch_bonds;
mod switch_flows;
mod sys;
mod telemetry;

pub use address::{IpPrefix, MacAddr};
pub use bond::{BondConfig, BondMode};
pub use clock::{Clock, MILLISECOND, Nanos, SECOND};
pub use config::{
    ActionConfig, FlowConfig, MatchConfig, MirrorConfig, PortKind, PortSpec, PortState, StaticMac,
    SwitchConfig,
};
pub use conntrack::{ConnRow, state as ct_state};
pub use datapath::verdict::{DropReason, RuleStats};
pub use error::{Error, Result};
pub use event::{Event, Subscription};
pub use mac_table::MacRow;
pub use packet::offload::OffloadCaps;
pub use packet::{Burst, Offload, Packet};
pub use pipeline::MeterConfig;
#[doc(hidden)]
pub use port::VhostUserDriver;
pub use port::{
    Batch, CapturePort, DatagramPort, Endpoint, EndpointPort, NetdevPort, NextWriter, PORT_MAX, PatchPanel,
    PatchPort, Port, PortId, StreamMode, StreamPort, VhostUserOptions, VhostUserPort,
};
pub use port_config::{Binding, Marking, PortConfig, StormControl, VLAN_MAX, VlanMode, VlanSet};
pub use security::{Direction, Protocol, Remote, SecurityGroup, SecurityRule};
pub use service::{GatewayConfig, GatewayPort, Lease};
pub use shaper::{ClassStats, ShaperClass, ShaperConfig};
pub use shared::Mirror;
pub use stats::{PortStats, SIZE_CLASSES};
pub use switch::{PortInfo, Switch, SwitchBuilder};
pub use telemetry::{FlowExportConfig, FlowProtocol, SflowConfig, Talker, TelemetryConfig};

//! The Nacre hypervisor engine in one crate.
//!
//! The layers know nothing of each other: [`vswitch`] moves frames without knowing of machines, [`vmm_core`] has network
//! cards without knowing of switches. This crate re-exports them and holds the small pieces that join two of them; a
//! program that needs one layer only depends on that one.
//!
//! - [`switch_card`]: a machine's network card on a switch in the same process.
//! - [`vhost_blk`]: a disk as a vhost-user-blk device, for machines of other processes.
//!
//! ```
//! use nacre_engine::vmm_core::devices::virtio::net::NetOptions;
//! use nacre_engine::vswitch::{PortConfig, Switch};
//!
//! let switch = Switch::builder().build()?;
//! let card = nacre_engine::switch_card(&switch, "web-1", PortConfig::default(), &NetOptions::default())?;
//! // Vm::builder(config).device(card) puts it into a machine.
//! # assert_eq!(card.device_type(), 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![deny(unsafe_code)]

mod switch_card;
pub mod vhost_blk;

pub use blockfmt;
pub use cluster;
pub use vmm_core;
pub use vswitch;

pub use switch_card::{CardError, switch_card};

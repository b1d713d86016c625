//! virtio 1.2 devices and their transports.
//!
//! A device implements [`VirtioDevice`]: its identity, features, configuration space, and how it makes the
//! [`QueueHandler`]s that serve its queues. A transport ([`VirtioPci`], [`VirtioMmio`]) is a register layout over the
//! common state machine [`Virtio`], which negotiates features, checks the queues the driver set up and runs the
//! handlers on worker threads while the driver is ready and the machine is not paused.
//!
//! Queues ([`Queue`], [`Chain`]) check everything that the guest controls; a malformed queue or chain stops the device
//! with `DEVICE_NEEDS_RESET`, as the specification says, until the driver resets it.

pub mod balloon;
pub mod blk;
mod chain;
pub mod console;
mod device;
mod doorbells;
pub mod iov;
pub mod mmio;
pub mod net;
pub mod pci;
mod queue;
pub mod rate;
mod rng;
mod state;
pub mod vhost_user;
mod vsock;
mod worker;

pub use balloon::{Balloon, BalloonOptions};
pub use blk::Blk;
pub use chain::{Chain, Reader, Segment, Writer};
pub use console::{Console, ConsolePort};
pub use device::{
    Activation, ConfigNotifier, DeviceError, HandlerSpec, Interrupt, QueueHandler, VirtioDevice, copy_config,
    features, write_config_bytes,
};
pub use mmio::VirtioMmio;
pub use net::Net;
pub use pci::VirtioPci;
pub use queue::{Queue, QueueError, QueueLayout};
pub use rng::Rng;
pub use state::{Status, Virtio};
pub use vhost_user::VhostUser;
pub use vsock::Vsock;
pub use worker::Context;

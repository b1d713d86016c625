//! Services that live inside the switch, each behind a port of its own.

mod gateway;

pub use gateway::{GatewayConfig, GatewayPort, Lease};

//! virtio devices, exercised by a guest-side driver over every transport.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod balloon;
mod blk;
mod blk_late;
mod conformance;
mod console;
mod driver;
mod hang_up;
mod late;
mod namespace;
mod net;
mod oracle;
mod platform;
mod vhost_user;
mod vsock;

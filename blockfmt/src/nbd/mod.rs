//! Network block devices: a server that exports disks.
//!
//! The protocol is the fixed newstyle one with simple, structured and extended replies and the metadata
//! context `base:allocation`; see `doc/proto.md` of the NBD project. Transport is a Unix or TCP socket
//! without encryption: keep TCP to networks that are trusted.

mod handshake;
mod proto;
mod server;
mod stream;
mod transmission;

pub use server::{Export, ExportInfo, Server};

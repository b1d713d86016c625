//! Network block devices: a server that exports disks, and a client whose exports are storages.
//!
//! The protocol is the fixed newstyle one with simple, structured and extended replies and the metadata
//! contexts `base:allocation` and `qemu:dirty-bitmap:NAME`; see `doc/proto.md` of the NBD project. Transport is a Unix or TCP socket,
//! with TLS and certificates if wanted: without it, keep TCP to networks that are trusted.

mod budget;
mod client;
mod connection;
mod handshake;
mod late;
mod link;
mod proto;
mod reply;
mod server;
mod status;
mod stream;
mod tls;
mod transmission;
mod uri;

pub use budget::ServerLimits;
pub use client::{NbdOptions, NbdStorage};
pub use server::{Export, ExportInfo, Server};
pub use tls::{TlsClient, TlsServer};
pub use uri::{Address, Uri};

//! Where the cluster's state and the coordinator's key are kept.
//!
//! [`LocalStore`] is for one host: an embedded transactional database. With the feature `etcd`,
//! `EtcdStore` is for many. Every write of the state carries the coordinator's token and is refused
//! when the key that exists has another one.

#[cfg(feature = "etcd")]
mod etcd;
mod local;

#[cfg(feature = "etcd")]
pub use etcd::EtcdStore;
pub use local::LocalStore;

use crate::ha::{ClusterState, HaInput, Update, WriteResult};
use crate::membership::{CoordInput, CoordOutput, KeyHolder, StoreUnavailable};
use crate::node::{NodeInput, StoreRequest};
use crate::types::{Incarnation, Millis};

/// Why a store did not answer.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database file cannot be used.
    #[error("Cluster database cannot be used; check its file and disk")]
    Database(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The members of the store did not answer, or refused.
    #[error("Cluster store did not answer; look at its members")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A record is not understood.
    #[error("Cluster store holds a record that is not understood; it may be of a newer version")]
    Record(#[source] serde_json::Error),
}

/// A store. Calls block for about a second at most; an error leaves open whether a write was done.
pub trait Store: Send {
    /// Reads the whole state.
    fn load(&mut self) -> Result<ClusterState, StoreError>;

    /// Applies all updates or none. False when `token` is not that of the key that exists.
    fn write(&mut self, token: u64, updates: &[Update]) -> Result<bool, StoreError>;

    /// Reads who holds the coordinator's key.
    fn observe(&mut self) -> Result<Option<KeyHolder>, StoreError>;

    /// Grants a lease.
    fn grant(&mut self, ttl: Millis) -> Result<u64, StoreError>;

    /// Creates the coordinator's key, bound to the lease, unless it exists; tells who holds it.
    fn campaign(&mut self, me: Incarnation, lease: u64) -> Result<Option<KeyHolder>, StoreError>;

    /// Renews a lease; false when it no longer exists.
    fn renew(&mut self, lease: u64) -> Result<bool, StoreError>;

    /// Ends a lease, and the key that is bound to it.
    fn resign(&mut self, lease: u64) -> Result<(), StoreError>;
}

/// Carries out what a node asked of the store.
pub fn serve(store: &mut dyn Store, me: Incarnation, request: StoreRequest) -> Option<NodeInput> {
    Some(match request {
        StoreRequest::Load { op } => {
            let state = store.load().inspect_err(|error| tracing::warn!(%error, "load failed")).ok();
            NodeInput::Ha(HaInput::Loaded { op, state })
        }
        StoreRequest::Write { op, token, updates } => {
            let result = match store.write(token, &updates) {
                Ok(true) => WriteResult::Done,
                Ok(false) => WriteResult::Outdated,
                Err(error) => {
                    tracing::warn!(%error, "write failed");
                    WriteResult::Unknown
                }
            };
            NodeInput::Ha(HaInput::Written { op, result })
        }
        StoreRequest::Election(request) => {
            let lost = |_: StoreError| StoreUnavailable;
            NodeInput::Coordinator(match request {
                CoordOutput::Observe { op } => {
                    CoordInput::Holder { op, result: store.observe().map_err(lost) }
                }
                CoordOutput::Grant { op, ttl } => {
                    CoordInput::Granted { op, result: store.grant(ttl).map_err(lost) }
                }
                CoordOutput::Campaign { op, lease } => {
                    CoordInput::Holder { op, result: store.campaign(me, lease).map_err(lost) }
                }
                CoordOutput::Renew { op, lease } => {
                    CoordInput::Renewed { op, result: store.renew(lease).map_err(lost) }
                }
                CoordOutput::Resign { lease } => {
                    if let Err(error) = store.resign(lease) {
                        tracing::warn!(%error, "the coordinator's lease runs out by itself");
                    }
                    return None;
                }
                _ => return None,
            })
        }
    })
}

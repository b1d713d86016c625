//! Who is in the cluster: network heartbeat and disk heartbeat judged together, quorum, and the
//! coordinator's election.
//!
//! A host that lost the network but still renews its delta lease is *isolated*, not dead.

mod coordinator;
mod quorum;

pub use coordinator::{CoordInput, CoordOutput, Coordinator, CoordinatorConfig, KeyHolder, StoreUnavailable};
pub use quorum::{Heartbeat, Membership, MembershipConfig, MembershipInput, MembershipOutput, Verdict};

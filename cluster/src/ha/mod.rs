//! High availability: which VM runs where, and what happens when a host or a VM fails.
//!
//! The [`HaManager`] runs on the coordinator. Every decision is written to the store, with the
//! coordinator's token, before it is acted on.

mod admission;
mod evacuate;
mod health;
mod hosts;
mod io;
mod manager;
mod records;
mod restart;
#[cfg(test)]
mod tests;

pub use admission::{AdmissionPolicy, HostCapacity, Refusal, admit, survives};
pub use health::{Ailment, Health, HealthConfig, Signs};
pub use io::{ClusterView, HaConfig, HaInput, HaOutput, Request, RequestError, WriteResult};
pub use manager::HaManager;
pub use records::{
    ClusterState, Command, Evidences, HostRecord, Report, Update, VmPhase, VmRecord, VmReport, VmSpec,
    VmStatus,
};
pub use restart::{RestartConfig, RestartHistory};

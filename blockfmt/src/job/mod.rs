//! Long-running work on disks: copying, merging, mirroring, backing up.
//!
//! A job runs on the thread that calls it, with helpers for more processors, and returns when it is done and
//! its helpers have ended.
//! A [`JobControl`], shared with other threads, cancels it, limits its rate and reports its progress.
//! Guests keep using the disk meanwhile.
//!
//! [`commit`], [`commit_into`], [`stream`], [`rebase`] and [`remove`] change nothing that a reader of the chain can see until their
//! last step, and may be started again after a crash or a cancellation: what was moved already is skipped or
//! moved again to the same effect. A [`Migration`] and a [`Mirror`] are resumed, a [`convert`] told to
//! ([`ConvertOptions::resume`]).
//!
//! One job at a time changes the chain of a disk, and none while a [`Mirror`] of it exists: others fail with
//! [`Error::Busy`](crate::Error::Busy).

mod backup;
mod chain;
mod control;
mod copy;
mod dirty;
mod measure;
mod migrate;
mod mirror;
mod parallel;
mod sources;

pub use backup::{backup, backup_changes};
pub use chain::{commit, commit_into, rebase, remove, stream};
pub use control::{JobControl, Progress};
pub use copy::{Comparison, ConvertOptions, compare, concatenate, convert};
pub use dirty::DirtyMap;
pub use measure::{Measure, measure};
pub use migrate::Migration;
pub use mirror::{Mirror, MirrorMode};
pub use sources::concatenated_size;

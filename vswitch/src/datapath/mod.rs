//! The data path: flow cache, decisions and workers.

pub(crate) mod cache;
mod execute;
pub(crate) mod thread;
pub(crate) mod translate;
pub(crate) mod transmit;
pub(crate) mod verdict;
pub(crate) mod worker;

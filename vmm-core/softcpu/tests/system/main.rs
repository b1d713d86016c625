//! Behaviour that takes more than one instruction: paging, exceptions, modes, self-modifying code, several
//! processors, debugging.

#![expect(clippy::unwrap_used, reason = "what fails in a helper fails the test")]

mod debug;
mod exceptions;
mod features;
mod litmus;
mod memory;
mod modes;
mod paging;
mod rig;
mod smp;
mod transfers;
#[cfg(feature = "native")]
mod translation;

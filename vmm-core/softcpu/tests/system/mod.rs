//! Behaviour that takes more than one instruction: paging, exceptions, modes, self-modifying code, several
//! processors, debugging.

pub mod debug;
mod exceptions;
mod features;
mod fpu;
mod litmus;
mod memory;
mod modes;
mod paging;
mod patching;
mod protected;
pub mod rig;
mod segments;
mod smp;
mod tables;
mod time;
mod transfers;
mod traps;

//! SSE, MMX and x87 instructions, executed by the host's own units.
//!
//! [`translate`] turns a decoded instruction into a [`HostOp`]. Its core is a small generated function
//! that loads the guest's operands into fixed host registers, runs the very instruction and stores the
//! results, so that results, flags and exception bits are right by construction. What the host must not
//! do on the guest's behalf is done here: alignment checks, unmasked exceptions, control registers and
//! the memory images of `FXSAVE`, `FNSTENV` and their relatives.
//!
//! The number of generated functions is bounded: they depend on the opcode, its immediate byte and
//! whether an operand is memory, not on register numbers or addresses.

mod arena;
mod control;
mod cpu;
mod exec;
mod fpu;
mod handlers;
mod op;
mod resident;
mod stub;

#[cfg(test)]
mod tests;

#[cfg(feature = "native")]
pub(crate) use arena::Arena;
pub(crate) use handlers::choose;
pub(crate) use op::{HostOp, translate};
#[cfg(feature = "native")]
pub(crate) use op::{depends_on_mxcsr, may_be_misaligned};
pub(crate) use resident::Resident;
pub(crate) use stub::StubCache;
#[cfg(feature = "native")]
pub(crate) use stub::directions;

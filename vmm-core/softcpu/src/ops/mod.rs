//! What instructions do.

pub(crate) mod alu;
pub(crate) mod bits;
pub(crate) mod ea;
pub(crate) mod flow;
pub(crate) mod fused;
pub(crate) mod host;
pub(crate) mod io;
pub(crate) mod legacy;
pub(crate) mod mov;
pub(crate) mod muldiv;
pub(crate) mod operand;
pub(crate) mod rmw;
pub(crate) mod shift;
pub(crate) mod stack;
pub(crate) mod string;
pub(crate) mod system;
pub(crate) mod width;

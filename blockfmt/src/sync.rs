//! What the lock protocols are made of. `tests/loom.rs` compiles them with loom's types in the place of these.

pub(crate) use parking_lot::{Condvar, Mutex};
pub(crate) use std::hint::spin_loop;
pub(crate) use std::sync::atomic::{AtomicU64, Ordering, fence};

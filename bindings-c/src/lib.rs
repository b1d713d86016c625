//! libnacre: the C ABI over Nacre's crates.
//!
//! The rules of this interface, which every function keeps:
//!
//! - Objects are opaque handles. A handle is checked at every call: a null, stale, freed or foreign one is an error
//!   ([`status::nacre_status::NACRE_BAD_HANDLE`]), never undefined behaviour.
//! - Every call that can fail returns a [`status::nacre_status`] and, if the caller passes an `error` pointer, an error
//!   object with a code, a message and the chain of causes.
//! - Option structures start with `struct_size`; a program built against an older header keeps working.
//! - Inputs are copied and descriptors duplicated: the caller may free its own at once.
//! - Nothing here ends the process, installs signal handlers or loggers, or lets a Rust panic cross the border.
//! - Objects may be used from several threads at once.
//!
//! A program in C:
//!
//! ```c
//! #include <nacre.h>
//!
//! struct nacre_vm *vm = NULL;
//! enum nacre_stop_reason reason;
//! struct nacre_vm_options options = {.struct_size = sizeof options, .kernel = "vmlinuz", .memory = 256u << 20};
//! enum nacre_status status = nacre_vm_build(&options, &vm, NULL);
//! if (!status) status = nacre_vm_start(vm, NULL);
//! if (!status) status = nacre_vm_wait(vm, -1, &reason, NULL, NULL);
//! nacre_vm_free(vm, NULL);
//! ```
//!
//! `include/nacre.h` is generated from this crate; see `CONTRIBUTING.md`.

#![expect(non_camel_case_types, reason = "the names are those of the C header")]

pub mod accel;
pub mod border;
pub mod disk;
pub mod error;
pub mod handle;
pub mod job;
pub mod lease;
pub mod options;
pub mod status;
pub mod switch;
pub mod text;
pub mod vm;

//! An x86-64 CPU in software: interpreter, MMU and bus trait.
//!
//! A [`Cpu`] is one virtual processor. It executes guest code from [`GuestMemory`], which all the
//! processors of a machine share, and reaches everything that is not memory through two traits that the
//! machine implements: [`Bus`] (port and memory-mapped I/O, shared by all processors) and [`Local`] (the
//! local APIC, owned by the processor's thread). Other threads talk to a processor through its
//! [`CpuHandle`].
//!
//! ```text
//!   device threads ── CpuHandle ──► ┌───────┐ ── Bus   ──► chipset, PCI, virtio
//!                                   │  Cpu  │ ── Local ──► local APIC
//!   DMA ───────────── GuestMemory ◄─└───────┘
//! ```
//!
//! # Execution
//!
//! Instructions are decoded into blocks of operations (`block`), kept by guest-physical address and linked
//! within their page; operations are small functions that lead to each other (`ops`, and `hostop` for x87 and
//! SSE). Memory is reached through a software TLB of host addresses (`mmu`). Writes to a page that holds
//! decoded instructions take a slow path, which drops the blocks whose bytes change.
//!
//! # Limits
//!
//! Virtual-8086 mode and task gates are not implemented; neither is anything that CPUID does not announce.
//! A locked access that crosses a page is atomic because the other processors pause meanwhile; devices do not.
//!
//! # Architecture
//!
//! The processor follows the AMD64 Architecture Programmer's Manual (APM) and, where the two differ,
//! the behaviour of AMD processors.

mod block;
mod bus;
mod clock;
mod config;
mod cpu;
mod exit;
mod handle;
mod hostop;
mod memory;
mod mmu;
mod ops;
mod state;

pub use bus::{Bus, Local, MsrFault};
pub use clock::Clock;
pub use config::{CpuConfig, CpuModel, CpuidEntry};
pub use cpu::Cpu;
pub use exit::{Budget, DebugControl, DebugEvent, Exit, Watchpoint};
pub use handle::CpuHandle;
pub use memory::{GuestMemory, MemoryError, PAGE_SIZE};
pub use state::{CpuState, DescriptorTable, FpuState, MpState, Msrs, Segment, SegmentAttributes};

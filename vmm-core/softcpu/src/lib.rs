//! An x86-64 CPU in software: interpreter, translator, MMU and bus trait.
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
//! ```
//! use std::sync::Arc;
//!
//! use softcpu::{Budget, Bus, Clock, Cpu, CpuConfig, CpuState, Exit, GuestMemory, NoApic};
//! # struct NoDevices;
//! # impl Bus for NoDevices {
//! #     fn mmio_read(&self, _: u32, _: u64, data: &mut [u8]) { data.fill(0xff) }
//! #     fn mmio_write(&self, _: u32, _: u64, _: &[u8]) {}
//! #     fn io_read(&self, _: u32, _: u16, data: &mut [u8]) { data.fill(0xff) }
//! #     fn io_write(&self, _: u32, _: u16, _: &[u8]) {}
//! # }
//!
//! // One page of RAM at address 0, with a program: mov ax, 6; mov bx, 7; mul bx; hlt.
//! #[repr(align(4096))]
//! struct Page([u8; 4096]);
//! let ram = Box::leak(Box::new(Page([0; 4096])));
//! let memory = Arc::new(GuestMemory::new());
//! // SAFETY: the page lives for ever and nobody else refers to it.
//! unsafe { memory.add_region(0, 4096, ram.0.as_mut_ptr(), false) }?;
//! memory.write(0x100, &[0xb8, 6, 0, 0xbb, 7, 0, 0xf7, 0xe3, 0xf4])?;
//!
//! // `NoDevices` implements `Bus` by doing nothing.
//! let config = CpuConfig::new(Arc::new(Clock::host(1_000_000)));
//! let mut cpu = Cpu::new(config, memory, Arc::new(NoDevices), Box::new(NoApic));
//! let mut state = CpuState::reset(); // real mode
//! state.segments[1].base = 0; // CS
//! state.rip = 0x100;
//! cpu.set_state(&state);
//! assert_eq!(cpu.run(Budget::instructions(100)), Exit::Halted);
//! assert_eq!(cpu.state().gpr[0], 42);
//! # Ok::<(), softcpu::MemoryError>(())
//! ```
//!
//! # Execution
//!
//! Instructions are decoded into blocks of operations (`block`), kept by guest-physical address and linked
//! within their page; operations are small functions that lead to each other (`ops`, and `hostop` for x87 and
//! SSE). Memory is reached through a software TLB of host addresses (`mmu`). Writes to a page that holds
//! decoded instructions take a slow path, which drops the blocks whose bytes change.
//!
//! With the feature `native` (on by default) blocks of 64-bit code that are entered often are translated to machine code
//! (`block::native`); what that cannot do the interpreter does. Neither results nor the number of executed instructions
//! depend on it.
//!
//! # Specifications
//!
//! The [Intel 64 and IA-32 Architectures Software Developer's Manual](https://www.intel.com/sdm), volumes 2
//! (instructions) and 3 (system programming); where the two makers differ, a model of
//! [AMD's Architecture Programmer's Manual](https://docs.amd.com/v/u/en-US/40332-PUB_4.05). The paravirtual clock is
//! that of Linux' [KVM documentation](https://docs.kernel.org/virt/kvm/x86/msr.html).
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

pub use bus::{Bus, Local, MsrFault, NoApic};
pub use clock::Clock;
pub use config::{CpuConfig, CpuModel, CpuidEntry};
pub use cpu::Cpu;
pub use exit::{Budget, DebugControl, DebugEvent, Exit, Watchpoint};
pub use handle::CpuHandle;
pub use memory::{GuestMemory, MemoryError, PAGE_SIZE};
pub use state::{CpuState, DescriptorTable, FpuState, MpState, Msrs, Segment, SegmentAttributes};

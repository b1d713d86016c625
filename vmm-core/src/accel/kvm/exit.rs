//! The page that the kernel and a vCPU's thread share: why `KVM_RUN` returned, and the data of the access.

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR,
    KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT,
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_debug_exit_arch, kvm_run,
};

use crate::accel::SystemEvent;

/// An exit, with references into the shared page that are valid until the next `KVM_RUN`.
pub enum Exit<'a> {
    /// A port access: one or (string I/O) several elements of `size` bytes, one after the other in `data`.
    Port { port: u16, size: usize, write: bool, data: &'a mut [u8] },
    /// An MMIO access.
    Mmio { address: u64, write: bool, data: &'a mut [u8] },
    /// A triple fault.
    Shutdown,
    /// A signal.
    Interrupted,
    /// The guest asked for something.
    System(SystemEvent),
    /// A debugger's stop.
    Debug(kvm_debug_exit_arch),
    /// The vCPU's dirty ring is full.
    DirtyRingFull,
    /// The kernel's emulator does not know the instruction; its bytes, if the kernel gives them.
    EmulationFailed { bytes: Vec<u8> },
    /// The kernel cannot go on.
    Failed(String),
}

/// Decodes the exit in `page`, whose mapping is `page_size` bytes long.
pub fn decode(page: &mut kvm_run, page_size: usize) -> Exit<'_> {
    match page.exit_reason {
        KVM_EXIT_IO => {
            // SAFETY: the exit reason says that the kernel filled this variant.
            let io = unsafe { page.__bindgen_anon_1.io };
            let size = usize::from(io.size);
            let len = size * io.count as usize;
            let start = io.data_offset as usize;
            if size == 0 || start.checked_add(len).is_none_or(|end| end > page_size) {
                return Exit::Failed("KVM reported a port access outside of its page".into());
            }
            // SAFETY: the mapping is `page_size` bytes long and begins at `page`, whose borrow the slice takes over.
            let data =
                unsafe { std::slice::from_raw_parts_mut((&raw mut *page).cast::<u8>().add(start), len) };
            Exit::Port { port: io.port, size, write: u32::from(io.direction) == KVM_EXIT_IO_OUT, data }
        }
        KVM_EXIT_MMIO => {
            // SAFETY: as above.
            let mmio = unsafe { &mut page.__bindgen_anon_1.mmio };
            let len = (mmio.len as usize).min(mmio.data.len());
            Exit::Mmio { address: mmio.phys_addr, write: mmio.is_write != 0, data: &mut mmio.data[..len] }
        }
        KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        KVM_EXIT_INTR => Exit::Interrupted,
        KVM_EXIT_DIRTY_RING_FULL => Exit::DirtyRingFull,
        KVM_EXIT_DEBUG => {
            // SAFETY: as above.
            Exit::Debug(unsafe { page.__bindgen_anon_1.debug.arch })
        }
        KVM_EXIT_SYSTEM_EVENT => {
            // SAFETY: as above.
            match unsafe { page.__bindgen_anon_1.system_event.type_ } {
                KVM_SYSTEM_EVENT_SHUTDOWN => Exit::System(SystemEvent::Shutdown),
                KVM_SYSTEM_EVENT_RESET => Exit::System(SystemEvent::Reset),
                KVM_SYSTEM_EVENT_CRASH => Exit::System(SystemEvent::Crash),
                other => Exit::Failed(format!("unknown system event {other}")),
            }
        }
        KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: as above; both variants begin alike.
            let (internal, emulation) =
                unsafe { (page.__bindgen_anon_1.internal, page.__bindgen_anon_1.emulation_failure) };
            if internal.suberror != KVM_INTERNAL_ERROR_EMULATION {
                let data = &internal.data[..(internal.ndata as usize).min(internal.data.len())];
                return Exit::Failed(format!("KVM internal error {} {data:x?}", internal.suberror));
            }
            let with_bytes =
                emulation.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
            let mut bytes = Vec::new();
            // The flags and the bytes take up to three words of `data`.
            if internal.ndata >= 3 && with_bytes {
                // SAFETY: the flag says that the kernel filled the bytes.
                let instruction = unsafe { emulation.__bindgen_anon_1.__bindgen_anon_1 };
                let len = usize::from(instruction.insn_size).min(instruction.insn_bytes.len());
                bytes.extend_from_slice(&instruction.insn_bytes[..len]);
            }
            Exit::EmulationFailed { bytes }
        }
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: as above.
            let fail = unsafe { page.__bindgen_anon_1.fail_entry };
            Exit::Failed(format!(
                "the processor refused to enter the guest (reason {:#x})",
                fail.hardware_entry_failure_reason
            ))
        }
        other => Exit::Failed(format!("KVM exit reason {other} is not handled")),
    }
}

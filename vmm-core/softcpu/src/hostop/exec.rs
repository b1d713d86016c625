//! Execution of translated instructions on a guest's state.

use std::arch::asm;

use super::fpu::{EXCEPTIONS, MXCSR_FLAGS, MXCSR_FZ, MXCSR_MASKS, MXCSR_UE, MXCSR_UM};
use super::op::{Body, HostOp, Memory, Unit, X87};
use super::resident::Resident;
use super::stub::{Output, Slot, Stub};
use crate::state::FpuState;

/// Largest memory operand of an x87 instruction (`FNSAVE` with 32-bit layout has 108 bytes).
const BUFFER: usize = 128;

const CR4_OSXMMEXCPT: u64 = 1 << 10;

/// Exceptions that SIMD and x87 instructions raise by themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trap {
    /// `#UD`.
    InvalidOpcode,
    /// `#GP(0)`.
    GeneralProtection,
    /// `#XM`.
    Simd,
}

/// The processor that an instruction runs on.
pub(crate) trait Guest {
    /// How the processor reports an exception.
    type Fault;
    /// Makes an exception pending.
    fn raise_trap(&mut self, trap: Trap) -> Self::Fault;
    /// `#SS` or `#GP` for an address that is not canonical, otherwise `#GP`.
    fn misaligned(&mut self, address: u64) -> Self::Fault;
    /// x87, MMX and SSE registers, and which of them the host holds.
    fn units(&mut self) -> (&mut Resident, &mut FpuState);
    /// The same registers after all of them were moved to memory.
    fn fpu(&mut self) -> &mut FpuState {
        let (resident, fpu) = self.units();
        resident.settle(fpu);
        fpu
    }
    /// Address of a general register by its number in the instruction encoding. The seven bytes that follow
    /// it belong to the processor too.
    fn gpr_address(&mut self, number: u8) -> *mut u64;
    /// A general register.
    fn gpr(&mut self, number: u8) -> &mut u64 {
        // SAFETY: a register of the processor, which is borrowed.
        unsafe { &mut *self.gpr_address(number) }
    }
    /// CF, PF, AF, ZF, SF and OF in their RFLAGS positions.
    fn status_flags(&mut self) -> u64;
    /// Replaces these flags.
    fn set_status_flags(&mut self, value: u64);
    /// CR4.
    fn cr4(&self) -> u64;
    /// Offset in CS that [`HostOp::offset`] counts from.
    fn block_start(&self) -> u64;
    /// Reads at a linear address; nothing changes on a fault.
    fn read(&mut self, address: u64, data: &mut [u8]) -> Result<(), Self::Fault>;
    /// Writes at a linear address, all or nothing.
    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), Self::Fault>;
    /// Faults if `write` of `length` bytes would; a write that follows succeeds.
    fn probe_write(&mut self, address: u64, length: usize) -> Result<(), Self::Fault>;
}

/// Largest operand of an SSE or MMX instruction.
const VECTOR: usize = 16;

#[repr(C, align(64))]
struct Buffer<const SIZE: usize>([u8; SIZE]);

impl HostOp {
    /// Runs the instruction, which CR0 and CR4 allow and before which no x87 exception is pending. `address`
    /// is the linear address of its memory operand. A fault leaves the processor as it was, but for what the
    /// architecture says to change.
    pub(crate) fn execute<G: Guest>(&self, guest: &mut G, address: u64) -> Result<(), G::Fault> {
        if self.aligned && address & 15 != 0 {
            return Err(match self.body {
                // Save areas: an address that is not canonical comes first.
                Body::Control(_) => guest.misaligned(address),
                Body::Stub(_) => guest.raise_trap(Trap::GeneralProtection),
            });
        }
        match (self.body, self.unit) {
            (Body::Control(control), _) => control.execute(guest, address),
            (Body::Stub(stub), Unit::X87) => self.run_x87(guest, stub, address),
            (Body::Stub(stub), _) => self.run_sse(guest, stub, address),
        }
    }

    fn run_sse<G: Guest>(&self, guest: &mut G, stub: Stub, address: u64) -> Result<(), G::Fault> {
        let mut buffer = Buffer([0; VECTOR]);
        let length = usize::from(self.length).min(VECTOR);
        match self.memory {
            Memory::None => {}
            Memory::Load => guest.read(address, &mut buffer.0[..length])?,
            Memory::Store => guest.probe_write(address, length)?,
        }
        if self.unit.is_mmx() {
            // Also when `#XM` follows.
            guest.fpu().enter_mmx();
        }
        let memory = buffer.0.as_mut_ptr();
        let call = Call {
            stub,
            first: pointer(guest, self.first, memory),
            second: pointer(guest, self.second, memory),
            image: guest.units().1,
            rax: *guest.gpr(0),
            rdx: *guest.gpr(2),
        };
        let output = if matches!(self.unit, Unit::SseFloat | Unit::MmxFloat) {
            self.run_float(guest, call)?
        } else {
            // SAFETY: the operands point to whole registers or to the buffer.
            unsafe { call.run() }
        };
        if self.memory == Memory::Store {
            guest.write(address, &buffer.0[..length])?;
        }
        if let Slot::Mm(number) = self.first
            && let Some(register) = guest.units().1.st.get_mut(usize::from(number))
        {
            *register |= 0xffff << 64;
        }
        self.commit(guest, output);
        Ok(())
    }

    /// Runs a stub that depends on MXCSR. Exceptions are masked for the run; if one that the guest does
    /// not mask came up, its result is dropped and `#XM` raised.
    fn run_float<G: Guest>(&self, guest: &mut G, mut call: Call) -> Result<Output, G::Fault> {
        let (resident, fpu) = guest.units();
        if resident.enter_mxcsr(fpu) {
            // SAFETY: as in `run_sse`; the guest's MXCSR is loaded.
            return Ok(unsafe { call.run() });
        }
        let mxcsr = fpu.mxcsr;
        let mut result = Buffer([0; VECTOR]);
        let destination = call.first;
        // SAFETY: the first operand is a whole register (at least 8 bytes) or the buffer.
        unsafe { std::ptr::copy_nonoverlapping(destination, result.0.as_mut_ptr(), 8) };
        if matches!(self.first, Slot::Xmm(_) | Slot::Mm(_)) {
            // SAFETY: XMM and MMX registers have 16 bytes in the image.
            unsafe { std::ptr::copy_nonoverlapping(destination, result.0.as_mut_ptr(), 16) };
        }
        call.first = result.0.as_mut_ptr();
        let control = mxcsr & !MXCSR_FLAGS | MXCSR_MASKS;
        let underflow_unmasked = mxcsr & MXCSR_UM == 0;
        // Flushing to zero is the masked response to underflow.
        let control = if underflow_unmasked { control & !MXCSR_FZ } else { control };
        // SAFETY: as above, with the destination replaced by a copy.
        let (output, after) = unsafe { call.run_with_mxcsr(control) };
        let mut raised = after & MXCSR_FLAGS;
        if underflow_unmasked && result.0.first_chunk().is_some_and(|lanes| self.tiny.occurs(lanes)) {
            raised |= MXCSR_UE;
        }
        let unmasked = raised & !(mxcsr >> 7);
        // Invalid, denormal and divide-by-zero are detected before the operation and hide the others.
        let reported = if unmasked & 0x07 != 0 { raised & 0x07 } else { raised };
        guest.fpu().mxcsr |= reported;
        if unmasked != 0 {
            let enabled = guest.cr4() & CR4_OSXMMEXCPT != 0;
            return Err(guest.raise_trap(if enabled { Trap::Simd } else { Trap::InvalidOpcode }));
        }
        if matches!(self.first, Slot::Xmm(_) | Slot::Mm(_)) {
            // SAFETY: the destination is a 16-byte register of the image.
            unsafe { std::ptr::copy_nonoverlapping(result.0.as_ptr(), destination, 16) };
        }
        Ok(output)
    }

    fn run_x87<G: Guest>(&self, guest: &mut G, stub: Stub, address: u64) -> Result<(), G::Fault> {
        let mut buffer = Buffer([0; BUFFER]);
        let length = usize::from(self.length).min(BUFFER);
        match self.memory {
            Memory::None => {}
            Memory::Load => guest.read(address, &mut buffer.0[..length])?,
            Memory::Store => guest.probe_write(address, length)?,
        }
        let rip = guest.block_start().wrapping_add(u64::from(self.offset));
        let rflags = if self.reads_rflags { guest.status_flags() } else { 0 };
        if self.x87 == X87::Waiting {
            let (resident, fpu) = guest.units();
            (fpu.fop, fpu.fip) = (self.fop, rip);
            if self.memory != Memory::None {
                fpu.fdp = address;
            }
            if resident.enter_x87(fpu) {
                let memory = buffer.0.as_mut_ptr();
                let rflags = user_flags(rflags);
                // SAFETY: the stub uses the x87 stack, which the guest's state is in, and the buffer.
                let output = unsafe { stub(memory, memory, fpu, 0, 0, rflags) };
                if self.memory == Memory::Store {
                    guest.write(address, &buffer.0[..length])?;
                }
                self.commit(guest, output);
                return Ok(());
            }
        }
        let fpu = guest.fpu();
        let pointers = (fpu.fop, fpu.fip, fpu.fdp);
        let masks = !fpu.fcw & EXCEPTIONS;
        let memory = buffer.0.as_mut_ptr();
        // SAFETY: the stub uses the x87 stack and the buffer only.
        let output = unsafe { run_x87(stub, fpu, memory, rflags) };
        (fpu.fop, fpu.fip, fpu.fdp) = pointers;
        let raised = fpu.fsw & EXCEPTIONS;
        match self.x87 {
            X87::Waiting => {}
            X87::StoreEnvironment => super::control::put_pointers(&mut buffer.0[..length], pointers),
            X87::LoadEnvironment => {
                (fpu.fop, fpu.fip, fpu.fdp) = super::control::take_pointers(&buffer.0[..length]);
            }
        }
        // A store is suppressed by an unmasked exception other than precision.
        let suppressed = self.x87 == X87::Waiting && raised & masks & 0x1f != 0;
        if self.memory == Memory::Store && !suppressed {
            guest.write(address, &buffer.0[..length])?;
        }
        self.commit(guest, output);
        Ok(())
    }

    fn commit<G: Guest>(&self, guest: &mut G, output: Output) {
        if let Slot::Gpr { number, bytes } = self.result {
            let register = guest.gpr(number);
            *register = match bytes {
                8 => output.value,
                4 => output.value & 0xffff_ffff,
                _ => *register & !0xffff | output.value & 0xffff,
            };
        }
        if self.rflags != 0 {
            let mask = u64::from(self.rflags);
            let kept = if mask == STATUS { 0 } else { guest.status_flags() & !mask };
            guest.set_status_flags(kept | output.rflags & mask);
        }
    }
}

fn pointer<G: Guest>(guest: &mut G, slot: Slot, memory: *mut u8) -> *mut u8 {
    match slot {
        Slot::None => std::ptr::null_mut(),
        Slot::Memory => memory,
        Slot::Xmm(number) => std::ptr::from_mut(&mut guest.units().1.xmm[usize::from(number & 15)]).cast(),
        Slot::Mm(number) => std::ptr::from_mut(&mut guest.units().1.st[usize::from(number & 7)]).cast(),
        Slot::Gpr { number, .. } => guest.gpr_address(number).cast(),
        Slot::High(number) => guest.gpr_address(number).cast::<u8>().wrapping_add(1),
    }
}

/// A stub with its arguments.
struct Call {
    stub: Stub,
    first: *mut u8,
    second: *const u8,
    image: *mut FpuState,
    rax: u64,
    rdx: u64,
}

impl Call {
    /// # Safety
    /// The operands must be valid for the accesses of the stub.
    unsafe fn run(&self) -> Output {
        // SAFETY: promised by the caller.
        unsafe { (self.stub)(self.first, self.second, self.image, self.rax, self.rdx, 0) }
    }

    /// Runs with `mxcsr` loaded and returns what it became.
    ///
    /// # Safety
    /// As [`Call::run`]; `mxcsr` must have no reserved bit set and all exceptions masked.
    unsafe fn run_with_mxcsr(&self, mxcsr: u32) -> (Output, u32) {
        let mut host = 0u32;
        let mut after = mxcsr;
        let (value, rflags);
        // SAFETY: MXCSR is restored before Rust code runs again; the stub has the System V convention.
        unsafe {
            asm!(
                "stmxcsr [{host}]",
                "ldmxcsr [{guest}]",
                "call {stub}",
                "stmxcsr [{guest}]",
                "ldmxcsr [{host}]",
                host = in(reg) &raw mut host,
                guest = in(reg) &raw mut after,
                stub = in(reg) self.stub,
                inout("rdi") self.first => _,
                inout("rsi") self.second => _,
                inout("rdx") self.image => rflags,
                inout("rcx") self.rax => _,
                inout("r8") self.rdx => _,
                out("rax") value,
                clobber_abi("sysv64"),
            );
        }
        (Output { value, rflags }, after)
    }
}

/// The flags that [`Guest::status_flags`] deals in.
const STATUS: u64 = 0x8d5;

/// The arithmetic flags, fit for `POPFQ` in the host.
fn user_flags(rflags: u64) -> u64 {
    rflags & STATUS | 0x202
}

/// Runs `stub` with the guest's x87 state in the host's unit.
///
/// # Safety
/// The stub must touch nothing but the x87 unit and `memory`.
unsafe fn run_x87(stub: Stub, fpu: &mut FpuState, memory: *mut u8, rflags: u64) -> Output {
    let mut host = 0u32;
    let (value, rflags_after);
    // SAFETY: the image is 64-byte aligned and valid (MXCSR is checked when it is set); XMM registers are
    // clobbered by the calling convention; the x87 unit is left as the convention wants it, empty and
    // with the default control word, and MXCSR is restored.
    unsafe {
        asm!(
            "stmxcsr [{host}]",
            "fxrstor64 [r12]",
            "call {stub}",
            "fxsave64 [r12]",
            "fninit",
            "ldmxcsr [{host}]",
            host = in(reg) &raw mut host,
            stub = in(reg) stub,
            in("r12") std::ptr::from_mut(fpu),
            inout("rdi") memory => _,
            inout("rsi") memory => _,
            out("rdx") rflags_after,
            inout("r9") user_flags(rflags) => _,
            out("rax") value,
            clobber_abi("sysv64"),
        );
    }
    Output { value, rflags: rflags_after }
}

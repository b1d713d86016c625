//! Runs one instruction in a machine of KVM, at CPL 3.
//!
//! Where the host's own kernel emulates the kernel mode of its guests, user mode still runs on the processor.

use std::ptr::NonNull;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
    kvm_xsave,
};
use kvm_ioctls::{Kvm as Host, VcpuExit, VcpuFd, VmFd};
use softcpu::{CpuState, FpuState, Segment, SegmentAttributes};

use super::guest::{self, CODE_GPA, DATA_GPA, KERNEL_CS, RAM};
use super::layout::{CODE, DATA_LENGTH, INSTRUCTION, Mode};
use super::soft::PLACE;
use super::state::{Outcome, State};

/// Bytes of an FXSAVE image, and its parts.
const FXSAVE: usize = 512;
const X87: std::ops::Range<usize> = 0..24;
const MXCSR: std::ops::Range<usize> = 24..28;
const ST: std::ops::Range<usize> = 32..160;
const XMM: std::ops::Range<usize> = 160..416;
/// XSTATE_BV.
const X87_AND_SSE: u32 = 3;

/// A machine of KVM with the guest in it.
pub struct Kvm {
    vcpu: VcpuFd,
    ram: NonNull<u8>,
    base: CpuState,
    /// What the processor starts with, for the fields that [`CpuState`] does not have.
    sregs: kvm_sregs,
    /// Length of the placed instructions.
    placed: u64,
    _vm: VmFd,
}

impl Kvm {
    pub fn new() -> Self {
        let host = Host::new().expect("/dev/kvm; load the module kvm_intel or kvm_amd, or leave KVM out");
        let vm = host.create_vm().expect("a KVM machine");
        let layout = std::alloc::Layout::from_size_align(RAM as usize, 4096).expect("layout");
        // SAFETY: the layout is not empty. Never freed: KVM refers to it as long as the machine exists.
        let ram = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).expect("memory");
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: RAM,
            userspace_addr: ram.as_ptr() as u64,
        };
        // SAFETY: the allocation stays, and is accessed through raw pointers only while the guest runs.
        unsafe { vm.set_user_memory_region(region) }.expect("guest memory");
        let vcpu = vm.create_vcpu(0).expect("a vCPU");
        let cpuid = host.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).expect("CPUID");
        vcpu.set_cpuid2(&cpuid).expect("CPUID");
        let sregs = vcpu.get_sregs().expect("registers");
        let kvm = Self { vcpu, ram, base: guest::user_state(), sregs, placed: 0, _vm: vm };
        guest::build(&mut |gpa, value| kvm.write(gpa, &value.to_le_bytes()));
        kvm
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        assert!(gpa + bytes.len() as u64 <= RAM);
        // SAFETY: within the allocation; the guest is not running.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.ram.as_ptr().add(gpa as usize), bytes.len());
        }
    }

    fn read(&self, gpa: u64) -> u64 {
        assert!(gpa + 8 <= RAM);
        // SAFETY: within the allocation; the guest is not running.
        unsafe { self.ram.as_ptr().add(gpa as usize).cast::<u64>().read_unaligned() }
    }

    /// Places an instruction or a sequence.
    pub fn place(&mut self, bytes: &[u8]) {
        let mut code = [0xcc; PLACE];
        code[..bytes.len()].copy_from_slice(bytes);
        self.placed = bytes.len() as u64;
        self.write(CODE_GPA + (INSTRUCTION - CODE), &code);
    }

    /// The bytes of the data window.
    pub fn data(&mut self) -> &mut [u8] {
        // SAFETY: within the allocation; the borrow of `self` keeps the guest from running meanwhile.
        unsafe {
            let start = self.ram.as_ptr().add(DATA_GPA as usize);
            std::slice::from_raw_parts_mut(start, DATA_LENGTH as usize)
        }
    }

    /// Runs what was placed.
    pub fn run(&mut self, mode: Mode, input: &State) -> Outcome {
        guest::prepare(&mut self.base, mode, input);
        self.load();
        loop {
            match self.vcpu.run() {
                // A handler, which is at CPL 0.
                Ok(VcpuExit::Hlt) => break,
                Ok(exit) => panic!("KVM stopped with {exit:?}"),
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => panic!("KVM: {error}"),
            }
        }
        let after = self.store();
        assert_eq!(after.segments[1].selector, KERNEL_CS, "HLT outside of a handler");
        let mut outcome = guest::outcome(mode, &after, &|gpa| self.read(gpa));
        if let Some(exception) = outcome.exception {
            let rip = outcome.state.rip;
            // What follows the instruction, and where branches lead, is filled with INT3.
            let tested = INSTRUCTION..INSTRUCTION + self.placed;
            let landed = exception.vector == 3 && !tested.contains(&(rip - 1));
            // A jump to unmapped memory completes; the fault belongs to the next instruction.
            let fetch = exception.vector == 14 && exception.error & 0x10 != 0 && exception.address == rip;
            if landed {
                outcome.state.rip -= 1;
            }
            if landed || fetch && rip != INSTRUCTION {
                outcome.exception = None;
            }
        }
        outcome
    }

    /// Gives the vCPU the state in `base`.
    fn load(&mut self) {
        let s = &self.base;
        let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = s.gpr;
        let (rip, rflags) = (s.rip, s.rflags);
        #[rustfmt::skip]
        let regs = kvm_regs {
            rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags,
        };
        let [es, cs, ss, ds, fs, gs] = s.segments.map(|segment| kvm_segment_of(&segment));
        let sregs = kvm_sregs {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr: kvm_segment_of(&s.tr),
            gdt: kvm_dtable { base: s.gdtr.base, limit: s.gdtr.limit, padding: [0; 3] },
            idt: kvm_dtable { base: s.idtr.base, limit: s.idtr.limit, padding: [0; 3] },
            cr0: s.cr0,
            cr2: 0,
            cr3: s.cr3,
            cr4: s.cr4,
            efer: s.msrs.efer,
            ..self.sregs
        };
        self.vcpu.set_sregs(&sregs).expect("registers");
        self.vcpu.set_regs(&regs).expect("registers");
        // KVM_SET_FPU leaves MXCSR alone. The image begins as that of FXSAVE, which `FpuState` is.
        let mut xsave = kvm_xsave::default();
        // SAFETY: both have at least as many bytes; a `u32` may have any value.
        unsafe {
            let (from, to) = ((&raw const s.fpu).cast::<u8>(), xsave.region.as_mut_ptr().cast::<u8>());
            std::ptr::copy_nonoverlapping(from, to, FXSAVE);
        }
        xsave.region[FXSAVE / 4] = X87_AND_SSE;
        // SAFETY: no extension needs more than the 4096 bytes of the structure: none was enabled.
        unsafe { self.vcpu.set_xsave(&xsave) }.expect("registers");
    }

    /// The parts of the vCPU's state that a run can change.
    fn store(&self) -> CpuState {
        let regs = self.vcpu.get_regs().expect("registers");
        let sregs = self.vcpu.get_sregs().expect("registers");
        let xsave = self.vcpu.get_xsave().expect("registers");
        let mut s = self.base.clone();
        #[rustfmt::skip]
        let gpr = [
            regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi,
            regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ];
        (s.gpr, s.rip, s.rflags, s.cr2) = (gpr, regs.rip, regs.rflags, sregs.cr2);
        s.segments[1].selector = sregs.cs.selector;
        // A part that is not in XSTATE_BV is in its initial configuration, whatever the image holds.
        s.fpu = FpuState { fcw: 0x37f, ftw: 0, ..FpuState::default() };
        let present = xsave.region[FXSAVE / 4];
        let image = xsave.region.map(u32::to_le_bytes).concat();
        let mut take = |part: std::ops::Range<usize>| {
            // SAFETY: within both; any bytes are valid for the fields.
            unsafe {
                let to = (&raw mut s.fpu).cast::<u8>().add(part.start);
                std::ptr::copy_nonoverlapping(image[part.clone()].as_ptr(), to, part.len());
            }
        };
        if present & 1 != 0 {
            take(X87);
            take(ST);
        }
        if present & 2 != 0 {
            take(XMM);
        }
        take(MXCSR);
        s
    }
}

fn kvm_segment_of(segment: &Segment) -> kvm_segment {
    let SegmentAttributes(a) = segment.attributes;
    let bit = |n: u32| (a >> n & 1) as u8;
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: (a & 15) as u8,
        present: bit(7),
        dpl: (a >> 5 & 3) as u8,
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: 1 - bit(7),
        padding: 0,
    }
}

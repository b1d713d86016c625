//! The architectural state of a processor.

/// x87, MMX and SSE state in the layout of `FXSAVE64` (APM volume 2, section 11.4.4), followed by room for
/// the state that XSAVE adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct FpuState {
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word; the top of stack is in bits 13:11.
    pub fsw: u16,
    /// Abridged tag word: bit n is set if physical register n is not empty.
    pub ftw: u8,
    /// Always zero.
    pub reserved0: u8,
    /// Last x87 opcode.
    pub fop: u16,
    /// Last x87 instruction pointer.
    pub fip: u64,
    /// Last x87 data pointer.
    pub fdp: u64,
    /// SSE control and status.
    pub mxcsr: u32,
    /// Which bits of MXCSR may be set.
    pub mxcsr_mask: u32,
    /// ST(0) to ST(7) in stack order (as FXSAVE stores them); the low ten bytes count. MMX registers are
    /// the low eight bytes by physical number.
    pub st: [u128; 8],
    /// XMM0 to XMM15.
    pub xmm: [u128; 16],
    /// The last 96 bytes of the FXSAVE image.
    pub reserved1: [u128; 6],
    /// Upper halves of YMM0 to YMM15; not used by the models up to v2.
    pub ymm_high: [u128; 16],
}

impl Default for FpuState {
    /// The state after power-up (APM volume 2, table 14-1).
    fn default() -> Self {
        Self {
            fcw: 0x037f,
            fsw: 0,
            ftw: 0,
            reserved0: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            mxcsr: 0x1f80,
            mxcsr_mask: 0xffff,
            st: [0; 8],
            xmm: [0; 16],
            reserved1: [0; 6],
            ymm_high: [0; 16],
        }
    }
}

/// The attributes of a segment: bits 8 to 15 and 20 to 23 of the descriptor's second word, shifted right
/// by eight (the layout of a VMCB; bits 4 to 7 of the second byte are not used here).
///
/// | bits | meaning |
/// |---|---|
/// | 3:0 | type |
/// | 4 | S: code or data segment |
/// | 6:5 | DPL |
/// | 7 | present |
/// | 12 | available to software |
/// | 13 | L: 64-bit code |
/// | 14 | D/B: 32-bit default size |
/// | 15 | G: limit counts pages |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SegmentAttributes(pub u16);

impl SegmentAttributes {
    /// The four type bits.
    pub const fn kind(self) -> u8 {
        (self.0 & 15) as u8
    }
    /// Code or data segment, as opposed to a system segment.
    pub const fn is_code_or_data(self) -> bool {
        self.0 & 0x10 != 0
    }
    /// A code segment.
    pub const fn is_code(self) -> bool {
        self.0 & 0x18 == 0x18
    }
    /// A conforming code segment, or an expand-down data segment.
    pub const fn conforming_or_down(self) -> bool {
        self.0 & 4 != 0
    }
    /// A writable data segment or a readable code segment.
    pub const fn writable_or_readable(self) -> bool {
        self.0 & 2 != 0
    }
    /// Descriptor privilege level.
    pub const fn dpl(self) -> u8 {
        (self.0 >> 5 & 3) as u8
    }
    /// Present.
    pub const fn present(self) -> bool {
        self.0 & 0x80 != 0
    }
    /// 64-bit code segment.
    pub const fn long(self) -> bool {
        self.0 & 0x2000 != 0
    }
    /// 32-bit default operand size, or a 32-bit stack.
    pub const fn big(self) -> bool {
        self.0 & 0x4000 != 0
    }
    /// The limit counts 4 KiB units in the descriptor ([`Segment::limit`] is in bytes always).
    pub const fn granular(self) -> bool {
        self.0 & 0x8000 != 0
    }
}

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Attributes from the descriptor; not present means that the segment cannot be used.
    pub attributes: SegmentAttributes,
    /// Highest offset, in bytes.
    pub limit: u32,
    /// Linear address of offset zero.
    pub base: u64,
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct DescriptorTable {
    /// Linear address of the table.
    pub base: u64,
    /// Highest offset, in bytes.
    pub limit: u16,
}

/// What a processor does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum MpState {
    /// Executes instructions.
    #[default]
    Running,
    /// `HLT` was executed; an interrupt wakes it.
    Halted,
    /// After INIT; a start-up IPI starts it.
    WaitForSipi,
    /// After a triple fault; only a reset helps.
    Shutdown,
}

/// Model-specific registers that are not part of another field of [`CpuState`]. The local APIC's registers
/// belong to [`Local`](crate::Local).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the fields are named after the architectural registers")]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct Msrs {
    pub efer: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub spec_ctrl: u64,
    /// MSR_KVM_WALL_CLOCK_NEW (0x4b564d00).
    pub kvm_wall_clock: u64,
    /// MSR_KVM_SYSTEM_TIME_NEW (0x4b564d01).
    pub kvm_system_time: u64,
}

/// Everything that an instruction can observe of its processor, except for the local APIC.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct CpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: the order of the instruction encoding.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS: the order of the instruction encoding.
    pub segments: [Segment; 6],
    /// Local descriptor table.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table.
    pub idtr: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// Page-fault linear address.
    pub cr2: u64,
    /// Page table root.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// Extended control register 0.
    pub xcr0: u64,
    /// DR0 to DR3, two unused entries, DR6, DR7.
    pub dr: [u64; 8],
    /// Model-specific registers.
    pub msrs: Msrs,
    /// x87 and SSE.
    pub fpu: FpuState,
    /// The time-stamp counter as the guest reads it.
    pub tsc: u64,
    /// What the processor does.
    pub mp_state: MpState,
    /// The next instruction is in the shadow of `STI` or of a load of SS.
    pub interrupt_shadow: bool,
    /// An NMI is being handled: further ones wait until `IRET`.
    pub nmi_blocked: bool,
    /// An NMI is waiting.
    pub nmi_pending: bool,
    /// Page directory pointers that PAE paging loaded with CR3 (not used in long mode).
    pub pdptes: [u64; 4],
}

const DATA16: SegmentAttributes = SegmentAttributes(0x93);
const CODE16: SegmentAttributes = SegmentAttributes(0x9b);

impl CpuState {
    /// The bits of CR4 that this processor has: TSD, DE, PSE, PAE, MCE, PGE, PCE, OSFXSR, OSXMMEXCPT, FSGSBASE and SMEP.
    pub const CR4_KNOWN: u64 = 0x7ff & !3 | 1 << 16 | 1 << 20;

    /// The state after RESET (APM volume 2, table 14-1): real mode at F000:FFF0 with a base of
    /// 0xffff_0000.
    pub fn reset() -> Self {
        let data = Segment { selector: 0, attributes: DATA16, limit: 0xffff, base: 0 };
        let code = Segment { selector: 0xf000, attributes: CODE16, limit: 0xffff, base: 0xffff_0000 };
        let mut gpr = [0; 16];
        gpr[2] = u64::from(crate::config::SIGNATURE);
        Self {
            gpr,
            rip: 0xfff0,
            rflags: 2,
            segments: [data, code, data, data, data, data],
            ldtr: Segment { selector: 0, attributes: SegmentAttributes(0x82), limit: 0xffff, base: 0 },
            tr: Segment { selector: 0, attributes: SegmentAttributes(0x8b), limit: 0xffff, base: 0 },
            gdtr: DescriptorTable { base: 0, limit: 0xffff },
            idtr: DescriptorTable { base: 0, limit: 0xffff },
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            xcr0: 1,
            dr: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
            msrs: Msrs { pat: 0x0007_0406_0007_0406, misc_enable: 1, ..Msrs::default() },
            fpu: FpuState { fcw: 0x40, ftw: 0, ..FpuState::default() },
            tsc: 0,
            mp_state: MpState::Running,
            interrupt_shadow: false,
            nmi_blocked: false,
            nmi_pending: false,
            pdptes: [0; 4],
        }
    }
}

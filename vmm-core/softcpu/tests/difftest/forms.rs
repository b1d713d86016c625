//! The instruction forms to test, found by decoding the opcode maps.

use std::collections::BTreeMap;

use super::layout::{INSTRUCTION, Mode};

use iced_x86::{
    Code, CpuidFeature as F, Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic as M, OpKind,
};

/// Prefixes, opcode and ModRM byte that select a form.
#[derive(Clone, Copy, Debug)]
pub struct Template {
    pub operand_size: bool,
    /// F2, F3 or 0.
    pub repeat: u8,
    pub wide: bool,
    /// 0: one byte; 1: 0F; 2: 0F 38; 3: 0F 3A.
    pub map: u8,
    pub opcode: u8,
    /// `mod` is 0 or 3; `None` for opcodes without ModRM.
    pub modrm: Option<u8>,
}

/// An opcode with register operands only, or with a memory operand.
pub struct Form {
    /// One of its encodings.
    pub example: Instruction,
    pub templates: Vec<Template>,
}

/// All forms that can run here and in the guest, optionally of one mnemonic only.
pub fn all(mode: Mode, only: Option<&str>) -> Vec<Form> {
    let mut forms: BTreeMap<(Code, bool), Form> = BTreeMap::new();
    for (template, instruction) in templates(mode) {
        let name = format!("{:?}", instruction.mnemonic()).to_lowercase();
        if is_testable(&instruction) && only.is_none_or(|only| only == name) {
            let memory = template.modrm.is_some_and(|modrm| modrm < 0xc0);
            let form = forms
                .entry((instruction.code(), memory))
                .or_insert_with(|| Form { example: instruction, templates: Vec::new() });
            form.templates.push(template);
        }
    }
    forms.into_values().collect()
}

/// Everything that decodes in the opcode maps of one to three bytes.
pub fn templates(mode: Mode) -> impl Iterator<Item = (Template, Instruction)> {
    let opcodes = (0..4).flat_map(|map| (0..=255u8).map(move |opcode| (map, opcode)));
    let instructions = opcodes.filter(move |&(map, opcode)| {
        !(map == 0 && is_prefix(mode, opcode) || map == 1 && matches!(opcode, 0x38 | 0x3a))
    });
    instructions.flat_map(move |(map, opcode)| {
        prefixes(mode).flat_map(move |(operand_size, repeat, wide)| {
            modrm_bytes(mode, map, opcode).into_iter().filter_map(move |modrm| {
                let template = Template { operand_size, repeat, wide, map, opcode, modrm };
                Some((template, decode(mode, INSTRUCTION, &template.plain())?))
            })
        })
    })
}

impl Template {
    /// The shortest encoding, followed by zeros for displacement and immediate.
    pub fn plain(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(16);
        if self.operand_size {
            bytes.push(0x66);
        }
        if self.repeat != 0 {
            bytes.push(self.repeat);
        }
        if self.wide {
            bytes.push(0x48);
        }
        self.push_opcode(&mut bytes);
        bytes.extend(self.modrm);
        bytes.extend([0; 10]);
        bytes.truncate(15);
        bytes
    }

    pub fn push_opcode(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(match self.map {
            0 => &[],
            1 => &[0x0f],
            2 => &[0x0f, 0x38],
            _ => &[0x0f, 0x3a],
        });
        bytes.push(self.opcode);
    }
}

/// Decodes as a processor with the extensions up to x86-64-v2 does, near branches as AMD's do.
pub fn decode(mode: Mode, address: u64, bytes: &[u8]) -> Option<Instruction> {
    let options = DecoderOptions::AMD;
    let instruction = Decoder::with_ip(mode.bits(), bytes, address, options).decode();
    (!instruction.is_invalid()).then_some(instruction)
}

fn is_prefix(mode: Mode, opcode: u8) -> bool {
    matches!(opcode, 0x0f | 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
        || mode == Mode::Long && matches!(opcode, 0x40..=0x4f)
}

fn prefixes(mode: Mode) -> impl Iterator<Item = (bool, u8, bool)> {
    let wide: &[bool] = if mode == Mode::Long { &[false, true] } else { &[false] };
    [false, true].into_iter().flat_map(move |size| {
        [0, 0xf2, 0xf3].into_iter().flat_map(move |rep| wide.iter().map(move |&wide| (size, rep, wide)))
    })
}

fn modrm_bytes(mode: Mode, map: u8, opcode: u8) -> Vec<Option<u8>> {
    if !has_modrm(mode, map, opcode) {
        return vec![None];
    }
    let memory = (0..8).map(|reg| Some(reg << 3));
    let registers = (0xc0..=0xff).map(Some);
    memory.chain(registers).collect()
}

fn has_modrm(mode: Mode, map: u8, opcode: u8) -> bool {
    match (map, opcode) {
        (0, 0x00..=0x3f) => opcode & 7 < 4,
        (0, 0x62 | 0xc4 | 0xc5) => mode != Mode::Long,
        (0, 0x40..=0x61 | 0x64..=0x68 | 0x6a | 0x6c..=0x7f | 0x90..=0xbf) => false,
        (0, 0xc2 | 0xc3 | 0xc8..=0xcf | 0xd4..=0xd7 | 0xe0..=0xf5 | 0xf8..=0xfd) => false,
        (1, 0x05..=0x0c | 0x30..=0x37 | 0x77 | 0x80..=0x8f | 0xa0..=0xa2 | 0xa8..=0xaa | 0xc8..=0xcf) => {
            false
        }
        _ => true,
    }
}

/// Whether the instruction can run in this process without harming it, gives the same result each time,
/// and belongs to what the guest's processor announces.
pub fn is_testable(instruction: &Instruction) -> bool {
    let announced = instruction.cpuid_features().iter().all(|feature| {
        matches!(
            feature,
            F::INTEL8086
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::X64
                | F::CMOV
                | F::CX8
                | F::CMPXCHG16B
                | F::CLFSH
                | F::MULTIBYTENOP
                | F::PAUSE
                | F::MSR
                | F::FPU
                | F::FPU287
                | F::FPU387
                | F::FXSR
                | F::MMX
                | F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::POPCNT
                | F::PREFETCHW
                | F::CET_IBT
                // Executed as BSF and BSR.
                | F::BMI1
                | F::LZCNT
        ) && instruction.encoding() == EncodingKind::Legacy
    });
    let on_request = instruction.cpuid_features().iter().all(|feature| match feature {
        F::MOVBE => is_x86_feature_detected!("movbe"),
        F::CLFLUSHOPT => host_function_7_ebx() >> 23 & 1 != 0,
        F::CLWB => host_function_7_ebx() >> 24 & 1 != 0,
        F::AES => is_x86_feature_detected!("aes"),
        F::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        F::SHA => is_x86_feature_detected!("sha"),
        _ => false,
    });
    let to_segment = matches!(instruction.mnemonic(), M::Mov | M::Pop)
        && instruction.op_kind(0) == OpKind::Register
        && instruction.op0_register().is_segment_register();
    let excluded = matches!(
        instruction.mnemonic(),
        // They leave this process or change what it stands on.
        M::Syscall | M::Sysret | M::Sysretq | M::Sysenter | M::Sysexit | M::Sysexitq | M::Int
            | M::Iret | M::Iretd | M::Iretq | M::Retf | M::Lss | M::Lfs | M::Lgs | M::Lds | M::Les | M::Swapgs
            // They show the host's descriptor tables.
            | M::Lar | M::Lsl | M::Verr | M::Verw | M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw
            // They show the host's time, load or identity.
            | M::Rdtsc | M::Rdtscp | M::Rdpmc | M::Cpuid
            // Hypervisors under the host get its return address wrong.
            | M::Int1
            // They are the hypervisor's under the host.
            | M::Vmcall | M::Vmmcall
            // The host knows them, the guest's processor does not.
            | M::Monitor | M::Mwait | M::Xgetbv | M::Xsetbv
    );
    let far = instruction.is_jmp_far()
        || instruction.is_call_far()
        || instruction.is_jmp_far_indirect()
        || instruction.is_call_far_indirect();
    // AMD processors read four bytes, Intel's two.
    let vendor = instruction.code() == Code::Movsxd_r16_rm16;
    (announced || on_request) && !vendor && !to_segment && !excluded && !far
}

/// Features that the standard library does not tell.
fn host_function_7_ebx() -> u32 {
    std::arch::x86_64::__cpuid_count(7, 0).ebx
}

/// Whether runs must load and compare x87 and SSE state.
pub fn uses_fpu(instruction: &Instruction) -> bool {
    instruction.cpuid_features().iter().any(|feature| {
        matches!(
            feature,
            F::FPU
                | F::FPU287
                | F::FPU387
                | F::FXSR
                | F::MMX
                | F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::AES
                | F::PCLMULQDQ
                | F::SHA
        )
    })
}

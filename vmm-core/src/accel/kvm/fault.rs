//! A readable account of why KVM could not go on.

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

use super::KvmHypervisor;
use super::vcpu::KvmVcpu;
use crate::accel::{AccelError, CpuState, Vcpu, VcpuFault};
use crate::memory::PAGE_SIZE;

/// Longest x86 instruction.
pub const MAX_INSTRUCTION: usize = 15;
/// EFER: long mode is active.
const EFER_LMA: u64 = 1 << 10;

/// The reason for an instruction that the kernel's emulator does not know, with a hint.
pub fn emulation_reason() -> String {
    let mut reason = String::from("KVM cannot emulate this instruction");
    if KvmHypervisor::is_software() {
        reason.push_str(
            "; this host's KVM is software (module kvm_pvm) and emulates guest kernel code incompletely: use the \
             accelerator `soft`",
        );
    }
    reason
}

fn is_64_bit(state: &CpuState) -> bool {
    state.msrs.efer & EFER_LMA != 0 && state.segments[1].attributes.long()
}

/// Linear address of the next instruction.
pub fn linear_rip(state: &CpuState) -> u64 {
    if is_64_bit(state) { state.rip } else { state.segments[1].base.wrapping_add(state.rip) & 0xffff_ffff }
}

/// Describes a fault of `vcpu` at its instruction pointer; `bytes` as far as the kernel gave them.
pub fn describe(vcpu: &mut KvmVcpu, reason: String, mut bytes: Vec<u8>) -> Result<VcpuFault, AccelError> {
    let state = vcpu.state()?;
    let rip = linear_rip(&state);
    if bytes.is_empty() {
        bytes = read_code(vcpu, rip)?;
    }
    let instruction = disassemble(&bytes, &state);
    Ok(VcpuFault { vcpu: vcpu.id(), reason, rip, bytes, instruction, state: Box::new(state) })
}

/// The bytes at a linear address, up to a page that is not mapped.
fn read_code(vcpu: &mut KvmVcpu, linear: u64) -> Result<Vec<u8>, AccelError> {
    let mut bytes = Vec::new();
    while bytes.len() < MAX_INSTRUCTION {
        let at = linear.wrapping_add(bytes.len() as u64);
        let Some(physical) = vcpu.translate(at)? else { break };
        let in_page = (PAGE_SIZE - physical % PAGE_SIZE) as usize;
        let mut piece = vec![0; in_page.min(MAX_INSTRUCTION - bytes.len())];
        if vcpu.memory().read(physical, &mut piece).is_err() {
            break;
        }
        bytes.append(&mut piece);
    }
    Ok(bytes)
}

fn disassemble(bytes: &[u8], state: &CpuState) -> Option<String> {
    let bitness = match (is_64_bit(state), state.segments[1].attributes.big()) {
        (true, _) => 64,
        (false, true) => 32,
        (false, false) => 16,
    };
    let mut decoder = Decoder::with_ip(bitness, bytes, state.rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    if instruction.is_invalid() {
        return None;
    }
    let mut text = String::new();
    IntelFormatter::new().format(&instruction, &mut text);
    Some(text)
}

//! SSE instructions. Their registers stay in the processor's image; each instruction loads and stores its own.

use std::mem::offset_of;

use iced_x86::code_asm::*;
use iced_x86::{Code, InstructionInfoFactory, OpKind, Register};

use super::emit::{Emitted, Emitter, field};
use super::flags;
use super::general::{Rewritten, memory_access, set_memory};
use super::step::{Step, is_float};
use crate::cpu::{CR0_EM, CR0_TS, CR4_OSFXSR, Cpu};
use crate::hostop::{Resident, directions};
use crate::state::FpuState;

const CR0: i32 = offset_of!(Cpu, cr0) as i32;
const CR4: i32 = offset_of!(Cpu, cr4) as i32;
const XMM: i32 = (offset_of!(Cpu, fpu) + offset_of!(FpuState, xmm)) as i32;
const MXCSR_RESIDENT: i32 = (offset_of!(Cpu, resident) + Resident::MXCSR) as i32;

impl Emitter<'_> {
    pub fn vector(&mut self, steps: &[Step], n: usize) -> Emitted {
        let step = &steps[n];
        let i = &step.instruction;
        let changes = step.effect != flags::Effect::None;
        let (slow, mut resume) = self.cold_call(changes);
        if !self.vectors_ready {
            self.a.test(dword_ptr(r15 + CR0), (CR0_EM | CR0_TS) as u32)?;
            self.a.jne(slow)?;
            self.a.test(dword_ptr(r15 + CR4), CR4_OSFXSR as u32)?;
            self.a.je(slow)?;
            // Whatever raises no exception here does not further on in the block.
            self.vectors_ready = true;
        }
        if is_float(i) {
            self.a.cmp(byte_ptr(r15 + MXCSR_RESIDENT), 0)?;
            self.a.je(slow)?;
        }
        let mut rewritten = Rewritten::new(i, &[Register::R14])?;
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(i);
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        if memory {
            let operand = self.host_operand(i, memory_access(i), true, slow)?;
            set_memory(&mut rewritten.body, &operand);
        }
        rewritten.load(self)?;
        let mut stores = Vec::new();
        for n in 0..i.op_count() {
            if i.op_kind(n) != OpKind::Register || !i.op_register(n).is_xmm() {
                continue;
            }
            // The same register must stay the same: operations that clear it so do not read it.
            let same = (0..n).find(|&other| i.op_register(other) == i.op_register(n));
            let host = Register::XMM1 + same.unwrap_or(n);
            let image = field(XMM + 16 * i.op_register(n).number() as i32);
            let (read, write) = directions(info.op_access(n));
            if read {
                self.load(Code::Movaps_xmm_xmmm128, host, image)?;
            }
            if write {
                stores.push((host, image));
            }
            rewritten.body.set_op_register(n, host);
        }
        self.add(rewritten.body)?;
        for (host, image) in stores {
            self.store(Code::Movaps_xmmm128_xmm, image, host)?;
        }
        rewritten.store(self)?;
        if changes {
            let record = flags::recorded(steps, n);
            if record {
                self.record_known()?;
            }
            self.flags_changed(true, record);
        }
        self.place(&mut resume)
    }
}

//! Ends of blocks.

use iced_x86::code_asm::*;
use iced_x86::{Code, Instruction, Mnemonic as M, OpKind, Register};

use super::address::{Access, Address};
use super::emit::{Cold, Emitted, Emitter, Ops, Refused, held, quad};
use super::general::memory_access;
use super::glue::{FUEL, NEXT, OP_IMM, OP_SIZE, RIP_SLOT, TARGET};
use super::step::{Form, Step};

/// Another block of the region: its code, its first operation and its number of instructions.
pub(super) struct Neighbour {
    pub offset: u16,
    pub body: CodeLabel,
    pub first: u64,
    pub count: u32,
}

impl Emitter<'_> {
    /// Emits the end of a block.
    pub fn end(&mut self, steps: &[Step], ops: Ops, region: &[Neighbour]) -> Emitted {
        let Some(last) = steps.last() else { return Err(Refused) };
        let i = &last.instruction;
        // The counter comes first.
        let op = ops.block + OP_SIZE * steps.len() as u64;
        match last.form {
            Form::Branch => {}
            Form::Last => {
                self.a.mov(r14, op)?;
                return Ok(self.a.jmp(self.glue.leave)?);
            }
            _ => return self.go_to(i.next_ip() as i64, op + OP_SIZE, region),
        }
        match (i.mnemonic(), i.op0_kind()) {
            (M::Jmp, OpKind::NearBranch64) => self.go_to(i.near_branch64() as i64, op, region),
            (M::Call, OpKind::NearBranch64) if i.near_branch64() < 4096 => self.call_near(i, op, region),
            (M::Jmp | M::Call | M::Ret, _) => self.indirect(i, op),
            _ => self.conditional(i, op, region),
        }
    }

    fn cold_leave(&mut self, op: u64) -> CodeLabel {
        let start = self.a.create_label();
        self.cold.push(Cold::Leave { start, op });
        start
    }

    /// Goes to `target`, relative to the page, as the operation `op` would.
    fn go_to(&mut self, target: i64, op: u64, region: &[Neighbour]) -> Emitted {
        if let Some(block) = region.iter().find(|block| i64::from(block.offset) == target) {
            let start = self.a.create_label();
            self.cold.push(Cold::NotEntered { start, first: block.first });
            self.a.sub(quad(FUEL), block.count as i32)?;
            self.a.js(start)?;
            return Ok(self.a.jmp(block.body)?);
        }
        if (0..4096).contains(&target) {
            self.a.mov(r13, op)?;
            return Ok(self.a.jmp(self.glue.follow_link)?);
        }
        let unknown = self.cold_leave(op);
        self.page_relative(i32::try_from(target).map_err(|_| Refused)?)?;
        self.a.call(self.glue.lookup)?;
        self.a.je(unknown)?;
        Ok(self.a.jmp(self.glue.enter_page)?)
    }

    /// R14 becomes an address relative to the page.
    fn page_relative(&mut self, offset: i32) -> Emitted {
        self.a.mov(r14, quad(RIP_SLOT))?;
        Ok(self.a.lea(r14, qword_ptr(r14 + offset))?)
    }

    fn conditional(&mut self, i: &Instruction, op: u64, region: &[Neighbour]) -> Emitted {
        let condition = i.condition_code() as u8 - 1;
        let mut taken = self.a.create_label();
        if self.flags_in_host() {
            self.jump_if(condition, taken)?;
        } else if self.test_saved(condition)? {
            // ZF is clear if the condition without its lowest bit holds.
            self.jump_if(if condition & 1 == 0 { 5 } else { 4 }, taken)?;
        } else {
            self.a.mov(r14, op)?;
            return Ok(self.a.jmp(self.glue.leave)?);
        }
        self.go_to(i.next_ip() as i64, op + OP_SIZE, region)?;
        self.place(&mut taken)?;
        self.go_to(i.near_branch64() as i64, op, region)
    }

    fn jump_if(&mut self, condition: u8, to: CodeLabel) -> Emitted {
        let a = &mut self.a;
        Ok(match condition {
            0 => a.jo(to),
            1 => a.jno(to),
            2 => a.jb(to),
            3 => a.jae(to),
            4 => a.je(to),
            5 => a.jne(to),
            6 => a.jbe(to),
            7 => a.ja(to),
            8 => a.js(to),
            9 => a.jns(to),
            10 => a.jp(to),
            11 => a.jnp(to),
            12 => a.jl(to),
            13 => a.jge(to),
            14 => a.jle(to),
            _ => a.jg(to),
        }?)
    }

    /// Pushes the return address of a call, or leaves with `op`.
    fn push_return(&mut self, i: &Instruction, op: u64) -> Emitted {
        let slow = self.cold_leave(op);
        let access = Access { size: 8, write: true, aligned: false };
        let top = self.translate(Address::base(Register::R12, -8), access, false, slow)?;
        self.page_relative(i.next_ip() as i32)?;
        self.store(Code::Mov_rm64_r64, top, Register::R14)?;
        Ok(self.a.lea(r12, qword_ptr(r12 - 8))?)
    }

    fn call_near(&mut self, i: &Instruction, op: u64, region: &[Neighbour]) -> Emitted {
        let target = i.near_branch64();
        if !region.iter().any(|block| u64::from(block.offset) == target) {
            // Without a link the interpreter executes the whole call.
            let unlinked = self.cold_leave(op);
            self.a.mov(r13, op)?;
            self.a.cmp(qword_ptr(r13 + OP_IMM), 0)?;
            self.a.je(unlinked)?;
        }
        self.push_return(i, op)?;
        self.go_to(target as i64, op, region)
    }

    /// Branches to addresses that are looked up.
    fn indirect(&mut self, i: &Instruction, op: u64) -> Emitted {
        let slow = self.cold_leave(op);
        match (i.mnemonic(), i.op0_kind()) {
            (M::Ret, _) => {
                let access = Access { size: 8, write: false, aligned: false };
                let top = self.translate(Address::base(Register::R12, 0), access, false, slow)?;
                self.load(Code::Mov_r64_rm64, Register::R14, top)?;
            }
            (_, OpKind::Memory) => {
                let from = self.host_operand(i, memory_access(i), false, slow)?;
                self.load(Code::Mov_r64_rm64, Register::R14, from)?;
            }
            (_, OpKind::Register) => {
                let number = i.op0_register().number();
                match held(number) {
                    Some(host) => self.add(Instruction::with2(Code::Mov_r64_rm64, Register::R14, host)?)?,
                    None => self.load_guest(Register::R14, number)?,
                }
            }
            _ => {
                self.page_relative(i32::try_from(i.near_branch64() as i64).map_err(|_| Refused)?)?;
            }
        }
        self.a.call(self.glue.lookup)?;
        self.a.je(slow)?;
        match i.mnemonic() {
            M::Ret => {
                let released = if i.op_count() == 1 { i32::from(i.immediate16()) } else { 0 };
                self.a.lea(r12, qword_ptr(r12 + (8 + released)))?;
            }
            M::Call => {
                self.a.mov(quad(NEXT), r14)?;
                self.push_return(i, op)?;
                self.a.mov(r14, quad(NEXT))?;
                self.a.mov(r13, quad(TARGET))?;
            }
            _ => {}
        }
        Ok(self.a.jmp(self.glue.enter_page)?)
    }
}

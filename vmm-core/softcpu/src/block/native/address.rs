//! Memory operands: the address, the look into the TLB, and the stack.

use std::mem::offset_of;

use iced_x86::code_asm::*;
use iced_x86::{Code, Instruction, MemoryOperand, OpKind, Register};

use super::super::op::{FS_BASE, GS_BASE};
use super::emit::{Emitted, Emitter, Refused, field, held, quad};
use super::glue::{ADDRESS, RIP_SLOT, TABLE, register};
use crate::mmu::tlb::{ENTRIES, Entry};

const _: () = assert!(size_of::<Entry>() == 32);
/// Bits of an address, shifted right by 7, that are the offset of its entry.
const ENTRY_MASK: i32 = (ENTRIES as i32 - 1) << 5;
const ADDEND: i32 = offset_of!(Entry, addend) as i32;

/// A linear address in terms of the host's registers.
#[derive(Clone, Copy)]
pub(super) struct Address {
    pub base: Register,
    pub index: Register,
    pub scale: u32,
    pub displacement: i32,
}

impl Address {
    pub fn base(base: Register, displacement: i32) -> Self {
        Self { base, index: Register::None, scale: 1, displacement }
    }

    fn operand(&self, extra: i32) -> MemoryOperand {
        let displacement = i64::from(self.displacement) + i64::from(extra);
        let size = u32::from(displacement != 0);
        MemoryOperand::new(self.base, self.index, self.scale, displacement, size, false, Register::None)
    }
}

/// What kind of access has to be allowed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    pub size: usize,
    pub write: bool,
    pub aligned: bool,
}

impl Emitter<'_> {
    /// The address of a memory operand, computed into R14 if registers do not hold its parts. RIP as a base is that
    /// of the page.
    fn address(&mut self, i: &Instruction) -> Result<Address, Refused> {
        let displacement = i32::try_from(i.memory_displacement64() as i64).map_err(|_| Refused)?;
        let scale = i.memory_index_scale();
        let number = |r: Register| r.number();
        let (base, index) = (i.memory_base(), i.memory_index());
        let host_base = match base {
            Register::None => Register::None,
            Register::RIP => {
                self.load(Code::Mov_r64_rm64, Register::R14, field(RIP_SLOT))?;
                Register::R14
            }
            _ => match held(number(base)) {
                Some(host) => host,
                None => {
                    self.load_guest(Register::R14, number(base))?;
                    Register::R14
                }
            },
        };
        let host_index = match index {
            Register::None => Register::None,
            _ => match held(number(index)) {
                Some(host) => host,
                None => {
                    self.load_guest(Register::R13, number(index))?;
                    Register::R13
                }
            },
        };
        let mut address = Address { base: host_base, index: host_index, scale, displacement };
        let segment = match i.memory_segment() {
            Register::FS if i.mnemonic() != iced_x86::Mnemonic::Lea => Some(FS_BASE),
            Register::GS if i.mnemonic() != iced_x86::Mnemonic::Lea => Some(GS_BASE),
            _ => None,
        };
        if let Some(segment) = segment {
            if base == Register::None && index == Register::None {
                self.load(Code::Mov_r64_rm64, Register::R14, field(register(segment)))?;
                return Ok(Address::base(Register::R14, displacement));
            }
            self.load_address(Register::R14, &address)?;
            self.load(Code::Mov_r64_rm64, Register::R13, field(register(segment)))?;
            address = Address { base: Register::R14, index: Register::R13, scale: 1, displacement: 0 };
        }
        Ok(address)
    }

    /// LEA, which leaves the flags alone.
    fn load_address(&mut self, to: Register, address: &Address) -> Emitted {
        if address.base == Register::None && address.index == Register::None {
            return self.add(Instruction::with2(Code::Mov_rm64_imm32, to, address.displacement)?);
        }
        self.load(Code::Lea_r64_m, to, address.operand(0))
    }

    /// Finds the host address of a memory operand, or goes to `slow`: the returned operand refers to it and needs R13
    /// (and R14, if `free` is false). Changes the host's flags.
    pub fn host_operand(
        &mut self,
        i: &Instruction,
        access: Access,
        free: bool,
        slow: CodeLabel,
    ) -> Result<MemoryOperand, Refused> {
        let address = self.address(i)?;
        self.translate(address, access, free, slow)
    }

    /// The same for an address.
    pub fn translate(
        &mut self,
        address: Address,
        access: Access,
        free: bool,
        slow: CodeLabel,
    ) -> Result<MemoryOperand, Refused> {
        let scratch = |r: Register| matches!(r, Register::R13 | Register::R14);
        let keep = scratch(address.base) || scratch(address.index);
        self.load_address(Register::R14, &address)?;
        if keep {
            self.a.mov(quad(ADDRESS), r14)?;
        }
        if access.aligned {
            self.a.test(r14b, 15)?;
            self.a.jne(slow)?;
        }
        match access.size {
            1 => self.a.mov(r13, r14)?,
            size => self.a.lea(r13, qword_ptr(r14 + (size as i32 - 1)))?,
        }
        self.a.shr(r14, 7)?;
        self.a.and(r14d, ENTRY_MASK)?;
        self.a.add(r14, quad(TABLE))?;
        self.a.and(r13, -4096)?;
        let tag = if access.write { offset_of!(Entry, write) } else { offset_of!(Entry, read) };
        self.a.cmp(r13, qword_ptr(r14 + tag as i32))?;
        self.a.jne(slow)?;
        self.a.mov(r13, qword_ptr(r14 + ADDEND))?;
        if keep {
            self.a.add(r13, quad(ADDRESS))?;
            return Ok(MemoryOperand::with_base(Register::R13));
        }
        if address.base == Register::None && address.index == Register::None {
            return Ok(MemoryOperand::with_base_displ(Register::R13, address.displacement.into()));
        }
        if address.index == Register::None {
            let operand = Address { index: Register::R13, ..address };
            return Ok(operand.operand(0));
        }
        self.load_address(Register::R14, &address)?;
        if free {
            self.a.add(r13, r14)?;
            return Ok(MemoryOperand::with_base(Register::R13));
        }
        Ok(Address { base: Register::R14, index: Register::R13, scale: 1, displacement: 0 }.operand(0))
    }

    pub fn lea(&mut self, i: &Instruction) -> Emitted {
        let address = self.address(i)?;
        let to = i.op0_register();
        let number = to.full_register().number();
        match held(number) {
            Some(host) if to.size() == 8 => self.load_address(host, &address),
            Some(host) => {
                self.load_address(Register::R14, &address)?;
                let (to, from) = (super::emit::sized(host, 4), Register::R14D);
                self.add(Instruction::with2(Code::Mov_r32_rm32, to, from)?)
            }
            None => {
                self.load_address(Register::R14, &address)?;
                if to.size() == 4 {
                    self.a.mov(r14d, r14d)?;
                }
                self.store_guest(number, Register::R14)
            }
        }
    }

    pub fn push(&mut self, i: &Instruction) -> Emitted {
        let (slow, mut resume) = self.cold_call(false);
        let access = Access { size: 8, write: true, aligned: false };
        let top = self.translate(Address::base(Register::R12, -8), access, false, slow)?;
        if i.op0_kind() == OpKind::Register {
            let number = i.op0_register().number();
            let from = match held(number) {
                Some(host) => host,
                None => {
                    self.load_guest(Register::R14, number)?;
                    Register::R14
                }
            };
            self.store(Code::Mov_rm64_r64, top, from)?;
        } else {
            self.add(Instruction::with2(Code::Mov_rm64_imm32, top, i.immediate(0) as i32)?)?;
        }
        self.a.lea(r12, qword_ptr(r12 - 8))?;
        self.place(&mut resume)
    }

    pub fn pop(&mut self, i: &Instruction) -> Emitted {
        let (slow, mut resume) = self.cold_call(false);
        let access = Access { size: 8, write: false, aligned: false };
        let top = self.translate(Address::base(Register::R12, 0), access, false, slow)?;
        let number = i.op0_register().number();
        match held(number) {
            Some(host) => self.load(Code::Mov_r64_rm64, host, top)?,
            None => {
                self.load(Code::Mov_r64_rm64, Register::R14, top)?;
                self.store_guest(number, Register::R14)?;
            }
        }
        self.a.lea(r12, qword_ptr(r12 + 8))?;
        self.place(&mut resume)
    }

    pub fn leave_frame(&mut self) -> Emitted {
        let (slow, mut resume) = self.cold_call(false);
        let access = Access { size: 8, write: false, aligned: false };
        let top = self.translate(Address::base(Register::RBP, 0), access, false, slow)?;
        self.load(Code::Mov_r64_rm64, Register::R14, top)?;
        self.a.lea(r12, qword_ptr(rbp + 8))?;
        self.a.mov(rbp, r14)?;
        self.place(&mut resume)
    }
}

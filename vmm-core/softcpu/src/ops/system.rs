//! System instructions.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::operand::{segment_number, size_of};
use super::width::Width;
use crate::cpu::flags::{CF, IOPL, ZF};
use crate::cpu::segment::canonical;
use crate::cpu::{CR0_TS, CR4_FSGSBASE, CR4_TSD, Cpu, Exception, Fault, seg, vector};
use crate::mmu::host;
use crate::state::{DescriptorTable, MpState};

impl Cpu {
    pub(crate) fn privileged(&mut self) -> Result<(), Fault> {
        if self.cpl == 0 { Ok(()) } else { Err(self.gp()) }
    }

    /// CLI and STI need CPL <= IOPL.
    #[inline(always)]
    pub(crate) fn check_interrupt_privilege(&mut self) -> Result<(), Fault> {
        if self.cpl == 0 || u64::from(self.cpl) <= (self.flags & IOPL) >> 12 {
            return Ok(());
        }
        Err(self.gp())
    }

    /// A random number: the host's, or from the configured seed.
    fn random_number(&mut self) -> u64 {
        if self.config.seed.is_none() {
            let mut bytes = [0u8; 8];
            if host_entropy(&mut bytes) {
                return u64::from_le_bytes(bytes);
            }
        }
        self.random_from_seed()
    }
}

#[cfg(unix)]
fn host_entropy(bytes: &mut [u8; 8]) -> bool {
    // SAFETY: the buffer is valid for its length.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    got == bytes.len() as isize
}

#[cfg(not(unix))]
fn host_entropy(_bytes: &mut [u8; 8]) -> bool {
    false
}

/// INT n, INTO: the frame's RIP is behind the instruction.
pub(crate) fn software_interrupt(cpu: &mut Cpu, _: &Instruction, vector: u8) -> Result<(), Fault> {
    cpu.interrupt(vector, None, crate::cpu::exception::Source::Software)
}

pub(crate) fn int_n(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    software_interrupt(cpu, instruction, instruction.immediate8())
}

pub(crate) fn int3(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    if cpu.traps_int3() {
        cpu.pending = Some(Exception::Int3);
        return Err(Fault);
    }
    software_interrupt(cpu, instruction, vector::BP)
}

/// INT1 (ICEBP): a trap without a check of the gate's DPL. One that a load of SS held back is taken with it.
pub(crate) fn int1(cpu: &mut Cpu, _: &Instruction) -> Result<(), Fault> {
    cpu.interrupt(vector::DB, None, crate::cpu::exception::Source::Event)?;
    if let hits @ 1.. = std::mem::take(&mut cpu.data_hits) {
        cpu.hit_breakpoints(hits);
    }
    Ok(())
}

/// VMCALL and VMMCALL: KVM's interface for guests, of which CPUID announces no call.
pub(crate) fn hypercall(cpu: &mut Cpu, _: &Instruction) -> Result<(), Fault> {
    const KVM_ENOSYS: i64 = 1000;
    const KVM_EPERM: i64 = 1;
    if !cpu.config.kvm_leaves {
        return Err(cpu.ud());
    }
    let error = if cpu.cpl == 0 { -KVM_ENOSYS } else { -KVM_EPERM };
    cpu.regs[0] = error as u64 & if cpu.code64 { u64::MAX } else { 0xffff_ffff };
    Ok(())
}

pub(crate) fn ud(cpu: &mut Cpu, _: &Instruction) -> Result<(), Fault> {
    Err(cpu.ud())
}

/// Not implemented: `#UD`, counted and logged.
pub(crate) fn unimplemented(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    cpu.count_unimplemented(instruction);
    Err(cpu.ud())
}

pub(crate) fn hlt(cpu: &mut Cpu, _: &Instruction) -> Result<(), Fault> {
    cpu.privileged()?;
    cpu.mp_state = MpState::Halted;
    Ok(())
}

pub(crate) fn cpuid(cpu: &mut Cpu, _: &Instruction) -> Result<(), Fault> {
    let output = cpu.cpuid(cpu.regs[0] as u32, cpu.regs[1] as u32);
    for (register, value) in [(0, output[0]), (3, output[1]), (1, output[2]), (2, output[3])] {
        cpu.regs[register] = u64::from(value);
    }
    Ok(())
}

pub(crate) fn rdtsc(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    if cpu.cr4 & CR4_TSD != 0 && cpu.cpl != 0 {
        return Err(cpu.gp());
    }
    let tsc = cpu.tsc_now();
    cpu.regs[0] = tsc & 0xffff_ffff;
    cpu.regs[2] = tsc >> 32;
    if instruction.mnemonic() == Mnemonic::Rdtscp {
        cpu.regs[1] = cpu.msrs.tsc_aux;
    }
    Ok(())
}

pub(crate) fn rdmsr(cpu: &mut Cpu, _: &Instruction) -> Result<(), Fault> {
    cpu.privileged()?;
    let value = cpu.read_msr(cpu.regs[1] as u32)?;
    cpu.regs[0] = value & 0xffff_ffff;
    cpu.regs[2] = value >> 32;
    Ok(())
}

pub(crate) fn wrmsr(cpu: &mut Cpu, _: &Instruction) -> Result<(), Fault> {
    cpu.privileged()?;
    let value = cpu.regs[0] & 0xffff_ffff | cpu.regs[2] << 32;
    cpu.write_msr(cpu.regs[1] as u32, value)
}

pub(crate) fn rdrand(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let value = cpu.random_number();
    cpu.set_register(instruction.op0_register(), value);
    cpu.set_status_flags(CF);
    Ok(())
}

/// MOV from a control or debug register.
pub(crate) fn mov_from_special(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    cpu.privileged()?;
    let source = instruction.op1_register();
    let number = source.number() as u8;
    let value = if source.is_dr() {
        let number = cpu.debug_register(number)?;
        cpu.dr[number]
    } else {
        match cpu.control(number) {
            Some(value) => value,
            None => return Err(cpu.ud()),
        }
    };
    cpu.set_register(instruction.op0_register(), value);
    Ok(())
}

/// MOV to a control or debug register.
pub(crate) fn mov_to_special(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    cpu.privileged()?;
    let target = instruction.op0_register();
    let value = cpu.register(instruction.op1_register());
    let number = target.number() as u8;
    if target.is_dr() { cpu.set_debug_register(number, value) } else { cpu.set_control(number, value) }
}

pub(crate) fn clts(cpu: &mut Cpu, _: &Instruction) -> Result<(), Fault> {
    cpu.privileged()?;
    cpu.cr0 &= !CR0_TS;
    Ok(())
}

pub(crate) fn lmsw(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    cpu.privileged()?;
    let value = cpu.operand(instruction, 0)? & 0xf;
    // PE can be set, but not cleared.
    cpu.set_cr0(cpu.cr0 & !0xe | value)
}

pub(crate) fn smsw(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let value = cpu.cr0;
    cpu.set_operand(instruction, 0, value)
}

pub(crate) fn invlpg(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    cpu.privileged()?;
    let offset = cpu.memory_offset(instruction);
    let segment = segment_number(instruction.memory_segment());
    let address = if cpu.code64 {
        offset.wrapping_add(if segment >= seg::FS { cpu.segs[segment].base } else { 0 })
    } else {
        cpu.segs[segment].base.wrapping_add(offset) & 0xffff_ffff
    };
    cpu.tlb.flush_address(address);
    cpu.blocks.forget_addresses(true);
    Ok(())
}

/// WBINVD, INVD.
pub(crate) fn privileged_nop(cpu: &mut Cpu, _: &Instruction) -> Result<(), Fault> {
    cpu.privileged()
}

pub(crate) fn swapgs(cpu: &mut Cpu, _: &Instruction) -> Result<(), Fault> {
    if !cpu.code64 {
        return Err(cpu.ud());
    }
    cpu.privileged()?;
    let base = cpu.segs[seg::GS].base;
    cpu.segs[seg::GS].base = std::mem::replace(&mut cpu.msrs.kernel_gs_base, base);
    cpu.update_mode();
    Ok(())
}

/// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE.
pub(crate) fn segment_base(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    if cpu.cr4 & CR4_FSGSBASE == 0 || !cpu.code64 {
        return Err(cpu.ud());
    }
    let (register, write) = match instruction.mnemonic() {
        Mnemonic::Rdfsbase => (seg::FS, false),
        Mnemonic::Rdgsbase => (seg::GS, false),
        Mnemonic::Wrfsbase => (seg::FS, true),
        _ => (seg::GS, true),
    };
    if write {
        let base = cpu.register(instruction.op0_register());
        if !canonical(base) {
            return Err(cpu.gp());
        }
        cpu.segs[register].base = base;
        cpu.update_mode();
    } else {
        cpu.set_register(instruction.op0_register(), cpu.segs[register].base);
    }
    Ok(())
}

/// MOV to a segment register.
pub(crate) fn mov_to_segment(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let register = segment_number(instruction.op0_register());
    if register == seg::CS {
        return Err(cpu.ud());
    }
    let selector = match instruction.op1_kind() {
        OpKind::Register => cpu.register(instruction.op1_register()),
        _ => {
            let address = cpu.memory_address(instruction, 0, 2, false)?;
            cpu.load(address, 2)?
        }
    };
    cpu.load_segment(register, selector as u16)?;
    if register == seg::SS {
        cpu.hold_events();
    }
    Ok(())
}

/// MOV from a segment register to memory.
pub(crate) fn mov_from_segment(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let selector = cpu.segs[segment_number(instruction.op1_register())].selector;
    let address = cpu.memory_address(instruction, 0, 2, true)?;
    cpu.store(address, 2, u64::from(selector))
}

/// POP of a segment register.
pub(crate) fn pop_segment(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let register = segment_number(instruction.op0_register());
    let old = cpu.regs[4];
    let size = (instruction.stack_pointer_increment()) as u64;
    // Only the selector is read; the stack pointer moves by the operand size.
    let selector = cpu.peek_stack::<u16>()?;
    cpu.load_segment(register, selector as u16).inspect_err(|_| cpu.regs[4] = old)?;
    cpu.set_sp(old.wrapping_add(size));
    if register == seg::SS {
        cpu.hold_events();
    }
    Ok(())
}

/// SGDT, SIDT.
pub(crate) fn store_table(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let table = if instruction.mnemonic() == Mnemonic::Sgdt { cpu.gdtr } else { cpu.idtr };
    let wide = if cpu.code64 { 8 } else { 4 };
    let address = cpu.memory_address(instruction, 0, 2 + wide, true)?;
    cpu.probe_write(address, 2 + wide)?;
    cpu.store(address, 2, u64::from(table.limit))?;
    cpu.store(address.wrapping_add(2), wide, table.base)
}

/// LGDT, LIDT.
pub(crate) fn load_table(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    cpu.privileged()?;
    let wide = if cpu.code64 { 8 } else { 4 };
    let address = cpu.memory_address(instruction, 0, 2 + wide, false)?;
    let limit = cpu.load(address, 2)? as u16;
    let mut base = cpu.load(address.wrapping_add(2), wide)?;
    if matches!(instruction.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        base &= 0xff_ffff;
    }
    if cpu.code64 && !canonical(base) {
        return Err(cpu.gp());
    }
    let table = DescriptorTable { base, limit };
    if instruction.mnemonic() == Mnemonic::Lgdt {
        cpu.gdtr = table
    } else {
        cpu.idtr = table
    }
    Ok(())
}

/// SLDT, STR.
pub(crate) fn store_selector(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    if !cpu.protected() {
        return Err(cpu.ud());
    }
    let selector = if instruction.mnemonic() == Mnemonic::Sldt { cpu.ldtr.selector } else { cpu.tr.selector };
    if instruction.op0_kind() == OpKind::Register {
        cpu.set_register(instruction.op0_register(), u64::from(selector));
        return Ok(());
    }
    let address = cpu.memory_address(instruction, 0, 2, true)?;
    cpu.store(address, 2, u64::from(selector))
}

fn selector_operand(cpu: &mut Cpu, instruction: &Instruction, n: u32) -> Result<u16, Fault> {
    if instruction.op_kind(n) == OpKind::Register {
        return Ok(cpu.register(instruction.op_register(n)) as u16);
    }
    let address = cpu.memory_address(instruction, 0, 2, false)?;
    Ok(cpu.load(address, 2)? as u16)
}

/// LLDT, LTR.
pub(crate) fn load_system_segment(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    if !cpu.protected() {
        return Err(cpu.ud());
    }
    cpu.privileged()?;
    let selector = selector_operand(cpu, instruction, 0)?;
    if instruction.mnemonic() == Mnemonic::Lldt { cpu.load_ldt(selector) } else { cpu.load_task(selector) }
}

/// LAR, LSL, VERR, VERW: look at a descriptor without faulting.
pub(crate) fn inspect_descriptor(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    if !cpu.protected() {
        return Err(cpu.ud());
    }
    let mnemonic = instruction.mnemonic();
    let verify = matches!(mnemonic, Mnemonic::Verr | Mnemonic::Verw);
    let selector = selector_operand(cpu, instruction, u32::from(!verify))?;
    let found = visible_descriptor(cpu, selector, mnemonic)?;
    if let (Some(value), false) = (found, verify) {
        cpu.set_register(instruction.op0_register(), value);
    }
    cpu.set_one_flag(ZF, found.is_some());
    Ok(())
}

fn visible_descriptor(cpu: &mut Cpu, selector: u16, mnemonic: Mnemonic) -> Result<Option<u64>, Fault> {
    if selector & 0xfffc == 0 {
        return Ok(None);
    }
    let Ok(address) = cpu.descriptor_address(selector, 8, vector::GP) else {
        cpu.pending = None;
        return Ok(None);
    };
    let descriptor = crate::cpu::segment::Descriptor(cpu.sys_read(address, 8)?);
    let a = descriptor.attributes();
    let conforming = a.is_code() && a.conforming_or_down();
    let reachable = conforming || a.dpl() >= cpu.cpl && a.dpl() >= (selector & 3) as u8;
    let long = cpu.long_mode();
    let fits = match mnemonic {
        Mnemonic::Verr => a.is_code_or_data() && (!a.is_code() || a.writable_or_readable()),
        Mnemonic::Verw => a.is_code_or_data() && !a.is_code() && a.writable_or_readable(),
        _ if a.is_code_or_data() => true,
        Mnemonic::Lar if long => matches!(a.kind(), 2 | 9 | 11 | 12),
        Mnemonic::Lar => matches!(a.kind(), 1..=5 | 9 | 11 | 12),
        _ if long => matches!(a.kind(), 2 | 9 | 11),
        _ => matches!(a.kind(), 1..=3 | 9 | 11),
    };
    if !reachable || !fits {
        return Ok(None);
    }
    let value = if mnemonic == Mnemonic::Lsl {
        u64::from(descriptor.limit())
    } else {
        descriptor.0 >> 32 & 0xff_ff00
    };
    Ok(Some(value))
}

/// Far pointer operand of JMP and CALL: selector and offset.
fn far_pointer(cpu: &mut Cpu, instruction: &Instruction) -> Result<(u16, u64, u64), Fault> {
    match instruction.op0_kind() {
        OpKind::FarBranch16 => Ok((instruction.far_branch_selector(), instruction.far_branch16().into(), 2)),
        OpKind::FarBranch32 => Ok((instruction.far_branch_selector(), instruction.far_branch32().into(), 4)),
        _ => {
            let size = instruction.memory_size().size() as u64 - 2;
            let address = cpu.memory_address(instruction, 0, size + 2, false)?;
            let offset = cpu.load(address, size)?;
            let selector = cpu.load(address.wrapping_add(size), 2)?;
            Ok((selector as u16, offset, size))
        }
    }
}

pub(crate) fn far_jump(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let (selector, offset, _) = far_pointer(cpu, instruction)?;
    cpu.far_jump(selector, offset)
}

pub(crate) fn far_call(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let (selector, offset, size) = far_pointer(cpu, instruction)?;
    cpu.far_call(selector, offset, size)
}

pub(crate) fn far_return(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let size = match instruction.code() {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfd | Code::Retfd_imm16 => 4,
        _ => 8,
    };
    let release = if instruction.op_count() == 1 { u64::from(instruction.immediate16()) } else { 0 };
    cpu.far_return(size, release)
}

pub(crate) fn interrupt_return(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    cpu.interrupt_return(match instruction.code() {
        Code::Iretw => 2,
        Code::Iretd => 4,
        _ => 8,
    })
}

pub(crate) fn syscall(cpu: &mut Cpu, _: &Instruction) -> Result<(), Fault> {
    cpu.syscall()
}

pub(crate) fn sysret(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    cpu.sysret(instruction.code() == Code::Sysretq)
}

pub(crate) fn sysenter(cpu: &mut Cpu, _: &Instruction) -> Result<(), Fault> {
    cpu.sysenter()
}

pub(crate) fn sysexit(cpu: &mut Cpu, _: &Instruction) -> Result<(), Fault> {
    cpu.sysexit()
}

/// CMPXCHG8B.
pub(crate) fn cmpxchg8b(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let address = cpu.memory_address(instruction, 0, 8, true)?;
    let pair = |cpu: &Cpu, low: u8, high: u8| u32::get(cpu, low) | u32::get(cpu, high) << 32;
    let (expected, new) = (pair(cpu, 0, 2), pair(cpu, 3, 1));
    let old = match cpu.atomic_host(address, 8)? {
        // SAFETY: a translation of a mapped region.
        Some(at) => match unsafe { host::compare_exchange(at, 8, expected, new) } {
            Ok(()) => expected,
            Err(old) => old,
        },
        None => cpu.exchange_alone(address, 8, expected, new)?,
    };
    if old != expected {
        u32::set(cpu, 0, old);
        u32::set(cpu, 2, old >> 32);
    }
    cpu.set_one_flag(ZF, old == expected);
    Ok(())
}

/// CMPXCHG16B.
pub(crate) fn cmpxchg16b(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let address = cpu.memory_address(instruction, 0, 16, true)?;
    if address % 16 != 0 {
        return Err(cpu.gp());
    }
    let pair =
        |cpu: &Cpu, low: usize, high: usize| u128::from(cpu.regs[low]) | u128::from(cpu.regs[high]) << 64;
    let (expected, new) = (pair(cpu, 0, 2), pair(cpu, 3, 1));
    let old = match cpu.atomic_host(address, 16)? {
        // SAFETY: a translation of a mapped region; pages are aligned, so the host address is as well.
        Some(at) => unsafe { host::compare_exchange_16(at, expected, new) },
        None => {
            let old = u128::from_le_bytes(cpu.read_bytes::<16>(address)?);
            let value = if old == expected { new } else { old };
            cpu.write_bytes(address, value.to_le_bytes())?;
            old
        }
    };
    if old != expected {
        cpu.regs[0] = old as u64;
        cpu.regs[2] = (old >> 64) as u64;
    }
    cpu.set_one_flag(ZF, old == expected);
    Ok(())
}

/// MOV between the accumulator and a 64-bit absolute address.
pub(crate) fn mov_generic(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let value = cpu.operand(instruction, 1)?;
    cpu.set_operand(instruction, 0, value)
}

/// MOVBE.
pub(crate) fn movbe(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let size = size_of(instruction, 0);
    let value = cpu.operand(instruction, 1)?;
    cpu.set_operand(instruction, 0, value.swap_bytes() >> (64 - 8 * size))
}

/// CLFLUSH and the like: the access is checked as a read.
pub(crate) fn touch(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let address = cpu.memory_address(instruction, 0, 1, false)?;
    cpu.ld::<u8>(address).map(drop)
}

/// XGETBV and XSETBV: not available without CR4.OSXSAVE, which is never set.
pub(crate) fn no_xsave(cpu: &mut Cpu, _: &Instruction) -> Result<(), Fault> {
    Err(cpu.ud())
}

//! Far transfers of control: JMP, CALL, RET, IRET, SYSCALL and SYSENTER (APM volume 2, chapters 4 and 6).
//!
//! All functions run with RIP behind the current instruction. On an error nothing has changed but, possibly,
//! memory below the stack pointer and accessed bits.

use super::flags::{AC, DF, ID, IF, IOPL, NT, RF, STATUS, TF, VM};
use super::segment::{Descriptor, canonical};
use super::{CR0_PE, Cpu, EFER_SCE, Fault, seg, vector};
use crate::state::{Segment, SegmentAttributes};

/// A stack that is read or written before the stack pointer moves.
struct Stack {
    base: u64,
    mask: u64,
    sp: u64,
    user: bool,
}

impl Stack {
    fn current(cpu: &Cpu) -> Self {
        let ss = &cpu.segs[seg::SS];
        let (base, mask) = if cpu.code64 {
            (0, u64::MAX)
        } else {
            (ss.base, if ss.attributes.big() { 0xffff_ffff } else { 0xffff })
        };
        Self { base, mask, sp: cpu.regs[4], user: cpu.user != 0 }
    }

    fn linear(&self, cpu: &Cpu) -> u64 {
        let at = self.base.wrapping_add(self.sp & self.mask);
        if cpu.code64 { at } else { at & 0xffff_ffff }
    }

    fn pop(&mut self, cpu: &mut Cpu, size: u64) -> Result<u64, Fault> {
        let value =
            cpu.load_slow(self.linear(cpu), size, self.user).inspect_err(|_| cpu.stack_fault(true))?;
        self.sp = self.sp.wrapping_add(size);
        Ok(value)
    }

    fn push(&mut self, cpu: &mut Cpu, size: u64, value: u64) -> Result<(), Fault> {
        self.sp = self.sp.wrapping_sub(size);
        cpu.store_slow(self.linear(cpu), size, value, self.user).inspect_err(|_| cpu.stack_fault(true))
    }

    fn commit(&self, cpu: &mut Cpu) {
        cpu.regs[4] = if self.mask == u64::MAX || self.mask == 0xffff_ffff {
            self.sp & self.mask
        } else {
            cpu.regs[4] & !self.mask | self.sp & self.mask
        };
    }
}

impl Cpu {
    fn check_target(&mut self, code: &Segment, offset: u64) -> Result<(), Fault> {
        let fine = if self.long_mode() && code.attributes.long() {
            canonical(offset)
        } else {
            offset <= u64::from(code.limit)
        };
        if fine { Ok(()) } else { Err(self.gp()) }
    }

    pub(super) fn selector_fault(&mut self, vector: u8, selector: u16) -> Fault {
        self.raise(vector, Some(u32::from(selector & 0xfffc)))
    }

    /// Checks the code segment that a far JMP or CALL names directly.
    fn direct_code_segment(&mut self, selector: u16, descriptor: Descriptor) -> Result<Segment, Fault> {
        let a = descriptor.attributes();
        let privileged = if a.conforming_or_down() {
            a.dpl() <= self.cpl
        } else {
            a.dpl() == self.cpl && (selector & 3) as u8 <= self.cpl
        };
        if !privileged || self.long_mode() && a.long() && a.big() {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !a.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        let descriptor = self.mark_accessed(selector, descriptor)?;
        Ok(descriptor.segment(selector & !3 | u16::from(self.cpl)))
    }

    /// Far JMP.
    pub(crate) fn far_jump(&mut self, selector: u16, offset: u64) -> Result<(), Fault> {
        if !self.protected() {
            self.load_real_segment(seg::CS, selector);
            self.set_rip(offset & 0xffff_ffff);
            return Ok(());
        }
        if selector & 0xfffc == 0 {
            return Err(self.gp());
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        if descriptor.attributes().is_code() {
            let code = self.direct_code_segment(selector, descriptor)?;
            self.check_target(&code, offset)?;
            self.segs[seg::CS] = code;
            self.set_rip(offset);
            self.update_mode();
            return Ok(());
        }
        let (gate, target, _) = self.call_gate(selector, descriptor)?;
        let descriptor = self.descriptor(gate, vector::GP)?;
        let a = descriptor.attributes();
        let privileged = if a.conforming_or_down() { a.dpl() <= self.cpl } else { a.dpl() == self.cpl };
        if !a.is_code() || !privileged {
            return Err(self.selector_fault(vector::GP, gate));
        }
        let code = self.direct_code_segment(gate & !3 | u16::from(self.cpl), descriptor)?;
        self.check_target(&code, target)?;
        self.segs[seg::CS] = code;
        self.set_rip(target);
        self.update_mode();
        Ok(())
    }

    /// Reads a call gate: selector, offset, and the size of what is pushed.
    fn call_gate(&mut self, selector: u16, gate: Descriptor) -> Result<(u16, u64, u64), Fault> {
        let a = gate.attributes();
        let wide = a.kind() == 12;
        if a.is_code_or_data() || !(wide || a.kind() == 4 && !self.long_mode()) {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if a.dpl() < self.cpl || a.dpl() < (selector & 3) as u8 {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !a.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        let mut offset = if wide { gate.gate_offset() } else { gate.gate_offset() & 0xffff };
        let mut size = if wide { 4 } else { 2 };
        if self.long_mode() {
            offset |= self.descriptor_high(selector)?;
            size = 8;
        }
        if gate.gate_selector() & 0xfffc == 0 {
            return Err(self.gp());
        }
        Ok((gate.gate_selector(), offset, size))
    }

    /// Far CALL; `size` is the operand size in bytes.
    pub(crate) fn far_call(&mut self, selector: u16, offset: u64, size: u64) -> Result<(), Fault> {
        let mut stack = Stack::current(self);
        let (old_cs, old_ip) = (u64::from(self.segs[seg::CS].selector), self.rip());
        if !self.protected() {
            stack.push(self, size, old_cs)?;
            stack.push(self, size, old_ip)?;
            stack.commit(self);
            self.load_real_segment(seg::CS, selector);
            self.set_rip(offset);
            return Ok(());
        }
        if selector & 0xfffc == 0 {
            return Err(self.gp());
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        if descriptor.attributes().is_code() {
            let code = self.direct_code_segment(selector, descriptor)?;
            self.check_target(&code, offset)?;
            stack.push(self, size, old_cs)?;
            stack.push(self, size, old_ip)?;
            stack.commit(self);
            self.segs[seg::CS] = code;
            self.set_rip(offset);
            self.update_mode();
            return Ok(());
        }
        let (target_selector, target, size) = self.call_gate(selector, descriptor)?;
        let parameters = if size == 8 { 0 } else { descriptor.0 >> 32 & 31 };
        let target_descriptor = self.descriptor(target_selector, vector::GP)?;
        let a = target_descriptor.attributes();
        if !a.is_code() || a.dpl() > self.cpl || self.long_mode() && !a.long() {
            return Err(self.selector_fault(vector::GP, target_selector));
        }
        if !a.present() {
            return Err(self.selector_fault(vector::NP, target_selector));
        }
        let cpl = if a.conforming_or_down() { self.cpl } else { a.dpl() };
        let code = self
            .mark_accessed(target_selector, target_descriptor)?
            .segment(target_selector & !3 | u16::from(cpl));
        self.check_target(&code, target)?;
        if cpl == self.cpl {
            stack.push(self, size, old_cs)?;
            stack.push(self, size, old_ip)?;
            stack.commit(self);
        } else {
            let (new_ss, sp) = if self.long_mode() {
                (super::segment::null_stack(u16::from(cpl), cpl), self.tss_stack_64(u64::from(cpl))?)
            } else {
                let (selector, sp) = self.tss_stack(cpl)?;
                (self.stack_segment(selector, cpl, vector::TS)?, sp)
            };
            let (old_ss, old_sp) = (u64::from(self.segs[seg::SS].selector), self.regs[4]);
            let mut copied = Vec::new();
            for _ in 0..parameters {
                copied.push(stack.pop(self, size)?);
            }
            let mask = match (self.long_mode(), new_ss.attributes.big()) {
                (true, _) => u64::MAX,
                (_, true) => 0xffff_ffff,
                _ => 0xffff,
            };
            let mut inner = Stack { base: new_ss.base, mask, sp, user: false };
            inner.push(self, size, old_ss)?;
            inner.push(self, size, old_sp)?;
            for value in copied.into_iter().rev() {
                inner.push(self, size, value)?;
            }
            inner.push(self, size, old_cs)?;
            inner.push(self, size, old_ip)?;
            self.segs[seg::SS] = new_ss;
            inner.commit(self);
        }
        self.segs[seg::CS] = code;
        self.cpl = cpl;
        self.set_rip(target);
        self.update_mode();
        Ok(())
    }

    /// Checks the code segment that a far return or IRET goes to.
    fn return_code_segment(&mut self, selector: u16) -> Result<Segment, Fault> {
        if selector & 0xfffc == 0 {
            return Err(self.gp());
        }
        let rpl = (selector & 3) as u8;
        let descriptor = self.descriptor(selector, vector::GP)?;
        let a = descriptor.attributes();
        let privileged =
            rpl >= self.cpl && if a.conforming_or_down() { a.dpl() <= rpl } else { a.dpl() == rpl };
        if !a.is_code() || !privileged || self.long_mode() && a.long() && a.big() {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !a.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        Ok(self.mark_accessed(selector, descriptor)?.segment(selector))
    }

    /// SS of the outer level of a far return or IRET.
    fn return_stack_segment(&mut self, selector: u16, code: &Segment) -> Result<Segment, Fault> {
        let rpl = (code.selector & 3) as u8;
        if selector & 0xfffc == 0 && self.long_mode() && code.attributes.long() && rpl != 3 {
            if (selector & 3) as u8 != rpl {
                return Err(self.gp());
            }
            return Ok(super::segment::null_stack(selector, rpl));
        }
        let was_64 = std::mem::replace(&mut self.code64, false);
        let result = self.stack_segment(selector, rpl, vector::GP);
        self.code64 = was_64;
        result
    }

    /// After a return to an outer level, data segments that it may not use become null.
    fn drop_inner_segments(&mut self) {
        for register in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let a = self.segs[register].attributes;
            let conforming = a.is_code() && a.conforming_or_down();
            if a.present() && !conforming && a.dpl() < self.cpl {
                self.segs[register] = Segment::default();
            }
        }
    }

    /// Far RET: `size` is the operand size, `release` the bytes of parameters.
    pub(crate) fn far_return(&mut self, size: u64, release: u64) -> Result<(), Fault> {
        let mut stack = Stack::current(self);
        let ip = stack.pop(self, size)?;
        let selector = stack.pop(self, size)? as u16;
        if !self.protected() {
            stack.sp = stack.sp.wrapping_add(release);
            stack.commit(self);
            self.load_real_segment(seg::CS, selector);
            self.set_rip(ip);
            return Ok(());
        }
        let code = self.return_code_segment(selector)?;
        self.check_target(&code, ip)?;
        stack.sp = stack.sp.wrapping_add(release);
        let rpl = (selector & 3) as u8;
        if rpl == self.cpl {
            stack.commit(self);
            self.segs[seg::CS] = code;
        } else {
            let sp = stack.pop(self, size)?;
            let ss = stack.pop(self, size)? as u16;
            let ss = self.return_stack_segment(ss, &code)?;
            self.segs[seg::SS] = ss;
            self.segs[seg::CS] = code;
            self.cpl = rpl;
            self.update_mode();
            let mut outer = Stack::current(self);
            outer.sp = sp.wrapping_add(release);
            outer.commit(self);
            self.drop_inner_segments();
        }
        self.set_rip(ip);
        self.update_mode();
        Ok(())
    }

    /// IRET with an operand size of 2, 4 or 8 bytes.
    pub(crate) fn interrupt_return(&mut self, size: u64) -> Result<(), Fault> {
        let mut stack = Stack::current(self);
        if !self.protected() {
            let ip = stack.pop(self, size)?;
            let cs = stack.pop(self, size)? as u16;
            let flags = stack.pop(self, size)?;
            stack.commit(self);
            self.load_real_segment(seg::CS, cs);
            self.set_rip(ip);
            let mask = if size == 2 { 0xffff } else { 0xffff | RF | AC | ID };
            self.write_flags(flags, mask & (STATUS | TF | IF | DF | IOPL | NT | RF | AC | ID));
            self.nmi_blocked = false;
            return Ok(());
        }
        if self.flags & NT != 0 {
            // A return to another task: there are none in long mode, and we have none at all.
            return Err(self.gp());
        }
        let ip = stack.pop(self, size)?;
        let cs = stack.pop(self, size)? as u16;
        let flags = stack.pop(self, size)?;
        if flags & VM != 0 && !self.long_mode() && self.cpl == 0 {
            tracing::warn!("Virtual-8086 mode is not implemented");
            return Err(self.gp());
        }
        let code = self.return_code_segment(cs)?;
        self.check_target(&code, ip)?;
        let rpl = (cs & 3) as u8;
        let old_cpl = self.cpl;
        if self.code64 || rpl != self.cpl {
            let sp = stack.pop(self, size)?;
            let ss = stack.pop(self, size)? as u16;
            let ss = self.return_stack_segment(ss, &code)?;
            self.segs[seg::SS] = ss;
            self.segs[seg::CS] = code;
            self.cpl = rpl;
            self.update_mode();
            let mut outer = Stack::current(self);
            outer.sp = sp;
            if outer.mask == 0xffff && size > 2 {
                self.regs[4] = sp;
            }
            outer.commit(self);
            if rpl != old_cpl {
                self.drop_inner_segments();
            }
        } else {
            stack.commit(self);
            self.segs[seg::CS] = code;
        }
        let mut mask = STATUS | TF | DF | NT;
        if size > 2 {
            // RF only matters while breakpoints are enabled, and only then is it cleared again in time.
            mask |= AC | ID | if self.dr[7] & 0xff != 0 { RF } else { 0 };
        }
        if old_cpl == 0 {
            mask |= IOPL;
        }
        if u64::from(old_cpl) <= (self.flags & IOPL) >> 12 {
            mask |= IF;
        }
        self.write_flags(flags, mask);
        self.set_rip(ip);
        self.nmi_blocked = false;
        self.update_mode();
        Ok(())
    }

    /// Replaces the bits of RFLAGS that `mask` selects.
    pub(crate) fn write_flags(&mut self, value: u64, mask: u64) {
        let old = self.rflags();
        self.set_rflags(old & !mask | value & mask);
        if (old ^ value) & mask & AC != 0 {
            self.update_mode();
        }
    }

    /// SYSCALL. For it and SYSRET it is the new value of TF that counts, for all other instructions the old one.
    pub(crate) fn syscall(&mut self) -> Result<(), Fault> {
        if self.efer & EFER_SCE == 0 {
            return Err(self.ud());
        }
        let cs = (self.msrs.star >> 32) as u16 & 0xfffc;
        if self.long_mode() {
            self.regs[1] = self.rip();
            self.regs[11] = self.rflags() & !RF;
            let target = if self.code64 { self.msrs.lstar } else { self.msrs.cstar };
            self.set_rip(target);
            let flags = self.rflags() & !self.msrs.sfmask & !RF;
            self.set_rflags(flags);
            self.segs[seg::CS] = flat_code(cs, 0, true);
        } else {
            self.regs[1] = self.rip();
            self.set_rip(self.msrs.star & 0xffff_ffff);
            self.flags &= !(IF | VM | RF);
            self.segs[seg::CS] = flat_code(cs, 0, false);
        }
        self.segs[seg::SS] = flat_stack(cs.wrapping_add(8), 0);
        self.cpl = 0;
        self.step = self.flags & TF != 0;
        self.update_mode();
        Ok(())
    }

    /// SYSRET; `wide` with an operand size of 64 bits.
    pub(crate) fn sysret(&mut self, wide: bool) -> Result<(), Fault> {
        if self.efer & EFER_SCE == 0 {
            return Err(self.ud());
        }
        if !self.protected() || self.cpl != 0 {
            return Err(self.gp());
        }
        let base = (self.msrs.star >> 48) as u16;
        let selector = if wide { base.wrapping_add(16) } else { base } | 3;
        if self.long_mode() {
            let flags = self.regs[11] & !(RF | VM) & 0x3f_7fd7;
            self.set_rflags(flags);
        } else {
            self.flags |= IF;
        }
        let target = if wide { self.regs[1] } else { self.regs[1] & 0xffff_ffff };
        self.segs[seg::CS] = flat_code(selector, 3, wide);
        self.segs[seg::SS] = flat_stack(base.wrapping_add(8) | 3, 3);
        self.cpl = 3;
        self.step = self.flags & TF != 0;
        self.set_rip(target);
        self.update_mode();
        Ok(())
    }

    /// SYSENTER, in legacy mode only, as AMD processors have it.
    pub(crate) fn sysenter(&mut self) -> Result<(), Fault> {
        if self.long_mode() {
            return Err(self.ud());
        }
        let cs = self.msrs.sysenter_cs as u16 & 0xfffc;
        if self.cr0 & CR0_PE == 0 || cs == 0 {
            return Err(self.gp());
        }
        self.flags &= !(VM | IF | RF);
        self.segs[seg::CS] = flat_code(cs, 0, false);
        self.segs[seg::SS] = flat_stack(cs.wrapping_add(8), 0);
        self.cpl = 0;
        self.set_rip(self.msrs.sysenter_eip & 0xffff_ffff);
        self.regs[4] = self.msrs.sysenter_esp & 0xffff_ffff;
        self.update_mode();
        Ok(())
    }

    /// SYSEXIT, in legacy mode only.
    pub(crate) fn sysexit(&mut self) -> Result<(), Fault> {
        if self.long_mode() {
            return Err(self.ud());
        }
        let cs = self.msrs.sysenter_cs as u16 & 0xfffc;
        if self.cr0 & CR0_PE == 0 || cs == 0 || self.cpl != 0 {
            return Err(self.gp());
        }
        self.segs[seg::CS] = flat_code(cs.wrapping_add(16) | 3, 3, false);
        self.segs[seg::SS] = flat_stack(cs.wrapping_add(24) | 3, 3);
        self.cpl = 3;
        self.set_rip(self.regs[2] & 0xffff_ffff);
        self.regs[4] = self.regs[1] & 0xffff_ffff;
        self.update_mode();
        Ok(())
    }
}

fn flat_code(selector: u16, dpl: u16, long: bool) -> Segment {
    let size = if long { 0xa000 } else { 0xc000 };
    Segment { selector, attributes: SegmentAttributes(0x9b | size | dpl << 5), limit: 0xffff_ffff, base: 0 }
}

fn flat_stack(selector: u16, dpl: u16) -> Segment {
    Segment { selector, attributes: SegmentAttributes(0xc093 | dpl << 5), limit: 0xffff_ffff, base: 0 }
}

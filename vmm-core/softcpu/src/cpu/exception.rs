//! Delivery of interrupts and exceptions (APM volume 2, chapter 8).

use super::flags::{AC, IF, NT, RF, TF, VM};
use super::segment::{Descriptor, canonical, null_stack};
use super::{Cpu, Exception, Fault, seg, vector};
use crate::block::op::RIP;
use crate::exit::Exit;
use crate::state::Segment;

/// Where an event comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// An exception, an interrupt or an NMI: exceptions while delivering it have EXT set in their error code.
    Event,
    /// INT n, INT3, INTO: the gate's DPL is checked.
    Software,
}

/// The bit of an error code that says so.
const EXT: u32 = 1;

const GATE_TASK: u8 = 5;

impl Cpu {
    /// Delivers an external interrupt or NMI.
    pub(super) fn deliver_external(&mut self, vector: u8) -> Option<Exit> {
        match self.interrupt(vector, None, Source::Event) {
            Ok(()) => None,
            Err(Fault) => self.deliver_nested(None),
        }
    }

    /// Delivers an exception whose handler has not run into trouble yet.
    pub(super) fn deliver_exception(&mut self, vector: u8, error: Option<u32>) -> Option<Exit> {
        match self.start_exception(vector, error) {
            Ok(()) => None,
            Err(Fault) => self.deliver_nested(Some(vector)),
        }
    }

    /// An exception occurred while delivering another event.
    fn deliver_nested(&mut self, mut first: Option<u8>) -> Option<Exit> {
        loop {
            // Delivery starts nothing over: all of it is an instruction that runs alone.
            let Some(Exception::Vector { mut vector, mut error }) = self.pending.take() else {
                return self.triple_fault();
            };
            if let Some(first) = first {
                if first == vector::DF {
                    return self.triple_fault();
                }
                let both_contributory = contributory(first) && contributory(vector);
                let after_page_fault = first == vector::PF && (vector == vector::PF || contributory(vector));
                if both_contributory || after_page_fault {
                    (vector, error) = (vector::DF, Some(0));
                }
            }
            match self.start_exception(vector, error) {
                Ok(()) => return None,
                Err(Fault) => first = Some(vector),
            }
        }
    }

    fn start_exception(&mut self, vector: u8, error: Option<u32>) -> Result<(), Fault> {
        if vector == vector::PF {
            self.cr2 = self.pending_cr2;
        }
        // Faults push RF set, so that an instruction breakpoint does not fire again on return.
        let trap = matches!(vector, vector::DB | vector::BP | vector::OF);
        let flags = self.flags;
        if !trap {
            self.flags |= RF;
        }
        let result = self.interrupt(vector, error, Source::Event);
        if result.is_err() {
            self.flags = flags;
        }
        result
    }

    /// Transfers control to the handler of a vector. On an error nothing has changed.
    pub(crate) fn interrupt(&mut self, vector: u8, error: Option<u32>, source: Source) -> Result<(), Fault> {
        let restarting = std::mem::replace(&mut self.restarting, true);
        let result = if self.long_mode() {
            self.interrupt_long(vector, error, source)
        } else if self.protected() {
            self.interrupt_protected(vector, error, source)
        } else {
            self.interrupt_real(vector)
        };
        self.restarting = restarting && result.is_err();
        match &mut self.pending {
            Some(Exception::Vector { vector, error: Some(error) })
                if result.is_err() && source == Source::Event && *vector != vector::PF =>
            {
                *error |= EXT;
            }
            _ => {}
        }
        // The handler's first instruction comes before any trap of the instruction that led to it.
        self.step &= result.is_err();
        result
    }

    fn interrupt_real(&mut self, vector: u8) -> Result<(), Fault> {
        let slot = u64::from(vector) * 4;
        if slot + 3 > u64::from(self.idtr.limit) {
            return Err(self.gp());
        }
        let entry = self.sys_read(self.idtr.base + slot, 4)?;
        let frame = [self.rflags() & 0xffff, u64::from(self.segs[seg::CS].selector), self.rip()];
        let ss = self.segs[seg::SS];
        let mut sp = self.regs[4];
        for value in frame {
            sp = sp.wrapping_sub(2);
            self.sys_write(ss.base + (sp & 0xffff), 2, value)?;
        }
        self.regs[4] = self.regs[4] & !0xffff | sp & 0xffff;
        self.flags &= !(IF | TF | AC | RF);
        self.load_real_segment(seg::CS, (entry >> 16) as u16);
        self.set_rip(entry & 0xffff);
        Ok(())
    }

    /// `#GP` and the like about an IDT entry.
    fn idt_error(&mut self, vector: u8, entry: u8) -> Fault {
        self.raise(vector, Some(u32::from(entry) << 3 | 2))
    }

    /// Checks the code segment of a gate; returns it and the new privilege level.
    fn gate_code_segment(&mut self, selector: u16) -> Result<(Segment, u8), Fault> {
        if selector & 0xfffc == 0 {
            return Err(self.gp());
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        let a = descriptor.attributes();
        let wrong_mode = self.long_mode() && (!a.long() || a.big());
        if !a.is_code() || a.dpl() > self.cpl || wrong_mode {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !a.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        let cpl = if a.conforming_or_down() { self.cpl } else { a.dpl() };
        let segment = self.mark_accessed(selector, descriptor)?.segment(selector & !3 | u16::from(cpl));
        Ok((segment, cpl))
    }

    fn interrupt_protected(&mut self, vector: u8, error: Option<u32>, source: Source) -> Result<(), Fault> {
        let slot = u64::from(vector) * 8;
        if slot + 7 > u64::from(self.idtr.limit) {
            return Err(self.idt_error(vector::GP, vector));
        }
        let gate = Descriptor(self.sys_read(self.idtr.base + slot, 8)?);
        let a = gate.attributes();
        let kind = a.kind();
        let known = !a.is_code_or_data() && matches!(kind, 6 | 7 | 14 | 15);
        if !known || source == Source::Software && a.dpl() < self.cpl {
            if kind == GATE_TASK {
                tracing::warn!(vector, "Task gates are not implemented");
            }
            return Err(self.idt_error(vector::GP, vector));
        }
        if !a.present() {
            return Err(self.idt_error(vector::NP, vector));
        }
        let size = if kind & 8 != 0 { 4 } else { 2 };
        let offset = if size == 4 { gate.gate_offset() } else { gate.gate_offset() & 0xffff };
        let (code, cpl) = self.gate_code_segment(gate.gate_selector())?;
        if offset > u64::from(code.limit) {
            return Err(self.gp());
        }
        let (old_ss, old_sp) = (self.segs[seg::SS].selector, self.regs[4]);
        let (stack, mut sp) = if cpl < self.cpl {
            let (selector, pointer) = self.tss_stack(cpl)?;
            (self.stack_segment(selector, cpl, vector::TS)?, pointer)
        } else {
            (self.segs[seg::SS], old_sp)
        };
        let mut frame = Vec::with_capacity(6);
        if cpl < self.cpl {
            frame.extend([u64::from(old_ss), old_sp]);
        }
        frame.extend([self.rflags(), u64::from(self.segs[seg::CS].selector), self.rip()]);
        frame.extend(error.map(u64::from));
        let mask = if stack.attributes.big() { 0xffff_ffff } else { 0xffff };
        for value in frame {
            sp = sp.wrapping_sub(size);
            self.store_slow((stack.base + (sp & mask)) & 0xffff_ffff, size, value, cpl == 3)?;
        }
        self.regs[4] = self.regs[4] & !mask | sp & mask;
        self.segs[seg::SS] = stack;
        self.segs[seg::CS] = code;
        self.cpl = cpl;
        self.set_rip(offset);
        self.enter_handler(kind);
        Ok(())
    }

    fn interrupt_long(&mut self, vector: u8, error: Option<u32>, source: Source) -> Result<(), Fault> {
        let slot = u64::from(vector) * 16;
        if slot + 15 > u64::from(self.idtr.limit) {
            return Err(self.idt_error(vector::GP, vector));
        }
        let gate = Descriptor(self.sys_read(self.idtr.base.wrapping_add(slot), 8)?);
        let high = self.sys_read(self.idtr.base.wrapping_add(slot + 8), 8)?;
        let a = gate.attributes();
        let known = !a.is_code_or_data() && matches!(a.kind(), 14 | 15);
        if !known || source == Source::Software && a.dpl() < self.cpl {
            return Err(self.idt_error(vector::GP, vector));
        }
        if !a.present() {
            return Err(self.idt_error(vector::NP, vector));
        }
        let (code, cpl) = self.gate_code_segment(gate.gate_selector())?;
        let target = gate.gate_offset() | high << 32;
        if !canonical(target) {
            return Err(self.gp());
        }
        let ist = gate.0 >> 32 & 7;
        let old_sp = self.regs[4];
        let new_sp = if ist != 0 {
            self.tss_stack_64(3 + ist)?
        } else if cpl < self.cpl {
            self.tss_stack_64(u64::from(cpl))?
        } else {
            old_sp
        };
        let sp = new_sp & !15;
        let frame = [
            u64::from(self.segs[seg::SS].selector),
            old_sp,
            self.rflags(),
            u64::from(self.segs[seg::CS].selector),
            self.regs[usize::from(RIP)],
        ];
        let user = cpl == 3;
        for (i, value) in frame.into_iter().enumerate() {
            let at = sp.wrapping_sub(8 * (i as u64 + 1));
            self.store_slow(at, 8, value, user).inspect_err(|_| self.stack_fault(true))?;
        }
        let mut top = sp.wrapping_sub(40);
        if let Some(error) = error {
            top = top.wrapping_sub(8);
            self.store_slow(top, 8, u64::from(error), user)?;
        }
        self.regs[4] = top;
        if cpl < self.cpl {
            self.segs[seg::SS] = null_stack(u16::from(cpl), cpl);
        }
        self.segs[seg::CS] = code;
        self.cpl = cpl;
        self.set_rip(target);
        self.enter_handler(a.kind());
        Ok(())
    }

    fn enter_handler(&mut self, gate: u8) {
        self.flags &= !(TF | NT | RF | VM);
        if gate & 1 == 0 {
            self.flags &= !IF;
        }
        self.update_mode();
    }
}

/// Exceptions that make a double fault of a second one.
fn contributory(vector: u8) -> bool {
    matches!(vector, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP)
}

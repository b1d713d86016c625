//! Descriptors and segment registers (APM volume 2, chapter 4).

use super::{Cpu, Fault, seg, vector};
use crate::state::{Segment, SegmentAttributes};

/// Table indicator: the selector refers to the LDT.
const TI: u16 = 4;
const ACCESSED: u64 = 1 << 40;

/// An eight-byte descriptor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Descriptor(pub u64);

impl Descriptor {
    pub fn attributes(self) -> SegmentAttributes {
        SegmentAttributes((self.0 >> 40) as u16 & 0xf0ff)
    }

    pub fn base(self) -> u64 {
        self.0 >> 16 & 0xff_ffff | self.0 >> 32 & 0xff00_0000
    }

    /// The highest offset in bytes.
    pub fn limit(self) -> u32 {
        let limit = (self.0 & 0xffff | self.0 >> 32 & 0xf_0000) as u32;
        if self.attributes().granular() { limit << 12 | 0xfff } else { limit }
    }

    pub fn segment(self, selector: u16) -> Segment {
        Segment { selector, attributes: self.attributes(), limit: self.limit(), base: self.base() }
    }

    /// Target offset of a call, interrupt or trap gate (low 32 bits).
    pub fn gate_offset(self) -> u64 {
        self.0 & 0xffff | self.0 >> 32 & 0xffff_0000
    }

    /// Target selector of a gate.
    pub fn gate_selector(self) -> u16 {
        (self.0 >> 16) as u16
    }
}

impl Cpu {
    /// Loads with supervisor privilege, as accesses to system tables do.
    pub(crate) fn sys_read(&mut self, address: u64, size: u64) -> Result<u64, Fault> {
        self.load_slow(address, size, false)
    }

    /// Stores with supervisor privilege.
    pub(crate) fn sys_write(&mut self, address: u64, size: u64, value: u64) -> Result<(), Fault> {
        self.store_slow(address, size, value, false)
    }

    /// Linear address of a descriptor; raises `vector` with the selector if it is beyond the table.
    pub(crate) fn descriptor_address(&mut self, selector: u16, size: u64, vector: u8) -> Result<u64, Fault> {
        let (base, limit) = if selector & TI != 0 {
            if !self.ldtr.attributes.present() {
                return Err(self.raise(vector, Some(u32::from(selector & 0xfffc))));
            }
            (self.ldtr.base, u64::from(self.ldtr.limit))
        } else {
            (self.gdtr.base, u64::from(self.gdtr.limit))
        };
        let offset = u64::from(selector & 0xfff8);
        if offset + size - 1 > limit {
            return Err(self.raise(vector, Some(u32::from(selector & 0xfffc))));
        }
        Ok(base.wrapping_add(offset))
    }

    /// Reads the descriptor that a selector refers to.
    pub(crate) fn descriptor(&mut self, selector: u16, vector: u8) -> Result<Descriptor, Fault> {
        let address = self.descriptor_address(selector, 8, vector)?;
        Ok(Descriptor(self.sys_read(address, 8)?))
    }

    /// Reads the upper half of a 16-byte system descriptor: the upper 32 bits of its base or offset.
    pub(crate) fn descriptor_high(&mut self, selector: u16) -> Result<u64, Fault> {
        let address = self.descriptor_address(selector, 16, vector::GP)?;
        let high = self.sys_read(address + 8, 8)?;
        if high >> 40 & 0x1f != 0 {
            return Err(self.raise(vector::GP, Some(u32::from(selector & 0xfffc))));
        }
        Ok(high << 32)
    }

    /// Sets the accessed bit of a code or data descriptor and returns the descriptor with it.
    pub(crate) fn mark_accessed(
        &mut self,
        selector: u16,
        descriptor: Descriptor,
    ) -> Result<Descriptor, Fault> {
        if descriptor.0 & ACCESSED == 0 {
            let address = self.descriptor_address(selector, 8, vector::GP)?;
            let kind = descriptor.0 >> 40 & 0xff | 1;
            self.sys_write(address + 5, 1, kind)?;
        }
        Ok(Descriptor(descriptor.0 | ACCESSED))
    }

    /// Loads a data segment register (not CS) as MOV, POP and LDS do.
    pub(crate) fn load_segment(&mut self, register: usize, selector: u16) -> Result<(), Fault> {
        if !self.protected() {
            self.load_real_segment(register, selector);
            return Ok(());
        }
        let segment = if register == seg::SS {
            self.stack_segment(selector, self.cpl, vector::GP)?
        } else {
            self.data_segment(selector)?
        };
        self.segs[register] = segment;
        self.update_mode();
        Ok(())
    }

    pub(crate) fn load_real_segment(&mut self, register: usize, selector: u16) {
        let segment = &mut self.segs[register];
        segment.selector = selector;
        segment.base = u64::from(selector) << 4;
        if register == seg::CS {
            segment.attributes = SegmentAttributes(0x9b);
            segment.limit = segment.limit.max(0xffff);
        }
        self.update_mode();
    }

    fn data_segment(&mut self, selector: u16) -> Result<Segment, Fault> {
        if selector & 0xfffc == 0 {
            // Null: unusable outside of 64-bit mode. AMD processors keep the base of FS and GS; clearing
            // it is what CPUID's "null selector clears base" announces.
            return Ok(Segment { selector, ..Segment::default() });
        }
        let code = Some(u32::from(selector & 0xfffc));
        let descriptor = self.descriptor(selector, vector::GP)?;
        let a = descriptor.attributes();
        let readable = a.is_code_or_data() && (!a.is_code() || a.writable_or_readable());
        let privileged =
            a.is_code() && a.conforming_or_down() || a.dpl() >= (selector & 3) as u8 && a.dpl() >= self.cpl;
        if !readable || !privileged {
            return Err(self.raise(vector::GP, code));
        }
        if !a.present() {
            return Err(self.raise(vector::NP, code));
        }
        Ok(self.mark_accessed(selector, descriptor)?.segment(selector))
    }

    /// Reads and checks a stack segment for a privilege level; `error` is `#GP` or, when the selector comes
    /// from a TSS, `#TS`.
    pub(crate) fn stack_segment(&mut self, selector: u16, cpl: u8, error: u8) -> Result<Segment, Fault> {
        let code = Some(u32::from(selector & 0xfffc));
        if selector & 0xfffc == 0 {
            let allowed = self.code64 && cpl < 3 && (selector & 3) as u8 == cpl;
            if !allowed {
                return Err(self.raise(error, Some(0)));
            }
            return Ok(null_stack(selector, cpl));
        }
        let descriptor = self.descriptor(selector, error)?;
        let a = descriptor.attributes();
        let writable = a.is_code_or_data() && !a.is_code() && a.writable_or_readable();
        if !writable || a.dpl() != cpl || (selector & 3) as u8 != cpl {
            return Err(self.raise(error, code));
        }
        if !a.present() {
            return Err(self.raise(vector::SS, code));
        }
        Ok(self.mark_accessed(selector, descriptor)?.segment(selector))
    }

    /// LLDT.
    pub(crate) fn load_ldt(&mut self, selector: u16) -> Result<(), Fault> {
        if selector & 0xfffc == 0 {
            self.ldtr = Segment { selector, ..Segment::default() };
            return Ok(());
        }
        let mut segment = self.system_segment(selector, 2)?;
        segment.selector = selector;
        self.ldtr = segment;
        Ok(())
    }

    /// LTR: the TSS becomes busy.
    pub(crate) fn load_task(&mut self, selector: u16) -> Result<(), Fault> {
        if selector & 0xfffc == 0 {
            return Err(self.gp());
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        let kind = descriptor.attributes().kind();
        if kind == 1 && self.long_mode() {
            return Err(self.raise(vector::GP, Some(u32::from(selector & 0xfffc))));
        }
        let mut segment = self.system_segment(selector, if kind == 1 { 1 } else { 9 })?;
        let address = self.descriptor_address(selector, 8, vector::GP)?;
        self.sys_write(address + 5, 1, descriptor.0 >> 40 & 0xff | 2)?;
        segment.attributes.0 |= 2;
        self.tr = segment;
        Ok(())
    }

    fn system_segment(&mut self, selector: u16, kind: u8) -> Result<Segment, Fault> {
        let code = Some(u32::from(selector & 0xfffc));
        if selector & TI != 0 {
            return Err(self.raise(vector::GP, code));
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        let a = descriptor.attributes();
        if a.is_code_or_data() || a.kind() != kind {
            return Err(self.raise(vector::GP, code));
        }
        if !a.present() {
            return Err(self.raise(vector::NP, code));
        }
        let mut segment = descriptor.segment(selector);
        if self.long_mode() {
            segment.base |= self.descriptor_high(selector)?;
        }
        Ok(segment)
    }

    /// Stack pointer of privilege level `cpl` and its selector from the current TSS (not in long mode).
    pub(crate) fn tss_stack(&mut self, cpl: u8) -> Result<(u16, u64), Fault> {
        let wide = self.tr.attributes.kind() & 8 != 0;
        let size = if wide { 4 } else { 2 };
        let offset = if wide { 4 + 8 * u64::from(cpl) } else { 2 + 4 * u64::from(cpl) };
        if offset + 2 * size - 1 > u64::from(self.tr.limit) {
            let selector = u32::from(self.tr.selector & 0xfffc);
            return Err(self.raise(vector::TS, Some(selector)));
        }
        let pointer = self.sys_read(self.tr.base + offset, size)?;
        let selector = self.sys_read(self.tr.base + offset + size, 2)?;
        Ok((selector as u16, pointer))
    }

    /// An eight-byte stack pointer from the 64-bit TSS: RSP0 to RSP2 (`index` 0 to 2), IST1 to IST7
    /// (`index` 4 to 10).
    pub(crate) fn tss_stack_64(&mut self, index: u64) -> Result<u64, Fault> {
        let offset = 4 + 8 * index;
        if offset + 7 > u64::from(self.tr.limit) {
            let selector = u32::from(self.tr.selector & 0xfffc);
            return Err(self.raise(vector::TS, Some(selector)));
        }
        let pointer = self.sys_read(self.tr.base.wrapping_add(offset), 8)?;
        if !canonical(pointer) {
            return Err(self.raise(vector::SS, Some(0)));
        }
        Ok(pointer)
    }

    /// Whether the I/O permission bitmap allows access to ports at CPL > IOPL.
    pub(crate) fn check_io(&mut self, port: u16, size: u64) -> Result<(), Fault> {
        let iopl = (self.flags & super::flags::IOPL) >> 12;
        if !self.protected() || u64::from(self.cpl) <= iopl {
            return Ok(());
        }
        let limit = u64::from(self.tr.limit);
        if !self.tr.attributes.present() || self.tr.attributes.kind() & 8 == 0 || limit < 103 {
            return Err(self.gp());
        }
        let map = self.sys_read(self.tr.base + 102, 2)?;
        let byte = map + u64::from(port) / 8;
        if byte + 1 > limit {
            return Err(self.gp());
        }
        let bits = self.sys_read(self.tr.base + byte, 2)? >> (port % 8);
        if bits & ((1 << size) - 1) != 0 {
            return Err(self.gp());
        }
        Ok(())
    }
}

/// SS after a switch to an inner privilege level in long mode.
pub(crate) fn null_stack(selector: u16, cpl: u8) -> Segment {
    Segment {
        selector,
        attributes: SegmentAttributes(0xc093 | u16::from(cpl) << 5),
        limit: 0xffff_ffff,
        base: 0,
    }
}

/// Bits 63:47 are all equal.
#[inline(always)]
pub(crate) fn canonical(address: u64) -> bool {
    ((address as i64) << 16 >> 16) as u64 == address
}

//! String instructions, with bulk copies and fills where that makes no difference.

use iced_x86::{Instruction, OpKind, Register};

use super::operand::segment_number;
use super::width::Width;
use crate::cpu::flags::{DF, Kind, TF};
use crate::cpu::{Cpu, Fault, seg};
use crate::mmu::walk::Access;
use crate::mmu::{Target, host};

/// Bytes copied or filled in bulk after which a repeated instruction lets the run loop look for events.
const MAX_BYTES: u64 = 128 << 10;
/// Bytes in bulk that an element by itself stands for: it can be an access to a device.
const ELEMENT: u64 = 128;

/// What a string instruction needs to know.
#[derive(Clone, Copy)]
struct Shape {
    /// Element size in bytes.
    size: u64,
    /// Address mask.
    mask: u64,
    /// Segment of the source.
    source: usize,
    /// Element step, negative if DF is set.
    step: u64,
    repeat: Repeat,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeat {
    Once,
    /// REP and REPE.
    Equal,
    NotEqual,
}

impl Shape {
    fn new(cpu: &Cpu, instruction: &Instruction, size: u64) -> Self {
        let kinds = [instruction.op0_kind(), instruction.op1_kind()];
        let mask = if kinds.iter().any(|k| matches!(k, OpKind::MemorySegSI | OpKind::MemoryESDI)) {
            0xffff
        } else if kinds.iter().any(|k| matches!(k, OpKind::MemorySegESI | OpKind::MemoryESEDI)) {
            0xffff_ffff
        } else {
            u64::MAX
        };
        let source = match instruction.memory_segment() {
            Register::None => seg::DS,
            s => segment_number(s),
        };
        let repeat = if instruction.has_repne_prefix() {
            Repeat::NotEqual
        } else if instruction.has_rep_prefix() {
            Repeat::Equal
        } else {
            Repeat::Once
        };
        let step = if cpu.flags & DF != 0 { size.wrapping_neg() } else { size };
        Self { size, mask, source, step, repeat }
    }

    fn get(&self, cpu: &Cpu, register: usize) -> u64 {
        cpu.regs[register] & self.mask
    }

    fn add(&self, cpu: &mut Cpu, register: usize, by: u64) {
        let value = cpu.regs[register].wrapping_add(by);
        cpu.regs[register] = match self.mask {
            0xffff => cpu.regs[register] & !0xffff | value & 0xffff,
            mask => value & mask,
        };
    }

    /// Elements to process.
    fn count(&self, cpu: &Cpu) -> u64 {
        if self.repeat == Repeat::Once { 1 } else { self.get(cpu, RCX) }
    }

    fn take(&self, cpu: &mut Cpu, elements: u64) {
        if self.repeat != Repeat::Once {
            self.add(cpu, RCX, elements.wrapping_neg());
        }
    }

    fn source(&self, cpu: &mut Cpu) -> Result<u64, Fault> {
        cpu.segment_address(self.source, self.get(cpu, RSI), self.size, false)
    }

    fn destination(&self, cpu: &mut Cpu, write: bool) -> Result<u64, Fault> {
        cpu.segment_address(seg::ES, self.get(cpu, RDI), self.size, write)
    }

    /// Elements that can be processed at once: upwards, within the page and segment of each address.
    fn bulk(&self, cpu: &mut Cpu, count: u64, addresses: &[(usize, usize, bool)]) -> u64 {
        if self.step != self.size || cpu.watching {
            return 0;
        }
        let mut n = count;
        for &(segment, register, write) in addresses {
            let offset = self.get(cpu, register);
            let Ok(linear) = cpu.segment_address(segment, offset, self.size, write) else {
                cpu.pending = None;
                return 0;
            };
            n = n.min((4096 - (linear & 4095)) / self.size);
            n = n.min((self.mask - offset) / self.size);
            if n > 1 && cpu.segment_address(segment, offset, n * self.size, write).is_err() {
                cpu.pending = None;
                return 0;
            }
        }
        n
    }
}

const RCX: usize = 1;
const RSI: usize = 6;
const RDI: usize = 7;

impl Cpu {
    /// Repeats from the start of the instruction: some elements are left.
    fn repeat_again(&mut self, instruction: &Instruction) {
        let start = self.block_start.wrapping_add(instruction.ip());
        self.set_rip(start & self.rip_mask);
    }

    fn resolve(&mut self, address: u64, size: u64, access: Access) -> Result<Option<u64>, Fault> {
        let address = self.wrap(address);
        match self.translate(address, size, access, self.user != 0)? {
            Target::Host(host) => Ok(Some(host)),
            Target::Device(_) => Ok(None),
        }
    }
}

/// Calls the instance of a function for an element size.
macro_rules! by_size {
    ($size:expr, $f:ident ( $($arg:expr),* )) => {
        match $size {
            1 => $f::<u8>($($arg),*),
            2 => $f::<u16>($($arg),*),
            4 => $f::<u32>($($arg),*),
            _ => $f::<u64>($($arg),*),
        }
    };
}

/// Runs `element` for each element, `bulk` for as many as possible.
fn repeat(
    cpu: &mut Cpu,
    instruction: &Instruction,
    shape: Shape,
    mut bulk: impl FnMut(&mut Cpu, &Shape, u64) -> Result<u64, Fault>,
    mut element: impl FnMut(&mut Cpu, &Shape) -> Result<bool, Fault>,
) -> Result<(), Fault> {
    let mut work = 0;
    // Single steps stop after each element.
    let stepping = cpu.flags & TF != 0;
    loop {
        let count = shape.count(cpu);
        if count == 0 {
            return Ok(());
        }
        let done = if count > 2 && !stepping { bulk(cpu, &shape, count)? } else { 0 };
        let mut stop = false;
        if done == 0 {
            stop = element(cpu, &shape)?;
            shape.take(cpu, 1);
            work += ELEMENT;
        } else {
            shape.take(cpu, done);
            work += done * shape.size;
        }
        if shape.repeat == Repeat::Once || stop {
            return Ok(());
        }
        let trap = stepping || cpu.data_hits != 0 || cpu.watched.is_some();
        if trap || work >= MAX_BYTES || cpu.handle.peek() != 0 {
            if shape.count(cpu) != 0 {
                cpu.repeat_again(instruction);
            }
            return Ok(());
        }
    }
}

pub(crate) fn movs(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let shape = Shape::new(cpu, instruction, instruction.memory_size().size() as u64);
    let bulk = |cpu: &mut Cpu, s: &Shape, count| {
        let n = s.bulk(cpu, count, &[(s.source, RSI, false), (seg::ES, RDI, true)]);
        if n < 2 {
            return Ok(0);
        }
        let bytes = n * s.size;
        let from = s.source(cpu)?;
        let to = s.destination(cpu, true)?;
        let Some(from) = cpu.resolve(from, bytes, Access::Read)? else { return Ok(0) };
        let Some(to) = cpu.resolve(to, bytes, Access::Write)? else { return Ok(0) };
        if to.wrapping_sub(from).wrapping_sub(1) < bytes - 1 {
            // The copy reads what it has written: element by element.
            return Ok(0);
        }
        // SAFETY: both translations are of mapped regions, and each range is within one page.
        unsafe { host::copy(to, from, bytes as usize) };
        s.add(cpu, RSI, bytes);
        s.add(cpu, RDI, bytes);
        Ok(n)
    };
    let element = |cpu: &mut Cpu, s: &Shape| {
        let from = s.source(cpu)?;
        let value = cpu.load(from, s.size)?;
        let to = s.destination(cpu, true)?;
        cpu.store(to, s.size, value)?;
        s.add(cpu, RSI, s.step);
        s.add(cpu, RDI, s.step);
        Ok(false)
    };
    repeat(cpu, instruction, shape, bulk, element)
}

pub(crate) fn stos(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let shape = Shape::new(cpu, instruction, instruction.memory_size().size() as u64);
    let bulk = |cpu: &mut Cpu, s: &Shape, count| {
        let n = s.bulk(cpu, count, &[(seg::ES, RDI, true)]);
        if n < 2 {
            return Ok(0);
        }
        let to = s.destination(cpu, true)?;
        let Some(to) = cpu.resolve(to, n * s.size, Access::Write)? else { return Ok(0) };
        // SAFETY: the translation is of a mapped region, and the range is within one page.
        unsafe { host::fill(to, s.size, cpu.regs[0], n as usize) };
        s.add(cpu, RDI, n * s.size);
        Ok(n)
    };
    let element = |cpu: &mut Cpu, s: &Shape| {
        let to = s.destination(cpu, true)?;
        cpu.store(to, s.size, cpu.regs[0])?;
        s.add(cpu, RDI, s.step);
        Ok(false)
    };
    repeat(cpu, instruction, shape, bulk, element)
}

pub(crate) fn lods(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let shape = Shape::new(cpu, instruction, instruction.memory_size().size() as u64);
    let element = |cpu: &mut Cpu, s: &Shape| {
        let from = s.source(cpu)?;
        let value = cpu.load(from, s.size)?;
        by_size!(s.size, set_accumulator(cpu, value));
        s.add(cpu, RSI, s.step);
        Ok(false)
    };
    repeat(cpu, instruction, shape, |_, _, _| Ok(0), element)
}

fn set_accumulator<T: Width>(cpu: &mut Cpu, value: u64) {
    T::set(cpu, 0, value);
}

/// Sets the flags of `a - b`; returns whether a repeated instruction stops.
fn compare<T: Width>(cpu: &mut Cpu, a: u64, b: u64, repeat: Repeat) -> bool {
    let (a, b) = (T::zx(a), T::zx(b));
    cpu.set_lazy::<T>(Kind::Sub, a.wrapping_sub(b), b);
    (a == b) == (repeat == Repeat::NotEqual)
}

pub(crate) fn cmps(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let shape = Shape::new(cpu, instruction, instruction.memory_size().size() as u64);
    let element = |cpu: &mut Cpu, s: &Shape| {
        let from = s.source(cpu)?;
        let a = cpu.load(from, s.size)?;
        let to = s.destination(cpu, false)?;
        let b = cpu.load(to, s.size)?;
        s.add(cpu, RSI, s.step);
        s.add(cpu, RDI, s.step);
        Ok(by_size!(s.size, compare(cpu, a, b, s.repeat)))
    };
    repeat(cpu, instruction, shape, |_, _, _| Ok(0), element)
}

pub(crate) fn scas(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let shape = Shape::new(cpu, instruction, instruction.memory_size().size() as u64);
    let element = |cpu: &mut Cpu, s: &Shape| {
        let to = s.destination(cpu, false)?;
        let b = cpu.load(to, s.size)?;
        let a = cpu.regs[0];
        s.add(cpu, RDI, s.step);
        Ok(by_size!(s.size, compare(cpu, a, b, s.repeat)))
    };
    repeat(cpu, instruction, shape, |_, _, _| Ok(0), element)
}

pub(crate) fn ins(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let shape = Shape::new(cpu, instruction, instruction.memory_size().size() as u64);
    let port = cpu.regs[2] as u16;
    cpu.check_io(port, shape.size)?;
    let element = |cpu: &mut Cpu, s: &Shape| {
        let to = s.destination(cpu, true)?;
        cpu.probe_write(to, s.size)?;
        let value = cpu.port_read(port, s.size);
        cpu.store(to, s.size, value)?;
        s.add(cpu, RDI, s.step);
        Ok(false)
    };
    repeat(cpu, instruction, shape, |_, _, _| Ok(0), element)
}

pub(crate) fn outs(cpu: &mut Cpu, instruction: &Instruction) -> Result<(), Fault> {
    let shape = Shape::new(cpu, instruction, instruction.memory_size().size() as u64);
    let port = cpu.regs[2] as u16;
    cpu.check_io(port, shape.size)?;
    let element = |cpu: &mut Cpu, s: &Shape| {
        let from = s.source(cpu)?;
        let value = cpu.load(from, s.size)?;
        cpu.port_write(port, s.size, value);
        s.add(cpu, RSI, s.step);
        Ok(false)
    };
    repeat(cpu, instruction, shape, |_, _, _| Ok(0), element)
}

//! Memory accesses of the processor: from linear addresses to host memory or the bus.

pub(crate) mod host;
pub(crate) mod tlb;
pub(crate) mod walk;

use tlb::{Entry, Info, SLOW, index};
use walk::Access;

use crate::block::op::{Handler, OpPtr, apart, fault};
use crate::cpu::{Cpu, Exception, Fault, mode, vector};
use crate::memory::PAGE_SIZE;
use crate::ops::width::Width;

const OFFSET: u64 = PAGE_SIZE - 1;

/// Where a linear address leads.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    /// Host address of RAM or ROM that may be accessed directly.
    Host(u64),
    /// Guest-physical address for the bus or the local APIC.
    Device(u64),
}

/// Which accesses a variant of a handler can make.
///
/// A call in the middle of a handler makes the compiler save registers before it looks at the TLB. So the
/// hottest handlers exist twice: the [`Fast`] one ends with a jump to the [`General`] one when it cannot go on,
/// which starts the instruction over. Until then it must not have changed anything.
pub(crate) trait Reach: 'static {
    fn ld<T: Width>(cpu: &mut Cpu, address: u64) -> Result<u64, Fault>;
    fn st<T: Width>(cpu: &mut Cpu, address: u64, value: u64) -> Result<(), Fault>;
    /// Goes on after a failure: with `general`, or with the exception that is pending.
    fn failed(cpu: &mut Cpu, op: OpPtr, general: Handler) -> OpPtr;
}

/// What the TLB knows.
pub(crate) struct Fast;
/// Everything.
pub(crate) struct General;

impl Reach for Fast {
    #[inline(always)]
    fn ld<T: Width>(cpu: &mut Cpu, address: u64) -> Result<u64, Fault> {
        // SAFETY: the TLB holds translations of mapped regions only.
        cpu.read_host::<T>(address).map(|host| unsafe { host::load(host, T::BYTES) }).ok_or(Fault)
    }
    #[inline(always)]
    fn st<T: Width>(cpu: &mut Cpu, address: u64, value: u64) -> Result<(), Fault> {
        // SAFETY: as above.
        cpu.write_host::<T>(address).map(|host| unsafe { host::store(host, T::BYTES, value) }).ok_or(Fault)
    }
    #[inline(always)]
    fn failed(cpu: &mut Cpu, op: OpPtr, general: Handler) -> OpPtr {
        // Inlined it would make this handler save registers after all.
        apart(general)(cpu, op)
    }
}

impl Reach for General {
    #[inline(always)]
    fn ld<T: Width>(cpu: &mut Cpu, address: u64) -> Result<u64, Fault> {
        cpu.ld::<T>(address)
    }
    #[inline(always)]
    fn st<T: Width>(cpu: &mut Cpu, address: u64, value: u64) -> Result<(), Fault> {
        cpu.st::<T>(address, value)
    }
    #[inline(always)]
    fn failed(cpu: &mut Cpu, op: OpPtr, _general: Handler) -> OpPtr {
        fault(cpu, op)
    }
}

/// Unwraps the result of an access of [`Reach`] `$r`, or goes on with the handler's general variant.
macro_rules! reach {
    ($r:ident, $cpu:expr, $op:expr, $result:expr, $general:expr) => {
        match $result {
            Ok(value) => value,
            Err($crate::cpu::Fault) => return $r::failed($cpu, $op, $general),
        }
    };
}

pub(crate) use reach;

impl Cpu {
    /// Loads at a linear address with the current privilege.
    #[inline(always)]
    pub(crate) fn ld<T: Width>(&mut self, address: u64) -> Result<u64, Fault> {
        match self.read_host::<T>(address) {
            // SAFETY: the TLB holds translations of mapped regions only.
            Some(host) => Ok(unsafe { host::load(host, T::BYTES) }),
            None => self.load_slow(address, T::BYTES, self.user != 0),
        }
    }

    /// Stores at a linear address with the current privilege.
    #[inline(always)]
    pub(crate) fn st<T: Width>(&mut self, address: u64, value: u64) -> Result<(), Fault> {
        match self.write_host::<T>(address) {
            Some(host) => {
                // SAFETY: the TLB holds translations of mapped regions only.
                unsafe { host::store(host, T::BYTES, value) };
                Ok(())
            }
            None => self.store_slow(address, T::BYTES, value, self.user != 0),
        }
    }

    /// Host address of a readable operand that the TLB knows and that is within one page.
    #[inline(always)]
    pub(crate) fn read_host<T: Width>(&self, address: u64) -> Option<u64> {
        let entry = self.entry(address);
        let last = address.wrapping_add(T::BYTES - 1);
        (entry.read == last & !OFFSET).then(|| address.wrapping_add(entry.addend))
    }

    /// The same for a writable operand.
    #[inline(always)]
    pub(crate) fn write_host<T: Width>(&self, address: u64) -> Option<u64> {
        let entry = self.entry(address);
        let last = address.wrapping_add(T::BYTES - 1);
        (entry.write == last & !OFFSET).then(|| address.wrapping_add(entry.addend))
    }

    /// Host address of two adjacent operands of eight bytes that are in one page, readable or writable.
    #[inline(always)]
    pub(crate) fn pair_host(&self, address: u64, write: bool) -> Option<u64> {
        let entry = self.entry(address);
        let known = if write { entry.write } else { entry.read };
        (known == address.wrapping_add(15) & !OFFSET).then(|| address.wrapping_add(entry.addend))
    }

    /// Host address of `size` bytes that the TLB knows to be readable, or writable, and that are within one
    /// page.
    #[inline(always)]
    pub(crate) fn host_range(&self, address: u64, size: u64, write: bool) -> Option<u64> {
        let entry = self.entry(address);
        let known = if write { entry.write } else { entry.read };
        let last = address.wrapping_add(size - 1);
        (known == address & !OFFSET && known == last & !OFFSET).then(|| address.wrapping_add(entry.addend))
    }

    #[inline(always)]
    fn entry(&self, address: u64) -> &Entry {
        // SAFETY: `table` points to the first of `ENTRIES` entries of the TLB that the processor owns.
        unsafe { &*self.table.add(index(address, 0)) }
    }

    /// Reads up to eight bytes with an explicit privilege.
    #[cold]
    #[inline(never)]
    pub(crate) fn load_slow(&mut self, address: u64, size: u64, user: bool) -> Result<u64, Fault> {
        let address = self.wrap(address);
        self.check_alignment(address, size, user)?;
        if self.watching {
            self.watch(address, size, false);
        }
        let first = PAGE_SIZE - (address & OFFSET);
        if first >= size {
            let target = self.translate(address, size, Access::Read, user)?;
            return Ok(self.read_target(target, size));
        }
        let low = self.translate(address, first, Access::Read, user)?;
        let high = self.translate(self.wrap(address + first), size - first, Access::Read, user)?;
        Ok(self.read_pieces(low, first) | self.read_pieces(high, size - first) << (8 * first))
    }

    /// Writes up to eight bytes with an explicit privilege.
    #[cold]
    #[inline(never)]
    pub(crate) fn store_slow(
        &mut self,
        address: u64,
        size: u64,
        value: u64,
        user: bool,
    ) -> Result<(), Fault> {
        let address = self.wrap(address);
        self.check_alignment(address, size, user)?;
        let first = PAGE_SIZE - (address & OFFSET);
        if first >= size {
            let target = self.translate(address, size, Access::Write, user)?;
            if self.watching {
                self.watch(address, size, true);
            }
            self.write_target(target, size, value);
            return Ok(());
        }
        let low = self.translate(address, first, Access::Write, user)?;
        let high = self.translate(self.wrap(address + first), size - first, Access::Write, user)?;
        if self.watching {
            self.watch(address, size, true);
        }
        self.write_pieces(low, first, value);
        self.write_pieces(high, size - first, value >> (8 * first));
        Ok(())
    }

    /// `#AC` at CPL 3 if CR0.AM and RFLAGS.AC ask for it.
    fn check_alignment(&mut self, address: u64, size: u64, user: bool) -> Result<(), Fault> {
        if self.alignment && user && size.is_power_of_two() && !address.is_multiple_of(size) {
            return Err(self.raise(vector::AC, Some(0)));
        }
        Ok(())
    }

    /// Checks that `size` bytes can be written, before something else of the instruction takes effect.
    pub(crate) fn probe_write(&mut self, address: u64, size: u64) -> Result<(), Fault> {
        let (address, user) = (self.wrap(address), self.user != 0);
        let first = (PAGE_SIZE - (address & OFFSET)).min(size);
        self.translate(address, first, Access::Write, user)?;
        if first < size {
            self.translate(self.wrap(address + first), size - first, Access::Write, user)?;
        }
        Ok(())
    }

    /// Linear addresses outside of 64-bit mode have 32 bits.
    #[inline]
    pub(crate) fn wrap(&self, address: u64) -> u64 {
        if self.code64 || self.long_mode() { address } else { address & 0xffff_ffff }
    }

    /// Finds where an access within one page leads, fills the TLB, and does what has to precede a write:
    /// dirty tracking and invalidation of decoded code.
    pub(crate) fn translate(
        &mut self,
        address: u64,
        size: u64,
        access: Access,
        user: bool,
    ) -> Result<Target, Fault> {
        let at = index(address, usize::from(user));
        let linear_page = address & !OFFSET;
        let entry = self.tlb.entries[at];
        let known = match access {
            Access::Read => entry.read == linear_page,
            Access::Write => entry.write & !SLOW == linear_page,
            Access::Execute => entry.exec == linear_page,
        };
        if known && (access != Access::Write || entry.write == linear_page) {
            return Ok(Target::Host(address.wrapping_add(entry.addend)));
        }
        if !known {
            if self.long_mode() && (address as i64) << 16 >> 16 != address as i64 {
                self.non_canonical = true;
                return Err(self.raise(vector::GP, Some(0)));
            }
            let found = self.walk(address, access, user)?;
            let gpa = found.page | address & OFFSET;
            let Some(host_page) = self.ram(found.page) else { return self.device_target(gpa) };
            let tag = |allowed: bool, flag: u64| if allowed { linear_page | flag } else { u64::MAX };
            let new = Entry {
                read: linear_page,
                write: tag(found.writable, SLOW),
                exec: tag(found.executable, 0),
                addend: host_page.wrapping_sub(linear_page),
            };
            let info = Info { page: found.page, global: found.global, large: found.large };
            self.tlb.fill(at, new, info);
            if access != Access::Write {
                self.allow_fast_write(at);
                return Ok(Target::Host(address.wrapping_add(new.addend)));
            }
        }
        let gpa = self.tlb.info[at].page | address & OFFSET;
        let Some((region, host)) = self.find_ram(gpa) else { return self.device_target(gpa) };
        if region.readonly {
            return self.device_target(gpa);
        }
        if self.memory.dirty_tracking() {
            region.set_dirty(gpa);
        }
        if self.memory.invalidate_code(&region, gpa, size, Some(&self.member)) {
            self.blocks.invalidate_page(gpa & !OFFSET);
            if !self.restarting {
                // The rest of the current block may be stale: run this instruction again on its own.
                self.pending = Some(Exception::Restart);
                return Err(Fault);
            }
        }
        self.allow_fast_write(at);
        Ok(Target::Host(host))
    }

    /// A device access. In deterministic mode it has to happen at an exact time: the instruction runs alone.
    fn device_target(&mut self, gpa: u64) -> Result<Target, Fault> {
        let alone = self.restarting || self.mode & mode::SINGLE != 0;
        if self.config.clock.is_deterministic() && !alone {
            self.pending = Some(Exception::Restart);
            return Err(Fault);
        }
        Ok(Target::Device(gpa))
    }

    /// Lets writes through this TLB entry bypass the slow path if nobody has to know about them.
    fn allow_fast_write(&mut self, at: usize) {
        let page = self.tlb.info[at].page;
        let Some(region) = self.map.find(page) else { return };
        let fast = !region.readonly
            && region.page(page).code.load(std::sync::atomic::Ordering::SeqCst) == 0
            && (!self.memory.dirty_tracking() || region.is_dirty(page));
        let entry = &mut self.tlb.entries[at];
        if fast && entry.write != u64::MAX {
            entry.write &= !SLOW;
        }
    }

    fn read_target(&mut self, target: Target, size: u64) -> u64 {
        match target {
            Target::Host(_) if !size.is_power_of_two() => self.read_pieces(target, size),
            // SAFETY: `translate` found a mapped region, and the access is within one page.
            Target::Host(host) => unsafe { host::load(host, size) },
            Target::Device(gpa) => {
                let mut data = [0xff; 8];
                self.device_read(gpa, &mut data[..size as usize]);
                u64::from_le_bytes(data) & (u64::MAX >> (64 - 8 * size))
            }
        }
    }

    fn write_target(&mut self, target: Target, size: u64, value: u64) {
        match target {
            Target::Host(_) if !size.is_power_of_two() => self.write_pieces(target, size, value),
            // SAFETY: `translate` found a mapped, writable region, and the access is within one page.
            Target::Host(host) => unsafe { host::store(host, size, value) },
            Target::Device(gpa) => self.device_write(gpa, &value.to_le_bytes()[..size as usize]),
        }
    }

    /// Reads a part of an access that crosses pages, of any size below eight.
    fn read_pieces(&mut self, target: Target, size: u64) -> u64 {
        (0..size).fold(0, |value, i| value | self.read_target(target.at(i), 1) << (8 * i))
    }

    fn write_pieces(&mut self, target: Target, size: u64, value: u64) {
        for i in 0..size {
            self.write_target(target.at(i), 1, value >> (8 * i));
        }
    }

    fn device_read(&mut self, gpa: u64, data: &mut [u8]) {
        self.resident.settle(&mut self.fpu);
        if self.apic_page == Some(gpa & !OFFSET) {
            let tsc = self.tsc_now();
            self.local.mmio_read((gpa & OFFSET) as u32, data, tsc);
            return;
        }
        let (bus, index) = (self.bus.clone(), self.config.index);
        self.outside(|| bus.mmio_read(index, gpa, data));
    }

    fn device_write(&mut self, gpa: u64, data: &[u8]) {
        self.resident.settle(&mut self.fpu);
        if self.apic_page == Some(gpa & !OFFSET) {
            let tsc = self.tsc_now();
            self.local.mmio_write((gpa & OFFSET) as u32, data, tsc);
            self.local_changed();
            return;
        }
        let (bus, index) = (self.bus.clone(), self.config.index);
        self.outside(|| bus.mmio_write(index, gpa, data));
        self.events_soon();
    }

    /// Reads `N` bytes with the current privilege, in ascending order of eight-byte pieces.
    pub(crate) fn read_bytes<const N: usize>(&mut self, address: u64) -> Result<[u8; N], Fault> {
        let mut data = [0; N];
        if N as u64 <= PAGE_SIZE - (address & OFFSET) {
            let entry = self.entry(address);
            if entry.read == address & !OFFSET {
                let host = address.wrapping_add(entry.addend);
                // SAFETY: the TLB holds translations of mapped regions; the range is within one page.
                unsafe { host::copy(data.as_mut_ptr() as usize as u64, host, N) };
                return Ok(data);
            }
        }
        for (i, piece) in data.chunks_mut(8).enumerate() {
            let at = address.wrapping_add(8 * i as u64);
            let value = self.load_slow(at, piece.len() as u64, self.user != 0)?;
            piece.copy_from_slice(&value.to_le_bytes()[..piece.len()]);
        }
        Ok(data)
    }

    /// Writes `N` bytes with the current privilege: all of them or, on a fault, none.
    pub(crate) fn write_bytes<const N: usize>(&mut self, address: u64, data: [u8; N]) -> Result<(), Fault> {
        if N as u64 <= PAGE_SIZE - (address & OFFSET) {
            let entry = self.entry(address);
            if entry.write == address & !OFFSET {
                let host = address.wrapping_add(entry.addend);
                // SAFETY: the TLB holds translations of mapped regions; the range is within one page.
                unsafe { host::copy(host, data.as_ptr() as usize as u64, N) };
                return Ok(());
            }
        }
        self.probe_write(address, N as u64)?;
        for (i, piece) in data.chunks(8).enumerate() {
            let mut value = [0; 8];
            value[..piece.len()].copy_from_slice(piece);
            let at = address.wrapping_add(8 * i as u64);
            self.store_slow(at, piece.len() as u64, u64::from_le_bytes(value), self.user != 0)?;
        }
        Ok(())
    }

    /// Host address of an operand of a locked instruction: RAM, writable, within one page. `None` means
    /// that the operand is elsewhere and that only [`Cpu::alone`] makes the access atomic.
    #[inline]
    pub(crate) fn atomic_host(&mut self, address: u64, size: u64) -> Result<Option<u64>, Fault> {
        let address = self.wrap(address);
        if PAGE_SIZE - (address & OFFSET) < size {
            self.probe_write(address, size)?;
            return Ok(None);
        }
        let target = self.translate(address, size, Access::Write, self.user != 0)?;
        if self.watching {
            self.watch(address, size, true);
        }
        match target {
            Target::Host(host) => Ok(Some(host)),
            Target::Device(_) => Ok(None),
        }
    }
}

impl Cpu {
    /// Compares and exchanges what [`Cpu::atomic_host`] has no address for; returns the previous value.
    pub(crate) fn exchange_alone(
        &mut self,
        address: u64,
        size: u64,
        expected: u64,
        new: u64,
    ) -> Result<u64, Fault> {
        self.alone(|cpu| {
            let old = cpu.load_slow(address, size, cpu.user != 0)?;
            cpu.store_slow(address, size, if old == expected { new } else { old }, cpu.user != 0)?;
            Ok(old)
        })
    }
}

impl Target {
    fn at(self, offset: u64) -> Self {
        match self {
            Self::Host(host) => Self::Host(host + offset),
            Self::Device(gpa) => Self::Device(gpa + offset),
        }
    }
}

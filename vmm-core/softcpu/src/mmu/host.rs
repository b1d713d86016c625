//! Accesses to guest memory at a host address.
//!
//! Guest memory is shared with other processors and with devices, so every access is volatile or atomic.
//! All functions need: the address came from a region that is still mapped (translations are dropped before
//! a region goes away), and `size` bytes from it on are within one guest page.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

#[repr(C, packed)]
struct Unaligned<T>(T);

/// Loads a value of `size` bytes, zero-extended.
///
/// # Safety
/// See the module.
#[inline(always)]
pub(crate) unsafe fn load(host: u64, size: u64) -> u64 {
    let p = host as usize;
    // SAFETY: the caller's promise; the type has no alignment.
    unsafe {
        match size {
            1 => u64::from((p as *const u8).read_volatile()),
            2 => u64::from((p as *const Unaligned<u16>).read_volatile().0),
            4 => u64::from((p as *const Unaligned<u32>).read_volatile().0),
            _ => (p as *const Unaligned<u64>).read_volatile().0,
        }
    }
}

/// Loads 16 bytes, in two halves.
///
/// # Safety
/// See the module.
#[inline(always)]
pub(crate) unsafe fn load_16(host: u64) -> u128 {
    // SAFETY: the caller's promise.
    unsafe { u128::from(load(host, 8)) | u128::from(load(host + 8, 8)) << 64 }
}

/// Stores 16 bytes, in two halves.
///
/// # Safety
/// See the module.
#[inline(always)]
pub(crate) unsafe fn store_16(host: u64, value: u128) {
    // SAFETY: the caller's promise.
    unsafe {
        store(host, 8, value as u64);
        store(host + 8, 8, (value >> 64) as u64);
    }
}

/// Stores the low `size` bytes of a value.
///
/// # Safety
/// See the module.
#[inline(always)]
pub(crate) unsafe fn store(host: u64, size: u64, value: u64) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise. The compiler would move a volatile store of an unaligned type through
    // the stack.
    unsafe {
        use std::arch::asm;
        match size {
            1 => asm!("mov byte ptr [{}], {}", in(reg) host, in(reg_byte) value as u8,
                      options(nostack, preserves_flags)),
            2 => asm!("mov word ptr [{}], {:x}", in(reg) host, in(reg) value,
                      options(nostack, preserves_flags)),
            4 => asm!("mov dword ptr [{}], {:e}", in(reg) host, in(reg) value,
                      options(nostack, preserves_flags)),
            _ => asm!("mov qword ptr [{}], {}", in(reg) host, in(reg) value,
                      options(nostack, preserves_flags)),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller's promise; the type has no alignment.
    unsafe {
        let p = host as usize;
        match size {
            1 => (p as *mut u8).write_volatile(value as u8),
            2 => (p as *mut Unaligned<u16>).write_volatile(Unaligned(value as u16)),
            4 => (p as *mut Unaligned<u32>).write_volatile(Unaligned(value as u32)),
            _ => (p as *mut Unaligned<u64>).write_volatile(Unaligned(value)),
        }
    }
}

/// Atomically replaces `old` by `new`; returns the previous value on failure. An operand that is not
/// aligned is replaced without atomicity against other processors' plain writes.
///
/// # Safety
/// See the module.
#[inline(always)]
pub(crate) unsafe fn compare_exchange(host: u64, size: u64, old: u64, new: u64) -> Result<(), u64> {
    let p = host as usize;
    let order = (Ordering::SeqCst, Ordering::SeqCst);
    if !(p as u64).is_multiple_of(size) {
        // SAFETY: the caller's promise.
        return unsafe { compare_exchange_unaligned(host, size, old, new) };
    }
    // SAFETY: the caller's promise, and the address is aligned.
    unsafe {
        match size {
            1 => AtomicU8::from_ptr(p as *mut u8)
                .compare_exchange(old as u8, new as u8, order.0, order.1)
                .map(drop)
                .map_err(u64::from),
            2 => AtomicU16::from_ptr(p as *mut u16)
                .compare_exchange(old as u16, new as u16, order.0, order.1)
                .map(drop)
                .map_err(u64::from),
            4 => AtomicU32::from_ptr(p as *mut u32)
                .compare_exchange(old as u32, new as u32, order.0, order.1)
                .map(drop)
                .map_err(u64::from),
            _ => AtomicU64::from_ptr(p as *mut u64).compare_exchange(old, new, order.0, order.1).map(drop),
        }
    }
}

/// # Safety
/// See the module.
#[cfg(target_arch = "x86_64")]
#[cold]
unsafe fn compare_exchange_unaligned(host: u64, size: u64, old: u64, new: u64) -> Result<(), u64> {
    use std::arch::asm;
    let found: u64;
    // SAFETY: the caller's promise; LOCK works at any alignment.
    unsafe {
        match size {
            2 => asm!("lock cmpxchg word ptr [{p}], {n:x}", p = in(reg) host, n = in(reg) new,
                      inout("rax") old => found),
            4 => asm!("lock cmpxchg dword ptr [{p}], {n:e}", p = in(reg) host, n = in(reg) new,
                      inout("rax") old => found),
            _ => asm!("lock cmpxchg qword ptr [{p}], {n}", p = in(reg) host, n = in(reg) new,
                      inout("rax") old => found),
        }
    }
    let mask = u64::MAX >> (64 - 8 * size);
    if found & mask == old & mask { Ok(()) } else { Err(found & mask) }
}

/// # Safety
/// See the module.
#[cfg(not(target_arch = "x86_64"))]
#[cold]
unsafe fn compare_exchange_unaligned(host: u64, size: u64, old: u64, new: u64) -> Result<(), u64> {
    // SAFETY: the caller's promise.
    let found = unsafe { load(host, size) };
    if found != old & (u64::MAX >> (64 - 8 * size)) {
        return Err(found);
    }
    // SAFETY: the caller's promise.
    unsafe { store(host, size, new) };
    Ok(())
}

/// CMPXCHG16B on a 16-byte aligned address; returns the previous value.
///
/// # Safety
/// See the module; the address must be aligned to 16 bytes.
pub(crate) unsafe fn compare_exchange_16(host: u64, old: u128, new: u128) -> u128 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("cmpxchg16b") {
        // SAFETY: the caller's promise, and the host has the instruction.
        return unsafe { native_compare_exchange_16(host, old, new) };
    }
    let p = host as usize as *mut u128;
    // SAFETY: the caller's promise. Not atomic: hosts without the instruction have to run one processor.
    unsafe {
        let found = p.read_volatile();
        if found == old {
            p.write_volatile(new);
        }
        found
    }
}

/// The instruction itself. Its intrinsic becomes a library call unless the whole program has the feature.
///
/// # Safety
/// As [`compare_exchange_16`], on a host that has the instruction.
#[cfg(target_arch = "x86_64")]
unsafe fn native_compare_exchange_16(host: u64, old: u128, new: u128) -> u128 {
    let (mut low, mut high) = (old as u64, (old >> 64) as u64);
    // SAFETY: the caller's promise. RBX cannot be an operand, so it is swapped in and out.
    unsafe {
        std::arch::asm!(
            "xchg {new_low}, rbx",
            "lock cmpxchg16b [{host}]",
            "mov rbx, {new_low}",
            new_low = inout(reg) new as u64 => _,
            host = in(reg) host,
            in("rcx") (new >> 64) as u64,
            inout("rax") low,
            inout("rdx") high,
        );
    }
    u128::from(low) | u128::from(high) << 64
}

/// Copies between guest memory and a buffer of the host, or within guest memory; ranges may overlap.
///
/// # Safety
/// Both ranges must be valid for `len` bytes; see the module.
pub(crate) unsafe fn copy(to: u64, from: u64, len: usize) {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy(from as usize as *const u8, to as usize as *mut u8, len) };
}

/// Fills guest memory with a repeated element of `size` bytes.
///
/// # Safety
/// See the module, for `size * count` bytes.
pub(crate) unsafe fn fill(to: u64, size: u64, value: u64, count: usize) {
    let p = to as usize;
    // SAFETY: the caller's promise; the element types have no alignment.
    unsafe {
        match size {
            1 => std::ptr::write_bytes(p as *mut u8, value as u8, count),
            2 => std::slice::from_raw_parts_mut(p as *mut [u8; 2], count).fill((value as u16).to_le_bytes()),
            4 => std::slice::from_raw_parts_mut(p as *mut [u8; 4], count).fill((value as u32).to_le_bytes()),
            _ => std::slice::from_raw_parts_mut(p as *mut [u8; 8], count).fill(value.to_le_bytes()),
        }
    }
}

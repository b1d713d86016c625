//! Which accelerators work on this host.

use std::ffi::{c_char, c_int};

use vmm_core::accel::AccelKind;
use vmm_core::accel::probe::{self, Probed};

use crate::border::{Failure, guard, put};
use crate::error::nacre_error;
use crate::status::nacre_status;
use crate::text;

/// An accelerator.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum nacre_accel {
    /// The better one that works on this host.
    NACRE_ACCEL_AUTO = 0,
    /// The Linux kernel's KVM.
    NACRE_ACCEL_KVM = 1,
    /// The x86-64 CPU in software.
    NACRE_ACCEL_SOFT = 2,
}

/// What a probe found out about one accelerator.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nacre_accel_info {
    /// Which one.
    pub kind: nacre_accel,
    /// Whether guests can be expected to run.
    pub usable: bool,
    /// Whether `NACRE_ACCEL_AUTO` takes this one.
    pub chosen: bool,
    /// Speed of guest kernel code in millions of instructions a second; 0 when it was not measured.
    pub kernel_mips: f64,
    /// Speed of guest user code in millions of instructions a second; 0 when it was not measured.
    pub user_mips: f64,
    /// Why it is not usable or not chosen, in English; terminated, cut if need be.
    pub reason: [c_char; 512],
}

fn info(probed: &Probed, chosen: Option<AccelKind>) -> nacre_accel_info {
    let mut reason = [0; 512];
    let why = probed.reason.as_deref().unwrap_or_default();
    // SAFETY: the buffer has the size that is given.
    let _: c_int = unsafe { text::copy_out(why, reason.as_mut_ptr(), reason.len()) };
    nacre_accel_info {
        kind: match probed.kind {
            AccelKind::Kvm => nacre_accel::NACRE_ACCEL_KVM,
            AccelKind::Soft => nacre_accel::NACRE_ACCEL_SOFT,
        },
        usable: probed.usable,
        chosen: chosen == Some(probed.kind),
        kernel_mips: probed.kernel_mips.unwrap_or(0.0),
        user_mips: probed.user_mips.unwrap_or(0.0),
        reason,
    }
}

/// Measures which accelerators work here; takes some tens of milliseconds. Fills at most `*count` entries of `infos`
/// and sets `*count` to the number of accelerators that there are.
///
/// # Safety
/// `count` is null or points to a `size_t`; `infos` has room for `*count` entries; `error` is null or points to room
/// for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_accel_probe(
    infos: *mut nacre_accel_info,
    count: *mut usize,
    error: *mut *mut nacre_error,
) -> nacre_status {
    let body = || {
        if count.is_null() {
            return Err(Failure::invalid("Argument 'count' is null"));
        }
        // SAFETY: not null, and readable as the caller promised.
        let room = unsafe { count.read_unaligned() };
        let report = probe::probe();
        if !infos.is_null() {
            for (i, probed) in report.accelerators.iter().take(room).enumerate() {
                // SAFETY: `i < room`, for which the caller promised room.
                unsafe { infos.add(i).write_unaligned(info(probed, report.chosen)) };
            }
        }
        // SAFETY: promised by the caller.
        unsafe { put(count, "count", report.accelerators.len()) }
    };
    // SAFETY: promised by the caller.
    unsafe { guard(error, body) }
}

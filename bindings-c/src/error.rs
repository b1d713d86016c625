//! Error objects.

use std::ffi::{c_char, c_int};
use std::sync::Arc;

use crate::border::Failure;
use crate::handle::Table;
use crate::status::nacre_status;
use crate::text;

/// An error object: a code, a message, and the chain of causes. Free it with `nacre_error_free`.
pub enum nacre_error {}

static ERRORS: Table<Failure> = Table::new(1, "error");

/// Makes a failure an error object; null when there are too many.
pub(crate) fn store(failure: Failure) -> *mut nacre_error {
    ERRORS.insert(Arc::new(failure)).unwrap_or(std::ptr::null_mut())
}

/// The status that the failed call returned; `NACRE_BAD_HANDLE` when `error` is not an error object.
#[unsafe(no_mangle)]
pub extern "C" fn nacre_error_status(error: *const nacre_error) -> nacre_status {
    ERRORS.get(error).map_or(nacre_status::NACRE_BAD_HANDLE, |e| e.status)
}

/// The number of messages: 1 for the failure itself, and one for each cause. 0 when `error` is not an error object.
#[unsafe(no_mangle)]
pub extern "C" fn nacre_error_depth(error: *const nacre_error) -> usize {
    ERRORS.get(error).map_or(0, |e| e.messages.len())
}

/// Copies message `index` (0: the failure itself, then its causes) into `buffer` of `size` bytes, cut if need be and
/// always terminated. Returns the message's whole length without the terminator, or -1 when there is no such message.
///
/// # Safety
/// `buffer` is null, or has room for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nacre_error_message(
    error: *const nacre_error,
    index: usize,
    buffer: *mut c_char,
    size: usize,
) -> c_int {
    let Ok(failure) = ERRORS.get(error) else { return -1 };
    let Some(message) = failure.messages.get(index) else { return -1 };
    // SAFETY: promised by the caller.
    unsafe { text::copy_out(message, buffer, size) }
}

/// Frees an error object. Null and stale handles are ignored.
#[unsafe(no_mangle)]
pub extern "C" fn nacre_error_free(error: *mut nacre_error) {
    drop(ERRORS.remove(error));
}

//! Strings in and out.

use std::ffi::{CStr, c_char, c_int};

use crate::border::Failure;

/// Copies a required C string argument.
///
/// # Errors
/// Fails when it is null or not UTF-8.
///
/// # Safety
/// `text` is null or a terminated string.
pub unsafe fn required(text: *const c_char, name: &str) -> Result<String, Failure> {
    // SAFETY: promised by the caller.
    unsafe { optional(text, name) }?.ok_or_else(|| Failure::invalid(format!("Argument '{name}' is null")))
}

/// Copies a C string argument that may be null.
///
/// # Errors
/// Fails when it is not UTF-8.
///
/// # Safety
/// `text` is null or a terminated string.
pub unsafe fn optional(text: *const c_char, name: &str) -> Result<Option<String>, Failure> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: promised by the caller.
    let text = unsafe { CStr::from_ptr(text) };
    let text = text.to_str().map_err(|_| Failure::invalid(format!("Argument '{name}' is not UTF-8")))?;
    Ok(Some(text.to_owned()))
}

/// Copies `text` into a caller's buffer, cut if need be and always terminated (when there is any room). Returns the
/// whole length, as snprintf does.
///
/// # Safety
/// `buffer` is null, or has room for `size` bytes.
pub unsafe fn copy_out(text: &str, buffer: *mut c_char, size: usize) -> c_int {
    if !buffer.is_null() && size > 0 {
        // Cut at a character, so that what arrives is UTF-8.
        let n = text.floor_char_boundary(text.len().min(size - 1));
        // SAFETY: `n < size`, and the caller promised room for `size` bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr().cast(), buffer, n);
            buffer.add(n).write(0);
        }
    }
    c_int::try_from(text.len()).unwrap_or(c_int::MAX)
}

//! What every call passes through: results become a status and an error object, panics stop here.

use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{self, nacre_error};
use crate::status::nacre_status;

/// A failure on its way to the caller.
#[derive(Debug)]
pub struct Failure {
    /// The status that the call returns.
    pub status: nacre_status,
    /// The message and its causes, outermost first.
    pub messages: Vec<String>,
}

impl Failure {
    /// A failure without further causes.
    pub fn new(status: nacre_status, message: impl Into<String>) -> Self {
        Self { status, messages: vec![message.into()] }
    }

    /// An argument that cannot be used.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(nacre_status::NACRE_INVALID_ARGUMENT, message)
    }

    /// Something ran out.
    pub fn no_resources(message: impl Into<String>) -> Self {
        Self::new(nacre_status::NACRE_NO_RESOURCES, message)
    }

    /// An error of a crate with its chain of causes. The status is that of the I/O error in the chain, when there is
    /// one; otherwise `status`.
    pub fn from_error(status: nacre_status, error: &(dyn Error + 'static)) -> Self {
        let mut messages = Vec::new();
        let mut status = status;
        let mut next = Some(error);
        while let Some(e) = next {
            messages.push(e.to_string());
            if let Some(io) = e.downcast_ref::<std::io::Error>() {
                status = io_status(io).unwrap_or(status);
            }
            next = e.source();
        }
        Self { status, messages }
    }
}

fn io_status(error: &std::io::Error) -> Option<nacre_status> {
    use std::io::ErrorKind as K;
    Some(match error.kind() {
        K::NotFound => nacre_status::NACRE_NOT_FOUND,
        K::AlreadyExists => nacre_status::NACRE_EXISTS,
        K::PermissionDenied => nacre_status::NACRE_PERMISSION,
        K::TimedOut => nacre_status::NACRE_TIMEOUT,
        K::OutOfMemory | K::StorageFull | K::QuotaExceeded => nacre_status::NACRE_NO_RESOURCES,
        K::Unsupported => nacre_status::NACRE_UNSUPPORTED,
        K::ResourceBusy | K::AddrInUse | K::WouldBlock => nacre_status::NACRE_BUSY,
        _ => return None,
    })
}

/// Runs the body of a call. A failure, or a panic, becomes a status and, if `error` is not null, an error object that
/// the caller frees. `*error` is set to null on success.
///
/// # Safety
/// `error` is null or points to writable memory for one pointer (of any alignment).
pub unsafe fn guard(
    error: *mut *mut nacre_error,
    body: impl FnOnce() -> Result<(), Failure>,
) -> nacre_status {
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let what = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
        let what = what.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        Err(Failure::new(nacre_status::NACRE_INTERNAL, format!("Internal error: {what}")))
    });
    let (status, object) = match result {
        Ok(()) => (nacre_status::NACRE_OK, std::ptr::null_mut()),
        Err(failure) if error.is_null() => return failure.status,
        Err(failure) => (failure.status, error::store(failure)),
    };
    if !error.is_null() {
        // SAFETY: promised by the caller; unaligned because C code may pack its structures.
        unsafe { error.write_unaligned(object) };
    }
    status
}

/// Writes a result through an out-pointer.
///
/// # Errors
/// Fails when the pointer is null.
///
/// # Safety
/// `out` is null or points to writable memory for a `T` (of any alignment).
pub unsafe fn put<T>(out: *mut T, name: &str, value: T) -> Result<(), Failure> {
    if out.is_null() {
        return Err(Failure::invalid(format!("Output pointer '{name}' is null")));
    }
    // SAFETY: promised by the caller.
    unsafe { out.write_unaligned(value) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{nacre_error_free, nacre_error_message, nacre_error_status};

    #[test]
    fn a_panic_becomes_a_status_and_an_error_object() {
        let mut error = std::ptr::null_mut();
        // SAFETY: `error` has room for a pointer.
        let status = unsafe { guard(&mut error, || panic!("injected {}", 7)) };
        assert_eq!(status, nacre_status::NACRE_INTERNAL);
        assert_eq!(nacre_error_status(error), status);
        let mut text = [0u8; 64];
        // SAFETY: the buffer has the size that is given.
        let len = unsafe { nacre_error_message(error, 0, text.as_mut_ptr().cast(), text.len()) };
        assert_eq!(&text[..len as usize], b"Internal error: injected 7");
        nacre_error_free(error);
        // SAFETY: null is allowed.
        let status = unsafe { guard(std::ptr::null_mut(), || panic!("injected")) };
        assert_eq!(status, nacre_status::NACRE_INTERNAL);
    }
}

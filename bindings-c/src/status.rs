//! The result of a call.

/// The result of a call. Numbers never change their meaning; new ones are added at the end.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum nacre_status {
    /// The call did what it says.
    NACRE_OK = 0,
    /// An argument is null, out of range, not UTF-8, or contradicts another one.
    NACRE_INVALID_ARGUMENT = 1,
    /// The handle is null, was freed, or is of another type.
    NACRE_BAD_HANDLE = 2,
    /// The object is not in a state in which this can be done.
    NACRE_WRONG_STATE = 3,
    /// A file, device or peer failed.
    NACRE_IO = 4,
    /// What was named does not exist.
    NACRE_NOT_FOUND = 5,
    /// Somebody else holds it (a locked disk, a lease, an address).
    NACRE_BUSY = 6,
    /// The host denied access.
    NACRE_PERMISSION = 7,
    /// This build, host or accelerator cannot do it.
    NACRE_UNSUPPORTED = 8,
    /// A file or message is malformed.
    NACRE_CORRUPT = 9,
    /// The time given ran out first.
    NACRE_TIMEOUT = 10,
    /// The operation was cancelled.
    NACRE_CANCELLED = 11,
    /// The host has too little memory, space or descriptors.
    NACRE_NO_RESOURCES = 12,
    /// Something with this name exists already.
    NACRE_EXISTS = 13,
    /// A defect in the library, caught at the border. The object concerned should be freed.
    NACRE_INTERNAL = 14,
}

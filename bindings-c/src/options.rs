//! Option structures that grow without breaking old callers.

use crate::border::Failure;

/// No option structure is ever larger: a larger `struct_size` is garbage.
const MAX_SIZE: usize = 4096;

/// A C option structure whose first field is `size_t struct_size`.
///
/// # Safety
/// The type is `repr(C)`, starts with a `usize`, any bit pattern is a valid value (raw pointers, integers;
/// `bool` fields are listed in [`Options::FLAGS`]), and all zeros mean the defaults.
pub unsafe trait Options: Copy {
    /// The size of the first released version of the structure; smaller ones are refused.
    const FIRST_SIZE: usize;
    /// The structure's name, for messages.
    const NAME: &'static str;
    /// Offsets of the `bool` fields: a caller's byte there must be 0 or 1.
    const FLAGS: &'static [usize] = &[];
}

/// Copies a caller's option structure. What an older caller does not have stays zero; what a newer caller has and this
/// library does not know must be zero.
///
/// # Errors
/// Fails when the pointer is null, or `struct_size` is too small, absurd, or asks for something unknown.
///
/// # Safety
/// `options` is null or points to at least `struct_size` readable bytes (of any alignment), and at least one `usize`.
pub unsafe fn read<T: Options>(options: *const T) -> Result<T, Failure> {
    if options.is_null() {
        return Err(Failure::invalid(format!("The {} pointer is null", T::NAME)));
    }
    // SAFETY: the first field can be read, as promised by the caller.
    let size = unsafe { options.cast::<usize>().read_unaligned() };
    if size < T::FIRST_SIZE || size > MAX_SIZE {
        let name = T::NAME;
        return Err(Failure::invalid(format!(
            "{name}.struct_size is {size}; set it to sizeof(struct {name})"
        )));
    }
    let known = size.min(size_of::<T>());
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: the source has `size` readable bytes as promised; `known` fits both.
    unsafe { std::ptr::copy_nonoverlapping(options.cast::<u8>(), value.as_mut_ptr().cast::<u8>(), known) };
    for at in known..size {
        // SAFETY: `at < size`, readable as promised.
        if unsafe { options.cast::<u8>().add(at).read() } != 0 {
            let name = T::NAME;
            return Err(Failure::invalid(format!(
                "{name} sets an option at byte {at} that this library does not know"
            )));
        }
    }
    for &at in T::FLAGS {
        // SAFETY: the value is initialised and `at` lies inside it.
        let flag = unsafe { value.as_ptr().cast::<u8>().add(at).read() };
        if flag > 1 {
            return Err(Failure::invalid(format!(
                "{} has {flag} where a bool belongs, at byte {at}",
                T::NAME
            )));
        }
    }
    // SAFETY: zeroed or copied from the caller; the bools were checked, and any other bits are valid (`Options`).
    Ok(unsafe { value.assume_init() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C)]
    #[derive(Clone, Copy)]
    struct demo {
        struct_size: usize,
        first: u64,
        second: u64,
    }

    // SAFETY: repr(C), integers only, starts with a usize.
    unsafe impl Options for demo {
        const FIRST_SIZE: usize = 16;
        const NAME: &'static str = "demo";
    }

    #[test]
    fn old_new_absurd_and_misaligned_structures() {
        let mut bytes = [0u8; 64];
        let at = |bytes: &mut [u8], offset: usize, size: usize| {
            bytes[offset..offset + 8].copy_from_slice(&size.to_ne_bytes());
            bytes[offset + 8..offset + 16].copy_from_slice(&7u64.to_ne_bytes());
            // SAFETY: the buffer holds 64 bytes and every size used below fits.
            unsafe { read(bytes.as_ptr().add(offset).cast::<demo>()) }
        };
        let old = at(&mut bytes, 1, 16).unwrap();
        assert_eq!((old.first, old.second), (7, 0));
        bytes[16..24].fill(1);
        assert_eq!(at(&mut bytes, 0, 24).unwrap().second, 0x0101_0101_0101_0101);
        assert!(at(&mut bytes, 0, 40).is_ok(), "a newer caller with nothing new set");
        bytes[30] = 1;
        assert!(at(&mut bytes, 0, 40).is_err(), "a newer caller that wants something unknown");
        for size in [0, 8, 15, 4097, usize::MAX] {
            assert!(at(&mut bytes, 0, size).is_err(), "{size}");
        }
        // SAFETY: null is allowed.
        assert!(unsafe { read::<demo>(std::ptr::null()) }.is_err());
    }
}

//! Any sequence of C calls with any handles: each returns, and nothing is left at the end.
#![no_main]

use std::ffi::CString;
use std::ptr::{null, null_mut, without_provenance_mut};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nacre::disk::*;
use nacre::error::*;
use nacre::switch::*;

#[derive(Arbitrary, Debug)]
enum Call {
    Open { size: u32, read_only: bool },
    Free(u8),
    Read { disk: u8, offset: u64, len: u16 },
    Write { disk: u8, offset: u64, len: u16 },
    Resize { disk: u8, size: u32 },
    ErrorFree(u8),
    ErrorMessage { error: u8, index: u8, room: u8 },
    SwitchNew,
    SwitchFree(u8),
    Forge(u64),
}

fuzz_target!(|calls: Vec<Call>| {
    let dir = tempfile::tempdir_in("/dev/shm").expect("directory");
    let raw = CString::new("raw").expect("text");
    // Handles of all kinds live in one list, so that they are mixed up freely.
    let mut handles: Vec<*mut ()> = vec![null_mut()];
    for (n, call) in calls.into_iter().take(64).enumerate() {
        let pick = |i: u8| handles[usize::from(i) % handles.len()];
        let mut error: *mut nacre_error = null_mut();
        let mut buffer = vec![0u8; 1 << 16];
        // SAFETY: every pointer below is null, a handle, or points to live memory of the size that is stated.
        unsafe {
            match call {
                Call::Open { size, read_only } => {
                    let path = CString::new(format!("{}/{n}", dir.path().display())).expect("text");
                    let mut create: nacre_disk_create_options = std::mem::zeroed();
                    create.struct_size = size_of::<nacre_disk_create_options>();
                    (create.path, create.format, create.size) = (path.as_ptr(), raw.as_ptr(), u64::from(size) % (1 << 24));
                    nacre_disk_create(&create, null_mut());
                    let mut open: nacre_disk_options = std::mem::zeroed();
                    open.struct_size = size_of::<nacre_disk_options>();
                    (open.path, open.format, open.read_only) = (path.as_ptr(), raw.as_ptr(), read_only);
                    let mut disk = null_mut();
                    nacre_disk_open(&open, &mut disk, &mut error);
                    handles.push(disk.cast());
                }
                Call::Free(i) => drop(nacre_disk_free(pick(i).cast(), &mut error)),
                Call::Read { disk, offset, len } => {
                    nacre_disk_read(pick(disk).cast(), buffer.as_mut_ptr().cast(), len.into(), offset, &mut error);
                }
                Call::Write { disk, offset, len } => {
                    let offset = offset % (1 << 25);
                    nacre_disk_write(pick(disk).cast(), buffer.as_ptr().cast(), len.into(), offset, &mut error);
                }
                Call::Resize { disk, size } => {
                    nacre_disk_resize(pick(disk).cast(), u64::from(size) % (1 << 24), &mut error);
                }
                Call::ErrorFree(i) => nacre_error_free(pick(i).cast()),
                Call::ErrorMessage { error, index, room } => {
                    nacre_error_message(pick(error).cast(), index.into(), buffer.as_mut_ptr().cast(), room.into());
                }
                Call::SwitchNew => {
                    let mut made = null_mut();
                    nacre_switch_new(null(), &mut made, &mut error);
                    handles.push(made.cast());
                }
                Call::SwitchFree(i) => drop(nacre_switch_free(pick(i).cast(), &mut error)),
                Call::Forge(bits) => handles.push(without_provenance_mut(bits as usize)),
            }
        }
        handles.push(error.cast());
    }
    for handle in handles {
        // SAFETY: handles may be anything.
        unsafe {
            nacre_disk_free(handle.cast(), null_mut());
            nacre_switch_free(handle.cast(), null_mut());
        }
        nacre_error_free(handle.cast());
    }
});

//! Any sequence of C calls with any handles: each returns, and nothing is left at the end.
#![no_main]

use std::ffi::CString;
use std::ptr::{null, null_mut, without_provenance_mut};

use arbitrary::Arbitrary;
use fuzz::reached;
use libfuzzer_sys::fuzz_target;
use nacre::accel::*;
use nacre::disk::*;
use nacre::error::*;
use nacre::job::*;
use nacre::lease::*;
use nacre::status::*;
use nacre::switch::*;
use nacre::vm::*;

#[derive(Arbitrary, Debug)]
enum Call {
    Open {
        size: u32,
        read_only: bool,
        qcow2: bool,
    },
    Free(u8),
    Read {
        disk: u8,
        offset: u64,
        len: u16,
    },
    Write {
        disk: u8,
        offset: u64,
        len: u16,
    },
    Resize {
        disk: u8,
        size: u32,
    },
    ErrorFree(u8),
    ErrorMessage {
        error: u8,
        index: u8,
        room: u8,
    },
    SwitchNew,
    SwitchFree(u8),
    Snapshot(u8),
    /// Any job; those with a target use `other`.
    Job {
        kind: u8,
        disk: u8,
        other: u8,
        layer: u8,
        rate: u16,
    },
    JobWait(u8),
    JobComplete {
        job: u8,
        end: u8,
    },
    JobCancel(u8),
    JobFree(u8),
    Keeper {
        host: u16,
        sector_size: u32,
        format: bool,
    },
    Lock {
        keeper: u8,
        mode: u8,
    },
    LockFree(u8),
    KeeperFree(u8),
    VmBuild {
        runs: bool,
        cpus: u8,
        disk: bool,
        rng: bool,
    },
    VmStart(u8),
    VmPause(u8),
    VmPowerButton(u8),
    VmStop(u8),
    VmWait(u8),
    VmEvents(u8),
    VmFree(u8),
    Forge(u64),
}

/// Machines that a sequence makes at the most: each has memory and threads.
const MACHINES: usize = 4;

/// An ELF file with a guest that switches its machine off by ACPI, or that runs for ever.
fn guest(runs: bool) -> Vec<u8> {
    // mov $0x604, %dx; mov $0x3400, %ax; out %ax, %dx, and then a jump to itself.
    let mut code = vec![0x66, 0xba, 4, 6, 0x66, 0xb8, 0, 0x34, 0x66, 0xef, 0xeb, 0xfe];
    if runs {
        code.drain(..10);
    }
    let (entry, len) = (0x20_0000u64, code.len() as u64);
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]); // an executable for x86-64
    for value in [entry, 64, 0] {
        file.extend(value.to_le_bytes());
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]); // one program header
    file.extend([1, 0, 0, 0, 5, 0, 0, 0]); // loaded
    for value in [120, entry, entry, len, len, 1] {
        file.extend(value.to_le_bytes());
    }
    file.extend(code);
    file
}

fuzz_target!(|calls: Vec<Call>| {
    let dir = tempfile::tempdir_in("/dev/shm").expect("directory");
    let raw = CString::new("raw").expect("text");
    let qcow2 = CString::new("qcow2").expect("text");
    // Handles of all kinds live in one list, so that they are mixed up freely.
    let mut handles: Vec<*mut ()> = vec![null_mut()];
    let mut machines = 0;
    for (n, call) in calls.into_iter().take(64).enumerate() {
        let pick = |i: u8| handles[usize::from(i) % handles.len()];
        let mut error: *mut nacre_error = null_mut();
        let mut buffer = vec![0u8; 1 << 16];
        // SAFETY: every pointer below is null, a handle, or points to live memory of the size that is stated.
        unsafe {
            match call {
                Call::Open { size, read_only, qcow2: is_qcow2 } => {
                    let format = if is_qcow2 { qcow2.as_ptr() } else { raw.as_ptr() };
                    let path = CString::new(format!("{}/{n}", dir.path().display())).expect("text");
                    let mut create: nacre_disk_create_options = std::mem::zeroed();
                    create.struct_size = size_of::<nacre_disk_create_options>();
                    (create.path, create.format, create.size) =
                        (path.as_ptr(), format, u64::from(size) % (1 << 24));
                    nacre_disk_create(&create, null_mut());
                    let mut open: nacre_disk_options = std::mem::zeroed();
                    open.struct_size = size_of::<nacre_disk_options>();
                    (open.path, open.format, open.read_only) = (path.as_ptr(), format, read_only);
                    let mut disk = null_mut();
                    if nacre_disk_open(&open, &mut disk, &mut error) == nacre_status::NACRE_OK {
                        reached("disk-opened");
                    }
                    handles.push(disk.cast());
                }
                Call::Free(i) => drop(nacre_disk_free(pick(i).cast(), &mut error)),
                Call::Read { disk, offset, len } => {
                    nacre_disk_read(
                        pick(disk).cast(),
                        buffer.as_mut_ptr().cast(),
                        len.into(),
                        offset,
                        &mut error,
                    );
                }
                Call::Write { disk, offset, len } => {
                    let offset = offset % (1 << 25);
                    nacre_disk_write(
                        pick(disk).cast(),
                        buffer.as_ptr().cast(),
                        len.into(),
                        offset,
                        &mut error,
                    );
                }
                Call::Resize { disk, size } => {
                    nacre_disk_resize(pick(disk).cast(), u64::from(size) % (1 << 24), &mut error);
                }
                Call::ErrorFree(i) => nacre_error_free(pick(i).cast()),
                Call::ErrorMessage { error, index, room } => {
                    nacre_error_message(
                        pick(error).cast(),
                        index.into(),
                        buffer.as_mut_ptr().cast(),
                        room.into(),
                    );
                }
                Call::SwitchNew => {
                    let mut made = null_mut();
                    nacre_switch_new(null(), &mut made, &mut error);
                    handles.push(made.cast());
                }
                Call::SwitchFree(i) => drop(nacre_switch_free(pick(i).cast(), &mut error)),
                Call::Snapshot(i) => {
                    let path = CString::new(format!("{}/{n}", dir.path().display())).expect("text");
                    let mut create: nacre_disk_create_options = std::mem::zeroed();
                    create.struct_size = size_of::<nacre_disk_create_options>();
                    (create.path, create.format) = (path.as_ptr(), qcow2.as_ptr());
                    nacre_disk_snapshot(pick(i).cast(), &create, &mut error);
                }
                Call::Job { kind, disk, other, layer, rate } => {
                    let (disk, other, layer) =
                        (pick(disk).cast(), pick(other).cast(), usize::from(layer) % 4);
                    let mut job = null_mut();
                    match kind % 6 {
                        0 => nacre_disk_commit(disk, layer, &mut job, &mut error),
                        1 => nacre_disk_stream(disk, layer, NACRE_NO_LAYER, &mut job, &mut error),
                        2 => nacre_disk_convert(disk, other, layer == 0, &mut job, &mut error),
                        3 => nacre_disk_backup(disk, other, &mut job, &mut error),
                        4 => nacre_disk_compare(disk, other, &mut job, &mut error),
                        _ => nacre_disk_mirror(disk, other, layer as u32, &mut job, &mut error),
                    };
                    nacre_job_set_rate(job, u64::from(rate) << 12, null_mut());
                    handles.push(job.cast());
                }
                Call::JobWait(i) => {
                    let mut result = 0;
                    nacre_job_wait(pick(i).cast(), 5, &mut result, &mut error);
                }
                Call::JobComplete { job, end } => {
                    nacre_job_complete(pick(job).cast(), end.into(), 5, &mut error);
                }
                Call::JobCancel(i) => drop(nacre_job_cancel(pick(i).cast(), &mut error)),
                Call::JobFree(i) => drop(nacre_job_free(pick(i).cast(), &mut error)),
                Call::Keeper { host, sector_size, format } => {
                    let path = CString::new(format!("{}/leases", dir.path().display())).expect("text");
                    let mut options: nacre_keeper_options = std::mem::zeroed();
                    options.struct_size = size_of::<nacre_keeper_options>();
                    (options.path, options.space, options.name) = (path.as_ptr(), raw.as_ptr(), raw.as_ptr());
                    (options.host, options.io_timeout, options.sector_size) = (host, 1, sector_size);
                    if format {
                        let file = std::fs::File::create(dir.path().join("leases")).expect("file");
                        file.set_len(2 << 20).expect("file");
                        nacre_lease_format_space(&options, null_mut());
                        nacre_lease_format_resource(&options, 0, raw.as_ptr(), null_mut());
                    }
                    let mut keeper = null_mut();
                    nacre_keeper_open(&options, &mut keeper, &mut error);
                    handles.push(keeper.cast());
                }
                Call::Lock { keeper, mode } => {
                    let mut lock = null_mut();
                    nacre_keeper_lock(
                        pick(keeper).cast(),
                        0,
                        raw.as_ptr(),
                        mode.into(),
                        0,
                        &mut lock,
                        &mut error,
                    );
                    handles.push(lock.cast());
                }
                Call::LockFree(i) => drop(nacre_lock_free(pick(i).cast(), &mut error)),
                Call::KeeperFree(i) => drop(nacre_keeper_free(pick(i).cast(), &mut error)),
                Call::VmBuild { runs, cpus, disk, rng } if machines < MACHINES => {
                    machines += 1;
                    let kernel = dir.path().join("kernel");
                    std::fs::write(&kernel, guest(runs)).expect("file");
                    let kernel = CString::new(kernel.into_os_string().into_encoded_bytes()).expect("text");
                    let path = CString::new(format!("{}/{n}", dir.path().display())).expect("text");
                    std::fs::write(dir.path().join(n.to_string()), [0; 4096]).expect("file");
                    let mut image: nacre_disk_options = std::mem::zeroed();
                    image.struct_size = size_of::<nacre_disk_options>();
                    (image.path, image.format) = (path.as_ptr(), raw.as_ptr());
                    let disks = [&raw const image];
                    let mut options: nacre_vm_options = std::mem::zeroed();
                    options.struct_size = size_of::<nacre_vm_options>();
                    (options.kernel, options.memory, options.rng) = (kernel.as_ptr(), 16 << 20, rng);
                    (options.cpus, options.accel) =
                        (u32::from(cpus % 3), nacre_accel::NACRE_ACCEL_SOFT as u32);
                    (options.disks, options.disk_count) = (disks.as_ptr(), usize::from(disk));
                    let mut vm = null_mut();
                    if nacre_vm_build(&options, &mut vm, &mut error) == nacre_status::NACRE_OK {
                        reached("machine-built");
                    }
                    handles.push(vm.cast());
                }
                Call::VmBuild { .. } => {}
                Call::VmStart(i) => drop(nacre_vm_start(pick(i).cast(), &mut error)),
                Call::VmPause(i) => drop(nacre_vm_pause(pick(i).cast(), &mut error)),
                Call::VmPowerButton(i) => drop(nacre_vm_press_power_button(pick(i).cast(), &mut error)),
                Call::VmStop(i) => drop(nacre_vm_stop(pick(i).cast(), &mut error)),
                Call::VmWait(i) => {
                    let (vm, mut reason) = (pick(i).cast(), nacre_stop_reason::NACRE_STOP_STOPPED);
                    if nacre_vm_wait(vm, 20, &mut reason, null_mut(), &mut error) == nacre_status::NACRE_OK {
                        reached("machine-ended");
                    }
                }
                Call::VmEvents(i) => {
                    let mut event = nacre_vm_event::NACRE_EVENT_NONE;
                    nacre_vm_event_fd(pick(i).cast());
                    nacre_vm_next_event(pick(i).cast(), &mut event, &mut error);
                }
                Call::VmFree(i) => drop(nacre_vm_free(pick(i).cast(), &mut error)),
                Call::Forge(bits) => handles.push(without_provenance_mut(bits as usize)),
            }
        }
        handles.push(error.cast());
    }
    for handle in handles {
        // SAFETY: handles may be anything.
        unsafe {
            nacre_vm_free(handle.cast(), null_mut());
            nacre_job_free(handle.cast(), null_mut());
            nacre_lock_free(handle.cast(), null_mut());
            nacre_keeper_free(handle.cast(), null_mut());
            nacre_disk_free(handle.cast(), null_mut());
            nacre_switch_free(handle.cast(), null_mut());
        }
        nacre_error_free(handle.cast());
    }
});

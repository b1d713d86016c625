//! What tests of snapshots and migrations share: a guest that checks its memory as long as it runs.

use std::path::Path;
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;
use vmm_core::machine::{AccelChoice, StopReason, Vm, VmConfig};

use super::{config, guest, out8};

/// The memory that the guest writes over and over, dword by dword.
const START: u32 = 0x20_0000;
const END: u32 = START + 48 * 0x1000;
/// Passes that it has made.
const COUNT: u64 = 0x18_0000;
/// Ends the guest after a pass when it is not zero.
const FLAG: u64 = 0x18_0004;
/// Memory that only the host writes, before the guest runs.
const STILL: u64 = 0x40_0000;
const STILL_LEN: usize = 0x5_1000;

pub const FINISHED: StopReason = StopReason::Exit(42);

/// In each pass the guest finds its memory as the last pass left it, or ends with code 1.
pub fn kernel() -> tempfile::NamedTempFile {
    guest::kernel(|a| {
        let mut fill = a.create_label();
        let mut pass = a.create_label();
        let mut next = a.create_label();
        let mut bad = a.create_label();
        a.mov(edi, START)?;
        a.set_label(&mut fill)?;
        a.mov(dword_ptr(edi), edi)?;
        a.add(edi, 4)?;
        a.cmp(edi, END as i32)?;
        a.jb(fill)?;
        a.xor(ebp, ebp)?;
        a.set_label(&mut pass)?;
        a.mov(edi, START)?;
        a.set_label(&mut next)?;
        a.lea(eax, dword_ptr(edi + ebp))?;
        a.cmp(dword_ptr(edi), eax)?;
        a.jne(bad)?;
        a.inc(dword_ptr(edi))?;
        a.add(edi, 4)?;
        a.cmp(edi, END as i32)?;
        a.jb(next)?;
        a.inc(ebp)?;
        a.mov(dword_ptr(COUNT), ebp)?;
        a.cmp(dword_ptr(FLAG), 0)?;
        a.je(pass)?;
        out8(a, 0xf4, 42)?;
        a.set_label(&mut bad)?;
        out8(a, 0xf4, 1)?;
        a.hlt()
    })
}

/// A machine for the guest, with a disk whose lock says who has it open.
pub fn machine(kernel: &Path, disk: &Path, accel: AccelChoice) -> VmConfig {
    let mut config = VmConfig { rng: true, balloon: true, ..config(kernel, accel) };
    let disk = serde_json::json!({"path": disk, "format": "raw", "id": "data"});
    config.disks.push(serde_json::from_value(disk).unwrap());
    config
}

pub fn disk() -> tempfile::NamedTempFile {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    disk
}

/// Starts the guest and lets it make a few passes.
pub fn start(config: VmConfig) -> Vm {
    let vm = Vm::builder(config).build().unwrap();
    vm.memory().write(STILL, &still()).unwrap();
    vm.start().unwrap();
    progresses(&vm);
    vm
}

fn still() -> Vec<u8> {
    (0..STILL_LEN).map(|n| (n / 7 + n / 4096) as u8).collect()
}

pub fn count(vm: &Vm) -> u32 {
    vm.memory().read_obj(COUNT).unwrap()
}

/// Waits until the guest has made two more passes.
#[track_caller]
pub fn progresses(vm: &Vm) {
    let (before, since) = (count(vm), Instant::now());
    while count(vm) < before.saturating_add(2) {
        assert_eq!(vm.stop_reason(), None);
        assert!(since.elapsed() < Duration::from_secs(60), "the guest does not go on after {before} passes");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The guest runs, has all its memory, and ends well.
#[track_caller]
pub fn finishes(vm: &Vm) {
    progresses(vm);
    let mut found = vec![0; STILL_LEN];
    vm.memory().read(STILL, &mut found).unwrap();
    assert!(found == still(), "memory that nobody writes has changed");
    vm.memory().write_obj(FLAG, &1u32).unwrap();
    assert_eq!(vm.wait(), FINISHED);
}

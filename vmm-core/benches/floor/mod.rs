//! The least that a program on KVM can do to show a guest's first byte: one VM with the chipset in the kernel, one vCPU,
//! no devices, no checks. What this takes is the host's; only the rest can be a VMM's.

use std::io::Write;
use std::path::Path;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_pit_config, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit};
use vmm_core::memory::GuestMemory;

use crate::guests;

const RAM: u64 = 128 << 20;
const SERIAL: u16 = 0x3f8;

/// Runs the guest in the file `kernel` until its first byte, prints that, and stays.
pub fn run(kernel: &Path) -> ! {
    let file = std::fs::read(kernel).unwrap();
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    vm.set_tss_address(0xfffb_d000).unwrap();
    let memory = GuestMemory::flat(RAM).unwrap();
    let region = kvm_userspace_memory_region {
        memory_size: RAM,
        userspace_addr: memory.regions()[0].host_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the mapping has this size, and lives as long as the process.
    unsafe { vm.set_user_memory_region(region).unwrap() };
    vm.create_irq_chip().unwrap();
    vm.create_pit2(kvm_pit_config::default()).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap()).unwrap();
    let data = kvm_segment {
        selector: 0x10,
        limit: u32::MAX,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs, sregs.ss) = (kvm_segment { selector: 8, type_: 11, ..data }, data);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data);
    sregs.cr0 = 0x11;
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&kvm_regs { rip: guests::ADDRESS, rflags: 2, ..Default::default() }).unwrap();
    memory.write(guests::ADDRESS, &file[guests::CODE_OFFSET..]).unwrap();
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::IoOut(SERIAL, byte) => {
                let mut out = std::io::stdout();
                out.write_all(byte).unwrap();
                out.flush().unwrap();
                break;
            }
            VcpuExit::IoOut(..) => {}
            other => panic!("{other:?}"),
        }
    }
    loop {
        std::thread::park();
    }
}

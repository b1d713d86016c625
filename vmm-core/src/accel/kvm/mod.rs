//! The accelerator on the Linux kernel's KVM.
//!
//! Interrupt controllers and timers (local APICs, IO-APIC, PIC, PIT) live in the kernel. Message-signalled interrupts
//! go straight to the local APICs, or through an irqfd when a back-end in another process needs a descriptor.
//! Doorbells are ioeventfds. Dirty pages come through rings where the kernel has them (see [`KvmOptions::dirty_ring`]),
//! else from the dirty log.
//!
//! # Signals
//! To stop a vCPU that is inside the guest, its thread must get a signal. No handler is installed: the signal is
//! blocked in the vCPU's thread while [`Vcpu::run`](super::Vcpu::run) executes and let through only by the kernel
//! while the guest runs (`KVM_SET_SIGNAL_MASK`), where it ends `KVM_RUN` and stays pending until it is taken off the
//! queue. The thread's mask is restored when `run` returns. The process's signal dispositions are never touched. An
//! embedder that uses the same real-time signal for its own ends can choose another in [`KvmOptions`].

mod assist;
mod chipset;
mod coalesced;
mod cpuid;
mod dirty_ring;
mod exit;
mod fault;
mod features;
mod interrupts;
mod kick;
mod msr;
mod state;
mod sys;
mod vcpu;
mod vm;
mod xsave;

use std::path::Path;
use std::sync::{Arc, OnceLock};

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};
use parking_lot::Mutex;

use super::{AccelError, AccelKind, Hypervisor, Vm, VmSpec};

pub use features::KvmFeatures;
pub use vm::KvmVm;

/// What can be chosen about KVM.
#[derive(Clone, Debug)]
pub struct KvmOptions {
    /// The real-time signal that stops vCPU threads; see the module's documentation. `SIGRTMAX - 2` by default.
    pub kick_signal: i32,
    /// Whether the VM gets the legacy interval timer (i8254) and PC speaker port in the kernel.
    pub pit: bool,
    /// Whether the software CPU executes an instruction that the kernel's emulator does not know, and the vCPU goes on:
    /// for a KVM that is software itself. Without it such an instruction ends the run with a fault.
    pub assist: bool,
    /// Pages that a vCPU can write between two harvests of its dirty ring, rounded to what the host allows. With 0, and on
    /// hosts without dirty rings, the dirty log is used. 4096 by default, and 0 on a KVM that is software itself: that
    /// emulates many instructions without a look at the ring, which loses entries when it overflows meanwhile.
    pub dirty_ring: u32,
}

impl Default for KvmOptions {
    fn default() -> Self {
        let dirty_ring = if KvmHypervisor::is_software() { 0 } else { 4096 };
        Self { kick_signal: libc::SIGRTMAX() - 2, pit: true, assist: false, dirty_ring }
    }
}

/// The Linux kernel's KVM on this host.
pub struct KvmHypervisor {
    host: Arc<Host>,
}

/// What all VMs of one [`KvmHypervisor`] share.
struct Host {
    kvm: Kvm,
    options: KvmOptions,
    cpuid: OnceLock<CpuId>,
    /// Held while the kernel is asked: whoever needs it meanwhile waits instead of asking again.
    asking_cpuid: Mutex<()>,
    msrs: OnceLock<Vec<u32>>,
}

/// An adapter from KVM's errors to ours.
fn failed(operation: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> AccelError {
    move |error| AccelError::Os { operation, source: error.into() }
}

/// An adapter from the host's errors to ours.
fn os(operation: &'static str) -> impl FnOnce(std::io::Error) -> AccelError {
    move |source| AccelError::Os { operation, source }
}

fn unavailable(reason: impl Into<String>) -> AccelError {
    AccelError::Unavailable { kind: AccelKind::Kvm, reason: reason.into() }
}

impl KvmHypervisor {
    /// Opens `/dev/kvm` with default options.
    ///
    /// # Errors
    /// Fails when the device is missing or may not be opened, or the kernel's KVM lacks what is needed.
    pub fn new() -> Result<Self, AccelError> {
        Self::with_options(KvmOptions::default())
    }

    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// As for [`KvmHypervisor::new`], and when the kick signal is not a real-time signal.
    pub fn with_options(options: KvmOptions) -> Result<Self, AccelError> {
        Self::open(Path::new("/dev/kvm"), options)
    }

    fn open(path: &Path, options: KvmOptions) -> Result<Self, AccelError> {
        if !(libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(&options.kick_signal) {
            return Err(AccelError::Unsupported(format!(
                "signal {} is not a real-time signal",
                options.kick_signal
            )));
        }
        let shown = path.display();
        let c_path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())
            .map_err(|_| unavailable("the device path contains a NUL byte"))?;
        let kvm = Kvm::new_with_path(c_path).map_err(|e| match e.errno() {
            libc::ENOENT => unavailable(format!(
                "{shown} does not exist; load the kvm_intel or kvm_amd module and enable virtualisation in the firmware"
            )),
            libc::EACCES | libc::EPERM => unavailable(format!(
                "no permission to open {shown}; add the user to its group (usually kvm)"
            )),
            libc::ENODEV | libc::ENXIO => {
                unavailable(format!("{shown} has no driver; load the kvm_intel or kvm_amd module"))
            }
            _ => unavailable(format!("cannot open {shown}: {}", std::io::Error::from(e))),
        })?;
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(unavailable(format!(
                "the kernel's KVM has API version {version}, {KVM_API_VERSION} is needed"
            )));
        }
        let needed = [
            (Cap::UserMemory, "user memory regions"),
            (Cap::Irqchip, "an interrupt controller in the kernel"),
            (Cap::Irqfd, "irqfd"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::SignalMsi, "direct MSI"),
            (Cap::ImmediateExit, "immediate exit"),
            (Cap::ExtCpuid, "CPUID"),
            (Cap::MpState, "multiprocessing state"),
            (Cap::VcpuEvents, "vCPU events"),
        ];
        if let Some((_, what)) = needed.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(unavailable(format!("the kernel's KVM lacks {what}; use a newer kernel")));
        }
        let host = Host {
            kvm,
            options,
            cpuid: OnceLock::new(),
            asking_cpuid: Mutex::default(),
            msrs: OnceLock::new(),
        };
        Ok(Self { host: Arc::new(host) })
    }

    /// Whether this KVM is itself software (the module `kvm_pvm`): guest user code runs natively, but guest kernel
    /// code is emulated in the host kernel, slowly and incompletely.
    pub fn is_software() -> bool {
        Path::new("/sys/module/kvm_pvm").exists()
    }

    /// What this KVM offers beyond what is needed.
    pub fn features(&self) -> KvmFeatures {
        KvmFeatures::of(&self.host.kvm)
    }

    /// Creates a virtual machine; the concrete type offers what only KVM has.
    ///
    /// # Errors
    /// As for [`Hypervisor::create_vm`].
    pub fn create_kvm_vm(&self, spec: VmSpec) -> Result<Arc<KvmVm>, AccelError> {
        KvmVm::new(&self.host, spec)
    }
}

impl Host {
    /// What KVM can show to guests, read once.
    fn supported_cpuid(&self) -> Result<&CpuId, AccelError> {
        let _asking = self.asking_cpuid.lock();
        if let Some(cpuid) = self.cpuid.get() {
            return Ok(cpuid);
        }
        let cpuid =
            self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(self.cpuid.get_or_init(|| cpuid))
    }

    /// The MSRs that hold guest state, read once.
    fn saved_msrs(&self) -> Result<&[u32], AccelError> {
        if let Some(list) = self.msrs.get() {
            return Ok(list);
        }
        let list = self.kvm.get_msr_index_list().map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(self.msrs.get_or_init(|| msr::guest_state(list.as_slice())))
    }
}

impl Hypervisor for KvmHypervisor {
    fn kind(&self) -> AccelKind {
        AccelKind::Kvm
    }

    fn create_vm(&self, spec: VmSpec) -> Result<Arc<dyn Vm>, AccelError> {
        Ok(self.create_kvm_vm(spec)?)
    }

    fn prepare_vcpus(&self) {
        // The kernel executes CPUID for each leaf, which is slow where the host is virtual itself.
        if let Err(error) = self.host.supported_cpuid() {
            tracing::debug!(%error, "CPUID is asked for again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_or_wrong_device_is_explained() {
        let reason = |path: &str| match KvmHypervisor::open(Path::new(path), KvmOptions::default()) {
            Err(AccelError::Unavailable { kind: AccelKind::Kvm, reason }) => reason,
            Err(other) => panic!("{path}: {other}"),
            Ok(_) => panic!("{path} is no KVM"),
        };
        assert!(reason("/dev/no-such-kvm").contains("does not exist"));
        assert!(reason("/dev/null").contains("API version"));
    }

    #[test]
    fn a_signal_with_other_duties_is_refused() {
        let options = KvmOptions { kick_signal: libc::SIGTERM, ..KvmOptions::default() };
        assert!(matches!(KvmHypervisor::with_options(options), Err(AccelError::Unsupported(_))));
    }
}

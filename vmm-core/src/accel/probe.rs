//! Which accelerators work on this host, how fast each runs privileged and user code, and which one to take.
//!
//! That `/dev/kvm` opens does not say that it is usable: some hosts' KVM is itself software, which emulates guest
//! kernel code slowly and stops at instructions that it does not know. So each accelerator runs a small guest: first
//! some instructions that kernels use, then a loop in kernel mode and one in user mode, for a few milliseconds each.

use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use softcpu::{CpuState, Segment, SegmentAttributes};

use super::kvm::{KvmFeatures, KvmHypervisor};
use super::soft::SoftHypervisor;
use super::{AccelError, AccelKind, Hypervisor, IoBus, Vcpu, VcpuExit, VmSpec};
use crate::memory::GuestMemory;

/// How long each loop runs.
const LOOP_TIME: Duration = Duration::from_millis(3);

/// What was found out about one accelerator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Probed {
    /// Which one.
    pub kind: AccelKind,
    /// Whether guests can be expected to run.
    pub usable: bool,
    /// Why it is not usable, or not the one that [`choose`] takes.
    pub reason: Option<String>,
    /// Speed of guest kernel code, in millions of instructions a second.
    pub kernel_mips: Option<f64>,
    /// Speed of guest user code, in millions of instructions a second.
    pub user_mips: Option<f64>,
    /// What else this host's KVM offers; `None` for the software accelerator and where KVM cannot be opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kvm: Option<KvmFeatures>,
}

/// What was found out about all accelerators.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The accelerators, the preferred kind first.
    pub accelerators: Vec<Probed>,
    /// The one to take.
    pub chosen: Option<AccelKind>,
}

/// Probes all accelerators. Takes some tens of milliseconds.
pub fn probe() -> Report {
    let kvm = KvmHypervisor::new();
    let mut kvm = match &kvm {
        Ok(kvm) => Probed { kvm: Some(kvm.features()), ..measure(kvm) },
        Err(error) => unusable(AccelKind::Kvm, reason(error)),
    };
    let mut soft = measure(&SoftHypervisor::new());
    let chosen = match (kvm.usable, soft.usable) {
        (true, true) if kvm.kernel_mips < soft.kernel_mips => Some(AccelKind::Soft),
        (true, _) => Some(AccelKind::Kvm),
        (false, true) => Some(AccelKind::Soft),
        (false, false) => None,
    };
    if kvm.usable && chosen == Some(AccelKind::Soft) {
        kvm.reason = Some("runs guest kernels slower than the software accelerator".into());
    }
    if soft.usable && chosen == Some(AccelKind::Kvm) {
        soft.reason = Some("runs guest kernels slower than KVM".into());
    }
    Report { accelerators: vec![kvm, soft], chosen }
}

/// Opens the accelerator of `kind`, without a probe; with none, the better one that works here.
///
/// # Errors
/// Fails when the accelerator does not work here.
pub fn open(kind: Option<AccelKind>) -> Result<Box<dyn Hypervisor>, AccelError> {
    match kind {
        Some(AccelKind::Kvm) => Ok(Box::new(KvmHypervisor::new()?)),
        Some(AccelKind::Soft) => Ok(Box::new(SoftHypervisor::new())),
        None => choose(),
    }
}

/// Opens the accelerator that runs guest kernels faster.
///
/// # Errors
/// Fails when none works here.
pub fn choose() -> Result<Box<dyn Hypervisor>, AccelError> {
    let report = probe();
    match report.chosen {
        Some(kind) => open(Some(kind)),
        None => {
            let reasons: Vec<_> = report.accelerators.into_iter().filter_map(|p| p.reason).collect();
            Err(AccelError::Unavailable { kind: AccelKind::Soft, reason: reasons.join("; ") })
        }
    }
}

fn unusable(kind: AccelKind, reason: String) -> Probed {
    Probed { kind, usable: false, reason: Some(reason), kernel_mips: None, user_mips: None, kvm: None }
}

fn reason(error: &AccelError) -> String {
    match error {
        AccelError::Unavailable { reason, .. } => reason.clone(),
        AccelError::Os { operation, source } => format!("{operation} failed: {source}"),
        other => other.to_string(),
    }
}

/// Runs the guest on one accelerator.
fn measure(hypervisor: &dyn Hypervisor) -> Probed {
    let kind = hypervisor.kind();
    match Guest::new(hypervisor).and_then(|mut guest| {
        // The loop follows the instructions: an accelerator that knows them has run both.
        let (gap, kernel) = match guest.speed(Level::Kernel, CODE)? {
            Speed::Mips(mips) => (None, mips),
            Speed::Fault(why) => (Some(why), guest.speed(Level::Kernel, LOOP)?.mips(kind)?),
        };
        Ok((gap, kernel, guest.speed(Level::User, LOOP)?.mips(kind)?))
    }) {
        Ok((gap, kernel, user)) => Probed {
            kind,
            usable: gap.is_none(),
            reason: gap,
            kernel_mips: Some(kernel),
            user_mips: Some(user),
            kvm: None,
        },
        Err(error) => unusable(kind, reason(&error)),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Kernel,
    User,
}

const RAM: u64 = 0x1_0000;
const CODE: u64 = 0x1000;
const PAGE_TABLES: u64 = 0x4000;
const DATA: u64 = 0x8000;
/// Where the loop starts: after the instructions at [`CODE`].
const LOOP: u64 = CODE + KERNEL_INSTRUCTIONS.len() as u64;

/// Instructions that kernels execute and incomplete emulators do not know.
const KERNEL_INSTRUCTIONS: &[u8] = &[
    0x48, 0x0f, 0xc7, 0x0e, // cmpxchg16b [rsi]
    0x0f, 0x57, 0xc0, // xorps xmm0, xmm0
    0x0f, 0x29, 0x06, // movaps [rsi], xmm0
    0x66, 0x0f, 0xd4, 0xc0, // paddq xmm0, xmm0
];

/// Counts its rounds in RBX; loads, stores and branches like ordinary code.
const LOOP_CODE: &[u8] = &[
    0x48, 0x8b, 0x06, // mov rax, [rsi]
    0x48, 0x01, 0xd8, // add rax, rbx
    0x48, 0x89, 0x46, 0x08, // mov [rsi + 8], rax
    0x48, 0x31, 0xc1, // xor rcx, rax
    0x48, 0xff, 0xc3, // inc rbx
    0x48, 0x85, 0xdb, // test rbx, rbx
    0x75, 0xeb, // jnz to the first
];
const LOOP_INSTRUCTIONS: f64 = 7.0;

/// RBX in the order of the instruction encoding.
const RBX: usize = 3;
const RSI: usize = 6;

enum Speed {
    Mips(f64),
    Fault(String),
}

impl Speed {
    fn mips(self, kind: AccelKind) -> Result<f64, AccelError> {
        match self {
            Self::Mips(mips) => Ok(mips),
            Self::Fault(reason) => Err(AccelError::Unavailable { kind, reason }),
        }
    }
}

struct Guest {
    cpu: Box<dyn Vcpu>,
}

struct NoDevices;

impl IoBus for NoDevices {
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn port_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, _: u16, _: &[u8]) {}
}

impl Guest {
    fn new(hypervisor: &dyn Hypervisor) -> Result<Self, AccelError> {
        let no_memory = |e: &dyn std::fmt::Display| AccelError::Unsupported(format!("probe memory: {e}"));
        let memory = GuestMemory::flat(RAM).map_err(|e| no_memory(&e))?;
        // One 2 MiB page that user mode may use, too.
        let tables = [
            (PAGE_TABLES, (PAGE_TABLES + 0x1000) | 7),
            (PAGE_TABLES + 0x1000, (PAGE_TABLES + 0x2000) | 7),
            (PAGE_TABLES + 0x2000, 0x87),
        ];
        for (address, entry) in tables {
            memory.write_obj(address, &entry).map_err(|e| no_memory(&e))?;
        }
        let code = [KERNEL_INSTRUCTIONS, LOOP_CODE].concat();
        memory.write(CODE, &code).map_err(|e| no_memory(&e))?;
        let vm = hypervisor.create_vm(VmSpec {
            memory,
            vcpus: 1,
            model: None,
            tsc_khz: None,
            bus: Arc::new(NoDevices),
        })?;
        Ok(Self { cpu: vm.create_vcpu(0)? })
    }

    /// Runs from `start` for [`LOOP_TIME`], or longer when a busy host lets the guest do nothing in that time.
    fn speed(&mut self, level: Level, start: u64) -> Result<Speed, AccelError> {
        for time in [LOOP_TIME, LOOP_TIME * 10] {
            match self.run_for(level, start, time)? {
                // The first run also paid for its pages and for translating.
                Some(Speed::Mips(first)) => {
                    return Ok(match self.run_for(level, start, time)? {
                        Some(Speed::Mips(second)) => Speed::Mips(first.max(second)),
                        _ => Speed::Mips(first),
                    });
                }
                Some(fault) => return Ok(fault),
                None => {}
            }
        }
        let last = self.run_for(level, start, LOOP_TIME * 100)?;
        Ok(last.unwrap_or_else(|| Speed::Fault("guest code makes no progress".into())))
    }

    /// Runs from `start` for `time`; `None` when the guest did nothing.
    fn run_for(&mut self, level: Level, start: u64, time: Duration) -> Result<Option<Speed>, AccelError> {
        self.cpu.set_state(&long_mode(level, start))?;
        let handle = self.cpu.handle();
        let (ended, wait) = mpsc::channel::<()>();
        let begin = Instant::now();
        let exit = thread::scope(|scope| {
            let timer = thread::Builder::new().name("accel-probe".into()).spawn_scoped(scope, move || {
                // The sender is dropped when the run ends by itself.
                if wait.recv_timeout(time) == Err(mpsc::RecvTimeoutError::Timeout) {
                    handle.kick();
                }
            });
            timer.map_err(|source| AccelError::Os { operation: "start of the timer thread", source })?;
            let exit = self.cpu.run();
            drop(ended);
            exit
        })?;
        let seconds = begin.elapsed().as_secs_f64();
        match exit {
            VcpuExit::Interrupted => {
                let rounds = self.cpu.state()?.gpr[RBX];
                if rounds == 0 {
                    return Ok(None);
                }
                // To a thousandth: more digits would only pretend.
                let mips = (rounds as f64 * LOOP_INSTRUCTIONS / seconds / 1e3).round() / 1e3;
                Ok(Some(Speed::Mips(mips)))
            }
            VcpuExit::Fault(fault) => {
                let instruction = fault.instruction.as_deref().unwrap_or("an instruction");
                let why = format!("cannot execute {instruction} in guest kernels: {}", fault.reason);
                Ok(Some(Speed::Fault(why)))
            }
            other => Ok(Some(Speed::Fault(format!("a small guest ended with {other:?}")))),
        }
    }
}

/// 64-bit mode at `start`.
fn long_mode(level: Level, start: u64) -> CpuState {
    let privilege = if level == Level::User { 3 } else { 0 };
    let segment = |selector: u16, attributes: u16| Segment {
        selector: selector | privilege,
        attributes: SegmentAttributes(attributes | privilege << 5),
        limit: u32::MAX,
        base: 0,
    };
    let mut state = CpuState::reset();
    let data = segment(0x10, 0xc093);
    state.segments = [data, segment(0x8, 0xa09b), data, data, data, data];
    state.cr0 = 0x8000_0031;
    state.cr3 = PAGE_TABLES;
    // PAE, OSFXSR, OSXMMEXCPT.
    state.cr4 = 0x620;
    // LME, LMA.
    state.msrs.efer = 0x500;
    state.rip = start;
    state.gpr[RSI] = DATA;
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_is_consistent_and_survives_json() {
        let report = probe();
        println!("{report:#?}");
        assert_eq!(report.accelerators.len(), 2);
        for probed in &report.accelerators {
            assert!(probed.usable || probed.reason.is_some(), "{probed:?}");
            if report.chosen == Some(probed.kind) {
                assert!(probed.usable && probed.kernel_mips > Some(0.0), "{probed:?}");
            } else {
                assert!(probed.reason.is_some(), "{probed:?}");
            }
        }
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
    }

    #[test]
    fn software_kvm_is_found_out() {
        let Ok(kvm) = KvmHypervisor::new() else { return };
        let probed = measure(&kvm);
        assert_eq!(probed.usable, !KvmHypervisor::is_software(), "{probed:?}");
        assert!(probed.user_mips > Some(100.0), "user code runs natively: {probed:?}");
    }
}

//! Stopping a vCPU from other threads, without a signal handler; see the module's documentation.

use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kvm_ioctls::VcpuFd;
use parking_lot::Mutex;

use super::sys;
use crate::accel::VcpuHandle;

/// The part of a vCPU that other threads reach.
pub struct Kicker {
    signal: i32,
    kicked: AtomicBool,
    nmi: AtomicBool,
    /// Instructions that the software CPU executed.
    assisted: AtomicU64,
    target: Mutex<Target>,
}

/// Where to send the signal.
struct Target {
    /// The thread inside `run`. The signal is sent under the lock, so it never reaches a thread that left.
    thread: Option<libc::pid_t>,
    /// A signal is queued for it that nobody has taken yet.
    signalled: bool,
}

/// A thread's stay inside `run`: the signal is blocked there.
pub struct Running<'a> {
    kicker: &'a Kicker,
    old_mask: libc::sigset_t,
}

fn just(signal: i32) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set; the signal number was checked when the hypervisor was opened.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        set.assume_init()
    }
}

/// The kernel's form of a signal set.
fn bits(set: &libc::sigset_t) -> u64 {
    (1..=64).fold(0, |bits, signal| {
        // SAFETY: an initialised set and a valid signal number.
        let member = unsafe { libc::sigismember(set, signal) } == 1;
        bits | u64::from(member) << (signal - 1)
    })
}

impl Kicker {
    pub fn new(signal: i32) -> Arc<Self> {
        Arc::new(Self {
            signal,
            kicked: AtomicBool::new(false),
            nmi: AtomicBool::new(false),
            assisted: AtomicU64::new(0),
            target: Mutex::new(Target { thread: None, signalled: false }),
        })
    }

    /// Registers the calling thread as the one that runs the vCPU. `guest_mask` caches what the kernel was last told.
    pub fn enter(&self, vcpu: &VcpuFd, guest_mask: &mut Option<u64>) -> io::Result<Running<'_>> {
        let mut old_mask = MaybeUninit::uninit();
        // SAFETY: both sets live across the call, which initialises `old_mask`.
        let old_mask = unsafe {
            let rc = libc::pthread_sigmask(libc::SIG_BLOCK, &just(self.signal), old_mask.as_mut_ptr());
            if rc != 0 {
                return Err(io::Error::from_raw_os_error(rc));
            }
            old_mask.assume_init()
        };
        // From here on the drop restores the mask.
        let running = Running { kicker: self, old_mask };
        let wanted = bits(&old_mask) & !(1 << (self.signal - 1));
        if *guest_mask != Some(wanted) {
            sys::set_signal_mask(vcpu, wanted)?;
            *guest_mask = Some(wanted);
        }
        // SAFETY: no preconditions.
        self.target.lock().thread = Some(unsafe { libc::gettid() });
        Ok(running)
    }

    /// Counts an instruction that the software CPU executed.
    pub fn count_assisted(&self) {
        self.assisted.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether a kick waits to be taken.
    pub fn is_kicked(&self) -> bool {
        self.kicked.load(Ordering::SeqCst)
    }

    /// Takes a kick.
    pub fn take_kick(&self) -> bool {
        self.kicked.swap(false, Ordering::SeqCst)
    }

    /// Takes an NMI.
    pub fn take_nmi(&self) -> bool {
        self.nmi.load(Ordering::Relaxed) && self.nmi.swap(false, Ordering::SeqCst)
    }

    fn signal(&self) {
        let mut target = self.target.lock();
        if let Some(thread) = target.thread.filter(|_| !target.signalled) {
            // SAFETY: the thread is inside `run`, where the signal is blocked.
            target.signalled =
                unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, self.signal) } == 0;
        }
    }

    /// Takes the queued signal, if there is one.
    pub fn drain(&self) {
        Self::drain_locked(self.signal, &mut self.target.lock());
    }

    fn drain_locked(signal: i32, target: &mut Target) {
        if std::mem::take(&mut target.signalled) {
            let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: the set and the time live across the call; the signal's details are not asked for.
            unsafe { libc::sigtimedwait(&just(signal), std::ptr::null_mut(), &zero) };
        }
    }
}

impl VcpuHandle for Kicker {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.signal();
    }

    fn nmi(&self) {
        self.nmi.store(true, Ordering::SeqCst);
        self.signal();
    }

    fn assisted(&self) -> u64 {
        self.assisted.load(Ordering::Relaxed)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut target = self.kicker.target.lock();
        target.thread = None;
        Kicker::drain_locked(self.kicker.signal, &mut target);
        drop(target);
        // SAFETY: restores the mask that `enter` read on this same thread (`Running` never leaves `run`).
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.old_mask, std::ptr::null_mut()) };
    }
}

//! vCPU threads, and the state that they share with the machine's owner.

use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::{Condvar, Mutex, MutexGuard};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::events::{Events, StopReason, VmEvent};
use super::metrics::CpuMetrics;
use crate::accel::{DebugExit, SystemEvent, Vcpu, VcpuExit, VcpuHandle};
use crate::devices::legacy::PowerEvent;

/// The interpreter's unoptimised build nests calls deeply; only pages that are touched count.
const STACK_SIZE: usize = 1 << 20;

/// What the vCPUs are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Wait: not started, or paused.
    Waiting,
    Running,
    Stopping,
}

struct State {
    phase: Phase,
    reason: Option<StopReason>,
    /// Threads that are in the guest or on their way there.
    active: usize,
    /// Threads that have not ended.
    alive: usize,
    /// What waiting vCPUs are asked to do.
    jobs: Vec<(u32, Job)>,
    /// What stopped a vCPU that is being debugged.
    debug_stop: Option<(u32, DebugExit)>,
    /// The only vCPU that runs, while a debugger steps it.
    only: Option<u32>,
    /// vCPUs wait for a moment although the machine runs.
    held: bool,
}

impl State {
    fn waits(&self, id: u32) -> bool {
        match self.phase {
            Phase::Waiting => true,
            Phase::Running => self.held || self.only.is_some_and(|only| only != id),
            Phase::Stopping => false,
        }
    }
}

type Job = Box<dyn FnOnce(&mut dyn Vcpu) + Send>;

/// Shared by the vCPU threads, the devices that stop the machine, and the owner.
pub(super) struct Control {
    state: Mutex<State>,
    changed: Condvar,
    handles: Mutex<Vec<Arc<dyn VcpuHandle>>>,
    pub(super) events: Events,
    /// Whether a panic of the guest's kernel ends the machine.
    stop_on_panic: bool,
    /// A thread that is already on its way out needs no second kick.
    stopping: AtomicBool,
    /// Signalled when a debugger has to look at the machine; there is one only when the machine is debugged.
    debug_event: Option<EventFd>,
    /// What the machine's threads log belongs to it. Its parent is the builder's.
    pub(super) span: tracing::Span,
}

impl Control {
    pub(super) fn new(
        stop_on_panic: bool,
        debugged: bool,
        span: tracing::Span,
    ) -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            state: Mutex::new(State {
                phase: Phase::Waiting,
                reason: None,
                active: 0,
                alive: 0,
                jobs: Vec::new(),
                debug_stop: None,
                only: None,
                held: false,
            }),
            changed: Condvar::new(),
            handles: Mutex::default(),
            events: Events::new()?,
            stop_on_panic,
            stopping: AtomicBool::new(false),
            span,
            debug_event: debugged.then(|| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)).transpose()?,
        }))
    }

    /// Polls as readable when a debugger has to look at the machine.
    ///
    /// # Panics
    /// When the machine is not debugged (a caller's mistake).
    pub(super) fn debug_event(&self) -> &EventFd {
        self.debug_event.as_ref().expect("only the debugger's server asks, and it exists with the descriptor")
    }

    fn tell_debugger(&self) {
        if let Some(event) = &self.debug_event {
            // The counter only has to be above zero.
            let _ = event.write(1);
        }
    }

    /// Empties [`Self::debug_event`]. What happens afterwards signals it again, so look at everything afterwards.
    pub(super) fn clear_debug_event(&self) {
        if let Some(event) = &self.debug_event {
            // An empty counter is no error.
            let _ = event.read();
        }
    }

    /// Why a vCPU stopped for the debugger, once, when all of them wait.
    pub(super) fn take_debug_stop(&self) -> Option<(u32, DebugExit)> {
        let mut s = self.state.lock();
        s.debug_stop?;
        while s.active > 0 && s.phase == Phase::Waiting {
            self.changed.wait(&mut s);
        }
        s.debug_stop.take()
    }

    /// Why the machine has stopped or is about to.
    pub(super) fn ending(&self) -> Option<StopReason> {
        self.state.lock().reason.clone()
    }

    /// Runs `f` on the thread of a waiting vCPU; `None` when the machine stops before.
    pub(super) fn with_vcpu<R: Send + 'static>(
        &self,
        id: u32,
        f: impl FnOnce(&mut dyn Vcpu) -> R + Send + 'static,
    ) -> Option<R> {
        let (sender, receiver) = mpsc::sync_channel(1);
        {
            let mut s = self.state.lock();
            if s.phase != Phase::Waiting || s.alive == 0 {
                return None;
            }
            let job = move |vcpu: &mut dyn Vcpu| {
                // The caller waits for the answer.
                let _ = sender.send(f(vcpu));
            };
            s.jobs.push((id, Box::new(job)));
            self.changed.notify_all();
        }
        receiver.recv().ok()
    }

    /// Ends the machine; the first reason counts.
    pub(super) fn stop(&self, reason: StopReason) {
        {
            let mut s = self.state.lock();
            s.phase = Phase::Stopping;
            s.reason.get_or_insert(reason);
            // Whoever waits for an answer learns that there will be none.
            s.jobs.clear();
            // A machine that never started has no thread that would notice.
            if s.alive == 0 {
                self.finished(&s);
            }
        }
        self.tell_debugger();
        if !self.stopping.swap(true, Ordering::SeqCst) {
            self.kick();
        }
    }

    fn finished(&self, s: &State) {
        if let Some(reason) = &s.reason {
            self.events.push(VmEvent::Stopped(reason.clone()));
        }
        self.changed.notify_all();
    }

    /// Reacts to what the guest asks for.
    pub(super) fn power(&self, event: PowerEvent) {
        match event {
            PowerEvent::PowerOff => self.stop(StopReason::PowerOff),
            PowerEvent::Reset => self.stop(StopReason::Reset),
            PowerEvent::Exit(code) => self.stop(StopReason::Exit(code)),
            PowerEvent::CrashLoaded => self.events.push(VmEvent::Panicked),
            PowerEvent::Panicked => {
                self.events.push(VmEvent::Panicked);
                if self.stop_on_panic {
                    self.stop(StopReason::Panic);
                }
            }
        }
    }

    /// What the vCPUs have counted.
    pub(super) fn cpu_metrics(&self) -> CpuMetrics {
        let handles = self.handles.lock();
        CpuMetrics {
            unimplemented_instructions: handles.iter().map(|h| h.unimplemented()).sum(),
            assisted_instructions: handles.iter().map(|h| h.assisted()).sum(),
        }
    }

    fn kick(&self) {
        self.handles.lock().iter().for_each(|h| h.kick());
        self.changed.notify_all();
    }

    /// Starts or resumes the vCPUs; false when the machine has stopped.
    pub(super) fn run(&self) -> bool {
        self.run_only(None)
    }

    /// Starts or resumes one vCPU, or all of them.
    pub(super) fn run_only(&self, only: Option<u32>) -> bool {
        let mut s = self.state.lock();
        if s.phase == Phase::Stopping {
            return false;
        }
        s.phase = Phase::Running;
        s.only = only;
        s.jobs.clear();
        self.changed.notify_all();
        true
    }

    /// Whether the vCPUs may run.
    pub(super) fn is_running(&self) -> bool {
        self.state.lock().phase == Phase::Running
    }

    #[cfg(test)]
    pub(super) fn is_held(&self) -> bool {
        self.state.lock().held
    }

    /// Makes vCPUs wait without pausing the machine, or lets them go on.
    pub(super) fn hold(&self, held: bool) {
        self.state.lock().held = held;
        if held {
            self.kick();
        } else {
            self.changed.notify_all();
        }
    }

    /// Makes all vCPUs wait, and returns when they do; false when the machine has stopped.
    pub(super) fn pause(&self) -> bool {
        let mut s = self.state.lock();
        if s.phase == Phase::Stopping {
            return false;
        }
        s.phase = Phase::Waiting;
        drop(s);
        self.kick();
        s = self.state.lock();
        while s.active > 0 && s.phase != Phase::Stopping {
            self.changed.wait(&mut s);
        }
        s.phase != Phase::Stopping
    }

    /// Why the machine stopped, once all its vCPUs have.
    pub(super) fn reason(&self) -> Option<StopReason> {
        let s = self.state.lock();
        s.reason.clone().filter(|_| s.alive == 0)
    }

    /// Waits until all vCPUs have stopped, but not beyond `deadline`.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> Option<StopReason> {
        let mut s = self.state.lock();
        loop {
            if let (Some(reason), 0) = (&s.reason, s.alive) {
                return Some(reason.clone());
            }
            match deadline {
                None => self.changed.wait(&mut s),
                Some(deadline) if Instant::now() >= deadline => return None,
                Some(deadline) => drop(self.changed.wait_until(&mut s, deadline)),
            }
        }
    }

    /// Starts the thread of a vCPU that is still to come: it does `first`, if there is something to do, and waits for
    /// [`Self::hand_over`].
    pub(super) fn spawn(
        self: &Arc<Self>,
        id: u32,
        first: Option<impl FnOnce() + Send + 'static>,
    ) -> std::io::Result<VcpuThread> {
        let control = self.clone();
        let (vcpu, receiver) = mpsc::sync_channel(1);
        let run = move || {
            if let Some(first) = first {
                first();
            }
            let Ok(vcpu) = receiver.recv() else { return };
            let _end = End(control.clone());
            let span = tracing::info_span!(parent: &control.span, "vcpu", id);
            span.in_scope(|| control.drive(id, vcpu));
        };
        let thread =
            std::thread::Builder::new().name(format!("vcpu{id}")).stack_size(STACK_SIZE).spawn(run)?;
        Ok(VcpuThread { vcpu: Some(vcpu), thread: Some(thread) })
    }

    /// Gives a thread its vCPU, which it drives from the next [`Self::run`] on.
    pub(super) fn hand_over(&self, thread: &mut VcpuThread, vcpu: Box<dyn Vcpu>) {
        self.handles.lock().push(vcpu.handle());
        let mut s = self.state.lock();
        // A thread that has its vCPU or ended early takes none.
        if thread.vcpu.take().is_some_and(|sender| sender.send(vcpu).is_ok()) {
            s.alive += 1;
        }
    }

    /// A vCPU met a breakpoint: all of them wait for the debugger.
    fn debug_stopped(&self, id: u32, stop: DebugExit) {
        {
            let mut s = self.state.lock();
            if s.phase == Phase::Stopping {
                return;
            }
            s.phase = Phase::Waiting;
            s.debug_stop.get_or_insert((id, stop));
        }
        self.kick();
        self.tell_debugger();
    }

    fn drive(&self, id: u32, mut vcpu: Box<dyn Vcpu>) {
        loop {
            {
                let mut s = self.state.lock();
                while s.waits(id) {
                    match s.jobs.iter().position(|(vcpu, _)| *vcpu == id) {
                        Some(at) => {
                            let (_, job) = s.jobs.remove(at);
                            MutexGuard::unlocked(&mut s, || job(&mut *vcpu));
                        }
                        None => self.changed.wait(&mut s),
                    }
                }
                if s.phase == Phase::Stopping {
                    return;
                }
                s.active += 1;
            }
            let exit = vcpu.run();
            {
                let mut s = self.state.lock();
                s.active -= 1;
                if s.active == 0 {
                    self.changed.notify_all();
                }
            }
            match exit {
                Ok(VcpuExit::Interrupted) => {}
                Ok(VcpuExit::Debug(stop)) => self.debug_stopped(id, stop),
                Ok(VcpuExit::TripleFault) => self.stop(StopReason::TripleFault),
                Ok(VcpuExit::SystemEvent(event)) => self.stop(match event {
                    SystemEvent::Reset => StopReason::Reset,
                    SystemEvent::Shutdown => StopReason::PowerOff,
                    SystemEvent::Crash => StopReason::Panic,
                }),
                Ok(VcpuExit::Fault(fault)) => {
                    tracing::error!(state = ?fault.state, bytes = ?fault.bytes, "vCPU fault");
                    self.stop(StopReason::Error(match &fault.instruction {
                        Some(instruction) => format!("{fault} ({instruction})"),
                        None => fault.to_string(),
                    }));
                }
                Err(error) => self.stop(StopReason::Error(format!("vCPU {id}: {}", chain(&error)))),
            }
        }
    }
}

/// The thread of a vCPU. Dropping it waits for its end: without a vCPU it ends by itself, otherwise with the machine.
pub(super) struct VcpuThread {
    /// Where the thread gets its vCPU from.
    vcpu: Option<mpsc::SyncSender<Box<dyn Vcpu>>>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Binds the thread to host CPUs, if there are any in the list.
    pub(super) fn pin(&self, cpus: &[usize]) -> std::io::Result<()> {
        self.thread.as_ref().map_or(Ok(()), |thread| pin(thread, cpus))
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.vcpu = None;
        if let Some(thread) = self.thread.take() {
            // A panic has been turned into a stop reason.
            let _ = thread.join();
        }
    }
}

/// Marks a thread as ended, also when it panicked: a bug in one machine must not hang its owner.
struct End(Arc<Control>);

impl Drop for End {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop(StopReason::Error("A vCPU thread panicked; this is a bug, please report it".into()));
        }
        let mut s = self.0.state.lock();
        if std::thread::panicking() {
            s.active = s.active.saturating_sub(1);
        }
        s.alive -= 1;
        if s.alive == 0 {
            self.0.finished(&s);
        }
    }
}

/// An error and its causes in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += ": ";
        text += &cause.to_string();
        source = cause.source();
    }
    text
}

fn pin(thread: &JoinHandle<()>, cpus: &[usize]) -> std::io::Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    // SAFETY: an all-zero set is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &cpu in cpus.iter().filter(|&&cpu| cpu < libc::CPU_SETSIZE as usize) {
        // SAFETY: the index is within the set.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: the thread has not been joined, and `set` is a live variable of the stated size.
    let rc =
        unsafe { libc::pthread_setaffinity_np(thread.as_pthread_t(), size_of::<libc::cpu_set_t>(), &set) };
    if rc == 0 { Ok(()) } else { Err(std::io::Error::from_raw_os_error(rc)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_without_a_vcpu_ends_with_its_handle() {
        let control = Control::new(false, false, tracing::Span::none()).unwrap();
        let done = Arc::new(AtomicBool::new(false));
        let told = done.clone();
        let thread = control.spawn(0, Some(move || told.store(true, Ordering::SeqCst))).unwrap();
        drop(thread);
        assert!(done.load(Ordering::SeqCst), "it was waited for");
        assert_eq!(Arc::strong_count(&done), 1, "nothing of it is left");
        assert_eq!(control.state.lock().alive, 0);
    }
}

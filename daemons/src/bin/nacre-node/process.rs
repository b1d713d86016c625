//! VMs as `nacre run` processes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cluster::agent::{VmEvents, VmRunner};
use cluster::ha::{Signs, VmSpec};
use cluster::node::{VmAction, VmEvent};
use cluster::types::{HostId, Resources, VmId};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};

use crate::moves::{self, Moves};
use crate::signs::{Watch, direct_port};

/// How often the processes are looked at.
const LOOK: Duration = Duration::from_millis(20);

/// What a reset of the host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// The VMs are killed; the agent ends by itself.
    End,
    /// The kernel resets the machine.
    Sysrq,
}

struct Vm {
    epoch: u64,
    child: Child,
    /// Processor time in clock ticks at the last look, and when that was.
    used: (u64, Instant),
    watch: Watch,
}

type Vms = Mutex<BTreeMap<VmId, Vm>>;

/// Runs each VM as a process that dies with this one.
pub struct ProcessRunner {
    program: PathBuf,
    dir: PathBuf,
    reset: Reset,
    moves: Option<Moves>,
    events: VmEvents,
    vms: Arc<Vms>,
    stop: Arc<AtomicBool>,
    reaper: Option<JoinHandle<()>>,
    /// Threads that talk to processes; they end with what they say, or with the process.
    talks: Vec<JoinHandle<()>>,
    /// MHz of one processor.
    speed: u64,
}

fn lock(vms: &Vms) -> MutexGuard<'_, BTreeMap<VmId, Vm>> {
    vms.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ProcessRunner {
    /// Makes a runner that keeps its files in `dir`. Processes that a former life left are killed first.
    pub fn new(
        program: PathBuf,
        dir: PathBuf,
        reset: Reset,
        moves: Option<Moves>,
        events: VmEvents,
    ) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        kill_leftovers(&dir)?;
        let vms: Arc<Vms> = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let (watched, tell, stopping, files) = (vms.clone(), events.clone(), stop.clone(), dir.clone());
        let reaper = std::thread::Builder::new().name("vm-reaper".into()).spawn(move || {
            while !stopping.load(Ordering::Relaxed) {
                reap(&watched, &tell, &files);
                std::thread::sleep(LOOK);
            }
        })?;
        let speed = processor_speed();
        let (reaper, talks) = (Some(reaper), Vec::new());
        Ok(ProcessRunner { program, dir, reset, moves, events, vms, stop, reaper, talks, speed })
    }

    /// Starts a VM's process: it boots, or waits for a machine at an address.
    fn start(&self, spec: &VmSpec, epoch: u64, incoming: Option<&str>) -> io::Result<()> {
        let file = |end: &str| self.file(spec.id, end);
        let (heartbeats, metrics) = (file("heartbeats"), file("metrics"));
        let (definition, beats) = direct_port(&spec.definition, &heartbeats);
        fs::write(file("json"), definition)?;
        let log = File::create(file("log"))?;
        let mut command = Command::new(&self.program);
        command.args(["run", "--restart", "--config"]).arg(file("json")).arg("--metrics").arg(&metrics);
        command.arg("--control").arg(file("control"));
        if let Some(address) = incoming {
            command.args(["--incoming", address]);
            if let Some(directory) = self.moves.as_ref().and_then(Moves::certificates) {
                command.arg("--tls-certificates").arg(directory);
            }
        }
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let parent = nix::unistd::getpid();
        let prepare = move || {
            // The VM must not outlive the agent, which guards its leases.
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            if nix::unistd::getppid() != parent {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            SigSet::empty().thread_set_mask()?;
            Ok(())
        };
        // SAFETY: between fork and exec only prctl, getppid and sigprocmask are called, which are
        // async-signal-safe, and nothing is allocated.
        unsafe { command.pre_exec(prepare) };
        let watch = Watch::start(beats.then_some(heartbeats), metrics)?;
        let child = command.spawn()?;
        let pid = child.id();
        let mut vms = lock(&self.vms);
        vms.insert(spec.id, Vm { epoch, child, used: (0, Instant::now()), watch });
        // Without this file a leftover could not be found: better no VM than that.
        let noted = start_time(pid).ok_or(io::ErrorKind::NotFound.into());
        let noted = noted.and_then(|t| {
            let mut out = File::create(file("pid"))?;
            writeln!(out, "{pid} {t}")
        });
        if let (Err(error), Some(vm)) = (noted, vms.get_mut(&spec.id)) {
            tracing::error!(%error, "a VM's process cannot be noted");
            vm.child.kill()?;
        }
        Ok(())
    }

    fn file(&self, vm: VmId, end: &str) -> PathBuf {
        self.dir.join(format!("{}.{end}", vm.0))
    }

    /// Talks to a VM's process on a thread of its own; `talk` gets the process's control socket.
    fn talk(&mut self, vm: VmId, epoch: u64, talk: impl FnOnce(&Path) -> Said + Send + 'static) {
        self.talks.retain(|t| !t.is_finished());
        let (events, vms, control) = (self.events.clone(), self.vms.clone(), self.file(vm, "control"));
        let run = move || match talk(&control) {
            Said::Event(event, why) => events.tell(vm, epoch, event, why),
            // Its end is told when it is reaped.
            Said::Broken(why) => {
                tracing::error!(vm = vm.0, why, "a VM's process is killed");
                signal(&vms, vm, epoch, Signal::SIGKILL);
            }
        };
        match std::thread::Builder::new().name("vm-talk".into()).spawn(run) {
            Ok(thread) => self.talks.push(thread),
            Err(error) => {
                tracing::error!(vm = vm.0, %error, "no thread to talk to a VM's process, which is killed");
                signal(&self.vms, vm, epoch, Signal::SIGKILL);
            }
        }
    }

    fn move_to(&mut self, vm: VmId, epoch: u64, host: HostId) {
        let Some(moves) = self.moves.clone() else {
            let why = format!("It cannot move to {host}: this host's configuration has no `migration`");
            return self.events.tell(vm, epoch, VmEvent::MoveFailed, Some(why));
        };
        self.talk(vm, epoch, move |control| match moves.send(control, vm, host) {
            Ok(()) => Said::Event(VmEvent::Quiesced, None),
            Err(why) if moves::runs(control) => {
                Said::Event(VmEvent::MoveFailed, Some(format!("It did not move to {host}: {why}")))
            }
            Err(why) => Said::Broken(format!("It neither moved nor goes on: {why}")),
        });
    }

    fn receive(&self, spec: &VmSpec, epoch: u64, from: HostId) {
        let address = self.moves.as_ref().and_then(|moves| moves.here(spec.id));
        let failed = match address.map(|address| self.start(spec, epoch, Some(&address))) {
            Some(Ok(())) => return,
            Some(Err(error)) => format!("{} cannot be run: {error}", self.program.display()),
            None => format!("It cannot be received from {from}: the configuration has no port for it"),
        };
        self.events.tell(spec.id, epoch, VmEvent::Exited, Some(failed));
    }
}

/// What came of talking to a VM's process.
enum Said {
    Event(VmEvent, Option<String>),
    /// The process is of no use any more.
    Broken(String),
}

fn signal(vms: &Vms, vm: VmId, epoch: u64, signal: Signal) {
    let vms = lock(vms);
    if let Some(vm) = vms.get(&vm).filter(|v| v.epoch == epoch)
        && let Ok(pid) = i32::try_from(vm.child.id())
    {
        // It is not reaped before it leaves the map, so the number is still its own.
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

impl VmRunner for ProcessRunner {
    fn act(&mut self, vm: VmId, epoch: u64, action: VmAction) {
        let tell = |event, why: String| self.events.tell(vm, epoch, event, Some(why));
        match action {
            VmAction::Start(spec) => match self.start(&spec, epoch, None) {
                Ok(()) => tell(VmEvent::Started, "Its process was started".into()),
                Err(error) => {
                    tell(VmEvent::Exited, format!("{} cannot be run: {error}", self.program.display()));
                }
            },
            VmAction::Stop => signal(&self.vms, vm, epoch, Signal::SIGTERM),
            VmAction::Kill => {
                if lock(&self.vms).get(&vm).is_some_and(|v| v.epoch == epoch) {
                    signal(&self.vms, vm, epoch, Signal::SIGKILL);
                } else {
                    tell(VmEvent::Exited, "It had no process".into());
                }
            }
            VmAction::MoveTo(host) => self.move_to(vm, epoch, host),
            VmAction::Receive { spec, from } => self.receive(&spec, epoch, from),
            VmAction::Resume => {
                let (began, stop) = ("It goes on here after a move", self.stop.clone());
                self.talk(vm, epoch, move |control| match moves::resume(control, &stop) {
                    Ok(()) => Said::Event(VmEvent::Started, Some(began.into())),
                    Err(why) => Said::Broken(format!("It cannot go on after a move: {why}")),
                });
            }
        }
    }

    fn usage(&mut self) -> Vec<(VmId, Resources)> {
        let ticks = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100).unsigned_abs();
        let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().unwrap_or(4096).unsigned_abs();
        let mut usage = Vec::new();
        for (id, vm) in lock(&self.vms).iter_mut() {
            let Some(stat) = stat(vm.child.id()) else { continue };
            let (now, (before, at)) = (Instant::now(), vm.used);
            let millis = u64::try_from(now.duration_since(at).as_millis()).unwrap_or(u64::MAX).max(1);
            let cpu = stat.ticks.saturating_sub(before) * 1000 / ticks.max(1) * self.speed / millis;
            vm.used = (stat.ticks, now);
            usage.push((*id, Resources { cpu, memory: (stat.pages * page) >> 20 }));
        }
        usage
    }

    fn signs(&mut self) -> Vec<(VmId, u64, Signs)> {
        lock(&self.vms).iter().map(|(id, vm)| (*id, vm.epoch, vm.watch.signs())).collect()
    }

    fn reset(&mut self) {
        for vm in lock(&self.vms).values_mut() {
            // A process that is gone already cannot be killed, and need not be.
            let _ = vm.child.kill();
        }
        if self.reset == Reset::Sysrq
            && let Err(error) = fs::write("/proc/sysrq-trigger", "b")
        {
            tracing::error!(%error, "the host cannot reset itself; its watchdog has to");
        }
    }
}

impl Drop for ProcessRunner {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reaper) = self.reaper.take() {
            let _ = reaper.join();
        }
        let mut vms = lock(&self.vms);
        for vm in vms.values_mut() {
            let _ = vm.child.kill();
        }
        for vm in vms.values_mut() {
            let _ = vm.child.wait();
        }
        drop(vms);
        for talk in self.talks.drain(..) {
            // Who talked to a process that is gone has nothing to wait for.
            let _ = talk.join();
        }
    }
}

/// Tells which processes have ended.
fn reap(vms: &Vms, events: &VmEvents, dir: &Path) {
    let mut vms = lock(vms);
    vms.retain(|id, vm| match vm.child.try_wait() {
        Ok(Some(status)) => {
            for end in ["pid", "heartbeats", "metrics", "control"] {
                // Without heartbeats, or when it ended in an orderly manner, some are gone already.
                let _ = fs::remove_file(dir.join(format!("{}.{end}", id.0)));
            }
            events.tell(*id, vm.epoch, VmEvent::Exited, Some(reason(status)));
            false
        }
        _ => true,
    });
}

/// What the exit status of `nacre run` means.
fn reason(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(0), _) => "The guest switched itself off".into(),
        (Some(1), _) => "It failed; look at its log".into(),
        (Some(2), _) => "Its definition was refused; look at its log".into(),
        (Some(3), _) => "The guest asked for a reset".into(),
        (Some(4), _) => "The guest's kernel panicked".into(),
        (Some(5), _) => "The guest caused a triple fault".into(),
        (Some(6), _) => "It was stopped".into(),
        (Some(7), _) => "It was moved away by hand".into(),
        (Some(code @ 64..), _) => format!("The guest ended itself with code {}", code - 64),
        (Some(code), _) => format!("It ended with status {code}"),
        (None, signal) => format!("It was killed by signal {}", signal.unwrap_or_default()),
    }
}

struct Stat {
    state: char,
    ticks: u64,
    start: u64,
    pages: u64,
}

/// Reads `/proc/PID/stat`; the second field is a name in brackets that may hold anything.
fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |n: usize| fields.get(n).and_then(|f| f.parse::<u64>().ok());
    let state = fields.first()?.chars().next()?;
    Some(Stat { state, ticks: number(11)? + number(12)?, start: number(19)?, pages: number(21)? })
}

fn start_time(pid: u32) -> Option<u64> {
    stat(pid).map(|s| s.start)
}

/// Whether a process, the same that was noted, can still write anything.
fn is_live(pid: u32, start: u64) -> bool {
    let threads = || fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    // A dead leader may have threads that are still in a system call.
    stat(pid).is_some_and(|s| s.start == start && (s.state != 'Z' || threads() > 1))
}

/// Kills the processes that a former life left, and waits until they are gone.
fn kill_leftovers(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_none_or(|e| e != "pid") {
            continue;
        }
        let text = fs::read_to_string(&path)?;
        let mut fields = text.split_whitespace().map(str::parse::<u64>);
        if let (Some(Ok(pid)), Some(Ok(start))) = (fields.next(), fields.next())
            && let (Ok(pid), Ok(raw)) = (u32::try_from(pid), i32::try_from(pid))
        {
            while is_live(pid, start) {
                tracing::warn!(pid, "killing a VM of a former life");
                // If it ended meanwhile, so much the better.
                let _ = kill(Pid::from_raw(raw), Signal::SIGKILL);
                std::thread::sleep(LOOK);
            }
        }
        fs::remove_file(&path)?;
    }
    Ok(())
}

/// MHz of the first processor.
fn processor_speed() -> u64 {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with("cpu MHz"));
    let speed = line.and_then(|l| l.split(':').nth(1)).and_then(|v| v.trim().split('.').next()?.parse().ok());
    speed.unwrap_or(1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_are_killed_and_strangers_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let mut left = Command::new("sleep").arg("1000").spawn().unwrap();
        let mut stranger = Command::new("sleep").arg("1000").spawn().unwrap();
        let start = start_time(left.id()).unwrap();
        fs::write(dir.path().join("1.pid"), format!("{} {start}\n", left.id())).unwrap();
        fs::write(dir.path().join("2.pid"), format!("{} 1\n", stranger.id())).unwrap();
        kill_leftovers(dir.path()).unwrap();
        assert_eq!(left.wait().unwrap().signal(), Some(9));
        assert!(stranger.try_wait().unwrap().is_none());
        stranger.kill().unwrap();
        stranger.wait().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn every_exit_status_has_a_reason() {
        for (status, word) in [(0, "off"), (4, "panicked"), (5, "triple"), (64 + 7, "code 7")] {
            assert!(reason(ExitStatus::from_raw(status << 8)).contains(word));
        }
        assert!(reason(ExitStatus::from_raw(9)).contains("signal 9"));
    }
}

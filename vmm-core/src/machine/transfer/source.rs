//! The side of a live migration that a machine leaves.

use std::time::{Duration, Instant};

use super::super::{StopReason, Vm, VmError};
use super::link::{Link, Step};
use super::throttle::Throttle;
use crate::memory::PAGE_SIZE;
use crate::migration::memory::{self, PageSet, Tracker};
use crate::migration::{Channel, MigrateOptions, MigrationError, MigrationReport, Monitor, Record};

/// A connection that nothing is known of yet carries as much a second.
const LEAST_RATE: f64 = (1 << 20) as f64;
/// How often disks are tried that the target may still hold.
const RETRY: Duration = Duration::from_millis(20);

impl Vm {
    /// Moves the machine to [`VmBuilder::receive`](super::super::VmBuilder::receive) at the other end of `channel`. The
    /// guest runs meanwhile, but for a moment at the end. Afterwards this machine has stopped, with [`StopReason::Moved`],
    /// or is paused if it was to be parked.
    ///
    /// # Errors
    /// Fails when the machine has stopped, has devices that cannot move, or writes its memory too fast; when it was
    /// cancelled, the connection fails or the other side refuses. The machine goes on then as before, except as
    /// [`MigrationError::Uncertain`] and [`MigrationError::DisksLost`] say.
    pub fn migrate<C: Channel>(
        &self,
        channel: C,
        options: &MigrateOptions,
        monitor: &Monitor,
    ) -> Result<MigrationReport, VmError> {
        let _one = self.moving.try_lock().ok_or(MigrationError::Busy)?;
        if let Some(device) = self.devices.unobserved
            && !self.memory.has_write_observer()
        {
            return Err(VmError::CannotSave(format!(
                "another process serves its {device}, and what that writes is not seen on this accelerator"
            )));
        }
        let begun = Instant::now();
        let link = Link::new(channel, options.timeout)?;
        Source { vm: self, link, options, monitor, begun, rounds: 0 }.run()
    }
}

struct Source<'a, C> {
    vm: &'a Vm,
    link: Link<C>,
    options: &'a MigrateOptions,
    monitor: &'a Monitor,
    begun: Instant,
    rounds: u32,
}

/// Memory that was sent while the guest ran.
struct Precopied<'a> {
    tracker: Tracker<'a>,
    /// What was written last, and not sent.
    left: PageSet,
    throttle: Throttle,
}

/// How the last step ended.
enum HandOver {
    /// The target runs the machine.
    Done,
    /// Both sides have it, and neither runs it.
    Parked,
    /// The target does not.
    Failed(VmError),
    /// It was told to, and what it did is not known.
    Unknown(VmError),
}

impl<'a, C: Channel> Source<'a, C> {
    fn run(mut self) -> Result<MigrationReport, VmError> {
        let vm = self.vm;
        let Precopied { tracker, mut left, throttle } = match self.precopy() {
            Ok(sent) => sent,
            Err(error) => {
                let error = self.link.reason(error);
                self.link.refuse(&error);
                return Err(error);
            }
        };
        let _serial = vm.lifecycle.lock();
        let paused = Instant::now();
        let running = vm.quiesce().inspect_err(|error| self.link.refuse(error))?;
        drop(throttle);
        match self.hand_over(&tracker, &mut left, running) {
            HandOver::Done => Ok(self.moved(paused, true)),
            HandOver::Parked => Ok(self.report(paused, true)),
            HandOver::Failed(error) => {
                let error = self.link.reason(error);
                self.link.refuse(&error);
                self.go_on(running)?;
                Err(error)
            }
            HandOver::Unknown(error) => self.settle(error, paused, running),
        }
    }

    /// The connection broke after the order to run: the locks of the disks say what became of it.
    fn settle(&self, error: VmError, paused: Instant, running: bool) -> Result<MigrationReport, VmError> {
        let told = self.options.shared_locks || self.link.is_local();
        if !told || !self.vm.devices.disks.iter().any(|disk| disk.is_exclusive()) {
            tracing::error!(%error, "The connection broke in the last step");
            return Err(MigrationError::Uncertain.into());
        }
        // A target without the order lets go of the disks when it notices that the connection is gone.
        match self.open_disks(self.options.timeout * 2) {
            Ok(()) => {
                self.vm.unquiesce(running)?;
                Err(error)
            }
            Err(_) => Ok(self.moved(paused, false)),
        }
    }

    fn moved(&self, paused: Instant, confirmed: bool) -> MigrationReport {
        self.vm.control.stop(StopReason::Moved);
        self.report(paused, confirmed)
    }

    fn report(&self, paused: Instant, confirmed: bool) -> MigrationReport {
        MigrationReport {
            rounds: self.rounds,
            sent: self.link.writer.written(),
            downtime: paused.elapsed(),
            total: self.begun.elapsed(),
            confirmed,
        }
    }

    /// Opens the disks again, which a target that failed may still have to close.
    fn open_disks(&self, patience: Duration) -> Result<(), VmError> {
        let until = Instant::now() + patience;
        loop {
            match self.vm.open_disks() {
                Err(_) if Instant::now() < until => std::thread::sleep(RETRY),
                other => return other,
            }
        }
    }

    /// Undoes all: the machine goes on here.
    fn go_on(&self, running: bool) -> Result<(), VmError> {
        let opened = self.open_disks(self.options.timeout * 2);
        opened.map_err(|error| MigrationError::DisksLost(Box::new(error)))?;
        self.vm.unquiesce(running)
    }

    /// Introduces the machine and sends its memory until little is left.
    fn precopy(&mut self) -> Result<Precopied<'a>, VmError> {
        let vm = self.vm;
        let description = {
            let _serial = vm.lifecycle.lock();
            vm.description()?
        };
        self.link.writer.write(&Record::Description(Box::new(description)))?;
        self.link.expect(Step::Ready)?;
        let tracker = Tracker::start(&*vm.accel, &vm.memory)?;
        let mut throttle = Throttle::new(&vm.control);
        let mut set = PageSet::written(&vm.memory);
        let sending = Instant::now();
        loop {
            self.rounds += 1;
            self.monitor.begin_round(self.rounds, set.len() * PAGE_SIZE);
            let zeros = self.rounds > 1;
            self.send(&set, zeros, self.options.bandwidth)?;
            if self.rounds == 1 {
                // What caches hold does not have to be written back while the guest is paused.
                vm.devices.disks.iter().try_for_each(|disk| disk.flush_image())?;
            }
            let before = set.len();
            set = tracker.take()?;
            let rate = self.link.writer.written() as f64 / sending.elapsed().as_secs_f64().max(1e-6);
            let left = set.len() * PAGE_SIZE;
            if left as f64 <= rate.max(LEAST_RATE) * self.options.downtime.as_secs_f64() {
                return Ok(Precopied { tracker, left: set, throttle });
            }
            if self.rounds >= self.options.rounds {
                return Err(MigrationError::NotConverging { left, rounds: self.rounds }.into());
            }
            if self.options.auto_converge && set.len() > before / 2 {
                let percent = throttle.increase();
                let percent = percent.map_err(|source| VmError::Host { what: "a thread", source })?;
                self.monitor.set_throttle(percent);
            }
        }
    }

    /// Sends pages, not faster than `bandwidth` bytes a second.
    fn send(&mut self, set: &PageSet, zeros: bool, bandwidth: Option<u64>) -> Result<(), VmError> {
        let (vm, monitor) = (self.vm, self.monitor);
        let (start, base) = (Instant::now(), self.link.writer.written());
        let mut pace = |written: u64| {
            monitor.set_sent(written);
            loop {
                monitor.check()?;
                let Some(bandwidth) = bandwidth else { return Ok(()) };
                let due = Duration::from_secs_f64((written - base) as f64 / bandwidth.max(1) as f64);
                match due.checked_sub(start.elapsed()) {
                    // Short, so that a cancellation is heard.
                    Some(wait) => std::thread::sleep(wait.min(Duration::from_millis(50))),
                    None => return Ok::<(), VmError>(()),
                }
            }
        };
        memory::send(&vm.memory, set, zeros, &mut self.link.writer, &mut pace)
    }

    /// Sends the rest and gives the machine to the target. It is quiet.
    fn hand_over(&mut self, tracker: &Tracker<'_>, left: &mut PageSet, running: bool) -> HandOver {
        let mut prepare = || -> Result<(), VmError> {
            let state = self.vm.save_state(running)?;
            left.merge(&tracker.take()?);
            self.send(left, true, None)?;
            self.link.writer.write(&Record::State(Box::new(state)))?;
            self.vm.close_disks()?;
            let end = if self.options.park { Record::Park } else { Record::End };
            self.link.writer.write(&end)?;
            self.link.expect(Step::Prepared)?;
            Ok(self.monitor.check()?)
        };
        if let Err(error) = prepare() {
            return HandOver::Failed(error);
        }
        if self.options.park {
            return HandOver::Parked;
        }
        // From here on the machine is the target's, unless it is shown that it did not take it.
        let given = self.link.writer.write(&Record::Run).map_err(VmError::from);
        match given.and_then(|()| self.link.expect(Step::Running)) {
            Ok(()) => HandOver::Done,
            // It says that it did not.
            Err(error @ VmError::Migration(MigrationError::Refused(_))) => HandOver::Failed(error),
            Err(error) => HandOver::Unknown(error),
        }
    }
}

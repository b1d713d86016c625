//! Machines that move while they run.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vmm_core::machine::{RestoreOptions, StopReason, Vm, VmConfig, VmError};
use vmm_core::memory::GuestMemory;
use vmm_core::migration::{Channel, MigrateOptions, MigrationError, MigrationReport, Monitor};

use super::accelerators;
use super::moving::{disk, finishes, kernel, machine, progresses, start};

/// Long enough for a loaded machine, short enough for the cases that wait for it.
const TIMEOUT: Duration = Duration::from_secs(2);

fn options() -> MigrateOptions {
    MigrateOptions { timeout: TIMEOUT, ..MigrateOptions::default() }
}

type Received = Result<Vm, VmError>;

/// Moves a machine over two ends of a connection.
fn migrate<C: Channel + 'static>(
    vm: &Vm,
    config: &VmConfig,
    (source, target): (C, C),
    options: &MigrateOptions,
    monitor: &Monitor,
) -> (Result<MigrationReport, VmError>, Received) {
    std::thread::scope(|scope| {
        let received = scope.spawn(|| {
            let restore = RestoreOptions { timeout: TIMEOUT, ..RestoreOptions::default() };
            Vm::builder(config.clone()).receive(target, &restore)
        });
        let sent = vm.migrate(source, options, monitor);
        (sent, received.join().unwrap())
    })
}

#[test]
fn a_guest_moves_while_it_writes() {
    let kernel = kernel();
    for accel in accelerators() {
        for (mmio, cpus) in [(false, 1), (true, 2)] {
            let disk = disk();
            let config = VmConfig { mmio, cpus, ..machine(kernel.path(), disk.path(), accel) };
            let first = start(config.clone());
            let monitor = Monitor::default();
            let (sent, received) =
                migrate(&first, &config, UnixStream::pair().unwrap(), &options(), &monitor);
            let report = sent.unwrap();
            let second = received.unwrap();
            assert!(report.confirmed && report.rounds > 0 && report.downtime < report.total, "{report:?}");
            assert_eq!(monitor.progress().round, report.rounds);
            assert_eq!(first.wait(), StopReason::Moved, "{accel:?}");
            assert!(matches!(first.start(), Err(VmError::Stopped)));
            // Back again, to a third machine, over TCP.
            progresses(&second);
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let pair =
                (TcpStream::connect(listener.local_addr().unwrap()).unwrap(), listener.accept().unwrap().0);
            let (sent, received) = migrate(&second, &config, pair, &options(), &Monitor::default());
            sent.unwrap();
            finishes(&received.unwrap());
        }
    }
}

#[test]
fn a_paused_guest_stays_paused() {
    let (kernel, disk) = (kernel(), disk());
    for accel in accelerators() {
        let config = machine(kernel.path(), disk.path(), accel);
        let first = start(config.clone());
        first.pause().unwrap();
        let pair = UnixStream::pair().unwrap();
        let (sent, received) = migrate(&first, &config, pair, &options(), &Monitor::default());
        sent.unwrap();
        let second = received.unwrap();
        assert!(!second.is_running());
        second.start().unwrap();
        finishes(&second);
    }
}

/// Who owns both sides decides which of them goes on, and may decide for the source.
#[test]
fn a_parked_guest_goes_on_where_its_owner_says() {
    let (kernel, disk) = (kernel(), disk());
    let park = MigrateOptions { park: true, ..options() };
    for accel in accelerators() {
        let config = machine(kernel.path(), disk.path(), accel);
        let first = start(config.clone());
        let again = || {
            let pair = UnixStream::pair().unwrap();
            let (sent, received) = migrate(&first, &config, pair, &park, &Monitor::default());
            sent.unwrap();
            let second = received.unwrap();
            assert!(!first.is_running() && !second.is_running());
            second
        };
        let second = again();
        first.start().unwrap();
        progresses(&first);
        // Its disk is not to be had.
        assert!(matches!(second.start(), Err(VmError::Disk { .. })));
        drop(second);
        let third = again();
        first.stop();
        third.start().unwrap();
        finishes(&third);
    }
}

/// A connection during whose every message some guest memory is written.
struct Busy {
    stream: UnixStream,
    memory: Option<GuestMemory>,
}

/// Memory that the guest does not look at, and its size.
const UNUSED: (u64, usize) = (0x80_0000, 0x20_0000);

impl Read for Busy {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer)
    }
}

impl Write for Busy {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if let Some(memory) = &self.memory {
            memory.fill(UNUSED.0, UNUSED.1, 1).unwrap();
        }
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Channel for Busy {
    fn set_timeout(&mut self, limit: Duration) -> io::Result<()> {
        Channel::set_timeout(&mut self.stream, limit)
    }
}

/// Whatever ends a migration before its end, the source goes on and nothing is left of the target.
#[test]
fn a_migration_can_be_given_up() {
    let (kernel, disk) = (kernel(), disk());
    for accel in accelerators() {
        let config = machine(kernel.path(), disk.path(), accel);
        let vm = start(config.clone());
        let attempt = |config: &VmConfig, options: &MigrateOptions, monitor: &Monitor| {
            let (a, b) = UnixStream::pair().unwrap();
            let source = Busy { stream: a, memory: Some(vm.memory().clone()) };
            let target = Busy { stream: b, memory: None };
            let (sent, received) = migrate(&vm, config, (source, target), options, monitor);
            assert!(received.is_err());
            progresses(&vm);
            sent.unwrap_err()
        };
        let cancelled = Monitor::default();
        cancelled.cancel();
        let error = attempt(&config, &options(), &cancelled);
        assert!(matches!(error, VmError::Migration(MigrationError::Cancelled)), "{error}");

        let stubborn =
            MigrateOptions { downtime: Duration::ZERO, rounds: 3, auto_converge: false, ..options() };
        let error = attempt(&config, &stubborn, &Monitor::default());
        assert!(
            matches!(error, VmError::Migration(MigrationError::NotConverging { rounds: 3, left: 1.. })),
            "{error}"
        );
        let monitor = Monitor::default();
        attempt(&config, &MigrateOptions { auto_converge: true, rounds: 4, ..stubborn }, &monitor);
        assert_eq!(monitor.progress().throttle, 40, "three rounds, each with much left");

        let error = attempt(&VmConfig { cpus: 2, ..config.clone() }, &options(), &Monitor::default());
        assert!(
            matches!(&error, VmError::Migration(MigrationError::Refused(why)) if why.contains("vCPUs")),
            "{error}"
        );
        // Nobody at the other end.
        let (source, target) = UnixStream::pair().unwrap();
        drop(target);
        assert!(matches!(vm.migrate(source, &options(), &Monitor::default()), Err(VmError::Stream(_))));
        let (source, _silent) = UnixStream::pair().unwrap();
        let short = MigrateOptions { timeout: Duration::from_millis(50), ..options() };
        assert!(matches!(vm.migrate(source, &short, &Monitor::default()), Err(VmError::Stream(_))));
        finishes(&vm);
    }
}

/// A limit of the bandwidth is kept to while the guest runs.
#[test]
fn bandwidth_is_limited() {
    let (kernel, disk) = (kernel(), disk());
    let config = machine(kernel.path(), disk.path(), super::AccelChoice::Soft);
    let vm = start(config.clone());
    let slow = MigrateOptions { bandwidth: Some(1 << 20), downtime: Duration::from_secs(1), ..options() };
    let (sent, received) = migrate(&vm, &config, UnixStream::pair().unwrap(), &slow, &Monitor::default());
    let report = sent.unwrap();
    let running = (report.total - report.downtime).as_secs_f64();
    // The first round alone is the memory that nobody writes, and more.
    assert!(report.sent > 300 << 10, "{report:?}");
    assert!(running >= 0.3, "300 KiB at 1 MiB a second: {report:?}");
    finishes(&received.unwrap());
}

/// A connection that breaks at the first message of a kind: before it is delivered, or after it.
struct Fragile {
    stream: UnixStream,
    /// The kind, as the message's first bytes say it.
    at: Option<[u8; 4]>,
    deliver: bool,
}

impl Read for Fragile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer)
    }
}

impl Write for Fragile {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let breaks = self.at.is_some_and(|kind| buffer.starts_with(&kind));
        if !breaks || self.deliver {
            // All of it, so that one call is one message.
            self.stream.write_all(buffer)?;
        }
        if breaks {
            self.stream.shutdown(Shutdown::Both)?;
        }
        if breaks && !self.deliver { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(buffer.len()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Channel for Fragile {
    fn set_timeout(&mut self, limit: Duration) -> io::Result<()> {
        Channel::set_timeout(&mut self.stream, limit)
    }

    fn is_local(&self) -> bool {
        true
    }
}

/// Whatever message the connection breaks at, on either side: afterwards exactly one of the two runs the guest.
#[test]
fn one_machine_runs_wherever_the_connection_breaks() {
    let (kernel, disk) = (kernel(), disk());
    let kind = |number: u32| number.to_le_bytes();
    // Greeting, description, pages, state, end and run; greeting, ready, prepared and running.
    let source = [*b"NACR", kind(1), kind(2), kind(4), kind(5), kind(8)].map(|at| (Some(at), None));
    let target = [*b"NACR", kind(6), kind(7), kind(9)].map(|at| (None, Some(at)));
    for accel in accelerators() {
        let config = machine(kernel.path(), disk.path(), accel);
        let mut vm = start(config.clone());
        let mut moves = 0;
        for (at_source, at_target) in source.into_iter().chain(target) {
            for deliver in [false, true] {
                let (a, b) = UnixStream::pair().unwrap();
                let end = |stream, at| Fragile { stream, at, deliver };
                let pair = (end(a, at_source), end(b, at_target));
                let (sent, received) = migrate(&vm, &config, pair, &options(), &Monitor::default());
                let case = format!("{accel:?}, source {at_source:?}, target {at_target:?}, {deliver}");
                match (sent, received) {
                    (Ok(report), Ok(moved)) => {
                        assert_eq!(vm.wait(), StopReason::Moved, "{case}");
                        // Said, or shown by the lock of the disk. When it broke after the order, the answer may have
                        // been there before.
                        let said = at_target == Some(kind(9)) && deliver;
                        assert!(report.confirmed == said || at_source == Some(kind(8)), "{case}");
                        vm = moved;
                        moves += 1;
                    }
                    (Err(_), Err(_)) => {}
                    (sent, received) => panic!("{case}: {sent:?}, {:?}", received.map(|_| "runs")),
                }
                progresses(&vm);
            }
        }
        // With the order delivered, with both answers to it, and perhaps when the order came before the break that
        // followed the target's last word.
        assert!((3..=4).contains(&moves), "{accel:?}: {moves}");
        finishes(&vm);
    }
}

/// Where nothing says what became of the order to run, neither side runs the guest.
#[test]
fn without_locks_an_order_that_was_lost_is_left_to_the_owner() {
    let kernel = kernel();
    let config = super::config(kernel.path(), super::AccelChoice::Soft);
    let vm = start(config.clone());
    let (a, b) = UnixStream::pair().unwrap();
    let end = |stream, at| Fragile { stream, at, deliver: false };
    let pair = (end(a, Some(8u32.to_le_bytes())), end(b, None));
    let (sent, received) = migrate(&vm, &config, pair, &options(), &Monitor::default());
    assert!(matches!(sent, Err(VmError::Migration(MigrationError::Uncertain))), "{sent:?}");
    assert!(received.is_err() && !vm.is_running());
    vm.start().unwrap();
    finishes(&vm);
}

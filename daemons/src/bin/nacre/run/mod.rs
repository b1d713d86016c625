//! `nacre run`: one machine in this process, its console on the terminal.

pub mod address;
mod control;
mod footprint;
mod metrics;
mod options;
mod origin;
mod pairs;
mod strangers;
mod terminal;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use vmm_core::machine::{ConsoleConfig, StopReason, Vm, VmConfig, VmEvent};

pub use options::Args;
use origin::Origin;
use terminal::{Escape, Terminal};

/// Exit codes of `nacre run`, beside 0 for power-off, 1 for errors, and 2 for a wrong command line.
pub const EXIT_RESET: u8 = 3;
/// The guest's kernel panicked.
pub const EXIT_PANIC: u8 = 4;
/// The guest caused a triple fault.
pub const EXIT_TRIPLE_FAULT: u8 = 5;
/// The user ended the machine (Ctrl-A x, or a signal).
pub const EXIT_STOPPED: u8 = 6;
/// The machine was moved to another process.
pub const EXIT_MOVED: u8 = 7;
/// A test guest's code from the debug-exit port is added to this.
pub const EXIT_GUEST: u8 = 64;

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let restart = args.restart();
    let sockets = Sockets { metrics: args.metrics(), control: args.control() };
    let mut origin = args.origin();
    let config = args.config()?;
    let bootable = config.boot.is_bootable();
    let signals = terminal::Signals::block()?;
    loop {
        let Some(mut reason) = run_once(&config, &origin, &signals, &sockets)? else {
            return Ok(ExitCode::from(EXIT_STOPPED));
        };
        origin = Origin::Boot;
        if signals.received() {
            reason = StopReason::Stopped;
        }
        if restart && bootable && reason == StopReason::Reset {
            continue;
        }
        return Ok(ExitCode::from(match reason {
            StopReason::PowerOff => 0,
            StopReason::Reset => EXIT_RESET,
            StopReason::Panic => EXIT_PANIC,
            StopReason::TripleFault => EXIT_TRIPLE_FAULT,
            StopReason::Stopped => EXIT_STOPPED,
            StopReason::Moved => EXIT_MOVED,
            StopReason::Exit(code) => EXIT_GUEST.wrapping_add(code),
            StopReason::Error(text) => anyhow::bail!(text),
        }));
    }
}

/// Unix sockets that are offered while the machine exists.
struct Sockets {
    metrics: Option<PathBuf>,
    control: Option<PathBuf>,
}

/// Runs a machine to its end; `None` when a signal came before it was there.
fn run_once(
    config: &VmConfig,
    origin: &Origin,
    signals: &terminal::Signals,
    sockets: &Sockets,
) -> anyhow::Result<Option<StopReason>> {
    let mut builder = Vm::builder(config.clone());
    let escape = Escape::default();
    if config.console == ConsoleConfig::Stdio {
        builder = builder.input_filter(escape.filter());
    }
    let Some((vm, start)) = origin.build(builder, signals)? else { return Ok(None) };
    let vm = Arc::new(vm);
    let metrics = sockets.metrics.as_deref();
    let metrics = metrics.map(|path| metrics::Server::start(path, Arc::downgrade(&vm))).transpose()?;
    let control = sockets.control.as_deref();
    let control = control.map(|path| control::Server::start(path, Arc::downgrade(&vm))).transpose()?;
    // From here on every way out restores the terminal: `Terminal` does it when it is dropped.
    let terminal = match config.console {
        ConsoleConfig::Stdio => Terminal::raw().context("Cannot set up the terminal")?,
        _ => None,
    };
    escape.on_end(vm.stopper());
    while let Some(event) = vm.events().take() {
        if let VmEvent::ConsolePty(path) = event {
            eprintln!("The console is at {}", path.display());
        }
    }
    if start {
        vm.start()?;
    }
    footprint::release_code();
    let reason = signals.wait(&vm).context("Cannot wait for the machine")?;
    drop((metrics, control));
    drop(vm);
    drop(terminal);
    Ok(Some(reason))
}

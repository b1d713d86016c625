//! `nacre run`: one machine in this process, its console on the terminal.

mod footprint;
mod metrics;
mod options;
mod pairs;
mod terminal;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use vmm_core::machine::{ConsoleConfig, StopReason, Vm, VmConfig, VmEvent};

pub use options::Args;
use terminal::{Escape, Terminal};

/// Exit codes of `nacre run`, beside 0 for power-off, 1 for errors, and 2 for a wrong command line.
pub const EXIT_RESET: u8 = 3;
/// The guest's kernel panicked.
pub const EXIT_PANIC: u8 = 4;
/// The guest caused a triple fault.
pub const EXIT_TRIPLE_FAULT: u8 = 5;
/// The user ended the machine (Ctrl-A x, or a signal).
pub const EXIT_STOPPED: u8 = 6;
/// A test guest's code from the debug-exit port is added to this.
pub const EXIT_GUEST: u8 = 64;

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let restart = args.restart();
    let metrics = args.metrics();
    let config = args.config()?;
    let signals = terminal::Signals::block()?;
    loop {
        let mut reason = run_once(&config, &signals, metrics.as_deref())?;
        if signals.received() {
            reason = StopReason::Stopped;
        }
        if restart && reason == StopReason::Reset {
            continue;
        }
        return Ok(ExitCode::from(match reason {
            StopReason::PowerOff => 0,
            StopReason::Reset => EXIT_RESET,
            StopReason::Panic => EXIT_PANIC,
            StopReason::TripleFault => EXIT_TRIPLE_FAULT,
            StopReason::Stopped => EXIT_STOPPED,
            StopReason::Exit(code) => EXIT_GUEST.wrapping_add(code),
            StopReason::Error(text) => anyhow::bail!(text),
        }));
    }
}

fn run_once(
    config: &VmConfig,
    signals: &terminal::Signals,
    metrics: Option<&Path>,
) -> anyhow::Result<StopReason> {
    let mut builder = Vm::builder(config.clone());
    let escape = Escape::default();
    if config.console == ConsoleConfig::Stdio {
        builder = builder.input_filter(escape.filter());
    }
    let vm = Arc::new(builder.build()?);
    let metrics = metrics.map(|path| metrics::Server::start(path, Arc::downgrade(&vm))).transpose()?;
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
    vm.start()?;
    footprint::release_code();
    let reason = signals.wait(&vm).context("Cannot wait for the machine")?;
    drop(metrics);
    drop(vm);
    drop(terminal);
    Ok(reason)
}

//! Nacre's programs, and here what they share.
//!
//! - `nacre`: runs a virtual machine on this terminal (`run`), saves and moves it (`vm`), works on disks (`disk`), says
//!   which accelerators work (`accel`), and talks to a cluster's agents (`cluster`).
//! - `nacre-switch`: a virtual switch with its ports, flow rules and policies.
//! - `nacre-blk`: exports virtual disks over NBD and vhost-user-blk, and changes them at run time over an API.
//! - `nacre-node`: a host's agent in a cluster.
//!
//! Each explains itself, with examples, by `--help`. They parse arguments and wire the crates together; a program that
//! wants the same in its own process takes the crates: see `nacre-engine`.
//!
//! ```
//! // As the programs start: their messages go to standard error, those that NACRE_LOG asks for.
//! daemons::log_to_stderr(tracing_subscriber::filter::LevelFilter::WARN);
//! tracing::warn!("about to listen");
//! ```
#![forbid(unsafe_code)]

mod output;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

pub use output::print;

/// Exit status for a command line that is not understood.
const WRONG_COMMAND_LINE: u8 = 2;

/// The whole `main` of a daemon: what is wrong is said in one line on standard error, and becomes the exit status (1, or
/// 2 for the command line). Messages of level `log` and worse are logged, see [`log_to_stderr`].
pub fn daemon<A: Parser>(
    program: &str,
    log: LevelFilter,
    run: impl FnOnce(A) -> anyhow::Result<ExitCode>,
) -> ExitCode {
    match command_line(program, A::try_parse()) {
        Ok(args) => {
            log_to_stderr(log);
            exit_code(program, run(args))
        }
        Err(status) => status,
    }
}

/// What the argument parser understood; otherwise what it says is printed, and the exit status returned: help and the
/// version as they are, what is wrong in one line.
///
/// # Errors
/// The exit status, when there is nothing more to do.
pub fn command_line<A>(program: &str, parsed: Result<A, clap::Error>) -> Result<A, ExitCode> {
    parsed.map_err(|error| {
        let help = error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
        if help || !error.use_stderr() {
            // As clap itself exits: a reader that has gone is no failure.
            let _ = error.print();
        } else {
            eprintln!("{program}: {}", one_line(&error.render().to_string()));
        }
        if error.use_stderr() { ExitCode::from(WRONG_COMMAND_LINE) } else { ExitCode::SUCCESS }
    })
}

/// The exit status of a program; an error is printed in one line and becomes 1.
pub fn exit_code(program: &str, result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprintln!("{program}: {}", describe(&error));
        ExitCode::FAILURE
    })
}

/// Writes log lines to standard error. The environment variable NACRE_LOG chooses them by a list of `target=level` or
/// `level`, separated by commas; without it, or when it does not parse, they are those of `default` and worse.
///
/// # Panics
/// When the program logs already.
pub fn log_to_stderr(default: LevelFilter) {
    // `Targets` does without the regular expressions of `EnvFilter`: less to load at each start.
    let chosen = std::env::var("NACRE_LOG").ok().and_then(|list| list.parse().ok());
    let filter = chosen.unwrap_or_else(|| Targets::new().with_default(default));
    let colours = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer().with_ansi(colours).with_writer(std::io::stderr);
    tracing_subscriber::registry().with(lines).with(filter).init();
}

/// An error with its causes in one line. Libraries name the file that a failure is about, and so may their callers:
/// what was said is not said again.
pub fn describe(error: &anyhow::Error) -> String {
    let mut line = String::new();
    let mut last = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if text != last {
            if !line.is_empty() {
                line.push_str(": ");
            }
            line.push_str(&text);
            last = text;
        }
    }
    line
}

/// What is wrong with a command line, in one line: the text of the argument parser without its summary of the usage.
fn one_line(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let reason = text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:"));
    let mut line = String::new();
    for part in reason.filter(|part| !part.is_empty() && !part.starts_with("For more information")) {
        let separator = match line.chars().last() {
            None => "",
            Some(':') => " ",
            Some(_) => "; ",
        };
        line.push_str(separator);
        line.push_str(part);
    }
    line + "; try --help"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_command_lines_are_one_line() {
        let text = "error: unexpected argument '--kernl' found\n\n  tip: a similar argument exists: '--kernel'\n\n\
                    Usage: nacre run --kernel <FILE>\n\nFor more information, try '--help'.\n";
        let line =
            "unexpected argument '--kernl' found; tip: a similar argument exists: '--kernel'; try --help";
        assert_eq!(one_line(text), line);
        let text = "error: the following required arguments were not provided:\n  --kernel <FILE>\n\nUsage: nacre run";
        let line = "the following required arguments were not provided: --kernel <FILE>; try --help";
        assert_eq!(one_line(text), line);
    }

    #[test]
    fn a_cause_that_says_the_same_is_left_out() {
        let error = anyhow::anyhow!("no such file").context("Cannot open x").context("Cannot open x");
        assert_eq!(describe(&error), "Cannot open x: no such file");
        assert_eq!(describe(&anyhow::anyhow!("one")), "one");
    }
}

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
//! // As `nacre-blk` starts: its messages go to standard error, what the environment asks for.
//! daemons::log_to_stderr("NACRE_LOG", tracing_subscriber::filter::LevelFilter::WARN);
//! tracing::warn!("about to listen");
//! ```
#![forbid(unsafe_code)]

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

/// Writes log lines to standard error. The environment variable `variable` chooses them by a list of `target=level` or
/// `level`, separated by commas; without it, or when it does not parse, they are those of `default` and worse.
///
/// # Panics
/// When the program logs already.
pub fn log_to_stderr(variable: &str, default: LevelFilter) {
    // `Targets` does without the regular expressions of `EnvFilter`: less to load at each start.
    let chosen = std::env::var(variable).ok().and_then(|list| list.parse().ok());
    let filter = chosen.unwrap_or_else(|| Targets::new().with_default(default));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
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
pub fn one_line(text: &str) -> String {
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

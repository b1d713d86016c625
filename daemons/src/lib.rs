//! What Nacre's programs share.
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

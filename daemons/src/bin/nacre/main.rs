//! The `nacre` command line.

mod accel;
mod cluster;
mod disk;
mod run;
mod schema;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use tracing_subscriber::filter::LevelFilter;

/// Runs virtual machines and manages their disks.
#[derive(Parser)]
#[command(name = "nacre", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Exit status for a command line that is not understood.
const WRONG_COMMAND_LINE: u8 = 2;

#[derive(Subcommand)]
enum Command {
    Run(Box<run::Args>),
    Accel(accel::Args),
    Disk(disk::Args),
    Cluster(cluster::Args),
    /// Print the JSON schema of `nacre run --config` files.
    Schema,
    /// Print a completion script for a shell.
    #[command(
        after_help = "Example:\n  nacre completions bash >~/.local/share/bash-completion/completions/nacre"
    )]
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and the version: printed as they are, with status 0.
        Err(error) if !error.use_stderr() => error.exit(),
        Err(error) => {
            eprintln!("nacre: {}", daemons::one_line(&error.render().to_string()));
            return ExitCode::from(WRONG_COMMAND_LINE);
        }
    };
    daemons::log_to_stderr("NACRE_LOG", LevelFilter::WARN);
    let result = match cli.command {
        Command::Run(args) => run::run(*args),
        Command::Accel(args) => accel::run(&args),
        Command::Disk(args) => disk::run(args),
        Command::Cluster(args) => cluster::run(args),
        Command::Schema => schema::print(),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "nacre", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    };
    result.unwrap_or_else(|error| {
        eprintln!("nacre: {}", daemons::describe(&error));
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}

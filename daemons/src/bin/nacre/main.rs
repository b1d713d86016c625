//! The `nacre` command line.

mod accel;
mod cluster;
mod disk;
mod run;
mod schema;
mod vm;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::filter::LevelFilter;

/// Runs virtual machines and manages their disks.
#[derive(Parser)]
#[command(name = "nacre", version, max_term_width = WIDTH)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Longest lines of help.
const WIDTH: usize = 100;

#[derive(Subcommand)]
enum Command {
    Run(Box<run::Args>),
    Vm(vm::Args),
    Accel(accel::Args),
    Disk(disk::Args),
    Cluster(cluster::Args),
    /// Print the JSON schema of `nacre run --config` files.
    #[command(after_help = "Example:\n  nacre schema >nacre-run.schema.json")]
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

/// The command that the arguments say. A machine starts without the descriptions of all other commands.
fn parse(arguments: Vec<OsString>) -> Result<Command, clap::Error> {
    if arguments.get(1).is_some_and(|first| first == "run") {
        let run = run::Args::command().name("run").bin_name("nacre run").max_term_width(WIDTH);
        let matches = run.try_get_matches_from(arguments.into_iter().skip(1))?;
        return Ok(Command::Run(Box::new(run::Args::from_arg_matches(&matches)?)));
    }
    Ok(Cli::try_parse_from(arguments)?.command)
}

fn main() -> ExitCode {
    let command = match daemons::command_line("nacre", parse(std::env::args_os().collect())) {
        Ok(command) => command,
        Err(status) => return status,
    };
    daemons::log_to_stderr(LevelFilter::WARN);
    let result = match command {
        Command::Run(args) => run::run(*args),
        Command::Vm(args) => vm::run(args),
        Command::Accel(args) => accel::run(&args),
        Command::Disk(args) => disk::run(args),
        Command::Cluster(args) => cluster::run(args),
        Command::Schema => schema::print(),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "nacre", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    };
    daemons::exit_code("nacre", result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// `run` is parsed by itself: it must be the same command.
    #[test]
    fn run_is_the_same_alone_and_among_the_others() {
        let help = |parse: fn(Vec<OsString>) -> Result<Command, clap::Error>, line: &[&str]| {
            let line = line.iter().map(OsString::from).collect();
            parse(line).err().expect("no machine is started").render().to_string()
        };
        for line in
            [&["nacre", "run", "--help"][..], &["nacre", "run", "-h"], &["nacre", "run", "--no-such-option"]]
        {
            let among = |line| Cli::try_parse_from(line).map(|cli: Cli| cli.command);
            assert_eq!(help(parse, line), help(among, line), "{line:?}");
        }
    }
}

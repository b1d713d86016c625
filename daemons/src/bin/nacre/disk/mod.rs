//! `nacre disk`: creates, inspects, checks, converts and merges disk images.

mod chain;
mod change;
mod common;
mod convert;
mod copy;
mod create;
mod inspect;
mod map;
mod progress;
mod remote;
mod tree;

use clap::{Args as ClapArgs, Subcommand};
use std::process::ExitCode;

/// Create, inspect, check, convert and merge disk images.
///
/// Formats are never guessed from an image's contents, because a guest can write them: name the format
/// with -f.
#[derive(ClapArgs)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Create(create::Create),
    Clone(create::Clone),
    Info(inspect::Info),
    Map(map::Map),
    Tree(tree::Tree),
    Check(inspect::Check),
    Repair(inspect::RepairArgs),
    Compare(inspect::Compare),
    Measure(inspect::Measure),
    Convert(convert::Convert),
    Mirror(copy::Mirror),
    Migrate(copy::Migrate),
    Backup(copy::Backup),
    Resize(change::Resize),
    Snapshot(change::Snapshot),
    Bitmap(change::Bitmap),
    Commit(chain::Commit),
    Stream(chain::Stream),
    Rebase(chain::Rebase),
}

/// Exit code of a command that was cancelled with Ctrl-C, as shells have it.
const CANCELLED: u8 = 130;

/// Runs a command. Exit codes are those of `qemu-img` where the commands mean the same.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match run_command(args) {
        Err(error) if matches!(error.downcast_ref(), Some(blockfmt::Error::Cancelled)) => {
            eprintln!("nacre: {}", daemons::describe(&error));
            Ok(ExitCode::from(CANCELLED))
        }
        result => result,
    }
}

fn run_command(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Create(args) => create::create(args),
        Command::Clone(args) => create::clone(args),
        Command::Info(args) => inspect::info(args),
        Command::Map(args) => map::map(args),
        Command::Tree(args) => tree::tree(args),
        Command::Check(args) => Ok(inspect::check(args)),
        Command::Repair(args) => Ok(inspect::repair(args)),
        Command::Compare(args) => Ok(inspect::compare(args)),
        Command::Measure(args) => inspect::measure(args),
        Command::Convert(args) => convert::convert(args),
        Command::Mirror(args) => copy::mirror(args),
        Command::Migrate(args) => copy::migrate(args),
        Command::Backup(args) => copy::backup(args),
        Command::Resize(args) => change::resize(args),
        Command::Snapshot(args) => change::snapshot(args),
        Command::Bitmap(args) => change::bitmap(args),
        Command::Commit(args) => chain::commit(args),
        Command::Stream(args) => chain::stream(args),
        Command::Rebase(args) => chain::rebase(args),
    }
}

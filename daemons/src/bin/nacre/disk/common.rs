//! What the commands share: sizes, options, opening, progress.

use super::progress::Bar;
use anyhow::{Context, Result};
use blockfmt::job::JobControl;
use blockfmt::{CreateOptions, Disk, Format, LockMode, OpenOptions, OpenPolicy, Secret};
use clap::Args;
use nix::sys::signal::{SigSet, Signal};
use std::cell::OnceCell;
use std::path::PathBuf;
use std::sync::Arc;

/// An image and how to open it.
#[derive(Args, Clone)]
pub struct Image {
    /// Format of the image.
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Format,
    /// The image: a file, a block device or the URI of an NBD export (nbd://HOST:PORT/NAME,
    /// nbd+unix:///NAME?socket=PATH, nbds://HOST/NAME?tls-certificates=DIRECTORY).
    pub path: PathBuf,
    /// Let the image name files outside of its own directory.
    #[arg(long)]
    pub trust_headers: bool,
    /// Open the image even if another process uses it. What is read may be inconsistent.
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// Open the chain even if a parent changed since its child was made; `rebase -u` accepts that for good.
    #[arg(long)]
    pub changed_parents: bool,
    #[command(flatten)]
    pub secrets: Secrets,
}

/// Where the passphrases of encrypted images are. They are never on the command line itself.
#[derive(Args, Clone, Default)]
pub struct Secrets {
    /// Take a passphrase from this file, every byte of it; may be repeated.
    #[arg(long, value_name = "FILE")]
    pub secret_file: Vec<PathBuf>,
    /// Take a passphrase from this open file descriptor, up to its end; may be repeated.
    #[arg(long, value_name = "FD")]
    pub secret_fd: Vec<u32>,
    /// What was read: a pipe can be read once.
    #[arg(skip)]
    known: OnceCell<Vec<Secret>>,
}

impl Secrets {
    /// Reads the passphrases.
    pub fn read(&self) -> Result<Vec<Secret>> {
        if let Some(known) = self.known.get() {
            return Ok(known.clone());
        }
        let descriptors = self.secret_fd.iter().map(|fd| PathBuf::from(format!("/dev/fd/{fd}")));
        let paths = self.secret_file.iter().cloned().chain(descriptors);
        let secrets = paths.map(|path| Secret::from_file(&path)).collect::<blockfmt::Result<Vec<_>>>()?;
        Ok(self.known.get_or_init(|| secrets).clone())
    }

    /// Adds the passphrases to the options of an open.
    pub fn apply(&self, options: OpenOptions) -> Result<OpenOptions> {
        Ok(self.read()?.into_iter().fold(options, OpenOptions::secret))
    }
}

impl Image {
    /// Opens the image with its chain.
    pub fn open(&self, read_only: bool) -> Result<Disk> {
        let disk = self.options(read_only)?.open(&self.path);
        disk.with_context(|| format!("Cannot open {}", self.path.display()))
    }

    /// The options that the command line asks for.
    pub fn options(&self, read_only: bool) -> Result<OpenOptions> {
        let options = OpenOptions::new(self.format)
            .read_only(read_only)
            .policy(policy(self.trust_headers))
            .changed_parents(self.changed_parents);
        self.secrets.apply(match self.force_share && read_only {
            true => options.lock(LockMode::None),
            false => options,
        })
    }
}

/// The policy for files that headers name.
pub fn policy(trust_headers: bool) -> OpenPolicy {
    if trust_headers { OpenPolicy::trust_headers() } else { OpenPolicy::same_directory() }
}

/// A progress bar and a rate limit, for commands that take a while.
#[derive(Args)]
pub struct Work {
    /// Show a progress bar.
    #[arg(short, long)]
    pub progress: bool,
    /// Limit the rate, in bytes per second (suffixes K, M, G, T).
    #[arg(short, long, value_parser = parse_size, value_name = "RATE")]
    pub rate_limit: Option<u64>,
    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
}

impl Work {
    /// The control of a job that does what the command line asks for, and that Ctrl-C cancels.
    pub fn control(&self) -> Result<Arc<JobControl>> {
        let mut control = JobControl::new();
        if self.progress {
            let bar = Bar::new();
            control = control.on_progress(move |progress| bar.show(progress.done, progress.total));
        }
        control.set_rate(self.rate_limit.unwrap_or(0));
        let control = Arc::new(control);
        // Blocked in this thread and all that it starts: only the waiting one gets them.
        let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
        signals.thread_block().context("Cannot block signals")?;
        let cancelled = control.clone();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            if signals.wait().is_ok() {
                cancelled.cancel();
            }
            // The next one ends the process at once.
            let _ = signals.thread_unblock();
            std::thread::park();
        })?;
        Ok(control)
    }

    /// Prints what a job did, if that is asked for.
    pub fn report(&self, control: &JobControl) -> Result<()> {
        if self.json { print_json(&control.progress()) } else { Ok(()) }
    }
}

/// The form of what a command tells.
#[derive(Args)]
pub struct Output {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// What to print: "human", or "json" as --json does.
    #[arg(long, value_name = "FORM", value_parser = ["human", "json"], conflicts_with = "json")]
    output: Option<String>,
}

impl Output {
    /// Whether JSON is asked for.
    pub fn json(&self) -> bool {
        self.json || self.output.as_deref() == Some("json")
    }
}

/// The size of an image of this format: others read formats that count in sectors only to the end of the last whole one.
pub fn whole_sectors(format: Format, size: u64) -> u64 {
    match format {
        Format::Raw => size,
        _ => size.next_multiple_of(512),
    }
}

/// Parses a size in bytes with an optional suffix of powers of 1024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    blockfmt::disk::parse_size(text).map_err(|error| match error {
        blockfmt::Error::InvalidOption(what) => what,
        error => error.to_string(),
    })
}

/// Options of new images, with qemu-img's names.
pub fn apply_options(create: &mut CreateOptions, lists: &[String]) -> Result<()> {
    Ok(lists.iter().try_for_each(|list| create.apply(list))?)
}

/// Prints a value as JSON.
pub fn print_json(value: &impl serde::Serialize) -> Result<()> {
    daemons::outln!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

//! Mirrors and backups: of images that nobody uses, and, through `nacre-blk`, of disks in use.

use super::common::{Image, Secrets, Work, apply_options, policy, print_json};
use super::progress::human;
use super::remote::Remote;
use anyhow::{Context, Result, bail};
use blockfmt::disk::parent_name;
use blockfmt::job::{self, ConvertOptions, JobControl, Migration};
use blockfmt::nbd::Uri;
use blockfmt::{CreateOptions, Disk, Format, OpenOptions};
use clap::{Args, ValueEnum};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What both commands copy, and where to.
#[derive(Args)]
struct Copy {
    /// Format of the source image.
    #[arg(short, long, value_name = "FORMAT", required_unless_present = "via")]
    format: Option<Format>,
    /// The source is an export of the `nacre-blk` that has this API socket, and is in use.
    #[arg(long, value_name = "SOCKET")]
    via: Option<PathBuf>,
    /// Let the image name files outside of its own directory.
    #[arg(long)]
    trust_headers: bool,
    /// Format of the target.
    #[arg(short = 'O', long, value_name = "FORMAT")]
    target_format: Format,
    /// Options of the target, as key=value.
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Go on with a copy that was cancelled or crashed: the target exists, and only what differs is written. With --via,
    /// of mirrors only.
    #[arg(long, conflicts_with = "options")]
    resume: bool,
    #[command(flatten)]
    secrets: Secrets,
    #[command(flatten)]
    work: Work,
    /// The image to copy; with --via, the name of the export.
    source: String,
    /// The target: a file that must not exist, except with --resume, or the URI of an NBD export.
    target: PathBuf,
}

impl Copy {
    fn image(&self) -> Result<Image> {
        let format = self.format.context("Name the format of the source with -f")?;
        let (path, trust_headers) = (self.source.clone().into(), self.trust_headers);
        let secrets = self.secrets.clone();
        Ok(Image { format, path, trust_headers, force_share: false, changed_parents: false, secrets })
    }

    /// Whether the target is an export elsewhere, which may hold anything.
    fn is_remote(&self) -> bool {
        self.target.to_str().is_some_and(Uri::matches)
    }

    /// How the target is created.
    fn create_options(&self, size: u64) -> Result<CreateOptions> {
        let mut create = CreateOptions::new(self.target_format, size);
        apply_options(&mut create, &self.options)?;
        create.size = size;
        create.secret = self.secrets.read()?.into_iter().next();
        Ok(create)
    }

    /// Opens the target, after creating it unless it was begun earlier.
    fn target(&self, size: u64, parent: Option<(&PathBuf, Format)>) -> Result<Disk> {
        if !self.resume && !self.is_remote() {
            let mut create = self.create_options(size)?;
            if let Some((path, format)) = parent {
                create = create.backing(parent_name(path, &self.target)?, format);
            }
            create
                .create(&self.target)
                .with_context(|| format!("Cannot create {}", self.target.display()))?;
        }
        let options = OpenOptions::new(self.target_format).policy(policy(self.trust_headers));
        let options = self.secrets.apply(options)?;
        options.open(&self.target).with_context(|| format!("Cannot open {}", self.target.display()))
    }

    /// Copies a whole disk that nobody uses.
    fn convert(&self, source: &Disk) -> Result<Outcome> {
        let target = self.target(source.size(), None)?;
        let control = self.work.control()?;
        let options = ConvertOptions {
            resume: self.resume,
            target_is_zero: !self.is_remote(),
            ..ConvertOptions::default()
        };
        let result = job::convert(source, &target, options, &control);
        // Also when it was cancelled: what is there is where --resume goes on.
        target.close()?;
        result?;
        Ok(Outcome { bytes: control.progress().done, job: None })
    }

    /// Runs a command of `nacre-blk` to its end.
    fn remote(&self, socket: &Path, mut command: serde_json::Value) -> Result<Outcome> {
        let target = match self.is_remote() {
            true => self.target.clone(),
            false => std::path::absolute(&self.target)?,
        };
        command["name"] = json!(self.source);
        command["path"] = json!(target);
        command["format"] = json!(self.target_format);
        command["options"] = json!(self.options.join(","));
        command["resume"] = json!(self.resume);
        command["rate"] = json!(self.work.rate_limit.unwrap_or(0));
        let control = self.work.control()?;
        let (job, bytes) = Remote::new(socket).run(&command, &control)?;
        Ok(Outcome { bytes, job: Some(job) })
    }
}

/// What a command did.
struct Outcome {
    bytes: u64,
    job: Option<u64>,
}

fn report(outcome: &Outcome, copy: &Copy) -> Result<ExitCode> {
    if copy.work.json {
        print_json(&json!({ "target": copy.target, "bytes": outcome.bytes, "job": outcome.job }))?;
    } else if copy.work.progress {
        eprintln!("{} copied", human(outcome.bytes));
    }
    Ok(ExitCode::SUCCESS)
}

/// When changes of a disk in use reach the copy.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Mode {
    /// Later; a guest that writes faster than the copy keeps it from ending.
    Background,
    /// Before they are acknowledged.
    WriteBlocking,
}

/// Copy a disk to a new image; one that is in use can continue there.
///
/// Ctrl-C ends the copy in order. Of an image that nobody uses, the part that was copied stays: the same command
/// with --resume goes on.
#[derive(Args)]
#[command(after_help = "Examples:
  nacre disk mirror -p -f qcow2 -O qcow2 disk.qcow2 /mnt/new/disk.qcow2
  nacre disk mirror -p --via /run/blk.sock --switch -O qcow2 root /mnt/new/root.qcow2")]
pub struct Mirror {
    #[command(flatten)]
    copy: Copy,
    /// When changes reach the copy (with --via).
    #[arg(long, value_enum, default_value = "background", requires = "via")]
    mode: Mode,
    /// Let the disk continue in the copy once both are equal (with --via).
    #[arg(long, requires = "via")]
    switch: bool,
}

pub fn mirror(args: Mirror) -> Result<ExitCode> {
    let copy = &args.copy;
    let outcome = match &copy.via {
        Some(socket) => {
            let command = if args.switch { "migrate" } else { "mirror" };
            let mode = if args.mode == Mode::Background { "background" } else { "write-blocking" };
            copy.remote(socket, json!({ "command": command, "mode": mode }))?
        }
        None => copy.convert(&copy.image()?.open(true)?)?,
    };
    report(&outcome, copy)
}

/// Move a disk to a new image: redirect what is written there at once, then merge the old images into it.
///
/// Unlike a mirror it writes nothing twice and ends however fast a guest writes. From the start on, the disk is to be
/// opened by the new image, which names the old one as its parent until all is moved. Ctrl-C ends the move in order:
/// the same command with --resume (with --via, the same one) goes on, and `nacre disk commit` brings the new image back
/// to the old one. The old images stay; at the end nobody refers to them any more. A new image in qcow2 has subclusters, for
/// small writes that copy nothing; -o extended_l2=off makes one without.
#[derive(Args)]
#[command(after_help = "Examples:
  nacre disk migrate -p -f qcow2 -O qcow2 disk.qcow2 /mnt/new/disk.qcow2
  nacre disk migrate -f qcow2 -O qcow2 --base golden.qcow2 disk.qcow2 moved.qcow2
  nacre disk migrate -p --via /run/blk.sock -O qcow2 root /mnt/new/root.qcow2")]
pub struct Migrate {
    #[command(flatten)]
    copy: Copy,
    /// Keep depending on this image of the chain.
    #[arg(long, value_name = "FILE", conflicts_with = "via")]
    base: Option<PathBuf>,
}

pub fn migrate(args: Migrate) -> Result<ExitCode> {
    let copy = &args.copy;
    if copy.is_remote() {
        bail!("An NBD export cannot have a parent; use mirror");
    }
    let outcome = match &copy.via {
        Some(socket) => copy.remote(socket, json!({ "command": "migrate", "mode": "redirect" }))?,
        None => {
            let control = copy.work.control()?;
            let disk = move_disk(&args, &control)?;
            disk.close()?;
            Outcome { bytes: control.progress().done, job: None }
        }
    };
    report(&outcome, copy)
}

/// Moves a disk that nobody uses.
fn move_disk(args: &Migrate, control: &JobControl) -> Result<Disk> {
    let copy = &args.copy;
    let source = copy.image()?;
    let disk = match copy.resume {
        false => source.open(false)?,
        true => {
            // The target names the source, wherever that is.
            let policy = policy(copy.trust_headers).allow([&source.path]);
            let options = copy.secrets.apply(OpenOptions::new(copy.target_format).policy(policy))?;
            let disk = options.open(&copy.target);
            disk.with_context(|| format!("Cannot open {}", copy.target.display()))?
        }
    };
    let base = args.base.as_deref().map(|base| disk.find_layer(base)).transpose()?;
    let migration = match copy.resume {
        true => Migration::resume(&disk, base)?,
        false => {
            let target = disk.create_child(&copy.target, &copy.create_options(disk.size())?);
            let target = target.with_context(|| format!("Cannot create {}", copy.target.display()))?;
            Migration::start(&disk, target, base)?
        }
    };
    migration.run(control)?;
    Ok(disk)
}

/// Copy a disk, or what changed of it since the last backup.
///
/// An incremental backup copies what a persistent dirty bitmap marks and clears the bitmap when it is complete, unless
/// the bitmap is disabled: then it stays as it is. The target holds the increment only; with -b it is an image on top of
/// the previous backup.
#[derive(Args)]
#[command(after_help = "Examples:
  nacre disk bitmap -f qcow2 --add disk.qcow2 daily
  nacre disk backup -p -f qcow2 -O qcow2 disk.qcow2 full.qcow2
  nacre disk backup -f qcow2 --bitmap daily -b full.qcow2 -F qcow2 -O qcow2 disk.qcow2 monday.qcow2
  nacre disk backup --via /run/blk.sock --bitmap daily -O qcow2 root tuesday.qcow2")]
pub struct Backup {
    #[command(flatten)]
    copy: Copy,
    /// Copy only what this persistent bitmap of the source marks, and clear it if it is enabled.
    #[arg(long, value_name = "NAME")]
    bitmap: Option<String>,
    /// The previous backup, as the parent of the target.
    #[arg(short, long, value_name = "FILE", requires = "backing_format", conflicts_with = "via")]
    backing: Option<PathBuf>,
    /// Format of the previous backup.
    #[arg(short = 'F', long, value_name = "FORMAT")]
    backing_format: Option<Format>,
}

pub fn backup(args: Backup) -> Result<ExitCode> {
    let copy = &args.copy;
    if args.backing.is_some() && args.bitmap.is_none() {
        bail!("A full backup depends on no other; -b goes with --bitmap");
    }
    let outcome = match (&copy.via, &args.bitmap) {
        (Some(socket), bitmap) => copy.remote(socket, json!({ "command": "backup", "bitmap": bitmap }))?,
        (None, None) => copy.convert(&copy.image()?.open(true)?)?,
        (None, Some(name)) => increment(&args, name)?,
    };
    report(&outcome, copy)
}

/// An incremental backup of an image that nobody uses.
fn increment(args: &Backup, name: &str) -> Result<Outcome> {
    let copy = &args.copy;
    let source = copy.image()?.open(false)?;
    let layer = source.layers().remove(0);
    let image = layer.as_qcow2().context("Only qcow2 images have bitmaps")?;
    let changes = image.bitmap(name)?;
    let target = copy.target(source.size(), args.backing.as_ref().zip(args.backing_format))?;
    let control = copy.work.control()?;
    // A resumed one copies all of the marks again.
    let result = match image.records(&changes) {
        true => job::backup_changes(&source, &target, &changes, &control),
        false => job::backup(&source, &target, Some(&changes), &control),
    };
    target.close()?;
    source.close()?;
    result?;
    Ok(Outcome { bytes: control.progress().done, job: None })
}

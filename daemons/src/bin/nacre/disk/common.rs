//! What the commands share: sizes, options, opening, progress.

use super::progress::Bar;
use anyhow::{Context, Result, bail};
use blockfmt::format::qcow2::Compression;
use blockfmt::format::vhd::VhdKind;
use blockfmt::format::vhdx::VhdxKind;
use blockfmt::job::JobControl;
use blockfmt::{
    CipherMode, CreateOptions, Disk, Format, Hash, IvGenerator, LockMode, LuksOptions, OpenOptions,
    OpenPolicy, Preallocation, Secret,
};
use clap::Args;
use nix::sys::signal::{SigSet, Signal};
use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An image and how to open it.
#[derive(Args)]
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

/// Parses a size in bytes with an optional suffix of powers of 1024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        "p" | "pib" => 50,
        other => return Err(format!("unknown suffix {other:?}; use K, M, G, T or P")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is not a size"))?;
    number
        .checked_mul(1 << shift)
        .filter(|n| *n <= i64::MAX as u64)
        .ok_or_else(|| "the size is too large".into())
}

/// Options of new images, with qemu-img's names.
pub fn apply_options(create: &mut CreateOptions, list: &[String]) -> Result<()> {
    use Format::{Luks, Qcow2, Vhd, Vhdx};
    let (format, q) = (create.format, &mut create.qcow2);
    for option in list.iter().flat_map(|l| l.split(',')).filter(|o| !o.is_empty()) {
        let (key, value) = option.split_once('=').unwrap_or((option, "on"));
        let size = || parse_size(value).map_err(anyhow::Error::msg).with_context(|| format!("Option {key}"));
        let flag = || match value {
            "on" | "true" | "yes" => Ok(true),
            "off" | "false" | "no" => Ok(false),
            _ => Err(anyhow::anyhow!("Option {key} is on or off")),
        };
        match (key, format) {
            ("size", _) => create.size = size()?,
            ("preallocation", _) => {
                create.preallocation = match value {
                    "off" => Preallocation::Off,
                    "metadata" => Preallocation::Metadata,
                    "falloc" => Preallocation::Falloc,
                    "full" => Preallocation::Full,
                    _ => bail!("Preallocation is off, metadata, falloc or full"),
                }
            }
            ("compat", Qcow2) => match value {
                "0.10" | "v2" => q.version = 2,
                "1.1" | "v3" => q.version = 3,
                _ => bail!("Option compat is 0.10 or 1.1"),
            },
            ("cluster_size", Qcow2) => q.cluster_size = size()?,
            ("refcount_bits", Qcow2) => q.refcount_bits = u32::try_from(size()?)?,
            ("compression_type", Qcow2) => {
                q.compression = match value {
                    "zlib" => Compression::Zlib,
                    "zstd" => Compression::Zstd,
                    _ => bail!("Option compression_type is zlib or zstd"),
                }
            }
            ("extended_l2", Qcow2) => q.extended_l2 = flag()?,
            ("lazy_refcounts", Qcow2) => q.lazy_refcounts = flag()?,
            ("data_file", Qcow2) => q.data_file = Some(value.into()),
            ("data_file_raw", Qcow2) => q.data_file_raw = flag()?,
            ("encrypt.format", Qcow2) => match value {
                "luks" => drop(q.encryption.get_or_insert_default()),
                _ => bail!("Option encrypt.format is luks"),
            },
            (_, Qcow2 | Luks) if luks_key(format, key).is_some() => {
                let luks = match format {
                    Luks => &mut create.luks,
                    _ => q.encryption.get_or_insert_default(),
                };
                apply_luks(luks, luks_key(format, key).unwrap_or(key), value)?;
            }
            ("subformat", Vhd | Vhdx) => {
                (create.vhd.kind, create.vhdx.kind) = match value {
                    "dynamic" => (VhdKind::Dynamic, VhdxKind::Dynamic),
                    "fixed" => (VhdKind::Fixed, VhdxKind::Fixed),
                    _ => bail!("Option subformat is dynamic or fixed"),
                }
            }
            ("block_size", Vhdx) => create.vhdx.block_size = Some(u32::try_from(size()?)?),
            ("log_size", Vhdx) => create.vhdx.log_size = u32::try_from(size()?)?,
            ("block_state_zero", Vhdx) => create.vhdx.zero_blocks = flag()?,
            ("logical_sector_size", Vhdx) => create.vhdx.logical_sector = u32::try_from(size()?)?,
            _ => bail!("Format {format} has no option {key:?}"),
        }
    }
    Ok(())
}

/// The name of a LUKS option, without the prefix that it has for qcow2.
fn luks_key(format: Format, key: &str) -> Option<&str> {
    let name = if format == Format::Luks { key } else { key.strip_prefix("encrypt.")? };
    ["cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg", "iter-time"]
        .contains(&name)
        .then_some(name)
}

fn apply_luks(luks: &mut LuksOptions, key: &str, value: &str) -> Result<()> {
    match (key, value) {
        ("cipher-alg", "aes-128") => luks.key_bits = 128,
        ("cipher-alg", "aes-256") => luks.key_bits = 256,
        ("cipher-mode", "xts") => luks.mode = CipherMode::Xts,
        ("cipher-mode", "cbc") => luks.mode = CipherMode::Cbc,
        ("ivgen-alg", "plain") => luks.iv = IvGenerator::Plain,
        ("ivgen-alg", "plain64") => luks.iv = IvGenerator::Plain64,
        ("ivgen-alg", "essiv") => luks.iv = IvGenerator::Essiv,
        ("ivgen-hash-alg", "sha256") => {}
        ("hash-alg", "sha1") => luks.hash = Hash::Sha1,
        ("hash-alg", "sha256") => luks.hash = Hash::Sha256,
        ("hash-alg", "sha512") => luks.hash = Hash::Sha512,
        ("iter-time", _) => luks.iter_time_ms = value.parse().context("Option iter-time")?,
        _ => bail!("Option {key} cannot be {value:?}"),
    }
    Ok(())
}

/// How an image at `child` names the file that the user calls `parent`.
pub fn parent_name(parent: &Path, child: &Path) -> Result<String> {
    let parent = std::path::absolute(parent)?;
    let child = std::path::absolute(child)?;
    let name = match (parent.file_name(), parent.parent() == child.parent()) {
        (Some(name), true) => name.into(),
        _ => parent,
    };
    name.into_os_string().into_string().map_err(|_| anyhow::anyhow!("The parent's name is not UTF-8"))
}

/// Prints a value as JSON.
pub fn print_json(value: &impl serde::Serialize) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("10G"), Ok(10 << 30));
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("3MiB"), Ok(3 << 20));
        for bad in ["", "G", "1X", "-1", "99999999999999999999", "9999999P"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn options_have_the_names_of_qemu_img() {
        let mut create = CreateOptions::new(Format::Qcow2, 0);
        let list = [
            "cluster_size=128k,extended_l2=on".to_owned(),
            "compression_type=zstd,preallocation=metadata".into(),
        ];
        apply_options(&mut create, &list).unwrap();
        assert_eq!((create.qcow2.cluster_size, create.qcow2.extended_l2), (131072, true));
        assert_eq!(create.preallocation, Preallocation::Metadata);
        assert!(apply_options(&mut create, &["colour=red".into()]).is_err());
        let mut raw = CreateOptions::new(Format::Raw, 0);
        assert!(apply_options(&mut raw, &["cluster_size=64k".into()]).is_err());
        let list = ["encrypt.format=luks,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv".to_owned()];
        apply_options(&mut create, &list).unwrap();
        assert_eq!(
            create.qcow2.encryption.map(|l| (l.mode, l.iv)),
            Some((CipherMode::Cbc, IvGenerator::Essiv))
        );
        let mut vhdx = CreateOptions::new(Format::Vhdx, 0);
        apply_options(&mut vhdx, &["subformat=fixed,block_size=2M,log_size=4M".into()]).unwrap();
        assert_eq!((vhdx.vhdx.kind, vhdx.vhdx.block_size), (VhdxKind::Fixed, Some(2 << 20)));
        assert_eq!(vhdx.vhdx.log_size, 4 << 20);
    }
}

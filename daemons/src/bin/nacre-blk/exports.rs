//! The disks that are exported.

use crate::jobs::{Jobs, lock};
use crate::throttle::{GroupSpec, Groups};
use anyhow::{Context, Result, bail};
use blockfmt::disk::{RegistryStats, SnapshotNode, snapshot_tree};
use blockfmt::job::{self, Migration, Mirror, MirrorMode};
use blockfmt::nbd::{Export, ExportInfo, Server, ServerLimits, Uri};
use blockfmt::{CreateOptions, Disk, Format, OpenOptions, OpenPolicy, Registry, Secret};
use nacre_engine::vhost_blk;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, mpsc};

/// What to export.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportSpec {
    /// The name that clients ask for.
    pub name: String,
    /// The image.
    pub path: PathBuf,
    /// The image's format; it is never guessed.
    pub format: String,
    /// Refuse writes.
    #[serde(default)]
    pub readonly: bool,
    /// Bypass the host's page cache.
    #[serde(default)]
    pub direct: bool,
    /// Names of the image's dirty bitmaps that clients may read.
    #[serde(default)]
    pub bitmaps: Vec<String>,
    /// Files, and directories of files, that the image and those below it may name besides files of their own
    /// directories. Needed for what another place than the image's holds, as while it is migrated by redirection.
    #[serde(default)]
    pub allow: Vec<PathBuf>,
    /// Open the image even if a parent changed since its child was made, which may have made the child useless.
    #[serde(default, rename = "changed-parents")]
    pub changed_parents: bool,
    /// Files with the passphrases of encrypted images, every byte of each. What is written to new images, of
    /// snapshots and copies, is encrypted with the first one.
    #[serde(default, rename = "secret-files")]
    pub secret_files: Vec<PathBuf>,
    /// Leave the image as it is: what is written goes to a file in this directory that vanishes with the export.
    #[serde(default, rename = "non-persistent")]
    pub non_persistent: Option<PathBuf>,
    /// Share the images below this one, and what is known of where their bytes are, with other exports that say so.
    /// Nothing can be merged into them then.
    #[serde(default, rename = "share-bases")]
    pub share_bases: bool,
    /// The socket of a vhost-user-blk device for this disk, besides NBD.
    #[serde(default)]
    pub vhost: Option<PathBuf>,
    /// Queues of the vhost-user device.
    #[serde(default = "default_queues")]
    pub queues: u16,
}

/// One queue for each processor.
fn default_queues() -> u16 {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u16::try_from(processors).unwrap_or(u16::MAX).min(vhost_blk::MAX_QUEUES)
}

impl FromStr for ExportSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut name, mut path, mut format, mut vhost) = (None, None, None, None);
        let (mut readonly, mut direct, mut queues) = (false, false, default_queues());
        let (mut share_bases, mut changed_parents, mut non_persistent) = (false, false, None);
        let (mut bitmaps, mut secret_files, mut allow) = (Vec::new(), Vec::new(), Vec::new());
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("name", value)) => name = Some(value.to_owned()),
                Some(("path", value)) => path = Some(PathBuf::from(value)),
                Some(("format", value)) => format = Some(value.to_owned()),
                Some(("bitmap", value)) => bitmaps.push(value.to_owned()),
                Some(("non-persistent", value)) => non_persistent = Some(PathBuf::from(value)),
                Some(("allow", value)) => allow.push(PathBuf::from(value)),
                Some(("secret-file", value)) => secret_files.push(PathBuf::from(value)),
                Some(("secret-fd", value)) => {
                    let fd: u32 = value.parse().map_err(|_| format!("secret-fd={value} is not a number"))?;
                    secret_files.push(PathBuf::from(format!("/dev/fd/{fd}")));
                }
                Some(("vhost", value)) => vhost = Some(PathBuf::from(value)),
                Some(("queues", value)) => {
                    queues = value.parse().map_err(|_| format!("queues={value} is not a number"))?;
                }
                None if part == "readonly" => readonly = true,
                None if part == "direct" => direct = true,
                None if part == "share-bases" => share_bases = true,
                None if part == "changed-parents" => changed_parents = true,
                _ => {
                    let known = "name=, path=, format=, bitmap=, allow=, secret-file=, secret-fd=, non-persistent=, vhost=, queues=, share-bases, changed-parents, direct and readonly";
                    return Err(format!("{part:?} is none of {known}"));
                }
            }
        }
        let missing = |what: &str| format!("{what}= is missing");
        Ok(ExportSpec {
            name: name.ok_or_else(|| missing("name"))?,
            path: path.ok_or_else(|| missing("path"))?,
            format: format.ok_or_else(|| missing("format"))?,
            readonly,
            direct,
            bitmaps,
            allow,
            changed_parents,
            secret_files,
            non_persistent,
            share_bases,
            vhost,
            queues,
        })
    }
}

/// A new image on top of an exported disk.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotSpec {
    /// The export.
    pub name: String,
    /// The image that takes what is written from now on. It must not exist.
    pub path: PathBuf,
    /// Options of this qcow2 image with the names of qemu-img, separated by commas. It has subclusters unless
    /// `extended_l2=off` says otherwise.
    #[serde(default)]
    pub options: String,
}

/// Back to an earlier state of an exported disk.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RollBackSpec {
    /// The export.
    pub name: String,
    /// The image of the disk's chain that keeps the state.
    pub image: PathBuf,
    /// The image that takes what is written from now on. It must not exist.
    pub path: PathBuf,
    /// Options of this qcow2 image with the names of qemu-img, separated by commas. It has subclusters unless
    /// `extended_l2=off` says otherwise.
    #[serde(default)]
    pub options: String,
}

/// When changes reach the target of a mirror or a migration.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Later.
    #[default]
    Background,
    /// Before they are acknowledged.
    WriteBlocking,
    /// They are made there only, from the start (migrate).
    Redirect,
}

/// A copy of an exported disk.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CopySpec {
    /// The export.
    pub name: String,
    /// The image to create, which must not exist; or the URI of an NBD export, which must (not to migrate by
    /// redirection).
    pub path: PathBuf,
    /// Its format.
    pub format: String,
    /// Options of the image, if it is created, with the names of qemu-img, separated by commas.
    #[serde(default)]
    pub options: String,
    /// When changes reach the target (mirror and migrate).
    #[serde(default)]
    pub mode: Mode,
    /// Go on with a copy that a crash ended: the image exists, and only what differs is written (mirror, and migrate
    /// unless by redirection, which needs no telling).
    #[serde(default)]
    pub resume: bool,
    /// Copy what this persistent bitmap marks, and take the marks if it is enabled (backup).
    #[serde(default)]
    pub bitmap: Option<String>,
    /// Bytes per second; 0 for no limit.
    #[serde(default)]
    pub rate: u64,
}

impl CopySpec {
    /// Whether the disk is redirected to the target before its contents are moved.
    pub fn redirects(&self) -> bool {
        matches!(self.mode, Mode::Redirect)
    }

    /// Creates the image, unless it is an export elsewhere, and opens it.
    fn create(&self, source: &Exported) -> Result<Disk> {
        let format: Format = self.format.parse()?;
        let create = source.create_options(format, &self.options)?;
        if !self.resume && !self.path.to_str().is_some_and(Uri::matches) {
            create.create(&self.path).with_context(|| format!("Cannot create {}", self.path.display()))?;
        }
        let options = OpenOptions::new(format);
        Ok(source.secret.iter().cloned().fold(options, OpenOptions::secret).open(&self.path)?)
    }
}

/// A disk that is exported.
#[derive(Clone)]
struct Exported {
    disk: Disk,
    /// What new images that hold its contents are encrypted with.
    secret: Option<Secret>,
}

impl Exported {
    /// How an image that holds contents of the disk is created, with `options` as of `nacre disk create -o`: what is
    /// encrypted stays so.
    fn create_options(&self, format: Format, options: &str) -> Result<CreateOptions> {
        let mut create = CreateOptions::new(format, 0);
        create.apply(options)?;
        create.size = self.disk.size();
        if let Some(secret) = &self.secret {
            match format {
                Format::Luks => {}
                Format::Qcow2 => drop(create.qcow2.encryption.get_or_insert_default()),
                _ => anyhow::bail!("The disk is encrypted and format {format} is not; use qcow2 or luks"),
            }
            create.secret = Some(secret.clone());
        }
        Ok(create)
    }
}

/// The server, its disks and the jobs on them. Clones are handles to the same.
#[derive(Clone)]
pub struct Exports {
    server: Arc<Server>,
    disks: Arc<Mutex<BTreeMap<String, Exported>>>,
    devices: Arc<Mutex<BTreeMap<String, vhost_blk::Export>>>,
    jobs: Arc<Jobs>,
    groups: Arc<Mutex<Groups>>,
    bases: Registry,
}

impl Exports {
    pub fn new(limits: ServerLimits) -> Self {
        Exports {
            server: Arc::new(Server::with_limits(limits)),
            disks: Arc::default(),
            devices: Arc::default(),
            jobs: Arc::default(),
            groups: Arc::default(),
            bases: Registry::new(),
        }
    }

    pub fn server(&self) -> &Server {
        &self.server
    }

    /// Opens a disk and exports it.
    pub fn add(&self, spec: &ExportSpec) -> Result<()> {
        let format: Format = spec.format.parse()?;
        let mut disks = lock(&self.disks);
        let secrets = spec.secret_files.iter().map(|path| Secret::from_file(path));
        let secrets = secrets.collect::<blockfmt::Result<Vec<_>>>()?;
        let policy = OpenPolicy::same_directory().allow(&spec.allow);
        let mut options = OpenOptions::new(format)
            .read_only(spec.readonly)
            .direct(spec.direct)
            .policy(policy)
            .changed_parents(spec.changed_parents);
        if spec.share_bases {
            options = options.registry(&self.bases);
        }
        if let Some(directory) = &spec.non_persistent {
            options = options.non_persistent(directory);
        }
        let disk = secrets.iter().cloned().fold(options, OpenOptions::secret).open(&spec.path);
        let disk = disk.with_context(|| format!("Cannot export {}", spec.path.display()))?;
        let layer = disk.layers().remove(0);
        let find = |name: &String| {
            let image = layer.as_qcow2().context("Only qcow2 images have dirty bitmaps")?;
            Ok((name.clone(), image.bitmap(name)?))
        };
        let bitmaps: Vec<_> = spec.bitmaps.iter().map(find).collect::<Result<_>>()?;
        self.server.add_export(Export {
            name: spec.name.clone(),
            description: spec.path.display().to_string(),
            disk: disk.clone(),
            read_only: spec.readonly,
        })?;
        for (name, bitmap) in bitmaps {
            self.server.show_bitmap(&spec.name, &name, bitmap)?;
        }
        if let Some(socket) = &spec.vhost {
            match start_device(socket, spec, &disk) {
                Ok(device) => drop(lock(&self.devices).insert(spec.name.clone(), device)),
                Err(error) => {
                    self.server.remove_export(&spec.name)?;
                    return Err(error);
                }
            }
        }
        let secret = secrets.into_iter().next();
        disks.insert(spec.name.clone(), Exported { disk, secret });
        Ok(())
    }

    /// How well exports share bases.
    pub fn stats(&self) -> RegistryStats {
        self.bases.stats()
    }

    pub fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    fn disk(&self, name: &str) -> Result<Disk> {
        Ok(self.exported(name)?.disk)
    }

    fn exported(&self, name: &str) -> Result<Exported> {
        let disks = lock(&self.disks);
        disks.get(name).cloned().with_context(|| format!("There is no export {name:?}"))
    }

    /// Changes the size of a disk. A virtual machine is told at once; NBD clients learn of it when they connect again.
    pub fn resize(&self, name: &str, size: u64) -> Result<()> {
        self.disk(name)?.resize(size)?;
        self.tell_of_size(name);
        Ok(())
    }

    fn tell_of_size(&self, name: &str) {
        if let Some(device) = lock(&self.devices).get(name) {
            device.config_changed();
        }
    }

    /// Freezes several disks at one instant; each continues in a new image.
    pub fn snapshot(&self, list: &[SnapshotSpec]) -> Result<()> {
        let mut group = Vec::new();
        let take = |spec: &SnapshotSpec, group: &mut Vec<_>| -> Result<()> {
            let exported = self.exported(&spec.name)?;
            let options = exported.create_options(Format::Qcow2, &spec.options)?;
            let layer = exported.disk.create_child(&spec.path, &options)?;
            group.push((exported.disk, layer));
            Ok(())
        };
        let result = list.iter().try_for_each(|spec| take(spec, &mut group));
        let result = result.and_then(|()| Ok(Disk::push_layers(&group)?));
        if result.is_err() {
            // Images of disks that did not continue in them are of no use; a file that was there before was
            // not made by us.
            for spec in &list[..group.len()] {
                let _ = std::fs::remove_file(&spec.path);
            }
        }
        result.context("Cannot take the snapshot")
    }

    /// Copies a disk to a new image; with `switch`, the disk continues there.
    pub fn mirror(&self, spec: &CopySpec, switch: bool) -> Result<u64> {
        let exported = self.exported(&spec.name)?;
        let mode = match spec.mode {
            Mode::Background => MirrorMode::Background,
            Mode::WriteBlocking => MirrorMode::WriteBlocking,
            Mode::Redirect => bail!("Only a migration redirects"),
        };
        let target = spec.create(&exported)?;
        let disk = exported.disk;
        let (path, resume) = (spec.path.clone(), spec.resume);
        let kind = if switch { "migrate" } else { "mirror" };
        let started = self.jobs.start(kind, &spec.name, spec.rate, move |control| {
            let copy = || -> Result<()> {
                let mirror = match resume {
                    true => Mirror::resume(&disk, &target, mode)?,
                    false => Mirror::start(&disk, &target, mode, None)?,
                };
                let mirror = mirror.run(control)?;
                if switch {
                    mirror.pivot(control)?
                } else {
                    mirror.finish(control)?
                }
                Ok(())
            };
            match resume {
                true => copy()?, // it may go on again
                false => discard_on_error(copy(), &path)?,
            }
            // After a switch the image belongs to the exported disk.
            if !switch {
                target.close()?;
            }
            Ok(())
        });
        if resume { started } else { discard_on_error(started, &spec.path) }
    }

    /// Lets a disk continue in a new image at once and moves its contents there; goes on with a migration that is
    /// not complete if the disk is there already. When this returns the disk is to be opened by the new image.
    pub fn redirect(&self, spec: &CopySpec) -> Result<u64> {
        let exported = self.exported(&spec.name)?;
        let create = exported.create_options(spec.format.parse()?, &spec.options)?;
        let (disk, path) = (exported.disk, spec.path.clone());
        let start = move || -> Result<Migration> {
            if disk.find_layer(&path).is_ok_and(|number| number == 0) {
                return Ok(Migration::resume(&disk, None)?);
            }
            let target = disk.create_child(&path, &create);
            let target = target.with_context(|| format!("Cannot create {}", path.display()))?;
            discard_on_error(Migration::start(&disk, target, None).map_err(Into::into), &path)
        };
        let (tell, redirected) = mpsc::channel();
        // In the job, so that no other one works on the disk.
        let job = self.jobs.start("migrate", &spec.name, spec.rate, move |control| {
            let migration = start();
            // Nobody waits any more if the API is gone.
            let _ = tell.send(migration.as_ref().err().map(daemons::describe));
            Ok(migration?.run(control)?)
        })?;
        match redirected.recv().context("The job ended early")? {
            Some(error) => bail!(error),
            None => Ok(job),
        }
    }

    /// Copies a disk as it is at an instant before this returns to a new image.
    pub fn backup(&self, spec: &CopySpec) -> Result<u64> {
        anyhow::ensure!(!spec.resume, "A backup of an instant that has passed cannot go on");
        let exported = self.exported(&spec.name)?;
        let disk = exported.disk.clone();
        let changes = match &spec.bitmap {
            None => None,
            Some(name) => {
                let layer = disk.layers().remove(0);
                let image = layer.as_qcow2().context("Only qcow2 images have bitmaps")?;
                let map = image.bitmap(name)?;
                let enabled = image.records(&map);
                Some((map, enabled))
            }
        };
        let target = spec.create(&exported)?;
        let path = spec.path.clone();
        let started = self.jobs.start("backup", &spec.name, spec.rate, move |control| {
            let result = match &changes {
                None => job::backup(&disk, &target, None, control),
                Some((changes, true)) => job::backup_changes(&disk, &target, changes, control),
                // It says what changed once, and stays as it is.
                Some((changes, false)) => job::backup(&disk, &target, Some(changes), control),
            };
            discard_on_error(result.map_err(Into::into), &path)?;
            Ok(target.close()?)
        });
        discard_on_error(started, &spec.path)
    }

    /// Merges the active image of a disk into its parent, which becomes the active one.
    pub fn commit(&self, name: &str, rate: u64) -> Result<u64> {
        let disk = self.disk(name)?;
        self.jobs.start("commit", name, rate, move |control| Ok(job::commit(&disk, 0, control)?))
    }

    /// Makes the active image of a disk independent of all others.
    pub fn stream(&self, name: &str, rate: u64) -> Result<u64> {
        let disk = self.disk(name)?;
        self.jobs.start("stream", name, rate, move |control| Ok(job::stream(&disk, 0, None, control)?))
    }

    /// Deletes the snapshot that an image of a disk's chain keeps. The file that is of no use any more stays.
    pub fn delete_snapshot(&self, name: &str, image: &Path, rate: u64) -> Result<u64> {
        let disk = self.disk(name)?;
        let image = image.to_owned();
        self.jobs.start("delete-snapshot", name, rate, move |control| {
            job::remove(&disk, disk.find_layer(&image)?, control)?;
            Ok(())
        })
    }

    /// Brings a disk back to the state that an image of its chain keeps.
    pub fn roll_back(&self, spec: &RollBackSpec) -> Result<()> {
        let exported = self.exported(&spec.name)?;
        let create = exported.create_options(Format::Qcow2, &spec.options)?;
        let number = exported.disk.find_layer(&spec.image)?;
        exported.disk.roll_back(number, &spec.path, &create).context("Cannot roll back")?;
        self.tell_of_size(&spec.name);
        Ok(())
    }

    /// The images of all disks, as trees.
    pub fn tree(&self) -> Result<Vec<SnapshotNode>> {
        let disks: Vec<_> = lock(&self.disks).values().map(|exported| exported.disk.clone()).collect();
        Ok(snapshot_tree(&disks)?)
    }

    /// Makes, changes or removes a group of disks whose requests are limited together.
    pub fn throttle(&self, spec: &GroupSpec) -> Result<()> {
        let disks = lock(&self.disks);
        if let Some(unknown) = spec.disks.iter().find(|name| !disks.contains_key(*name)) {
            bail!("There is no export {unknown:?}");
        }
        let mut groups = lock(&self.groups);
        groups.set(spec);
        disks.iter().for_each(|(name, exported)| exported.disk.set_throttles(groups.of(name)));
        Ok(())
    }

    /// Ends the jobs of an export, disconnects its clients and closes its disk.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.jobs.end(name);
        // Not under the lock: its requests end first.
        let device = lock(&self.devices).remove(name);
        drop(device);
        let mut disks = lock(&self.disks);
        lock(&self.groups).forget(name);
        let removed = self.server.remove_export(name);
        if let Some(exported) = disks.remove(name) {
            exported.disk.close()?;
        }
        Ok(removed?)
    }

    pub fn list(&self) -> Vec<ExportInfo> {
        self.server.exports()
    }

    /// Ends everything; reports the first disk that cannot be closed.
    pub fn close(&self) -> Result<()> {
        let results: Vec<_> = self.list().iter().map(|export| self.remove(&export.name)).collect();
        results.into_iter().collect()
    }
}

/// Starts the vhost-user device of an export.
fn start_device(socket: &Path, spec: &ExportSpec, disk: &Disk) -> Result<vhost_blk::Export> {
    let device = vhost_blk::Device::new(disk.clone(), &spec.name, spec.readonly, spec.queues)?;
    vhost_blk::Export::start(socket, device).with_context(|| format!("Cannot listen on {}", socket.display()))
}

/// Removes the image of a copy that failed.
fn discard_on_error<T>(result: Result<T>, path: &Path) -> Result<T> {
    if result.is_err() {
        // It is incomplete, and what matters is why.
        let _ = std::fs::remove_file(path);
    }
    result
}

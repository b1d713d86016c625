//! Opening a disk and the chain below it.

use super::{CreateOptions, Disk, OpenPolicy, Registry, Role};
use crate::format::qcow2::Qcow2Options;
use crate::format::{LayerOptions, data_file_name, open_layer};
use crate::nbd::{NbdOptions, NbdStorage, Uri};
use crate::storage::Leases;
use crate::storage::{FileId, FileOptions, FileStorage, LockMode};
use crate::{BackingRef, Error, Format, Layer, LuksOptions, Result, Secret, Storage};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Longest chain that is opened.
const MAX_DEPTH: usize = 512;

/// How a disk is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    pub(crate) format: Format,
    pub(crate) read_only: bool,
    pub(crate) direct: bool,
    pub(crate) lock: Option<LockMode>,
    pub(crate) policy: OpenPolicy,
    pub(crate) backing: bool,
    pub(crate) repair: bool,
    changed_parents: bool,
    secrets: Vec<Secret>,
    pub(super) registry: Option<Registry>,
    pub(super) temporary: Option<PathBuf>,
    leases: Option<Arc<dyn Leases>>,
}

impl OpenOptions {
    /// Opens an image of `format` for writing, with locks, through the host's page cache.
    pub fn new(format: Format) -> Self {
        OpenOptions {
            format,
            read_only: false,
            direct: false,
            lock: None,
            policy: OpenPolicy::default(),
            backing: true,
            repair: false,
            changed_parents: false,
            secrets: Vec::new(),
            registry: None,
            temporary: None,
            leases: None,
        }
    }

    /// The options for another image of the same disk, one that this process made or has open already.
    pub(super) fn for_layer(&self, format: Format) -> Self {
        OpenOptions {
            format,
            read_only: false,
            policy: OpenPolicy::trust_headers(),
            backing: true,
            repair: false,
            ..self.clone()
        }
    }

    /// Refuse writes.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Bypass the host's page cache.
    pub fn direct(mut self, direct: bool) -> Self {
        self.direct = direct;
        self
    }

    /// Locks against other processes. The default follows from reading or writing.
    pub fn lock(mut self, lock: LockMode) -> Self {
        self.lock = Some(lock);
        self
    }

    /// Which files image headers may name.
    pub fn policy(mut self, policy: OpenPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Whether to open the chain below the image. Without it, bytes of the chain read as zeros.
    pub fn backing(mut self, backing: bool) -> Self {
        self.backing = backing;
        self
    }

    /// Share open bases with the other disks of this registry.
    pub fn registry(mut self, registry: &Registry) -> Self {
        self.registry = Some(registry.clone());
        self
    }

    /// Leave the image as it is: what is written goes to a temporary file in `directory` that vanishes with
    /// the disk.
    pub fn non_persistent(mut self, directory: impl Into<PathBuf>) -> Self {
        self.temporary = Some(directory.into());
        self
    }

    /// Open the image even if it is marked as corrupt or was not closed properly, as it is, to repair it.
    pub fn repair(mut self, repair: bool) -> Self {
        self.repair = repair;
        self
    }

    /// Open the chain even if a parent changed since its child was made, which may have made the child useless. To
    /// [set the parent again](Layer::set_backing) accepts its present state for good.
    ///
    /// A change is noticed by the guard that VHD and VHDX have for parents of the same format. Otherwise it is the length
    /// of the parent's file or of its external data file, or the time of its last modification being later than known; a
    /// qcow2 image that was copied to another file, presumably with its parent, does not go by the time. Parents that are
    /// block devices have a length only. Nothing is known by qcow2 images that other programs made.
    pub fn changed_parents(mut self, changed_parents: bool) -> Self {
        self.changed_parents = changed_parents;
        self
    }

    /// Adds a passphrase. Each is tried on each encrypted image of the chain.
    pub fn secret(mut self, secret: Secret) -> Self {
        self.secrets.push(secret);
        self
    }

    /// Ask the cluster before any image of the disk is used, now or later.
    pub fn leases(mut self, leases: Arc<dyn Leases>) -> Self {
        self.leases = Some(leases);
        self
    }

    /// Opens a file, a block device, or an export of an NBD server, if `path` is the URI of one.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Disk> {
        let path = path.as_ref();
        if let Some(directory) = &self.temporary {
            let options = OpenOptions { read_only: true, temporary: None, ..self.clone() };
            return self.over_temporary_layer(&options.open(path)?, directory);
        }
        if let Some(uri) = path.to_str().filter(|text| Uri::matches(text)) {
            let options = NbdOptions { read_only: self.read_only, ..NbdOptions::default() };
            return self.open_storage(Arc::new(NbdStorage::connect(uri, options)?), "");
        }
        let options = FileOptions {
            read_only: self.read_only,
            direct: self.direct,
            lock: self.lock_mode(self.read_only),
            create: false,
        };
        let storage = Arc::new(FileStorage::open_leased(path, options, self.leases.as_ref())?);
        self.open_storage(storage, path)
    }

    /// Opens one image for writing without the chain below it. The caller closes the layer.
    pub fn open_layer_alone(&self, path: &Path) -> Result<Arc<dyn Layer>> {
        self.open_layer(self.format, Arc::new(self.open_for_writing(path)?), path, false)
    }

    /// Opens the file of an image for writing.
    pub(super) fn open_for_writing(&self, path: &Path) -> Result<FileStorage> {
        let options =
            FileOptions { direct: self.direct, lock: self.lock_mode(false), ..FileOptions::default() };
        FileStorage::open_leased(path, options, self.leases.as_ref())
    }

    /// Opens an image on a storage. Relative names in its header are relative to the directory of `path`.
    pub fn open_storage(&self, storage: Arc<dyn Storage>, path: impl AsRef<Path>) -> Result<Disk> {
        self.disk_over(self.open_chain(storage, path.as_ref())?)
    }

    fn disk_over(&self, layers: Vec<Arc<dyn Layer>>) -> Result<Disk> {
        let mut disk = Disk::from_layers(layers, self.read_only)?;
        if let Some(inner) = Arc::get_mut(&mut disk.0) {
            inner.options = self.clone();
        }
        Ok(disk)
    }

    fn lock_mode(&self, read_only: bool) -> LockMode {
        match self.lock {
            Some(LockMode::None) => LockMode::None,
            Some(mode) if !read_only => mode,
            _ if read_only => LockMode::Read,
            _ => LockMode::Write,
        }
    }

    fn open_chain(&self, storage: Arc<dyn Storage>, path: &Path) -> Result<Vec<Arc<dyn Layer>>> {
        let mut seen: Vec<FileId> = storage.file_id().into_iter().collect();
        let top = self.open_layer(self.format, storage, path, self.read_only)?;
        if !self.backing && !self.read_only && top.backing().is_some() {
            return Err(Error::InvalidOption("Writing needs the whole backing chain".into()));
        }
        let mut layers = vec![top];
        let mut referrer = path.to_owned();
        while self.backing
            && let Some(backing) = layers[layers.len() - 1].backing()
        {
            let name = layers[layers.len() - 1].storage().name();
            if layers.len() >= MAX_DEPTH {
                return Err(Error::unsupported(name, format!("a chain of more than {MAX_DEPTH} images")));
            }
            let (layer, at) = self.open_backing(&name, &backing, &referrer)?;
            if let Some(id) = layer.storage().file_id() {
                if seen.contains(&id) {
                    return Err(Error::corrupt(name, "its backing chain is a loop"));
                }
                seen.push(id);
            }
            match layers[layers.len() - 1].check_parent(&*layer) {
                Err(Error::ParentChanged { parent, .. }) if self.changed_parents || self.repair => {
                    tracing::warn!(parent, child = name, "A parent changed since its child was made");
                }
                result => result?,
            }
            layers.push(layer);
            referrer = at;
        }
        Ok(layers)
    }

    fn open_backing(
        &self,
        name: &str,
        backing: &BackingRef,
        referrer: &Path,
    ) -> Result<(Arc<dyn Layer>, PathBuf)> {
        let path = resolve(name, &backing.path, referrer)?;
        let Some(format) = &backing.format else {
            return Err(Error::unsupported(name, "a backing file without a format; set one with a rebase"));
        };
        let format: Format = format.parse()?;
        let storage = self.open_named(&path, referrer, Role::Backing, true)?;
        let (id, modified) = (storage.file_id(), storage.modified());
        let open = || self.open_layer(format, storage, &path, true);
        let layer = match (&self.registry, id) {
            (Some(registry), Some(id)) => registry.share(id, format, modified, open)?,
            _ => open()?,
        };
        Ok((layer, path))
    }

    /// Opens a file that a header names.
    fn open_named(
        &self,
        path: &Path,
        referrer: &Path,
        role: Role,
        read_only: bool,
    ) -> Result<Arc<dyn Storage>> {
        let file = self.policy.open(path, referrer, role, read_only, self.direct)?;
        let lock = self.lock_mode(read_only);
        let options = FileOptions { read_only, direct: self.direct, lock, create: false };
        Ok(Arc::new(FileStorage::from_file(file, path, options, self.leases.as_ref())?))
    }

    /// Opens one layer, with its external data file if it has one.
    pub(crate) fn open_layer(
        &self,
        format: Format,
        storage: Arc<dyn Storage>,
        path: &Path,
        read_only: bool,
    ) -> Result<Arc<dyn Layer>> {
        let data_file = match data_file_name(format, &storage)? {
            None => None,
            Some(name) => {
                let data = resolve(&storage.name(), &name, path)?;
                Some(self.open_named(&data, path, Role::Data, read_only)?)
            }
        };
        let secrets = self.secrets.clone();
        open_layer(format, storage, &LayerOptions { read_only, repair: self.repair, data_file, secrets })
    }

    /// A writable disk over the layers of another one; what is written goes to a file that has no name.
    fn over_temporary_layer(&self, disk: &Disk, directory: &Path) -> Result<Disk> {
        let storage: Arc<dyn Storage> = Arc::new(FileStorage::temporary(directory)?);
        let mut create =
            CreateOptions::new(Format::Qcow2, disk.size()).qcow2(Qcow2Options::default().overlay());
        let mut options = LayerOptions::default();
        if !self.secrets.is_empty() {
            // What is read from an encrypted disk and written back does not become plain text.
            let secret = Secret::random()?;
            create.qcow2.encryption = Some(LuksOptions { iter_time_ms: 1, ..LuksOptions::default() });
            create.secret = Some(secret.clone());
            options.secrets = vec![secret];
        }
        create.create_on(storage.clone())?;
        let mut layers = vec![open_layer(Format::Qcow2, storage, &options)?];
        layers.extend(disk.layers());
        OpenOptions { read_only: false, ..self.clone() }.disk_over(layers)
    }
}

/// What readers of a header may take for a protocol in front of a name.
fn protocol(name: &str) -> Option<&str> {
    name.split_once(':').map(|(protocol, _)| protocol).filter(|protocol| !protocol.contains('/'))
}

/// A path as headers name it, with `./` in front where readers would take its start for a protocol.
pub fn as_path(path: String) -> String {
    if protocol(&path).is_some() { format!("./{path}") } else { path }
}

/// The path of a file that the header of `referrer` names.
pub(crate) fn resolve(image: &str, name: &str, referrer: &Path) -> Result<PathBuf> {
    let name = name.strip_prefix("file:").unwrap_or(name);
    if let Some(protocol) = protocol(name)
        && protocol.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b))
    {
        return Err(Error::unsupported(image, format!("the protocol {protocol:?} of {name:?}")));
    }
    Ok(referrer.parent().unwrap_or(Path::new("")).join(name))
}

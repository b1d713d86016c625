//! Which files an image header may make us open.

use crate::{Error, Result};
use std::fmt;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why a file is to be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// As the parent of another image.
    Backing,
    /// As the external data file of an image.
    Data,
}

/// A file that an image header names.
#[derive(Clone, Debug)]
pub struct OpenRequest {
    /// The file, after resolution of symbolic links.
    pub path: PathBuf,
    /// The image that names it, after resolution of symbolic links.
    pub referrer: PathBuf,
    /// What for.
    pub role: Role,
    /// Whether it is a block device.
    pub block_device: bool,
}

type Callback = dyn Fn(&OpenRequest) -> bool + Send + Sync;

#[derive(Clone)]
enum Rule {
    SameDirectory,
    Allow(Vec<PathBuf>),
    Callback(Arc<Callback>),
}

/// Decides about files that image headers name. A guest that can write an image's header must not be able
/// to read the host's files through it.
#[derive(Clone)]
pub struct OpenPolicy(Vec<Rule>);

impl fmt::Debug for OpenPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rules = self.0.iter().map(|rule| match rule {
            Rule::SameDirectory => "same directory".to_owned(),
            Rule::Allow(paths) => format!("allow {paths:?}"),
            Rule::Callback(_) => "callback".to_owned(),
        });
        f.debug_list().entries(rules).finish()
    }
}

impl Default for OpenPolicy {
    /// Regular files in the directory of the image that names them.
    fn default() -> Self {
        Self::same_directory()
    }
}

impl OpenPolicy {
    /// No file at all.
    pub fn deny() -> Self {
        OpenPolicy(Vec::new())
    }

    /// Regular files in the directory of the image that names them (or below it).
    pub fn same_directory() -> Self {
        OpenPolicy(vec![Rule::SameDirectory])
    }

    /// Additionally the given files (devices too), and regular files below the given directories.
    pub fn allow(mut self, paths: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        let resolve = |p: PathBuf| p.canonicalize().unwrap_or(p);
        self.0.push(Rule::Allow(paths.into_iter().map(|p| resolve(p.into())).collect()));
        self
    }

    /// Additionally whatever the callback accepts.
    pub fn or_else(mut self, callback: impl Fn(&OpenRequest) -> bool + Send + Sync + 'static) -> Self {
        self.0.push(Rule::Callback(Arc::new(callback)));
        self
    }

    /// Any file. For tools that a person runs on images that this person trusts.
    pub fn trust_headers() -> Self {
        Self::deny().or_else(|_| true)
    }

    fn admits(&self, request: &OpenRequest) -> bool {
        let below = |dir: &Path| !request.block_device && request.path.starts_with(dir);
        self.0.iter().any(|rule| match rule {
            Rule::SameDirectory => request.referrer.parent().is_some_and(below),
            Rule::Allow(paths) => paths.iter().any(|p| *p == request.path || below(p)),
            Rule::Callback(f) => f(request),
        })
    }

    /// Opens `path` on behalf of the image `referrer`. The decision is about the very file that is opened:
    /// it is pinned first, judged by its real path, and then opened through the pin.
    pub(crate) fn open(
        &self,
        path: &Path,
        referrer: &Path,
        role: Role,
        read_only: bool,
        direct: bool,
    ) -> Result<File> {
        let fail = |e| Error::io("open", path.display().to_string(), e);
        let refuse = |reason| Error::NotAllowed { path: path.to_owned(), reason };
        let pin = File::options()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
            .open(path)
            .map_err(fail)?;
        let kind = pin.metadata().map_err(fail)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(refuse("it is neither a regular file nor a block device"));
        }
        let handle = PathBuf::from(format!("/proc/self/fd/{}", pin.as_raw_fd()));
        let request = OpenRequest {
            path: std::fs::read_link(&handle).map_err(fail)?,
            referrer: referrer.canonicalize().unwrap_or_else(|_| referrer.to_owned()),
            role,
            block_device: kind.is_block_device(),
        };
        if !self.admits(&request) {
            return Err(refuse("the image that names it may not open it"));
        }
        let flags = libc::O_CLOEXEC | if direct { libc::O_DIRECT } else { 0 };
        File::options().read(true).write(!read_only).custom_flags(flags).open(&handle).map_err(fail)
    }
}

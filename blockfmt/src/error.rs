//! The error type of the crate.

use crate::Layer;
use std::borrow::Cow;
use std::io;
use std::path::PathBuf;

/// The result of an operation on a disk.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation on a disk failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The storage below a format failed.
    #[error("Cannot {op} {name}")]
    Io {
        /// What was attempted, as a verb.
        op: &'static str,
        /// The storage.
        name: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A request lies beyond the end of the disk.
    #[error("The range of {len} bytes at {offset} is beyond the disk's end at {size}")]
    OutOfRange {
        /// First byte of the request.
        offset: u64,
        /// Length of the request in bytes.
        len: u64,
        /// Size of the disk in bytes.
        size: u64,
    },
    /// A write to a disk that was opened for reading.
    #[error("The disk is read-only")]
    ReadOnly,
    /// A file that does not begin, or end, as images of the format do.
    #[error("{name} is no {format} image; give the format that it has")]
    WrongFormat {
        /// The file.
        name: String,
        /// The format that it was opened as.
        format: &'static str,
    },
    /// A format, or a feature of it, that is not implemented.
    #[error("{name} uses an unsupported feature: {feature}")]
    Unsupported {
        /// The image.
        name: String,
        /// The feature, by its name in the format's specification.
        feature: String,
    },
    /// An image that contradicts itself or its specification.
    #[error("{name} is corrupt: {what}; run a check")]
    Corrupt {
        /// The image.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// The open policy refused a file that an image header names.
    #[error("The open policy refuses {}: {reason}", path.display())]
    NotAllowed {
        /// The file.
        path: PathBuf,
        /// Why it was refused.
        reason: &'static str,
    },
    /// Another process (or another open of this one) holds the image.
    #[error("{} is in use: its \"{permission}\" lock is held by another process", path.display())]
    Locked {
        /// The image.
        path: PathBuf,
        /// The permission that conflicts.
        permission: &'static str,
    },
    /// The cluster does not let this host use an image.
    #[error("The cluster grants no lease of {}", image.display())]
    NoLease {
        /// The image.
        image: PathBuf,
        /// What the cluster says.
        #[source]
        source: crate::storage::LeaseError,
    },
    /// Something else changes the chain of a disk, or copies the disk, at the moment.
    #[error("A job works on {0}; wait for its end or cancel it")]
    Busy(String),
    /// A queue has taken as many requests as it can.
    #[error("The queue is full; take its completions first")]
    QueueFull,
    /// An argument that makes no sense.
    #[error("Invalid option: {0}")]
    InvalidOption(String),
    /// A snapshot, bitmap or layer that does not exist.
    #[error("There is no {what} named {name:?}")]
    NotFound {
        /// What kind of thing was looked for.
        what: &'static str,
        /// The name that was looked for.
        name: String,
    },
    /// Something with this name exists already.
    #[error("A {what} named {name:?} exists already")]
    Exists {
        /// What kind of thing it is.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A job was cancelled.
    #[error("The job was cancelled")]
    Cancelled,
    /// The password opens no key slot.
    #[error("No key slot of {0} opens with this secret")]
    WrongSecret(String),
    /// An encrypted image was opened without a secret.
    #[error("{0} is encrypted; supply its secret")]
    SecretNeeded(String),
    /// A backing file changed behind its child.
    #[error("{parent} {what}; {remedy}")]
    ParentChanged {
        /// The backing file.
        parent: String,
        /// What is different, as the rest of a sentence about it.
        what: &'static str,
        /// What can be done.
        remedy: String,
    },
}

impl Error {
    /// Wraps an I/O error of the storage `name`.
    pub fn io(op: &'static str, name: impl Into<String>, source: io::Error) -> Self {
        Error::Io { op, name: name.into(), source }
    }

    /// An image that contradicts its specification.
    pub(crate) fn corrupt(name: impl Into<String>, what: impl Into<String>) -> Self {
        Error::Corrupt { name: name.into(), what: what.into() }
    }

    /// A parent that is not what `child` knows of it: it `what`.
    pub(crate) fn parent_changed(child: &dyn Layer, parent: &dyn Layer, what: &'static str) -> Self {
        let (child_name, name) = (child.storage().name(), parent.storage().name());
        let remedy = format!(
            "if its contents are right, accept it: nacre disk rebase -u -f {} -b {} -F {} {}",
            child.format(),
            quote(&name),
            parent.format(),
            quote(&child_name)
        );
        Error::ParentChanged { parent: name, what, remedy }
    }

    /// A file of another kind.
    pub(crate) fn wrong_format(name: impl Into<String>, format: &'static str) -> Self {
        Error::WrongFormat { name: name.into(), format }
    }

    /// A layer that does not exist.
    pub(crate) fn no_layer(index: usize) -> Self {
        Error::NotFound { what: "layer", name: index.to_string() }
    }

    /// A feature that is not implemented.
    pub(crate) fn unsupported(name: impl Into<String>, feature: impl Into<String>) -> Self {
        Error::Unsupported { name: name.into(), feature: feature.into() }
    }

    /// Whether the host ran out of space (`ENOSPC`, `EDQUOT`), so that a caller may pause and retry.
    pub fn is_no_space(&self) -> bool {
        matches!(self.errno(), libc::ENOSPC | libc::EDQUOT)
    }

    /// The `errno` value that describes this error best.
    pub fn errno(&self) -> i32 {
        match self {
            Error::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            Error::OutOfRange { .. } | Error::InvalidOption(_) | Error::WrongFormat { .. } => libc::EINVAL,
            Error::ReadOnly => libc::EROFS,
            Error::Unsupported { .. } => libc::ENOTSUP,
            Error::Corrupt { .. } | Error::ParentChanged { .. } => libc::EIO,
            Error::NotAllowed { .. } | Error::WrongSecret(_) | Error::SecretNeeded(_) => libc::EACCES,
            Error::Locked { .. } | Error::NoLease { .. } | Error::QueueFull => libc::EAGAIN,
            Error::Busy(_) => libc::EBUSY,
            Error::NotFound { .. } => libc::ENOENT,
            Error::Exists { .. } => libc::EEXIST,
            Error::Cancelled => libc::ECANCELED,
        }
    }
}

/// A name as a shell takes it for one word. Headers can name anything.
fn quote(name: &str) -> Cow<'_, str> {
    let plain = |c: char| c.is_alphanumeric() || "/._-+=:,@%".contains(c);
    match !name.is_empty() && name.chars().all(plain) {
        true => name.into(),
        false => format!("'{}'", name.replace('\'', r"'\''")).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_word_for_a_shell() {
        for (name, quoted) in
            [("a/b-1.qcow2", "a/b-1.qcow2"), ("", "''"), ("a b", "'a b'"), ("it's;$(x)", r"'it'\''s;$(x)'")]
        {
            assert_eq!(quote(name), quoted);
        }
    }
}

//! Errors of the switch's control operations.

use std::io;
use std::path::PathBuf;

/// Why a control operation failed. The data path never fails: it counts drops.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No port has this number or name.
    #[error("No such port: {0}; list the ports to see which exist")]
    NoSuchPort(String),
    /// The number or name is in use.
    #[error("Port {0} exists already; choose another name or number")]
    PortExists(String),
    /// All port numbers are taken.
    #[error("The switch has no free port number; remove a port first")]
    TooManyPorts,
    /// A value in the configuration is wrong; `path` names the field.
    #[error("Wrong value at {path}: {reason}")]
    Config {
        /// The field, in dotted notation with indices: `ports[2].vlan.access`.
        path: String,
        /// What is wrong and what is accepted.
        reason: String,
    },
    /// A system call failed.
    #[error("Cannot {what}; check that the resource exists and that permissions suffice")]
    Io {
        /// What was attempted.
        what: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A socket path is in use by a living process.
    #[error("Socket {0} is served by another process; stop it or choose another path")]
    SocketInUse(PathBuf),
    /// The request contradicts a limit or the present state.
    #[error("{0}")]
    Invalid(String),
}

impl Error {
    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io { what: what.into(), source }
    }

    pub(crate) fn config(path: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Config { path: path.into(), reason: reason.into() }
    }
}

/// Result of a control operation.
pub type Result<T> = std::result::Result<T, Error>;

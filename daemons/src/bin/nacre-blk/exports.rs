//! The disks that are exported.

use anyhow::{Context, Result};
use blockfmt::nbd::{Export, ExportInfo, Server};
use blockfmt::{Disk, Format, OpenOptions};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

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
    /// Names of the image's dirty bitmaps that clients may read.
    #[serde(default)]
    pub bitmaps: Vec<String>,
}

impl FromStr for ExportSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut name, mut path, mut format, mut readonly) = (None, None, None, false);
        let mut bitmaps = Vec::new();
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("name", value)) => name = Some(value.to_owned()),
                Some(("path", value)) => path = Some(PathBuf::from(value)),
                Some(("format", value)) => format = Some(value.to_owned()),
                Some(("bitmap", value)) => bitmaps.push(value.to_owned()),
                None if part == "readonly" => readonly = true,
                _ => return Err(format!("{part:?} is none of name=, path=, format=, bitmap= and readonly")),
            }
        }
        let missing = |what: &str| format!("{what}= is missing");
        Ok(ExportSpec {
            name: name.ok_or_else(|| missing("name"))?,
            path: path.ok_or_else(|| missing("path"))?,
            format: format.ok_or_else(|| missing("format"))?,
            readonly,
            bitmaps,
        })
    }
}

/// The server and its disks. Clones are handles to the same.
#[derive(Clone)]
pub struct Exports {
    server: Arc<Server>,
    disks: Arc<Mutex<BTreeMap<String, Disk>>>,
}

impl Exports {
    pub fn new() -> Self {
        Exports { server: Arc::new(Server::new()), disks: Arc::default() }
    }

    pub fn server(&self) -> &Server {
        &self.server
    }

    /// Opens a disk and exports it.
    pub fn add(&self, spec: &ExportSpec) -> Result<()> {
        let format: Format = spec.format.parse()?;
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        let disk = OpenOptions::new(format).read_only(spec.readonly).open(&spec.path);
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
        disks.insert(spec.name.clone(), disk);
        Ok(())
    }

    /// Disconnects the clients of an export and closes its disk.
    pub fn remove(&self, name: &str) -> Result<()> {
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        let removed = self.server.remove_export(name);
        if let Some(disk) = disks.remove(name) {
            disk.close()?;
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

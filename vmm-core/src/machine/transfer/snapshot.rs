//! A machine in a file.

use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::super::build::{Known, write_generation_id};
use super::super::{StopReason, Vm, VmBuilder, VmError};
use super::RestoreOptions;
use crate::acpi::GENERATION_ID_GPE;
use crate::migration::memory::{self, PageSet};
use crate::migration::{MigrationError, Record, StreamError, StreamReader, StreamWriter};

/// What becomes of a machine that was saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterSnapshot {
    /// It goes on as before.
    Resume,
    /// It stays paused, so that its disks can be copied as they were.
    StayPaused,
    /// It stops, with [`StopReason::Stopped`].
    Stop,
}

/// What a snapshot took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotReport {
    /// Size of the file in bytes.
    pub bytes: u64,
    /// How long the guest was paused, or until it was saved if it still is.
    pub paused: Duration,
}

impl Vm {
    /// Saves memory and state into a file that only its owner may read; one that is there is replaced once all is written.
    ///
    /// Disks are not part of it: their caches are written back, and who restores the machine has to give it disks with
    /// the contents that they have now.
    ///
    /// # Errors
    /// Fails when the machine has stopped or has devices whose state cannot be saved, or the file cannot be written. The
    /// machine goes on then as before.
    pub fn snapshot(&self, path: &Path, after: AfterSnapshot) -> Result<SnapshotReport, VmError> {
        let _one = self.moving.try_lock().ok_or(MigrationError::Busy)?;
        let _serial = self.lifecycle.lock();
        let description = self.description()?;
        let start = Instant::now();
        let running = self.quiesce()?;
        let written = self.write_snapshot(path, &Record::Description(Box::new(description)), running);
        match (after, &written) {
            (AfterSnapshot::Resume, _) | (_, Err(_)) => self.unquiesce(running)?,
            (AfterSnapshot::StayPaused, Ok(_)) => {}
            (AfterSnapshot::Stop, Ok(_)) => self.control.stop(StopReason::Stopped),
        }
        Ok(SnapshotReport { bytes: written?, paused: start.elapsed() })
    }

    fn write_snapshot(&self, path: &Path, description: &Record<'_>, running: bool) -> Result<u64, VmError> {
        self.devices.disks.iter().try_for_each(|disk| disk.flush_image())?;
        let state = self.save_state(running)?;
        let partial = Partial::create(path)?;
        let mut writer = StreamWriter::new(&partial.file)?;
        writer.write(description)?;
        let mut go_on = |_| Ok::<(), StreamError>(());
        memory::send(&self.memory, &PageSet::written(&self.memory), false, &mut writer, &mut go_on)?;
        writer.write(&Record::State(Box::new(state)))?;
        writer.write(&Record::End)?;
        let bytes = writer.written();
        partial.finish()?;
        Ok(bytes)
    }
}

/// A file beside the one that it becomes; dropping it removes it.
struct Partial<'a> {
    file: File,
    partial: PathBuf,
    path: &'a Path,
    done: bool,
}

impl<'a> Partial<'a> {
    fn create(path: &'a Path) -> Result<Self, VmError> {
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        // It holds all secrets of the guest.
        let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&partial);
        let file = file.map_err(|source| VmError::Snapshot { path: path.to_owned(), source })?;
        Ok(Self { file, partial, path, done: false })
    }

    fn finish(mut self) -> Result<(), VmError> {
        let moved = self.file.sync_all().and_then(|()| std::fs::rename(&self.partial, self.path));
        moved.map_err(|source| VmError::Snapshot { path: self.path.to_owned(), source })?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Partial<'_> {
    fn drop(&mut self) {
        if !self.done {
            // It may never have been made.
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

impl VmBuilder {
    /// Builds the machine and loads what [`Vm::snapshot`] saved; [`Vm::start`] lets it go on.
    ///
    /// The configuration must describe the same machine: as many vCPUs, as much RAM, the same devices in the same order.
    /// The kernel is not needed. Files and addresses of the host may be others. The guest learns through its VM generation
    /// ID that it may not be the only one that goes on from there.
    ///
    /// # Errors
    /// As [`VmBuilder::build`], and when the file is none of a saved machine, is damaged, or does not fit.
    pub fn restore(self, path: &Path, options: &RestoreOptions) -> Result<Vm, VmError> {
        let file = File::open(path).map_err(|source| VmError::Snapshot { path: path.to_owned(), source })?;
        self.restore_from(BufReader::new(file), options)
    }

    /// As [`VmBuilder::restore`], from bytes that come from anywhere.
    ///
    /// # Errors
    /// As [`VmBuilder::restore`].
    pub fn restore_from(self, input: impl Read, options: &RestoreOptions) -> Result<Vm, VmError> {
        let mut reader = StreamReader::new(input)?;
        let out_of_order = || StreamError::Malformed("its parts are not in order".into());
        let Record::Description(description) = reader.read()? else { return Err(out_of_order().into()) };
        let tsc_khz = description.profile.tsc_khz;
        let known = Known { description: &description, tsc_khz: options.check_processors.then_some(tsc_khz) };
        let vm = self.build_for(Some(known))?;
        vm.check_fits(&description, options)?;
        let state = loop {
            match reader.read()? {
                Record::State(state) => break state,
                // New memory holds zeros; looking at it again and again would take long.
                Record::Zeros(_) => return Err(out_of_order().into()),
                record if memory::load(&vm.memory, &record)? => {}
                _ => return Err(out_of_order().into()),
            }
        };
        if reader.read()? != Record::End || reader.get_mut().read(&mut [0]).map_err(StreamError::from)? != 0 {
            return Err(out_of_order().into());
        }
        vm.load_state(&state, tsc_khz)?;
        vm.open_disks()?;
        write_generation_id(&vm.memory, vm.devices.generation_id)?;
        vm.devices.pm.raise_gpe(GENERATION_ID_GPE);
        Ok(vm)
    }
}

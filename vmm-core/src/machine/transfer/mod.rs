//! Saving a machine, loading it, and moving it while it runs.

mod link;
mod snapshot;
mod source;
mod target;
mod throttle;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

pub use self::snapshot::{AfterSnapshot, SnapshotReport};
use super::{Vm, VmError};
use crate::accel::{AccelError, CpuState, Vcpu};
use crate::lifecycle::LifecycleError;
use crate::migration::{Description, MachineState, VcpuState};

/// How a machine that was saved, or that comes from elsewhere, is taken.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// Refuse a guest that knows processor features, or a frequency of the time-stamp counter, that are not to be had
    /// here. Without the check such a guest may crash or lose its sense of time.
    pub check_processors: bool,
    /// How long the source of a live migration may be silent.
    pub timeout: Duration,
}

impl Default for RestoreOptions {
    fn default() -> Self {
        Self { check_processors: true, timeout: Duration::from_secs(30) }
    }
}

impl Vm {
    /// Whether the guest runs.
    pub fn is_running(&self) -> bool {
        self.control.is_running()
    }

    /// Runs `f` with each vCPU on its thread. The machine is paused.
    fn each_vcpu<R: Send + 'static>(
        &self,
        mut f: impl FnMut(usize) -> Box<dyn FnOnce(&mut dyn Vcpu) -> Result<R, AccelError> + Send>,
    ) -> Result<Vec<R>, VmError> {
        let count = self.cpus as usize;
        (0..count).map(|id| Ok(self.control.with_vcpu(id as u32, f(id)).ok_or(VmError::Stopped)??)).collect()
    }

    /// What this machine is. The caller holds the lock of the machine's lifecycle.
    fn description(&self) -> Result<Description, VmError> {
        if let Some(why) = self.devices.unsaved {
            return Err(VmError::CannotSave(why.into()));
        }
        // Only a vCPU that waits can be asked.
        let running = self.control.is_running();
        if running && !self.control.pause() {
            return Err(VmError::Stopped);
        }
        let profile = self.control.with_vcpu(0, |vcpu| vcpu.profile());
        if running && !self.control.run() {
            return Err(VmError::Stopped);
        }
        let profile = profile.ok_or(VmError::Stopped)??;
        Ok(Description {
            accelerator: self.kind,
            cpus: self.cpus,
            profile,
            memory: Description::regions(&self.memory),
            disks: self.devices.disks.iter().map(|disk| disk.shape()).collect(),
            macs: self.devices.macs.clone(),
        })
    }

    /// Stops the vCPUs and devices; returns whether the guest ran.
    fn quiesce(&self) -> Result<bool, VmError> {
        let running = self.control.is_running();
        if !self.control.pause() {
            return Err(VmError::Stopped);
        }
        if let Err(error) = self.pause_units() {
            self.unquiesce(running)?;
            return Err(error.into());
        }
        Ok(running)
    }

    /// Undoes [`Self::quiesce`].
    fn unquiesce(&self, running: bool) -> Result<(), VmError> {
        if running {
            self.start_units()?;
            if !self.control.run() {
                return Err(VmError::Stopped);
            }
        }
        Ok(())
    }

    /// The state of a machine that is quiet.
    ///
    /// Devices and the chipset come before the vCPUs: an interrupt of the timer that comes in between is then there twice
    /// rather than not at all.
    fn save_state(&self, running: bool) -> Result<MachineState, VmError> {
        let mut devices = BTreeMap::new();
        for unit in &self.devices.units {
            devices.insert(unit.name.clone(), unit.lifecycle.save()?);
        }
        let chipset = self.accel.chipset_state()?;
        let start = Instant::now();
        let cpus = self.each_vcpu(|_| {
            Box::new(move |vcpu| {
                let read_after = start.elapsed().as_nanos() as u64;
                Ok(VcpuState { registers: vcpu.state()?, extra: vcpu.extra_state()?, read_after })
            })
        })?;
        Ok(MachineState { running, cpus, chipset, devices })
    }

    /// Loads the state of a machine with the same description into this one, which never ran.
    ///
    /// vCPUs come before the chipset, whose interrupts they take, and the chipset before devices, which drive its lines.
    fn load_state(&self, state: &MachineState, tsc_khz: u32) -> Result<(), VmError> {
        let other = |what: &str| LifecycleError::State(what.into());
        if state.cpus.len() != self.cpus as usize {
            return Err(other("its vCPUs are others").into());
        }
        if !state.devices.keys().eq(self.names().keys()) {
            return Err(other("its devices are others").into());
        }
        let start = Instant::now();
        let first = state.cpus.first().map_or(0, |cpu| cpu.read_after);
        self.each_vcpu(|id| {
            let cpu = state.cpus[id].clone();
            Box::new(move |vcpu| {
                // Counters that agreed when the vCPUs were read one after the other agree again.
                let passed = start.elapsed().as_nanos() as i128
                    - i128::from(cpu.read_after - first.min(cpu.read_after));
                let ticks = passed * i128::from(tsc_khz) / 1_000_000;
                let tsc = cpu.registers.tsc.wrapping_add(ticks as u64);
                vcpu.set_state(&CpuState { tsc, ..cpu.registers })?;
                vcpu.set_extra_state(&cpu.extra)
            })
        })?;
        self.accel.set_chipset_state(&state.chipset)?;
        for (name, index) in self.names() {
            self.devices.units[index].lifecycle.restore(&state.devices[&name])?;
        }
        Ok(())
    }

    /// The devices' names, and where they are.
    fn names(&self) -> BTreeMap<String, usize> {
        self.devices.units.iter().enumerate().map(|(index, unit)| (unit.name.clone(), index)).collect()
    }

    /// Opens all disks that are closed; if one cannot be opened, all are closed.
    pub(super) fn open_disks(&self) -> Result<(), VmError> {
        let opened = self.devices.disks.iter().try_for_each(|disk| disk.open());
        if opened.is_err() {
            for disk in &self.devices.disks {
                // They were opened a moment ago and have nothing to write back.
                let _ = disk.close();
            }
        }
        opened
    }

    fn close_disks(&self) -> Result<(), VmError> {
        self.devices.disks.iter().try_for_each(|disk| disk.close())
    }

    /// Refuses a guest that cannot go on in this machine.
    fn check_fits(&self, theirs: &Description, options: &RestoreOptions) -> Result<(), VmError> {
        let own = self.description()?;
        theirs.mismatch(&own, options.check_processors).map_or(Ok(()), |why| Err(VmError::Incompatible(why)))
    }
}

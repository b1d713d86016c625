//! The side of a live migration that a machine comes to.

use super::super::build::Known;
use super::super::{Vm, VmBuilder, VmError};
use super::RestoreOptions;
use super::link::{Link, Step};
use crate::migration::memory;
use crate::migration::{Channel, MigrationError, Record};

impl VmBuilder {
    /// Builds the machine, takes memory and state from [`Vm::migrate`] at the other end of `channel`, and runs it when the
    /// source has given it up. It is left paused if it was there, or if it is parked: [`Vm::start`] opens its disks and lets
    /// it go on.
    ///
    /// The configuration must describe the same machine as for [`VmBuilder::restore`]; its disks are opened when the source
    /// has closed them. Nothing is left behind when it fails.
    ///
    /// # Errors
    /// As [`VmBuilder::restore`], and when the source gives up or is silent.
    pub fn receive<C: Channel>(self, channel: C, options: &RestoreOptions) -> Result<Vm, VmError> {
        let mut link = Link::new(channel, options.timeout)?;
        receive(self, &mut link, options).inspect_err(|error| link.refuse(error))
    }
}

fn receive<C: Channel>(
    builder: VmBuilder,
    link: &mut Link<C>,
    options: &RestoreOptions,
) -> Result<Vm, VmError> {
    let description = match link.read()? {
        Record::Description(description) => description,
        Record::Refused(why) => return Err(MigrationError::Refused(why).into()),
        _ => return Err(MigrationError::Protocol.into()),
    };
    let tsc_khz = description.profile.tsc_khz;
    let known = Known { description: &description, tsc_khz: options.check_processors.then_some(tsc_khz) };
    let vm = builder.build_for(Some(known))?;
    vm.check_fits(&description, options)?;
    link.writer.write(&Record::Ready)?;
    let mut state = None;
    let park = loop {
        match link.read()? {
            Record::State(loaded) => state = Some(loaded),
            end @ (Record::End | Record::Park) => break end == Record::Park,
            Record::Refused(why) => return Err(MigrationError::Refused(why).into()),
            record if memory::load(&vm.memory, &record)? => {}
            _ => return Err(MigrationError::Protocol.into()),
        }
    };
    let state = state.ok_or(MigrationError::Protocol)?;
    vm.load_state(&state, tsc_khz)?;
    if park {
        link.writer.write(&Record::Prepared)?;
        return Ok(vm);
    }
    vm.open_disks()?;
    link.writer.write(&Record::Prepared)?;
    // Before this the source may go on; after it, nobody else does.
    link.expect(Step::Run)?;
    if state.running {
        vm.start()?;
    }
    // The source learns it from the locks of the disks, too.
    if let Err(error) = link.writer.write(&Record::Running) {
        tracing::warn!(%error, "The source of the migration was not told that the machine runs");
    }
    Ok(vm)
}

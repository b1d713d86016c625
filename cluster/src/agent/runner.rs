//! How an agent runs VMs: a trait, since this crate knows nothing of how a VM runs.

use std::sync::mpsc::Sender;

use super::drive::Input;
use crate::ha::Signs;
use crate::node::{NodeInput, VmAction, VmEvent};
use crate::types::{Resources, VmId};

/// Runs the VMs of a host. No call may block for long; outcomes are told through [`VmEvents`].
///
/// Contract: a VM's disks are opened only by [`VmAction::Start`] and [`VmAction::Resume`], and
/// [`VmEvent::Exited`] is told only once nothing of the VM can write any more. Dropping the runner kills what
/// it runs.
pub trait VmRunner: Send {
    /// Does something with a VM. What cannot be done is told as an event: a failed start or a killed VM as
    /// [`VmEvent::Exited`], a failed move as [`VmEvent::MoveFailed`].
    fn act(&mut self, vm: VmId, epoch: u64, action: VmAction);

    /// What each VM used since the last call: MHz on average, and MiB.
    fn usage(&mut self) -> Vec<(VmId, Resources)>;

    /// What each VM's process shows of its guest, with the VM's placement. VMs that are not named are not judged.
    fn signs(&mut self) -> Vec<(VmId, u64, Signs)> {
        Vec::new()
    }

    /// Resets the host at once, or ends everything on it that could write.
    fn reset(&mut self);
}

/// Tells the agent what happened to a VM; clones may be handed to threads.
#[derive(Clone, Debug)]
pub struct VmEvents {
    pub(super) inputs: Sender<Input>,
}

impl VmEvents {
    /// Tells what happened to the placement `epoch` of a VM; `why` goes to the journal.
    pub fn tell(&self, vm: VmId, epoch: u64, event: VmEvent, why: Option<String>) {
        // An agent that has ended does not want to know.
        let _ = self.inputs.send(Input::Vm { input: NodeInput::Vm { vm, epoch, event }, vm, why });
    }
}

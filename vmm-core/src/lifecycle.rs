//! The one lifecycle that every stateful part of a virtual machine follows.
//!
//! Order: the machine *starts* back-ends before vCPUs run. It *pauses* vCPUs first, then devices: a paused device has
//! no request in flight and touches neither guest memory nor its back-end. State is *saved* and *restored* only while
//! paused. *Reset* returns a device to its power-on state, also while paused.

/// A failure in a lifecycle step of one device.
#[derive(Debug, thiserror::Error)]
pub enum LifecycleError {
    /// The device's back-end failed.
    #[error("Device back-end failed")]
    Backend(#[source] std::io::Error),
    /// The saved state cannot be loaded by this version or into this configuration.
    #[error("Saved state does not fit this device: {0}")]
    State(String),
}

/// The lifecycle of a device. All calls come from the machine's control thread.
pub trait Lifecycle: Send + Sync {
    /// Begins or resumes work after construction, restore or pause.
    ///
    /// # Errors
    /// Fails when the back-end cannot be started.
    fn start(&self) -> Result<(), LifecycleError> {
        Ok(())
    }

    /// Completes or quiesces everything in flight and stops touching guest memory.
    ///
    /// # Errors
    /// Fails when what was in flight cannot be completed.
    fn pause(&self) -> Result<(), LifecycleError> {
        Ok(())
    }

    /// Returns to the power-on state.
    fn reset(&self) {}

    /// The state as a self-describing value; only while paused.
    ///
    /// # Errors
    /// Fails when the device cannot describe its state.
    fn save(&self) -> Result<serde_json::Value, LifecycleError> {
        Ok(serde_json::Value::Null)
    }

    /// Loads what [`Lifecycle::save`] returned; only while paused.
    ///
    /// # Errors
    /// Fails when the state is malformed or belongs to another configuration.
    fn restore(&self, _state: &serde_json::Value) -> Result<(), LifecycleError> {
        Ok(())
    }
}

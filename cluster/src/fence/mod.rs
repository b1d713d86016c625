//! Making sure that a host that may still write does not: fencing others, and stopping oneself.

mod fencer;
mod monitor;

pub use fencer::{
    AgentFailed, AgentReply, DeviceId, Evidence, FenceAction, FenceConfig, FenceInput, FenceOutput, Fencer,
};
pub use monitor::{LocalMonitor, MonitorConfig, MonitorInput, MonitorOutput, VolumeUse};

//! `nacre schema`.

use std::process::ExitCode;

pub fn print() -> anyhow::Result<ExitCode> {
    let text = serde_json::to_string_pretty(&vmm_core::machine::VmConfig::schema())?;
    daemons::outln!("{text}");
    Ok(ExitCode::SUCCESS)
}

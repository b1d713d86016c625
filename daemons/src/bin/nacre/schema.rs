//! `nacre schema`.

use std::io::Write;
use std::process::ExitCode;

pub fn print() -> anyhow::Result<ExitCode> {
    let text = serde_json::to_string_pretty(&vmm_core::machine::VmConfig::schema())?;
    writeln!(std::io::stdout(), "{text}")?;
    Ok(ExitCode::SUCCESS)
}

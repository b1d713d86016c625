//! Tests with whole programs, all executed by the interpreter.

#![expect(clippy::unwrap_used, reason = "what fails in a helper fails the test")]

#[path = "system/mod.rs"]
mod system;

/// See [`softcpu::CpuConfig::translate_after`].
const TRANSLATE_AFTER: Option<u32> = None;

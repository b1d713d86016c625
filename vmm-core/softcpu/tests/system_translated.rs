//! The same tests with all 64-bit code translated before it is first executed, and those of translation itself.

#![cfg(feature = "native")]
#![expect(clippy::unwrap_used, reason = "what fails in a helper fails the test")]

#[path = "system/mod.rs"]
mod system;
mod translation;

/// See [`softcpu::CpuConfig::translate_after`].
const TRANSLATE_AFTER: Option<u32> = Some(0);

//! Kernel and firmware loaders.

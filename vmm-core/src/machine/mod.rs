//! Composes accelerator, memory, devices and boot into a running virtual machine.

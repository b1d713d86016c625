//! A virtual machine: accelerators, guest memory, boot, devices and lifecycle.

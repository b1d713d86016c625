//! The chipset: serial port, real-time clock, keyboard-controller reset, power management.

//! The software CPU with local APIC, IO-APIC, PIC and timers in software.

//! PCI: configuration space, base address registers, MSI-X, ECAM and the 0xCF8 ports.

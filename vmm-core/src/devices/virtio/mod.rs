//! virtio 1.2 devices and their transports.

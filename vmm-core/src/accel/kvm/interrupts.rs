//! Wired and message-signalled interrupts: KVM's GSI routing table, irqfds and direct MSIs.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_IRQ_ROUTES, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_msi,
};
use parking_lot::Mutex;

use super::sys;
use super::vm::Shared;
use crate::accel::{AccelError, IOAPIC_PINS};
use crate::interrupt::{IrqLine, Msi, MsiVector};

/// The GSIs above the wired ones; each may have a message.
#[derive(Default)]
pub struct MsiRoutes {
    slots: Vec<Slot>,
}

#[derive(Clone, Copy, Default)]
struct Slot {
    used: bool,
    message: Option<Msi>,
}

fn wired_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } },
        ..Default::default()
    }
}

impl MsiRoutes {
    fn add(&mut self) -> Option<u32> {
        let free = self.slots.iter().position(|s| !s.used).unwrap_or(self.slots.len());
        // A wired input below 16 takes two routes.
        if free + IOAPIC_PINS as usize + 16 >= KVM_MAX_IRQ_ROUTES {
            return None;
        }
        self.slots.resize(self.slots.len().max(free + 1), Slot::default());
        self.slots[free].used = true;
        Some(IOAPIC_PINS + free as u32)
    }

    fn slot(&mut self, gsi: u32) -> &mut Slot {
        &mut self.slots[(gsi - IOAPIC_PINS) as usize]
    }

    /// The table as the kernel takes it: it always replaces the whole.
    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let mut entries = Vec::with_capacity(40 + self.slots.len());
        for gsi in 0..IOAPIC_PINS {
            match gsi {
                0..8 => entries.push(wired_entry(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
                8..16 => entries.push(wired_entry(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
                _ => {}
            }
            entries.push(wired_entry(gsi, KVM_IRQCHIP_IOAPIC, gsi));
        }
        for (index, slot) in self.slots.iter().enumerate() {
            let Some(message) = slot.message else { continue };
            entries.push(kvm_irq_routing_entry {
                gsi: IOAPIC_PINS + index as u32,
                type_: KVM_IRQ_ROUTING_MSI,
                u: kvm_irq_routing_entry__bindgen_ty_1 {
                    msi: kvm_irq_routing_msi {
                        address_lo: message.address as u32,
                        address_hi: (message.address >> 32) as u32,
                        data: message.data,
                        ..Default::default()
                    },
                },
                ..Default::default()
            });
        }
        entries
    }

    fn publish(&self, vm: &Shared) -> io::Result<()> {
        let table = KvmIrqRouting::from_entries(&self.entries()).map_err(|_| io::ErrorKind::OutOfMemory)?;
        Ok(vm.fd.set_gsi_routing(&table)?)
    }
}

/// A wired input of the in-kernel interrupt controllers.
pub struct Line {
    vm: Arc<Shared>,
    gsi: u32,
}

impl Line {
    pub fn new(vm: Arc<Shared>, gsi: u32) -> Self {
        Self { vm, gsi }
    }
}

impl IrqLine for Line {
    fn set_level(&self, asserted: bool) {
        if let Err(error) = self.vm.fd.set_irq_line(self.gsi, asserted) {
            // The GSI was checked; only a VM that is being torn down refuses.
            tracing::warn!(gsi = self.gsi, %error, "interrupt line not driven");
        }
    }
}

/// Sends one message to the local APICs.
pub fn send(vm: &Shared, message: Msi) -> Result<(), AccelError> {
    let request = kvm_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    // 0 means that the guest had the interrupt blocked (a disabled APIC, for instance): nothing is wrong with us.
    vm.fd.signal_msi(request).map(drop).map_err(super::failed("KVM_SIGNAL_MSI"))
}

/// A vector of a device. A route and an irqfd are made only when somebody asks for the descriptor.
pub struct Vector {
    vm: Arc<Shared>,
    state: Mutex<VectorState>,
}

#[derive(Default)]
struct VectorState {
    message: Option<Msi>,
    route: Option<Route>,
}

/// The descriptor, and the GSI that it is tied to while the vector is not masked.
struct Route {
    event: OwnedFd,
    gsi: u32,
    connected: bool,
}

impl Vector {
    pub fn new(vm: Arc<Shared>) -> Self {
        Self { vm, state: Mutex::new(VectorState::default()) }
    }

    fn connect(vm: &Shared, route: &mut Route, message: Option<Msi>) -> io::Result<()> {
        if message.is_none() && route.connected {
            // Writes while masked accumulate in the descriptor and fire when it is connected again.
            sys::irqfd(&vm.fd, route.event.as_fd(), route.gsi, true)?;
            route.connected = false;
        }
        if message.is_some() {
            let mut routes = vm.routes.lock();
            let slot = routes.slot(route.gsi);
            if slot.message != message {
                slot.message = message;
                routes.publish(vm)?;
            }
            drop(routes);
            if !route.connected {
                sys::irqfd(&vm.fd, route.event.as_fd(), route.gsi, false)?;
                route.connected = true;
            }
        }
        Ok(())
    }
}

impl MsiVector for Vector {
    fn set_message(&self, message: Option<Msi>) {
        let mut state = self.state.lock();
        state.message = message;
        if let Some(route) = &mut state.route
            && let Err(error) = Self::connect(&self.vm, route, message)
        {
            tracing::warn!(gsi = route.gsi, %error, "interrupt route not changed");
        }
    }

    fn trigger(&self) {
        let message = self.state.lock().message;
        if let Some(message) = message
            && let Err(error) = send(&self.vm, message)
        {
            // The guest chose an address that is no local APIC.
            tracing::debug!(%error, ?message, "message-signalled interrupt dropped");
        }
    }

    fn event_fd(&self) -> io::Result<OwnedFd> {
        let mut state = self.state.lock();
        let message = state.message;
        if state.route.is_none() {
            let event = sys::event()?;
            let gsi = self.vm.routes.lock().add().ok_or(io::ErrorKind::QuotaExceeded)?;
            state.route = Some(Route { event, gsi, connected: false });
        }
        let Some(route) = &mut state.route else { unreachable!("made above") };
        Self::connect(&self.vm, route, message)?;
        route.event.try_clone()
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        if let Some(mut route) = self.state.get_mut().route.take() {
            // Nothing is left to do about a refusal: the descriptor closes next, which disconnects it too.
            let _ = Self::connect(&self.vm, &mut route, None);
            *self.vm.routes.lock().slot(route.gsi) = Slot::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_are_reused_and_bounded() {
        let mut routes = MsiRoutes::default();
        let first = routes.add().unwrap();
        assert_eq!(first, IOAPIC_PINS);
        let second = routes.add().unwrap();
        *routes.slot(first) = Slot::default();
        assert_eq!(routes.add(), Some(first));
        routes.slot(second).message = Some(Msi { address: 0xfee0_0000, data: 0x41, requester: 0 });
        assert_eq!(routes.entries().len(), 24 + 16 + 1, "unprogrammed vectors have no route");
        while routes.add().is_some() {}
        assert!(routes.entries().len() <= KVM_MAX_IRQ_ROUTES);
    }
}

//! One virtqueue of a vhost-user port: what the front-end has set up, and the ring once it runs.
#![expect(unsafe_code, reason = "hands translated addresses to the ring, which trusts them")]

use std::sync::Arc;

use super::memory::GuestMemory;
use super::message::VringAddr;
use super::ring::{
    PackedRing, QUEUE_MAX, Ring, RingAddresses, RingError, RingFeatures, SplitRing, part_sizes,
};
use crate::packet::Burst;
use crate::port::Batch;
use crate::sys::EventFd;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Vring {
    size: u16,
    base: u32,
    addr: Option<VringAddr>,
    enabled: bool,
    kicked: bool,
    call: Option<EventFd>,
    memory: Arc<GuestMemory>,
    features: RingFeatures,
    ring: Option<Ring>,
    /// Whether the guest is to notify. Kept here for a ring that starts later: one that starts while its queue is
    /// polled would otherwise cost the guest a system call a burst for nothing.
    armed: bool,
}

impl Vring {
    /// Whether packets may move.
    #[inline]
    fn active(&mut self) -> Option<(&mut Ring, &Arc<GuestMemory>)> {
        if !self.enabled {
            return None;
        }
        Some((self.ring.as_mut()?, &self.memory))
    }

    /// Whether packets may move.
    pub fn is_active(&self) -> bool {
        self.enabled && self.ring.is_some()
    }

    /// Sets the number of entries.
    pub fn set_size(&mut self, n: u32) -> Option<()> {
        let n = u16::try_from(n).ok().filter(|n| (1..=QUEUE_MAX).contains(n))?;
        if !self.features.packed && !n.is_power_of_two() {
            return None;
        }
        (self.ring.is_none()).then(|| self.size = n)
    }

    /// Sets the next available entry. A split ring goes on where its used index stands, which some front-ends (DPDK's
    /// virtio-user) rely on after a reconnection: this is what is answered when the queue stops without having run. A
    /// packed one starts here, unless it tells of a device that died.
    pub fn set_base(&mut self, n: u32) -> Option<()> {
        if !self.features.packed && n > u16::MAX.into() {
            return None;
        }
        self.base = n;
        Some(())
    }

    /// Sets the addresses. A running ring follows, as when logging starts; one that was kicked before starts now.
    pub fn set_addr(&mut self, addr: VringAddr) -> Option<()> {
        self.addr = Some(addr);
        self.relocate()?;
        if self.kicked { self.start().ok() } else { Some(()) }
    }

    /// Sets the descriptor to notify the guest by.
    pub fn set_call(&mut self, call: Option<EventFd>) {
        self.call = call;
    }

    /// Sets the features, which take effect at the next start; logging takes effect at once.
    pub fn set_features(&mut self, features: RingFeatures) {
        self.features = features;
        if let Some(r) = &mut self.ring {
            r.set_log(features.log);
        }
    }

    /// Switches the queue on or off without stopping it.
    pub fn set_enabled(&mut self, on: bool) {
        self.enabled = on;
    }

    /// Starts the ring if all is set up; the front-end has given (or waived) the kick descriptor.
    pub fn start(&mut self) -> Result<(), RingError> {
        self.kicked = true;
        if self.ring.is_some() || self.size == 0 || self.addr.is_none() {
            return Ok(());
        }
        let at = self.addresses().ok_or(RingError::Address)?;
        // SAFETY: `addresses` checked that all parts are mapped; `self.memory` keeps them so while the ring exists.
        let mut ring = unsafe {
            if self.features.packed {
                Ring::Packed(PackedRing::new(&self.memory, self.size, at, self.features, self.base)?)
            } else {
                Ring::Split(SplitRing::new(self.size, at, self.features)?)
            }
        };
        ring.arm(&self.memory, self.armed);
        self.ring = Some(ring);
        Ok(())
    }

    /// Replaces the guest's memory; a running ring moves along, or stops when its parts are gone.
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Option<()> {
        self.memory = memory;
        self.relocate()
    }

    fn relocate(&mut self) -> Option<()> {
        let at = self.addresses();
        let ring = match &mut self.ring {
            Some(r) => r,
            None => return Some(()),
        };
        match at {
            // SAFETY: as in `start`.
            Some(at) => unsafe {
                match ring {
                    Ring::Split(r) => r.relocate(at),
                    Ring::Packed(r) => r.relocate(at),
                }
            },
            None => {
                self.base = ring.base();
                self.ring = None;
            }
        }
        at.map(drop)
    }

    fn addresses(&self) -> Option<RingAddresses> {
        let a = self.addr?;
        // A ring that runs keeps its layout.
        let packed = match &self.ring {
            Some(ring) => matches!(ring, Ring::Packed(_)),
            None => self.features.packed,
        };
        let (desc, avail, used) = part_sizes(self.size, packed);
        let m = &self.memory;
        let logged = |guest: Option<u64>, len| guest.filter(|g| a.log && g.checked_add(len).is_some());
        let at = RingAddresses {
            desc: m.translate_user(a.desc, desc)?,
            avail: m.translate_user(a.avail, avail)?,
            used: m.translate_user(a.used, used)?,
            used_log: logged(Some(a.used_guest), used),
            desc_log: logged(m.guest_of_user(a.desc), desc),
        };
        at.is_aligned(packed).then_some(at)
    }

    /// Whether a burst that was received has not been completed.
    pub fn is_busy(&self) -> bool {
        self.ring.as_ref().is_some_and(Ring::has_pending)
    }

    /// Stops the ring; returns where it stands, and says so in the ring unless the front-end gets to know. The caller
    /// has waited until it is not busy.
    pub fn stop(&mut self, told: bool) -> u32 {
        self.notify();
        if let Some(mut r) = self.ring.take() {
            self.base = r.base();
            if told {
                r.forget_position(&self.memory);
            }
        }
        self.kicked = false;
        self.base
    }

    /// Stops the ring and forgets all that was set up.
    pub fn reset(&mut self) {
        *self = Self { armed: self.armed, ..Self::default() };
    }

    /// Takes packets that the guest sends.
    #[inline]
    pub fn receive(&mut self, burst: &mut Burst) {
        let Some((ring, memory)) = self.active() else { return };
        let r = ring.pop(memory, burst);
        if !burst.is_empty() {
            burst.hold(memory);
        }
        self.note(r);
    }

    /// Gives received buffers back.
    #[inline]
    pub fn complete(&mut self) {
        // A disabled queue completes what it took before.
        if let Some(ring) = &mut self.ring {
            ring.complete(&self.memory);
        }
    }

    /// Copies packets into the guest's buffers.
    #[inline]
    pub fn transmit(&mut self, batch: &Batch<'_>) -> usize {
        let Some((ring, memory)) = self.active() else { return 0 };
        match ring.push(memory, batch) {
            Ok(n) => n,
            Err(e) => {
                self.note(Err(e));
                0
            }
        }
    }

    /// Asks the guest for notifications or waives them; says whether there is work.
    pub fn arm(&mut self, on: bool) -> bool {
        self.armed = on;
        let work = self.ring.as_mut().is_some_and(|ring| ring.arm(&self.memory, on));
        work && self.enabled
    }

    /// Notifies the guest of what was given to it since the last call, if it wants that.
    #[inline]
    pub fn notify(&mut self) {
        if let Some(ring) = &mut self.ring
            && ring.wants_notification()
            && let Some(c) = &self.call
        {
            c.signal();
        }
    }

    /// A guest that breaks its ring loses the queue until it is set up anew.
    fn note(&mut self, r: Result<(), RingError>) {
        if let Err(e) = r {
            tracing::warn!(error = %e, "the guest broke a virtqueue; it is stopped until the guest resets it");
            self.enabled = false;
        }
    }
}

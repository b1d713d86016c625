//! What a front-end sets up, message by message.

use super::QUEUE_SIZE;
use super::device::{Device, feature};
use super::inflight::{Region, reaches};
use super::queue::Queue;
use super::ring::{Ring, RingSetup};
use std::fs::File;
use std::io;
use std::sync::Arc;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures as Protocol, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// Regions of memory that a front-end may add one by one.
const MEMORY_SLOTS: u64 = 509;

/// A region of guest memory and where the front-end has it.
#[derive(Clone, Copy)]
struct Place {
    user: u64,
    guest: u64,
    len: u64,
}

/// A queue with what was said of its rings.
struct Slot {
    queue: Queue,
    setup: RingSetup,
    located: bool,
}

/// The state of a connection. Dropping it ends the threads of its queues.
pub struct Session {
    device: Arc<Device>,
    features: u64,
    memory: Arc<GuestMemoryMmap>,
    places: Vec<Place>,
    slots: Vec<Slot>,
    inflight: Option<Region>,
}

fn failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

fn unsupported<T>() -> Result<T> {
    Err(Error::InvalidOperation("not supported"))
}

impl Session {
    pub fn new(device: Arc<Device>) -> io::Result<Self> {
        let slot = |number| {
            let queue = Queue::start(device.clone(), number)?;
            Ok(Slot { queue, setup: RingSetup { size: QUEUE_SIZE, ..Default::default() }, located: false })
        };
        let slots = (0..device.queues).map(slot).collect::<io::Result<_>>()?;
        let memory = Arc::new(GuestMemoryMmap::new());
        Ok(Session { device, features: 0, memory, places: Vec::new(), slots, inflight: None })
    }

    fn slot(&mut self, index: u32) -> Result<&mut Slot> {
        self.slots.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    fn set_memory(&mut self, memory: GuestMemoryMmap) {
        self.memory = Arc::new(memory);
        for slot in &self.slots {
            slot.queue.change(|state| {
                if let Some(ring) = &mut state.ring {
                    ring.set_memory(self.memory.clone());
                }
            });
        }
    }

    fn guest_address(&self, user: u64) -> Result<u64> {
        let inside = |place: &&Place| user.checked_sub(place.user).is_some_and(|offset| offset < place.len);
        let place = self.places.iter().find(inside).ok_or(Error::InvalidParam)?;
        place.guest.checked_add(user - place.user).ok_or(Error::InvalidParam)
    }

    fn enable_all(&mut self, on: bool) {
        for slot in &self.slots {
            slot.queue.change(|state| state.enabled = on);
        }
    }
}

impl Drop for Session {
    /// Ends all queues at once: each waits for what is under way when it is dropped.
    fn drop(&mut self) {
        self.slots.iter().for_each(|slot| slot.queue.end());
    }
}

fn map(region: &VhostUserMemoryRegion, file: File) -> Result<(Place, GuestRegionMmap)> {
    if !reaches(&file, region.mmap_offset, region.memory_size).map_err(failed)? {
        return Err(Error::InvalidParam);
    }
    let address = GuestAddress(region.guest_phys_addr);
    let mapped = GuestRegionMmap::new(region.mmap_region(file)?, address).ok_or(Error::InvalidParam)?;
    let place = Place { user: region.user_addr, guest: region.guest_phys_addr, len: region.memory_size };
    Ok((place, mapped))
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.enable_all(false);
        // What is under way ends first, and the driver is told. Where the rings are is said anew.
        for slot in &mut self.slots {
            slot.queue.stop();
            slot.located = false;
        }
        self.features = 0;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.device.features() != 0 {
            return Err(Error::InvalidParam);
        }
        self.features = features;
        self.device.set_features(features);
        let event_idx = features & feature::EVENT_IDX != 0;
        for slot in &mut self.slots {
            slot.setup.event_idx = event_idx;
            slot.queue.change(|state| state.ring.iter_mut().for_each(|ring| ring.set_event_idx(event_idx)));
        }
        if features & feature::PROTOCOL_FEATURES == 0 {
            self.enable_all(true); // there is no message for it then
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let list = table.iter().zip(files).map(|(region, file)| map(region, file));
        let (places, regions) = list.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        self.set_memory(GuestMemoryMmap::from_regions(regions).map_err(failed)?);
        self.places = places;
        Ok(None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MEMORY_SLOTS)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        if self.places.len() as u64 >= MEMORY_SLOTS {
            return Err(Error::InvalidParam);
        }
        let (place, mapped) = map(region, file)?;
        self.set_memory(self.memory.insert_region(Arc::new(mapped)).map_err(failed)?);
        self.places.push(place);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let address = GuestAddress(region.guest_phys_addr);
        let (memory, _) = self.memory.remove_region(address, region.memory_size).map_err(failed)?;
        self.set_memory(memory);
        self.places.retain(|place| place.guest != region.guest_phys_addr);
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= QUEUE_SIZE);
        self.slot(index)?.setup.size = size.ok_or(Error::InvalidParam)?;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let places = [descriptors, available, used].map(|user| self.guest_address(user));
        let [descriptors, available, used] = places;
        let (descriptors, available, used) = (descriptors?, available?, used?);
        let slot = self.slot(index)?;
        slot.setup = RingSetup { descriptors, available, used, ..slot.setup };
        slot.located = true;
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.slot(index)?.setup.base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let slot = self.slot(index)?;
        if let Some(base) = slot.queue.stop() {
            slot.setup.base = base;
        }
        Ok(VhostUserVringState::new(index, slot.setup.base.into()))
    }

    /// Starts a queue, which is served when it is enabled too.
    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (memory, inflight) = (self.memory.clone(), self.inflight.clone());
        let slot = self.slot(index.into())?;
        let given = file.is_some();
        slot.queue.set_kick(file).map_err(failed)?;
        if !given || !slot.located || slot.queue.change(|state| state.ring.is_some()) {
            return Ok(());
        }
        // Requests of a ring that was given up are in its record as long as they are under way.
        slot.queue.settle();
        let record = inflight.map(|region| region.record(index.into(), slot.setup.size));
        let record = record.map(|record| record.ok_or(Error::InvalidParam)).transpose()?;
        let ring = Ring::start(&slot.setup, memory, record).map_err(failed)?;
        slot.queue.change(|state| state.ring = Some(ring));
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.slot(index.into())?.queue.set_call(file).map_err(failed)
    }

    fn set_vring_err(&mut self, _index: u8, _file: Option<File>) -> Result<()> {
        Ok(())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.slot(index)?.queue.change(|state| state.enabled = enable);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<Protocol> {
        Ok(Protocol::MQ
            | Protocol::CONFIG
            | Protocol::REPLY_ACK
            | Protocol::CONFIGURE_MEM_SLOTS
            | Protocol::RESET_DEVICE
            | Protocol::BACKEND_REQ
            | Protocol::INFLIGHT_SHMFD)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(()) // the protocol's library checks messages against them
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.slots.len() as u64)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let config = self.device.config();
        let byte = |at: u32| config.get(at as usize).copied().unwrap_or(0);
        Ok((offset..offset.saturating_add(size)).map(byte).collect())
    }

    fn set_config(&mut self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        Ok(()) // nothing there is for drivers to write: it stays as it is
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (wanted.num_queues, wanted.queue_size);
        if usize::from(queues) > self.slots.len() || size > QUEUE_SIZE {
            return Err(Error::InvalidParam);
        }
        let file = Region::create(queues, size).map_err(failed)?;
        Ok((VhostUserInflight::new(Region::len(queues, size) as u64, 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        let (queues, size) = (given.num_queues, given.queue_size);
        if usize::from(queues) > self.slots.len() || size > QUEUE_SIZE {
            return Err(Error::InvalidParam);
        }
        let region = Region::open(file, given.mmap_offset, given.mmap_size, queues, size);
        self.inflight = Some(region.map_err(failed)?);
        Ok(())
    }

    fn set_gpu_socket(&mut self, _backend: GpuBackend) -> Result<()> {
        unsupported()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported()
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        unsupported()
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        unsupported()
    }
}

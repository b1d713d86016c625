//! The state machine that all transports share (virtio 1.2, sections 2 and 3.1).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Activation, ConfigNotifier, DeviceError, Interrupt, VirtioDevice, features};
use super::queue::{Queue, QueueError, QueueLayout};
use super::worker::{Environment, Parked, Worker};
use crate::lifecycle::LifecycleError;
use crate::memory::GuestMemory;

/// Bits of the device status register.
pub struct Status;

impl Status {
    /// The guest found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are negotiated.
    pub const FEATURES_OK: u8 = 8;
    /// The device cannot go on without a reset.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver gave up.
    pub const FAILED: u8 = 128;
}

/// What workers and devices may touch without the state's lock.
pub(super) struct Shared {
    status: AtomicU8,
    generation: AtomicU32,
    interrupt: Arc<dyn Interrupt>,
}

impl Shared {
    pub(super) fn interrupt(&self) -> &Arc<dyn Interrupt> {
        &self.interrupt
    }

    pub(super) fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        if self.status.load(Ordering::Acquire) & Status::DRIVER_OK != 0 {
            self.interrupt.config();
        }
    }

    /// The device cannot go on until it is reset.
    pub(super) fn fail(&self) {
        let before = self.status.fetch_or(Status::NEEDS_RESET, Ordering::AcqRel);
        if before & Status::DRIVER_OK != 0 {
            self.interrupt.config();
        }
    }
}

/// A register that both transports have, wherever they put it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Register {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    Queues,
    Status,
    Generation,
    QueueSelect,
    QueueMax,
    QueueSize,
    QueueEnable,
    QueueReset,
    /// An address of the selected queue and which half of it.
    QueueAddress(QueueArea, bool),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QueueArea {
    Descriptors,
    Driver,
    Device,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct QueueRegisters {
    max: u16,
    size: u16,
    enabled: bool,
    /// Descriptor table, available ring, used ring.
    addresses: [u64; 3],
    next: (u16, u16),
}

impl QueueRegisters {
    fn new(max: u16) -> Self {
        Self { max, size: max, enabled: false, addresses: [0; 3], next: (0, 0) }
    }
}

enum Handlers {
    Inactive,
    Parked(Vec<Parked>),
    Running(Vec<Worker>),
}

struct State {
    /// Whether the machine lets devices work.
    started: bool,
    /// The state was loaded: the driver looks at the configuration anew when the device starts.
    loaded: bool,
    handlers: Handlers,
    registers: Registers,
}

#[derive(Serialize, Deserialize)]
struct Registers {
    device_select: u32,
    driver_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    kind: u32,
    status: u8,
    registers: Registers,
    device: serde_json::Value,
}

/// One device with its negotiation state, queues and workers, below a transport.
pub struct Virtio {
    device: Arc<dyn VirtioDevice>,
    env: Environment,
    state: Mutex<State>,
}

impl Virtio {
    /// A device in its reset state.
    ///
    /// # Errors
    /// Fails when the host gives no event descriptors.
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        memory: GuestMemory,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<Self> {
        let queues: Vec<_> = device.queue_sizes().into_iter().map(QueueRegisters::new).collect();
        let kicks = queues.iter().map(|_| EventFd::new(EFD_NONBLOCK)).collect::<io::Result<Vec<_>>>()?;
        let shared = Arc::new(Shared { status: AtomicU8::new(0), generation: AtomicU32::new(0), interrupt });
        device.connect(ConfigNotifier(Arc::clone(&shared)));
        let (name, span) = (device.name(), tracing::Span::current());
        let env = Environment { memory, shared, kicks: Arc::new(kicks), name, span };
        let registers =
            Registers { device_select: 0, driver_select: 0, driver_features: 0, queue_select: 0, queues };
        let state =
            Mutex::new(State { started: false, loaded: false, handlers: Handlers::Inactive, registers });
        Ok(Self { device, env, state })
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn VirtioDevice> {
        &self.device
    }

    /// The descriptors that notifications signal, by queue index.
    pub fn kicks(&self) -> &[EventFd] {
        &self.env.kicks
    }

    /// The driver notifies queue `index`.
    pub fn notify(&self, index: u64) {
        if let Some(kick) = usize::try_from(index).ok().and_then(|i| self.env.kicks.get(i)) {
            // A full counter is signalled already.
            let _ = kick.write(1);
        }
    }

    /// The status register.
    pub fn status(&self) -> u8 {
        self.env.shared.status.load(Ordering::Acquire)
    }

    fn offered(&self) -> u64 {
        self.device.features() | self.device.ring_features() | features::VERSION_1
    }

    pub(super) fn queue_select(&self) -> u16 {
        self.state.lock().registers.queue_select
    }

    pub(super) fn read(&self, register: Register) -> u32 {
        let half = |value: u64, select: u32| match select {
            0 => value as u32,
            1 => (value >> 32) as u32,
            _ => 0,
        };
        match register {
            Register::Status => return u32::from(self.status()),
            Register::Generation => return self.env.shared.generation.load(Ordering::Acquire),
            _ => {}
        }
        let state = self.state.lock();
        let r = &state.registers;
        let queue = r.queues.get(usize::from(r.queue_select));
        match register {
            Register::Status | Register::Generation => 0,
            Register::DeviceFeatureSelect => r.device_select,
            Register::DeviceFeature => half(self.offered(), r.device_select),
            Register::DriverFeatureSelect => r.driver_select,
            Register::DriverFeature => half(r.driver_features, r.driver_select),
            Register::Queues => r.queues.len() as u32,
            Register::QueueSelect => u32::from(r.queue_select),
            Register::QueueMax => queue.map_or(0, |q| u32::from(q.max)),
            Register::QueueSize => queue.map_or(0, |q| u32::from(q.size)),
            Register::QueueEnable => queue.map_or(0, |q| u32::from(q.enabled)),
            // A reset is done when the write returns.
            Register::QueueReset => 0,
            Register::QueueAddress(area, high) => {
                queue.map_or(0, |q| half(q.addresses[area as usize], u32::from(high)))
            }
        }
    }

    pub(super) fn write(&self, register: Register, value: u32) {
        let mut state = self.state.lock();
        let status = self.status();
        if register == Register::Status {
            return self.set_status(&mut state, value as u8);
        }
        let r = &mut state.registers;
        match register {
            Register::DeviceFeatureSelect => return r.device_select = value,
            Register::DriverFeatureSelect => return r.driver_select = value,
            Register::QueueSelect => return r.queue_select = value as u16,
            Register::DriverFeature if status & Status::FEATURES_OK == 0 => {
                r.driver_features = match r.driver_select {
                    0 => r.driver_features & !0xffff_ffff | u64::from(value),
                    1 => r.driver_features & 0xffff_ffff | u64::from(value) << 32,
                    _ => r.driver_features,
                };
                return;
            }
            _ => {}
        }
        let index = usize::from(r.queue_select);
        let reset_allowed = r.driver_features & features::RING_RESET != 0;
        let Some(queue) = r.queues.get_mut(index) else { return };
        match register {
            Register::QueueSize if !queue.enabled => queue.size = value as u16,
            Register::QueueAddress(area, high) if !queue.enabled => {
                let address = &mut queue.addresses[area as usize];
                *address = if high {
                    *address & 0xffff_ffff | u64::from(value) << 32
                } else {
                    *address & !0xffff_ffff | u64::from(value)
                };
            }
            Register::QueueEnable if (value & 1 != 0) != queue.enabled => {
                queue.enabled = value & 1 != 0;
                queue.next = (0, 0);
                self.queue_changed(&mut state, index);
            }
            Register::QueueReset if value == 1 && reset_allowed => {
                *queue = QueueRegisters::new(queue.max);
                self.queue_changed(&mut state, index);
            }
            _ => {}
        }
    }

    fn set_status(&self, state: &mut State, value: u8) {
        if value == 0 {
            return self.reset_locked(state);
        }
        let shared = &self.env.shared;
        let before = self.status();
        let mut new = value & !before & !Status::NEEDS_RESET;
        if new & Status::FEATURES_OK != 0 {
            let accepted = state.registers.driver_features;
            if accepted & !self.offered() != 0 || accepted & features::VERSION_1 == 0 {
                new &= !(Status::FEATURES_OK | Status::DRIVER_OK);
            }
        }
        let negotiated = (before | new) & Status::FEATURES_OK != 0;
        if !negotiated && new & Status::DRIVER_OK != 0 {
            shared.status.fetch_or(new & !Status::DRIVER_OK, Ordering::AcqRel);
            return shared.fail();
        }
        shared.status.fetch_or(new, Ordering::AcqRel);
        if new & Status::DRIVER_OK != 0 && state.started {
            self.run(state);
        }
    }

    fn reset_locked(&self, state: &mut State) {
        self.park(state);
        state.handlers = Handlers::Inactive;
        self.env.shared.status.store(0, Ordering::Release);
        self.device.reset();
        for kick in self.env.kicks.iter() {
            // Forget notifications of the old driver; nothing to read is fine.
            let _ = kick.read();
        }
        let r = &mut state.registers;
        (r.device_select, r.driver_select, r.driver_features, r.queue_select) = (0, 0, 0, 0);
        for queue in &mut r.queues {
            *queue = QueueRegisters::new(queue.max);
        }
    }

    /// Returns the device to its power-on state, as a driver's reset does.
    pub fn reset(&self) {
        self.reset_locked(&mut self.state.lock());
    }

    fn queue(&self, registers: &Registers, index: usize) -> Result<Option<Queue>, QueueError> {
        let q = &registers.queues[index];
        if !q.enabled {
            return Ok(None);
        }
        if q.size > q.max {
            return Err(QueueError::BadSize(q.size));
        }
        let has = |feature| registers.driver_features & feature != 0;
        let layout = QueueLayout {
            size: q.size,
            descriptors: q.addresses[QueueArea::Descriptors as usize],
            driver: q.addresses[QueueArea::Driver as usize],
            device: q.addresses[QueueArea::Device as usize],
            event_idx: has(features::EVENT_IDX),
            indirect: has(features::INDIRECT_DESC),
        };
        Queue::new(self.env.memory.clone(), layout, q.next).map(Some)
    }

    fn activate(&self, registers: &Registers) -> Result<Vec<Parked>, DeviceError> {
        let mut queues = Vec::with_capacity(registers.queues.len());
        for index in 0..registers.queues.len() {
            queues.push(self.queue(registers, index)?);
        }
        let specs = self.device.activate(Activation {
            memory: &self.env.memory,
            features: registers.driver_features,
            queues: &queues,
            kicks: &self.env.kicks,
            interrupt: self.env.shared.interrupt(),
        })?;
        Ok(specs
            .into_iter()
            .map(|spec| {
                let mut own: Vec<_> = queues.iter().map(|_| None).collect();
                for &index in &spec.queues {
                    own[index] = queues[index].take();
                }
                Parked { handler: spec.handler, queues: own, owned: spec.queues, external: spec.external }
            })
            .collect())
    }

    /// Lets the handlers work, making them first when the driver just became ready.
    fn run(&self, state: &mut State) {
        let status = self.status();
        if status & Status::DRIVER_OK == 0 || status & Status::NEEDS_RESET != 0 {
            return;
        }
        let parked = match std::mem::replace(&mut state.handlers, Handlers::Inactive) {
            Handlers::Inactive => match self.activate(&state.registers) {
                Ok(parked) => parked,
                Err(error) => {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::warn!(device = self.env.name, %error, cause, "Device cannot start");
                    return self.env.shared.fail();
                }
            },
            Handlers::Parked(parked) => parked,
            running @ Handlers::Running(_) => return state.handlers = running,
        };
        let mut workers = Vec::with_capacity(parked.len());
        for handler in parked {
            match Worker::spawn(handler, &self.env) {
                Ok(worker) => workers.push(worker),
                Err((error, _)) => {
                    tracing::warn!(device = self.env.name, %error, "No thread for the device");
                    self.env.shared.fail();
                }
            }
        }
        state.handlers = Handlers::Running(workers);
    }

    /// Stops the handlers with everything in flight completed, and keeps them.
    fn park(&self, state: &mut State) {
        state.handlers = match std::mem::replace(&mut state.handlers, Handlers::Inactive) {
            Handlers::Running(workers) => {
                workers.iter().for_each(Worker::request_stop);
                let mut parked = Vec::with_capacity(workers.len());
                for worker in workers {
                    match worker.stop() {
                        Some(handler) => parked.push(handler),
                        None => self.env.shared.fail(),
                    }
                }
                for handler in &parked {
                    for (index, queue) in handler.queues.iter().enumerate() {
                        if let Some(queue) = queue {
                            state.registers.queues[index].next = queue.position();
                        }
                    }
                }
                Handlers::Parked(parked)
            }
            other => other,
        };
    }

    /// Brings handlers up to date after queue `index` was enabled or disabled.
    fn queue_changed(&self, state: &mut State, index: usize) {
        if matches!(state.handlers, Handlers::Inactive) {
            return;
        }
        self.park(state);
        let queue = match self.queue(&state.registers, index) {
            Ok(queue) => queue,
            Err(error) => {
                tracing::warn!(device = self.env.name, index, %error, "Malformed queue");
                self.env.shared.fail();
                None
            }
        };
        if let Handlers::Parked(parked) = &mut state.handlers
            && let Some(owner) = parked.iter_mut().find(|p| p.owned.contains(&index))
        {
            owner.queues[index] = queue;
        }
        if state.started {
            self.run(state);
        }
    }

    /// Restarts the handlers so that they see what changed around them (interrupt routes).
    pub(super) fn refresh(&self) {
        let mut state = self.state.lock();
        if matches!(state.handlers, Handlers::Running(_)) {
            self.park(&mut state);
            self.run(&mut state);
        }
    }

    /// Lets the device work: the machine runs.
    pub fn start(&self) {
        let mut state = self.state.lock();
        state.started = true;
        self.run(&mut state);
        if std::mem::take(&mut state.loaded) {
            // What is behind the device may differ from what the driver knows.
            self.env.shared.config_changed();
        }
    }

    /// Completes everything in flight and keeps the device from working until [`Self::start`].
    pub fn pause(&self) {
        let mut state = self.state.lock();
        state.started = false;
        self.park(&mut state);
    }

    /// The state, while paused.
    ///
    /// # Errors
    /// Fails when the device works, or cannot describe its state.
    pub fn save(&self) -> Result<serde_json::Value, LifecycleError> {
        let state = self.state.lock();
        if state.started {
            return Err(LifecycleError::State("the device is not paused".into()));
        }
        let device = self.device.save()?;
        Ok(serde_json::json!({
            "kind": self.device.device_type(),
            "status": self.status(),
            "registers": state.registers,
            "device": device,
        }))
    }

    /// Loads what [`Self::save`] returned, while paused.
    ///
    /// # Errors
    /// Fails when the state is malformed or belongs to another configuration.
    pub fn restore(&self, saved: &serde_json::Value) -> Result<(), LifecycleError> {
        let saved = Saved::deserialize(saved).map_err(|e| LifecycleError::State(e.to_string()))?;
        let mut state = self.state.lock();
        if state.started {
            return Err(LifecycleError::State("the device is not paused".into()));
        }
        if saved.kind != self.device.device_type() {
            return Err(LifecycleError::State("it is a device of another kind".into()));
        }
        let same = |(a, b): (&QueueRegisters, &QueueRegisters)| a.max == b.max;
        let (new, old) = (&saved.registers.queues, &state.registers.queues);
        if new.len() != old.len() || !new.iter().zip(old).all(same) {
            return Err(LifecycleError::State("its queues are others".into()));
        }
        if saved.registers.driver_features & !self.offered() != 0 {
            return Err(LifecycleError::State("its driver uses features that this device lacks".into()));
        }
        state.handlers = Handlers::Inactive;
        self.device.reset();
        self.device.restore(&saved.device)?;
        state.registers = saved.registers;
        self.env.shared.status.store(saved.status, Ordering::Release);
        state.loaded = true;
        Ok(())
    }
}

impl Drop for Virtio {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        if let Handlers::Running(workers) = std::mem::replace(&mut state.handlers, Handlers::Inactive) {
            workers.iter().for_each(Worker::request_stop);
            for worker in workers {
                worker.stop();
            }
        }
    }
}

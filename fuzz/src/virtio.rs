//! A virtio device without a transport: its handlers, called one by one in this thread.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmm_core::devices::virtio::{
    Activation, Context, DeviceError, HandlerSpec, Interrupt, Queue, QueueHandler, QueueLayout, VirtioDevice,
    features,
};
use vmm_core::memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 16;

struct Quiet;

impl Interrupt for Quiet {
    fn queue(&self, _index: usize) {}
    fn config(&self) {}
    fn queue_event(&self, _index: usize) -> io::Result<Option<OwnedFd>> {
        Ok(None)
    }
}

/// The addresses of a queue's table, available ring and used ring, a page each.
pub fn parts(queue: usize) -> [u64; 3] {
    [0, 1, 2].map(|part| (queue as u64 * 3 + part) << 12)
}

/// The handlers of a device that was activated.
pub struct Handlers(Vec<(HandlerSpec, Context)>);

impl Handlers {
    /// Activates a device with the features of `wanted` that it has, and starts its handlers.
    pub fn start(device: &dyn VirtioDevice, memory: &GuestMemory, wanted: u64) -> Option<Self> {
        let count = device.queue_sizes().len();
        let negotiated = (device.features() | device.ring_features()) & wanted | features::VERSION_1;
        let kicks: Vec<EventFd> = (0..count).map(|_| EventFd::new(0).expect("eventfd")).collect();
        let interrupt: Arc<dyn Interrupt> = Arc::new(Quiet);
        let queue = |index: usize| {
            let [descriptors, driver, device] = parts(index);
            let layout = QueueLayout {
                size: QUEUE_SIZE,
                descriptors,
                driver,
                device,
                event_idx: negotiated & features::EVENT_IDX != 0,
                indirect: negotiated & features::INDIRECT_DESC != 0,
            };
            Queue::new(memory.clone(), layout, (0, 0)).ok()
        };
        let queues: Vec<Option<Queue>> = (0..count).map(queue).collect();
        let activation = Activation {
            memory,
            features: negotiated,
            queues: &queues,
            kicks: &kicks,
            interrupt: &interrupt,
        };
        // A handler has its own queues only, as behind a transport.
        let context = |spec: HandlerSpec| {
            let own = (0..count).map(|i| if spec.queues.contains(&i) { queue(i) } else { None }).collect();
            let context = Context::detached(memory.clone(), own, interrupt.clone()).expect("context");
            (spec, context)
        };
        let mut handlers = Self(device.activate(activation).ok()?.into_iter().map(context).collect());
        handlers.each(|handler, context| handler.start(context));
        Some(handlers)
    }

    /// Calls each handler. An error stops a handler, as it stops the device.
    fn each(&mut self, mut call: impl FnMut(&mut dyn QueueHandler, &mut Context) -> Result<(), DeviceError>) {
        self.0.retain_mut(|(spec, context)| call(&mut *spec.handler, context).is_ok());
    }

    /// Whether queues are with another process.
    pub fn handed_over(&self) -> bool {
        self.0.iter().any(|(spec, context)| spec.external && context.deadline.is_none())
    }

    /// The driver notifies a queue.
    pub fn kick(&mut self, queue: usize) {
        self.0.retain_mut(|(spec, context)| {
            !spec.queues.contains(&queue) || spec.handler.queue(queue, context).is_ok()
        });
    }

    /// Events of descriptors that are ready now.
    pub fn events(&mut self) {
        self.each(|handler, context| {
            let ready = context.ready().expect("epoll");
            ready.into_iter().try_for_each(|(token, events)| handler.event(token, events, context))
        });
    }

    /// The time that handlers wait for has come.
    pub fn timers(&mut self) {
        self.each(|handler, context| match context.deadline.take() {
            Some(_) => handler.timer(context),
            None => Ok(()),
        });
    }

    /// Stops the handlers and starts them again.
    pub fn restart(&mut self) {
        self.stop();
        self.each(|handler, context| handler.start(context));
    }

    /// Stops the handlers.
    pub fn stop(&mut self) {
        self.0.iter_mut().for_each(|(spec, context)| spec.handler.stop(context));
    }
}

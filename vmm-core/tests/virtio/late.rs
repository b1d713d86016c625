//! A storage that answers late: when a test lets it, or after a moment.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use blockfmt::queue::{Queue, QueueOptions};
use blockfmt::storage::MemoryStorage;
use blockfmt::{Disk, Format, Gather, Geometry, OpenOptions, Scatter, Storage};
use parking_lot::{Condvar, Mutex};
use vmm_core::devices::virtio::blk::BlockBackend;

/// What a storage is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Read(u64),
    Write(u64),
    Erase(u64),
    Flush,
}

#[derive(Default)]
struct State {
    /// Calls wait until they are let go; otherwise each takes a moment.
    holding: bool,
    waiting: Vec<Call>,
    /// Calls that may go on.
    released: Vec<Call>,
    failing: Vec<Call>,
    /// Most calls that waited at a time.
    most: usize,
    /// Flushes that began.
    flushes: usize,
    /// The contents when the latest flush that has ended began, and which one that is.
    durable: (usize, Vec<u8>),
}

/// The storage, which is none of the kernel's: a queue gives everything to its threads.
#[derive(Default)]
pub struct Late {
    inner: MemoryStorage,
    state: Mutex<State>,
    changed: Condvar,
}

/// Opens a storage again, also when a test fails.
pub struct Holding<'a>(&'a Late);

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}

impl std::fmt::Debug for Late {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Late")
    }
}

impl Late {
    pub fn new(size: u64) -> (Arc<Self>, Disk) {
        let late = Arc::new(Self::default());
        late.inner.set_len(size).unwrap();
        late.state.lock().durable.1 = late.inner.to_vec();
        let storage: Arc<dyn Storage> = late.clone();
        let disk = OpenOptions::new(Format::Raw).open_storage(storage, "late").unwrap();
        (late, disk)
    }

    fn call(&self, call: Call) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.holding {
            state.waiting.push(call);
            state.most = state.most.max(state.waiting.len());
            self.changed.notify_all();
            loop {
                if let Some(at) = state.released.iter().position(|c| *c == call) {
                    state.released.swap_remove(at);
                    break;
                }
                if !state.holding {
                    break;
                }
                self.changed.wait(&mut state);
            }
            let at = state.waiting.iter().position(|c| *c == call).unwrap();
            state.waiting.swap_remove(at);
        } else {
            drop(state);
            moment();
            state = self.state.lock();
        }
        match state.failing.iter().position(|c| *c == call) {
            Some(at) => {
                state.failing.swap_remove(at);
                Err(io::Error::other("injected"))
            }
            None => Ok(()),
        }
    }

    /// Lets calls wait from now on, at most until the result is dropped: the device waits for its requests as it goes.
    #[must_use]
    pub fn hold(&self) -> Holding<'_> {
        let mut state = self.state.lock();
        (state.holding, state.most) = (true, 0);
        Holding(self)
    }

    /// Lets all calls go on, those to come, too.
    pub fn open(&self) {
        let mut state = self.state.lock();
        state.holding = false;
        state.released.clear();
        self.changed.notify_all();
    }

    /// Lets one call go on.
    pub fn release(&self, call: Call) {
        self.state.lock().released.push(call);
        self.changed.notify_all();
    }

    /// Lets a call fail.
    pub fn fail(&self, call: Call) {
        self.state.lock().failing.push(call);
    }

    /// Waits until exactly `count` calls wait, and returns them. The limit only turns a hang into a failure.
    pub fn wait_for(&self, count: usize) -> Vec<Call> {
        let mut state = self.state.lock();
        let limit = Duration::from_secs(30);
        let waited = self.changed.wait_while_for(&mut state, |state| state.waiting.len() != count, limit);
        if waited.timed_out() {
            panic!("{count} calls should wait, and these do: {:?}", state.waiting);
        }
        state.waiting.clone()
    }

    /// Most calls that waited at a time since [`Self::hold`].
    pub fn most(&self) -> usize {
        self.state.lock().most
    }

    pub fn flushes(&self) -> usize {
        self.state.lock().flushes
    }

    /// What a crash of the host leaves at least.
    pub fn durable(&self) -> Vec<u8> {
        self.state.lock().durable.1.clone()
    }
}

/// The time of an access to a disk, in which the kernel lets the thread sleep.
fn moment() {
    std::thread::sleep(Duration::from_micros(200));
}

impl Storage for Late {
    fn name(&self) -> String {
        "late".into()
    }
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }
    fn readv(&self, dst: Scatter<'_>, offset: u64) -> io::Result<()> {
        self.call(Call::Read(offset))?;
        self.inner.readv(dst, offset)
    }
    fn writev(&self, src: Gather<'_>, offset: u64) -> io::Result<()> {
        self.call(Call::Write(offset))?;
        self.inner.writev(src, offset)
    }
    fn flush(&self) -> io::Result<()> {
        let began = {
            let mut state = self.state.lock();
            state.flushes += 1;
            (state.flushes, self.inner.to_vec())
        };
        self.call(Call::Flush)?;
        let mut state = self.state.lock();
        if state.durable.0 < began.0 {
            state.durable = began;
        }
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.call(Call::Erase(offset))?;
        self.inner.write_zeroes(offset, len, unmap)
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.call(Call::Erase(offset))?;
        self.inner.discard(offset, len)
    }
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.allocate(offset, len)
    }
}

/// What a [`Slow`] back-end offers instead of its methods.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Offer {
    Queue,
    None,
    Failure,
}

/// A disk whose methods answer late, and whose queue is the disk's own.
pub struct Slow {
    pub disk: Disk,
    pub offer: Offer,
    /// Times that a queue was asked for.
    pub asked: Mutex<usize>,
}

impl BlockBackend for Slow {
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn read_only(&self) -> bool {
        false
    }
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }
    fn read(&self, target: Scatter<'_>, offset: u64) -> io::Result<()> {
        moment();
        BlockBackend::read(&self.disk, target, offset)
    }
    fn write(&self, source: Gather<'_>, offset: u64) -> io::Result<()> {
        moment();
        BlockBackend::write(&self.disk, source, offset)
    }
    fn flush(&self) -> io::Result<()> {
        moment();
        BlockBackend::flush(&self.disk)
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        moment();
        BlockBackend::discard(&self.disk, offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        moment();
        BlockBackend::write_zeroes(&self.disk, offset, len, unmap)
    }
    fn on_resize(&self, callback: Box<dyn Fn(u64) + Send + Sync>) {
        BlockBackend::on_resize(&self.disk, callback);
    }
    fn queue(&self, options: QueueOptions) -> io::Result<Option<Queue>> {
        *self.asked.lock() += 1;
        match self.offer {
            Offer::Queue => BlockBackend::queue(&self.disk, options),
            Offer::None => Ok(None),
            Offer::Failure => Err(io::ErrorKind::OutOfMemory.into()),
        }
    }
}

//! The entropy device (virtio 1.2, section 5.4).

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

use super::chain::Chain;
use super::device::{Activation, DeviceError, HandlerSpec, QueueHandler, VirtioDevice};
use super::worker::Context;

/// Bytes given for one request at most; the driver asks again.
const REQUEST_MAX: usize = 64 << 10;

/// A virtio entropy device, fed by the host's random number generator.
pub struct Rng {
    source: Arc<File>,
}

impl Rng {
    /// A device that reads `/dev/urandom`.
    ///
    /// # Errors
    /// Fails when that cannot be opened.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self { source: Arc::new(File::open("/dev/urandom")?) }))
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        4
    }

    fn name(&self) -> &'static str {
        "virtio-rng"
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&self, _activation: Activation<'_>) -> Result<Vec<HandlerSpec>, DeviceError> {
        let handler = Requests { source: Arc::clone(&self.source), chain: Chain::default() };
        Ok(vec![HandlerSpec::new([0], handler)])
    }
}

struct Requests {
    source: Arc<File>,
    chain: Chain,
}

impl QueueHandler for Requests {
    fn queue(&mut self, index: usize, context: &mut Context) -> Result<(), DeviceError> {
        loop {
            while !context.stopping()
                && let Some(queue) = &mut context.queues[index]
                && queue.pop(&mut self.chain)?
            {
                let mut writer = self.chain.writer(&context.memory);
                while writer.remaining() != 0 && (writer.written() as usize) < REQUEST_MAX {
                    let mut bytes = [0; 256];
                    let n = bytes.len().min(writer.remaining() as usize);
                    (&*self.source).read_exact(&mut bytes[..n])?;
                    writer.write(&bytes[..n])?;
                }
                queue.push(self.chain.head(), writer.written())?;
                context.signal(index)?;
            }
            let Some(queue) = &mut context.queues[index] else { return Ok(()) };
            if !queue.enable_notification()? || context.stopping() {
                return Ok(());
            }
        }
    }
}

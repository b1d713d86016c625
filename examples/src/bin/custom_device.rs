//! A virtio device of one's own: an entropy device whose bytes follow from a seed. Each buffer gets the same ones, since
//! the guest's kernel draws some for itself at moments of its own. The guest's stock driver reads the device as
//! /dev/hwrng: `custom_device IMAGES SEED`.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use examples::{Output, script_guest};
use nacre_engine::vmm_core::devices::virtio::{
    Activation, Chain, Context as Worker, DeviceError, HandlerSpec, QueueHandler, VirtioDevice,
};
use nacre_engine::vmm_core::machine::{StopReason, Vm};

/// The generator: an xorshift of 64 bits.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u8 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u8
    }
}

/// What the transport sees: identity, features, queues, configuration.
struct SeededEntropy {
    seed: u64,
}

impl VirtioDevice for SeededEntropy {
    fn device_type(&self) -> u32 {
        4 // entropy device, virtio 1.2 section 5
    }

    fn name(&self) -> &'static str {
        "seeded-entropy"
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![16]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0); // it has no configuration
    }

    /// The driver is ready: one worker thread serves queue 0.
    fn activate(&self, _: Activation<'_>) -> Result<Vec<HandlerSpec>, DeviceError> {
        let handler = Requests { seed: self.seed, chain: Chain::default() };
        Ok(vec![HandlerSpec::new([0], handler)])
    }
}

struct Requests {
    seed: u64,
    chain: Chain,
}

impl QueueHandler for Requests {
    fn queue(&mut self, index: usize, worker: &mut Worker) -> Result<(), DeviceError> {
        loop {
            while let Some(queue) = &mut worker.queues[index]
                && queue.pop(&mut self.chain)?
            {
                // The chain was checked against guest RAM; a writer cannot leave its buffers.
                let mut writer = self.chain.writer(&worker.memory);
                let mut numbers = Numbers(self.seed);
                while writer.remaining() != 0 && writer.written() < 4096 {
                    writer.write(&[numbers.next()])?;
                }
                queue.push(self.chain.head(), writer.written())?;
                worker.signal(index)?;
            }
            let Some(queue) = &mut worker.queues[index] else { return Ok(()) };
            if !queue.enable_notification()? {
                return Ok(()); // nothing came meanwhile: sleep until the driver notifies
            }
        }
    }
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let images = arguments.next().context("usage: custom_device IMAGES SEED")?;
    let seed = arguments.next().context("usage: custom_device IMAGES SEED")?.parse()?;
    ensure!(seed != 0, "SEED must not be 0");
    let work = std::env::temp_dir().join(format!("custom-device-{}", std::process::id()));
    std::fs::create_dir_all(&work)?;
    let script =
        "cat /sys/class/misc/hw_random/rng_current; busybox head -c 32 /dev/hwrng | busybox hexdump -C";
    let config = script_guest(images.as_ref(), &work, "guest", script)?;
    let output = Output::default();
    let device = Arc::new(SeededEntropy { seed });
    let vm = Vm::builder(config).device(device).serial_output(output.sink()).build()?;
    std::fs::remove_dir_all(&work)?;
    vm.start()?;
    ensure!(vm.wait() == StopReason::PowerOff, "The guest failed:\n{}", output.text());
    print!("{}", output.text());
    Ok(())
}

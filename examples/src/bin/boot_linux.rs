//! Boots a Linux kernel with its console on the terminal: `boot_linux KERNEL [INITRD [COMMAND-LINE]]`.

use nacre_engine::vmm_core::machine::{ConsoleConfig, StopReason, Vm, VmConfig};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut config = VmConfig { console: ConsoleConfig::Stdio, cpus: 2, ..VmConfig::default() };
    config.memory.size = 512 << 20;
    config.boot.kernel = arguments
        .next()
        .ok_or_else(|| anyhow::anyhow!("usage: boot_linux KERNEL [INITRD [COMMAND-LINE]]"))?
        .into();
    config.boot.initrd = arguments.next().map(Into::into);
    config.boot.command_line = arguments.next().unwrap_or_else(|| "console=ttyS0".into());

    let vm = Vm::builder(config).build()?;
    vm.start()?;
    match vm.wait() {
        StopReason::PowerOff => Ok(()),
        reason => anyhow::bail!("The machine stopped: {reason:?}"),
    }
}

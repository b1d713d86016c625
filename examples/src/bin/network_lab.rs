//! A network lab in one process: four machines on a switch, two in VLAN 10 and two in VLAN 20. Each asks for each other
//! by ping; only those of one VLAN hear each other: `network_lab IMAGES`.

use anyhow::{Context, Result, ensure};
use examples::{Output, script_guest};
use nacre_engine::switch_card;
use nacre_engine::vmm_core::devices::virtio::net::NetOptions;
use nacre_engine::vmm_core::machine::{StopReason, Vm};
use nacre_engine::vswitch::{PortConfig, Switch, VlanMode};

const HOSTS: [(&str, u16); 4] = [("red-1", 10), ("red-2", 10), ("blue-1", 20), ("blue-2", 20)];

fn main() -> Result<()> {
    let images = std::env::args().nth(1).context("usage: network_lab IMAGES")?;
    let work = std::env::temp_dir().join(format!("network-lab-{}", std::process::id()));
    std::fs::create_dir_all(&work)?;
    let switch = Switch::builder().build()?;
    let mut lab = Vec::new();
    for (i, (name, vlan)) in HOSTS.into_iter().enumerate() {
        // A neighbour is given a minute to boot. Nobody leaves until the host says that all have looked around.
        let mut script = format!("ip link set eth0 up; ip addr add 10.0.0.{}/24 dev eth0\n", i + 1);
        for (j, (peer, peer_vlan)) in HOSTS.into_iter().enumerate().filter(|(j, _)| *j != i) {
            let tries = if vlan == peer_vlan { 60 } else { 3 };
            script += &format!(
                "n=0; until busybox ping -c 1 -W 1 10.0.0.{0} >/dev/null 2>&1 || [ $n = {tries} ]; do n=$((n+1)); done
                 [ $n = {tries} ] && echo '{name} does not hear {peer}' || echo '{name} hears {peer}'\n",
                j + 1
            );
        }
        script += "echo finished; sleep 600";
        let config = script_guest(images.as_ref(), &work, name, &script.replace("ip ", "busybox ip "))?;
        let port = PortConfig { vlan: VlanMode::Access(vlan), ..PortConfig::default() };
        let options = NetOptions { mac: [0x52, 0x54, 0, 0, 0, i as u8 + 1], ..NetOptions::default() };
        let output = Output::default();
        let vm = Vm::builder(config)
            .device(switch_card(&switch, name, port, &options)?)
            .serial_output(output.sink())
            .build()?;
        vm.start()?;
        lab.push((name, vm, output));
    }
    std::fs::remove_dir_all(&work)?;

    for (name, vm, output) in &lab {
        while !output.text().contains("finished\n") {
            let ended = vm.wait_timeout(std::time::Duration::from_millis(100));
            ensure!(ended.is_none(), "{name} stopped early: {ended:?}\n{}", output.text());
        }
    }
    for (name, vm, output) in lab {
        output.text().lines().filter(|line| line.contains(" hear")).for_each(|line| println!("{line}"));
        vm.stop();
        ensure!(vm.wait() == StopReason::Stopped, "{name} did not stop");
    }
    Ok(())
}

//! Machines in files.

use std::os::unix::fs::PermissionsExt;

use vmm_core::accel::AccelError;
use vmm_core::machine::{
    AccelChoice, AfterSnapshot, NetBackendConfig, RestoreOptions, StopReason, Vm, VmConfig, VmError,
};
use vmm_core::migration::{Record, StreamError, StreamReader, StreamWriter};

use super::accelerators;
use super::moving::{count, disk, finishes, kernel, machine, progresses, start};

fn restored(config: &VmConfig, path: &std::path::Path, check_processors: bool) -> Result<Vm, VmError> {
    let options = RestoreOptions { check_processors, ..RestoreOptions::default() };
    let mut config = config.clone();
    // What is booted is in memory.
    config.boot.kernel = "/nonexistent".into();
    Vm::builder(config).restore(path, &options)
}

#[test]
fn a_guest_goes_on_from_a_file() {
    let (kernel, dir) = (kernel(), tempfile::tempdir().unwrap());
    let path = dir.path().join("saved");
    for accel in accelerators() {
        for (mmio, cpus) in [(false, 1), (true, 2)] {
            let disk = disk();
            let config = VmConfig { mmio, cpus, ..machine(kernel.path(), disk.path(), accel) };
            let first = start(config.clone());
            let report = first.snapshot(&path, AfterSnapshot::Resume).unwrap();
            let file = std::fs::metadata(&path).unwrap();
            assert_eq!(report.bytes, file.len());
            assert!(file.len() < 2 << 20, "zeros are not saved, but {} bytes", file.len());
            assert_eq!(file.permissions().mode() & 0o777, 0o600);
            progresses(&first);
            // As long as it runs nobody else gets its disk.
            assert!(matches!(restored(&config, &path, true), Err(VmError::Disk { .. })), "{accel:?}");
            first.snapshot(&path, AfterSnapshot::StayPaused).unwrap();
            assert!(!first.is_running());
            first.start().unwrap();
            progresses(&first);
            first.snapshot(&path, AfterSnapshot::Stop).unwrap();
            assert_eq!(first.wait(), StopReason::Stopped);
            let passes = count(&first);
            drop(first);
            let second = restored(&config, &path, true).unwrap();
            assert_eq!(count(&second), passes, "{accel:?}");
            assert!(!second.is_running());
            second.start().unwrap();
            finishes(&second);
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside the file");
        }
    }
}

/// Where the processors of the other accelerator are not what the guest knows that is said; a guest that does not care can
/// go on nevertheless.
#[test]
fn a_guest_changes_its_accelerator() {
    let accelerators = accelerators();
    let (kernel, dir) = (kernel(), tempfile::tempdir().unwrap());
    let path = dir.path().join("saved");
    for &from in &accelerators {
        for &to in accelerators.iter().filter(|&&to| to != from) {
            let disk = disk();
            let first = start(machine(kernel.path(), disk.path(), from));
            first.snapshot(&path, AfterSnapshot::Stop).unwrap();
            let passes = count(&first);
            drop(first);
            let config = machine(kernel.path(), disk.path(), to);
            match restored(&config, &path, true) {
                // Hardware that has all the features, and scales the counter.
                Ok(_) => {}
                Err(VmError::Incompatible(why)) => assert!(why.contains("CPUID"), "{why}"),
                Err(VmError::Accel(AccelError::Unsupported(why))) => assert!(why.contains("kHz"), "{why}"),
                Err(other) => panic!("{from:?} to {to:?}: {other}"),
            }
            let second = restored(&config, &path, false).unwrap();
            assert_eq!(count(&second), passes);
            second.start().unwrap();
            finishes(&second);
        }
    }
}

#[test]
fn a_machine_that_is_another_is_refused() {
    let (kernel, dir, image) = (kernel(), tempfile::tempdir().unwrap(), disk());
    let path = dir.path().join("saved");
    let good = machine(kernel.path(), image.path(), AccelChoice::Soft);
    let vm = start(good.clone());
    vm.snapshot(&path, AfterSnapshot::Stop).unwrap();
    drop(vm);
    let refused = |change: &dyn Fn(&mut VmConfig), word: &str| {
        let mut config = good.clone();
        change(&mut config);
        let error = restored(&config, &path, true).err().unwrap();
        assert!(matches!(error, VmError::Incompatible(_) | VmError::Lifecycle(_)), "{error}");
        assert!(error.to_string().contains(word), "{word}: {error}");
    };
    refused(&|c| c.cpus = 2, "vCPUs");
    refused(&|c| c.memory.size += 4096, "RAM");
    refused(&|c| c.disks.clear(), "disks");
    refused(&|c| c.disks.push(c.disks[0].clone()), "disks");
    refused(&|c| c.rng = false, "PCI");
    refused(&|c| c.mmio = true, "devices");
    refused(&|c| c.disks[0].readonly = true, "disk");
    image.as_file().set_len(2 << 20).unwrap();
    refused(&|_| {}, "disk");
    image.as_file().set_len(1 << 20).unwrap();
    assert!(restored(&good, &path, true).is_ok());
}

#[test]
fn what_cannot_be_saved_is_named() {
    let (kernel, dir) = (kernel(), tempfile::tempdir().unwrap());
    let config = VmConfig {
        test_devices: true,
        debug_ports: false,
        ..super::config(kernel.path(), AccelChoice::Soft)
    };
    let vm = Vm::builder(config).build().unwrap();
    let path = dir.path().join("saved");
    assert!(matches!(vm.snapshot(&path, AfterSnapshot::Resume), Err(VmError::CannotSave(_))));
    assert!(!path.exists());
}

/// A card keeps the random MAC address that its guest knows.
#[test]
fn a_network_card_keeps_its_address() {
    let (kernel, dir) = (kernel(), tempfile::tempdir().unwrap());
    let (path, socket) = (dir.path().join("saved"), dir.path().join("net"));
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let mut config = super::config(kernel.path(), AccelChoice::Soft);
    let net = serde_json::json!({"backend": NetBackendConfig::Unix(socket)});
    config.nets.push(serde_json::from_value(net).unwrap());
    let vm = start(config.clone());
    vm.snapshot(&path, AfterSnapshot::Stop).unwrap();
    drop(vm);
    let again = dir.path().join("again");
    restored(&config, &path, true).unwrap().snapshot(&again, AfterSnapshot::Stop).unwrap();
    let address = |path| {
        let mut reader = StreamReader::new(std::fs::File::open(path).unwrap()).unwrap();
        let Record::Description(description) = reader.read().unwrap() else { panic!("no description") };
        description.macs.clone()
    };
    assert_eq!(address(&path), address(&again));
    config.nets[0].mac = Some("52:54:00:00:00:77".into());
    assert!(matches!(restored(&config, &path, true), Err(VmError::Incompatible(_))));
    drop(listener);
}

/// Files that were cut or changed, and states that no machine has, are errors.
#[test]
fn damaged_files_are_refused() {
    let (kernel, dir) = (kernel(), tempfile::tempdir().unwrap());
    let path = dir.path().join("saved");
    let config = super::config(kernel.path(), AccelChoice::Soft);
    let vm = start(config.clone());
    vm.snapshot(&path, AfterSnapshot::Stop).unwrap();
    drop(vm);
    let bytes = std::fs::read(&path).unwrap();
    let restore = |bytes: &[u8]| Vm::builder(config.clone()).restore_from(bytes, &RestoreOptions::default());
    assert!(restore(&bytes).is_ok());
    for cut in [0, 15, 20, 500, bytes.len() / 2, bytes.len() - 17, bytes.len() - 1] {
        let error = restore(&bytes[..cut]).err().unwrap();
        assert!(matches!(error, VmError::Stream(StreamError::Truncated)), "cut at {cut}: {error}");
    }
    let longer = [bytes.as_slice(), &[0]].concat();
    assert!(matches!(restore(&longer), Err(VmError::Stream(StreamError::Malformed(_)))));
    for at in (0..bytes.len()).step_by(bytes.len() / 40) {
        let mut bad = bytes.clone();
        bad[at] ^= 0x10;
        assert!(matches!(restore(&bad), Err(VmError::Stream(_))), "byte {at}");
    }

    // Well-formed, and impossible.
    let edited = |change: &dyn Fn(&mut vmm_core::migration::MachineState)| {
        let mut reader = StreamReader::new(bytes.as_slice()).unwrap();
        let mut writer = StreamWriter::new(Vec::new()).unwrap();
        loop {
            let mut record = reader.read().unwrap();
            if let Record::State(state) = &mut record {
                change(state);
            }
            writer.write(&record).unwrap();
            if record == Record::End {
                return restore(writer.get_mut());
            }
        }
    };
    assert!(edited(&|_| {}).is_ok());
    // All of memory named as zeros, which a file of a few records could do for ever.
    let mut reader = StreamReader::new(bytes.as_slice()).unwrap();
    let mut writer = StreamWriter::new(Vec::new()).unwrap();
    writer.write(&reader.read().unwrap()).unwrap();
    writer.write(&Record::Zeros(vec![(0, 16 << 20)])).unwrap();
    assert!(matches!(restore(writer.get_mut()), Err(VmError::Stream(StreamError::Malformed(_)))));
    assert!(edited(&|s| s.cpus.clear()).is_err());
    assert!(edited(&|s| s.cpus[0].registers.cr0 = 0x8000_0000).is_err());
    assert!(edited(&|s| s.cpus[0].registers.cr4 = 1 << 18).is_err(), "a register that this processor lacks");
    assert!(edited(&|s| s.cpus[0].extra.apic.registers.truncate(3)).is_err());
    assert!(edited(&|s| s.chipset.ioapic.levels = u32::MAX).is_err());
    assert!(edited(&|s| drop(s.devices.remove("serial"))).is_err());
    assert!(edited(&|s| s.devices.insert("rtc".into(), "noon".into()).map_or((), drop)).is_err());
}

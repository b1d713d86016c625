//! Any access to any range of guest memory is answered, and reads what was last written.
#![no_main]

use fuzz::reached;
use libfuzzer_sys::fuzz_target;
use vmm_core::memory::{GuestMemory, MemoryRegion, RegionOptions};

fuzz_target!(|ops: Vec<(u64, u16, u8)>| {
    let options = RegionOptions::default();
    let region = |at, size| MemoryRegion::allocate(at, size, &options).expect("memory");
    let memory = GuestMemory::new(vec![region(0, 0x3000), region(0x3000, 0x1000), region(0x8000, 0x2000)])
        .expect("layout");
    let ram = |at: u64| at < 0x4000 || (0x8000..0xa000).contains(&at);
    let mut model = vec![0u8; 0xa000];
    for (address, len, value) in ops {
        // Mostly near RAM, sometimes anywhere.
        let address = if value & 1 == 0 { address % 0xb000 } else { address };
        let len = usize::from(len) % 0x5000;
        let data = vec![value; len];
        let inside = (0..len as u64).all(|i| address.checked_add(i).is_some_and(ram));
        assert_eq!(memory.write(address, &data).is_ok(), inside || len == 0);
        if inside && (0x2000..0x3000).contains(&address) && address + len as u64 > 0x3000 {
            reached("across");
        }
        if !inside && len > 0 {
            reached("refused");
        }
        if inside && len > 0 {
            model[address as usize..address as usize + len].fill(value);
        }
        let mut back = vec![0; len];
        if memory.read(address, &mut back).is_ok() && len > 0 {
            assert_eq!(back, model[address as usize..address as usize + len]);
        }
    }
});

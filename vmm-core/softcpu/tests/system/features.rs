//! What CPUID announces exists; what it does not announce does not.

use iced_x86::code_asm::*;
use softcpu::{Clock, CpuConfig, CpuModel};

use super::rig::*;

fn rig(model: CpuModel) -> Rig {
    Rig::with_config(CpuConfig { model, ..CpuConfig::new(std::sync::Arc::new(Clock::host(1_000_000))) })
}

/// EAX, EBX, ECX and EDX of a leaf, as the guest reads them.
fn cpuid(rig: &mut Rig, leaf: u32) -> [u64; 4] {
    let end = rig.execute(&Rig::long_mode(), |a| {
        a.mov(eax, leaf).unwrap();
        a.xor(ecx, ecx).unwrap();
        a.cpuid().unwrap();
        a.hlt().unwrap();
    });
    [end.gpr[0], end.gpr[3], end.gpr[1], end.gpr[2]]
}

/// Whether code raises #UD.
fn undefined(rig: &mut Rig, code: &[u8]) -> bool {
    let mut s = Rig::long_mode();
    s.gpr[3] = WINDOW_RAM;
    let mut bytes = code.to_vec();
    bytes.push(0xf4);
    rig.memory.write(CODE, &bytes).unwrap();
    rig.cpu.set_state(&s);
    rig.run();
    rig.frame().is_some_and(|f| (f.vector, f.rip) == (6, CODE))
}

/// Bit of function 1, ECX, and an instruction that comes with it.
const OF_V2: [(u32, &[u8]); 5] = [
    (9, &[0x66, 0x0f, 0x38, 0x00, 0xc1]),        // pshufb xmm0, xmm1
    (19, &[0x66, 0x0f, 0x38, 0x40, 0xc1]),       // pmulld xmm0, xmm1
    (19, &[0x66, 0x0f, 0x3a, 0x0e, 0xc1, 0x55]), // pblendw xmm0, xmm1, 0x55
    (20, &[0xf2, 0x0f, 0x38, 0xf1, 0xc3]),       // crc32 eax, ebx
    (23, &[0xf3, 0x0f, 0xb8, 0xc3]),             // popcnt eax, ebx
];

#[test]
fn the_models_have_the_instructions_that_they_announce() {
    for (model, has) in [(CpuModel::V1, false), (CpuModel::V2, true)] {
        let mut rig = rig(model);
        let features = cpuid(&mut rig, 1)[2];
        for (bit, code) in OF_V2 {
            assert_eq!(features >> bit & 1 != 0, has, "{model:?}, bit {bit}");
            assert_eq!(undefined(&mut rig, code), !has, "{model:?}, {code:02x?}");
        }
        // The baseline is in both: SSE2, SSE3 and CMPXCHG16B.
        assert!(!undefined(&mut rig, &[0x66, 0x0f, 0xd4, 0xc1]));
        assert!(!undefined(&mut rig, &[0xf2, 0x0f, 0x7c, 0xc1]));
        assert!(!undefined(&mut rig, &[0x48, 0x0f, 0xc7, 0x0b]));
    }
}

#[test]
fn what_is_not_announced_does_not_exist() {
    let mut rig = rig(CpuModel::V2);
    let [_, ebx_7, ecx_7, _] = cpuid(&mut rig, 7);
    let ecx_1 = cpuid(&mut rig, 1)[2];
    // Bits of function 7, EBX (SMAP 20, INVPCID 10) and ECX (UMIP 2); CR4 bits; instructions.
    assert_eq!((ebx_7 >> 20 & 1, ebx_7 >> 10 & 1, ecx_7 >> 2 & 1), (0, 0, 0));
    assert_eq!(ecx_1 >> 17 & 1, 0, "PCID");
    assert_eq!(ecx_1 >> 26 & 1, 0, "XSAVE");
    assert!(undefined(&mut rig, &[0x0f, 0x01, 0xca]), "CLAC");
    assert!(undefined(&mut rig, &[0x0f, 0x01, 0xcb]), "STAC");
    assert!(undefined(&mut rig, &[0x66, 0x0f, 0x38, 0x82, 0x03]), "INVPCID");
    assert!(undefined(&mut rig, &[0x0f, 0x01, 0xd0]), "XGETBV");
    assert!(undefined(&mut rig, &[0x0f, 0x38, 0xf0, 0x03]), "MOVBE");
    assert!(undefined(&mut rig, &[0x66, 0x0f, 0xae, 0x3b]), "CLFLUSHOPT");
    assert!(undefined(&mut rig, &[0x66, 0x0f, 0xae, 0x33]), "CLWB");
    for (name, bit) in [("UMIP", 11), ("LA57", 12), ("PCIDE", 17), ("OSXSAVE", 18), ("SMAP", 21), ("PKE", 22)]
    {
        let set = |a: &mut CodeAssembler| {
            a.mov(rax, cr4).unwrap();
            a.bts(rax, bit).unwrap();
            a.mov(cr4, rax).unwrap();
        };
        assert_eq!(rig.fault(&Rig::long_mode(), set).map(|f| f.0), Some(13), "CR4.{name}");
    }
    // CR3 has no bit that keeps translations, and its low bits are no process-context identifier.
    let keep = |a: &mut CodeAssembler| {
        a.mov(rax, cr3).unwrap();
        a.bts(rax, 63).unwrap();
        a.mov(cr3, rax).unwrap();
    };
    assert_eq!(rig.fault(&Rig::long_mode(), keep).map(|f| f.0), Some(13));
}

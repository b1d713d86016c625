//! Instructions on a processor that has registers and a little flat memory only.

use iced_x86::{Decoder, DecoderOptions};

use super::exec::{Guest, Trap};
use super::*;
use crate::state::FpuState;

struct Mock {
    fpu: FpuState,
    resident: Resident,
    /// One more than there are: see [`Guest::gpr_address`].
    gpr: [u64; 17],
    flags: u64,
    memory: Vec<u8>,
    stubs: StubCache,
}

#[derive(Debug, PartialEq)]
enum MockFault {
    Trap(Trap),
    Page,
}

impl Guest for Mock {
    type Fault = MockFault;
    fn raise_trap(&mut self, trap: Trap) -> MockFault {
        MockFault::Trap(trap)
    }
    fn misaligned(&mut self, _address: u64) -> MockFault {
        MockFault::Trap(Trap::GeneralProtection)
    }
    fn units(&mut self) -> (&mut Resident, &mut FpuState) {
        (&mut self.resident, &mut self.fpu)
    }
    fn gpr_address(&mut self, number: u8) -> *mut u64 {
        &raw mut self.gpr[usize::from(number)]
    }
    fn status_flags(&mut self) -> u64 {
        self.flags
    }
    fn set_status_flags(&mut self, value: u64) {
        self.flags = value;
    }
    fn cr4(&self) -> u64 {
        0x6a0
    }
    fn block_start(&self) -> u64 {
        0x1234
    }
    fn read(&mut self, address: u64, data: &mut [u8]) -> Result<(), MockFault> {
        let start = address as usize;
        data.copy_from_slice(self.memory.get(start..start + data.len()).ok_or(MockFault::Page)?);
        Ok(())
    }
    fn probe_write(&mut self, address: u64, length: usize) -> Result<(), MockFault> {
        let start = address as usize;
        self.memory.get(start..start + length).map(drop).ok_or(MockFault::Page)
    }
    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), MockFault> {
        let start = address as usize;
        self.memory.get_mut(start..start + data.len()).ok_or(MockFault::Page)?.copy_from_slice(data);
        Ok(())
    }
}

impl Mock {
    fn new() -> Self {
        let mut stubs = StubCache::default();
        stubs.announce(u32::MAX, u32::MAX);
        Self {
            fpu: FpuState::default(),
            resident: Resident::default(),
            gpr: [0; 17],
            flags: 0,
            memory: vec![0; 4096],
            stubs,
        }
    }

    /// Runs an instruction and moves all state to memory.
    fn run(&mut self, bytes: &[u8], address: u64) -> Result<(), MockFault> {
        let result = self.step(bytes, address);
        self.fpu();
        result
    }

    fn step(&mut self, bytes: &[u8], address: u64) -> Result<(), MockFault> {
        let instruction = Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE).decode();
        assert_eq!(instruction.len(), bytes.len());
        let op = translate(&instruction, &mut self.stubs).expect("translated");
        op.execute(self, address)
    }
}

#[test]
fn what_is_not_announced_is_not_translated() {
    let pshufb = [0x66, 0x0f, 0x38, 0x00, 0xc1];
    let instruction = Decoder::with_ip(64, &pshufb, 0, DecoderOptions::NONE).decode();
    let mut stubs = StubCache::default();
    stubs.announce(1, 0);
    assert!(translate(&instruction, &mut stubs).is_none());
    stubs.announce(1 | 1 << 9, 0);
    assert!(translate(&instruction, &mut stubs).is_some());
}

#[test]
fn packed_integers() {
    let mut cpu = Mock::new();
    cpu.fpu.xmm[9] = 0x01ff;
    cpu.fpu.xmm[3] = 0x0101;
    cpu.run(&[0x66, 0x44, 0x0f, 0xfc, 0xcb], 0).unwrap(); // paddb xmm9, xmm3
    assert_eq!(cpu.fpu.xmm[9], 0x0200);
    assert_eq!(cpu.fpu.xmm[3], 0x0101);
}

#[test]
fn misaligned_operand_faults() {
    let mut cpu = Mock::new();
    let before = cpu.fpu;
    let paddb = [0x66, 0x0f, 0xfc, 0x06]; // paddb xmm0, [rsi]
    assert_eq!(cpu.run(&paddb, 8), Err(MockFault::Trap(Trap::GeneralProtection)));
    assert_eq!(cpu.run(&paddb, 0x10_0000), Err(MockFault::Page));
    assert_eq!(cpu.fpu, before);
}

#[test]
fn float_arithmetic_collects_and_raises_exceptions() {
    let mut cpu = Mock::new();
    cpu.fpu.xmm[0] = u128::from(1f64.to_bits());
    cpu.fpu.xmm[1] = u128::from(3f64.to_bits());
    let divsd = [0xf2, 0x0f, 0x5e, 0xc1]; // divsd xmm0, xmm1
    cpu.run(&divsd, 0).unwrap();
    assert_eq!(cpu.fpu.xmm[0], u128::from((1f64 / 3f64).to_bits()));
    assert_eq!(cpu.fpu.mxcsr, 0x1fa0);
    cpu.fpu.xmm[1] = 0;
    cpu.fpu.mxcsr &= !(1 << 9);
    let before = cpu.fpu.xmm;
    assert_eq!(cpu.run(&divsd, 0), Err(MockFault::Trap(Trap::Simd)));
    assert_eq!(cpu.fpu.xmm, before);
    assert_eq!(cpu.fpu.mxcsr, 0x1da4);
}

#[test]
fn general_register_results_and_flags() {
    let mut cpu = Mock::new();
    cpu.fpu.xmm[2] = u128::from((-7.9f64).to_bits());
    cpu.gpr[12] = u64::MAX;
    cpu.run(&[0xf2, 0x44, 0x0f, 0x2c, 0xe2], 0).unwrap(); // cvttsd2si r12d, xmm2
    assert_eq!(cpu.gpr[12], 0xffff_fff9);
    cpu.flags = 0x8d5;
    cpu.run(&[0x66, 0x0f, 0x2e, 0xd2], 0).unwrap(); // ucomisd xmm2, xmm2
    assert_eq!(cpu.flags, 0x40);
    cpu.gpr[1] = 0xff00;
    cpu.run(&[0xf2, 0x0f, 0x38, 0xf0, 0xc5], 0).unwrap(); // crc32 eax, ch
    assert_eq!(cpu.gpr[0], 0xad7d_5351);
}

#[test]
fn string_comparison_returns_an_index() {
    let mut cpu = Mock::new();
    cpu.fpu.xmm[1] = u128::from_le_bytes(*b"x\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    cpu.memory[1..17].copy_from_slice(b"abcx000000000000");
    cpu.gpr[1] = u64::MAX;
    cpu.run(&[0x66, 0x0f, 0x3a, 0x63, 0x0e, 0x00], 1).unwrap(); // pcmpistri xmm1, [rsi], 0
    assert_eq!(cpu.gpr[1], 3);
    assert_eq!(cpu.flags & 1, 1);
}

#[test]
fn x87_keeps_extended_precision_and_restarts() {
    let mut cpu = Mock::new();
    cpu.memory[..8].copy_from_slice(&3f64.to_le_bytes());
    cpu.run(&[0xd9, 0xe8], 0).unwrap(); // fld1
    cpu.run(&[0xdc, 0x36], 0).unwrap(); // fdiv qword [rsi]
    assert_eq!(cpu.fpu.st[0], 0x3ffd_aaaa_aaaa_aaaa_aaab);
    let before = cpu.fpu;
    assert_eq!(cpu.run(&[0xdb, 0x3e], 1 << 20), Err(MockFault::Page)); // fstp tbyte [rsi]
    assert_eq!(cpu.fpu, before);
    cpu.run(&[0xdb, 0x3e], 16).unwrap();
    assert_eq!(cpu.memory[16..26], before.st[0].to_le_bytes()[..10]);
    assert_eq!(cpu.fpu.ftw, 0);
    // With exceptions unmasked the error waits for the next instruction.
    cpu.fpu.fcw = 0x37e;
    cpu.run(&[0xd9, 0xe0], 0).unwrap(); // fchs on an empty stack
    assert_eq!(cpu.fpu.fsw & 0x80c1, 0x80c1);
    assert_eq!(cpu.fpu.st[0], before.st[7]);
}

#[test]
fn resident_state_gives_the_same_results() {
    let program: [&[u8]; 12] = [
        &[0xd9, 0xeb],             // fldpi
        &[0xd9, 0xe8],             // fld1
        &[0xd8, 0xf1],             // fdiv st, st(1)
        &[0xf2, 0x0f, 0x5e, 0xc1], // divsd xmm0, xmm1
        &[0xd9, 0xfa],             // fsqrt
        &[0x0f, 0xfd, 0x1e],       // paddw mm3, [rsi]
        &[0x0f, 0x77],             // emms
        &[0xd9, 0xee],             // fldz
        &[0xd9, 0x2e],             // fldcw [rsi]
        &[0xf2, 0x0f, 0x51, 0xc8], // sqrtsd xmm1, xmm0
        &[0xdb, 0x3e],             // fstp tbyte [rsi]
        &[0xdf, 0xe0],             // fnstsw ax
    ];
    let run = |settle_each: bool| {
        let mut cpu = Mock::new();
        cpu.fpu.xmm[0] = u128::from(2f64.to_bits());
        cpu.fpu.xmm[1] = u128::from(7f64.to_bits());
        cpu.memory[..2].copy_from_slice(&0x0f7fu16.to_le_bytes());
        for bytes in program {
            cpu.step(bytes, 0).unwrap();
            if settle_each {
                cpu.fpu();
            }
        }
        cpu.fpu();
        (cpu.fpu, cpu.gpr, cpu.memory)
    };
    assert_eq!(run(false), run(true));
}

#[test]
fn mmx_uses_the_low_part_of_x87_registers() {
    let mut cpu = Mock::new();
    cpu.fpu.st[3] = 0x00ff_00ff;
    cpu.memory[..8].copy_from_slice(&0x0001_0001u64.to_le_bytes());
    cpu.run(&[0x0f, 0xfd, 0x1e], 0).unwrap(); // paddw mm3, [rsi]
    assert_eq!(cpu.fpu.st[3], 0xffff_0000_0000_0100_0100);
    assert_eq!(cpu.fpu.ftw, 0xff);
    cpu.run(&[0x0f, 0x77], 0).unwrap(); // emms
    assert_eq!(cpu.fpu.ftw, 0);
}

//! Straight-line sequences of instructions that end in a conditional branch: what single instructions cannot
//! show, such as flags that one instruction leaves and a later one reads, or state kept in between.

use iced_x86::{
    FlowControl, Instruction, InstructionInfoFactory, Mnemonic as M, OpAccess, OpKind, Register, RflagsBits,
};

use super::forms::{Form, decode, uses_fpu};
use super::generate::{self, Addressing, Patches};
use super::layout::{DATA, DATA_LENGTH, DATA_WRITABLE, INSTRUCTION, Mode};
use super::random::Random;
use super::state::State;
use super::{undefined, vendor};

/// Most instructions before the branch.
const LENGTH: u64 = 10;
/// The register that memory operands are relative to; no instruction of a sequence writes to it.
const BASE: Register = Register::RBX;
const BASE_NUMBER: usize = 3;

/// A sequence of instructions.
pub struct Sequence {
    pub mode: Mode,
    pub bytes: Vec<u8>,
    pub instructions: Vec<Instruction>,
    pub fpu: bool,
    /// RFLAGS bits that are undefined before each instruction, and at the end.
    pub undefined: Vec<u64>,
}

/// Forms that can be part of a sequence.
pub fn usable(mode: Mode, form: &Form) -> bool {
    let example = &form.example;
    vendor::executes_alike(mode, example)
        && vendor::faults_alike(example)
        && example.flow_control() == FlowControl::Next
        && !example.is_string_instruction()
        && !example.is_privileged()
        && !matches!(
            example.mnemonic(),
            M::Enter | M::Leave | M::Popf | M::Popfd | M::Popfq | M::Popa | M::Popad | M::Pusha | M::Pushad
                | M::Xlatb | M::Maskmovq | M::Maskmovdqu | M::Cmpxchg16b
                // The host would run something else.
                | M::Tzcnt
                | M::Lzcnt
                // Undefined results.
                | M::Shld | M::Shrd
                // They load state that later instructions fault on, or unmask its exceptions.
                | M::Ldmxcsr | M::Fxrstor | M::Fxrstor64 | M::Frstor | M::Fldenv | M::Fldcw
                // Pointers of the x87 unit.
                | M::Fnstenv | M::Fnsave | M::Fxsave | M::Fxsave64
                | M::Hlt | M::Cli | M::Sti | M::In | M::Out
        )
}

impl Sequence {
    /// A random sequence of the usable `forms`.
    pub fn generate(mode: Mode, forms: &[&Form], random: &mut Random) -> Self {
        let mut sequence =
            Self { mode, bytes: Vec::new(), instructions: Vec::new(), fpu: false, undefined: vec![0] };
        // Sequences of x87 and SIMD instructions only, of others only, and mixed ones.
        let kind = random.below(4);
        let count = 2 + random.below(LENGTH - 1);
        for _ in 0..400 {
            if sequence.instructions.len() as u64 == count {
                break;
            }
            let form = random.pick(forms);
            let fpu = uses_fpu(&form.example);
            if kind == 0 && !fpu || kind >= 2 && fpu && !random.percent(10) {
                continue;
            }
            let address = sequence.next();
            if let Some(encoding) = generate::encoding_at(mode, form, address, Addressing::Limited, random) {
                sequence.push(&encoding.bytes, encoding.instruction);
            }
        }
        // Jcc over the five bytes of a jump. Conditions on undefined flags do not qualify.
        sequence.end(random);
        sequence
    }

    /// The address behind the last instruction.
    pub fn next(&self) -> u64 {
        INSTRUCTION + self.bytes.len() as u64
    }

    /// Adds a conditional branch over one jump.
    fn end(&mut self, random: &mut Random) {
        let undefined = self.undefined.last().copied().unwrap_or(0);
        // JRCXZ does not look at flags.
        let choices = (0x70..0x80).chain([0xe3]).filter_map(|opcode| {
            let bytes = [opcode, 5];
            decode(self.mode, self.next(), &bytes).map(|instruction| (bytes, instruction))
        });
        let choices: Vec<_> =
            choices.filter(|(_, instruction)| status(instruction.rflags_read()) & undefined == 0).collect();
        let (bytes, instruction) = random.pick(&choices);
        self.push(&bytes, instruction);
    }

    /// The same without the instruction number `index`, if that is possible.
    fn without(&self, index: usize) -> Option<Self> {
        let mut shorter = Self { bytes: Vec::new(), instructions: Vec::new(), undefined: vec![0], ..*self };
        let mut at = 0;
        for (n, instruction) in self.instructions.iter().enumerate() {
            let bytes = &self.bytes[at..at + instruction.len()];
            at += instruction.len();
            if n != index {
                let moved = decode(self.mode, shorter.next(), bytes)?;
                if !shorter.push(bytes, moved) {
                    return None;
                }
            }
        }
        Some(shorter)
    }

    /// Leaves out what is not needed for `fails`.
    pub fn shrink(&self, mut fails: impl FnMut(&Self) -> bool) -> Option<Self> {
        let mut smallest: Option<Self> = None;
        let mut index = 0;
        loop {
            let current = smallest.as_ref().unwrap_or(self);
            // The branch stays.
            if index + 1 >= current.instructions.len() {
                return smallest;
            }
            match current.without(index) {
                Some(shorter) if fails(&shorter) => smallest = Some(shorter),
                _ => index += 1,
            }
        }
    }

    fn push(&mut self, bytes: &[u8], instruction: Instruction) -> bool {
        let before = self.undefined.last().copied().unwrap_or(0);
        if !keeps_base(&instruction) || status(instruction.rflags_read()) & before != 0 {
            return false;
        }
        let maybe = undefined::any_flags(&instruction);
        let kept = if undefined::may_keep_flags(&instruction) {
            before
        } else {
            before & !status(instruction.rflags_modified())
        };
        self.undefined.push(kept | maybe);
        self.fpu |= uses_fpu(&instruction);
        self.bytes.extend_from_slice(bytes);
        self.instructions.push(instruction);
        true
    }

    /// RFLAGS bits that are undefined when execution stops at `rip`.
    pub fn undefined_at(&self, rip: u64) -> u64 {
        let index = self.instructions.iter().position(|instruction| instruction.ip() == rip);
        let at = index.unwrap_or(self.instructions.len());
        self.undefined.get(at).copied().unwrap_or(0)
    }

    /// Random input.
    pub fn input(&self, random: &mut Random, patches: &mut Patches) -> State {
        let mut state = generate::registers(self.fpu, random);
        // What a sequence leaves unmasked would stop it early.
        state.fx.mxcsr |= 0x1f80;
        state.fx.fcw |= 0x3f;
        state.fx.fsw &= !0x8080;
        state.gpr[4] = DATA + DATA_WRITABLE / 2 + 64 * random.below(8);
        state.gpr[BASE_NUMBER] = DATA + 1024 + random.below(64) * 8;
        for register in &mut state.gpr {
            *register &= self.mode.mask();
        }
        patches.clear();
        for _ in 0..4 {
            patches
                .push((DATA + 16 * random.below(DATA_WRITABLE / 16), random.vector().to_le_bytes().to_vec()));
        }
        state
    }
}

/// Whether the instruction leaves RBX and, but for PUSH and POP, RSP alone, and addresses memory with constants
/// or relative to RBX.
fn keeps_base(instruction: &Instruction) -> bool {
    let mut factory = InstructionInfoFactory::new();
    let stack = matches!(instruction.mnemonic(), M::Push | M::Pop | M::Pushf | M::Pushfd | M::Pushfq);
    let info = factory.info(instruction);
    let writes = |access| {
        !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess)
    };
    let spoils = info.used_registers().iter().any(|used| {
        let register = used.register().full_register();
        writes(used.access()) && (register == BASE || register == Register::RSP && !stack)
    });
    let explicit_rsp = instruction.op_count() > 0
        && instruction.op0_kind() == OpKind::Register
        && instruction.op0_register().full_register() == Register::RSP;
    let base = instruction.memory_base().full_register();
    let memory = (0..instruction.op_count()).any(|i| instruction.op_kind(i) == OpKind::Memory);
    let displacement = instruction.memory_displacement64();
    let near = match base {
        BASE => displacement.wrapping_add(128) < 256,
        Register::None | Register::RIP => (DATA..DATA + DATA_LENGTH).contains(&displacement),
        _ => false,
    };
    let bit_string = memory
        && matches!(instruction.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
        && instruction.op1_kind() == OpKind::Register;
    let pops_rsp = explicit_rsp && instruction.mnemonic() == M::Pop;
    !(spoils || pops_rsp) && (!memory || near && instruction.memory_index() == Register::None && !bit_string)
}

/// Converts the decoder's flag bits to RFLAGS positions.
fn status(bits: u32) -> u64 {
    [
        (RflagsBits::CF, undefined::CF),
        (RflagsBits::PF, undefined::PF),
        (RflagsBits::AF, undefined::AF),
        (RflagsBits::ZF, undefined::ZF),
        (RflagsBits::SF, undefined::SF),
        (RflagsBits::OF, undefined::OF),
    ]
    .into_iter()
    .filter(|&(bit, _)| bits & bit != 0)
    .fold(0, |mask, (_, flag)| mask | flag)
}

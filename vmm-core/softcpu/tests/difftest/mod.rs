//! Differential test: random instructions on random inputs, run by the host's processor and by the software
//! processor, must leave the same registers, flags and memory and raise the same exception.
//!
//! Single instructions of every form run in 64-, 32- and 16-bit code, sequences of them in 64- and 32-bit code.
//! What the architecture leaves undefined is listed in [`undefined`]. The software processor follows AMD's; where
//! vendors differ ([`vendor`]), only a host of AMD's can tell.

pub mod forms;
mod generate;
mod guest;
mod kvm;
pub mod layout;
mod native;
mod random;
mod report;
mod sequence;
pub mod soft;
pub mod state;
mod undefined;
mod vendor;

use iced_x86::{Code, Instruction, Mnemonic as M};

use forms::Form;
use generate::{Encoding, Patches};
use kvm::Kvm;
pub use layout::Mode;
use layout::{DATA, DATA_WRITABLE};
use native::Native;
use random::Random;
use sequence::Sequence;
use soft::Soft;
use state::{Exception, Outcome, State};

/// Inputs that each encoding runs with.
const INPUTS: u64 = 32;
/// Encodings of a form that are tried until a case of one of them completes.
const MORE_TURNS: usize = 100;
/// Mismatches of one opcode that are printed.
const REPORTS: usize = 1;
const SEQUENCE_REPORTS: usize = 8;

/// Misaligned SSE mode, which AMD processors have.
const MXCSR_MM: u32 = 1 << 17;

/// Addresses from here on are the kernel's.
const KERNEL: u64 = 0x7fff_ffff_f000;

/// What to run.
pub struct Options {
    pub cases: u64,
    pub seed: u64,
    /// Only this mode.
    pub mode: Option<Mode>,
    /// Only this mnemonic.
    pub only: Option<String>,
    /// Run single instructions in a machine of KVM as well.
    pub kvm: bool,
    /// Translate everything to machine code before it is executed.
    pub translate: bool,
}

/// What a run found.
#[derive(Default)]
pub struct Summary {
    pub cases: u64,
    pub faults: u64,
    pub forms: usize,
    /// Forms of which no case completed.
    pub missed: std::collections::BTreeSet<String>,
    /// Mnemonics with mismatches, how many, and the first one in full.
    pub mismatches: std::collections::BTreeMap<String, (u64, Vec<String>)>,
    /// The same for cases in which KVM did something else than the host's processor outside of it.
    pub dissents: std::collections::BTreeMap<String, (u64, Vec<String>)>,
}

impl Summary {
    /// Nothing differs. A KVM that is software itself executes some instructions (most that raise `#GP`, some with
    /// prefixes that have no meaning) by an emulator that knows less than a processor: a few dissents are no failure.
    pub fn passed(&self) -> bool {
        let dissents: u64 = self.dissents.values().map(|(count, _)| count).sum();
        self.mismatches.is_empty() && self.missed.is_empty() && dissents <= self.cases / 50
    }
}

/// Runs `options.cases` cases.
pub fn run(options: &Options) -> Summary {
    let forms: Vec<(Mode, Form)> = Mode::ALL
        .into_iter()
        .filter(|&mode| options.mode.is_none_or(|only| only == mode))
        .flat_map(|mode| forms::all(mode, options.only.as_deref()).into_iter().map(move |form| (mode, form)))
        .collect();
    assert!(!forms.is_empty(), "no such mnemonic");
    let mut machines = Machines {
        native: Native::new(),
        soft: Soft::new(options.translate),
        kvm: options.kvm.then(Kvm::new),
    };
    machines.fill_read_only(&mut Random::new(options.seed));
    let mut random = Random::new(options.seed);
    let mut summary = Summary { forms: forms.len(), ..Summary::default() };
    let mut next = 0;
    let mut completed = vec![0; forms.len()];
    let usable = [Mode::Long, Mode::Compat].map(|mode| {
        let of_mode = forms.iter().filter(|(form_mode, _)| *form_mode == mode);
        let usable = of_mode.map(|(_, form)| form).filter(|form| sequence::usable(mode, form));
        (mode, usable.collect::<Vec<_>>())
    });
    while summary.cases < options.cases {
        for (mode, usable) in usable.iter().filter(|(_, usable)| !usable.is_empty()) {
            machines.test_sequence(*mode, usable, &mut random, &mut summary);
        }
        // All forms in turn: a run covers each of them equally.
        let (mode, form) = &forms[next % forms.len()];
        completed[next % forms.len()] += machines.test_form(*mode, form, &mut random, &mut summary);
        next += 1;
    }
    if next >= forms.len() {
        // Each form had its turn. Those whose cases all raised exceptions get more, and have to make use of them.
        for ((mode, form), mut completed) in forms.iter().zip(completed) {
            let unable = always_faults(&form.example) || !vendor::executes_alike(*mode, &form.example);
            for _ in 0..if unable { 0 } else { MORE_TURNS } {
                if completed > 0 {
                    break;
                }
                completed += machines.test_form(*mode, form, &mut random, &mut summary);
            }
            if completed == 0 && !unable {
                summary.missed.insert(format!("{:?} {mode:?}", form.example.code()));
            }
        }
    }
    let translated = machines.soft.translated();
    assert_eq!(
        options.translate,
        translated > 0,
        "{translated} blocks translated; is the feature `native` on?"
    );
    summary
}

struct Machines {
    native: Native,
    soft: Soft,
    kvm: Option<Kvm>,
}

impl Machines {
    fn fill_read_only(&mut self, random: &mut Random) {
        let content: Vec<u8> = (0..512).flat_map(|_| random.integer().to_le_bytes()).collect();
        self.native.change_read_only(|page| page.copy_from_slice(&content));
        self.soft.data()[DATA_WRITABLE as usize..].copy_from_slice(&content);
    }

    /// Returns how many cases completed without an exception.
    fn test_form(&mut self, mode: Mode, form: &Form, random: &mut Random, summary: &mut Summary) -> u64 {
        let Some(encoding) = (0..20).find_map(|_| generate::encoding(mode, form, random)) else { return 0 };
        let mut completed = 0;
        self.native.place(mode, &encoding.native_bytes(), encoding.fpu);
        self.soft.place(&encoding.bytes);
        if let Some(kvm) = &mut self.kvm {
            kvm.place(&encoding.bytes);
        }
        let mut patches = Patches::new();
        for _ in 0..INPUTS {
            let input = generate::input(&encoding, random, &mut patches);
            let before = self.patch(&patches);
            if let Some(kvm) = &mut self.kvm {
                kvm.data().copy_from_slice(self.native.data());
            }
            let native = self.native.run(mode, &input, encoding.fpu);
            let soft = self.soft.run(mode, &input, 1);
            summary.cases += 1;
            if native.state.fx.mxcsr & MXCSR_MM != 0 {
                // Loaded from random memory; the guest's processor does not know the bit.
                continue;
            }
            summary.faults += u64::from(native.exception.is_some());
            completed += u64::from(native.exception.is_none());
            let fault = native.exception.is_some() || soft.exception.is_some();
            if fault && !vendor::faults_alike(&encoding.instruction) {
                self.equalise();
                continue;
            }
            let difference = compare(&encoding, &input, &native, &soft);
            if let Some((operand, _)) = patches.last() {
                ignore_undefined(&encoding, &input, *operand, self.native.data(), self.soft.data());
            }
            self.test_in_kvm(&encoding, &input, &patches, &native, summary);
            let same_memory = self.native.data() == self.soft.data();
            if difference.is_some() || !same_memory {
                let entry = summary.mismatches.entry(format!("{:?}", encoding.instruction.mnemonic()));
                let (count, reports) = entry.or_default();
                *count += 1;
                if reports.len() < REPORTS {
                    let memory = (&*self.native.data(), &*self.soft.data());
                    let (native, soft) = (&native, &soft);
                    reports
                        .push(report::mismatch(&encoding, &input, &before, native, soft, memory, difference));
                }
            }
            if !same_memory {
                self.equalise();
            }
        }
        completed
    }

    fn test_sequence(&mut self, mode: Mode, forms: &[&Form], random: &mut Random, summary: &mut Summary) {
        let sequence = Sequence::generate(mode, forms, random);
        self.place_sequence(&sequence);
        let mut patches = Patches::new();
        for _ in 0..INPUTS {
            let input = sequence.input(random, &mut patches);
            self.patch(&patches);
            let memory = self.native.data().to_vec();
            summary.cases += 1;
            let (native, _, difference) = self.run_sequence(&sequence, &input, &memory);
            summary.faults += u64::from(native.exception.is_some());
            if difference.is_none() {
                continue;
            }
            let (count, reports) = summary.mismatches.entry("Sequence".into()).or_default();
            *count += 1;
            if reports.len() < SEQUENCE_REPORTS {
                let smallest = sequence.shrink(|shorter| {
                    self.place_sequence(shorter);
                    let (.., difference) = self.run_sequence(shorter, &input, &memory);
                    difference.is_some()
                });
                let smallest = smallest.as_ref().unwrap_or(&sequence);
                self.place_sequence(smallest);
                let (native, soft, difference) = self.run_sequence(smallest, &input, &memory);
                let after = (&*self.native.data(), &*self.soft.data());
                let what = difference.unwrap_or_default();
                reports.push(report::sequence(smallest, &input, &memory, &native, &soft, after, &what));
                self.place_sequence(&sequence);
            }
            self.equalise();
        }
    }

    fn place_sequence(&mut self, sequence: &Sequence) {
        self.native.place(sequence.mode, &sequence.bytes, sequence.fpu);
        self.soft.place(&sequence.bytes);
    }

    /// Runs what was placed with `memory` as the data; returns both outcomes and what differs.
    fn run_sequence(
        &mut self,
        sequence: &Sequence,
        input: &State,
        memory: &[u8],
    ) -> (Outcome, Outcome, Option<String>) {
        let writable = DATA_WRITABLE as usize;
        self.native.data()[..writable].copy_from_slice(&memory[..writable]);
        self.soft.data()[..writable].copy_from_slice(&memory[..writable]);
        let native = self.native.run(sequence.mode, input, sequence.fpu);
        let soft = self.soft.run(sequence.mode, input, sequence.instructions.len() as u64);
        let undefined = sequence.undefined_at(native.state.rip);
        let registers = sequence.mode.registers();
        let difference = if native.exception != soft.exception {
            Some("exception".into())
        } else {
            compare_state(
                &native.state,
                &soft.state,
                &Ignored { registers, flags: undefined, ..Ignored::default() },
            )
        };
        let memory = self.native.data() != self.soft.data();
        (native, soft, difference.or(memory.then(|| "memory".into())))
    }

    /// Gives both machines the same memory again.
    fn equalise(&mut self) {
        let content = self.native.data().to_vec();
        self.soft.data().copy_from_slice(&content);
    }

    /// Writes the patches to both machines and returns those that applied.
    fn patch(&mut self, patches: &Patches) -> Patches {
        let mut applied = Patches::new();
        for (address, bytes) in patches {
            let Some(start) = address.checked_sub(DATA).filter(|&start| start < DATA_WRITABLE) else {
                continue;
            };
            let end = (start as usize + bytes.len()).min(DATA_WRITABLE as usize);
            let range = start as usize..end;
            let bytes = &bytes[..range.len()];
            self.native.data()[range.clone()].copy_from_slice(bytes);
            self.soft.data()[range].copy_from_slice(bytes);
            applied.push((*address, bytes.to_vec()));
        }
        applied
    }

    /// Compares the outcome on the host's processor with that in a machine of KVM, if one is to take part.
    fn test_in_kvm(
        &mut self,
        encoding: &Encoding,
        input: &State,
        patches: &Patches,
        native: &Outcome,
        summary: &mut Summary,
    ) {
        let Some(kvm) = &mut self.kvm else { return };
        let outcome = kvm.run(encoding.mode, input);
        let difference = compare(encoding, input, native, &outcome);
        if let Some((operand, _)) = patches.last() {
            ignore_undefined(encoding, input, *operand, self.native.data(), kvm.data());
        }
        if difference.is_none() && self.native.data() == kvm.data() {
            return;
        }
        let entry = summary.dissents.entry(format!("{:?}", encoding.instruction.mnemonic()));
        let (count, reports) = entry.or_default();
        *count += 1;
        if reports.len() < REPORTS {
            let memory = (&*self.native.data(), &*kvm.data());
            reports.push(report::mismatch(encoding, input, patches, native, &outcome, memory, difference));
        }
    }
}

/// Makes the bytes equal that the architecture leaves undefined within the memory operand.
fn ignore_undefined(encoding: &Encoding, input: &State, operand: u64, native: &[u8], other: &mut [u8]) {
    for (start, end) in undefined::memory(&encoding.instruction, input) {
        for address in (start..end).map(|offset| operand.wrapping_add(offset)) {
            let Some(at) = address.checked_sub(DATA).filter(|&at| at < DATA_WRITABLE) else { continue };
            other[at as usize] = native[at as usize];
        }
    }
}

/// Whether both raised the same exception. Instructions that the processor splits into many accesses may
/// report another address within the page that faults.
fn same_exception(instruction: &Instruction, native: Option<Exception>, soft: Option<Exception>) -> bool {
    let (Some(native), Some(soft)) = (native, soft) else { return native == soft };
    let split = matches!(
        instruction.mnemonic(),
        M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Fnsave
            | M::Frstor
            | M::Fnstenv
            | M::Fldenv
            | M::Maskmovq
            | M::Maskmovdqu
    );
    // When both operands fault, either may be reported.
    let two = matches!(instruction.mnemonic(), M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq)
        && instruction.is_string_instruction();
    if two && matches!((native.vector, soft.vector), (12..=14, 12..=14)) {
        return true;
    }
    // They probe their last byte first, which may be in another page.
    let area = matches!(instruction.mnemonic(), M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64);
    let shift = if split { 12 } else { 0 };
    // The kernel reports addresses of its own half as present.
    let ignored = u32::from(native.address >= KERNEL || area && native.vector == 14);
    native.vector == soft.vector
        && (native.error ^ soft.error) & !ignored == 0
        && (area || native.address >> shift == soft.address >> shift)
}

/// Whether a program cannot execute the instruction to its end.
fn always_faults(instruction: &Instruction) -> bool {
    instruction.is_privileged()
        || matches!(instruction.mnemonic(), M::Int3 | M::Ud0 | M::Ud1 | M::Ud2)
        // PREFETCHW with a register for its memory operand.
        || matches!(
            instruction.code(),
            Code::Reservednop_rm16_r16_0F0D
                | Code::Reservednop_rm32_r32_0F0D
                | Code::Reservednop_rm64_r64_0F0D
        )
}

/// The first difference that matters.
fn compare(encoding: &Encoding, input: &State, native: &Outcome, soft: &Outcome) -> Option<String> {
    let instruction = &encoding.instruction;
    if !same_exception(instruction, native.exception, soft.exception) {
        return Some("exception".into());
    }
    let simd = native.exception.is_some_and(|exception| exception.vector == 19);
    let completed = native.exception.is_none_or(|exception| exception.vector == 1 || exception.vector == 3);
    // POPA may have loaded registers when it faults.
    let partial = native.exception.is_some() && matches!(instruction.mnemonic(), M::Popa | M::Popad);
    let undefined_result = undefined::result(instruction, input);
    let ignored = Ignored {
        registers: if partial { 0 } else { encoding.mode.registers() },
        register: if undefined_result { undefined::first_register(instruction) } else { None },
        flags: if completed { undefined::flags(instruction, input) } else { 0 },
        mxcsr: if simd { undefined::mxcsr_flags(instruction, input) } else { 0 },
    };
    compare_state(&native.state, &soft.state, &ignored)
}

/// What may differ between two states.
#[derive(Default)]
struct Ignored {
    /// How many general registers count.
    registers: usize,
    /// One that does not.
    register: Option<usize>,
    flags: u64,
    mxcsr: u32,
}

fn compare_state(a: &State, b: &State, ignored: &Ignored) -> Option<String> {
    if a.rip != b.rip {
        return Some("RIP".into());
    }
    if let Some(n) = (0..ignored.registers).find(|&n| Some(n) != ignored.register && a.gpr[n] != b.gpr[n]) {
        return Some(report::GPR_NAMES[n].into());
    }
    let flags = (a.rflags ^ b.rflags) & !ignored.flags;
    if flags != 0 {
        return Some(format!("RFLAGS {flags:#x}"));
    }
    let (x, y) = (&a.fx, &b.fx);
    if (x.fcw, x.fsw, x.ftw) != (y.fcw, y.fsw, y.ftw) {
        return Some("x87 control, status or tag word".into());
    }
    if let Some(n) = (0..8).find(|&n| (x.st[n] ^ y.st[n]) << 48 != 0) {
        return Some(format!("ST({n})"));
    }
    if (x.mxcsr ^ y.mxcsr) & !ignored.mxcsr != 0 {
        return Some("MXCSR".into());
    }
    (0..16).find(|&n| x.xmm[n] != y.xmm[n]).map(|n| format!("XMM{n}"))
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (mnemonic, (count, reports)) in &self.mismatches {
            writeln!(f, "{mnemonic}: {count} mismatches, for example")?;
            for report in reports {
                write!(f, "{report}")?;
            }
        }
        let list = |found: &std::collections::BTreeMap<String, (u64, Vec<String>)>| {
            let names: Vec<String> =
                found.iter().map(|(name, (count, _))| format!("{name}:{count}")).collect();
            if names.is_empty() { "none".into() } else { names.join(" ") }
        };
        if !self.missed.is_empty() {
            writeln!(f, "Not tested: {:?}", self.missed)?;
        }
        if !self.dissents.is_empty() {
            writeln!(f, "KVM differs from the host's processor: {}", list(&self.dissents))?;
        }
        if !vendor::host_is_amd() {
            writeln!(f, "The host's processor is not AMD's: what vendors do differently is not compared")?;
        }
        let (cases, forms, faults) = (self.cases, self.forms, self.faults);
        let mismatches = list(&self.mismatches);
        write!(f, "{cases} cases of {forms} forms, {faults} raised exceptions, mismatches: {mismatches}")
    }
}

//! Runs one instruction on the host's processor, in this process.
//!
//! A generated trampoline loads all registers, jumps to the tested instruction and, when that completes,
//! stores them. A signal handler on its own stack takes over when it does not.

use std::cell::UnsafeCell;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use iced_x86::code_asm::{self as asm, CodeAssembler};

use super::layout::{
    CODE, CODE_LENGTH, DATA, DATA_LENGTH, DATA_WRITABLE, GS_BASE, INSTRUCTION, LDT_CS, LDT_DS, LDT_DS_BASE,
    LDT_DS_LIMIT, Mode, PAGE, USER_CS32, USER_CS64, USER_DS,
};
use softcpu::FpuState;

use super::state::{Exception, Outcome, State};

/// Trampolines and their data.
const TRAMPOLINE: u64 = 0x3000_0000;
const EXCHANGE: u64 = 0x3001_0000;

const INT3: u8 = 0xcc;
/// Length of a near jump.
const JUMP: u64 = 5;

/// What trampolines and the signal handler exchange with the caller.
#[repr(C, align(64))]
struct Exchange {
    fx_in: FpuState,
    fx_out: FpuState,
    gpr_in: [u64; 16],
    gpr_out: [u64; 16],
    flags_in: u64,
    flags_out: u64,
    /// Offset and, for 32-bit code, selector.
    target: u64,
    target_far: u32,
    target_selector: u16,
    host_rsp: u64,
    host_mxcsr: u32,
    /// Set behind a taken branch at the end of a sequence.
    taken: u8,
    /// Set by the signal handler: trap number + 1.
    trap: u64,
    error: u64,
    address: u64,
    rip: u64,
}

macro_rules! field {
    ($field:ident) => {
        EXCHANGE + std::mem::offset_of!(Exchange, $field) as u64
    };
}

/// Where the signal handler resumes; set while an executor exists.
static RESUME: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());

/// The host's processor. One can exist in a process: the addresses are fixed.
pub struct Native {
    /// By mode, then without and with x87 and SSE state.
    run: [[extern "sysv64" fn(); 2]; 3],
    epilogue: [[u64; 2]; 3],
    epilogue_taken: [[u64; 2]; 3],
    exchange: &'static UnsafeCell<Exchange>,
    /// Length of the placed instructions.
    placed: u64,
}

impl Native {
    pub fn new() -> Self {
        map(DATA, DATA_LENGTH, libc::PROT_READ | libc::PROT_WRITE);
        protect(DATA + DATA_WRITABLE, DATA_LENGTH - DATA_WRITABLE, libc::PROT_READ);
        map(CODE, CODE_LENGTH, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
        map(TRAMPOLINE, PAGE, libc::PROT_READ | libc::PROT_WRITE);
        map(EXCHANGE, PAGE, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: the code window was just mapped.
        unsafe { ptr::write_bytes(CODE as *mut u8, INT3, CODE_LENGTH as usize) };
        let mut at = TRAMPOLINE;
        let mut emit = |bits: u32, build: &dyn Fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>| {
            let mut assembler = CodeAssembler::new(bits).expect("assembler");
            build(&mut assembler).expect("trampoline");
            let code = assembler.assemble(at).expect("trampoline");
            let start = at;
            // SAFETY: the trampolines are far smaller than the page that was mapped for them.
            unsafe { ptr::copy_nonoverlapping(code.as_ptr(), start as *mut u8, code.len()) };
            at += (code.len() as u64).next_multiple_of(64);
            assert!(at < TRAMPOLINE + PAGE);
            start
        };
        let entries = Mode::ALL.map(|mode| [false, true].map(|fpu| emit(64, &|a| entry(a, mode, fpu))));
        let long = [false, true].map(|fpu| emit(64, &|a| epilogue(a, fpu)));
        let compat = long.map(|at| emit(32, &|a| a.db(&far_jump(at))));
        let mut taken = |bits, at: u64| {
            emit(bits, &|a| {
                a.mov(asm::byte_ptr(field!(taken)), 1)?;
                a.jmp(at)
            })
        };
        // 16-bit code jumps far to the 64-bit epilogue itself.
        let epilogue = [long, compat, long];
        let epilogue_taken = [long.map(|at| taken(64, at)), compat.map(|at| taken(32, at)), long];
        let resume = emit(64, &leave);
        protect(TRAMPOLINE, PAGE, libc::PROT_READ | libc::PROT_EXEC);
        RESUME.store(resume as *mut u8, Ordering::SeqCst);
        install_handler();
        make_segments();
        load_segments(USER_DS);
        // SAFETY: GS is not used by Rust or the C library on x86-64 Linux.
        let result = unsafe { libc::syscall(libc::SYS_arch_prctl, 0x1001, GS_BASE) };
        assert_eq!(result, 0, "arch_prctl(ARCH_SET_GS)");
        Self {
            // SAFETY: both are complete functions without arguments that preserve callee-saved registers.
            run: entries
                .map(|at| at.map(|at| unsafe { std::mem::transmute::<u64, extern "sysv64" fn()>(at) })),
            epilogue,
            epilogue_taken,
            placed: 0,
            // SAFETY: mapped above for the rest of the process; the cell allows the changes behind it.
            exchange: unsafe { &*(EXCHANGE as *const UnsafeCell<Exchange>) },
        }
    }

    /// Places an instruction or a sequence; `fpu` says whether its runs load and store x87 and SSE state.
    /// Behind it are two jumps: where it ends, and where a branch at the end of a sequence leads.
    pub fn place(&mut self, mode: Mode, bytes: &[u8], fpu: bool) {
        let mut code = [INT3; super::soft::PLACE];
        code[..bytes.len()].copy_from_slice(bytes);
        let mut at = bytes.len();
        for target in
            [self.epilogue, self.epilogue_taken].map(|by_mode| by_mode[mode as usize][usize::from(fpu)])
        {
            let displacement = target.wrapping_sub(INSTRUCTION + at as u64 + JUMP) as u32;
            code[at] = 0xe9;
            code[at + 1..at + 5].copy_from_slice(&displacement.to_le_bytes());
            at += JUMP as usize;
        }
        if mode == Mode::Sixteen {
            // JMP USER_CS64:epilogue with a 32-bit offset.
            let target = self.epilogue[mode as usize][usize::from(fpu)];
            code[bytes.len()] = 0x66;
            code[bytes.len() + 1..bytes.len() + 8].copy_from_slice(&far_jump(target));
        }
        self.placed = bytes.len() as u64;
        // SAFETY: the code window is mapped writable and executable; nothing in it is running.
        unsafe { ptr::copy_nonoverlapping(code.as_ptr(), INSTRUCTION as *mut u8, code.len()) };
    }

    /// The bytes of the data window.
    pub fn data(&mut self) -> &mut [u8] {
        // SAFETY: mapped in `new`; the borrow of `self` keeps tested code from running meanwhile.
        unsafe { std::slice::from_raw_parts_mut(DATA as *mut u8, DATA_LENGTH as usize) }
    }

    /// Makes the read-only page writable for `change`.
    pub fn change_read_only(&mut self, change: impl FnOnce(&mut [u8])) {
        protect(DATA, DATA_LENGTH, libc::PROT_READ | libc::PROT_WRITE);
        change(&mut self.data()[DATA_WRITABLE as usize..]);
        protect(DATA + DATA_WRITABLE, DATA_LENGTH - DATA_WRITABLE, libc::PROT_READ);
    }

    /// Runs what was placed.
    pub fn run(&mut self, mode: Mode, input: &State, fpu: bool) -> Outcome {
        let exchange = self.exchange.get();
        // SAFETY: only this function and the code that it calls use the exchange area; the generator sees
        // to it that tested instructions access nothing but the windows.
        let exchange = unsafe {
            (*exchange).gpr_in = input.gpr;
            (*exchange).flags_in = input.rflags;
            (*exchange).target = INSTRUCTION;
            (*exchange).target_far = (INSTRUCTION - mode.code_base()) as u32;
            (*exchange).target_selector = if mode == Mode::Sixteen { LDT_CS } else { USER_CS32 };
            (*exchange).trap = 0;
            (*exchange).taken = 0;
            if fpu {
                (*exchange).fx_in = input.fx;
            }
            (self.run[mode as usize][usize::from(fpu)])();
            if mode == Mode::Sixteen {
                load_segments(USER_DS);
            }
            &*exchange
        };
        let mut state = State {
            gpr: exchange.gpr_out,
            rflags: exchange.flags_out & !super::state::RFLAGS_RF,
            fx: if fpu { exchange.fx_out } else { input.fx },
            rip: INSTRUCTION + self.placed + if exchange.taken == 0 { 0 } else { JUMP },
        };
        for register in &mut state.gpr {
            *register &= mode.mask();
        }
        let mut exception = None;
        if exchange.trap != 0 {
            let vector = (exchange.trap - 1) as u8;
            state.rip = exchange.rip;
            // Where a taken branch goes is filled with INT3, but for the place of the instruction.
            let landed = vector == 3
                && (CODE..CODE + CODE_LENGTH).contains(&(exchange.rip - 1))
                && !(INSTRUCTION..INSTRUCTION + self.placed + 2 * JUMP).contains(&(exchange.rip - 1));
            // A jump to unmapped memory completes; the fault belongs to the next instruction.
            let fetch = vector == 14 && exchange.error & 0x10 != 0 && exchange.address == exchange.rip;
            if landed {
                state.rip -= 1;
            } else if !(fetch && exchange.rip != INSTRUCTION) {
                let page_fault = vector == 14;
                exception = Some(Exception {
                    vector,
                    error: exchange.error as u32,
                    address: if page_fault { exchange.address } else { 0 },
                });
            }
        }
        Outcome { state, exception }
    }
}

fn entry(a: &mut CodeAssembler, mode: Mode, fpu: bool) -> Result<(), iced_x86::IcedError> {
    for register in [asm::rbx, asm::rbp, asm::r12, asm::r13, asm::r14, asm::r15] {
        a.push(register)?;
    }
    a.mov(asm::qword_ptr(field!(host_rsp)), asm::rsp)?;
    a.stmxcsr(asm::dword_ptr(field!(host_mxcsr)))?;
    if fpu {
        a.fxrstor64(asm::ptr(field!(fx_in)))?;
    }
    if mode == Mode::Sixteen {
        a.mov(asm::eax, u32::from(LDT_DS))?;
        a.mov(asm::ds, asm::eax)?;
        a.mov(asm::es, asm::eax)?;
        a.mov(asm::ss, asm::eax)?;
    }
    a.mov(asm::rsp, field!(flags_in))?;
    a.popfq()?;
    for (index, register) in GPRS.into_iter().enumerate() {
        a.mov(register, asm::qword_ptr(field!(gpr_in) + 8 * index as u64))?;
    }
    match mode {
        Mode::Long => a.jmp(asm::qword_ptr(field!(target))),
        Mode::Compat | Mode::Sixteen => a.jmp(asm::fword_ptr(field!(target_far))),
    }
}

/// `JMP USER_CS64:offset` in 32-bit code.
fn far_jump(offset: u64) -> [u8; 7] {
    let (offset, selector) = ((offset as u32).to_le_bytes(), USER_CS64.to_le_bytes());
    [0xea, offset[0], offset[1], offset[2], offset[3], selector[0], selector[1]]
}

fn epilogue(a: &mut CodeAssembler, fpu: bool) -> Result<(), iced_x86::IcedError> {
    for (index, register) in GPRS.into_iter().enumerate() {
        a.mov(asm::qword_ptr(field!(gpr_out) + 8 * index as u64), register)?;
    }
    a.mov(asm::rsp, asm::qword_ptr(field!(host_rsp)))?;
    a.pushfq()?;
    a.pop(asm::qword_ptr(field!(flags_out)))?;
    if fpu {
        a.fxsave64(asm::ptr(field!(fx_out)))?;
    }
    leave(a)
}

/// Returns to the caller of the entry with the state that its calling convention wants.
fn leave(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    a.mov(asm::rsp, asm::qword_ptr(field!(host_rsp)))?;
    a.push(0x202)?;
    a.popfq()?;
    a.fninit()?;
    a.ldmxcsr(asm::dword_ptr(field!(host_mxcsr)))?;
    for register in [asm::r15, asm::r14, asm::r13, asm::r12, asm::rbp, asm::rbx] {
        a.pop(register)?;
    }
    a.ret()
}

/// In the order of the instruction encoding.
const GPRS: [asm::AsmRegister64; 16] = [
    asm::rax,
    asm::rcx,
    asm::rdx,
    asm::rbx,
    asm::rsp,
    asm::rbp,
    asm::rsi,
    asm::rdi,
    asm::r8,
    asm::r9,
    asm::r10,
    asm::r11,
    asm::r12,
    asm::r13,
    asm::r14,
    asm::r15,
];

/// The order of the general registers in a signal frame.
const FRAME_GPRS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

extern "C" fn on_signal(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid context; the exchange area is mapped while the handler is
    // installed. Only plain memory accesses happen here.
    unsafe {
        let machine = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext;
        let exchange = &mut *(EXCHANGE as *mut Exchange);
        let segments = machine.gregs[libc::REG_CSGSFS as usize];
        let base = if segments as u16 == LDT_CS { CODE } else { 0 };
        let rip = base + machine.gregs[libc::REG_RIP as usize] as u64;
        if exchange.trap != 0 || (TRAMPOLINE..TRAMPOLINE + PAGE).contains(&rip) || exchange.target == 0 {
            // Not caused by a tested instruction: die by the default action when it repeats.
            for signal in SIGNALS {
                libc::signal(signal, libc::SIG_DFL);
            }
            return;
        }
        for (saved, register) in exchange.gpr_out.iter_mut().zip(FRAME_GPRS) {
            *saved = machine.gregs[register as usize] as u64;
        }
        exchange.flags_out = machine.gregs[libc::REG_EFL as usize] as u64;
        exchange.rip = rip;
        exchange.trap = machine.gregs[libc::REG_TRAPNO as usize] as u64 + 1;
        exchange.error = machine.gregs[libc::REG_ERR as usize] as u64;
        exchange.address = machine.gregs[libc::REG_CR2 as usize] as u64;
        ptr::copy_nonoverlapping(machine.fpregs.cast::<u8>(), (&raw mut exchange.fx_out).cast(), 512);
        machine.gregs[libc::REG_RIP as usize] = RESUME.load(Ordering::Relaxed) as i64;
        machine.gregs[libc::REG_RSP as usize] = exchange.host_rsp as i64;
        machine.gregs[libc::REG_EFL as usize] = 0x202;
        let segments = &mut machine.gregs[libc::REG_CSGSFS as usize];
        // CS in the lowest 16 bits, SS in the highest.
        *segments = *segments & 0xffff_ffff_0000 | i64::from(USER_CS64) | i64::from(USER_DS) << 48;
    }
}

const SIGNALS: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP];

fn install_handler() {
    const STACK: usize = 256 << 10;
    let stack = Box::leak(vec![0u8; STACK].into_boxed_slice());
    let alternate = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: STACK };
    // SAFETY: the stack lives as long as the process; the handler is async-signal-safe.
    unsafe {
        assert_eq!(libc::sigaltstack(&raw const alternate, ptr::null_mut()), 0, "sigaltstack");
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in SIGNALS {
            assert_eq!(libc::sigaction(signal, &raw const action, ptr::null_mut()), 0, "sigaction");
        }
    }
}

/// Loads DS, ES and SS.
fn load_segments(selector: u16) {
    // SAFETY: 64-bit code does not use their bases and limits.
    unsafe {
        std::arch::asm!("mov ds, {0:e}", "mov es, {0:e}", "mov ss, {0:e}", in(reg) u32::from(selector));
    }
}

/// Makes the segments of 16-bit code.
fn make_segments() {
    /// Bit 6: usable; bits 2:1: contents (0 data, 2 code).
    const USABLE: u32 = 1 << 6;
    const CODE_SEGMENT: u32 = 2 << 1;
    let descriptors: [[u32; 4]; 2] = [
        [u32::from(LDT_CS >> 3), CODE as u32, 0xffff, USABLE | CODE_SEGMENT],
        [u32::from(LDT_DS >> 3), LDT_DS_BASE as u32, LDT_DS_LIMIT, USABLE],
    ];
    for descriptor in &descriptors {
        // SAFETY: the kernel reads a `user_desc` of 16 bytes.
        let result = unsafe { libc::syscall(libc::SYS_modify_ldt, 0x11, descriptor.as_ptr(), 16) };
        assert_eq!(result, 0, "modify_ldt");
    }
}

fn map(address: u64, length: u64, access: i32) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: a new mapping that replaces nothing.
    let got = unsafe { libc::mmap(address as *mut _, length as usize, access, flags, -1, 0) };
    assert_eq!(got as u64, address, "the address range {address:#x} is in use");
}

fn protect(address: u64, length: u64, access: i32) {
    // SAFETY: callers pass ranges that `map` made.
    let result = unsafe { libc::mprotect(address as *mut _, length as usize, access) };
    assert_eq!(result, 0, "mprotect");
}

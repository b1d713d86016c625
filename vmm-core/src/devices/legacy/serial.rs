//! The 16550A serial port.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::interrupt::IrqLine;
use crate::lifecycle::{Lifecycle, LifecycleError};

// Register offsets.
const DATA: u8 = 0;
const IER: u8 = 1;
const IIR_FCR: u8 = 2;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;
const MSR: u8 = 6;
const SCRATCH: u8 = 7;

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMIT: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;

const IIR_NONE: u8 = 1;
const IIR_TRANSMIT: u8 = 2;
const IIR_RECEIVED: u8 = 4;
const IIR_LINE: u8 = 6;
const IIR_FIFO: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;

const LCR_DLAB: u8 = 1 << 7;

const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;

const LSR_DATA: u8 = 1 << 0;
const LSR_BREAK: u8 = 1 << 4;
/// Transmitter idle: holding and shift register are always empty.
const LSR_IDLE: u8 = 3 << 5;

/// CTS, DSR and DCD: a terminal is always there.
const MSR_CONNECTED: u8 = 0xb0;

const FIFO_SIZE: usize = 16;
/// Input that waits here for the guest; more stays with whoever sends it.
const BACKLOG: usize = 4096;

/// Where a serial port's output goes.
pub trait SerialOutput: Send + Sync {
    /// Takes bytes that the guest sent. Called on vCPU threads.
    fn write(&self, data: &[u8]);
}

impl<F: Fn(&[u8]) + Send + Sync> SerialOutput for F {
    fn write(&self, data: &[u8]) {
        self(data);
    }
}

#[derive(Clone, Default, Serialize, Deserialize)]
struct State {
    divisor: u16,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    /// The transmitter became empty and the guest has not yet read that from IIR.
    transmit_pending: bool,
    line_break: bool,
    input: VecDeque<u8>,
}

impl State {
    fn power_on() -> Self {
        // 9600 baud, 8 data bits.
        Self { divisor: 12, lcr: 3, mcr: MCR_OUT2, ..Self::default() }
    }

    fn iir(&self) -> u8 {
        if self.ier & IER_LINE != 0 && self.line_break {
            IIR_LINE
        } else if self.ier & IER_RECEIVED != 0 && !self.input.is_empty() {
            IIR_RECEIVED
        } else if self.ier & IER_TRANSMIT != 0 && self.transmit_pending {
            IIR_TRANSMIT
        } else {
            IIR_NONE
        }
    }

    fn modem_status(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MSR_CONNECTED;
        }
        // The outputs loop back: RTS to CTS, DTR to DSR, OUT1 to RI, OUT2 to DCD.
        (self.mcr & 2) << 3 | (self.mcr & 1) << 5 | (self.mcr & 4) << 4 | (self.mcr & 8) << 4
    }
}

/// A 16550A. Output is taken at once; input waits in a bounded queue.
pub struct Serial {
    state: Mutex<State>,
    irq: Arc<dyn IrqLine>,
    output: Box<dyn SerialOutput>,
    room: Mutex<Option<Box<dyn Fn() + Send + Sync>>>,
}

impl Serial {
    /// A port that raises `irq` and prints to `output`.
    pub fn new(irq: Arc<dyn IrqLine>, output: Box<dyn SerialOutput>) -> Self {
        Self { state: Mutex::new(State::power_on()), irq, output, room: Mutex::new(None) }
    }

    /// Sets what is called (on a vCPU thread) when the guest has made room in a full input queue.
    pub fn on_room(&self, callback: impl Fn() + Send + Sync + 'static) {
        *self.room.lock() = Some(Box::new(callback));
    }

    /// Queues input for the guest and returns how many bytes were taken.
    pub fn input(&self, data: &[u8]) -> usize {
        let mut s = self.state.lock();
        let n = data.len().min(BACKLOG - s.input.len());
        s.input.extend(&data[..n]);
        self.update(&s);
        n
    }

    /// Sends a break condition (Linux takes the next character as a SysRq command).
    pub fn send_break(&self) {
        let mut s = self.state.lock();
        s.line_break = true;
        s.input.push_front(0);
        self.update(&s);
    }

    fn update(&self, s: &State) {
        self.irq.set_level(s.iir() != IIR_NONE && s.mcr & MCR_OUT2 != 0);
    }

    fn read_register(&self, offset: u8) -> u8 {
        let mut s = self.state.lock();
        match offset & 7 {
            LSR => {
                let value = LSR_IDLE
                    | if s.input.is_empty() { 0 } else { LSR_DATA }
                    | if s.line_break { LSR_BREAK } else { 0 };
                if s.line_break {
                    s.line_break = false;
                    self.update(&s);
                }
                value
            }
            DATA if s.lcr & LCR_DLAB != 0 => s.divisor as u8,
            DATA => {
                let was_full = s.input.len() >= BACKLOG;
                let byte = s.input.pop_front().unwrap_or(0);
                self.update(&s);
                drop(s);
                if was_full && let Some(room) = &*self.room.lock() {
                    room();
                }
                byte
            }
            IER if s.lcr & LCR_DLAB != 0 => (s.divisor >> 8) as u8,
            IER => s.ier,
            IIR_FCR => {
                let value = s.iir();
                if value == IIR_TRANSMIT {
                    s.transmit_pending = false;
                    self.update(&s);
                }
                value | if s.fcr & FCR_ENABLE != 0 { IIR_FIFO } else { 0 }
            }
            LCR => s.lcr,
            MCR => s.mcr,
            MSR => s.modem_status(),
            _ => s.scratch,
        }
    }

    fn write_register(&self, offset: u8, value: u8) {
        let mut s = self.state.lock();
        match offset & 7 {
            DATA if s.lcr & LCR_DLAB != 0 => s.divisor = s.divisor & 0xff00 | u16::from(value),
            DATA => {
                if s.mcr & MCR_LOOP != 0 {
                    if s.input.len() < FIFO_SIZE {
                        s.input.push_back(value);
                    }
                } else {
                    self.output.write(&[value]);
                }
                s.transmit_pending = true;
                // Without interrupts enabled (a kernel's early console) the line cannot change.
                if s.ier != 0 {
                    // A new byte takes the request away before the empty holding register makes it again.
                    self.irq.set_level(false);
                    self.update(&s);
                }
            }
            IER if s.lcr & LCR_DLAB != 0 => s.divisor = s.divisor & 0xff | u16::from(value) << 8,
            IER => {
                // Enabling the transmitter interrupt with an empty holding register raises it.
                s.transmit_pending |= value & IER_TRANSMIT != 0 && s.ier & IER_TRANSMIT == 0;
                s.ier = value & 0x0f;
                self.update(&s);
            }
            IIR_FCR => {
                s.fcr = value;
                if value & FCR_CLEAR_RECEIVER != 0 {
                    s.input.clear();
                    self.update(&s);
                }
            }
            LCR => s.lcr = value,
            MCR => {
                s.mcr = value & 0x1f;
                self.update(&s);
            }
            SCRATCH => s.scratch = value,
            _ => {}
        }
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset as u8..).zip(data) {
            *byte = self.read_register(at);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (at, &byte) in (offset as u8..).zip(data) {
            self.write_register(at, byte);
        }
    }
}

impl Lifecycle for Serial {
    fn reset(&self) {
        let mut s = self.state.lock();
        *s = State::power_on();
        self.update(&s);
    }

    fn save(&self) -> Result<serde_json::Value, LifecycleError> {
        serde_json::to_value(&*self.state.lock()).map_err(|e| LifecycleError::State(e.to_string()))
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), LifecycleError> {
        let loaded = State::deserialize(state).map_err(|e| LifecycleError::State(e.to_string()))?;
        if loaded.input.len() > BACKLOG {
            return Err(LifecycleError::State("its serial input is longer than the queue".into()));
        }
        let mut s = self.state.lock();
        *s = loaded;
        self.update(&s);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// Counts rising edges in the upper half, the level in bit 0.
    #[derive(Default)]
    struct Line(AtomicU32);

    impl IrqLine for Line {
        fn set_level(&self, asserted: bool) {
            let old = self.0.load(Ordering::Relaxed);
            let edge = u32::from(asserted && old & 1 == 0) << 16;
            self.0.store(((old & !1) + edge) | u32::from(asserted), Ordering::Relaxed);
        }
    }

    impl Line {
        fn level(&self) -> bool {
            self.0.load(Ordering::Relaxed) & 1 != 0
        }
        fn edges(&self) -> u32 {
            self.0.load(Ordering::Relaxed) >> 16
        }
    }

    fn serial() -> (Serial, Arc<Line>, Arc<Mutex<Vec<u8>>>) {
        let line = Arc::new(Line::default());
        let out = Arc::new(Mutex::new(Vec::new()));
        let sink = out.clone();
        let output = move |data: &[u8]| sink.lock().extend_from_slice(data);
        (Serial::new(line.clone(), Box::new(output)), line, out)
    }

    fn get(s: &Serial, offset: u8) -> u8 {
        let mut data = [0];
        s.read(offset.into(), &mut data);
        data[0]
    }

    #[test]
    fn output_is_immediate_and_the_transmitter_interrupts_for_each_burst() {
        let (s, line, out) = serial();
        s.write(0, b"a");
        assert_eq!(line.edges(), 0);
        s.write(IER.into(), &[IER_TRANSMIT]);
        assert_eq!(get(&s, IIR_FCR), IIR_TRANSMIT);
        assert_eq!(get(&s, IIR_FCR), IIR_NONE, "reading IIR clears it");
        assert!(!line.level());
        let before = line.edges();
        s.write(0, b"b");
        s.write(0, b"c");
        assert_eq!(line.edges(), before + 2);
        assert_eq!(*out.lock(), b"abc");
        assert_eq!(get(&s, LSR) & LSR_IDLE, LSR_IDLE);
    }

    #[test]
    fn input_interrupts_until_it_is_read_and_the_queue_is_bounded() {
        let (s, line, _) = serial();
        s.write(IER.into(), &[IER_RECEIVED]);
        assert_eq!(s.input(b"xy"), 2);
        assert!(line.level());
        assert_eq!(get(&s, IIR_FCR), IIR_RECEIVED);
        assert_eq!((get(&s, DATA), get(&s, DATA)), (b'x', b'y'));
        assert!(!line.level());
        assert_eq!(get(&s, LSR) & LSR_DATA, 0);
        assert_eq!(s.input(&[0; 10_000]), BACKLOG);
        let calls = Arc::new(AtomicU32::new(0));
        let counter = calls.clone();
        s.on_room(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        get(&s, DATA);
        get(&s, DATA);
        assert_eq!(calls.load(Ordering::Relaxed), 1, "told once when room appears");
    }

    #[test]
    fn loopback_and_divisor_latch_work_as_drivers_probe_them() {
        let (s, _, out) = serial();
        s.write(MCR.into(), &[MCR_LOOP | 0x0a]);
        assert_eq!(get(&s, MSR) & 0xf0, 0x90);
        s.write(0, b"z");
        assert_eq!(get(&s, DATA), b'z');
        assert!(out.lock().is_empty());
        s.write(LCR.into(), &[LCR_DLAB]);
        s.write(0, &[0x34, 0x12]);
        assert_eq!((get(&s, 0), get(&s, 1)), (0x34, 0x12));
        s.write(LCR.into(), &[3]);
        s.write(IIR_FCR.into(), &[FCR_ENABLE]);
        assert_eq!(get(&s, IIR_FCR) & IIR_FIFO, IIR_FIFO);
        s.write(SCRATCH.into(), &[0x5a]);
        assert_eq!(get(&s, SCRATCH), 0x5a);
    }

    #[test]
    fn state_survives_save_and_restore() {
        let (a, ..) = serial();
        a.write(IER.into(), &[IER_RECEIVED]);
        a.input(b"q");
        let (b, line, _) = serial();
        b.restore(&a.save().unwrap()).unwrap();
        assert!(line.level());
        assert_eq!(get(&b, DATA), b'q');
    }
}

//! The terminal in raw mode, the Ctrl-A escape, and signals.

use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_core::machine::Stopper;

const STDIN: i32 = 0;
/// Ctrl-A.
const ESCAPE: u8 = 1;

/// Standard input in raw mode; dropping it restores the former mode. A panic unwinds, and signals stop the machine
/// through [`Signals`], so both come by here.
pub struct Terminal {
    before: libc::termios,
}

impl Terminal {
    /// Sets raw mode, or does nothing when standard input is not a terminal.
    pub fn raw() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        // SAFETY: an all-zero termios is a valid value that tcgetattr overwrites.
        let mut mode: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: `mode` is a live variable.
        if unsafe { libc::tcgetattr(STDIN, &mut mode) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let before = mode;
        // SAFETY: changes only the structure.
        unsafe { libc::cfmakeraw(&mut mode) };
        // Output processing stays: our own messages and a guest's bare newlines look right.
        mode.c_oflag = before.c_oflag;
        // SAFETY: `mode` is a valid terminal mode.
        if unsafe { libc::tcsetattr(STDIN, libc::TCSANOW, &mode) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Some(Self { before }))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // SAFETY: the mode is the one that the terminal had.
        unsafe { libc::tcsetattr(STDIN, libc::TCSADRAIN, &self.before) };
    }
}

/// Watches input for Ctrl-A x.
#[derive(Default)]
pub struct Escape(Arc<Mutex<Option<Stopper>>>);

impl Escape {
    /// What the escape stops.
    pub fn on_end(&self, stopper: Stopper) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(stopper);
    }

    /// The filter for the console's input.
    pub fn filter(&self) -> impl FnMut(&mut Vec<u8>) + Send + 'static {
        let stopper = self.0.clone();
        let mut escaped = false;
        move |input| {
            let ended = filter(&mut escaped, input);
            if ended && let Some(stopper) = &*stopper.lock().unwrap_or_else(PoisonError::into_inner) {
                stopper.stop();
            }
        }
    }
}

/// Removes escape sequences from `input`; true when it asks to end.
fn filter(escaped: &mut bool, input: &mut Vec<u8>) -> bool {
    let mut ended = false;
    input.retain(|&byte| match (std::mem::take(escaped), byte) {
        (false, ESCAPE) => {
            *escaped = true;
            false
        }
        (true, b'x' | b'X') => {
            ended = true;
            false
        }
        (true, ESCAPE) | (false, _) => true,
        (true, _) => false,
    });
    ended
}

/// The signals that end a machine, blocked in all threads and waited for by one.
pub struct Signals {
    set: libc::sigset_t,
    received: Arc<AtomicBool>,
}

/// The thread that waits for signals; dropping it ends it.
pub struct Watch {
    thread: Option<std::thread::JoinHandle<()>>,
    done: Arc<AtomicBool>,
}

/// What wakes the waiting thread without meaning anything else. Nothing in this program uses it otherwise.
const WAKE: i32 = libc::SIGUSR2;

impl Signals {
    /// Blocks the signals; call it before any thread is started.
    pub fn block() -> io::Result<Self> {
        // SAFETY: an all-zero set is valid storage that sigemptyset initialises.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: `set` is a live variable and the signal numbers exist.
        let error = unsafe {
            libc::sigemptyset(&mut set);
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, WAKE] {
                libc::sigaddset(&mut set, signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut())
        };
        if error != 0 {
            Err(io::Error::from_raw_os_error(error))
        } else {
            Ok(Self { set, received: Arc::default() })
        }
    }

    /// Whether a signal asked to end, also one that came while a machine was stopping by itself.
    pub fn received(&self) -> bool {
        self.received.load(Ordering::SeqCst)
    }

    /// Stops the machine at the first signal.
    pub fn watch(&self, stopper: Stopper) -> io::Result<Watch> {
        let set = self.set;
        let received = self.received.clone();
        let done = Arc::new(AtomicBool::new(false));
        let ended = done.clone();
        let thread =
            std::thread::Builder::new().name("signals".into()).stack_size(64 << 10).spawn(move || {
                loop {
                    let mut signal = 0;
                    // SAFETY: both are live variables.
                    let error = unsafe { libc::sigwait(&set, &mut signal) };
                    if error == 0 && signal != WAKE {
                        received.store(true, Ordering::SeqCst);
                        stopper.stop();
                    }
                    if error != 0 || ended.load(Ordering::SeqCst) {
                        return;
                    }
                }
            })?;
        Ok(Watch { thread: Some(thread), done })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        use std::os::unix::thread::JoinHandleExt;
        self.done.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // SAFETY: the thread has not been joined yet, so its handle is valid.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), WAKE) };
            // It does nothing that panics.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_removed_and_recognised_across_reads() {
        let mut escaped = false;
        let mut run = |input: &[u8]| {
            let mut input = input.to_vec();
            (filter(&mut escaped, &mut input), input)
        };
        assert_eq!(run(b"ls\n"), (false, b"ls\n".to_vec()));
        assert_eq!(run(b"a\x01"), (false, b"a".to_vec()));
        assert_eq!(run(b"\x01b"), (false, b"\x01b".to_vec()));
        assert_eq!(run(b"\x01qc"), (false, b"c".to_vec()));
        assert_eq!(run(b"\x01x"), (true, vec![]));
    }
}

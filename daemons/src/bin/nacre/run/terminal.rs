//! The terminal in raw mode, the Ctrl-A escape, and signals.

use std::cell::Cell;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use vmm_core::machine::{StopReason, Stopper, Vm, VmEvent};

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

/// The signals that end a machine: blocked in all threads, and read by the one that waits for the machine's end.
pub struct Signals {
    signals: SignalFd,
    received: Cell<bool>,
}

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// A signal asked to end.
    Signal,
    /// What was waited for can be read.
    Ready,
    /// The time is over.
    Timeout,
}

impl Signals {
    /// Blocks the signals; call it before any thread is started.
    pub fn block() -> io::Result<Self> {
        let set = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
        set.thread_block()?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { signals, received: Cell::new(false) })
    }

    /// Whether a signal asked to end, also one that came while a machine was stopping by itself.
    pub fn received(&self) -> bool {
        while let Ok(Some(_)) = self.signals.read_signal() {
            self.received.set(true);
        }
        self.received.get()
    }

    /// Waits until `fd` is readable, for at most so many milliseconds if there is a limit.
    pub fn wait_or(&self, fd: &impl AsFd, limit: Option<u8>) -> io::Result<Wake> {
        loop {
            if self.received() {
                return Ok(Wake::Signal);
            }
            let wanted = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let mut fds = [wanted(self.signals.as_fd()), wanted(fd.as_fd())];
            match poll(&mut fds, limit.map_or(PollTimeout::NONE, PollTimeout::from)) {
                Err(error) if error != Errno::EINTR => return Err(error.into()),
                _ if fds[1].any().unwrap_or(false) => return Ok(Wake::Ready),
                Ok(0) => return Ok(Wake::Timeout),
                _ => {}
            }
        }
    }

    /// Whether a signal came, after waiting for one for at most so many milliseconds.
    pub fn received_within(&self, milliseconds: u8) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(milliseconds)) {
            Err(error) if error != Errno::EINTR => Err(error.into()),
            _ => Ok(self.received()),
        }
    }

    /// Waits for the end of a machine that was started, which the first signal brings about.
    pub fn wait(&self, vm: &Vm) -> io::Result<StopReason> {
        loop {
            if self.received() {
                vm.stop();
            }
            while let Some(event) = vm.events().take() {
                if let VmEvent::Stopped(reason) = event {
                    return Ok(reason);
                }
            }
            let wanted = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let mut fds = [wanted(self.signals.as_fd()), wanted(vm.events().as_fd())];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(error) if error != Errno::EINTR => return Err(error.into()),
                _ => {}
            }
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

//! Standard output that may be closed or full.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};
use std::process::exit;

/// The exit status of a program whose standard output has no reader any more: what a shell says of one that SIGPIPE ended.
const NO_READER: i32 = 128 + 13;

/// Like `print!`, but ends the program if nobody can read that: quietly if the reader has gone, otherwise with the reason.
#[macro_export]
macro_rules! out {
    ($($arg:tt)*) => { $crate::print(format_args!($($arg)*)) };
}

/// [`out!`] with a newline.
#[macro_export]
macro_rules! outln {
    ($($arg:tt)*) => { $crate::print(format_args!("{}\n", format_args!($($arg)*))) };
}

/// See [`out!`].
pub fn print(text: Arguments<'_>) {
    let Err(error) = std::io::stdout().lock().write_fmt(text) else { return };
    if error.kind() == ErrorKind::BrokenPipe {
        exit(NO_READER);
    }
    eprintln!("Cannot write to standard output: {error}");
    exit(1);
}

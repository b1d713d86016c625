//! Both directions of a connection between a source and a target.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::super::VmError;
use crate::migration::{Channel, MigrationError, Record, StreamError, StreamReader, StreamWriter};

/// How long the reason of a connection's end is waited for.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// One of two users of a channel, of which only one works at a time.
pub(super) struct Half<C>(Arc<Mutex<C>>);

impl<C: Channel> Read for Half<C> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.lock().read(buffer)
    }
}

impl<C: Channel> Write for Half<C> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0.lock().write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().flush()
    }
}

/// A record without contents, by which the two sides follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Ready,
    Prepared,
    Run,
    Running,
}

pub(super) struct Link<C> {
    channel: Arc<Mutex<C>>,
    pub(super) writer: StreamWriter<Half<C>>,
    reader: Option<StreamReader<Half<C>>>,
}

impl<C: Channel> Link<C> {
    pub(super) fn new(mut channel: C, timeout: Duration) -> Result<Self, VmError> {
        channel.set_timeout(timeout).map_err(StreamError::Io)?;
        let channel = Arc::new(Mutex::new(channel));
        let writer = StreamWriter::new(Half(channel.clone()))?;
        Ok(Self { channel, writer, reader: None })
    }

    pub(super) fn is_local(&self) -> bool {
        self.channel.lock().is_local()
    }

    /// What the other side sends next.
    pub(super) fn read(&mut self) -> Result<Record<'_>, StreamError> {
        let reader = match &mut self.reader {
            Some(reader) => reader,
            none => none.insert(StreamReader::new(Half(self.channel.clone()))?),
        };
        reader.read()
    }

    /// Waits for the other side's next step.
    pub(super) fn expect(&mut self, step: Step) -> Result<(), VmError> {
        let found = match self.read()? {
            Record::Ready => Step::Ready,
            Record::Prepared => Step::Prepared,
            Record::Run => Step::Run,
            Record::Running => Step::Running,
            Record::Refused(why) => return Err(MigrationError::Refused(why).into()),
            _ => return Err(MigrationError::Protocol.into()),
        };
        if found == step { Ok(()) } else { Err(MigrationError::Protocol.into()) }
    }

    /// Why the other side went away, if it said so: better than the failure of a write that came of it.
    pub(super) fn reason(&mut self, error: VmError) -> VmError {
        // It is there already, or will never come.
        let waits = self.channel.lock().set_timeout(LAST_WORDS).is_ok();
        if waits
            && matches!(error, VmError::Stream(_))
            && let Ok(Record::Refused(why)) = self.read()
        {
            return MigrationError::Refused(why).into();
        }
        error
    }

    /// Tells the other side that it is over, as far as it still listens.
    pub(super) fn refuse(&mut self, error: &VmError) {
        // It hears of the end of the connection otherwise.
        let _ = self.writer.write(&Record::Refused(super::super::vcpu::chain(error)));
    }
}

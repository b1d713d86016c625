//! The agent's threads for what blocks: store, links, fence agents, journal and actions.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::config::StoreConfig;
use super::drive::Input;
use crate::adapters::{ActionRunner, Clock, Event, FenceAgent, Journal, Links, Rule, Severity};
use crate::fence::{AgentFailed, FenceAction, FenceInput};
use crate::ha::ClusterState;
use crate::node::{NodeInput, StoreRequest};
use crate::store::{self, LocalStore, Store, StoreError};
use crate::types::{Incarnation, Millis, Time};

/// Messages of other hosts that wait to be looked at; more are dropped as the network would.
const WAITING_MESSAGES: usize = 1024;
/// Events that wait for their actions; more get none.
const WAITING_ACTIONS: usize = 256;

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.into()).spawn(run)
}

/// Joins a thread; what it panicked about it has printed.
fn join(thread: &mut Option<JoinHandle<()>>) {
    if let Some(thread) = thread.take() {
        let _ = thread.join();
    }
}

/// What the store's thread does.
pub(super) enum StoreJob {
    /// Serve a request of the node unless it waited past the time.
    Serve(StoreRequest, Time),
    /// Read the state for the API.
    Load(Box<dyn FnOnce(Option<ClusterState>) + Send>),
}

/// The thread that talks to the store.
pub(super) struct StoreWorker {
    jobs: Option<Sender<StoreJob>>,
    thread: Option<JoinHandle<()>>,
}

impl StoreWorker {
    pub(super) fn start(
        config: StoreConfig,
        state: PathBuf,
        me: Incarnation,
        inputs: Sender<Input>,
    ) -> std::io::Result<Self> {
        let (jobs, queue) = channel();
        let thread = spawn("store", move || serve(&config, &state, me, &queue, &inputs))?;
        Ok(StoreWorker { jobs: Some(jobs), thread: Some(thread) })
    }

    pub(super) fn submit(&self, job: StoreJob) {
        if let Some(jobs) = &self.jobs {
            // Without its thread the store does not answer.
            let _ = jobs.send(job);
        }
    }
}

impl Drop for StoreWorker {
    fn drop(&mut self) {
        self.jobs = None;
        join(&mut self.thread);
    }
}

fn open(config: &StoreConfig, state: &std::path::Path) -> Result<Box<dyn Store>, StoreError> {
    match config {
        StoreConfig::Local => Ok(Box::new(LocalStore::open(&state.join("cluster.redb"))?)),
        #[cfg(feature = "etcd")]
        StoreConfig::Etcd { endpoints, prefix } => {
            Ok(Box::new(store::EtcdStore::connect(endpoints, prefix)?))
        }
        #[cfg(not(feature = "etcd"))]
        StoreConfig::Etcd { .. } => {
            Err(StoreError::Unavailable("this build has no etcd client; build with the feature etcd".into()))
        }
    }
}

fn serve(
    config: &StoreConfig,
    state: &std::path::Path,
    me: Incarnation,
    queue: &Receiver<StoreJob>,
    inputs: &Sender<Input>,
) {
    let mut store: Option<Box<dyn Store>> = None;
    while let Ok(job) = queue.recv() {
        if store.is_none() {
            let opened = open(config, state);
            store = opened.inspect_err(|error| tracing::warn!(%error, "the store cannot be opened")).ok();
        }
        match (job, &mut store) {
            // The node has given this up; done late it could only do harm.
            (StoreJob::Serve(_, until), _) if Clock.now() >= until => {}
            (StoreJob::Serve(request, _), Some(store)) => {
                if let Some(input) = store::serve(store.as_mut(), me, request) {
                    let _ = inputs.send(Input::Node(input));
                }
            }
            (StoreJob::Serve(..), None) => {}
            (StoreJob::Load(done), Some(store)) => done(store.load().ok()),
            (StoreJob::Load(done), None) => done(None),
        }
    }
}

/// The threads that receive messages, one a socket.
pub(super) struct Receivers {
    stop: Arc<AtomicBool>,
    threads: Vec<Option<JoinHandle<()>>>,
}

impl Receivers {
    /// `waiting` counts the messages that wait in `inputs`.
    pub(super) fn start(
        links: &Arc<Links>,
        inputs: &Sender<Input>,
        waiting: &Arc<AtomicUsize>,
    ) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut receivers = Receivers { stop: stop.clone(), threads: Vec::new() };
        for link in 0..links.count() {
            let (links, inputs, stop, waiting) =
                (links.clone(), inputs.clone(), stop.clone(), waiting.clone());
            let thread = spawn("link", move || {
                while !stop.load(Ordering::Relaxed) {
                    match links.receive(link) {
                        Ok(Some((_, message))) if waiting.load(Ordering::Relaxed) < WAITING_MESSAGES => {
                            waiting.fetch_add(1, Ordering::Relaxed);
                            let _ = inputs.send(Input::Message(message));
                        }
                        Ok(_) => {}
                        Err(error) => {
                            tracing::warn!(%error, link, "a link failed");
                            std::thread::sleep(Duration::from_millis(500));
                        }
                    }
                }
            })?;
            receivers.threads.push(Some(thread));
        }
        Ok(receivers)
    }
}

impl Drop for Receivers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.iter_mut().for_each(join);
    }
}

/// Calls fence agents, each on a thread that ends with its call.
#[derive(Default)]
pub(super) struct FenceCalls {
    threads: Vec<JoinHandle<()>>,
}

/// Which call of a fence agent.
pub(super) struct FenceCall {
    pub(super) serial: u64,
    pub(super) op: u64,
    pub(super) action: FenceAction,
    pub(super) deadline: Millis,
}

impl FenceCalls {
    pub(super) fn call(&mut self, agent: FenceAgent, call: FenceCall, inputs: Sender<Input>) {
        self.threads.retain(|t| !t.is_finished());
        let FenceCall { serial, op, action, deadline } = call;
        let run = move || {
            let result = agent.run(action, Duration::from_millis(deadline)).map_err(|error| {
                tracing::warn!(%error, program = %agent.program.display(), "fence agent failed");
                AgentFailed
            });
            let input = FenceInput::Done { op, result };
            let _ = inputs.send(Input::Node(NodeInput::Fence { serial, input }));
        };
        // Without a thread there is no answer; the fencer's deadline takes care of that.
        self.threads.extend(spawn("fence", run));
    }
}

impl Drop for FenceCalls {
    /// Waits for the calls under way, each at most as long as its deadline.
    fn drop(&mut self) {
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The threads that write the journal and run actions.
pub(super) struct EventWriter {
    events: Option<Sender<Event>>,
    writer: Option<JoinHandle<()>>,
    runner: Option<JoinHandle<()>>,
}

impl EventWriter {
    pub(super) fn start(journal: Journal, rules: Vec<Rule>) -> std::io::Result<Self> {
        let (events, queue) = channel::<Event>();
        let (actions, due) = sync_channel::<Event>(WAITING_ACTIONS);
        let failures = events.clone();
        let actions_wanted = !rules.is_empty();
        let runner = ActionRunner::new(rules);
        let writer = spawn("journal", move || write(journal, &queue, actions_wanted.then_some(actions)))?;
        let runner = spawn("actions", move || {
            while let Ok(event) = due.recv() {
                for (rule, error) in runner.answer(&event) {
                    let subject = format!("rule {}", rule + 1);
                    let _ = failures.send(super::event(
                        Severity::Warning,
                        "action.failed",
                        subject,
                        format!("{error}"),
                    ));
                }
            }
        })?;
        Ok(EventWriter { events: Some(events), writer: Some(writer), runner: Some(runner) })
    }

    pub(super) fn note(&self, event: Event) {
        if let Some(events) = &self.events {
            let _ = events.send(event);
        }
    }
}

fn write(mut journal: Journal, queue: &Receiver<Event>, actions: Option<SyncSender<Event>>) {
    while let Ok(event) = queue.recv() {
        let last = event.kind == super::LAST;
        match journal.append(event) {
            Ok(event) if !event.kind.starts_with("action.") => {
                if actions.as_ref().is_some_and(|a| a.try_send(event).is_err()) {
                    tracing::warn!("an event got no action: too many wait");
                }
            }
            Ok(_) => {}
            Err(error) => tracing::error!(%error, "an event was not noted"),
        }
        if last {
            // The thread of the actions ends when it has done what waits.
            return;
        }
    }
}

impl Drop for EventWriter {
    fn drop(&mut self) {
        self.note(super::event(Severity::Info, super::LAST, "agent".into(), "The agent ends".into()));
        self.events = None;
        join(&mut self.writer);
        join(&mut self.runner);
    }
}

//! What the threads of several machines log can be told apart by spans.

use std::sync::{Arc, Mutex};

use tracing::Subscriber;
use tracing::span::{Attributes, Id};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::{LookupSpan, Registry};
use vmm_core::machine::{AccelChoice, StopReason, VmConfig};

use super::{config, guest, power_off, run};

/// Remembers the path of each span, such as `owner:vm:vcpu`.
#[derive(Clone, Default)]
struct Paths(Arc<Mutex<Vec<String>>>);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Paths {
    fn on_new_span(&self, _: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let names: Vec<_> = context.span_scope(id).unwrap().from_root().map(|span| span.name()).collect();
        self.0.lock().unwrap().push(names.join(":"));
    }
}

#[test]
fn threads_log_within_the_span_of_their_machine() {
    let paths = Paths::default();
    // For all threads: other tests' machines are recorded too, under no owner.
    tracing::subscriber::set_global_default(Registry::default().with(paths.clone())).unwrap();
    let kernel = guest::kernel(power_off);
    let owner = tracing::info_span!("owner");
    let config = VmConfig { cpus: 2, ..config(kernel.path(), AccelChoice::Soft) };
    assert_eq!(owner.in_scope(|| run(config)).1, StopReason::PowerOff);
    let mut found: Vec<_> =
        paths.0.lock().unwrap().iter().filter(|path| path.starts_with("owner")).cloned().collect();
    found.sort();
    assert_eq!(found, ["owner", "owner:vm", "owner:vm:vcpu", "owner:vm:vcpu"]);
}

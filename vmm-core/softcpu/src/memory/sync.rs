//! How processors agree on what they cache of shared memory.
//!
//! A processor's translations let it write to a page without looking at the page's metadata. Before the
//! metadata may be relied on (a page begins to hold code, or was found dirty and is now clean) all
//! processors have to drop such translations: [`Sync::synchronise`] waits until each processor has either
//! reached a point where it holds none, or is not executing guest code at all.
//!
//! What no instruction of the host can do at once (a locked access that crosses a page) a processor does
//! while no other one executes guest code: [`Sync::alone`].

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Above this many unhandled invalidations a processor checks all it has decoded instead.
const MAX_QUEUED: usize = 256;

/// One processor's part.
#[derive(Debug, Default)]
pub(crate) struct Member {
    /// Executing guest code: may use translations at any time.
    running: AtomicBool,
    /// The last request that the processor has followed.
    seen: AtomicU64,
    /// Pages whose code was overwritten by others; `None` for "too many".
    invalidated: Mutex<Option<Vec<u64>>>,
    has_invalidated: AtomicBool,
}

impl Member {
    /// The processor holds no pointers into guest memory until it enters again.
    pub fn leave(&self) {
        self.running.store(false, Ordering::SeqCst);
    }

    /// Whether [`Member::take_invalidated`] has something to say.
    #[inline(always)]
    pub fn has_invalidated(&self) -> bool {
        self.has_invalidated.load(Ordering::Acquire)
    }

    /// Takes the pages whose code was overwritten by others; `None` means any page.
    pub fn take_invalidated(&self) -> Option<Vec<u64>> {
        let mut queue = self.queue();
        self.has_invalidated.store(false, Ordering::SeqCst);
        queue.replace(Vec::new())
    }

    fn queue(&self) -> MutexGuard<'_, Option<Vec<u64>>> {
        self.invalidated.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The processors that share a memory.
#[derive(Debug, Default)]
pub(crate) struct Sync {
    requested: AtomicU64,
    members: Mutex<Vec<Weak<Member>>>,
    /// The processor that runs alone, or wants to.
    alone: AtomicPtr<Member>,
    /// Held by that processor.
    turn: Mutex<()>,
}

/// No other processor executes guest code while this exists.
pub(crate) struct Alone<'a> {
    sync: &'a Sync,
    _turn: MutexGuard<'a, ()>,
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.sync.alone.store(std::ptr::null_mut(), Ordering::SeqCst);
    }
}

impl Sync {
    pub fn join(&self) -> Arc<Member> {
        let member = Arc::new(Member { invalidated: Mutex::new(Some(Vec::new())), ..Member::default() });
        let mut members = self.members();
        members.retain(|m| m.strong_count() > 0);
        members.push(Arc::downgrade(&member));
        member
    }

    /// The processor begins to execute, as soon as no other one runs alone; it must then call
    /// [`Sync::must_flush`].
    pub fn enter(&self, member: &Member) {
        loop {
            // Both sides store, then look at what the other stored: at least one of them sees the other.
            member.running.store(true, Ordering::SeqCst);
            if !self.must_pause(member) {
                return;
            }
            member.leave();
            drop(self.turn.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Whether another processor wants to run alone: the processor leaves and enters again.
    #[inline(always)]
    pub fn must_pause(&self, member: &Member) -> bool {
        let owner = self.alone.load(Ordering::SeqCst);
        !owner.is_null() && !std::ptr::eq(owner, member)
    }

    /// Waits until no other processor executes guest code, and keeps them from it. The caller must have left;
    /// on return it has entered.
    pub fn alone(&self, caller: &Arc<Member>) -> Alone<'_> {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.alone.store(Arc::as_ptr(caller).cast_mut(), Ordering::SeqCst);
        let members: Vec<_> = self.members().iter().filter_map(Weak::upgrade).collect();
        for member in members.iter().filter(|m| !Arc::ptr_eq(caller, m)) {
            while member.running.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
        }
        caller.running.store(true, Ordering::SeqCst);
        Alone { sync: self, _turn: turn }
    }

    /// Asks all processors to drop their translations, without waiting.
    pub fn request(&self) -> u64 {
        self.requested.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Whether the processor has a request to follow: it drops its translations, then calls
    /// [`Sync::flushed`] with the returned value.
    #[inline(always)]
    pub fn must_flush(&self, member: &Member) -> Option<u64> {
        let requested = self.requested.load(Ordering::SeqCst);
        (requested != member.seen.load(Ordering::Relaxed)).then_some(requested)
    }

    pub fn flushed(&self, member: &Member, request: u64) {
        member.seen.store(request, Ordering::SeqCst);
    }

    /// Returns when every processor has dropped its translations. `caller` is the calling processor, if
    /// it is one; `follow` is called while waiting and must follow requests of others.
    pub fn synchronise(&self, caller: Option<&Arc<Member>>, follow: &mut dyn FnMut()) {
        let members: Vec<_> = self.members().iter().filter_map(Weak::upgrade).collect();
        if members.iter().all(|m| caller.is_some_and(|c| Arc::ptr_eq(c, m))) {
            follow();
            return;
        }
        let request = self.request();
        for member in members.iter().filter(|m| caller.is_none_or(|c| !Arc::ptr_eq(c, m))) {
            let mut spins = 0u32;
            while member.running.load(Ordering::SeqCst) && member.seen.load(Ordering::SeqCst) < request {
                follow();
                spins += 1;
                if spins < 64 { std::hint::spin_loop() } else { std::thread::yield_now() }
            }
        }
        follow();
    }

    /// Tells all processors but `writer` that code on this page was overwritten.
    pub fn invalidated(&self, page: u64, writer: Option<&Arc<Member>>) {
        for member in self.members().iter().filter_map(Weak::upgrade) {
            if writer.is_some_and(|w| Arc::ptr_eq(w, &member)) {
                continue;
            }
            let mut queue = member.queue();
            match queue.as_mut() {
                Some(pages) if pages.len() < MAX_QUEUED => pages.push(page),
                _ => *queue = None,
            }
            member.has_invalidated.store(true, Ordering::SeqCst);
        }
    }

    fn members(&self) -> MutexGuard<'_, Vec<Weak<Member>>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

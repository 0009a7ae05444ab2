//! Panics on any thread: a session may only report one as an error, and its test would go on.

use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Counts them from now on.
pub(crate) fn count() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::AcqRel);
            before(info);
        }));
    });
}

/// How many there were.
pub(crate) fn counted() -> usize {
    PANICS.load(Ordering::Acquire)
}

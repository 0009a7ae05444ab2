//! The wish of somebody outside that the running cell stops.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

use crate::environment::Interrupt;

/// Asks the running cell to stop, from any thread.
#[derive(Debug, Default)]
pub(crate) struct Signal {
    raised: AtomicBool,
    notify: Notify,
}

impl Signal {
    fn raise(&self) {
        self.raised.store(true, Ordering::Release);
        self.notify.notify_waiters();
    }

    /// What an embedder raises it with.
    pub(crate) fn handle(self: &Arc<Self>) -> Interrupt {
        let signal = Arc::clone(self);
        Interrupt::new(move || signal.raise())
    }

    pub(crate) fn take(&self) -> bool {
        self.raised.swap(false, Ordering::AcqRel)
    }

    /// Waits until it's raised, and takes it.
    pub(crate) async fn wait(&self) {
        let notified = self.notify.notified();
        tokio::pin!(notified);
        // Registered before the flag is read, so that no signal falls between the two.
        notified.as_mut().enable();
        if !self.raised.load(Ordering::Acquire) {
            notified.await;
        }
        self.raised.store(false, Ordering::Release);
    }
}

//! Where a session is between two turns, while its checkpoint is taken.
//!
//! The checkpoint is a task of the executor. Should the next turn come first, it takes the session and
//! does the work itself, instead of waiting until the executor has time for the task; should the
//! session be given up first, nobody does it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::session::Session;
use crate::error::{Error, Result};

/// A checkpoint that may copy more than this is taken on a thread for work that blocks.
const SAVE_BYTES_MAX: usize = 4 << 20;

/// A session whose checkpoint is due.
pub(crate) struct Parking {
    place: Mutex<Place>,
    done: Notify,
}

enum Place {
    /// Nobody has begun.
    Due(Box<Session>),
    /// The task is at work.
    Busy,
    Done(Result<Box<Session>>),
    /// Taken, or given up.
    Empty,
}

impl Parking {
    /// Parks a session, and starts the task. Must be called on a tokio runtime.
    pub(crate) fn new(session: Box<Session>) -> Arc<Self> {
        let parking =
            Arc::new(Self { place: Mutex::new(Place::Due(session)), done: Notify::new() });
        parking.start();
        parking
    }

    fn start(self: &Arc<Self>) {
        let parking = Arc::clone(self);
        // On the thread of the cell: its caches know what it wrote, and no other has to wake up.
        tokio::spawn(async move {
            // But first of all the cells that could go on: somebody waits for them.
            tokio::task::yield_now().await;
            if let Some(session) = parking.take_due() {
                let work = Work(parking);
                let result = save(session).await;
                work.0.put(result);
            }
        });
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session, if nobody has begun.
    fn take_due(&self) -> Option<Box<Session>> {
        let mut place = self.place();
        match std::mem::replace(&mut *place, Place::Busy) {
            Place::Due(session) => Some(session),
            other => {
                *place = other;
                None
            }
        }
    }

    fn put(&self, result: Result<Box<Session>>) {
        let mut place = self.place();
        if let Place::Empty = *place {
            drop(place);
            if let Ok(session) = result {
                session.give_back();
            }
            return;
        }
        *place = Place::Done(result);
        drop(place);
        self.done.notify_one();
    }

    /// The session with its checkpoint.
    ///
    /// # Errors
    ///
    /// When the checkpoint failed; the session is lost then.
    pub(crate) async fn finish(self: &Arc<Self>) -> Result<Box<Session>> {
        loop {
            {
                let mut place = self.place();
                match std::mem::replace(&mut *place, Place::Empty) {
                    Place::Due(mut session) => {
                        let written = session.written();
                        if written.bytes() <= SAVE_BYTES_MAX {
                            drop(place);
                            return session.save(written).map(|()| session);
                        }
                        // Left to a task: whoever waits here may be dropped meanwhile. Another one,
                        // since the first may have been lost with its executor.
                        *place = Place::Due(session);
                        drop(place);
                        self.start();
                    }
                    Place::Busy => *place = Place::Busy,
                    Place::Done(result) => return result,
                    Place::Empty => {
                        return Err(Error::Internal("a parked session was taken twice".into()));
                    }
                }
            }
            self.done.notified().await;
        }
    }

    /// Gives the session up.
    pub(crate) fn abandon(&self) {
        let taken = std::mem::replace(&mut *self.place(), Place::Empty);
        if let Place::Due(session) | Place::Done(Ok(session)) = taken {
            session.give_back();
        }
    }
}

/// The task at work. One that is dropped with its executor leaves no session behind, and says so.
struct Work(Arc<Parking>);

impl Drop for Work {
    fn drop(&mut self) {
        let is_busy = matches!(*self.0.place(), Place::Busy);
        if is_busy {
            self.0.put(Err(Error::Internal("the executor was shut down".into())));
        }
    }
}

async fn save(mut session: Box<Session>) -> Result<Box<Session>> {
    let written = session.written();
    if written.bytes() <= SAVE_BYTES_MAX {
        return session.save(written).map(|()| session);
    }
    let blocking = tokio::task::spawn_blocking(move || {
        session.save(written)?;
        Ok(session)
    });
    blocking.await.map_err(|e| Error::Internal(format!("the checkpoint's thread: {e}")))?
}

//! Standing in line for something that is given out under a lock.
//!
//! Whoever is not in the line any more has been served: that is the only record of it. So a waiter
//! that is dropped learns under the lock whether it still stands there, or got something that it has
//! to pass on.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

/// Those who wait, first come first served. A waker that comes out of it is used or dropped after
/// the lock is released, because either may run code of an executor.
#[derive(Debug, Default)]
pub(super) struct Line {
    next: u64,
    waiting: BTreeMap<u64, Option<Waker>>,
}

impl Line {
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Stands in line; the number is the place.
    pub(super) fn join(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        self.waiting.insert(number, None);
        number
    }

    /// Serves the first, who has to be woken if it has a waker.
    pub(super) fn pop(&mut self) -> Option<(u64, Option<Waker>)> {
        self.waiting.pop_first()
    }

    /// Goes away. `None`: it has been served.
    pub(super) fn leave(&mut self, number: u64) -> Option<Option<Waker>> {
        self.waiting.remove(&number)
    }

    /// Leaves a waker. `Err` with it: the place has been served. `Ok` with the one before.
    pub(super) fn register(&mut self, number: u64, waker: Waker) -> Result<Option<Waker>, Waker> {
        match self.waiting.get_mut(&number) {
            Some(place) => Ok(place.replace(waker)),
            None => Err(waker),
        }
    }
}

/// What a [`Line`] is for.
pub(super) trait Counter {
    /// Whether the place has been served; if not, the waker is kept for when it is.
    fn poll_place(&self, number: u64, waker: &Waker) -> bool;

    /// Takes the place out of the line, or passes on what it had been given.
    fn give_up(&self, number: u64);
}

/// A place in a line: ready when it's served, from when on what was given belongs to whoever waited.
/// Dropped before, it holds nothing up and loses nothing.
#[must_use]
pub(super) struct Place<C: Counter> {
    counter: C,
    number: u64,
    taken: bool,
}

impl<C: Counter> Place<C> {
    pub(super) fn new(counter: C, number: u64) -> Self {
        Self { counter, number, taken: false }
    }
}

impl<C: Counter + Unpin> Future for Place<C> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if !self.taken && !self.counter.poll_place(self.number, cx.waker()) {
            return Poll::Pending;
        }
        self.taken = true;
        Poll::Ready(())
    }
}

impl<C: Counter> Drop for Place<C> {
    fn drop(&mut self) {
        if !self.taken {
            self.counter.give_up(self.number);
        }
    }
}

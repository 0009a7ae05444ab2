//! Who computes: at most as many guests at once as there are processors, fairly between tenants.
//!
//! Each tenant has a lane. A lane's *virtual time* is the processor time that its guests took while
//! others waited, and whoever has the least goes next; within a lane, whoever came first. It counts
//! only while somebody waits, so that nobody is punished for having used idle processors:
//!
//! - when the first one has to wait, all lanes that compute start level;
//! - a lane that comes back starts no earlier than the one that was served last, so that idling
//!   saves nothing up;
//! - a lane that can't use its share, having too few guests, keeps a small advantage and no more.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use super::line::{Counter, Line, Place};

/// How far in virtual time a lane that is never idle may stay behind the others, in nanoseconds:
/// for as long it could keep all processors when it gets more guests.
const LAG_MAX: u64 = 50_000_000;

/// How many slices stay short after somebody waited for another tenant's guest: two seconds of
/// compute.
const SHORT_SLICES: u32 = 10_000;

/// Hands out the processors. Its lock is held for a few instructions, never across an await.
#[derive(Debug)]
pub(super) struct Gate {
    lanes: Mutex<Lanes>,
    /// How many stand in line, for a look without the lock. A guest that reads an old number
    /// computes one more slice.
    waiting: AtomicUsize,
    /// Whether guests of more than one tenant compute or wait.
    mixed: AtomicBool,
    short_slices: AtomicU32,
}

#[derive(Debug)]
struct Lanes {
    free: usize,
    /// The virtual time at which a lane was last served: where newcomers start.
    floor: u64,
    waiting: usize,
    next: u64,
    lanes: BTreeMap<u64, Lane>,
    /// Lanes with somebody in line, by virtual time. A key may be old, hence too small: a lane's
    /// guests go on computing while others of it wait. It's brought up to date before it counts.
    eager: BTreeSet<(u64, u64)>,
    /// Lanes that hold a processor.
    holders: Vec<u64>,
}

#[derive(Debug)]
struct Lane {
    /// All processor time of the tenant, in nanoseconds; charged without the lock.
    compute: Arc<AtomicU64>,
    /// Virtual time less `compute`. It only grows.
    lead: u64,
    holding: usize,
    line: Line,
    /// Its key in `eager`.
    key: u64,
}

impl Lane {
    fn virtual_time(&self) -> u64 {
        self.compute.load(Ordering::Relaxed).saturating_add(self.lead)
    }

    fn raise(&mut self, to: u64) {
        self.lead += to.saturating_sub(self.virtual_time());
    }
}

impl Lanes {
    fn lane(&mut self, id: u64) -> &mut Lane {
        self.lanes.get_mut(&id).expect("a lane is there as long as its tenant")
    }

    fn take(&mut self, id: u64) {
        self.free -= 1;
        let lane = self.lane(id);
        lane.holding += 1;
        if lane.holding == 1 {
            self.holders.push(id);
        }
    }

    fn give(&mut self, id: u64) {
        self.free += 1;
        let lane = self.lane(id);
        lane.holding -= 1;
        if lane.holding == 0 {
            self.holders.retain(|holder| *holder != id);
        }
    }

    /// Stands in line.
    fn join(&mut self, id: u64) -> u64 {
        if self.waiting == 0 {
            self.level();
        }
        let floor = self.floor;
        let lane = self.lane(id);
        let idle = lane.holding == 0 && lane.line.is_empty();
        lane.raise(if idle { floor } else { floor.saturating_sub(LAG_MAX) });
        let number = lane.line.join();
        if lane.line.len() == 1 {
            lane.key = lane.virtual_time();
            let key = lane.key;
            self.eager.insert((key, id));
        }
        self.waiting += 1;
        number
    }

    /// Lanes that compute start level: what they took while nobody waited doesn't count.
    fn level(&mut self) {
        let Self { holders, lanes, floor, .. } = self;
        for id in holders.iter() {
            *floor = lanes.get(id).map_or(0, Lane::virtual_time).max(*floor);
        }
        for id in holders.iter() {
            if let Some(lane) = lanes.get_mut(id) {
                lane.raise(*floor);
            }
        }
    }

    /// Gives a free processor to whoever is next.
    fn serve(&mut self) -> Option<(u64, u64, Option<Waker>)> {
        if self.free == 0 {
            return None;
        }
        let (id, time) = self.least()?;
        let lane = self.lane(id);
        let (number, waker) = lane.line.pop()?;
        if lane.line.is_empty() {
            self.eager.remove(&(time, id));
        }
        self.waiting -= 1;
        self.floor = self.floor.max(time);
        self.take(id);
        Some((id, number, waker))
    }

    /// The lane with the least virtual time of those with somebody in line.
    fn least(&mut self) -> Option<(u64, u64)> {
        loop {
            let (key, id) = self.eager.first().copied()?;
            let lane = self.lane(id);
            let time = lane.virtual_time();
            if time <= key {
                return Some((id, key));
            }
            lane.key = time;
            self.eager.remove(&(key, id));
            self.eager.insert((time, id));
        }
    }

    /// Leaves the line. `None`: it had been served.
    fn leave(&mut self, id: u64, number: u64) -> Option<Option<Waker>> {
        let lane = self.lane(id);
        let waker = lane.line.leave(number)?;
        let (empty, key) = (lane.line.is_empty(), lane.key);
        if empty {
            self.eager.remove(&(key, id));
        }
        self.waiting -= 1;
        Some(waker)
    }

    /// Whether a lane other than `id` computes or waits.
    fn others(&self, id: u64) -> bool {
        self.holders.iter().any(|holder| *holder != id)
            || self.eager.len() > 1
            || self.eager.first().is_some_and(|(_, eager)| *eager != id)
    }
}

impl Gate {
    pub(super) fn new(processors: usize) -> Self {
        let lanes = Lanes {
            free: processors.max(1),
            floor: 0,
            waiting: 0,
            next: 0,
            lanes: BTreeMap::new(),
            eager: BTreeSet::new(),
            holders: Vec::new(),
        };
        Self {
            lanes: Mutex::new(lanes),
            waiting: AtomicUsize::new(0),
            mixed: AtomicBool::new(false),
            short_slices: AtomicU32::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows what others look at without the lock.
    fn publish(&self, lanes: &Lanes) {
        self.waiting.store(lanes.waiting, Ordering::Release);
        let first = lanes.holders.first().or(lanes.eager.first().map(|(_, id)| id));
        let mixed = first.is_some_and(|id| lanes.others(*id));
        self.mixed.store(mixed, Ordering::Relaxed);
    }

    /// A new lane for a tenant whose processor time is counted in `compute`.
    pub(super) fn open_lane(&self, compute: Arc<AtomicU64>) -> u64 {
        let mut lanes = self.lock();
        let id = lanes.next;
        lanes.next += 1;
        lanes
            .lanes
            .insert(id, Lane { compute, lead: 0, holding: 0, line: Line::default(), key: 0 });
        id
    }

    /// Ends a lane in which nobody computes or waits.
    pub(super) fn close_lane(&self, id: u64) {
        let lane = self.lock().lanes.remove(&id);
        drop(lane);
    }

    /// Asks for a processor; `None`: it's there.
    pub(super) fn enter(&self, id: u64) -> Option<Place<ForProcessor<'_>>> {
        let mut lanes = self.lock();
        if lanes.free > 0 {
            lanes.take(id);
            self.publish(&lanes);
            return None;
        }
        let number = lanes.join(id);
        if lanes.others(id) {
            self.short_slices.store(SHORT_SLICES, Ordering::Relaxed);
        }
        self.publish(&lanes);
        Some(Place::new(ForProcessor { gate: self, lane: id }, number))
    }

    /// Gives a processor back.
    pub(super) fn leave(&self, id: u64) {
        let mut lanes = self.lock();
        lanes.give(id);
        let served = lanes.serve();
        self.publish(&lanes);
        drop(lanes);
        wake(served);
    }

    /// Lets whoever is next have the processor, and stands in line again; `None`: it may be kept.
    pub(super) fn hand_over(&self, id: u64) -> Option<Place<ForProcessor<'_>>> {
        let mut lanes = self.lock();
        if lanes.waiting == 0 {
            return None;
        }
        let number = lanes.join(id);
        lanes.give(id);
        let served = lanes.serve();
        if lanes.others(id) {
            self.short_slices.store(SHORT_SLICES, Ordering::Relaxed);
        }
        self.publish(&lanes);
        drop(lanes);
        let kept = served.as_ref().is_some_and(|(lane, place, _)| (*lane, *place) == (id, number));
        wake(served);
        (!kept).then(|| Place::new(ForProcessor { gate: self, lane: id }, number))
    }

    /// Whether anybody waits for a processor.
    pub(super) fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::Acquire) > 0
    }

    /// Whether slices should be short: another tenant's guest may wait for their end.
    pub(super) fn is_contended(&self) -> bool {
        self.mixed.load(Ordering::Relaxed) || self.short_slices.load(Ordering::Relaxed) > 0
    }

    /// Counts a slice, for how long they stay short.
    pub(super) fn note_slice(&self) {
        if self.short_slices.load(Ordering::Relaxed) > 0 {
            // An error means that another guest counted the last one.
            let _ = self
                .short_slices
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        }
    }

    /// `(free processors, in line, lanes in line, lanes that hold one)`
    #[cfg(test)]
    pub(super) fn census(&self) -> (usize, usize, usize, usize) {
        let lanes = self.lock();
        assert_eq!(lanes.waiting, lanes.lanes.values().map(|lane| lane.line.len()).sum::<usize>());
        assert_eq!(lanes.waiting, self.waiting.load(Ordering::Acquire));
        (lanes.free, lanes.waiting, lanes.eager.len(), lanes.holders.len())
    }
}

fn wake(served: Option<(u64, u64, Option<Waker>)>) {
    if let Some((_, _, Some(waker))) = served {
        waker.wake();
    }
}

/// Waiting for a processor.
pub(super) struct ForProcessor<'a> {
    gate: &'a Gate,
    lane: u64,
}

impl Counter for ForProcessor<'_> {
    fn poll_place(&self, number: u64, waker: &Waker) -> bool {
        let waker = waker.clone();
        let mut lanes = self.gate.lock();
        let before = lanes.lane(self.lane).line.register(number, waker);
        drop(lanes);
        before.is_err()
    }

    fn give_up(&self, number: u64) {
        let mut lanes = self.gate.lock();
        let left = lanes.leave(self.lane, number);
        let served = if left.is_none() {
            lanes.give(self.lane);
            lanes.serve()
        } else {
            None
        };
        self.gate.publish(&lanes);
        drop(lanes);
        wake(served);
    }
}

//! What a running cell has spent, and when it must stop.
//!
//! The metered module (see `meter.rs`) counts a fuel global down and calls the host when it is
//! below zero: one *slice* is used up. Everything that can stop a guest is decided here, from these
//! calls and from the ends of host waits.

use std::time::{Duration, Instant};

use super::meter::FLOOR_DEFAULT;
use crate::limits::{Limit, Limits, Usage};

/// Fuel of one slice: about a millisecond of guest time (`cargo bench --bench sessions -- fuel` prints the rate).
/// Between two slices a session can neither be stopped nor yield its thread.
pub(crate) const SLICE_FUEL: i64 = 16_000_000;

/// The same when several tenants compute: about 0.2 ms.
const SLICE_FUEL_SHORT: i64 = SLICE_FUEL / 4;

/// After this time in one go a guest that keeps calling the host has its slice cut.
const OVERDUE: Duration = Duration::from_millis(3);

/// What to do at the end of a slice or of a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Go on.
    Continue,
    /// Raise inside the guest, once.
    SoftStop(Limit),
    /// End the cell: the guest did not yield within the grace.
    HardStop,
}

/// A soft stop that was made.
#[derive(Debug, Clone, Copy)]
struct Stop {
    limit: Limit,
    fuel: u64,
    compute: Duration,
    at: Instant,
}

/// The account of one cell.
#[derive(Debug)]
pub(crate) struct Budget {
    limits: Limits,
    started: Instant,
    /// Since when the guest has been running; `None` while it waits for the host or its turn.
    running_since: Option<Instant>,
    compute: Duration,
    host_wait: Duration,
    /// Fuel of ended slices.
    fuel: u64,
    /// What the fuel global was set to at the start of this slice.
    granted: i64,
    /// What a slice is at present.
    slice_fuel: i64,
    /// Compute that the tenant was charged with.
    billed: Duration,
    stop: Option<Stop>,
}

impl Budget {
    /// A new cell starts now. The fuel global must be set to [`grant`](Self::grant).
    pub(crate) fn start(limits: Limits) -> Self {
        let now = Instant::now();
        let mut budget = Self {
            limits,
            started: now,
            running_since: Some(now),
            compute: Duration::ZERO,
            host_wait: Duration::ZERO,
            fuel: 0,
            granted: 0,
            slice_fuel: SLICE_FUEL,
            billed: Duration::ZERO,
            stop: None,
        };
        budget.granted = budget.next_grant();
        budget
    }

    /// What the fuel global has to hold for the slice that begins.
    pub(crate) fn grant(&self) -> i64 {
        self.granted
    }

    /// How far below zero the fuel global may go before a loop that nothing else can stop is ended by
    /// the guest's own check (`kaa:floor`, see `meter.rs`): what the cell has left, and the grace.
    pub(crate) fn floor(&self) -> i64 {
        let end = match self.stop {
            Some(Stop { limit: Limit::Fuel, fuel, .. }) => fuel,
            Some(_) => self.fuel.saturating_add(u64::try_from(self.granted).unwrap_or(0)),
            None => self.limits.fuel.max(self.fuel),
        };
        let overdraft = end
            .saturating_add(self.grace_fuel())
            .saturating_sub(self.fuel)
            .saturating_sub(u64::try_from(self.granted).unwrap_or(0));
        i64::try_from(overdraft).map_or(FLOOR_DEFAULT, |overdraft| FLOOR_DEFAULT.max(-overdraft))
    }

    /// The limit that a guest which ran into its floor has reached.
    pub(crate) fn limit_at_floor(&self, left: i64) -> Limit {
        if let Some(stop) = self.stop {
            return stop.limit;
        }
        let spent = self.fuel.saturating_add(self.granted.saturating_sub(left).max(0) as u64);
        if spent >= self.limits.fuel { Limit::Fuel } else { Limit::Compute }
    }

    /// Ends a slice whose global shows `left`, and begins the next.
    pub(crate) fn slice(&mut self, left: i64, interrupted: bool) -> Verdict {
        self.settle(left);
        let verdict = self.verdict(interrupted);
        if let Verdict::SoftStop(limit) = verdict {
            self.note_stop(limit);
        }
        self.granted = self.next_grant();
        verdict
    }

    /// Whether the guest has run for longer than a slice should take: calls of the host cost it time
    /// that no fuel measures.
    pub(crate) fn is_overdue(&self) -> bool {
        self.running_since.is_some_and(|since| since.elapsed() > OVERDUE)
    }

    /// Ends the slice early without charging for what is left of it; the global has to be below 0
    /// then.
    pub(crate) fn cut_slice(&mut self, left: i64) {
        self.granted = self.granted.saturating_sub(left.saturating_add(1));
    }

    /// The guest begins to wait for something outside.
    pub(crate) fn wait(&mut self) {
        self.pause();
    }

    /// A wait of this length is over.
    pub(crate) fn resume_after_wait(&mut self, waited: Duration) {
        self.host_wait += waited;
        self.resume();
    }

    /// The guest stops running for a moment, without waiting for anything: others have their turn.
    pub(crate) fn pause(&mut self) {
        if let Some(since) = self.running_since.take() {
            self.compute += since.elapsed();
        }
    }

    /// What was computed since this was asked the last time, up to the last pause.
    pub(crate) fn take_unbilled(&mut self) -> Duration {
        let unbilled = self.compute.saturating_sub(self.billed);
        self.billed = self.compute;
        unbilled
    }

    /// Whether others want the processor: then they get their turn sooner.
    pub(crate) fn use_short_slices(&mut self, short: bool) {
        self.slice_fuel = if short { SLICE_FUEL_SHORT } else { SLICE_FUEL };
    }

    /// The guest runs again.
    pub(crate) fn resume(&mut self) {
        self.running_since = Some(Instant::now());
    }

    /// Until when a wait may last, and what happens then.
    pub(crate) fn wait_deadline(&self) -> (Instant, Verdict) {
        match self.stop {
            None => (self.started + self.limits.wall, Verdict::SoftStop(Limit::Wall)),
            Some(stop) => (stop.at + self.limits.grace, Verdict::HardStop),
        }
    }

    /// Notes that a soft stop is made now.
    pub(crate) fn note_stop(&mut self, limit: Limit) {
        self.stop = Some(Stop {
            limit,
            fuel: self.fuel,
            compute: self.compute_so_far(),
            at: Instant::now(),
        });
    }

    /// The soft stop of this cell, if there was one.
    pub(crate) fn stopped_by(&self) -> Option<Limit> {
        self.stop.map(|stop| stop.limit)
    }

    /// Ends the account; the global shows `left`.
    pub(crate) fn finish(&mut self, left: i64, memory_bytes: u64) -> Usage {
        self.settle(left);
        self.pause();
        Usage {
            fuel: Some(self.fuel),
            compute: self.compute,
            wall: self.started.elapsed(),
            host_wait: self.host_wait,
            memory_bytes,
            ..Usage::default()
        }
    }

    fn settle(&mut self, left: i64) {
        // The guest can't write the global, but an overflow here must not panic whatever it holds.
        self.fuel = self.fuel.saturating_add(self.granted.saturating_sub(left).max(0) as u64);
        self.granted = left;
    }

    fn compute_so_far(&self) -> Duration {
        self.compute + self.running_since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    fn verdict(&self, interrupted: bool) -> Verdict {
        let compute = self.compute_so_far();
        if let Some(stop) = self.stop {
            // After a fuel stop fuel decides, so that it's as reproducible as the fuel is; time only
            // where it is far beyond what the fuel could have taken.
            let spent = compute.saturating_sub(stop.compute);
            let over = match stop.limit {
                Limit::Fuel => {
                    self.fuel.saturating_sub(stop.fuel) > self.grace_fuel()
                        || spent > self.limits.grace.saturating_mul(10)
                }
                _ => spent > self.limits.grace,
            };
            return if over { Verdict::HardStop } else { Verdict::Continue };
        }
        if self.fuel >= self.limits.fuel {
            Verdict::SoftStop(Limit::Fuel)
        } else if interrupted {
            Verdict::SoftStop(Limit::Interrupt)
        } else if compute > self.limits.compute {
            Verdict::SoftStop(Limit::Compute)
        } else if self.started.elapsed() > self.limits.wall {
            Verdict::SoftStop(Limit::Wall)
        } else {
            Verdict::Continue
        }
    }

    /// The grace in fuel, at the rate of a slice per millisecond.
    fn grace_fuel(&self) -> u64 {
        let slices = u64::try_from(self.limits.grace.as_millis()).unwrap_or(u64::MAX).max(1);
        slices.saturating_mul(SLICE_FUEL as u64)
    }

    /// A slice, or what is left of the limit or of the grace after it: both are met to the unit, at
    /// the next check, whatever the slices were.
    fn next_grant(&self) -> i64 {
        let left = match self.stop {
            None => self.limits.fuel.saturating_sub(self.fuel).saturating_sub(1),
            Some(Stop { limit: Limit::Fuel, fuel, .. }) => {
                fuel.saturating_add(self.grace_fuel()).saturating_sub(self.fuel)
            }
            Some(_) => return self.slice_fuel,
        };
        self.slice_fuel.min(i64::try_from(left).unwrap_or(i64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(fuel: u64) -> Budget {
        Budget::start(Limits { fuel, grace: Duration::from_millis(2), ..Limits::default() })
    }

    #[test]
    fn fuel_stops_softly_at_the_limit_and_hard_after_the_grace() {
        let mut budget = budget(2 * SLICE_FUEL as u64);
        assert_eq!(budget.slice(-1, false), Verdict::Continue);
        assert_eq!(budget.grant(), SLICE_FUEL - 2);
        assert_eq!(budget.slice(-1, false), Verdict::SoftStop(Limit::Fuel));
        assert_eq!(budget.slice(-1, false), Verdict::Continue);
        assert_eq!(budget.slice(-1, false), Verdict::HardStop);
        let usage = budget.finish(SLICE_FUEL, 0);
        assert_eq!(usage.fuel, Some(4 * SLICE_FUEL as u64 + 1));
    }

    #[test]
    fn the_fuel_of_a_hard_stop_does_not_depend_on_the_slices() {
        for (short, cut) in [(false, 0), (true, 0), (false, 1_000_000), (true, 12_345)] {
            let mut budget = budget(2 * SLICE_FUEL as u64);
            loop {
                budget.use_short_slices(short);
                if cut > 0 && budget.grant() > cut {
                    budget.cut_slice(budget.grant() - cut);
                }
                if budget.slice(-1, false) == Verdict::HardStop {
                    break;
                }
            }
            let usage = budget.finish(budget.grant(), 0);
            assert_eq!(usage.fuel, Some(4 * SLICE_FUEL as u64 + 1), "{short} {cut}");
        }
    }

    #[test]
    fn time_without_the_guest_is_not_compute() {
        let mut budget = budget(1 << 40);
        let since = Instant::now();
        budget.wait();
        std::thread::sleep(Duration::from_millis(20));
        budget.resume_after_wait(since.elapsed());
        let usage = budget.finish(budget.grant(), 0);
        assert!(usage.host_wait >= Duration::from_millis(20), "{usage:?}");
        assert!(usage.compute < Duration::from_millis(10), "{usage:?}");
        assert!(usage.wall >= usage.host_wait);
    }

    #[test]
    fn a_global_out_of_range_does_not_panic() {
        let mut budget = budget(1 << 40);
        assert_eq!(budget.slice(i64::MIN, false), Verdict::SoftStop(Limit::Fuel));
    }
}

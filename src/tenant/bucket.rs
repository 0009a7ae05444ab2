//! A tenant's allowance of processor time: what it earns per second, less what its guests took.

use std::time::Duration;

use tokio::time::Instant;

const SECOND: u128 = 1_000_000_000;

/// A token bucket, in nanoseconds of processor time. It may go into debt: a guest is charged after
/// it has computed.
#[derive(Debug)]
pub(super) struct Bucket {
    /// Earned per second; also the most that is kept.
    rate: u64,
    level: i64,
    /// Taken out for guests that sleep off the debt and will compute one slice each: so they wake
    /// one after the other, not all at once.
    reserved: i64,
    /// The tenant's total of compute that the level accounts for.
    charged: u64,
    refilled: Instant,
}

impl Bucket {
    /// A full one.
    pub(super) fn new(per_second: Duration) -> Self {
        let rate = nanos(per_second);
        Self { rate, level: rate as i64, reserved: 0, charged: 0, refilled: Instant::now() }
    }

    /// Brings it up to date with the tenant's total of compute. What's left is the answer; a tenant
    /// with nothing left has to wait.
    pub(super) fn settle(&mut self, total: u64) -> i64 {
        let spent = i64::try_from(total.saturating_sub(self.charged)).unwrap_or(i64::MAX);
        self.charged = self.charged.max(total);
        let now = Instant::now();
        let elapsed = now.saturating_duration_since(self.refilled).as_nanos();
        let earned = i64::try_from(elapsed * u128::from(self.rate) / SECOND).unwrap_or(i64::MAX);
        // An advance too short to earn anything is not lost: it counts from where the last ended.
        if earned > 0 {
            self.refilled = now;
        }
        // As if all was spent at the end: what was earned while nothing was spent is kept for a second
        // and no longer.
        self.level = self.level.saturating_add(earned).min(self.rate as i64).saturating_sub(spent);
        self.left()
    }

    pub(super) fn left(&self) -> i64 {
        self.level.saturating_sub(self.reserved)
    }

    /// How long it takes until there is something left; zero when there is.
    pub(super) fn wait(&self) -> Duration {
        let missing = u128::from(1_i64.saturating_sub(self.left()).max(0).unsigned_abs());
        let nanos = (missing * SECOND).div_ceil(u128::from(self.rate));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    pub(super) fn reserve(&mut self, nanos: i64) {
        self.reserved += nanos;
    }

    pub(super) fn give_back(&mut self, nanos: i64) {
        self.reserved -= nanos;
    }

    pub(super) fn set_rate(&mut self, per_second: Duration) {
        self.rate = nanos(per_second);
        self.level = self.level.min(self.rate as i64);
    }

    #[cfg(test)]
    pub(super) fn reserved(&self) -> i64 {
        self.reserved
    }
}

/// `Quotas::validate` bounds it far below what an `i64` holds.
fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(i64::MAX as u64).clamp(1, i64::MAX as u64)
}

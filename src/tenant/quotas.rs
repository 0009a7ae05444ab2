//! What a tenant may have, and what it has.

use std::time::Duration;

use crate::error::{Error, Result};
use crate::lm::UsageSummary;

/// What the sessions of one tenant may have together. Every field is finite by default.
///
/// A session's own limits ([`Limits`](crate::Limits)) hold beside these: whichever is lower stops it.
///
/// ```
/// use kaa::Quotas;
/// use std::time::Duration;
///
/// let quotas = Quotas { compute_per_second: Duration::from_millis(500), ..Quotas::default() };
/// assert!(quotas.validate().is_ok());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quotas {
    /// Live sessions of the tenant. Default 1,024, at most a million.
    /// On excess opening a session is [`Error::Quota`].
    pub sessions: u32,
    /// Private memory of all its sessions together, in bytes: what they don't share with their image.
    /// Default 16 GiB. A guest that would grow beyond it gets a `MemoryError`; a tenant that is above
    /// it already starts no cell ([`Error::Quota`]).
    pub memory_bytes: u64,
    /// Cells of the tenant that are begun and not ended, waits for LMs and tools included.
    /// Default 1,024, at least 1, at most a million. More wait in the queue. Cells of a session that
    /// was opened with a [`depth`](crate::EnvironmentOptions::depth) above 0 run within the cell that
    /// asked for them: they neither count nor wait here.
    pub cells: u32,
    /// Cells of the tenant that may wait to begin. Default 4,096, at most a million; 0 lets none wait.
    /// On excess the cell is [`Error::Quota`].
    pub queue: u32,
    /// The longest time that a cell waits to begin. Default 60 s, at most a day.
    /// After it the cell is [`Error::Quota`].
    pub queue_wait: Duration,
    /// Processor time that the tenant's guests may take per second of elapsed time; 2 s are two
    /// processors. Unused time is kept for a second. Default 64 s, from 1 ms to 1,024 s.
    /// A guest that outspends it is delayed about every millisecond; a new cell waits in the queue.
    pub compute_per_second: Duration,
    /// Prompts to language models over the life of the tenant. Default a million.
    /// On excess the call fails as it does at the session's own limit.
    pub lm_calls: u64,
    /// Prompts in flight at once over all the tenant's sessions. Default 256, from 1 to 10,000.
    /// More wait, first come first served.
    pub lm_concurrency: u32,
}

const COUNT_MAX: u64 = 1_000_000;
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Below it a slice of a guest would be paid off over seconds.
const COMPUTE_MIN: Duration = Duration::from_millis(1);
const COMPUTE_MAX: Duration = Duration::from_secs(1024);

impl Default for Quotas {
    fn default() -> Self {
        Self {
            sessions: 1_024,
            memory_bytes: 16 << 30,
            cells: 1_024,
            queue: 4_096,
            queue_wait: Duration::from_secs(60),
            compute_per_second: Duration::from_secs(64),
            lm_calls: 1_000_000,
            lm_concurrency: 256,
        }
    }
}

impl Quotas {
    /// Checks every field.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] names the first field that is out of its range, and the range.
    pub fn validate(&self) -> Result<()> {
        range("quotas.sessions", self.sessions.into(), 1, COUNT_MAX)?;
        range("quotas.memory_bytes", self.memory_bytes, 1, i64::MAX as u64)?;
        range("quotas.cells", self.cells.into(), 1, COUNT_MAX)?;
        range("quotas.queue", self.queue.into(), 0, COUNT_MAX)?;
        range("quotas.lm_calls", self.lm_calls, 0, i64::MAX as u64)?;
        range("quotas.lm_concurrency", self.lm_concurrency.into(), 1, 10_000)?;
        time("quotas.queue_wait", self.queue_wait, Duration::ZERO, DAY)?;
        time("quotas.compute_per_second", self.compute_per_second, COMPUTE_MIN, COMPUTE_MAX)
    }
}

fn range(what: &str, value: u64, min: u64, max: u64) -> Result<()> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(Error::invalid(what, format!("must be between {min} and {max}, not {value}")))
}

fn time(what: &str, value: Duration, min: Duration, max: Duration) -> Result<()> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(Error::invalid(what, format!("must be between {min:?} and {max:?}, not {value:?}")))
}

/// How often each quota of a tenant refused something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refusals {
    /// Sessions that were not opened.
    pub sessions: u64,
    /// Growths of a guest's memory, and cells of a tenant that was above the quota.
    pub memory_bytes: u64,
    /// Cells that found the queue full.
    pub queue: u64,
    /// Cells that waited too long.
    pub queue_wait: u64,
    /// Prompts that were not sent.
    pub lm_calls: u64,
}

/// What a tenant has now, and had so far.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct TenantUsage {
    /// The tenant's name.
    pub name: String,
    /// Live sessions.
    pub sessions: u32,
    /// Private memory of all of them, in bytes.
    pub memory_bytes: u64,
    /// The most that it has been, in bytes.
    pub memory_bytes_peak: u64,
    /// Cells that have begun and not ended, those that wait for a processor or an LM included. May be
    /// above [`Quotas::cells`] by those that run within others.
    pub cells_running: u32,
    /// Cells that wait to begin.
    pub cells_waiting: u32,
    /// Cells that have begun, over the life of the tenant.
    pub cells: u64,
    /// Processor time of its guests, over the life of the tenant.
    pub compute: Duration,
    /// Time that its cells waited for their turn or were slowed down, summed over cells.
    pub delayed: Duration,
    /// Prompts sent to language models, over the life of the tenant.
    pub lm_calls: u64,
    /// What the answers cost, by model, over the life of the tenant.
    pub lm_usage: UsageSummary,
    /// What was refused.
    pub refused: Refusals,
}

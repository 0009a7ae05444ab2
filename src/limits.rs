//! What a guest may spend, and what it spent.

use std::fmt;
use std::time::Duration;

use crate::error::{Error, Result};

/// Which limit stopped a cell, or was caught by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Limit {
    /// [`Limits::fuel`].
    Fuel,
    /// [`Limits::compute`].
    Compute,
    /// [`Limits::wall`].
    Wall,
    /// Not a limit of the environment but its owner's wish: [`Interrupt::interrupt`](crate::Interrupt::interrupt).
    Interrupt,
}

impl Limit {
    /// The name used on the wire, in JSON and in messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fuel => "fuel",
            Self::Compute => "compute",
            Self::Wall => "wall",
            Self::Interrupt => "interrupt",
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a guest may spend. Every field is finite by default.
///
/// *Per cell* limits start anew with each `execute`; *per environment* limits hold for what the
/// environment has at any one time. The table of the README says which backend enforces what.
///
/// ```
/// use kaa::Limits;
/// use std::time::Duration;
///
/// let limits = Limits { compute: Duration::from_secs(5), ..Limits::default() };
/// assert!(limits.validate().is_ok());
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Metering units per cell: roughly one per executed Wasm operator, deterministic.
    /// Default 10¹² (about a minute of guest time). On excess: soft stop, then hard stop.
    pub fuel: u64,
    /// Time per cell that the guest computes; waiting for the host doesn't count.
    /// Default 60 s. On excess: soft stop, then hard stop.
    pub compute: Duration,
    /// Elapsed time per cell, waits included. Default 10 min. On excess: soft stop, then hard stop.
    pub wall: Duration,
    /// Compute time, and for fuel its equivalent, that a cell gets after a soft stop to clean up
    /// and end, before the hard stop rolls it back. Default 500 ms.
    pub grace: Duration,
    /// Linear memory and tables of the environment in bytes, the interpreter and its image (about
    /// 40 MiB) included. Default 1 GiB, at most 4 GiB. On excess Python raises `MemoryError`.
    pub memory_bytes: u64,
    /// Bytes kept of stdout and of stderr, each, per cell. Default 1 MiB.
    /// What comes after is counted and dropped; the cell goes on.
    pub output_bytes: u64,
    /// Prompts that a cell may send to language models, batches counted by prompt. Default 1,000.
    /// On excess the call answers an error string (an exception in profiles where LM errors raise).
    pub lm_calls: u32,
    /// LM calls of one batch in flight at once. Default 32. More wait on the host.
    pub lm_concurrency: u32,
    /// Host tool calls per cell. Default 10,000. On excess the call raises `RuntimeError`.
    pub tool_calls: u32,
    /// Bytes of files in the environment's scratch directory `/tmp`, plus bytes that a cell's
    /// environment has ever written to writable mounts. Default 64 MiB.
    /// On excess writes fail with `OSError` (`ENOSPC`).
    pub disk_bytes: u64,
}

/// The largest value of [`Limits::memory_bytes`]: the reach of a 32-bit linear memory.
pub const MEMORY_BYTES_MAX: u64 = 1 << 32;
/// The smallest value of [`Limits::memory_bytes`] that leaves room for an interpreter.
pub const MEMORY_BYTES_MIN: u64 = 64 << 20;
/// The longest time that a limit may have.
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
/// The largest value of [`Limits::output_bytes`]: it is host memory.
pub const OUTPUT_BYTES_MAX: u64 = 1 << 30;

impl Default for Limits {
    fn default() -> Self {
        Self {
            fuel: 1_000_000_000_000,
            compute: Duration::from_secs(60),
            wall: Duration::from_secs(600),
            grace: Duration::from_millis(500),
            memory_bytes: 1 << 30,
            output_bytes: 1 << 20,
            lm_calls: 1_000,
            lm_concurrency: 32,
            tool_calls: 10_000,
            disk_bytes: 64 << 20,
        }
    }
}

impl Limits {
    /// No limit on what only costs the guest's own time, for trusted code.
    ///
    /// What protects the host stays finite: memory, output, LM concurrency and disk keep their
    /// defaults, and times are a year.
    #[must_use]
    pub fn unlimited() -> Self {
        Self {
            fuel: i64::MAX as u64,
            compute: YEAR,
            wall: YEAR,
            lm_calls: u32::MAX,
            tool_calls: u32::MAX,
            ..Self::default()
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] names the first field that is out of its range, and the range.
    pub fn validate(&self) -> Result<()> {
        range("limits.fuel", self.fuel, 1, i64::MAX as u64)?;
        range("limits.memory_bytes", self.memory_bytes, MEMORY_BYTES_MIN, MEMORY_BYTES_MAX)?;
        range("limits.output_bytes", self.output_bytes, 0, OUTPUT_BYTES_MAX)?;
        range("limits.lm_concurrency", self.lm_concurrency.into(), 1, 10_000)?;
        for (name, value) in [("compute", self.compute), ("wall", self.wall), ("grace", self.grace)]
        {
            if value.is_zero() || value > YEAR {
                return Err(Error::invalid(
                    format!("limits.{name}"),
                    format!("must be longer than 0 s and at most a year, not {value:?}"),
                ));
            }
        }
        Ok(())
    }
}

fn range(what: &str, value: u64, min: u64, max: u64) -> Result<()> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(Error::invalid(what, format!("must be between {min} and {max}, not {value}")))
}

/// What a cell spent.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Usage {
    /// Metering units; `None` where the backend doesn't meter.
    pub fuel: Option<u64>,
    /// Time that the guest computed.
    pub compute: Duration,
    /// Elapsed time.
    pub wall: Duration,
    /// Time that the guest waited for LM calls, tools and sleeps.
    pub host_wait: Duration,
    /// Size of the guest's memory at the end of the cell, in bytes. It never shrinks while an
    /// environment lives, so that it's the peak as well.
    pub memory_bytes: u64,
    /// Prompts sent to language models.
    pub lm_calls: u32,
    /// Host tool calls.
    pub tool_calls: u32,
}

//! The suite that every backend has to pass: cells and what has to come of them, as data.
//!
//! A [`Case`] is a file of `tests/cases/`: Python in cells, and after each what it has to give. All of
//! them together hold every sentence of the [contract](crate::Environment), every profile and every
//! exact error string. [`run`] runs one over any [`Backend`](crate::Backend); where a backend gives
//! something else, a row of [`Differences`] says what and why. [`run_plain`] runs a case of plain
//! Python with CPython itself, which has to give the same.
//!
//! What a backend doesn't have by its own [`Capabilities`](crate::Capabilities) isn't skipped: a
//! case that needs it has to meet [`Error::Unsupported`](crate::Error::Unsupported), and one that
//! needs a rollback a session that is poisoned until it is reset.
//!
//! # Example: the suite over another backend
//!
//! ```no_run
//! use kaa::Backend;
//! use kaa::conformance::{Differences, Verdict, cases, run};
//!
//! # async fn example(backend: &dyn Backend) -> Result<(), Box<dyn std::error::Error>> {
//! let cases = cases()?;
//! // Only rows that name the backend count, so this one has none. It may have a table of its own.
//! let differences = Differences::parse("", &cases)?;
//! for case in &cases {
//!     match run(case, backend, &differences).await {
//!         Ok(Verdict::Lacks(what)) => println!("{}: refused, without {what}", case.name()),
//!         Ok(_) => println!("{}: ok", case.name()),
//!         Err(failure) => println!("{failure}"),
//!     }
//! }
//! # Ok(())
//! # }
//! ```

mod case;
mod contract;
mod cpython;
mod differences;
mod embedded;
mod expect;
mod observe;
mod run;
mod setup;
mod values;

use std::fmt;

pub use self::case::Case;
pub use self::contract::CONTRACT;
pub use self::cpython::run_plain;
pub use self::differences::Differences;
pub use self::run::run;
use crate::error::Result;

/// The cases that come with the suite, by name.
///
/// # Errors
///
/// [`Error::Invalid`](crate::Error::Invalid), which Kaa's own tests exclude.
pub fn cases() -> Result<Vec<Case>> {
    embedded::CASES.iter().map(|(name, text)| Case::parse(name, text)).collect()
}

/// How a case ended that didn't fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// Every step gave what it has to.
    Passed,
    /// Steps gave what the table of differences says instead.
    Differs,
    /// The backend has no such capability, and behaved as one has to that doesn't.
    Lacks(&'static str),
}

/// Why a case failed: its text says which step gave what, and what it has to give.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    case: String,
    /// From 1; 0 is the opening of the session.
    step: usize,
    line: usize,
    backend: String,
    reason: String,
}

impl Failure {
    fn new(case: &Case, step: usize, backend: &str, reason: String) -> Self {
        let line = step.checked_sub(1).and_then(|at| case.steps.get(at));
        Self {
            case: case.name().to_owned(),
            step,
            line: line.map_or(1, |step| step.line),
            backend: backend.to_owned(),
            reason,
        }
    }

    /// The number of the step that failed, from 1; 0 for the opening of the session.
    #[must_use]
    pub fn step(&self) -> usize {
        self.step
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { case, step, line, backend, reason } = self;
        write!(f, "{case} on {backend}, step {step} (tests/cases/{case}.py:{line}):\n{reason}")
    }
}

impl std::error::Error for Failure {}

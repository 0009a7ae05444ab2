//! What can be measured.

use std::fmt;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::workload::{Block, Workload};
use crate::error::Error;

/// Something that runs cells, and is timed at it. [`Sessions`](super::Sessions) is one for every
/// [`Backend`](crate::Backend); what isn't a backend implements this itself.
#[async_trait]
pub trait Subject: Send {
    /// What its column is called.
    fn name(&self) -> &str;

    /// What it is. Asked once, before everything else; it may start what it needs for that.
    ///
    /// # Errors
    ///
    /// [`Missed`] when it isn't there. Nothing is measured then, and the report says why.
    async fn describe(&mut self) -> Result<Facts, Missed>;

    /// Takes samples of a workload, in its [unit](Workload::unit), as many as the block says. What the
    /// code says must have been checked: time that was taken to a wrong answer is none.
    ///
    /// The future may be dropped when it takes too long.
    ///
    /// # Errors
    ///
    /// [`Missed`] when it can't; it isn't asked for this workload again.
    async fn measure(&mut self, workload: Workload, block: &Block) -> Result<Vec<f64>, Missed>;

    /// Gives back what it holds. Nothing is measured afterwards.
    async fn close(&mut self) {}
}

/// What a subject is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Facts {
    /// What cells run in, in a few words: `a container of python:3.11-slim`.
    pub what: String,
    /// The Python that they run on, such as `3.11.7`.
    pub python: String,
    /// Whether it keeps them from the host.
    pub isolated: bool,
}

impl Facts {
    /// Cells run on this Python in what is named.
    #[must_use]
    pub fn new(what: impl Into<String>, python: impl Into<String>, isolated: bool) -> Self {
        Self { what: what.into(), python: python.into(), isolated }
    }
}

/// Why there is no figure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missed(pub String);

impl Missed {
    /// For this reason.
    #[must_use]
    pub fn because(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

impl fmt::Display for Missed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Missed {}

impl From<Error> for Missed {
    fn from(error: Error) -> Self {
        Self(error.to_string())
    }
}

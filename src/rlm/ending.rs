//! How a run ends: with an answer, or with the reason why there is none.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value as Json;

use crate::error::Error;
use crate::lm::{BudgetPart, Exhausted, LmError, UsageSummary};

/// A run's answer.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct RlmCompletion {
    /// The answer.
    pub response: String,
    /// Where it's from.
    pub ending: Ending,
    /// The model that the loop asked, as far as it's known.
    pub root_model: String,
    /// Turns that were taken; the last-chance call isn't one.
    pub turns: u32,
    /// Blocks of code that were run.
    pub cells: u32,
    /// What all calls of language models cost, those of children included.
    pub usage: UsageSummary,
    /// How long it took.
    pub execution_time: Duration,
    /// The file that the trajectory was written to.
    pub log: Option<PathBuf>,
    /// The trajectory in RLM's form, when it was [recorded](crate::RlmOptions::record).
    pub metadata: Option<Json>,
}

/// Where an answer is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The model gave it.
    Answered,
    /// The turns ran out; it's what the model said to the last-chance call.
    OutOfTurns,
}

impl Ending {
    /// The name used in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::OutOfTurns => "out_of_turns",
        }
    }
}

/// A run that gave no answer.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
#[non_exhaustive]
pub struct RlmError {
    /// Why.
    pub reason: RlmStop,
    /// The last thing that the model said, which may be of use.
    pub partial_answer: Option<String>,
    /// What all calls of language models cost until then.
    pub usage: UsageSummary,
}

/// A run that ended before anything was asked.
impl From<RlmStop> for RlmError {
    fn from(reason: RlmStop) -> Self {
        Self { reason, partial_answer: None, usage: UsageSummary::default() }
    }
}

/// Why a run ended without an answer. The texts are those of RLM's exceptions.
#[derive(Debug)]
#[non_exhaustive]
pub enum RlmStop {
    /// The time of the run is over.
    Timeout {
        /// How long it ran.
        elapsed: Duration,
        /// How long it was allowed to.
        limit: Duration,
    },
    /// The money is spent.
    Budget {
        /// US dollars that were spent.
        spent: f64,
        /// US dollars that were allowed.
        limit: f64,
    },
    /// Another part of the budget is used up: calls, tokens or bytes of prompts.
    Limit(Exhausted),
    /// Turn after turn raised errors.
    Errors {
        /// How many in a row.
        count: u32,
        /// How many were allowed.
        limit: u32,
        /// What the last one wrote to stderr.
        last: String,
    },
    /// [`Rlm::cancel`](crate::Rlm::cancel) was called.
    Cancelled,
    /// The model could not be asked.
    Lm(LmError),
    /// The session could not do its job, or the options can't be used.
    Environment(Error),
}

impl RlmStop {
    /// Whether it is a limit of the run, and not a failure.
    #[must_use]
    pub fn is_limit(&self) -> bool {
        matches!(
            self,
            Self::Timeout { .. } | Self::Budget { .. } | Self::Limit(_) | Self::Errors { .. }
        )
    }

    /// The name used in JSON.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Timeout { .. } => "timeout",
            Self::Budget { .. } => "budget",
            Self::Limit(exhausted) => match exhausted.part {
                BudgetPart::Calls => "calls",
                BudgetPart::Tokens => "tokens",
                BudgetPart::PromptBytes => "prompt_bytes",
                BudgetPart::Cost => "budget",
                BudgetPart::Wall => "timeout",
            },
            Self::Errors { .. } => "errors",
            Self::Cancelled => "cancelled",
            Self::Lm(_) => "lm",
            Self::Environment(_) => "environment",
        }
    }
}

impl fmt::Display for RlmStop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Timeout { elapsed, limit } => {
                let (elapsed, limit) = (elapsed.as_secs_f64(), limit.as_secs_f64());
                write!(f, "Timeout exceeded: {elapsed:.1}s of {limit:.1}s limit")
            }
            Self::Budget { spent, limit } => {
                write!(f, "Budget exceeded: spent ${spent:.6} of ${limit:.6} budget")
            }
            Self::Limit(exhausted) => exhausted.fmt(f),
            Self::Errors { count, limit, .. } => {
                write!(f, "Error threshold exceeded: {count} consecutive errors (limit: {limit})")
            }
            Self::Cancelled => f.write_str("Execution cancelled by user"),
            Self::Lm(error) => error.fmt(f),
            Self::Environment(error) => error.fmt(f),
        }
    }
}

impl From<Error> for RlmStop {
    fn from(error: Error) -> Self {
        Self::Environment(error)
    }
}

//! What happens in a run, for whoever wants to watch.

use std::time::Duration;

use crate::environment::Execution;

/// Something that happened. `depth` is 0 for the root, 1 for its children, and so on.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum RlmEvent<'a> {
    /// The model is being asked for its next turn.
    TurnBegan {
        /// Level of the RLM.
        depth: u16,
        /// From 1.
        turn: u32,
        /// The most there can be.
        turns_max: u32,
    },
    /// The model answered.
    Responded {
        /// Level of the RLM.
        depth: u16,
        /// What it said.
        response: &'a str,
    },
    /// A block of code is being run.
    CellBegan {
        /// Level of the RLM.
        depth: u16,
        /// The code.
        code: &'a str,
    },
    /// A block of code was run.
    CellEnded {
        /// Level of the RLM.
        depth: u16,
        /// What it did.
        execution: &'a Execution,
    },
    /// A cell asks language models.
    CallsBegan {
        /// Level of the RLM.
        depth: u16,
        /// How many prompts at once.
        count: usize,
    },
    /// Its answers are there, or it doesn't wait for them any more.
    CallsEnded {
        /// Level of the RLM.
        depth: u16,
        /// How many prompts.
        count: usize,
    },
    /// A child begins.
    ChildBegan {
        /// Level of the child.
        depth: u16,
        /// The model that was asked for.
        model: Option<&'a str>,
        /// The first characters of its prompt.
        prompt: &'a str,
    },
    /// A child is done.
    ChildEnded {
        /// Level of the child.
        depth: u16,
        /// How long it took.
        elapsed: Duration,
        /// Why it has no answer.
        error: Option<&'a str>,
    },
    /// The conversation was replaced by a summary.
    Compacted {
        /// Level of the RLM.
        depth: u16,
        /// How often by now.
        count: u32,
    },
    /// The messages could not be kept in the session's `history`; the answer is there all the same.
    HistoryFailed {
        /// Why.
        reason: &'a str,
    },
    /// The log could not be written; the run goes on without.
    LogFailed {
        /// Why.
        reason: &'a str,
    },
}

/// Where a run is, its children included.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct RlmProgress {
    /// The root's turn, from 1.
    pub turn: u32,
    /// The most there can be.
    pub turns_max: u32,
    /// Blocks of code that were run or are running.
    pub cells: u32,
    /// Children that were begun.
    pub children: u32,
    /// Prompts that were sent, the root's own included.
    pub calls: u64,
    /// Prompts in flight.
    pub calls_in_flight: u32,
    /// Tokens sent.
    pub input_tokens: u64,
    /// Tokens received.
    pub output_tokens: u64,
    /// US dollars, where a price is known.
    pub cost: Option<f64>,
}

/// Watches runs. It's called from the tasks that run them and must not block.
pub trait RlmObserver: Send + Sync {
    /// Something happened, and where the run is now.
    fn event(&self, event: RlmEvent<'_>, progress: &RlmProgress);
}

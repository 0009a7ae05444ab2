//! What is measured.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// How long a block of samples may take before it's cut short.
const BLOCK_TIME: Duration = Duration::from_millis(1_500);

/// What a backend is timed at.
///
/// ```
/// use kaa::benchmark::Workload;
///
/// assert_eq!(Workload::named("context")?.len(), 3);
/// assert_eq!(Workload::named("cell")?, [Workload::Cell]);
/// assert!(Workload::named("lunch").is_err());
/// # Ok::<(), kaa::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
#[non_exhaustive]
pub enum Workload {
    /// A process from its start to its first line of output.
    Cold,
    /// A session from its opening to the result of its first cell.
    Session,
    /// A cell in a session that has run others.
    Cell,
    /// One `llm_query`, whose model answers at once.
    LlmQuery,
    /// `llm_query_batched` of [`BATCH`](Self::BATCH) prompts, each answered after
    /// [`MODEL_TIME`](Self::MODEL_TIME).
    Batch,
    /// A text into a new session, to the result of a cell that reads it. One of 1, 10, 100.
    Context {
        /// Its length in millions of bytes.
        megabytes: u32,
    },
    /// A session of ten cells, as an agent's, from its opening to its end.
    Agent,
    /// A run of the RLM loop: 5 MB of context, four cells, 20 calls of a model that answers at once.
    Rlm,
    /// Computing.
    Cpu(CpuPart),
    /// What this machine holds in memory for a session that has run a cell and waits, the kernel's part and
    /// that of helpers included.
    Memory,
    /// Sessions with one cell each per second, as many at a time as there are processors. `exec` in one
    /// process does one at a time.
    Rate,
}

/// A part of the set that computes; `cpu.py` has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum CpuPart {
    /// Calls of a recursive function.
    Recursion,
    /// Arithmetic in a loop.
    Integers,
    /// Strings put together, and counted in a dict.
    Strings,
    /// JSON written and read.
    Json,
    /// Regular expressions.
    Regex,
    /// Sorting, with and without a key.
    Sort,
    /// Objects made and their methods called.
    Classes,
    /// Arrays of numpy: products of matrices, sorting, sums.
    Numpy,
}

/// What figures count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Unit {
    /// Seconds: less is better.
    Seconds,
    /// Bytes: less is better.
    Bytes,
    /// Per second: more is better.
    PerSecond,
}

/// How many samples are taken in one go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// At most so many.
    pub samples: usize,
    /// No further one begins after this time. The first is taken anyway.
    pub time: Duration,
}

impl Block {
    /// Whether another sample is to be taken, after so many since then.
    #[must_use]
    pub fn goes_on(&self, taken: usize, since: Instant) -> bool {
        taken == 0 || (taken < self.samples && since.elapsed() < self.time)
    }
}

impl CpuPart {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Recursion,
        Self::Integers,
        Self::Strings,
        Self::Json,
        Self::Regex,
        Self::Sort,
        Self::Classes,
        Self::Numpy,
    ];

    /// Its name, in `cpu.py` too.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Recursion => "recursion",
            Self::Integers => "integers",
            Self::Strings => "strings",
            Self::Json => "json",
            Self::Regex => "regex",
            Self::Sort => "sort",
            Self::Classes => "classes",
            Self::Numpy => "numpy",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Strings => "strings and dicts",
            Self::Regex => "regular expressions",
            other => other.name(),
        }
    }
}

impl Workload {
    /// Prompts of [`Batch`](Self::Batch).
    pub const BATCH: usize = 20;
    /// How long the model thinks about each prompt of [`Batch`](Self::Batch).
    pub const MODEL_TIME: Duration = Duration::from_millis(10);

    /// All of them, in the order of reports.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let contexts = [1, 10, 100].map(|megabytes| Self::Context { megabytes });
        let mut all = vec![Self::Cold, Self::Session, Self::Cell, Self::LlmQuery, Self::Batch];
        all.extend(contexts);
        all.extend([Self::Agent, Self::Rlm]);
        all.extend(CpuPart::ALL.map(Self::Cpu));
        all.extend([Self::Memory, Self::Rate]);
        all
    }

    /// Those of a name: one, or the groups `context` and `cpu`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] lists the names that there are.
    pub fn named(name: &str) -> Result<Vec<Self>, Error> {
        let all = Self::all();
        let found: Vec<Self> = all.iter().copied().filter(|w| w.is_called(name)).collect();
        if found.is_empty() {
            let names: Vec<String> = all.iter().map(ToString::to_string).collect();
            let reason = format!(
                "{name:?} is no workload; there are {}, and for several of them `context` and `cpu`",
                names.join(", ")
            );
            return Err(Error::invalid("workload", reason));
        }
        Ok(found)
    }

    fn is_called(self, name: &str) -> bool {
        let group = match self {
            Self::Context { .. } => "context",
            Self::Cpu(_) => "cpu",
            _ => "",
        };
        self.to_string() == name || group == name
    }

    /// What it is, in a few words.
    #[must_use]
    pub fn title(self) -> String {
        match self {
            Self::Cold => "cold process to its first output".into(),
            Self::Session => "new session to its first cell".into(),
            Self::Cell => "warm cell".into(),
            Self::LlmQuery => "llm_query there and back".into(),
            Self::Batch => {
                format!("batch of {} prompts at {} ms", Self::BATCH, Self::MODEL_TIME.as_millis())
            }
            Self::Context { megabytes } => format!("{megabytes} MB of context in"),
            Self::Agent => "agent run of ten cells".into(),
            Self::Rlm => "RLM run: 5 MB, 4 cells, 20 calls".into(),
            Self::Cpu(part) => format!("CPU: {}", part.title()),
            Self::Memory => "memory of an idle session".into(),
            Self::Rate => "sessions per second".into(),
        }
    }

    /// What its figures count.
    #[must_use]
    pub fn unit(self) -> Unit {
        match self {
            Self::Memory => Unit::Bytes,
            Self::Rate => Unit::PerSecond,
            _ => Unit::Seconds,
        }
    }

    /// Whether it's measured in one go instead of in each lap: the memory of sessions that ended stays
    /// with their backend, and later ones would seem to need less.
    pub(super) fn is_done_once(self) -> bool {
        self == Self::Memory
    }

    /// The samples of one lap.
    pub(super) fn block(self) -> Block {
        let samples = match self {
            Self::Cell => 40,
            Self::Session => 20,
            Self::LlmQuery | Self::Batch | Self::Cpu(_) => 4,
            Self::Context { megabytes: 1 } | Self::Agent => 8,
            Self::Cold | Self::Context { megabytes: 10 } | Self::Rlm => 4,
            Self::Memory => 3,
            Self::Rate | Self::Context { .. } => 1,
        };
        Block { samples, time: BLOCK_TIME }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cold => f.write_str("cold"),
            Self::Session => f.write_str("session"),
            Self::Cell => f.write_str("cell"),
            Self::LlmQuery => f.write_str("llm-query"),
            Self::Batch => f.write_str("batch"),
            Self::Context { megabytes } => write!(f, "context-{megabytes}"),
            Self::Agent => f.write_str("agent"),
            Self::Rlm => f.write_str("rlm"),
            Self::Cpu(part) => write!(f, "cpu-{}", part.name()),
            Self::Memory => f.write_str("memory"),
            Self::Rate => f.write_str("rate"),
        }
    }
}

impl FromStr for Workload {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let found = Self::all().into_iter().find(|workload| workload.to_string() == name);
        found.ok_or_else(|| Error::invalid("workload", format!("{name:?} is no workload")))
    }
}

impl From<Workload> for String {
    fn from(workload: Workload) -> Self {
        workload.to_string()
    }
}

impl TryFrom<String> for Workload {
    type Error = Error;

    fn try_from(name: String) -> Result<Self, Error> {
        name.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_workload_has_a_name_of_its_own_that_leads_back() {
        let all = Workload::all();
        for workload in &all {
            assert_eq!(workload.to_string().parse::<Workload>().unwrap(), *workload);
            assert_eq!(all.iter().filter(|other| other.title() == workload.title()).count(), 1);
        }
        assert_eq!(Workload::named("cpu").unwrap().len(), CpuPart::ALL.len());
    }
}

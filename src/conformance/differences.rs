//! Where a backend gives something else than the common answer: one table, with a reason for each row.

use std::fmt::Write as _;

use super::Case;
use super::case::NEEDS;
use super::expect::Expectations;
use super::values::json_of;
use crate::error::{Error, Result};

/// The table that comes with the suite.
const OWN: &str = include_str!("../../tests/cases/differences.toml");

/// Differences between backends that are known and have a reason.
///
/// A row says what comes instead of the common answer, and that is then expected. A row that isn't
/// needed, because the common answer came, fails the case: the table has nothing stale in it. What
/// follows from a backend's [`Capabilities`](crate::Capabilities) needs no row.
#[derive(Debug, Clone, Default)]
pub struct Differences {
    rows: Vec<Row>,
}

#[derive(Debug, Clone)]
pub(super) struct Row {
    case: String,
    /// From 1.
    step: usize,
    backends: Vec<String>,
    pub(super) instead: Expectations,
    /// Whether what comes after it makes no sense any more.
    pub(super) ends: bool,
    reason: String,
    /// `instead` as it's written.
    text: String,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    #[serde(default)]
    difference: Vec<RowText>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RowText {
    case: String,
    step: usize,
    backends: Vec<String>,
    instead: toml::Table,
    #[serde(default)]
    ends: bool,
    reason: String,
}

impl Differences {
    /// No differences at all.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// The table of Kaa's own backends, over the cases of the suite.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], which Kaa's own tests exclude.
    pub fn own(cases: &[Case]) -> Result<Self> {
        Self::parse(OWN, cases)
    }

    /// Reads a table of `[[difference]]` over these cases; the form is in `tests/cases/README.md`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] naming the row and what is wrong in it.
    pub fn parse(text: &str, cases: &[Case]) -> Result<Self> {
        let table: Table = toml::from_str(text)
            .map_err(|error| Error::invalid("differences", error.to_string().trim_end()))?;
        let rows = table.difference.into_iter().enumerate().map(|(at, row)| {
            row.read(cases)
                .map_err(|reason| Error::invalid(format!("differences, row {}", at + 1), reason))
        });
        Ok(Self { rows: rows.collect::<Result<_>>()? })
    }

    /// The row for this step on this backend.
    pub(super) fn of(&self, case: &str, step: usize, backend: &str) -> Option<&Row> {
        self.rows.iter().find(|row| {
            row.case == case && row.step == step && row.backends.iter().any(|name| name == backend)
        })
    }

    /// The tables of `tests/cases/README.md`: what backends give instead of the common answer, and
    /// what cases need of a backend.
    #[must_use]
    pub fn to_markdown(&self, cases: &[Case]) -> String {
        let mut text = String::from("| Case | Step | Backends | What comes instead | Reason |\n");
        text.push_str("|---|---|---|---|---|\n");
        for row in &self.rows {
            let Row { case, step, backends, text: instead, reason, .. } = row;
            let (backends, instead) = (backends.join(", "), instead.replace('|', "\\|"));
            let _ = writeln!(text, "| {case} | {step} | {backends} | `{instead}` | {reason} |");
        }
        text.push_str("\n| Capability | Cases that need it |\n|---|---|\n");
        for need in NEEDS {
            let names: Vec<&str> =
                cases.iter().filter(|case| case.needs(need)).map(Case::name).collect();
            let _ = writeln!(text, "| `{need}` | {} |", names.join(", "));
        }
        text
    }
}

impl RowText {
    fn read(self, cases: &[Case]) -> Result<Row, String> {
        let Self { case: name, step: number, backends, instead, ends, reason } = self;
        let case = cases.iter().find(|case| case.name() == name);
        let case = case.ok_or_else(|| format!("there is no case `{name}`"))?;
        let step = number.checked_sub(1).and_then(|at| case.steps.get(at));
        let step = step
            .ok_or_else(|| format!("`{name}` has steps 1 to {}, no {number}", case.steps.len()))?;
        if reason.trim().is_empty() || backends.is_empty() || instead.is_empty() {
            return Err("it must name backends, what comes instead, and a reason".into());
        }
        let entries = instead.iter().map(|(key, value)| Ok(format!("{key} = {}", json_of(value)?)));
        let text = entries.collect::<Result<Vec<_>, String>>()?.join(", ");
        let instead = Expectations::parse(&instead, step.action.keys())?;
        Ok(Row { case: name, step: number, backends, instead, ends, reason, text })
    }
}

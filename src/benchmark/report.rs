//! What a run found.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::figure::Figure;
use super::machine::Machine;
use super::subject::Facts;
use super::workload::{CpuPart, Workload};
use crate::error::{Error, Result};

/// Of what this version writes. A report of another one isn't read.
const FORMAT: u32 = 1;
/// More have no place in a table.
const SUBJECTS_MAX: usize = 64;
/// Where dates end, in seconds since 1970.
const YEAR_9999: u64 = 253_370_764_800;

/// The figures of a run, with all that is needed to judge them.
///
/// As JSON it has all of this; [`markdown`](Self::markdown) and [`plot`](Self::plot) show the medians.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Report {
    /// The form of this report, 1.
    pub format: u32,
    /// Kaa's version.
    pub kaa: String,
    /// Whether Kaa was built for speed. Figures of other builds are too high.
    pub is_release: bool,
    /// When the run began, in seconds since 1970.
    pub unix_seconds: u64,
    /// Where.
    pub machine: Machine,
    /// Laps that count.
    pub laps: u32,
    /// Who was measured, also those that weren't there.
    pub subjects: Vec<SubjectReport>,
    /// At what, those whose isolation counts.
    pub workloads: Vec<Workload>,
    /// What was found, by subject and workload.
    pub cells: Vec<Cell>,
}

/// Who was measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SubjectReport {
    /// Its name.
    pub name: String,
    /// What it's measured for.
    pub role: Role,
    /// What it is, if it was there.
    pub facts: Option<Facts>,
    /// Why it wasn't there.
    pub absent: Option<String>,
}

/// What a subject is measured for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// What isolation costs: all workloads.
    Isolation,
    /// What metering costs: the set that computes.
    Metering,
}

/// What was found of one subject at one workload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Cell {
    /// The subject's name.
    pub subject: String,
    /// What it was timed at.
    pub workload: Workload,
    /// Samples in the workload's unit: seconds, bytes, or per second.
    pub figure: Option<Figure>,
    /// Why there are none.
    pub missed: Option<String>,
}

impl SubjectReport {
    pub(super) fn new(name: String, role: Role) -> Self {
        Self { name, role, facts: None, absent: None }
    }
}

impl Role {
    /// What a subject is timed at, when these workloads are wanted of those whose isolation counts.
    pub(super) fn workloads(self, wanted: &[Workload]) -> Vec<Workload> {
        match self {
            Self::Isolation => wanted.to_vec(),
            Self::Metering => CpuPart::ALL.map(Workload::Cpu).to_vec(),
        }
    }
}

impl Report {
    pub(super) fn new(
        unix_seconds: u64,
        machine: Machine,
        laps: u32,
        subjects: Vec<SubjectReport>,
        workloads: Vec<Workload>,
        cells: Vec<Cell>,
    ) -> Self {
        Self {
            format: FORMAT,
            kaa: env!("CARGO_PKG_VERSION").into(),
            is_release: !cfg!(debug_assertions),
            unix_seconds,
            machine,
            laps,
            subjects,
            workloads,
            cells,
        }
    }

    /// The report as JSON, with a line feed at its end.
    #[must_use]
    pub fn to_json(&self) -> String {
        let text = serde_json::to_string_pretty(self);
        text.expect("a report has nothing that JSON has no form for") + "\n"
    }

    /// A report that [`to_json`](Self::to_json) wrote.
    ///
    /// # Errors
    ///
    /// [`Error::Incompatible`] when it isn't one.
    pub fn from_json(text: &str) -> Result<Self> {
        let wrong = |found: String| Error::Incompatible {
            what: "the report".into(),
            expected: format!("one of format {FORMAT}"),
            found,
        };
        let report: Self = serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?;
        if report.format != FORMAT {
            return Err(wrong(format!("one of format {}", report.format)));
        }
        report.check().map_err(|reason| wrong(reason.to_owned()))?;
        Ok(report)
    }

    /// Whether a run could have found this. A report may be anybody's.
    fn check(&self) -> Result<(), &'static str> {
        let all = Workload::all();
        let names: HashSet<&str> = self.subjects.iter().map(|subject| &*subject.name).collect();
        let workloads: HashSet<Workload> = self.workloads.iter().copied().collect();
        let cells: HashSet<(&str, Workload)> =
            self.cells.iter().map(|cell| (&*cell.subject, cell.workload)).collect();
        if self.subjects.len() > SUBJECTS_MAX || names.len() < self.subjects.len() {
            return Err("one with too many subjects, or two of one name");
        }
        if workloads.len() < self.workloads.len() || cells.len() < self.cells.len() {
            return Err("one that has something twice");
        }
        if self.cells.len() > self.subjects.len() * all.len() {
            return Err("one with figures of nobody");
        }
        if self.unix_seconds >= YEAR_9999 {
            return Err("one of another age");
        }
        let ordered = |figure: &Figure| {
            let Figure { least, p10, median, p90, most, .. } = *figure;
            let order = [0.0, least, p10, median, p90, most, f64::MAX];
            order.is_sorted()
        };
        if !self.cells.iter().filter_map(|cell| cell.figure.as_ref()).all(ordered) {
            return Err("one with figures that are none");
        }
        Ok(())
    }

    /// What was found of a subject at a workload.
    #[must_use]
    pub fn figure(&self, subject: &str, workload: Workload) -> Option<Figure> {
        self.cell(subject, workload)?.figure
    }

    pub(super) fn cell(&self, subject: &str, workload: Workload) -> Option<&Cell> {
        self.cells.iter().find(|cell| cell.subject == subject && cell.workload == workload)
    }

    /// Those of a role that were there.
    pub(super) fn present(&self, role: Role) -> Vec<&SubjectReport> {
        self.subjects.iter().filter(|s| s.role == role && s.absent.is_none()).collect()
    }

    /// How often a subject's median is that of another's, if both have done it and it took time.
    pub(super) fn ratio(&self, subject: &str, base: &str, workload: Workload) -> Option<f64> {
        let own = self.figure(subject, workload)?.median;
        let base = self.figure(base, workload)?.median;
        (base > 0.0 && own > 0.0).then_some(own / base)
    }

    /// Of the set that computes, the parts that all of these have done who have done any; and for each
    /// subject its ratios to the first one at them.
    pub(super) fn cpu_ratios(&self, subjects: &[&SubjectReport]) -> (usize, Vec<Vec<f64>>) {
        let Some(base) = subjects.first() else { return (0, Vec::new()) };
        let parts = || CpuPart::ALL.map(Workload::Cpu).into_iter();
        let ratio = |subject: &SubjectReport, part| self.ratio(&subject.name, &base.name, part);
        let all = |subject: &SubjectReport| -> Vec<Option<f64>> {
            parts().map(|part| ratio(subject, part)).collect()
        };
        let all: Vec<Vec<Option<f64>>> = subjects.iter().map(|subject| all(subject)).collect();
        let computing = || all.iter().filter(|ratios| ratios.iter().any(Option::is_some));
        let is_common = |part: &usize| computing().all(|ratios| ratios[*part].is_some());
        let common: Vec<usize> = (0..parts().count()).filter(is_common).collect();
        let of_common =
            |ratios: &Vec<Option<f64>>| common.iter().filter_map(|part| ratios[*part]).collect();
        (
            if computing().next().is_some() { common.len() } else { 0 },
            all.iter().map(of_common).collect(),
        )
    }
}

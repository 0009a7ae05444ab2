//! A run: every subject at every workload, in turns.

use std::panic::AssertUnwindSafe;
use std::time::{Duration, SystemTime};

use futures_util::FutureExt;

use super::figure::Figure;
use super::machine::Machine;
use super::report::{Cell, Report, Role, SubjectReport};
use super::subject::{Missed, Subject};
use super::workload::{Block, Workload};

/// How long a subject may take for one block. A backend that hangs must not hang the run.
const BLOCK_TIME_MAX: Duration = Duration::from_secs(180);
const LAPS_DEFAULT: u32 = 5;

/// What is measured, and how often.
///
/// A run goes over all workloads several times, in *laps*. In each lap every subject takes a block of
/// samples of a workload before the next workload begins, and another subject is the first in each lap:
/// so whatever changes on the machine meanwhile happens to all of them. The first lap only warms up.
///
/// ```no_run
/// use kaa::benchmark::{InProcess, Suite, Workload};
///
/// # async fn example() {
/// let suite = Suite::default().subject(InProcess::new("python3")).workloads([Workload::Cell]);
/// let report = suite.run(&|event| eprintln!("{event:?}")).await;
/// println!("{}", report.markdown());
/// # }
/// ```
pub struct Suite {
    entries: Vec<Entry>,
    workloads: Vec<Workload>,
    laps: u32,
}

struct Entry {
    subject: Option<Box<dyn Subject>>,
    report: SubjectReport,
    /// What it's timed at, in the order of reports, with the samples so far.
    cells: Vec<(Workload, Result<Vec<f64>, Missed>)>,
}

/// What a run is about to do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A subject is started and asked what it is.
    Describe {
        /// Its name.
        subject: String,
    },
    /// A subject takes a block of samples.
    Measure {
        /// Blocks that are done.
        done: usize,
        /// Blocks in all, as far as it's known.
        all: usize,
        /// The subject's name.
        subject: String,
        /// What it's timed at.
        workload: Workload,
    },
}

impl std::fmt::Debug for Suite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.entries.iter().map(|entry| &*entry.report.name).collect();
        f.debug_struct("Suite").field("subjects", &names).field("laps", &self.laps).finish()
    }
}

impl Default for Suite {
    /// All workloads, five laps, nobody yet.
    fn default() -> Self {
        Self { entries: Vec::new(), workloads: Workload::all(), laps: LAPS_DEFAULT }
    }
}

impl Suite {
    /// Adds a subject. The first one is what the others are compared to.
    #[must_use]
    pub fn subject(self, subject: impl Subject + 'static) -> Self {
        let name = subject.name().to_owned();
        self.entry(Some(Box::new(subject)), SubjectReport::new(name, Role::Isolation))
    }

    /// Adds a way of metering, which is timed at the set that computes only. The first one is what
    /// the others are compared to.
    #[must_use]
    pub fn metering(self, subject: impl Subject + 'static) -> Self {
        let name = subject.name().to_owned();
        self.entry(Some(Box::new(subject)), SubjectReport::new(name, Role::Metering))
    }

    /// Adds one that isn't there, with the reason.
    #[must_use]
    pub fn absent(self, role: Role, name: &str, reason: &str) -> Self {
        let mut report = SubjectReport::new(name.to_owned(), role);
        report.absent = Some(reason.to_owned());
        self.entry(None, report)
    }

    /// Measures these workloads only, in the order of reports.
    #[must_use]
    pub fn workloads(mut self, wanted: impl IntoIterator<Item = Workload>) -> Self {
        let wanted: Vec<Workload> = wanted.into_iter().collect();
        self.workloads = Workload::all().into_iter().filter(|w| wanted.contains(w)).collect();
        self
    }

    /// How many laps count, at least 1; one more warms up. Default: 5.
    #[must_use]
    pub fn laps(mut self, laps: u32) -> Self {
        self.laps = laps.max(1);
        self
    }

    /// Names are what figures are found by: a second one of a name has a number behind it.
    fn entry(mut self, subject: Option<Box<dyn Subject>>, mut report: SubjectReport) -> Self {
        let is_taken = |name: &str| self.entries.iter().any(|entry| entry.report.name == name);
        if is_taken(&report.name) {
            let numbered = (2..).map(|number| format!("{} ({number})", report.name));
            report.name = numbered.into_iter().find(|name| !is_taken(name)).unwrap_or_default();
        }
        self.entries.push(Entry { subject, report, cells: Vec::new() });
        self
    }

    /// Measures. What fails is in the report, too.
    ///
    /// Needs a tokio runtime with time and I/O enabled, and is best spawned there: what is awaited
    /// outside of a runtime's workers takes longer.
    pub async fn run(mut self, event: &(dyn Fn(Event) + Send + Sync)) -> Report {
        let machine = Machine::this();
        let at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        for entry in &mut self.entries {
            entry.describe(event).await;
            let wanted = entry.report.role.workloads(&self.workloads);
            entry.cells = wanted.into_iter().map(|workload| (workload, Ok(Vec::new()))).collect();
        }
        let all = self.blocks();
        let mut done = 0;
        for lap in 0..=self.laps {
            let due = |workload: &Workload| !workload.is_done_once() || lap == self.laps;
            for workload in Workload::all().into_iter().filter(due) {
                let takers: Vec<usize> = (0..self.entries.len())
                    .filter(|at| self.entries[*at].takes(workload))
                    .collect();
                for turn in 0..takers.len() {
                    let entry = &mut self.entries[takers[(turn + lap as usize) % takers.len()]];
                    let subject = entry.report.name.clone();
                    event(Event::Measure { done: done.min(all), all, subject, workload });
                    entry.measure(workload, lap == 0).await;
                    done += 1;
                }
            }
        }
        for entry in &mut self.entries {
            if let Some(subject) = &mut entry.subject {
                // What it can't give back in time goes with the process.
                let _ = within_time(subject.close().map(Ok)).await;
            }
        }
        self.report(machine, at.as_secs())
    }

    /// Blocks of the run, if nothing is missing.
    fn blocks(&self) -> usize {
        let laps = |workload: &Workload| match workload.is_done_once() {
            true => 1,
            false => self.laps as usize + 1,
        };
        let there = self.entries.iter().filter(|entry| entry.subject.is_some());
        there.flat_map(|entry| entry.cells.iter()).map(|(workload, _)| laps(workload)).sum()
    }

    fn report(self, machine: Machine, at: u64) -> Report {
        let (mut subjects, mut cells) = (Vec::new(), Vec::new());
        for entry in self.entries {
            let found = entry.cells.into_iter().filter(|_| entry.report.absent.is_none());
            cells.extend(found.map(|(workload, samples)| {
                let (figure, missed) = match samples {
                    Ok(samples) => (Figure::of(&samples), None),
                    Err(missed) => (None, Some(missed.to_string())),
                };
                Cell { subject: entry.report.name.clone(), workload, figure, missed }
            }));
            subjects.push(entry.report);
        }
        Report::new(at, machine, self.laps, subjects, self.workloads, cells)
    }
}

impl Entry {
    async fn describe(&mut self, event: &(dyn Fn(Event) + Send + Sync)) {
        let Some(subject) = &mut self.subject else { return };
        event(Event::Describe { subject: self.report.name.clone() });
        match within_time(subject.describe()).await {
            Ok(facts) => self.report.facts = Some(facts),
            Err(missed) => {
                self.report.absent = Some(missed.to_string());
                self.subject = None;
            }
        }
    }

    fn takes(&self, workload: Workload) -> bool {
        let takes = |(own, samples): &(Workload, Result<_, _>)| *own == workload && samples.is_ok();
        self.subject.is_some() && self.cells.iter().any(takes)
    }

    async fn measure(&mut self, workload: Workload, warms_up: bool) {
        let cell = self.cells.iter_mut().find(|(own, _)| *own == workload);
        let (Some(subject), Some((_, all))) = (&mut self.subject, cell) else { return };
        let block = workload.block();
        let block = match warms_up {
            true => Block { samples: block.samples.div_ceil(2), time: block.time },
            false => block,
        };
        let samples = within_time(subject.measure(workload, &block)).await;
        match (samples.and_then(sound), &mut *all) {
            (Ok(samples), Ok(all)) if !warms_up => all.extend(samples),
            (Ok(_), _) => {}
            (Err(missed), _) => *all = Err(missed),
        }
    }
}

/// Samples that can be ones.
fn sound(samples: Vec<f64>) -> Result<Vec<f64>, Missed> {
    match samples.iter().find(|sample| !sample.is_finite() || **sample < 0.0) {
        Some(sample) => Err(Missed::because(format!("it gave {sample} for a sample"))),
        None if samples.is_empty() => Err(Missed::because("it gave no sample")),
        None => Ok(samples),
    }
}

/// What a subject does, unless it takes too long or panics: the others are measured all the same.
async fn within_time<T>(work: impl Future<Output = Result<T, Missed>>) -> Result<T, Missed> {
    let minutes = BLOCK_TIME_MAX.as_secs() / 60;
    match tokio::time::timeout(BLOCK_TIME_MAX, AssertUnwindSafe(work).catch_unwind()).await {
        Ok(Ok(done)) => done,
        Ok(Err(_)) => Err(Missed::because("it panicked")),
        Err(_) => Err(Missed::because(format!("it took longer than {minutes} min"))),
    }
}

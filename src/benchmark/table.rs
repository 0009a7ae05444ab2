//! Reports as tables of Markdown.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use super::figure::{digits, geometric_mean};
use super::report::{Report, Role, SubjectReport};
use super::workload::{CpuPart, Workload};

impl Report {
    /// The report in Markdown: who was measured, on what machine, the medians with the tenth and the
    /// ninetieth percentile, what metering costs, and what could not be measured.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        self.write_subjects(&mut text);
        self.write_figures(&mut text);
        self.write_metering(&mut text);
        self.write_missing(&mut text);
        self.write_origin(&mut text);
        text
    }

    fn write_subjects(&self, text: &mut String) {
        text.push_str(
            "| backend | cells run in | Python | keeps them from the host |\n|---|---|---|---|\n",
        );
        for subject in self.subjects.iter().filter(|subject| subject.role == Role::Isolation) {
            let row = match (&subject.facts, &subject.absent) {
                (_, Some(reason)) => format!("not measured: {} | – | –", cell(reason)),
                (Some(facts), None) => {
                    let isolated = if facts.isolated { "yes" } else { "no" };
                    format!("{} | {} | {isolated}", cell(&facts.what), cell(&facts.python))
                }
                (None, None) => "– | – | –".into(),
            };
            let _ = writeln!(text, "| `{}` | {row} |", cell(&subject.name));
        }
        text.push('\n');
    }

    fn write_figures(&self, text: &mut String) {
        let subjects = self.present(Role::Isolation);
        let Some(base) = subjects.first().filter(|_| !self.workloads.is_empty()) else { return };
        write_head(text, "median (10th–90th percentile; of few samples all)", &subjects);
        for workload in &self.workloads {
            let _ = write!(text, "| {} |", workload.title());
            for subject in &subjects {
                let figure = self.figure(&subject.name, *workload);
                let shown = figure.map_or("–".into(), |figure| figure.show(workload.unit()));
                let _ = write!(text, " {shown} |");
            }
            text.push('\n');
        }
        self.write_means(text, base, &subjects);
        text.push('\n');
    }

    /// A row of means over the parts that compute, to the first of the subjects.
    fn write_means(&self, text: &mut String, base: &SubjectReport, subjects: &[&SubjectReport]) {
        let (parts, ratios) = self.cpu_ratios(subjects);
        if parts == 0 {
            return;
        }
        let base = cell(&base.name);
        let _ = write!(text, "| CPU, geometric mean of {parts} parts, to `{base}` |");
        for ratios in &ratios {
            let mean = geometric_mean(ratios).map_or("–".into(), |mean| digits(mean) + " ×");
            let _ = write!(text, " {mean} |");
        }
        text.push('\n');
    }

    fn write_metering(&self, text: &mut String) {
        let subjects = self.present(Role::Metering);
        let Some(base) = subjects.first() else { return };
        let head = format!("what metering costs, to `{}`", base.name);
        write_head(text, &head, &subjects);
        let is_done = |part: &Workload| self.figure(&base.name, *part).is_some();
        for part in CpuPart::ALL.map(Workload::Cpu).into_iter().filter(is_done) {
            let _ = write!(text, "| {} |", part.title());
            for subject in &subjects {
                let ratio = self.ratio(&subject.name, &base.name, part);
                let shown = ratio.map_or("–".into(), |ratio| digits(ratio) + " ×");
                let _ = write!(text, " {shown} |");
            }
            text.push('\n');
        }
        self.write_means(text, base, &subjects);
        text.push('\n');
    }

    /// What a row has a dash for, with the reasons.
    fn write_missing(&self, text: &mut String) {
        let metering = self.subjects.iter().filter(|subject| subject.role == Role::Metering);
        let absent = metering.filter_map(|s| Some((format!("`{}`", s.name), s.absent.as_ref()?)));
        let missed = self.cells.iter().filter_map(|cell| {
            Some((format!("`{}` at `{}`", cell.subject, cell.workload), cell.missed.as_ref()?))
        });
        let rows: Vec<(String, &String)> = absent.chain(missed).collect();
        if rows.is_empty() {
            return;
        }
        text.push_str("Not measured:\n\n");
        for (what, reason) in rows {
            let _ = writeln!(text, "- {}: {}", cell(&what), cell(reason));
        }
        text.push('\n');
    }

    fn write_origin(&self, text: &mut String) {
        let at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(self.unix_seconds));
        let date = at.map(httpdate::fmt_http_date).unwrap_or_default();
        // Without the day of the week and the time of day.
        let date = date.split(' ').skip(1).take(3).collect::<Vec<_>>().join(" ");
        let _ = writeln!(
            text,
            "Kaa {}{}, {date}; {}; {} laps after one that warms up{}.",
            cell(&self.kaa),
            if self.is_release { "" } else { " (not built for speed: these figures are too high)" },
            cell(&self.machine.show()),
            self.laps,
            self.machine.show_load(),
        );
    }
}

fn write_head(text: &mut String, title: &str, subjects: &[&SubjectReport]) {
    let _ = write!(text, "| {title} |");
    for subject in subjects {
        let _ = write!(text, " `{}` |", cell(&subject.name));
    }
    text.push_str("\n|---|");
    text.push_str(&"---:|".repeat(subjects.len()));
    text.push('\n');
}

/// A text as part of a row: what would end the row or the cell, or begin a tag, is shown as something else.
fn cell(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    text.replace('|', "\\|").replace('<', "&lt;")
}

//! The display of long steps: a bar or a spinner on a terminal, a line each elsewhere.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use kaa::Progress;

use super::console::Console;
use super::units::megabytes;

/// Shows what [`kaa::Runtime`] and backends report.
pub(super) struct Display {
    console: Console,
    open: Mutex<Option<Open>>,
}

/// A step that isn't over.
struct Open {
    step: &'static str,
    bar: Option<ProgressBar>,
    /// Whether its line is complete, because lines of its log came after it.
    has_log: bool,
}

impl Display {
    pub(super) fn new(console: Console) -> Self {
        Self { console, open: Mutex::new(None) }
    }

    /// Takes one report.
    pub(super) fn show(&self, progress: Progress) {
        if self.console.quiet {
            return;
        }
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        match progress {
            Progress::Begin { step, bytes } => {
                let bar = self.console.err_terminal.then(|| bar(step, bytes));
                if bar.is_none() {
                    self.console.err(format!("kaa: {step} … ").as_bytes());
                }
                *open = Some(Open { step, bar, has_log: false });
            }
            Progress::Advance { bytes } => {
                if let Some(Open { step, bar: Some(bar), .. }) = &*open {
                    bar.set_position(bytes);
                    if bar.length().is_none() {
                        bar.set_message(format!("{step} {}", megabytes(bytes)));
                    }
                }
            }
            Progress::Log { line } => {
                let text = format!("     {line}\n");
                match &mut *open {
                    Some(Open { bar: Some(bar), .. }) => {
                        bar.suspend(|| self.console.err(text.as_bytes()));
                    }
                    Some(Open { has_log, .. }) => {
                        let begin = if std::mem::replace(has_log, true) { "" } else { "\n" };
                        self.console.err(format!("{begin}{text}").as_bytes());
                    }
                    None => self.console.err(text.as_bytes()),
                }
            }
            Progress::End { detail, elapsed } => {
                let line = format!("{detail} ({:.1} s)\n", elapsed.as_secs_f64());
                match open.take() {
                    Some(Open { step, bar: Some(bar), .. }) => {
                        bar.finish_and_clear();
                        self.console.err(format!("kaa: {step} … {line}").as_bytes());
                    }
                    Some(Open { step, has_log: true, .. }) => {
                        self.console.err(format!("kaa: {step} … {line}").as_bytes());
                    }
                    _ => self.console.err(line.as_bytes()),
                }
            }
            _ => {}
        }
    }
}

/// A step that failed leaves its line open.
impl Drop for Display {
    fn drop(&mut self) {
        match self.open.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            Some(Open { bar: Some(bar), .. }) => bar.finish_and_clear(),
            Some(Open { has_log: false, .. }) => self.console.err(b"\n"),
            _ => {}
        }
    }
}

fn bar(step: &'static str, bytes: Option<u64>) -> ProgressBar {
    let (bar, template) = match bytes {
        Some(bytes) => {
            (ProgressBar::new(bytes), "kaa: {msg} {bar:30} {bytes}/{total_bytes} {elapsed}")
        }
        None => (ProgressBar::new_spinner(), "kaa: {msg} {spinner} {elapsed}"),
    };
    let style = ProgressStyle::with_template(template).expect("the template is constant");
    let bar = bar.with_style(style).with_message(step);
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

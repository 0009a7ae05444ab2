//! `kaa bench`: what isolation costs on this machine.

mod columns;
mod outputs;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use kaa::benchmark::{Event, Report, Workload};

use self::columns::Column;
use self::outputs::Outputs;
use super::console::Console;
use super::docker::DockerFlags;
use super::modal::ModalFlags;
use super::signals::Signals;
use super::{Ending, Failure};

/// What stands for the ways of metering among the workloads.
const METERING: &str = "metering";
/// As many laps take hours.
const LAPS_MAX: u32 = 1_000;

#[derive(Debug, Subcommand)]
pub(super) enum BenchCommand {
    /// Time the same workloads on every backend, in turns
    ///
    /// The table goes to stdout. Other work on the machine disturbs the figures. It takes some minutes,
    /// and the first time also those that the ways of metering need to be compiled (leave them out with
    /// --workloads).
    Isolation(Box<IsolationFlags>),
}

#[derive(Debug, Args)]
pub(super) struct IsolationFlags {
    /// Who is measured, with commas between them; the first one is what the others are compared to
    /// [default: all but modal, which costs money]
    #[arg(long, value_enum, value_name = "NAMES", value_delimiter = ',')]
    backends: Vec<Column>,
    /// At what, with commas between them: cold, session, cell, llm-query, batch, context (or context-1,
    /// -10, -100), agent, rlm, cpu (or cpu-json, …), memory, rate, metering [default: all]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    workloads: Vec<String>,
    /// How often all of it is measured; one more lap warms up
    #[arg(long, value_name = "NUMBER", default_value_t = 5,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(LAPS_MAX)))]
    laps: u32,
    /// File for all figures, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// File for a picture, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// File for the tables. In one that is there already, they replace what is between the lines
    /// `<!-- kaa bench isolation -->` and `<!-- /kaa bench isolation -->`
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Show a report that was written with --json, and measure nothing
    #[arg(long, value_name = "FILE", conflicts_with_all = ["backends", "workloads", "laps", "json"])]
    from: Option<PathBuf>,
    /// Interpreter of in-process and local, and of containers and sandboxes [default: python3]
    #[arg(long, value_name = "PROGRAM")]
    python: Option<String>,
    #[command(flatten)]
    docker: DockerFlags,
    #[command(flatten)]
    modal: ModalFlags,
}

/// What is measured, as it is meant.
struct Wanted {
    workloads: Vec<Workload>,
    metering: bool,
}

pub(super) fn run(command: BenchCommand) -> Result<Ending, Failure> {
    let BenchCommand::Isolation(flags) = command;
    let console = Console::new(false);
    let (json, plot, page) = (flags.json.clone(), flags.plot.clone(), flags.markdown.clone());
    let outputs = Outputs::open(json, plot, page, flags.from.as_deref())?;
    if let Some(path) = &flags.from {
        outputs.write(&outputs::read(path)?, console)?;
        return Ok(Ending::Done);
    }
    let wanted = Wanted::of(&flags.workloads)?;
    if cfg!(debug_assertions) {
        console
            .note("Kaa was not built for speed; figures are right only with `cargo run --release`");
    }
    // Several workers, as in a server; and what runs on one needs no thread to be woken.
    let reactor = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let reactor = reactor.map_err(|e| Failure::Failed(format!("starting the runtime: {e}")))?;
    let costs = flags.backends.contains(&Column::Modal);
    let suite = columns::suite(*flags, &wanted, console, &reactor)?;
    let run = async {
        let mut signals = Signals::listen()?;
        let mut running = tokio::spawn(async move {
            let display = Display::new(console);
            let report = suite.run(&|event| display.show(&event)).await;
            display.0.finish_and_clear();
            report
        });
        tokio::select! {
            report = &mut running => report
                .map(Ok)
                .map_err(|e| Failure::Failed(format!("measuring: {e}; please report it"))),
            ending = signals.next() => {
                running.abort();
                // Its sessions go with it, those at Modal by tasks of the runtime.
                let _ = running.await;
                if costs {
                    tokio::time::sleep(super::signals::LEAVING_TIME).await;
                }
                Ok(Err(ending))
            }
        }
    };
    let report = reactor.block_on(run);
    reactor.shutdown_timeout(super::signals::LEAVING_TIME);
    match report? {
        Ok(report) => finish(&report, &outputs, console),
        Err(ending) => Ok(ending),
    }
}

fn finish(report: &Report, outputs: &Outputs, console: Console) -> Result<Ending, Failure> {
    if report.cells.iter().all(|cell| cell.figure.is_none()) {
        console.line(&report.markdown())?;
        return Err(Failure::Failed("nothing could be measured; the table has the reasons".into()));
    }
    outputs.write(report, console)?;
    Ok(Ending::Done)
}

impl Wanted {
    fn of(names: &[String]) -> Result<Self, Failure> {
        if names.is_empty() {
            return Ok(Self { workloads: Workload::all(), metering: true });
        }
        let (metering, others): (Vec<&String>, Vec<&String>) =
            names.iter().partition(|name| *name == METERING);
        let mut workloads = Vec::new();
        for name in others {
            let found = Workload::named(name).map_err(|error| {
                let reason = match error {
                    kaa::Error::Invalid { reason, .. } => reason,
                    other => other.to_string(),
                };
                Failure::usage("--workloads", format!("{reason}; and `{METERING}`"))
            })?;
            workloads.extend(found);
        }
        Ok(Self { workloads, metering: !metering.is_empty() })
    }
}

/// How far the run is.
struct Display(ProgressBar);

impl Display {
    fn new(console: Console) -> Self {
        if !console.err_terminal {
            console.note("measuring, which takes some minutes");
            return Self(ProgressBar::hidden());
        }
        let template = "kaa: {bar:30} {pos}/{len} {elapsed} {msg}";
        let style = ProgressStyle::with_template(template).expect("the template is constant");
        Self(ProgressBar::no_length().with_style(style))
    }

    fn show(&self, event: &Event) {
        match event {
            Event::Measure { done, all, subject, workload } => {
                self.0.set_length(*all as u64);
                self.0.set_position(*done as u64);
                self.0.set_message(format!("{subject}: {}", workload.title()));
            }
            Event::Describe { subject } => self.0.set_message(format!("{subject} is started")),
            _ => {}
        }
    }
}

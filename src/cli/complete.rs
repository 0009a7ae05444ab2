//! `kaa complete`: the RLM loop on a question and a context.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use kaa::lm::{BudgetLimits, UsageSummary};
use kaa::{
    Compaction, Context, Dialect, Profile, Rlm, RlmCompletion, RlmError, RlmEvent, RlmObserver,
    RlmOptions, RlmProgress, RlmStop, RlmTool,
};
use serde_json::{Value as Json, json};

use super::console::{Console, excerpt};
use super::flags::{SessionFlags, read_text};
use super::session::{self, Plan};
use super::signals::Signals;
use super::units::{Count, Span};
use super::{Ending, Failure};

/// A larger prompt than that is not one that anybody wrote.
const PROMPT_BYTES_MAX: u64 = 1 << 20;

/// Flags of `kaa complete`.
#[derive(Debug, Args)]
pub(super) struct CompleteFlags {
    /// What is to be answered; without --context it is the context, too
    #[arg(value_name = "QUESTION")]
    question: String,
    #[command(flatten)]
    session: SessionFlags,
    #[command(flatten)]
    run: RunFlags,
    /// Directory for a log of the run, as JSON lines that RLM's visualizer reads
    #[arg(long, value_name = "DIR")]
    log_dir: Option<PathBuf>,
    /// Print one JSON object with the answer and what it cost, and nothing else
    #[arg(long, conflicts_with = "verbose")]
    json: bool,
    /// Say nothing on stderr about progress and cost
    #[arg(long, conflicts_with = "verbose")]
    quiet: bool,
    /// Show what the model says and what its code prints, on stderr
    #[arg(short, long)]
    verbose: bool,
}

/// How the loop runs.
#[derive(Debug, Args)]
#[command(next_help_heading = "Loop")]
struct RunFlags {
    /// Turns of the model; after them it is asked for an answer once more
    #[arg(long, value_name = "NUMBER", default_value_t = 30)]
    max_iterations: u32,
    /// Levels of RLMs: with 2, `rlm_query` starts a child with a session of its own
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    max_depth: u16,
    /// US dollars for the whole run, as far as prices are known: see --models
    #[arg(long, value_name = "DOLLARS", default_value_t = BudgetLimits::default().cost)]
    max_budget: f64,
    /// Time for the whole run: `90`, `10m`, `2h`
    #[arg(long, value_name = "SECONDS", default_value_t = Span(BudgetLimits::default().wall))]
    max_timeout: Span,
    /// Tokens for the whole run, sent and received
    #[arg(long, value_name = "NUMBER", default_value_t = Count(BudgetLimits::default().tokens))]
    max_tokens: Count,
    /// Calls of language models for the whole run
    #[arg(long, value_name = "NUMBER", default_value_t = Count(BudgetLimits::default().calls))]
    max_calls: Count,
    /// Calls in flight at once
    #[arg(long, value_name = "NUMBER", default_value_t = BudgetLimits::default().concurrency)]
    max_concurrency: u32,
    /// Turns in a row whose code fails, after which the run ends
    #[arg(long, value_name = "NUMBER", default_value_t = RlmOptions::default().max_errors)]
    max_errors: u32,
    /// Children of one batch that run at once
    #[arg(long, value_name = "NUMBER", default_value_t = RlmOptions::default().max_concurrent_subcalls)]
    max_concurrent_subcalls: usize,
    /// Children in all
    #[arg(long, value_name = "NUMBER", default_value_t = RlmOptions::default().max_children)]
    max_children: u32,
    /// Lets children see the context too, as `context_1`
    #[arg(long)]
    share_context: bool,
    /// How the model says what its answer is: the dict `answer`, the text `FINAL(...)`, or either
    #[arg(long, value_enum, default_value = "both")]
    dialect: DialectFlag,
    /// System prompt instead of Kaa's own
    #[arg(long, value_name = "FILE")]
    system_prompt: Option<PathBuf>,
    /// Python to run in the session before the model's first turn
    #[arg(long, value_name = "FILE")]
    setup: Option<PathBuf>,
    /// Replaces a conversation that fills most of so many tokens, by the model's own summary
    #[arg(
        long, value_name = "TOKENS", num_args = 0..=1,
        default_missing_value = "128000"
    )]
    compaction: Option<Count>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DialectFlag {
    Answer,
    Final,
    Both,
}

impl RunFlags {
    fn resolve(self) -> Result<RlmOptions, Failure> {
        let text = |flag: &str, path: Option<PathBuf>| {
            path.map(|path| read_text(flag, &path, PROMPT_BYTES_MAX)).transpose()
        };
        let budget = BudgetLimits {
            calls: self.max_calls.0,
            tokens: self.max_tokens.0,
            cost: self.max_budget,
            concurrency: self.max_concurrency,
            wall: self.max_timeout.0,
            ..BudgetLimits::default()
        };
        Ok(RlmOptions {
            max_depth: self.max_depth,
            max_iterations: self.max_iterations,
            budget,
            max_errors: self.max_errors,
            max_concurrent_subcalls: self.max_concurrent_subcalls,
            max_children: self.max_children,
            share_context: self.share_context,
            dialect: match self.dialect {
                DialectFlag::Answer => Dialect::Answer,
                DialectFlag::Final => Dialect::Final,
                DialectFlag::Both => Dialect::Both,
            },
            system_prompt: text("--system-prompt", self.system_prompt)?,
            setup: text("--setup", self.setup)?,
            compaction: self
                .compaction
                .map(|tokens| Compaction { context_tokens: tokens.0, ..Compaction::default() }),
            ..RlmOptions::default()
        })
    }
}

/// Answers the question.
pub(super) fn run(flags: CompleteFlags) -> Result<Ending, Failure> {
    let console = Console::new(flags.quiet || flags.json);
    let mut options = flags.run.resolve()?;
    let plan = flags.session.resolve(None)?;
    let Some(lm) = plan.options.lm.clone() else {
        return Err(Failure::Usage(
            "no model would answer: give --model, for example --model openai:NAME, or --lm-script; \
             see `kaa complete --help`"
                .into(),
        ));
    };
    if plan.options.profile != Profile::Rlm {
        return Err(Failure::usage("--profile", "the loop speaks the profile `rlm` only"));
    }
    let reactor = tokio::runtime::Runtime::new()
        .map_err(|e| Failure::Failed(format!("starting the runtime: {e}")))?;
    let base = session::prepare(&plan, console, &reactor)?;
    let Plan { options: environment, root_model, mut contexts, variables, snapshot_out, .. } = plan;
    let context = match contexts.len() {
        0 => Context::Text(flags.question.clone().into_bytes()),
        1 => contexts.remove(0),
        _ => return Err(Failure::usage("--context-json", "give one context, or the other")),
    };
    let display = Arc::new(Display::new(console, flags.verbose));
    options.model = root_model;
    options.environment = environment;
    options.log_dir = flags.log_dir;
    options.tools =
        variables.into_iter().map(|(name, value)| RlmTool::value(name, value)).collect();
    options.observer = Some(Arc::clone(&display) as _);
    let rlm = Rlm::new(base.backend()?, lm, options).map_err(named)?;
    let question = Some(flags.question.as_str());
    let ending = reactor.block_on(async {
        let mut signals = Signals::listen()?;
        let Some(path) = &snapshot_out else {
            let run = rlm.complete(context, question);
            let result = cancellable(&rlm, run, &mut signals).await;
            display.finish();
            return show(result, &signals, console, flags.json);
        };
        let mut session = match rlm.session().await {
            Ok(session) => session,
            Err(error) => return show(Err(error), &signals, console, flags.json),
        };
        let saved = async {
            session::check_saving(session.environment())?;
            let run = session.complete(context, question);
            let result = cancellable(&rlm, run, &mut signals).await;
            display.finish();
            let answered = result.is_ok();
            // Whatever becomes of the snapshot: the answer was paid for.
            let ending = show(result, &signals, console, flags.json)?;
            if answered {
                session::save(session.environment(), path, console).await?;
            }
            Ok::<_, Failure>(ending)
        };
        let saved = saved.await;
        let closed = session.close().await;
        let ending = saved?;
        closed?;
        Ok(ending)
    });
    reactor.shutdown_background();
    // Unmapping what the process is about to lose anyway takes as long as running a cell.
    std::mem::forget(base);
    ending
}

/// A signal cancels the run, which then ends by itself.
async fn cancellable(
    rlm: &Rlm,
    run: impl Future<Output = Result<RlmCompletion, RlmError>>,
    signals: &mut Signals,
) -> Result<RlmCompletion, RlmError> {
    let mut run = std::pin::pin!(run);
    loop {
        tokio::select! {
            biased;
            result = &mut run => return result,
            _ = signals.next() => rlm.cancel(),
        }
    }
}

/// What the library calls a field, as the flag that sets it.
fn named(error: kaa::Error) -> Failure {
    match error {
        kaa::Error::Invalid { what, reason } => {
            let flag = match what.as_str() {
                "budget.cost" => "--max-budget".into(),
                "budget.wall" => "--max-timeout".into(),
                "budget.concurrency" => "--max-concurrency".into(),
                "tools" => "--var".into(),
                "compaction.context_tokens" => "--compaction".into(),
                other if other.starts_with("max_") => format!("--{}", other.replace('_', "-")),
                other => other.to_owned(),
            };
            Failure::usage(&flag, reason)
        }
        other => other.into(),
    }
}

fn show(
    result: Result<RlmCompletion, RlmError>,
    signals: &Signals,
    console: Console,
    json: bool,
) -> Result<Ending, Failure> {
    match result {
        Ok(done) if json => {
            console.line(&done_json(&done).to_string())?;
            Ok(Ending::Done)
        }
        Ok(done) => {
            console.line(&done.response)?;
            if done.ending == kaa::Ending::OutOfTurns {
                console.note("the turns ran out; this is what the model said when asked once more");
            }
            if let Some(path) = &done.log {
                console.note(&format!("the log is in {}", path.display()));
            }
            console.note(&summary(&done));
            Ok(Ending::Done)
        }
        Err(error) => {
            if json {
                console.line(&error_json(&error).to_string())?;
            }
            ended(error, signals, console)
        }
    }
}

/// How a run without answer ends the program.
fn ended(error: RlmError, signals: &Signals, console: Console) -> Result<Ending, Failure> {
    if let Some(partial) = &error.partial_answer {
        console.note(&format!("the last thing that the model said:\n{}", partial.trim_end()));
    }
    match error.reason {
        RlmStop::Cancelled => Ok(signals.seen().unwrap_or(Ending::Interrupted)),
        RlmStop::Environment(error) => Err(error.into()),
        RlmStop::Errors { ref last, .. } => {
            console.note(&format!("the last error:\n{}", last.trim_end()));
            console.complain(&error.reason.to_string());
            Ok(Ending::Limit)
        }
        reason if reason.is_limit() => {
            console.complain(&reason.to_string());
            Ok(Ending::Limit)
        }
        // It may be what a server sent, which may send anything.
        reason => {
            let reason = excerpt(&reason.to_string());
            Err(Failure::Failed(format!("the model could not be asked: {reason}")))
        }
    }
}

fn summary(done: &RlmCompletion) -> String {
    let mut text = format!("{} turns, {} cells, ", done.turns, done.cells);
    text.push_str(&cost(&done.usage));
    let _ = write!(text, ", {:.1} s", done.execution_time.as_secs_f64());
    text
}

fn cost(usage: &UsageSummary) -> String {
    let mut text = format!(
        "{} calls, {} tokens in, {} out",
        usage.calls(),
        usage.input_tokens(),
        usage.output_tokens()
    );
    if let Some(cost) = usage.cost() {
        let _ = write!(text, ", ${cost:.4}");
    }
    text
}

fn done_json(done: &RlmCompletion) -> Json {
    json!({
        "answer": done.response,
        "ending": done.ending.name(),
        "root_model": done.root_model,
        "turns": done.turns,
        "cells": done.cells,
        "usage_summary": done.usage.to_json(),
        "execution_time": done.execution_time.as_secs_f64(),
        "log": done.log,
        "error": null,
    })
}

fn error_json(error: &RlmError) -> Json {
    json!({
        "answer": null,
        "partial_answer": error.partial_answer,
        "usage_summary": error.usage.to_json(),
        "error": { "kind": error.reason.name(), "message": error.to_string() },
    })
}

/// Shows where the run is: a line that changes, on a terminal only.
struct Display {
    console: Console,
    verbose: bool,
    bar: Option<ProgressBar>,
    /// Steps of the run come from several threads.
    lines: Mutex<()>,
}

impl Display {
    fn new(console: Console, verbose: bool) -> Self {
        let shown = console.err_terminal && !console.quiet;
        let bar = shown.then(|| {
            let style = ProgressStyle::with_template("kaa: {spinner} {elapsed} {msg}")
                .expect("the template is constant");
            let bar = ProgressBar::new_spinner().with_style(style);
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { console, verbose, bar, lines: Mutex::new(()) }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// Writes lines above the one that changes.
    fn print(&self, text: &str) {
        let _one_by_one = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let write = || self.console.err(format!("{}\n", text.trim_end()).as_bytes());
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }
}

impl RlmObserver for Display {
    fn event(&self, event: RlmEvent<'_>, progress: &RlmProgress) {
        if let Some(bar) = &self.bar {
            bar.set_message(line(progress));
        }
        match event {
            RlmEvent::LogFailed { reason } => {
                self.print(&format!("kaa: --log-dir: {reason}; the run goes on without a log"));
            }
            RlmEvent::Responded { depth, response } if self.verbose => {
                self.print(&format!("{}{response}", heading(depth, "model")));
            }
            RlmEvent::CellEnded { depth, execution } if self.verbose => {
                let (stdout, stderr) = (execution.stdout.text(), execution.stderr.text());
                self.print(&format!("{}{stdout}{stderr}", heading(depth, "cell")));
            }
            RlmEvent::ChildBegan { depth, prompt, .. } if self.verbose => {
                self.print(&format!("{}{prompt}", heading(depth, "child begins")));
            }
            RlmEvent::Compacted { depth, .. } if self.verbose => {
                self.print(&heading(depth, "conversation replaced by a summary"));
            }
            _ => {}
        }
    }
}

fn heading(depth: u16, what: &str) -> String {
    match depth {
        0 => format!("--- {what}\n"),
        _ => format!("--- {what} (level {depth})\n"),
    }
}

fn line(progress: &RlmProgress) -> String {
    let RlmProgress { turn, turns_max, cells, children, calls, calls_in_flight, .. } = progress;
    let mut text = format!("turn {turn}/{turns_max} · {cells} cells · {calls} calls");
    if *calls_in_flight > 0 {
        let _ = write!(text, " ({calls_in_flight} in flight)");
    }
    if *children > 0 {
        let _ = write!(text, " · {children} children");
    }
    let (input, output) = (progress.input_tokens, progress.output_tokens);
    let _ = write!(text, " · {} tokens in, {} out", short(input), short(output));
    if let Some(cost) = progress.cost {
        let _ = write!(text, " · ${cost:.4}");
    }
    text
}

/// A number in three digits or so.
fn short(number: u64) -> String {
    match number {
        0..1_000 => number.to_string(),
        1_000..1_000_000 => format!("{:.1}k", number as f64 / 1e3),
        _ => format!("{:.1}M", number as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::{line, short};
    use kaa::RlmProgress;

    #[test]
    fn progress_is_one_short_line() {
        for (number, text) in [(0, "0"), (999, "999"), (1_234, "1.2k"), (12_345_678, "12.3M")] {
            assert_eq!(short(number), text);
        }
        assert_eq!(
            line(&RlmProgress::default()),
            "turn 0/0 · 0 cells · 0 calls · 0 tokens in, 0 out"
        );
    }
}

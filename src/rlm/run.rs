//! The loop itself: ask the model, run its code, show it what came out, until there is an answer.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};

use super::ending::{Ending, RlmCompletion, RlmError, RlmStop};
use super::response::{Final, code_blocks, final_in};
use super::scope::Scope;
use super::session::{RlmSession, tools};
use super::trajectory::{Trajectory, Turn};
use super::{Dialect, RlmEvent, observation, prompt};
use crate::environment::{Context, ExecuteOptions, Execution, Outcome, Output, Status, Variable};
use crate::error::Error;
use crate::lm::{Ledger, LmError, LmKind, LmRequest, Prompt, estimated_tokens, usage_of};

/// What RLM calls a model whose name it doesn't know.
const UNKNOWN_MODEL: &str = "unknown";

/// Blocks of one response that are run.
const BLOCKS_MAX: usize = 64;
/// How long an interrupt waits for its effect before it's repeated.
const INTERRUPT_AGAIN: Duration = Duration::from_millis(20);

/// What is kept of the blocks of one response.
#[derive(Default)]
struct Blocks {
    /// What the model is told about each.
    results: Vec<String>,
    /// What the log says about each.
    records: Vec<Json>,
    /// What the first that failed wrote to stderr.
    failure: Option<String>,
    /// The first answer.
    final_answer: Option<String>,
}

/// One run of one RLM.
pub(super) struct Run<'a> {
    session: &'a mut RlmSession,
    scope: Arc<Scope>,
    ledger: Ledger,
    start: Instant,
    messages: Vec<Json>,
    trajectory: Option<Trajectory>,
    /// The model that answered the loop's own calls.
    root_model: String,
    partial_answer: Option<String>,
    turns: u32,
    cells: u32,
    errors: u32,
    compactions: u32,
}

impl<'a> Run<'a> {
    pub(super) fn new(session: &'a mut RlmSession, scope: Arc<Scope>, ledger: Ledger) -> Self {
        let asked = session.model.as_ref().or(session.rlm.options.model.as_ref());
        let model = asked.map(String::as_str).or_else(|| scope.lm.model_name(session.depth.into()));
        let root_model = model.unwrap_or(UNKNOWN_MODEL).to_owned();
        Self {
            session,
            scope,
            ledger,
            start: Instant::now(),
            messages: Vec::new(),
            trajectory: None,
            root_model,
            partial_answer: None,
            turns: 0,
            cells: 0,
            errors: 0,
            compactions: 0,
        }
    }

    pub(super) async fn complete(
        mut self,
        context: Context,
        question: Option<&str>,
        kept: bool,
    ) -> Result<RlmCompletion, RlmError> {
        let result = match self.begin(context, question).await {
            Ok(()) => self.take_turns().await,
            Err(stop) => Err(stop),
        };
        if result.is_ok()
            && kept
            && let Err(error) = self.session.keep_history(&self.messages).await
        {
            // The answer is there, and was paid for.
            self.scope.report(RlmEvent::HistoryFailed { reason: &error.to_string() });
        }
        let usage = self.ledger.total();
        match result {
            Ok((response, ending)) => Ok(RlmCompletion {
                response,
                ending,
                root_model: self.root_model,
                turns: self.turns,
                cells: self.cells,
                usage,
                execution_time: self.start.elapsed(),
                log: self.trajectory.as_ref().and_then(Trajectory::path).map(Into::into),
                metadata: self.trajectory.and_then(Trajectory::into_json),
            }),
            Err(reason) => Err(RlmError { reason, partial_answer: self.partial_answer, usage }),
        }
    }

    async fn begin(&mut self, context: Context, question: Option<&str>) -> Result<(), RlmStop> {
        let rlm = Arc::clone(&self.session.rlm);
        let options = &rlm.options;
        let depth = self.session.depth;
        self.trajectory = self.trajectory_of(&context);
        let metadata = prompt::metadata(&context, question);
        self.scope.unless_interrupted(self.session.prepare(context)).await?;
        let system = prompt::system(
            options.system_prompt.as_deref(),
            tools(options, depth),
            options.dialect,
            options.orchestrator,
            options.compaction.is_some(),
        );
        self.messages.push(prompt::message("system", system));
        self.messages.push(prompt::message("user", metadata));
        // A child has its own task: what was said to the root about the root's is not for it.
        if let Some(prologue) = options.prologue.as_ref().filter(|_| depth == 0) {
            self.messages.push(prompt::message("user", prologue.as_str()));
        }
        Ok(())
    }

    /// The record of this run, if anybody wants one.
    fn trajectory_of(&self, context: &Context) -> Option<Trajectory> {
        let rlm = &self.session.rlm;
        let (options, root) = (&rlm.options, self.session.depth == 0);
        let logged = options.log_dir.as_deref().filter(|_| root);
        let kept = options.record || (!root && options.log_dir.is_some());
        if logged.is_none() && !kept {
            return None;
        }
        let metadata = json!({
            "root_model": self.root_model,
            "max_depth": options.max_depth,
            "max_iterations": options.max_iterations,
            "backend": "kaa",
            "backend_kwargs": {},
            "environment_type": rlm.backend.capabilities().backend,
            "environment_kwargs": {},
            "other_backends": null,
        });
        let mut trajectory = Trajectory::new(metadata, kept);
        trajectory.set_context(context);
        if let Some(directory) = logged
            && let Err(error) = trajectory.log_to(directory)
        {
            let reason = format!("{}: {error}", directory.display());
            self.scope.report(RlmEvent::LogFailed { reason: &reason });
        }
        Some(trajectory)
    }

    async fn take_turns(&mut self) -> Result<(String, Ending), RlmStop> {
        let max_iterations = self.session.rlm.options.max_iterations;
        for turn in 1..=max_iterations {
            if let Some(stop) = self.scope.stop() {
                return Err(stop);
            }
            self.compact_if_long().await?;
            let contexts = self.session.contexts;
            // In compaction mode `history` is this conversation, as the system prompt says.
            let compaction = self.session.rlm.options.compaction.is_some();
            let histories = if compaction { 0 } else { self.session.histories };
            let text = prompt::turn(turn, max_iterations, contexts, histories);
            self.messages.push(prompt::message("user", text));
            if let Some(answer) = self.take_turn(turn).await? {
                return Ok((answer, Ending::Answered));
            }
        }
        let answer = self.last_chance().await?;
        Ok((answer, Ending::OutOfTurns))
    }

    /// One turn; the answer, if it gave one.
    async fn take_turn(&mut self, turn: u32) -> Result<Option<String>, RlmStop> {
        let start = Instant::now();
        self.turns = turn;
        let depth = self.session.depth;
        self.scope.begin_turn(depth, turn);
        let response = self.ask(self.messages.clone()).await?;
        self.scope.report(RlmEvent::Responded { depth, response: &response });
        if !response.trim().is_empty() {
            self.partial_answer = Some(response.clone());
        }
        let blocks = self.run_blocks(&response).await?;
        let answer = self.answer_of(&response, blocks.final_answer).await?;
        let turn = Turn {
            prompt: &self.messages,
            response: &response,
            blocks: blocks.records,
            final_answer: answer.as_deref(),
            time: start.elapsed(),
        };
        record(&mut self.trajectory, &self.scope, turn);
        let said = prompt::message("assistant", response);
        if answer.is_some() {
            self.messages.push(said);
            return Ok(answer);
        }
        let mut new = vec![said];
        let output = observation::message(&blocks.results);
        new.extend(output.map(|output| prompt::message("user", output)));
        self.messages.extend(new.iter().cloned());
        self.check_errors(blocks.failure)?;
        if let Some(stop) = self.scope.stop() {
            return Err(stop);
        }
        if self.session.rlm.options.compaction.is_some() {
            self.session.append_history(Json::Array(new)).await?;
        }
        Ok(None)
    }

    /// Asks the model, unless the run has to end.
    async fn ask(&mut self, messages: Vec<Json>) -> Result<String, RlmStop> {
        let model = self.session.model.as_ref().or(self.session.rlm.options.model.as_ref());
        let request = LmRequest {
            kind: LmKind::Llm,
            prompt: Prompt::Messages(messages.into()),
            model: model.cloned(),
            depth: self.session.depth.into(),
        };
        let (scope, quota) = (&self.scope, self.scope.quota.as_ref());
        let call = async {
            let _permit = match quota {
                Some(quota) => {
                    quota.calls(1).map_err(|error| LmError::new(error.to_string()))?;
                    Some(quota.permits(1).await)
                }
                None => None,
            };
            scope.lm.complete(&request).await
        };
        let answer = tokio::select! {
            answer = call => answer,
            () = scope.until_interrupted() => {
                return Err(scope.stop().unwrap_or(RlmStop::Cancelled));
            }
        };
        let spent = usage_of(&answer);
        self.ledger.add(spent);
        if let Some(quota) = quota {
            quota.book(spent);
        }
        match answer {
            Ok(completion) => Ok(completion.response),
            Err(error) => Err(scope.stop().unwrap_or(RlmStop::Lm(error))),
        }
    }

    /// Runs every block; after one in which the run had to end, no more.
    ///
    /// Of each only what is said about it is kept: a response may have many.
    async fn run_blocks(&mut self, response: &str) -> Result<Blocks, RlmStop> {
        let mut blocks = Blocks::default();
        let (dialect, chars_max) = {
            let options = &self.session.rlm.options;
            (options.dialect, options.output_chars)
        };
        for (number, code) in code_blocks(response).into_iter().enumerate() {
            if number >= BLOCKS_MAX {
                blocks.results.push(format!("Not run: of a response {BLOCKS_MAX} blocks are."));
                break;
            }
            if number > 0 && self.scope.stop().is_some() {
                break;
            }
            let execution = self.execute(code).await?;
            let mut variables = self.variables().await?;
            if dialect != Dialect::Final {
                variables.insert(0, answer_variable());
            }
            blocks.results.push(observation::result(&execution, &variables, chars_max));
            if let Some(trajectory) = &mut self.trajectory {
                blocks.records.push(trajectory.block(code, &execution, &variables));
            }
            if blocks.failure.is_none() && !execution.stderr.bytes.is_empty() {
                let stderr = execution.stderr.text().into_owned();
                blocks.failure = Some(observation::cut(stderr, chars_max));
            }
            if dialect != Dialect::Final {
                blocks.final_answer = blocks.final_answer.take().or(execution.final_answer);
            }
        }
        Ok(blocks)
    }

    /// The session's variables; none when the run has to end: they're only for the next turn.
    async fn variables(&mut self) -> Result<Vec<Variable>, RlmStop> {
        let listed = self.session.environment.list_variables();
        tokio::select! {
            biased;
            variables = listed => match variables {
                Ok(variables) => Ok(variables),
                Err(error) if error.poisons() => Err(error.into()),
                Err(_) => Ok(Vec::new()),
            },
            () = self.scope.until_interrupted() => Ok(Vec::new()),
        }
    }

    /// Runs a cell, and stops it when the run has to end.
    async fn execute(&mut self, code: &str) -> Result<Execution, RlmStop> {
        if let Some(stop) = self.scope.stop() {
            return Err(stop);
        }
        let depth = self.session.depth;
        self.cells += 1;
        self.scope.begin_cell(depth, code);
        let result = {
            let environment = &mut self.session.environment;
            let interrupt = environment.interrupt();
            let mut cell = pin!(environment.execute_opts(code, ExecuteOptions::default()));
            tokio::select! {
                biased;
                result = &mut cell => result,
                () = self.scope.until_interrupted() => loop {
                    // It may not have begun yet.
                    interrupt.interrupt();
                    tokio::select! {
                        biased;
                        result = &mut cell => break result,
                        () = tokio::time::sleep(INTERRUPT_AGAIN) => {}
                    }
                },
            }
        };
        let execution = match result {
            Ok(execution) => execution,
            // The session is as it was before the cell; the model may do it another way.
            Err(error @ (Error::Invalid { .. } | Error::Protocol { .. }))
                if self.session.environment.status() == Status::Ready =>
            {
                failed_execution(&error)
            }
            Err(error) => return Err(error.into()),
        };
        self.scope.report(RlmEvent::CellEnded { depth, execution: &execution });
        Ok(execution)
    }

    /// The answer that a turn gave: in a block, or else in the text.
    async fn answer_of(
        &mut self,
        response: &str,
        in_block: Option<String>,
    ) -> Result<Option<String>, RlmStop> {
        if in_block.is_some() {
            return Ok(in_block);
        }
        let found = match self.session.rlm.options.dialect {
            Dialect::Answer => None,
            Dialect::Both => final_in(response, false),
            Dialect::Final => final_in(response, true),
        };
        match found {
            None => Ok(None),
            Some(Final::Text(text)) => Ok(Some(text)),
            Some(Final::Variable(name)) => self.variable_answer(&name).await,
        }
    }

    /// The value of a variable, as `FINAL_VAR` shows it; none when there is no such variable.
    async fn variable_answer(&mut self, name: &str) -> Result<Option<String>, RlmStop> {
        // A JSON string is a literal of Python, too.
        let name = Json::from(name);
        let code = format!("answer = {{'content': FINAL_VAR({name}), 'ready': True}}");
        let answer = self.execute(&code).await?.final_answer.unwrap_or_default();
        let text = answer.trim();
        let missing = text.contains("Variable '")
            && text.contains("' not found")
            && text.contains("FINAL_VAR");
        Ok((!text.is_empty() && !missing).then(|| text.to_owned()))
    }

    /// Ends a run whose code fails turn after turn.
    fn check_errors(&mut self, failure: Option<String>) -> Result<(), RlmStop> {
        let limit = self.session.rlm.options.max_errors;
        let Some(last) = failure else {
            self.errors = 0;
            return Ok(());
        };
        self.errors += 1;
        if self.errors < limit {
            return Ok(());
        }
        Err(RlmStop::Errors { count: self.errors, limit, last })
    }

    /// The turns have run out: one more call, whose text is the answer.
    async fn last_chance(&mut self) -> Result<String, RlmStop> {
        let start = Instant::now();
        self.messages.push(prompt::message("user", prompt::LAST_CHANCE));
        let response = self.ask(self.messages.clone()).await?;
        let turn = Turn {
            prompt: &self.messages,
            response: &response,
            blocks: Vec::new(),
            final_answer: Some(&response),
            time: start.elapsed(),
        };
        record(&mut self.trajectory, &self.scope, turn);
        self.messages.push(prompt::message("assistant", response.as_str()));
        Ok(response)
    }

    /// Replaces a conversation that has become too long by the model's own summary.
    async fn compact_if_long(&mut self) -> Result<(), RlmStop> {
        let Some(compaction) = self.session.rlm.options.compaction else { return Ok(()) };
        let content = |message: &Json| message["content"].as_str().map_or(0, str::len);
        let tokens = estimated_tokens(self.messages.iter().map(content).sum());
        if tokens < compaction.threshold_tokens() {
            return Ok(());
        }
        let mut asked = self.messages.clone();
        asked.push(prompt::message("user", prompt::SUMMARIZE));
        let summary = self.ask(asked).await?;
        self.compactions += 1;
        let entry = json!({ "type": "summary", "content": summary });
        self.session.append_history(entry).await?;
        // The system prompt and what the context is.
        self.messages.truncate(2);
        self.messages.push(prompt::message("assistant", summary));
        self.messages.push(prompt::message("user", prompt::go_on(self.compactions)));
        let (depth, count) = (self.session.depth, self.compactions);
        self.scope.report(RlmEvent::Compacted { depth, count });
        Ok(())
    }
}

/// Adds a turn to the record, if there is one.
fn record(trajectory: &mut Option<Trajectory>, scope: &Scope, turn: Turn<'_>) {
    let Some(trajectory) = trajectory else { return };
    if let Err(error) = trajectory.add(turn) {
        scope.report(RlmEvent::LogFailed { reason: &error.to_string() });
    }
}

/// `answer` is no variable of the user's, but RLM lists it with them.
fn answer_variable() -> Variable {
    Variable { name: "answer".into(), type_name: "dict".into(), repr: String::new(), new: false }
}

/// A cell that the session could not run to its end, and that left nothing behind.
fn failed_execution(error: &Error) -> Execution {
    let bytes = format!("{error}\n").into_bytes();
    let stderr = Output { total_bytes: bytes.len() as u64, bytes, truncated: false };
    Execution { rolled_back: true, stderr, ..Execution::new(Outcome::Raised) }
}

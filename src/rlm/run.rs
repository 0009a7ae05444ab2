//! The loop itself: ask the model, run its code, show it what came out, until there is an answer.

use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value as Json, json};

use super::ending::{Ending, RlmCompletion, RlmError, RlmStop};
use super::observation::{self, Block};
use super::response::{Final, code_blocks, final_in, prose};
use super::scope::Scope;
use super::session::{RlmSession, tools};
use super::trajectory::{Trajectory, Turn};
use super::{Dialect, RlmEvent, prompt};
use crate::environment::{Context, ExecuteOptions, Execution, Variable};
use crate::lm::{Ledger, LmKind, LmRequest, Prompt, estimated_tokens, usage_of};

/// What RLM calls a model whose name it doesn't know.
const UNKNOWN_MODEL: &str = "unknown";

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
        let result = match result {
            Ok(found) if kept => self.session.keep_history(&self.messages).await.map(|()| found),
            other => other,
        };
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
        let metadata = prompt::metadata(&context, question)?;
        self.session.prepare(context).await?;
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
            let (contexts, histories) = (self.session.contexts, self.session.histories);
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
        let answer = self.answer_of(&response, &blocks).await?;
        record(
            &mut self.trajectory,
            &self.scope,
            &Turn {
                prompt: &self.messages,
                response: &response,
                blocks: &blocks,
                final_answer: answer.as_deref(),
                time: start.elapsed(),
            },
        );
        let output = observation::message(&blocks, self.session.rlm.options.output_chars);
        let said = prompt::message("assistant", response);
        if answer.is_some() {
            self.messages.push(said);
            return Ok(answer);
        }
        let mut new = vec![said];
        new.extend(output.map(|output| prompt::message("user", output)));
        self.messages.extend(new.iter().cloned());
        self.check_errors(&blocks)?;
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
        let answer = tokio::select! {
            answer = self.scope.lm.complete(&request) => answer,
            () = self.scope.until_interrupted() => {
                return Err(self.scope.stop().unwrap_or(RlmStop::Cancelled));
            }
        };
        let spent = usage_of(&answer);
        self.ledger.add(spent);
        if let Some(tenant) = &self.session.rlm.options.environment.tenant {
            tenant.book(spent);
        }
        match answer {
            Ok(completion) => Ok(completion.response),
            Err(error) => Err(self.scope.stop().unwrap_or(RlmStop::Lm(error))),
        }
    }

    /// Runs every block; after one in which the run had to end, no more.
    async fn run_blocks(&mut self, response: &str) -> Result<Vec<Block>, RlmStop> {
        let mut blocks = Vec::new();
        for code in code_blocks(response) {
            let execution = self.execute(code).await?;
            let mut variables = self.session.environment.list_variables().await?;
            if self.session.rlm.options.dialect != Dialect::Final {
                variables.insert(0, answer_variable());
            }
            blocks.push(Block { code: code.to_owned(), execution, variables });
            if self.scope.stop().is_some() {
                break;
            }
        }
        Ok(blocks)
    }

    /// Runs a cell, and stops it when the run has to end.
    async fn execute(&mut self, code: &str) -> Result<Execution, RlmStop> {
        let depth = self.session.depth;
        self.cells += 1;
        self.scope.begin_cell(depth, code);
        let interrupt = self.session.environment.interrupt();
        let mut cell = pin!(self.session.environment.execute_opts(code, ExecuteOptions::default()));
        let execution = tokio::select! {
            execution = &mut cell => execution?,
            () = self.scope.until_interrupted() => {
                interrupt.interrupt();
                cell.await?
            }
        };
        self.scope.report(RlmEvent::CellEnded { depth, execution: &execution });
        Ok(execution)
    }

    /// The answer that a turn gave: in a block, or else in the text.
    async fn answer_of(
        &mut self,
        response: &str,
        blocks: &[Block],
    ) -> Result<Option<String>, RlmStop> {
        let dialect = self.session.rlm.options.dialect;
        let in_block = blocks.iter().find_map(|block| block.execution.final_answer.clone());
        if in_block.is_some() && dialect != Dialect::Final {
            return Ok(in_block);
        }
        let found = match dialect {
            Dialect::Answer => None,
            Dialect::Both => final_in(&prose(response)),
            Dialect::Final => final_in(response),
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
        let code = format!("print(FINAL_VAR({}))", Json::from(name));
        let execution = self.execute(&code).await?;
        let text = execution.stdout.text().trim().to_owned();
        let missing = text.contains("Variable '")
            && text.contains("' not found")
            && text.contains("FINAL_VAR");
        Ok((!text.is_empty() && !missing).then_some(text))
    }

    /// Ends a run whose code fails turn after turn.
    fn check_errors(&mut self, blocks: &[Block]) -> Result<(), RlmStop> {
        let limit = self.session.rlm.options.max_errors;
        let failed = blocks.iter().find(|block| !block.execution.stderr.bytes.is_empty());
        let Some(block) = failed else {
            self.errors = 0;
            return Ok(());
        };
        self.errors += 1;
        if self.errors < limit {
            return Ok(());
        }
        let last = block.execution.stderr.text().into_owned();
        Err(RlmStop::Errors { count: self.errors, limit, last })
    }

    /// The turns have run out: one more call, whose text is the answer.
    async fn last_chance(&mut self) -> Result<String, RlmStop> {
        let start = Instant::now();
        self.messages.push(prompt::message("user", prompt::LAST_CHANCE));
        let response = self.ask(self.messages.clone()).await?;
        record(
            &mut self.trajectory,
            &self.scope,
            &Turn {
                prompt: &self.messages,
                response: &response,
                blocks: &[],
                final_answer: Some(&response),
                time: start.elapsed(),
            },
        );
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
fn record(trajectory: &mut Option<Trajectory>, scope: &Scope, turn: &Turn<'_>) {
    let Some(trajectory) = trajectory else { return };
    if let Err(error) = trajectory.add(turn) {
        scope.report(RlmEvent::LogFailed { reason: &error.to_string() });
    }
}

/// `answer` is no variable of the user's, but RLM lists it with them.
fn answer_variable() -> Variable {
    Variable { name: "answer".into(), type_name: "dict".into(), repr: String::new(), new: false }
}

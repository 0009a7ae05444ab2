//! `ProcessEnvironment`: the contract on a guest that is a process.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rand::RngExt;
use serde_json::{Value as Json, json};

use super::Life;
use super::backend::Shared;
use super::guest::Guest;
use super::link::Death;
use super::saved::Saved;
use super::turn::TurnEnd;
use crate::agent::{Conversation, Request, Signal, Streams, check_tool, not_begun};
use crate::environment::{
    Capabilities, Context, Environment, EnvironmentOptions, Exception, ExecuteOptions, Execution,
    Interrupt, Outcome, Status, Tool, Variable,
};
use crate::error::{Error, Result};
use crate::limits::{Limit, Limits, Usage};
use crate::lm::{Ledger, UsageSummary};
use crate::policy::Clock;
use crate::protocol::{CALL_BYTES_MAX, Message};
use crate::snapshot::Snapshot;
use crate::tenant::{Seat, Turn as Permit};
use crate::value::Value;

/// Limits of turns that aren't cells: `__repr__` and `__reduce__` of the cells may run in them.
const SERVICE_TIME: Duration = Duration::from_secs(30);
/// What a shell adds to the signal that ended a process, for its exit code.
const EXIT_SIGNAL: i32 = 128;
const SIGKILL: i32 = 9;

/// One session in a process somewhere.
pub(super) struct ProcessEnvironment {
    shared: Arc<Shared>,
    options: EnvironmentOptions,
    conversation: Conversation,
    /// None when nothing is left of it.
    guest: Option<Guest>,
    /// What was killed last: its end may take a moment, which a session that is closed waits for.
    dying: Option<Box<dyn Life>>,
    /// Why the state is lost, if it is.
    lost: Option<String>,
    signal: Arc<Signal>,
    ledger: Ledger,
    seat: Option<Seat>,
}

impl ProcessEnvironment {
    /// Opens a session.
    ///
    /// # Errors
    ///
    /// As [`Backend::open`](crate::Backend::open).
    pub(super) async fn open(shared: &Arc<Shared>, options: EnvironmentOptions) -> Result<Self> {
        options.limits.validate()?;
        options.policy.validate()?;
        let backend = shared.machine.capabilities().backend;
        refuse(backend, &options)?;
        shared.machine.check(&options)?;
        let seat = match (&options.tenant, options.depth) {
            (None, _) => None,
            (Some(tenant), 0) => Some(tenant.open_session()?),
            (Some(tenant), _) => Some(tenant.open_nested_session()?),
        };
        let conversation = conversation(&options)?;
        let mut environment = Self {
            shared: Arc::clone(shared),
            options,
            conversation,
            guest: None,
            dying: None,
            lost: None,
            signal: Arc::default(),
            ledger: Ledger::default(),
            seat,
        };
        if let Err(error) = environment.begin().await {
            // Why there is no session is what has to be known.
            let _ = Box::new(environment).close().await;
            return Err(error);
        }
        Ok(environment)
    }

    /// A process without state, which has run the setup code.
    async fn begin(&mut self) -> Result<()> {
        let begun = self.begin_anew().await;
        if let Err(error) = &begun {
            self.lost = Some(error.to_string());
        }
        begun
    }

    async fn begin_anew(&mut self) -> Result<()> {
        // For a future that is dropped in the middle.
        self.lost = Some("its start was interrupted".into());
        let shared = Arc::clone(&self.shared);
        let guest = match self.guest.take() {
            Some(mut guest) if !guest.has_worker => {
                // A supervisor that can't start another one is of no use.
                guest.start_worker(&shared.compiled).await.is_ok().then_some(guest)
            }
            other => {
                self.dying = other.map(Guest::kill).or(self.dying.take());
                None
            }
        };
        let guest = match guest {
            Some(guest) => guest,
            None => Guest::start(&*shared.machine, &shared.compiled, &self.options).await?,
        };
        shared.dill.store(guest.dill, Ordering::Relaxed);
        self.guest = Some(guest);
        self.conversation = conversation(&self.options)?;
        self.lost = None;
        if let Some(code) = &shared.setup_code {
            self.set_up(code).await?;
        }
        Ok(())
    }

    async fn set_up(&mut self, code: &str) -> Result<()> {
        let mut message = Message::new(json!({ "op": "setup" }));
        message.body = code.as_bytes().to_vec();
        let limits = self.options.limits.clone();
        let mut streams = Streams::new(limits.output_bytes);
        let permit = self.permit().await?;
        let (end, usage) = self.turn(message, &mut streams, &limits, permit).await?;
        let execution = match end {
            TurnEnd::Returned => {
                let reply = self.conversation.take_reply()?;
                self.conversation.execution(reply, streams, usage)?
            }
            TurnEnd::Dead(death) => self.stopped(death, streams, usage),
            TurnEnd::Gone(error) => return Err(error),
        };
        if execution.outcome == Outcome::Completed {
            self.conversation.keep();
            return Ok(());
        }
        let words = execution.stderr.text().into_owned();
        self.lose("its setup code failed".into());
        Err(Error::invalid("setup_code", format!("it failed: {words}")))
    }

    /// The state is gone, and so is the process.
    fn lose(&mut self, reason: String) {
        self.conversation.abandon();
        if let Some(guest) = self.guest.take() {
            self.dying = Some(guest.kill());
        }
        self.lost.get_or_insert(reason);
    }

    fn check_ready(&self) -> Result<()> {
        match &self.lost {
            Some(reason) => Err(Error::Poisoned { reason: reason.clone() }),
            None => Ok(()),
        }
    }

    /// Leave to run, if there is a tenant to ask.
    async fn permit(&self) -> Result<Option<Permit>> {
        let Some(seat) = &self.seat else { return Ok(None) };
        let mut permit = seat.admit().await?;
        // A processor is the machine's to give, not the embedder's.
        permit.pause(Duration::ZERO);
        Ok(Some(permit))
    }

    /// One turn for this request. A future that is dropped in the middle costs the session its state.
    async fn turn(
        &mut self,
        request: Message,
        streams: &mut Streams,
        limits: &Limits,
        permit: Option<Permit>,
    ) -> Result<(TurnEnd, Usage)> {
        self.check_ready()?;
        let quota = permit.as_ref().map(|permit| permit.lm());
        self.conversation.set_books(quota, self.ledger.clone());
        self.conversation.begin(Some(request), limits);
        let mut held = Held { environment: self, done: false };
        let environment = &mut *held.environment;
        let Some(guest) = &mut environment.guest else {
            return Err(Error::Internal("a session that is ready has no process".into()));
        };
        let turn = guest.turn(&mut environment.conversation, streams, limits, &environment.signal);
        let (end, usage) = turn.await;
        held.done = true;
        drop(held);
        if let Some(permit) = permit {
            permit.finish(usage.compute);
        }
        if let Some(seat) = &self.seat {
            seat.set_memory(usage.memory_bytes);
        }
        match &end {
            TurnEnd::Returned => {}
            TurnEnd::Dead(death) => {
                self.conversation.abandon();
                self.lost = Some(cause(*death, self.conversation.stopped_by()));
            }
            TurnEnd::Gone(Error::Poisoned { reason }) => self.lose(reason.clone()),
            TurnEnd::Gone(error) => self.lose(error.to_string()),
        }
        Ok((end, usage))
    }

    /// One turn that isn't a cell.
    async fn service(&mut self, request: Request) -> Result<Message> {
        let Request { what, message } = request;
        let sent_bytes = message.body.len();
        let slack = |guest: &Guest| guest.life.slack(sent_bytes + CALL_BYTES_MAX);
        let limits = Limits {
            compute: SERVICE_TIME,
            wall: SERVICE_TIME + self.guest.as_ref().map_or(Duration::ZERO, slack),
            lm_calls: 0,
            tool_calls: 0,
            ..self.options.limits.clone()
        };
        self.signal.take();
        let mut streams = Streams::new(0);
        let permit = self.permit().await?;
        let (end, _) = self.turn(message, &mut streams, &limits, permit).await?;
        let unfit = || {
            let most = self.options.limits.memory_bytes;
            Error::invalid(
                what.as_str(),
                format!(
                    "it does not fit: {sent_bytes} bytes into a memory of {most}, of which Python and \
                     what the session holds take a part (raise limits.memory_bytes)"
                ),
            )
        };
        match end {
            TurnEnd::Gone(error) => Err(error),
            TurnEnd::Dead(death) if death.starved => Err(unfit()),
            TurnEnd::Dead(_) => {
                Err(Error::Poisoned { reason: self.lost.clone().unwrap_or_default() })
            }
            TurnEnd::Returned => {
                let reply = match self.conversation.take_reply() {
                    Err(Error::Invalid { what, .. }) if what == "MemoryError" => {
                        return Err(unfit());
                    }
                    reply => reply?,
                };
                self.conversation.keep();
                Ok(reply)
            }
        }
    }

    /// The result of a cell that ended with its worker.
    fn stopped(&mut self, death: Death, mut streams: Streams, usage: Usage) -> Execution {
        let limit = self.conversation.stopped_by();
        let (outcome, type_name) = match (limit, death) {
            (Some(_), Death { killed: true, .. }) => (Outcome::LimitReached, "LimitReached"),
            (_, Death { starved: true, signal: Some(SIGKILL), .. }) => {
                (Outcome::Raised, "MemoryError")
            }
            (_, Death { signal: Some(signal), .. }) => {
                (Outcome::Exited { code: EXIT_SIGNAL.saturating_add(signal) }, "Crash")
            }
            (_, Death { code, .. }) => (Outcome::Exited { code: code.unwrap_or(0) }, "SystemExit"),
        };
        let message = cause(death, limit);
        let line =
            format!("{type_name}: {message}; the session's state is lost until it is reset\n");
        streams.stderr.write(line.as_bytes());
        let mut execution = self.conversation.stopped(outcome, streams, usage);
        execution.limit = limit;
        execution.exception =
            Some(Exception { type_name: type_name.into(), message, traceback: line });
        execution
    }

    async fn run_cell(&mut self, code: &str, options: ExecuteOptions) -> Result<Execution> {
        let limits = options.limits.unwrap_or_else(|| self.options.limits.clone());
        limits.validate()?;
        refuse_fuel(self.shared.machine.capabilities().backend, &limits)?;
        self.check_ready()?;
        let since = Instant::now();
        let signal = Arc::clone(&self.signal);
        let permit = tokio::select! {
            biased;
            () = signal.wait() => return Ok(not_begun(&limits, None, since.elapsed())),
            permit = self.permit() => permit?,
        };
        let request = self.conversation.cell(code);
        let mut streams = Streams::new(limits.output_bytes);
        let (end, usage) = self.turn(request, &mut streams, &limits, permit).await?;
        match end {
            TurnEnd::Gone(error) => Err(error),
            TurnEnd::Dead(death) => Ok(self.stopped(death, streams, usage)),
            TurnEnd::Returned => {
                let reply = match self.conversation.take_reply() {
                    Err(Error::Invalid { what, .. }) if what == "MemoryError" => {
                        return Ok(self.out_of_memory(streams, usage));
                    }
                    reply => reply?,
                };
                let execution = self.conversation.execution(reply, streams, usage);
                match &execution {
                    Ok(_) => self.conversation.keep(),
                    Err(error) => self.lose(error.to_string()),
                }
                execution
            }
        }
    }

    /// The result of a cell that left no memory to report it with. It was all there is, and the
    /// interpreter goes on.
    fn out_of_memory(&mut self, mut streams: Streams, usage: Usage) -> Execution {
        let bytes = self.options.limits.memory_bytes;
        let message = format!("no room for the report of the cell in {bytes} bytes of memory");
        let line = format!("MemoryError: {message}\n");
        streams.stderr.write(line.as_bytes());
        let mut execution = self.conversation.stopped(Outcome::Raised, streams, usage);
        execution.exception =
            Some(Exception { type_name: "MemoryError".into(), message, traceback: line });
        execution
    }

    fn unsupported(&self, operation: &'static str) -> Error {
        Error::Unsupported { backend: self.shared.machine.capabilities().backend, operation }
    }
}

/// A turn whose future may be dropped.
struct Held<'a> {
    environment: &'a mut ProcessEnvironment,
    done: bool,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.environment.lose("the future of a cell was dropped in its middle".into());
        }
    }
}

/// Why a worker ended, and what helps.
fn cause(death: Death, limit: Option<Limit>) -> String {
    match (limit, death) {
        (Some(limit), Death { killed: true, .. }) => {
            format!("the cell did not yield to the {} limit within the grace", limit.name())
        }
        (_, Death { starved: true, signal: Some(SIGKILL), .. }) => {
            "the memory limit killed the interpreter; raise limits.memory_bytes".into()
        }
        (_, Death { signal: Some(signal), .. }) => {
            format!("signal {signal} killed the interpreter")
        }
        (_, Death { code, .. }) => {
            format!("the interpreter exited with {}", code.unwrap_or(0))
        }
    }
}

/// What no process can do.
fn refuse(backend: &'static str, options: &EnvironmentOptions) -> Result<()> {
    refuse_fuel(backend, &options.limits)?;
    if options.policy.clock != Clock::Real {
        return Err(Error::Unsupported { backend, operation: "a fixed clock" });
    }
    if options.policy.seed.is_some() {
        return Err(Error::Unsupported { backend, operation: "a seed" });
    }
    Ok(())
}

/// Fuel isn't counted here, so that a limit of it that somebody chose would be ignored.
fn refuse_fuel(backend: &'static str, limits: &Limits) -> Result<()> {
    if limits.fuel < Limits::default().fuel {
        return Err(Error::Unsupported { backend, operation: "limits.fuel" });
    }
    Ok(())
}

fn conversation(options: &EnvironmentOptions) -> Result<Conversation> {
    let mut seed = [0; 16];
    rand::rng().fill(&mut seed);
    Conversation::new(options, seed)
}

#[async_trait]
impl Environment for ProcessEnvironment {
    fn status(&self) -> Status {
        if self.lost.is_none() { Status::Ready } else { Status::Poisoned }
    }

    fn capabilities(&self) -> Capabilities {
        self.shared.capabilities()
    }

    fn interrupt(&self) -> Interrupt {
        self.signal.handle()
    }

    async fn execute_opts(&mut self, code: &str, options: ExecuteOptions) -> Result<Execution> {
        // One that nothing ran to be stopped by.
        self.signal.take();
        self.run_cell(code, options).await
    }

    async fn set_variable(&mut self, name: &str, value: Value) -> Result<()> {
        self.service(Request::set(name, &value)?).await.map(drop)
    }

    async fn get_variable(&mut self, name: &str) -> Result<Option<Value>> {
        let request = Request::get(name)?;
        let what = request.what.clone();
        Conversation::value_of(&what, self.service(request).await?)
    }

    async fn list_variables(&mut self) -> Result<Vec<Variable>> {
        Conversation::variables_of(self.service(Request::list()).await?)
    }

    async fn add_context(&mut self, context: Context, index: Option<u32>) -> Result<u32> {
        Conversation::index_of(&self.service(Request::context(context, index)).await?)
    }

    async fn add_history(&mut self, messages: &Json, index: Option<u32>) -> Result<u32> {
        Conversation::index_of(&self.service(Request::history(messages, index)).await?)
    }

    fn lm_usage(&self) -> UsageSummary {
        self.ledger.total()
    }

    fn register_tool(&mut self, tool: Tool) -> Result<()> {
        check_tool(&tool)?;
        self.options.tools.push(tool.clone());
        self.conversation.add_tool(tool)
    }

    async fn snapshot(&mut self) -> Result<Snapshot> {
        self.check_ready()?;
        if !self.guest.as_ref().is_some_and(|guest| guest.dill) {
            return Err(self.unsupported("snapshot: its Python has no dill"));
        }
        let message = Message::new(json!({ "op": "save" }));
        let reply = self.service(Request { what: "snapshot".into(), message }).await?;
        let unsaved = reply.header.get("lost").and_then(Json::as_array);
        let unsaved = unsaved.map(|names| {
            names.iter().filter_map(Json::as_str).map(str::to_owned).collect::<Vec<_>>()
        });
        Ok(Snapshot::new(Saved {
            backend: self.shared.machine.capabilities().backend,
            pickle: reply.body.into(),
            unsaved: unsaved.unwrap_or_default(),
            cells: self.conversation.record().0,
        }))
    }

    async fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        let saved = snapshot.data::<Saved>(self.shared.machine.capabilities().backend)?;
        if self.status() == Status::Poisoned {
            self.reset().await?;
        }
        if !self.guest.as_ref().is_some_and(|guest| guest.dill) {
            return Err(self.unsupported("restore: its Python has no dill"));
        }
        let mut message = Message::new(json!({ "op": "load" }));
        message.body = saved.pickle.to_vec();
        self.service(Request { what: "snapshot".into(), message }).await?;
        self.conversation.count_cells(saved.cells);
        Ok(())
    }

    async fn fork(&mut self) -> Result<Box<dyn Environment>> {
        let snapshot = self.snapshot().await?;
        let mut other = Self::open(&self.shared, self.options.clone()).await?;
        other.restore(&snapshot).await?;
        Ok(Box::new(other))
    }

    async fn reset(&mut self) -> Result<()> {
        // For a future that is dropped in the middle.
        let was_lost = self.lost.replace("its reset was interrupted".into()).is_some();
        if let Some(mut guest) = self.guest.take()
            && (was_lost || guest.end_worker().await.is_ok())
        {
            self.guest = Some(guest);
        }
        self.begin().await
    }

    async fn close(mut self: Box<Self>) -> Result<()> {
        match (self.guest.take(), self.dying.take()) {
            (Some(guest), _) => guest.close().await,
            (None, Some(mut life)) => life.close().await,
            (None, None) => Ok(()),
        }
    }
}

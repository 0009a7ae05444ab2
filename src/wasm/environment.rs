//! `WasmEnvironment`: the contract on a Wasm guest.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use rand::RngExt;
use serde_json::json;
use tokio::task::JoinHandle;

use super::Image;
use super::boot::{SITE, site_mount};
use super::budget::Budget;
use super::clock::VirtualClock;
use super::files::{Files, Scratch};
use super::guest::{Guest, MemoryLimit, Signal};
use super::session::{Session, Turn, TurnEnd};
use super::wasi::{self, Directories};
use crate::agent::{Conversation, Streams, check_name, check_tool, variables};
use crate::capture::Capture;
use crate::environment::{
    Capabilities, Context, Environment, EnvironmentOptions, Exception, ExecuteOptions, Execution,
    Interrupt, Outcome, Status, Tool, Variable,
};
use crate::error::{Error, Result};
use crate::image::Store;
use crate::limits::{Limit, Limits, Usage};
use crate::policy::Policy;
use crate::protocol::{Message, VariableReport, decode_value};
use crate::value::Value;

/// What a process killed by `SIGABRT` would have exited with: a trap of the guest.
const EXIT_ABORTED: i32 = 134;
/// What is kept of the output of a turn that isn't a cell: nobody sees it.
const QUIET_OUTPUT_BYTES: usize = 0;
/// Limits of turns that aren't cells, such as setting a variable: the guest's own code in `repr` and
/// `__len__` may run in them.
const SERVICE_TIME: Duration = Duration::from_secs(30);

/// One Python session in a Wasm sandbox. Made by [`Runtime::environment`](crate::Runtime::environment).
///
/// Needs a tokio runtime with time enabled. A guest that computes gives its thread up about every
/// millisecond; one that waits for an LM, a tool or a sleep holds none.
pub struct WasmEnvironment {
    state: State,
    scratch: Option<Scratch>,
    signal: Arc<Signal>,
    store: Store,
    options: EnvironmentOptions,
    /// Tools that were registered since the last turn: the session may be away, being saved.
    new_tools: Vec<Tool>,
    image: Image,
}

enum State {
    Ready(Box<Session>),
    /// A checkpoint is being taken in the background; the task gives the session back.
    Saving(JoinHandle<Result<Box<Session>>>),
    Lost(String),
}

impl std::fmt::Debug for WasmEnvironment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WasmEnvironment").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl WasmEnvironment {
    pub(crate) fn open(store: &Store, image: &Image, options: EnvironmentOptions) -> Result<Self> {
        options.limits.validate()?;
        options.policy.validate()?;
        if options.limits.memory_bytes < image.manifest().memory_bytes {
            return Err(Error::invalid(
                "limits.memory_bytes",
                format!("the image alone has {} bytes", image.manifest().memory_bytes),
            ));
        }
        let scratch = Scratch::new(&store.scratch())?;
        let signal = Arc::new(Signal::default());
        let guest = guest(store, image, &options, &scratch, Arc::clone(&signal))?;
        let session = Session::new(Arc::clone(&image.0.start), guest)?;
        Ok(Self {
            state: State::Ready(Box::new(session)),
            scratch: Some(scratch),
            signal,
            store: store.clone(),
            options,
            new_tools: Vec::new(),
            image: image.clone(),
        })
    }

    fn turn(&self) -> Turn {
        Turn::Entry(self.image.manifest().entry)
    }

    /// The session, when no checkpoint is being taken and nothing of a dropped turn is left.
    async fn session(&mut self) -> Result<&mut Session> {
        self.saved().await;
        if let State::Ready(session) = &mut self.state
            && session.guest().running
        {
            // The future of the last turn was dropped in the middle.
            self.roll_back()?;
        }
        match &mut self.state {
            State::Ready(session) => {
                for tool in self.new_tools.drain(..) {
                    session.guest_mut().conversation.add_tool(tool)?;
                }
                Ok(session)
            }
            State::Lost(reason) => Err(Error::Poisoned { reason: reason.clone() }),
            State::Saving(_) => Err(Error::Internal("a checkpoint did not end".into())),
        }
    }

    /// Waits for the checkpoint that is being taken, if any.
    async fn saved(&mut self) {
        if let State::Saving(task) = &mut self.state {
            self.state = match task.await {
                Ok(Ok(session)) => State::Ready(session),
                Ok(Err(e)) => State::Lost(format!("taking a checkpoint failed: {e}")),
                Err(e) => State::Lost(format!("taking a checkpoint failed: {e}")),
            };
        }
    }

    fn roll_back(&mut self) -> Result<()> {
        let State::Ready(session) = &mut self.state else { return Ok(()) };
        session.guest_mut().conversation.abandon();
        let result = session.roll_back();
        if let Err(error) = &result {
            self.state = State::Lost(format!("rolling back failed: {error}"));
        }
        result
    }

    /// Takes the checkpoint of the state that the last turn left, while nobody waits for it.
    fn save_in_background(&mut self) {
        let state = std::mem::replace(&mut self.state, State::Lost("a checkpoint was lost".into()));
        self.state = match state {
            State::Ready(mut session) => {
                session.guest_mut().conversation.keep();
                State::Saving(tokio::task::spawn_blocking(move || {
                    session.save()?;
                    Ok(session)
                }))
            }
            other => other,
        };
    }

    /// One turn that isn't a cell.
    async fn service(&mut self, what: &str, request: Message) -> Result<Message> {
        let memory_bytes = self.options.limits.memory_bytes;
        let limits = Limits {
            compute: SERVICE_TIME,
            wall: SERVICE_TIME,
            lm_calls: 0,
            tool_calls: 0,
            ..self.options.limits.clone()
        };
        let sent_bytes = request.body.len();
        let turn = self.turn();
        let session = self.session().await?;
        session.guest_mut().streams = streams(QUIET_OUTPUT_BYTES);
        session.guest_mut().conversation.begin(Some(request), &limits);
        let (end, _) = session.turn(turn, &limits).await;
        let guest = session.guest_mut();
        let refused = guest.refused_bytes.take();
        let unfit = || {
            Error::invalid(
                what,
                format!(
                    "it does not fit: {} bytes into a memory of {memory_bytes}, of which Python and what \
                     the session holds take a part (raise limits.memory_bytes)",
                    refused.unwrap_or(sent_bytes)
                ),
            )
        };
        let reply = match (guest.fault.take(), end) {
            (Some(fault), _) => Err(fault),
            (None, TurnEnd::Halted(_)) => {
                Err(Error::invalid(what, "it took too long; the session is as it was before"))
            }
            (None, TurnEnd::Returned) if refused.is_none() => {
                match guest.conversation.take_reply() {
                    // The agent got no memory for the request, or none to take it apart.
                    Err(Error::Protocol { .. }) if sent_bytes > 0 => Err(unfit()),
                    Err(Error::Invalid { what, .. }) if what == "MemoryError" => Err(unfit()),
                    reply => reply,
                }
            }
            (None, _) => Err(unfit()),
        };
        // After anything but an answer, what the guest was doing is not known: it goes back.
        if reply.is_ok() && !session.guest().running {
            self.save_in_background();
        } else {
            self.roll_back()?;
        }
        reply
    }

    /// The result of a cell that the host ended, and the rollback that goes with it.
    fn stopped(&mut self, end: TurnEnd, usage: Usage) -> Result<Execution> {
        let State::Ready(session) = &mut self.state else {
            return Err(Error::Internal("a cell ended without a session".into()));
        };
        let guest = session.guest_mut();
        if let Some(fault) = guest.fault.take() {
            self.roll_back()?;
            return Err(fault);
        }
        let limit = guest.budget.stopped_by();
        let (outcome, type_name, message) = match end {
            TurnEnd::Exited(code) => (
                Outcome::Exited { code },
                "SystemExit",
                format!("the interpreter exited with {code}"),
            ),
            TurnEnd::Trapped(trap) => (Outcome::Exited { code: EXIT_ABORTED }, "Trap", trap),
            _ => {
                let name = limit.map_or("?", Limit::name);
                (
                    Outcome::LimitReached,
                    "LimitReached",
                    format!("the cell did not yield to the {name} limit within the grace"),
                )
            }
        };
        let mut streams = std::mem::take(&mut guest.streams);
        let line = format!(
            "{type_name}: {message}; the session was rolled back to the state before this cell\n"
        );
        streams.stderr.write(line.as_bytes());
        let mut execution = guest.conversation.stopped(outcome, streams, usage);
        execution.limit = limit;
        execution.rolled_back = true;
        execution.exception =
            Some(Exception { type_name: type_name.into(), message, traceback: line });
        self.roll_back()?;
        Ok(execution)
    }
}

impl Drop for WasmEnvironment {
    fn drop(&mut self) {
        release(std::mem::replace(&mut self.state, State::Lost("dropped".into())));
    }
}

/// Lets another session have the instance, in the background.
fn release(state: State) {
    // Outside a runtime the instance is not worth a wait: it's simply dropped.
    let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
    match state {
        State::Ready(session) => drop(runtime.spawn_blocking(move || session.recycle())),
        State::Saving(task) => drop(runtime.spawn(async move {
            if let Ok(Ok(session)) = task.await {
                tokio::task::spawn_blocking(move || session.recycle());
            }
        })),
        State::Lost(_) => {}
    }
}

#[async_trait]
impl Environment for WasmEnvironment {
    fn status(&self) -> Status {
        match self.state {
            State::Ready(_) | State::Saving(_) => Status::Ready,
            State::Lost(_) => Status::Poisoned,
        }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            backend: "wasm",
            isolated: true,
            fuel: true,
            rollback: true,
            snapshot: false,
            deterministic: true,
        }
    }

    fn interrupt(&self) -> Interrupt {
        let signal = Arc::clone(&self.signal);
        Interrupt::new(move || signal.raise())
    }

    async fn execute_opts(&mut self, code: &str, options: ExecuteOptions) -> Result<Execution> {
        let limits = options.limits.unwrap_or_else(|| self.options.limits.clone());
        limits.validate()?;
        let turn = self.turn();
        let session = self.session().await?;
        let guest = session.guest_mut();
        guest.streams = streams(limits.output_bytes as usize);
        let request = guest.conversation.cell(code);
        guest.conversation.begin(Some(request), &limits);
        let (end, usage) = session.turn(turn, &limits).await;
        if !matches!(end, TurnEnd::Returned) {
            return self.stopped(end, usage);
        }
        let guest = session.guest_mut();
        let streams = std::mem::take(&mut guest.streams);
        let conversation = &mut guest.conversation;
        let result = conversation
            .take_reply()
            .and_then(|reply| conversation.execution(reply, streams, usage));
        if result.is_ok() {
            self.save_in_background();
        } else {
            // A guest whose agent doesn't answer as it should can't be left like that.
            self.roll_back()?;
        }
        result
    }

    async fn set_variable(&mut self, name: &str, value: Value) -> Result<()> {
        check_name("variable", name)?;
        let mut request = Message::new(json!({ "op": "set", "name": name }));
        request.put("value", &value);
        self.service(&format!("variable `{name}`"), request).await.map(drop)
    }

    async fn get_variable(&mut self, name: &str) -> Result<Option<Value>> {
        check_name("variable", name)?;
        let what = format!("variable `{name}`");
        let mut reply =
            self.service(&what, Message::new(json!({ "op": "get", "name": name }))).await?;
        if let Some(type_name) = reply.text("unrepresentable") {
            let repr = reply.text("repr").unwrap_or_default();
            let reason = format!("a {type_name} has no value outside the session: {repr}");
            return Err(Error::invalid(what, reason));
        }
        match reply.header.remove("value") {
            Some(value) => decode_value(value, &reply.body).map(Some),
            None => Ok(None),
        }
    }

    async fn list_variables(&mut self) -> Result<Vec<Variable>> {
        #[derive(serde::Deserialize)]
        struct Report {
            variables: Vec<VariableReport>,
        }
        let reply = self.service("variables", Message::new(json!({ "op": "vars" }))).await?;
        let (report, _) = reply.parse::<Report>()?;
        Ok(variables(report.variables))
    }

    async fn add_context(&mut self, context: Context, index: Option<u32>) -> Result<u32> {
        let (kind, body) = match context {
            Context::Text(body) => ("text", body),
            Context::Bytes(body) => ("bytes", body),
            Context::Json(body) => ("json", body),
        };
        let mut request = Message::new(json!({ "op": "context", "index": index, "kind": kind }));
        request.body = body;
        let reply = self.service("context", request).await?;
        let index = reply.header.get("index").and_then(serde_json::Value::as_u64);
        index
            .and_then(|index| u32::try_from(index).ok())
            .ok_or_else(|| Error::protocol("the reply to a context has no index"))
    }

    fn register_tool(&mut self, tool: Tool) -> Result<()> {
        check_tool(&tool)?;
        self.options.tools.push(tool.clone());
        self.new_tools.push(tool);
        Ok(())
    }

    async fn reset(&mut self) -> Result<()> {
        self.saved().await;
        // All that can fail comes first: a session that can't be reset stays what it was.
        let scratch = Scratch::new(&self.store.scratch())?;
        let signal = Arc::clone(&self.signal);
        let guest = guest(&self.store, &self.image, &self.options, &scratch, signal)?;
        let session = Session::new(Arc::clone(&self.image.0.start), guest)?;
        release(std::mem::replace(&mut self.state, State::Ready(Box::new(session))));
        self.scratch = Some(scratch);
        self.new_tools.clear();
        Ok(())
    }

    async fn close(mut self: Box<Self>) -> Result<()> {
        self.saved().await;
        match self.scratch.take() {
            Some(scratch) => scratch.close(),
            None => Ok(()),
        }
    }
}

fn streams(bytes: usize) -> Streams {
    Streams { stdout: Capture::new(bytes), stderr: Capture::new(bytes) }
}

/// The data of a new session's store.
fn guest(
    store: &Store,
    image: &Image,
    options: &EnvironmentOptions,
    scratch: &Scratch,
    signal: Arc<Signal>,
) -> Result<Guest> {
    let mut policy = Policy { ..options.policy.clone() };
    if image.manifest().site {
        policy.mounts.insert(0, site_mount(&store.image(&image.manifest().key).join(SITE)));
    }
    let clock = VirtualClock::new(policy.clock);
    let directories = Directories {
        stdlib: &image.0.guests.compiled.stdlib(),
        scratch: scratch.path(),
        root: &store.empty(),
    };
    let mounts: Vec<String> = policy.mounts.iter().map(|mount| mount.guest.clone()).collect();
    let limits = &options.limits;
    let mut seed = [0; 16];
    match policy.seed {
        Some(value) => seed[..8].copy_from_slice(&value.to_le_bytes()),
        None => rand::rng().fill(&mut seed),
    }
    Ok(Guest {
        wasi: wasi::context(&directories, &policy, clock.as_ref())?,
        files: Files::new(scratch.path(), limits.disk_bytes, &mounts, image.manifest().dot),
        clock,
        streams: Streams::default(),
        conversation: Conversation::new(options, seed)?,
        budget: Budget::start(limits.clone()),
        memory_limit: MemoryLimit::new(limits.memory_bytes),
        signal,
        handles: None,
        fault: None,
        refused_bytes: None,
        running: false,
    })
}

//! The contract: what every backend promises, whatever it runs on.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value as Json;

use crate::error::Result;
use crate::limits::{Limit, Limits, Usage};
use crate::lm::{LmCompletion, Prompt, UsageSummary};
use crate::snapshot::Snapshot;
use crate::value::Value;

/// One live Python session: cells go in, results come out, state stays.
///
/// Every sentence below holds on every backend:
///
/// - State made by one cell is there for the next, also when the cell later raised.
/// - A Python exception is a result ([`Outcome::Raised`]), so is `sys.exit(n)`
///   ([`Outcome::Exited`]), so is a limit ([`Outcome::LimitReached`]).
///   An [`Error`](crate::Error) means that the environment could not do its job.
/// - Output printed before an exception, a limit or a trap is kept. stdout and stderr are separate,
///   each cut at its cap, with the total counted.
/// - A limit never costs the session: first a soft stop raises inside the guest; if the guest does
///   not yield within [`Limits::grace`], a hard stop rolls the session back to the state before the
///   cell, and [`Execution::rolled_back`] says so. Likewise a cell that leaves no memory to report
///   its end with is a rolled-back `MemoryError`. A backend that can't roll back says so in its
///   [`Capabilities`] and is poisoned until `reset`.
/// - Time spent waiting for the host (LM calls, tools, sleeps) isn't compute; it is wall time.
/// - A guest can't forge messages to the host: the channel isn't its stdout.
/// - `restore(snapshot())` changes nothing that code can observe but clock and randomness. A session
///   with open files refuses the snapshot, and names them; a backend that saves variable by variable
///   leaves out what it has no form for, and names that in [`Snapshot::unsaved`].
/// - Dropping the future of any method is safe: the session rolls back or is poisoned, and the host
///   leaks nothing.
/// - What a backend can't do is [`Error::Unsupported`](crate::Error::Unsupported).
#[async_trait]
pub trait Environment: Send {
    /// Whether the environment can take a cell.
    fn status(&self) -> Status;

    /// What this backend can do.
    fn capabilities(&self) -> Capabilities;

    /// A handle that stops the running cell from elsewhere, as Ctrl-C does, or the one that waits to
    /// begin.
    fn interrupt(&self) -> Interrupt;

    /// Runs one cell.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) for options out of range,
    /// [`Error::Poisoned`](crate::Error::Poisoned) before a reset, and whatever kept the environment
    /// from doing its job. What the code did is in the [`Execution`].
    async fn execute_opts(&mut self, code: &str, options: ExecuteOptions) -> Result<Execution>;

    /// Binds a global variable of the session.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) when the name isn't an identifier or is reserved,
    /// or the value doesn't fit into the session's memory.
    async fn set_variable(&mut self, name: &str, value: Value) -> Result<()>;

    /// Reads a global variable; `None` when there is none of that name.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) when its type has no [`Value`]; the message shows
    /// its `repr`.
    async fn get_variable(&mut self, name: &str) -> Result<Option<Value>>;

    /// The session's global variables, without modules of the agent and names that begin with `_`; the
    /// first 1,000 of them. Runs no code of the cells: objects whose `__repr__` could be theirs are
    /// shown as `<Type object>`.
    ///
    /// # Errors
    ///
    /// Only for reasons of the environment's own.
    async fn list_variables(&mut self) -> Result<Vec<Variable>>;

    /// Adds a context: `context_0`, `context_1`, …; the first is also `context`. Returns its number.
    /// `index: None` takes the next one.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) when it isn't what its kind says, naming the
    /// offset, or doesn't fit into the session's memory.
    async fn add_context(&mut self, context: Context, index: Option<u32>) -> Result<u32>;

    /// Adds the messages of a conversation, a list of objects as chat models take them: `history_0`,
    /// `history_1`, …; the first is also `history`. Returns its number. `index: None` takes the next
    /// one.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) when it doesn't fit into the session's memory.
    async fn add_history(&mut self, messages: &Json, index: Option<u32>) -> Result<u32>;

    /// What the session's calls of language models cost so far, by model; also those of cells that
    /// were rolled back.
    fn lm_usage(&self) -> UsageSummary;

    /// Makes a host function callable from cells, replacing one of the same name.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) when the name isn't an identifier or is reserved.
    fn register_tool(&mut self, tool: Tool) -> Result<()>;

    /// Saves the session's state; see [`Snapshot`]. A backend of memory images saves everything that
    /// lives in its memory; one of processes saves variables, and names those that it can't.
    /// The session goes on as if nothing had been.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) naming the files that the guest has open: what the
    /// host keeps about them can't be saved.
    async fn snapshot(&mut self) -> Result<Snapshot>;

    /// Goes back, or over, to a saved state: of this session, or of another of the same image. Only
    /// the host's clock and randomness can tell; files that are open are closed, and the scratch
    /// directory is as it was saved. Works on a poisoned environment too.
    ///
    /// # Errors
    ///
    /// [`Error::Incompatible`](crate::Error::Incompatible) for a snapshot of another image or
    /// backend, [`Error::Invalid`](crate::Error::Invalid) when it doesn't fit this session's limits.
    async fn restore(&mut self, snapshot: &Snapshot) -> Result<()>;

    /// A second session in the same state, with the same options; from then on neither sees what the
    /// other does. Where a snapshot leaves variables out, so does this: [`Snapshot::unsaved`] names
    /// them.
    ///
    /// # Errors
    ///
    /// As [`snapshot`](Self::snapshot), and as opening a session.
    async fn fork(&mut self) -> Result<Box<dyn Environment>>;

    /// Throws all state away: the session is as it was when it was opened, without its contexts and
    /// variables, with its tools. Works on a poisoned environment too.
    ///
    /// # Errors
    ///
    /// Only for reasons of the environment's own.
    async fn reset(&mut self) -> Result<()>;

    /// Ends the session and gives everything back. Dropping does the same, without the report.
    ///
    /// # Errors
    ///
    /// When something could not be given back, such as the scratch directory.
    async fn close(self: Box<Self>) -> Result<()>;
}

/// Convenience over [`Environment`]; implemented for all of them, not to be implemented.
pub trait EnvironmentExt: Environment {
    /// Runs one cell with default options.
    fn execute(&mut self, code: &str) -> impl Future<Output = Result<Execution>> + Send {
        async move { self.execute_opts(code, ExecuteOptions::default()).await }
    }
}

impl<E: Environment + ?Sized> EnvironmentExt for E {}

/// Where sessions come from: an image of a [`Runtime`](crate::Runtime), for one.
#[async_trait]
pub trait Backend: Send + Sync {
    /// What its sessions can do.
    fn capabilities(&self) -> Capabilities;

    /// Whose sessions are those that are opened without a tenant, if the backend has tenants.
    fn default_tenant(&self) -> Option<crate::tenant::Tenant> {
        None
    }

    /// Opens a session.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) for options out of range,
    /// [`Error::Quota`](crate::Error::Quota) when the tenant has all its sessions, and whatever kept
    /// the backend from doing its job.
    async fn open(&self, options: EnvironmentOptions) -> Result<Box<dyn Environment>>;

    /// The same backend with sessions that begin with these contexts, which they share, if it has a
    /// cheaper way to that than adding them to each. The default has none. What that costs is on the
    /// account of the tenant of the options.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open) and [`Environment::add_context`].
    async fn with_contexts(
        &self,
        _contexts: &[(u32, Context)],
        _options: &EnvironmentOptions,
    ) -> Result<Option<Arc<dyn Backend>>> {
        Ok(None)
    }
}

/// How one cell is run.
#[derive(Debug, Clone, Default)]
pub struct ExecuteOptions {
    /// Limits for this cell instead of the environment's. `memory_bytes` and `disk_bytes` belong to
    /// the environment and are not changed by this.
    pub limits: Option<Limits>,
}

/// Whether an environment can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It takes cells.
    Ready,
    /// Its state is lost; `reset` makes it ready again.
    Poisoned,
}

/// What a backend can do, as data.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// The backend's name.
    pub backend: &'static str,
    /// Whether guest code is kept from the host.
    pub isolated: bool,
    /// Whether fuel is counted and limited, deterministically.
    pub fuel: bool,
    /// Whether a hard stop rolls the session back instead of poisoning it.
    pub rollback: bool,
    /// Whether live sessions can be saved and forked.
    pub snapshot: bool,
    /// Whether a session can be made reproducible by seed and clock.
    pub deterministic: bool,
}

impl Capabilities {
    /// A backend of this name that can do nothing of what is here.
    #[must_use]
    pub fn none(backend: &'static str) -> Self {
        Self {
            backend,
            isolated: false,
            fuel: false,
            rollback: false,
            snapshot: false,
            deterministic: false,
        }
    }
}

/// How the code of a cell ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It ran to its end.
    Completed,
    /// An exception left it: [`Execution::exception`].
    Raised,
    /// It ended the interpreter: `sys.exit`, `os._exit`, or a fatal fault of the guest (134, as a
    /// process killed by `SIGABRT`). The session goes on.
    Exited {
        /// As a process would have returned it.
        code: i32,
    },
    /// A limit stopped it: [`Execution::limit`].
    LimitReached,
}

impl Outcome {
    /// The name used in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Raised => "raised",
            Self::Exited { .. } => "exited",
            Self::LimitReached => "limit",
        }
    }
}

/// What a cell wrote to one of its streams.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    /// The first bytes, up to the cap.
    pub bytes: Vec<u8>,
    /// All that was written, in bytes.
    pub total_bytes: u64,
    /// Whether `bytes` is less than everything.
    pub truncated: bool,
}

impl Output {
    /// The kept bytes as text; what isn't UTF-8 becomes U+FFFD.
    #[must_use]
    pub fn text(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.bytes)
    }
}

/// An exception that left a cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exception {
    /// The class's own name, without its module.
    pub type_name: String,
    /// `str()` of the exception.
    pub message: String,
    /// The traceback, from the cell's first frame on.
    pub traceback: String,
}

/// A variable of the session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variable {
    /// Its name, cut at 1,000 characters with `...` after them.
    pub name: String,
    /// The name of its type, cut likewise.
    pub type_name: String,
    /// Its `repr`, cut at 500 characters with `...` after them.
    pub repr: String,
    /// Whether the name is new in this cell (in a cell's report).
    pub new: bool,
}

/// A successful LM call of a cell, in call order.
#[derive(Debug, Clone, PartialEq)]
pub struct LmCall {
    /// What was asked.
    pub prompt: Prompt,
    /// What came back.
    pub completion: LmCompletion,
}

/// What a cell did.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Execution {
    /// How the code ended.
    pub outcome: Outcome,
    /// The limit that stopped the cell, or whose exception the cell caught before it ended.
    pub limit: Option<Limit>,
    /// Whether the session went back to the state before the cell.
    pub rolled_back: bool,
    /// What it printed. In the `openenv` profile also the last value.
    pub stdout: Output,
    /// What it wrote to stderr; the traceback of an exception is at the end.
    pub stderr: Output,
    /// `repr` of the last expression, when it isn't `None` (JSON in the `openenv` profile).
    pub value: Option<String>,
    /// The exception that left the cell.
    pub exception: Option<Exception>,
    /// Variables that are new, or bound anew.
    pub variables: Vec<Variable>,
    /// The final answer that this cell set, by the profile's rules. At most 64 MiB of UTF-8: a longer
    /// one is cut, and stderr says so.
    pub final_answer: Option<String>,
    /// Successful LM calls.
    pub lm_calls: Vec<LmCall>,
    /// What it spent.
    pub usage: Usage,
}

impl Execution {
    /// A cell that ended like this, without anything else.
    #[must_use]
    pub fn new(outcome: Outcome) -> Self {
        Self {
            outcome,
            limit: None,
            rolled_back: false,
            stdout: Output::default(),
            stderr: Output::default(),
            value: None,
            exception: None,
            variables: Vec::new(),
            final_answer: None,
            lm_calls: Vec::new(),
            usage: Usage::default(),
        }
    }
}

/// A context on its way into a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Context {
    /// A text as UTF-8 (lone surrogates as in `surrogatepass`); nothing in it is translated.
    Text(Vec<u8>),
    /// Raw bytes: a `bytes` object.
    Bytes(Vec<u8>),
    /// JSON text, which becomes the objects that it describes.
    Json(Vec<u8>),
}

/// Stops the running cell of one environment. Cheap to clone, may be kept after the environment is
/// gone.
#[derive(Clone)]
pub struct Interrupt(Arc<dyn Fn() + Send + Sync>);

impl Interrupt {
    /// The handle of a backend: `stop` stops the cell. It may be called at any time, from any thread.
    pub fn new(stop: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(stop))
    }

    /// Raises `KeyboardInterrupt` in the running cell; a cell that doesn't yield within the grace
    /// is rolled back. One that waits to begin, in the queue of its tenant for one, ends with
    /// `KeyboardInterrupt` without having run; it counts as waiting once the future of
    /// [`execute_opts`](Environment::execute_opts) was polled. Does nothing when there is no cell.
    pub fn interrupt(&self) {
        (self.0)();
    }
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Interrupt")
    }
}

/// What a guest passed to a host tool.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ToolArgs {
    /// Positional arguments.
    pub args: Vec<Value>,
    /// Keyword arguments, in the order of their names.
    pub kwargs: Vec<(String, Value)>,
}

/// An exception that a tool raises in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolError {
    /// The name of a builtin exception class; anything else becomes `RuntimeError`.
    pub type_name: String,
    /// Its message.
    pub message: String,
}

impl ToolError {
    /// A `RuntimeError`.
    pub fn new(message: impl Into<String>) -> Self {
        Self { type_name: "RuntimeError".into(), message: message.into() }
    }

    /// An exception of the builtin class `type_name`.
    pub fn of_type(type_name: impl Into<String>, message: impl Into<String>) -> Self {
        Self { type_name: type_name.into(), message: message.into() }
    }
}

/// What a tool answers.
pub type ToolResult = Result<Value, ToolError>;
type ToolFuture = Pin<Box<dyn Future<Output = ToolResult> + Send>>;

/// A host function that cells can call by name.
///
/// ```
/// use kaa::{Tool, ToolError, Value};
///
/// let add = Tool::new("add", |call| match (&call.args[..], &call.kwargs[..]) {
///     ([Value::Int(a), Value::Int(b)], []) => Ok(Value::Int(a + b)),
///     _ => Err(ToolError::of_type("TypeError", "add(a, b) takes two integers")),
/// });
/// assert_eq!(add.name(), "add");
/// ```
#[derive(Clone)]
pub struct Tool {
    name: String,
    call: Arc<dyn Fn(ToolArgs) -> ToolFuture + Send + Sync>,
}

impl Tool {
    /// A tool that answers at once. It must not block: it runs on the environment's thread.
    pub fn new(
        name: impl Into<String>,
        call: impl Fn(ToolArgs) -> ToolResult + Send + Sync + 'static,
    ) -> Self {
        Self::new_async(name, move |args| std::future::ready(call(args)))
    }

    /// A tool that may wait; no thread is held meanwhile. Its future is dropped when the cell stops.
    pub fn new_async<F>(
        name: impl Into<String>,
        call: impl Fn(ToolArgs) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = ToolResult> + Send + 'static,
    {
        Self { name: name.into(), call: Arc::new(move |args| Box::pin(call(args))) }
    }

    /// The name that cells call.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Calls it, as a backend does for a cell. Dropping the future gives the call up.
    pub fn call(
        &self,
        args: ToolArgs,
    ) -> Pin<Box<dyn Future<Output = ToolResult> + Send + 'static>> {
        (self.call)(args)
    }
}

impl fmt::Debug for Tool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tool").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The dialect of Python helpers that cells see, and how their results are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum Profile {
    /// RLM 0.1.3: `context`, `llm_query`, `answer`; a bare expression prints nothing.
    #[default]
    Rlm,
    /// OpenEnv's `repl_env`: the last value is echoed as JSON, streams are cut at 8,192 characters,
    /// LM errors raise, imports follow a list.
    OpenEnv,
}

impl Profile {
    /// The name used on the wire and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Rlm => "rlm",
            Self::OpenEnv => "openenv",
        }
    }
}

/// How an environment is set up, whatever the backend.
#[derive(Clone, Default)]
pub struct EnvironmentOptions {
    /// What the guest may spend.
    pub limits: Limits,
    /// What the guest may reach.
    pub policy: crate::policy::Policy,
    /// The dialect.
    pub profile: Profile,
    /// Characters kept of each stream before the profile's suffix; `None` is the profile's own:
    /// 8,192 in `openenv`, no such cut in `rlm`.
    pub output_chars: Option<usize>,
    /// Who answers `llm_query`; without one it answers `Error: No LM handler configured`.
    pub lm: Option<Arc<dyn crate::lm::LmHandler>>,
    /// Depth of the RLM whose cells run here; LM calls carry this plus one. Default 0: the root.
    /// Above 0 the session is a child's, whose cells run while a cell of the same tenant waits for
    /// their answer: they take none of [`Quotas::cells`](crate::Quotas::cells), and don't wait in
    /// the tenant's queue.
    pub depth: u16,
    /// Host functions.
    pub tools: Vec<Tool>,
    /// Whose session it is, made by [`Runtime::tenant`](crate::Runtime::tenant). Default: the
    /// runtime's default tenant. Sessions of strangers should be of tenants of their own: between the
    /// sessions of one, speed may tell which pages of memory another has touched.
    pub tenant: Option<crate::tenant::Tenant>,
}

impl fmt::Debug for EnvironmentOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EnvironmentOptions")
            .field("limits", &self.limits)
            .field("policy", &self.policy)
            .field("profile", &self.profile)
            .field("depth", &self.depth)
            .field("lm", &self.lm.is_some())
            .field("tools", &self.tools)
            .field("tenant", &self.tenant)
            .finish_non_exhaustive()
    }
}

//! The RLM loop: a model answers a question about a context that it can't see whole, by writing code
//! that looks at it.
//!
//! It runs over any [`Backend`] and any [`LmHandler`], and follows `rlms` 0.1.3: messages, fences,
//! truncation and answers are what models know from there.
//!
//! - `run.rs` is the loop, `session.rs` what it works in, `scope.rs` what a run shares with its children;
//! - `children.rs` answers the calls of cells;
//! - `prompt.rs`, `response.rs`, `observation.rs` are what is said;
//! - `trajectory.rs` is the log.

mod children;
mod ending;
mod events;
mod observation;
mod prompt;
mod response;
mod run;
mod scope;
mod session;
mod tools;
mod trajectory;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::watch;

pub use self::ending::{Ending, RlmCompletion, RlmError, RlmStop};
pub use self::events::{RlmEvent, RlmObserver, RlmProgress};
pub use self::session::RlmSession;
pub use self::tools::RlmTool;
use crate::environment::{Backend, Context, EnvironmentOptions};
use crate::error::{Error, Result};
use crate::lm::{BudgetLimits, Ledger, LmHandler};

/// Children that a run may begin when the options don't say.
const CHILDREN_DEFAULT: u32 = 256;

/// How a model says what its answer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dialect {
    /// The dict `answer`, as in rlms 0.1.2 and later.
    Answer,
    /// `FINAL(...)` and `FINAL_VAR(name)` in the text, as in rlms up to 0.1.1.
    Final,
    /// The model is told of `answer`; `FINAL` and `FINAL_VAR` outside of fences count too.
    #[default]
    Both,
}

/// When a conversation is replaced by a summary.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Compaction {
    /// Tokens that the root model can take.
    pub context_tokens: u64,
    /// The part of them from which on the conversation is too long, above 0 and at most 1.
    pub threshold: f64,
}

impl Default for Compaction {
    fn default() -> Self {
        Self { context_tokens: 128_000, threshold: 0.85 }
    }
}

impl Compaction {
    fn threshold_tokens(&self) -> u64 {
        (self.context_tokens as f64 * self.threshold) as u64
    }
}

/// How a loop runs.
///
/// ```
/// use kaa::{RlmOptions, lm::BudgetLimits};
/// use std::time::Duration;
///
/// let options = RlmOptions {
///     model: Some("big".into()),
///     max_depth: 2,
///     budget: BudgetLimits { cost: 1.0, wall: Duration::from_secs(300), ..Default::default() },
///     ..RlmOptions::default()
/// };
/// ```
#[derive(Clone)]
pub struct RlmOptions {
    /// Limits, policy, profile and tenant of the sessions. Its handler and depth are the loop's own.
    pub environment: EnvironmentOptions,
    /// The model of the loop's own calls; without one, the handler's default for their depth (0 for
    /// the root). A child that was asked for by a model's name has that.
    pub model: Option<String>,
    /// Levels of RLMs. Default 1: the root alone; `rlm_query` is a plain call then. At least 1.
    pub max_depth: u16,
    /// Turns of each RLM. Default 30, at least 1. After them comes one call that asks for an answer.
    /// Of a response the first 64 blocks are run.
    pub max_iterations: u32,
    /// What a run may spend, its children included. RLM's `max_budget` is `cost`, `max_timeout` is
    /// `wall`, `max_tokens` is `tokens`. When one is used up, a running cell is interrupted too.
    pub budget: BudgetLimits,
    /// Turns in a row with something on stderr after which a run ends. Default 10, at least 1.
    pub max_errors: u32,
    /// Children of one `rlm_query_batched` that run at once. Default 4, at least 1.
    pub max_concurrent_subcalls: usize,
    /// Children in all, on all levels. Default 256.
    pub max_children: u32,
    /// Whether children see the root's context, as `context_1`. Where the backend can, their sessions
    /// are made from a template that holds it, so that it costs nothing. Default no, as in RLM.
    pub share_context: bool,
    /// Characters of a block's output that the model sees. Default 20,000.
    pub output_chars: usize,
    /// How the model says what its answer is.
    pub dialect: Dialect,
    /// A system prompt instead of Kaa's; `{tools}` in it becomes the list of tools.
    pub system_prompt: Option<String>,
    /// Whether Kaa's system prompt has its advice on how to work. Default yes.
    pub orchestrator: bool,
    /// A message after the one that says what the context is; only for the root.
    pub prologue: Option<String>,
    /// Functions and data for the root's cells.
    pub tools: Vec<RlmTool>,
    /// Those for children; `None`: the same.
    pub sub_tools: Option<Vec<RlmTool>>,
    /// Code that is run in each session after its context is there.
    pub setup: Option<String>,
    /// When a conversation is replaced by a summary. Default never.
    pub compaction: Option<Compaction>,
    /// Directory for trajectories of root runs, a file each; see [`RlmCompletion::log`].
    pub log_dir: Option<PathBuf>,
    /// Whether the completion has its trajectory in it.
    pub record: bool,
    /// Who watches.
    pub observer: Option<Arc<dyn RlmObserver>>,
}

impl Default for RlmOptions {
    fn default() -> Self {
        Self {
            environment: EnvironmentOptions::default(),
            model: None,
            max_depth: 1,
            max_iterations: 30,
            budget: BudgetLimits::default(),
            max_errors: 10,
            max_concurrent_subcalls: 4,
            max_children: CHILDREN_DEFAULT,
            share_context: false,
            output_chars: 20_000,
            dialect: Dialect::default(),
            system_prompt: None,
            orchestrator: true,
            prologue: None,
            tools: Vec::new(),
            sub_tools: None,
            setup: None,
            compaction: None,
            log_dir: None,
            record: false,
            observer: None,
        }
    }
}

impl fmt::Debug for RlmOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RlmOptions")
            .field("environment", &self.environment)
            .field("model", &self.model)
            .field("max_depth", &self.max_depth)
            .field("max_iterations", &self.max_iterations)
            .field("budget", &self.budget)
            .field("dialect", &self.dialect)
            .field("tools", &self.tools)
            .field("log_dir", &self.log_dir)
            .finish_non_exhaustive()
    }
}

impl RlmOptions {
    /// Checks every field.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] names the first field that can't be used, and says what could.
    pub fn validate(&self) -> Result<()> {
        let at_least_1 = |name: &str, value: u64| match value {
            0 => Err(Error::invalid(name, "must be at least 1")),
            _ => Ok(()),
        };
        at_least_1("max_depth", self.max_depth.into())?;
        at_least_1("max_iterations", self.max_iterations.into())?;
        at_least_1("max_errors", self.max_errors.into())?;
        at_least_1("max_concurrent_subcalls", self.max_concurrent_subcalls as u64)?;
        if self.compaction.is_some_and(|compaction| compaction.context_tokens < 1_000) {
            return Err(Error::invalid("compaction.context_tokens", "must be at least 1000"));
        }
        if let Some(compaction) = self.compaction
            && !(compaction.threshold > 0.0 && compaction.threshold <= 1.0)
        {
            let reason = format!("must be above 0 and at most 1, not {}", compaction.threshold);
            return Err(Error::invalid("compaction.threshold", reason));
        }
        self.budget.validate()?;
        self.environment.limits.validate()?;
        self.environment.policy.validate()?;
        tools::check(&self.tools)?;
        self.sub_tools.as_deref().map_or(Ok(()), tools::check)
    }
}

/// What all runs of a loop share.
struct Inner {
    backend: Arc<dyn Backend>,
    lm: Arc<dyn LmHandler>,
    options: RlmOptions,
    /// How often `cancel` was called.
    cancels: watch::Sender<u64>,
}

/// A Recursive Language Model: a language model with a session in which its context lies.
///
/// Cheap to clone; runs are independent of each other.
///
/// ```no_run
/// use std::sync::Arc;
/// use kaa::lm::{LmError, ScriptedHandler};
/// use kaa::{Context, Rlm, RlmOptions, Runtime, Store, WasmBackend};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let runtime = Arc::new(Runtime::open(Store::open("/var/lib/my-app/kaa")?)?);
/// let image = runtime.image("base", &|_| {})?;
/// // In place of a model, a script that counts.
/// let lm = ScriptedHandler::from_fn(|_| {
///     let code = "answer['content'] = context.count('a'); answer['ready'] = True";
///     Ok::<_, LmError>(format!("I count.\n```repl\n{code}\n```"))
/// });
/// let backend = WasmBackend::new(runtime, image);
/// let rlm = Rlm::new(Arc::new(backend), Arc::new(lm), RlmOptions::default())?;
/// let context = Context::Text(b"banana".to_vec());
/// assert_eq!(rlm.complete(context, Some("How many a's?")).await?.response, "3");
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Rlm(Arc<Inner>);

impl Rlm {
    /// A loop over sessions of `backend` and the models of `lm`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for options that can't be used, as [`RlmOptions::validate`].
    pub fn new(
        backend: Arc<dyn Backend>,
        lm: Arc<dyn LmHandler>,
        options: RlmOptions,
    ) -> Result<Self> {
        options.validate()?;
        Ok(Self(Arc::new(Inner { backend, lm, options, cancels: watch::Sender::new(0) })))
    }

    /// Answers a question about a context, in a session that ends with it. Without a question the
    /// model takes its task from the context.
    ///
    /// Dropping the future ends the run: its session, its children and their calls.
    ///
    /// # Errors
    ///
    /// [`RlmError`] says why there is no answer, with the last thing that the model said.
    pub async fn complete(
        &self,
        context: Context,
        question: Option<&str>,
    ) -> Result<RlmCompletion, RlmError> {
        let scope = session::root_scope(&self.0, &context)?;
        let mut session = self.session().await?;
        let result = session.answer(context, question, scope, Ledger::default(), false).await;
        // The answer is there; what can't be given back goes with the session.
        let _ = session.close().await;
        result
    }

    /// A session for several questions.
    ///
    /// # Errors
    ///
    /// [`RlmStop::Environment`] when it can't be opened, or a tool can't be defined in it.
    pub async fn session(&self) -> Result<RlmSession, RlmError> {
        RlmSession::open(Arc::clone(&self.0), 0, None, None).await.map_err(RlmError::from)
    }

    /// Ends all runs of this loop that are under way: they stop their cells, and return
    /// [`RlmStop::Cancelled`] with what they have.
    pub fn cancel(&self) {
        self.0.cancels.send_modify(|count| *count += 1);
    }
}

impl fmt::Debug for Rlm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rlm").field("options", &self.0.options).finish_non_exhaustive()
    }
}

//! A session that a loop works in: for one run, or for several of a conversation.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value as Json, json};

use super::children::{CellCalls, Link};
use super::ending::{RlmCompletion, RlmError, RlmStop};
use super::run::Run;
use super::scope::Scope;
use super::tools::{RlmTool, run_setup};
use super::{Inner, RlmOptions};
use crate::environment::{Context, Environment, EnvironmentOptions, Tool};
use crate::error::Result;
use crate::lm::Ledger;

/// What makes `answer` as it was before a run.
const FRESH_ANSWER: &str = "answer = {\"content\": \"\", \"ready\": False}";

/// A conversation: several questions to one session, whose variables stay.
///
/// The context of the second question is `context_1`, and so on; the messages of the first run are
/// `history_0` (and `history`). Made by [`Rlm::session`](crate::Rlm::session).
pub struct RlmSession {
    pub(super) rlm: Arc<Inner>,
    pub(super) environment: Box<dyn Environment>,
    link: Arc<Mutex<Option<Link>>>,
    pub(super) depth: u16,
    /// The model that a child was asked for.
    pub(super) model: Option<String>,
    pub(super) contexts: u32,
    pub(super) histories: u32,
    /// The conversation as `history` has it in compaction mode.
    pub(super) compacted: Vec<Json>,
    begun: bool,
}

impl fmt::Debug for RlmSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RlmSession")
            .field("depth", &self.depth)
            .field("contexts", &self.contexts)
            .field("histories", &self.histories)
            .finish_non_exhaustive()
    }
}

/// Takes the run off its session when it ends, however it ends.
struct Linked(Arc<Mutex<Option<Link>>>);

impl Drop for Linked {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl RlmSession {
    /// A session for an RLM of this level; a child's begins with what it shares with its scope.
    pub(super) async fn open(
        rlm: Arc<Inner>,
        depth: u16,
        model: Option<String>,
        parent: Option<&Arc<Scope>>,
    ) -> Result<Self, RlmStop> {
        let link = Arc::new(Mutex::new(None));
        let calls = CellCalls { rlm: Arc::clone(&rlm), depth, link: Arc::clone(&link) };
        let tools = tools(&rlm.options, depth);
        let mut options = EnvironmentOptions {
            lm: Some(Arc::new(calls)),
            depth,
            ..rlm.options.environment.clone()
        };
        options.tools.extend(tools.iter().filter_map(RlmTool::as_host).map(Tool::clone));
        let (backend, shared) = match parent {
            Some(scope) => scope.child_backend().await?,
            None => (Arc::clone(&rlm.backend), Vec::new()),
        };
        let mut environment = backend.open(options).await?;
        let filled = async {
            for tool in tools {
                tool.define(&mut *environment).await?;
            }
            for (index, context) in shared {
                environment.add_context(context, Some(index)).await?;
            }
            Ok::<_, RlmStop>(())
        };
        if let Err(reason) = filled.await {
            // Why there is no session is what has to be known.
            let _ = environment.close().await;
            return Err(reason);
        }
        let contexts = parent.map_or(0, |scope| scope.shared_contexts());
        Ok(Self {
            rlm,
            environment,
            link,
            depth,
            model,
            contexts,
            histories: 0,
            compacted: Vec::new(),
            begun: false,
        })
    }

    /// Answers a question about a context, as [`Rlm::complete`](crate::Rlm::complete), in this
    /// session. The budget is a new one for each question.
    ///
    /// # Errors
    ///
    /// As [`Rlm::complete`](crate::Rlm::complete). The session can be used again, also after the
    /// future was dropped.
    pub async fn complete(
        &mut self,
        context: Context,
        question: Option<&str>,
    ) -> Result<RlmCompletion, RlmError> {
        let scope = root_scope(&self.rlm, &context)?;
        self.answer(context, question, scope, Ledger::default(), true).await
    }

    /// The session itself.
    pub fn environment(&mut self) -> &mut dyn Environment {
        &mut *self.environment
    }

    /// Ends the session.
    ///
    /// # Errors
    ///
    /// As [`Environment::close`].
    pub async fn close(self) -> Result<()> {
        self.environment.close().await
    }

    /// One run. A session that is kept also keeps its messages.
    pub(super) async fn answer(
        &mut self,
        context: Context,
        question: Option<&str>,
        scope: Arc<Scope>,
        ledger: Ledger,
        kept: bool,
    ) -> Result<RlmCompletion, RlmError> {
        let link = Link { scope: Arc::clone(&scope), ledger: ledger.clone() };
        *self.link.lock().unwrap_or_else(PoisonError::into_inner) = Some(link);
        let _linked = Linked(Arc::clone(&self.link));
        // On the heap: a child's run is part of its parent's.
        Box::pin(Run::new(self, scope, ledger).complete(context, question, kept)).await
    }

    /// Makes the session ready for a run about this context.
    pub(super) async fn prepare(&mut self, context: Context) -> Result<(), RlmStop> {
        let options = &self.rlm.options;
        if self.begun {
            run_setup(&mut *self.environment, FRESH_ANSWER, "answer").await?;
        } else if options.compaction.is_some() {
            self.environment.add_history(&json!([]), Some(0)).await?;
        }
        // A child's own context is the first one, whatever it shares.
        let index = if self.begun { None } else { Some(0) };
        let index = self.environment.add_context(context, index).await?;
        self.contexts = self.contexts.max(index.saturating_add(1));
        if !self.begun
            && let Some(code) = &options.setup
        {
            run_setup(&mut *self.environment, code, "the setup code").await?;
        }
        self.begun = true;
        Ok(())
    }

    /// Adds to what `history` shows in compaction mode.
    pub(super) async fn append_history(&mut self, entry: Json) -> Result<(), RlmStop> {
        self.compacted.push(entry);
        let history = Json::Array(self.compacted.clone());
        self.environment.add_history(&history, Some(0)).await?;
        Ok(())
    }

    /// Keeps the messages of a run.
    pub(super) async fn keep_history(&mut self, messages: &[Json]) -> Result<(), RlmStop> {
        // In compaction mode the first one is the running conversation.
        let first = u32::from(self.rlm.options.compaction.is_some());
        let index = first + self.histories;
        self.environment.add_history(&Json::Array(messages.to_vec()), Some(index)).await?;
        self.histories += 1;
        Ok(())
    }
}

/// The scope of a root run. Its context is shared only if that's asked for.
pub(super) fn root_scope(rlm: &Arc<Inner>, context: &Context) -> Result<Arc<Scope>, RlmStop> {
    let shared = rlm.options.share_context.then(|| context.clone());
    Ok(Arc::new(Scope::new(rlm, shared)?))
}

/// The tools of a level.
pub(super) fn tools(options: &RlmOptions, depth: u16) -> &[RlmTool] {
    match &options.sub_tools {
        Some(tools) if depth > 0 => tools,
        _ => &options.tools,
    }
}

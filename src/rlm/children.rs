//! Who answers the calls of a run's cells: the language model, or a child with a session of its own.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use async_trait::async_trait;

use super::scope::Scope;
use super::session::RlmSession;
use super::{Inner, RlmEvent, RlmStop};
use crate::environment::Context;
use crate::lm::{
    Ledger, LmCompletion, LmError, LmHandler, LmKind, LmRequest, Prompt, at_once, fan_out, usage_of,
};

/// Characters of a prompt that observers are shown, as in RLM.
const PREVIEW_CHARS: usize = 80;
/// What a call outside of a run gets: between the completions of a session that is kept.
const NO_RUN: &str = "No LM handler configured";

/// The run that a session works for at the moment.
#[derive(Clone)]
pub(super) struct Link {
    pub(super) scope: Arc<Scope>,
    /// What the run's calls cost, and those of its children.
    pub(super) ledger: Ledger,
}

/// The handler of a session's cells.
pub(super) struct CellCalls {
    pub(super) rlm: Arc<Inner>,
    /// Level of the RLM whose cells these are.
    pub(super) depth: u16,
    pub(super) link: Arc<Mutex<Option<Link>>>,
}

impl CellCalls {
    fn link(&self) -> Result<Link, LmError> {
        let link = self.link.lock().unwrap_or_else(PoisonError::into_inner).clone();
        link.ok_or_else(|| LmError::new(NO_RUN))
    }

    /// RLM knows recursion only where it's allowed to be deeper than one level; there the deepest
    /// level is worded differently.
    fn recursion(&self) -> Recursion {
        let max_depth = self.rlm.options.max_depth;
        match self.depth + 1 < max_depth {
            true => Recursion::Children,
            false if max_depth > 1 => Recursion::Deepest,
            false => Recursion::None,
        }
    }

    async fn child(&self, link: &Link, request: &LmRequest) -> Result<LmCompletion, LmError> {
        let scope = &link.scope;
        if let Some(exhausted) = scope.budget.exhausted() {
            return Err(exhausted.into());
        }
        if !scope.may_begin_child() {
            return Err(LmError::new("max_children_total exceeded"));
        }
        let depth = self.depth + 1;
        let preview: String = request.prompt.to_text().chars().take(PREVIEW_CHARS).collect();
        let model = request.model.as_deref();
        scope.report(RlmEvent::ChildBegan { depth, model, prompt: &preview });
        let start = Instant::now();
        let result = self.run_child(link, request, depth).await;
        let error = result.as_ref().err().map(|error| error.message.as_str());
        scope.report(RlmEvent::ChildEnded { depth, elapsed: start.elapsed(), error });
        result
    }

    async fn run_child(
        &self,
        link: &Link,
        request: &LmRequest,
        depth: u16,
    ) -> Result<LmCompletion, LmError> {
        let failed = |e: RlmStop| match e {
            e @ (RlmStop::Budget { .. } | RlmStop::Limit(_)) => {
                LmError::new(format!("Child RLM budget exceeded - {e}"))
            }
            e => LmError::new(format!("Child RLM completion failed - {e}")),
        };
        let context = match &request.prompt {
            Prompt::Text(text) => Context::Text(text.as_bytes().to_vec()),
            Prompt::Messages(json) => Context::Json(json.to_string().into_bytes()),
        };
        let model = request.model.clone();
        let mut session = RlmSession::open(Arc::clone(&self.rlm), depth, model, Some(&link.scope))
            .await
            .map_err(failed)?;
        let ledger = link.ledger.part();
        let result = session.answer(context, None, Arc::clone(&link.scope), ledger, false).await;
        // The answer is there; what can't be given back goes with the session.
        let _ = session.close().await;
        match result {
            Ok(completion) => Ok(LmCompletion {
                model: completion.root_model,
                response: completion.response,
                usage: completion.usage.into_models(),
                execution_time: completion.execution_time,
                metadata: completion.metadata,
            }),
            Err(error) => Err(failed(error.reason).with_usage(error.usage.into_models())),
        }
    }
}

/// What `rlm_query` does at a level.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Recursion {
    Children,
    /// A plain call, since a child would be too deep.
    Deepest,
    /// A plain call, since there are no children at all.
    None,
}

/// Tells observers that calls are in flight, until it's dropped.
struct InFlight<'a> {
    scope: &'a Scope,
    depth: u16,
    count: usize,
}

impl<'a> InFlight<'a> {
    fn begin(scope: &'a Scope, depth: u16, count: usize) -> Self {
        scope.report(RlmEvent::CallsBegan { depth, count });
        Self { scope, depth, count }
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        let (depth, count) = (self.depth, self.count);
        self.scope.report(RlmEvent::CallsEnded { depth, count });
    }
}

#[async_trait]
impl LmHandler for CellCalls {
    fn model_name(&self, depth: i32) -> Option<&str> {
        self.rlm.lm.model_name(depth)
    }

    fn nests(&self, kind: LmKind) -> bool {
        kind == LmKind::Rlm && self.recursion() == Recursion::Children
    }

    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        let link = self.link()?;
        if self.nests(request.kind) {
            return self.child(&link, request).await;
        }
        let in_flight = InFlight::begin(&link.scope, self.depth, 1);
        let result = link.scope.lm.complete(request).await;
        drop(in_flight);
        link.ledger.add(usage_of(&result));
        let deepest = request.kind == LmKind::Rlm && self.recursion() == Recursion::Deepest;
        result.map_err(|e| match deepest {
            true => LmError { message: format!("LM query failed at max depth - {e}"), ..e },
            false => e,
        })
    }

    /// Children run a few at once, and failures of theirs are worded as such.
    fn batches(&self, kind: LmKind) -> bool {
        kind == LmKind::Rlm && self.recursion() != Recursion::None
    }

    async fn complete_batch(
        &self,
        requests: &[LmRequest],
        concurrency: usize,
    ) -> Vec<Result<LmCompletion, LmError>> {
        if !requests.iter().any(|request| self.batches(request.kind)) {
            return fan_out(self, requests, concurrency).await;
        }
        let most = match self.recursion() {
            Recursion::Children => self.rlm.options.max_concurrent_subcalls.min(concurrency),
            _ => concurrency,
        };
        at_once(requests.iter().map(|request| self.complete(request)).collect(), most).await
    }
}

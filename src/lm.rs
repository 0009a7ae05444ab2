//! Language model calls: the handler that the host gives to an environment.
//!
//! A guest calls `llm_query`; its environment turns that into an [`LmRequest`] and asks the
//! [`LmHandler`]. Budgets and the wording of errors are the environment's affair, so that every
//! backend behaves alike; a handler only answers.

mod config;
mod router;
mod script;
mod socket;
mod upstream;
mod usage;

use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::{self, StreamExt};
use serde_json::Value as Json;

pub use self::config::{HttpModel, KeySource, ModelConfig, ModelSource, ModelsConfig};
pub use self::router::{ModelRouter, ModelRouterBuilder};
pub use self::script::ScriptedHandler;
pub use self::socket::SocketHandler;
pub use self::upstream::{
    AnthropicHandler, HttpProxy, OpenAiHandler, Price, Retries, Secret, UpstreamOptions,
};
pub(crate) use self::usage::Ledger;
pub use self::usage::{ModelUsage, UsageSummary};

/// What the guest asked.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// A plain text.
    Text(String),
    /// A chat: a message object or a list of them, as the guest built it.
    Messages(Json),
}

impl Prompt {
    /// The text that scripted handlers match and logs show: a chat as JSON.
    #[must_use]
    pub fn to_text(&self) -> std::borrow::Cow<'_, str> {
        match self {
            Self::Text(text) => text.into(),
            Self::Messages(json) => json.to_string().into(),
        }
    }
}

/// Whether the guest asked for a plain completion or for a child RLM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LmKind {
    /// `llm_query`, `llm_query_batched`: one completion.
    Llm,
    /// `rlm_query`, `rlm_query_batched`: a child that may recurse. A handler without children
    /// answers with a plain completion, as RLM does.
    Rlm,
}

/// One call of a language model.
#[derive(Debug, Clone, PartialEq)]
pub struct LmRequest {
    /// Plain or recursive.
    pub kind: LmKind,
    /// What is asked.
    pub prompt: Prompt,
    /// The model that the guest named, if any.
    pub model: Option<String>,
    /// Recursion level of the environment; calls from the root's cells carry 1.
    pub depth: i32,
}

/// A model's answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LmCompletion {
    /// The model that answered.
    pub model: String,
    /// Its text.
    pub response: String,
    /// What it cost, one entry per model that took part.
    pub usage: Vec<ModelUsage>,
    /// How long the handler took.
    pub execution_time: Duration,
    /// What a child RLM did, as RLM logs it.
    pub metadata: Option<Json>,
    /// Whether sessions of their own took part: they have booked their calls with their tenants.
    pub nested: bool,
}

/// Why a call got no answer. The guest sees `Error: {message}` (RLM's convention: LM errors are
/// strings, not exceptions).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct LmError {
    /// What went wrong, without the leading `Error: `.
    pub message: String,
}

impl LmError {
    /// An error with this message.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into() }
    }
}

/// Answers the language model calls of environments.
///
/// One handler may serve many environments at once. Dropping the future of a call cancels it;
/// a handler must not leave work running behind.
#[async_trait]
pub trait LmHandler: Send + Sync {
    /// Answers one request.
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError>;

    /// Answers a batch: as many results as requests, in their order; one failure fills only its
    /// own slot. At most `concurrency` requests are under way at once.
    ///
    /// The default fans out over [`complete`](Self::complete) and words failures as RLM does in a
    /// batch: `llm() call failed - {message}`.
    async fn complete_batch(
        &self,
        requests: &[LmRequest],
        concurrency: usize,
    ) -> Vec<Result<LmCompletion, LmError>> {
        let calls = requests.iter().map(|one| async { self.complete(one).await.map_err(in_batch) });
        let calls: Vec<_> = calls.collect();
        stream::iter(calls).buffered(concurrency.max(1)).collect().await
    }
}

/// The wording of a failure in a batch.
fn in_batch(error: LmError) -> LmError {
    LmError::new(format!("llm() call failed - {error}"))
}

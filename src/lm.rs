//! Language model calls: the handler that the host gives to an environment.
//!
//! A guest calls `llm_query`; its environment turns that into an [`LmRequest`] and asks the
//! [`LmHandler`]. Budgets and the wording of errors are the environment's affair, so that every
//! backend behaves alike; a handler only answers.

mod budget;
mod config;
mod router;
mod script;
mod server;
mod socket;
mod token;
mod upstream;
mod usage;
mod wire;

use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::{self, StreamExt};
use serde_json::Value as Json;

pub use self::budget::{Budget, BudgetLimits, BudgetPart, Exhausted, Spent};
pub use self::config::{HttpModel, KeySource, ModelConfig, ModelSource, ModelsConfig};
pub use self::router::{ModelRouter, ModelRouterBuilder};
pub use self::script::ScriptedHandler;
pub use self::server::{LmServer, LmServerOptions};
pub use self::socket::SocketHandler;
pub use self::token::LmToken;
pub use self::upstream::{
    AnthropicHandler, HttpProxy, OpenAiHandler, Price, Retries, Secret, UpstreamOptions,
};
pub(crate) use self::upstream::{tls, trusted_roots};
pub(crate) use self::usage::Ledger;
pub use self::usage::{ModelUsage, UsageSummary};
pub(crate) use self::wire::{Asked, AskedPrompts, read_object};

/// Bytes that the name of a model may have: it's kept with each call.
pub(crate) const MODEL_NAME_BYTES_MAX: usize = 1 << 10;

/// What the guest asked.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// A plain text.
    Text(String),
    /// A chat: a message object or a list of them, as the guest built it.
    Messages(Json),
}

impl Prompt {
    /// Its length in bytes, for a chat that of its JSON.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Messages(json) => json_bytes(json),
        }
    }

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
}

/// Why a call got no answer. The guest sees `Error: {message}` (RLM's convention: LM errors are
/// strings, not exceptions).
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
#[non_exhaustive]
pub struct LmError {
    /// What went wrong, without the leading `Error: `.
    pub message: String,
    /// What it cost all the same: a model that refuses is paid for having read the prompt.
    pub usage: Vec<ModelUsage>,
}

impl LmError {
    /// An error with this message.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), usage: Vec::new() }
    }

    /// The same error, of a call that cost this.
    #[must_use]
    pub fn with_usage(self, usage: Vec<ModelUsage>) -> Self {
        Self { usage, ..self }
    }
}

/// What a call cost, whether it was answered or not.
pub(crate) fn usage_of(result: &Result<LmCompletion, LmError>) -> &[ModelUsage] {
    match result {
        Ok(completion) => &completion.usage,
        Err(error) => &error.usage,
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

    /// The model that answers calls of this depth which name none, where that is known.
    fn model_name(&self, _depth: i32) -> Option<&str> {
        None
    }

    /// What a call is likely to cost in US dollars, where prices are known.
    fn expected_cost(&self, _request: &LmRequest) -> Option<f64> {
        None
    }

    /// Whether it answers calls of this kind with sessions of their own. Their calls count by
    /// themselves into what a tenant has in flight and what it spent, so this one doesn't.
    fn nests(&self, _kind: LmKind) -> bool {
        false
    }

    /// Whether it takes a batch of this kind better as a whole than call by call. Those who call it
    /// book what calls cost as they are answered, which a batch as a whole keeps from them until its
    /// end; so a handler that has its own [`complete_batch`](Self::complete_batch) says `true` here, or
    /// it isn't asked for it.
    fn batches(&self, _kind: LmKind) -> bool {
        false
    }

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
        fan_out(self, requests, concurrency).await
    }
}

/// Answers a batch call by call.
pub(crate) async fn fan_out<H: LmHandler + ?Sized>(
    handler: &H,
    requests: &[LmRequest],
    concurrency: usize,
) -> Vec<Result<LmCompletion, LmError>> {
    let calls = requests.iter().map(|one| async { handler.complete(one).await.map_err(in_batch) });
    at_once(calls.collect(), concurrency).await
}

/// Results in the order of their calls, of which so many are under way at once. One that is slow holds
/// its own place, and not those behind it.
pub(crate) async fn at_once<T>(calls: Vec<impl Future<Output = T>>, most: usize) -> Vec<T> {
    let numbered = calls.into_iter().enumerate().map(async |(number, call)| (number, call.await));
    let results = stream::iter(numbered).buffer_unordered(most.max(1));
    let mut results: Vec<(usize, T)> = results.collect().await;
    results.sort_unstable_by_key(|(number, _)| *number);
    results.into_iter().map(|(_, result)| result).collect()
}

/// The length of a value as JSON, about: escapes aren't counted, so that nothing is copied.
pub(crate) fn json_bytes(json: &Json) -> usize {
    match json {
        Json::Null | Json::Bool(_) | Json::Number(_) => 4,
        Json::String(text) => text.len() + 2,
        Json::Array(items) => 2 + items.iter().map(|item| json_bytes(item) + 1).sum::<usize>(),
        Json::Object(fields) => {
            2 + fields.iter().map(|(key, value)| key.len() + json_bytes(value) + 4).sum::<usize>()
        }
    }
}

/// Tokens of a text whose model doesn't tell: English has about four characters per token.
pub(crate) fn estimated_tokens(chars: usize) -> u64 {
    chars.div_ceil(4) as u64
}

/// As [`estimated_tokens`].
fn tokens_of(text: &str) -> u64 {
    estimated_tokens(text.chars().count())
}

/// RLM's wording of a failure in a batch.
fn in_batch(error: LmError) -> LmError {
    LmError { message: format!("llm() call failed - {error}"), ..error }
}

//! Calls of language models from inside a cell.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use serde_json::{Value as Json, json};

use super::{Answer, CALL_BYTES_KEPT_MAX, Conversation, Done};
use crate::environment::{LmCall, Profile};
use crate::error::{Error, Result};
use crate::lm::{
    Ledger, LmCompletion, LmError, LmHandler, LmKind, LmRequest, MODEL_NAME_BYTES_MAX, Prompt,
    fan_out, usage_of,
};
use crate::protocol::{LmCallMessage, Message, decode_within, encode_text, text_of};
use crate::tenant::LmQuota;
use crate::value::Value;

impl Conversation {
    /// Any call of language models.
    pub(super) fn call_lm(&mut self, message: Message) -> Result<Answer> {
        let (call, body) = message.parse::<LmCallMessage>()?;
        // Each of a thousand prompts has its own.
        if let Some(length) = call.model.as_ref().map(String::len)
            && length > MODEL_NAME_BYTES_MAX
        {
            let text =
                format!("the model's name has {length} bytes; it can have {MODEL_NAME_BYTES_MAX}");
            return Ok(Answer::Now(refusal(&text)));
        }
        let count = call.prompts.as_ref().map_or(1, Vec::len);
        let handler = match self.admit(count, body.len()) {
            Ok(handler) => handler,
            Err(text) => return Ok(Answer::Now(refusal(&text))),
        };
        let kind = kind_of(call.kind == "rlm");
        let request =
            |prompt| LmRequest { kind, prompt, model: call.model.clone(), depth: self.depth };
        let mut requests: Vec<_> = prompts(call.prompts, body)?.into_iter().map(request).collect();
        if !call.batched
            && requests.len() == 1
            && let Some(request) = requests.pop()
        {
            return Ok(self.complete(handler, request));
        }
        let caller = self.caller(handler, kind);
        let concurrency = self.limits.lm_concurrency as usize;
        Ok(Answer::Later(Box::pin(async move {
            let most = u32::try_from(concurrency.min(requests.len())).unwrap_or(u32::MAX);
            let permits = match &caller.quota {
                Some(quota) => Some(quota.permits(most).await),
                None => None,
            };
            let concurrency = permits.as_ref().map_or(concurrency, |leave| leave.count() as usize);
            let results = caller.complete_batch(&requests, concurrency).await;
            Done::Batch { requests, results }
        })))
    }

    /// A call with one text and nothing else.
    pub(super) fn call_with_text(&mut self, recursive: bool, text: String) -> Answer {
        let handler = match self.admit(1, text.len()) {
            Ok(handler) => handler,
            Err(text) => return Answer::Now(refusal(&text)),
        };
        let (kind, prompt) = (kind_of(recursive), Prompt::Text(text));
        self.complete(handler, LmRequest { kind, prompt, model: None, depth: self.depth })
    }

    /// Counts prompts of so many bytes; why they can't be sent, otherwise.
    fn admit(&mut self, prompts: usize, bytes: usize) -> Result<Arc<dyn LmHandler>, String> {
        let count = u32::try_from(prompts).unwrap_or(u32::MAX);
        let Some(handler) = &self.lm else { return Err("No LM handler configured".into()) };
        let (spent, most) = (self.calls.lm, self.limits.lm_calls);
        if spent.saturating_add(count) > most {
            return Err(format!("LM call limit exceeded: {spent} + {count} > {most}"));
        }
        let bytes = self.calls.bytes.saturating_add(bytes);
        if bytes > CALL_BYTES_KEPT_MAX {
            return Err(too_many_bytes());
        }
        if let Some(quota) = &self.quota {
            quota.calls(count).map_err(|error| error.to_string())?;
        }
        self.calls.bytes = bytes;
        self.calls.lm += count;
        Ok(Arc::clone(handler))
    }

    fn complete(&self, handler: Arc<dyn LmHandler>, request: LmRequest) -> Answer {
        let caller = self.caller(handler, request.kind);
        Answer::Later(Box::pin(async move {
            let _permit = match &caller.quota {
                Some(quota) => Some(quota.permits(1).await),
                None => None,
            };
            let result = caller.complete(&request).await;
            Done::Completion { request, result }
        }))
    }

    fn caller(&self, handler: Arc<dyn LmHandler>, kind: LmKind) -> Caller {
        // Those who answer with sessions must not wait for what these need, and these book what
        // their calls cost.
        let quota = self.quota.clone().filter(|_| !handler.nests(kind));
        let allowance = AtomicUsize::new(CALL_BYTES_KEPT_MAX.saturating_sub(self.calls.bytes));
        Caller { handler, ledger: self.ledger.clone(), quota, allowance }
    }

    /// A single answer goes without a header, which would have to be taken apart, and is lent to the
    /// message.
    pub(super) fn finish_completion(
        &mut self,
        request: LmRequest,
        result: Result<LmCompletion, LmError>,
    ) -> Message {
        let mut completion = match result {
            Ok(completion) => completion,
            Err(error) => return refusal(&error.message),
        };
        let response = std::mem::take(&mut completion.response);
        self.note(request, completion, response.len());
        self.calls.is_lent = true;
        Message::of_text(response)
    }

    pub(super) fn finish_batch(
        &mut self,
        mut requests: Vec<LmRequest>,
        mut results: Vec<Result<LmCompletion, LmError>>,
    ) -> Message {
        let (expected, found) = (requests.len(), results.len());
        if expected != found {
            return refusal(&format!("the LM handler gave {found} answers to {expected} prompts"));
        }
        if found == 1
            && let (Some(request), Some(result)) = (requests.pop(), results.pop())
        {
            return self.finish_completion(request, result);
        }
        let mut message = Message::default();
        let mut responses = Vec::with_capacity(found);
        let mut failed = None;
        for (request, result) in requests.into_iter().zip(results) {
            responses.push(match result {
                Ok(completion) => {
                    let response = encode_text(&completion.response, &mut message.body);
                    let bytes = completion.response.len();
                    self.note(request, completion, bytes);
                    response
                }
                Err(error) => {
                    let response = encode_text(&format!("Error: {error}"), &mut message.body);
                    failed.get_or_insert(error);
                    response
                }
            });
        }
        if self.profile == Profile::OpenEnv
            && let Some(error) = failed
        {
            return refusal(&error.message);
        }
        message.header.insert("responses".into(), responses.into());
        message
    }

    /// Keeps an answer of so many bytes for the report.
    fn note(&mut self, request: LmRequest, completion: LmCompletion, bytes: usize) {
        self.calls.bytes = self.calls.bytes.saturating_add(bytes);
        self.calls.completions.push(LmCall { prompt: request.prompt, completion });
    }

    /// The message that [`finish`](Self::finish) made was sent, or can't be.
    pub(crate) fn take_back(&mut self, message: Message) {
        if std::mem::take(&mut self.calls.is_lent)
            && let Some(call) = self.calls.completions.last_mut()
        {
            call.completion.response = text_of(message.body);
        }
    }
}

/// Asks for one call of the guest, and books what answers cost as they come: the cell may be gone by the
/// time that the last one is there.
struct Caller {
    handler: Arc<dyn LmHandler>,
    ledger: Ledger,
    /// None for calls that are answered by sessions.
    quota: Option<LmQuota>,
    /// Bytes of answers that the host still keeps for this cell.
    allowance: AtomicUsize,
}

impl Caller {
    fn booked(&self, result: Result<LmCompletion, LmError>) -> Result<LmCompletion, LmError> {
        let usage = usage_of(&result);
        self.ledger.add(usage);
        if let Some(quota) = &self.quota {
            quota.book(usage);
        }
        let completion = result?;
        let bytes = completion.response.len();
        let taken = |left: usize| left.checked_sub(bytes);
        match self.allowance.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken) {
            Ok(_) => Ok(completion),
            Err(_) => Err(LmError::new(too_many_bytes())),
        }
    }
}

#[async_trait]
impl LmHandler for Caller {
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        self.booked(self.handler.complete(request).await)
    }

    async fn complete_batch(
        &self,
        requests: &[LmRequest],
        concurrency: usize,
    ) -> Vec<Result<LmCompletion, LmError>> {
        let as_a_whole = requests.first().is_some_and(|first| self.handler.batches(first.kind));
        if !as_a_whole {
            return fan_out(self, requests, concurrency).await;
        }
        let results = self.handler.complete_batch(requests, concurrency).await;
        results.into_iter().map(|result| self.booked(result)).collect()
    }
}

fn too_many_bytes() -> String {
    format!("prompts and responses of one cell exceed {CALL_BYTES_KEPT_MAX} bytes")
}

/// What the guest is told instead of answers. How it words that in cells, and whether it raises, is
/// its profile's affair.
fn refusal(text: &str) -> Message {
    Message::new(json!({ "error": text }))
}

fn kind_of(recursive: bool) -> LmKind {
    if recursive { LmKind::Rlm } else { LmKind::Llm }
}

/// The prompts of a call.
fn prompts(encoded: Option<Vec<Json>>, body: Vec<u8>) -> Result<Vec<Prompt>> {
    let Some(encoded) = encoded else { return Ok(vec![Prompt::Text(text_of(body))]) };
    let mut allowance = body.len();
    let prompt = |json| prompt_of(decode_within(json, &body, &mut allowance)?);
    encoded.into_iter().map(prompt).collect()
}

fn prompt_of(value: Value) -> Result<Prompt> {
    match value {
        Value::Str(text) => Ok(Prompt::Text(text)),
        Value::Wtf8(bytes) => Ok(Prompt::Text(text_of(bytes))),
        messages @ (Value::List(_) | Value::Map(_)) => messages
            .to_json()
            .map(Prompt::Messages)
            .ok_or_else(|| Error::protocol("a prompt with parts that JSON has no form for")),
        _ => Err(Error::protocol("a prompt that is neither text nor messages")),
    }
}

//! Calls of language models from inside a cell.

use std::sync::Arc;

use serde_json::{Value as Json, json};

use super::{Answer, CALL_BYTES_KEPT_MAX, Conversation, Done};
use crate::environment::{LmCall, Profile};
use crate::error::{Error, Result};
use crate::lm::{
    LmCompletion, LmError, LmHandler, LmKind, LmRequest, MODEL_NAME_BYTES_MAX, ModelUsage, Prompt,
};
use crate::protocol::{LmCallMessage, Message, decode_within, encode_text, text_of};
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
        let (quota, concurrency) = (self.quota.clone(), self.limits.lm_concurrency as usize);
        Ok(Answer::Later(Box::pin(async move {
            let most = concurrency.min(requests.len());
            let permits = match &quota {
                // Those who answer with sessions must not wait for what these need.
                Some(quota) if !handler.nests(kind) => {
                    Some(quota.permits(u32::try_from(most).unwrap_or(u32::MAX)).await)
                }
                _ => None,
            };
            let concurrency = permits.as_ref().map_or(concurrency, |leave| leave.count() as usize);
            let results = handler.complete_batch(&requests, concurrency).await;
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
            return Err(format!(
                "prompts and responses of one cell exceed {CALL_BYTES_KEPT_MAX} bytes"
            ));
        }
        if let Some(quota) = &self.quota {
            quota.calls(count).map_err(|error| error.to_string())?;
        }
        self.calls.bytes = bytes;
        self.calls.lm += count;
        Ok(Arc::clone(handler))
    }

    fn complete(&self, handler: Arc<dyn LmHandler>, request: LmRequest) -> Answer {
        let quota = self.quota.clone();
        Answer::Later(Box::pin(async move {
            let _permit = match &quota {
                Some(quota) if !handler.nests(request.kind) => Some(quota.permits(1).await),
                _ => None,
            };
            let result = handler.complete(&request).await;
            Done::Completion { request, result }
        }))
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
            Err(error) => {
                self.book(request.kind, &error.usage);
                return refusal(&error.message);
            }
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
                    self.book(request.kind, &error.usage);
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

    /// Keeps an answer of so many bytes for the report, and counts what it cost.
    fn note(&mut self, request: LmRequest, completion: LmCompletion, bytes: usize) {
        self.calls.bytes = self.calls.bytes.saturating_add(bytes);
        self.book(request.kind, &completion.usage);
        self.calls.completions.push(LmCall { prompt: request.prompt, completion });
    }

    /// Counts what a call cost.
    fn book(&self, kind: LmKind, usage: &[ModelUsage]) {
        self.ledger.add(usage);
        // What answers with sessions has booked their calls already.
        let nests = self.lm.as_ref().is_some_and(|handler| handler.nests(kind));
        if let Some(quota) = self.quota.as_ref().filter(|_| !nests) {
            quota.book(usage);
        }
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

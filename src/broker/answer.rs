//! What a guest asked, in RLM's form, and the object that answers it.

use std::sync::Arc;

use async_trait::async_trait;
use serde_json::{Value as Json, json};

use crate::lm::{Asked, AskedPrompts, LmHandler, LmKind, LmRequest, read_object};

/// Who answers what guests ask.
#[async_trait]
pub(crate) trait Responder: Send + Sync {
    /// The object that answers a request, which came as the text of its JSON. The guest wrote it:
    /// whatever is wrong with it becomes an error that the guest reads.
    ///
    /// The future is dropped when nobody waits for the answer any more.
    async fn respond(&self, text: String) -> Json;
}

/// Answers as RLM does.
pub(super) struct Models {
    pub(super) handler: Arc<dyn LmHandler>,
    pub(super) batch_concurrency: usize,
    pub(super) prompts_max: usize,
}

#[async_trait]
impl Responder for Models {
    async fn respond(&self, text: String) -> Json {
        self.answer(text).await.unwrap_or_else(|error| json!({"error": error}))
    }
}

impl Models {
    async fn answer(&self, text: String) -> Result<Json, String> {
        let mut request = read_object(text.into_bytes())?;
        let kind = request.remove("type");
        let is_batch = match kind.as_ref().and_then(Json::as_str) {
            Some("single") => false,
            Some("batched") => true,
            _ => return Err("Unknown request type".into()),
        };
        if is_batch && request.get("prompts").is_some_and(|prompts| *prompts == json!([])) {
            return Ok(json!({"responses": []}));
        }
        request.remove(if is_batch { "prompt" } else { "prompts" });
        let Asked { prompts, model, depth } = Asked::read(request, self.prompts_max)?;
        let ask = |prompt| LmRequest { kind: LmKind::Llm, prompt, model: model.clone(), depth };
        match prompts {
            AskedPrompts::One(prompt) => {
                let completion =
                    self.handler.complete(&ask(prompt)).await.map_err(|e| e.message)?;
                Ok(json!({"response": completion.response}))
            }
            AskedPrompts::Batch(prompts) => {
                let requests: Vec<LmRequest> = prompts.into_iter().map(ask).collect();
                let results = self.handler.complete_batch(&requests, self.batch_concurrency).await;
                let text = |result: Result<crate::lm::LmCompletion, _>| match result {
                    Ok(completion) => completion.response,
                    Err(error) => format!("Error: {error}"),
                };
                Ok(json!({"responses": results.into_iter().map(text).collect::<Vec<_>>()}))
            }
        }
    }
}

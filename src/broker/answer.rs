//! What a guest asked, in RLM's form, and the object that answers it.

use serde_json::{Value as Json, json};

use super::BrokerOptions;
use crate::lm::{Asked, AskedPrompts, LmHandler, LmKind, LmRequest, read_object};

/// The reply to a request that came as the text of its JSON. The guest wrote it: whatever is wrong with
/// it becomes an error that the guest reads.
pub(super) async fn answer(handler: &dyn LmHandler, text: String, options: &BrokerOptions) -> Json {
    match try_answer(handler, text, options).await {
        Ok(reply) => reply,
        Err(error) => json!({"error": error}),
    }
}

async fn try_answer(
    handler: &dyn LmHandler,
    text: String,
    options: &BrokerOptions,
) -> Result<Json, String> {
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
    let Asked { prompts, model, depth } = Asked::read(request, options.prompts_max)?;
    let ask = |prompt| LmRequest { kind: LmKind::Llm, prompt, model: model.clone(), depth };
    match prompts {
        AskedPrompts::One(prompt) => {
            let completion = handler.complete(&ask(prompt)).await.map_err(|e| e.message)?;
            Ok(json!({"response": completion.response}))
        }
        AskedPrompts::Batch(prompts) => {
            let requests: Vec<LmRequest> = prompts.into_iter().map(ask).collect();
            let results = handler.complete_batch(&requests, options.batch_concurrency).await;
            let text = |result: Result<crate::lm::LmCompletion, _>| match result {
                Ok(completion) => completion.response,
                Err(error) => format!("Error: {error}"),
            };
            Ok(json!({"responses": results.into_iter().map(text).collect::<Vec<_>>()}))
        }
    }
}

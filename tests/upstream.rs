//! Models behind HTTP, against a server that fails in every way.

#[path = "common/chat_server.rs"]
mod chat_server;

use chat_server::ChatServer;
use kaa::lm::{LmHandler, LmKind, LmRequest, OpenAiHandler, Prompt, UpstreamOptions};

#[tokio::test]
async fn smoke() {
    let server = ChatServer::echo();
    let options = UpstreamOptions { base_url: Some(server.openai_url()), ..Default::default() };
    let handler = OpenAiHandler::new("m", options).unwrap();
    let request =
        LmRequest { kind: LmKind::Llm, prompt: Prompt::Text("hi".into()), model: None, depth: 1 };
    let completion = handler.complete(&request).await.unwrap();
    assert_eq!(completion.response, "hi");
}

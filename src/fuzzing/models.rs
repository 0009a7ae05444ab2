//! RLM's wire over any stream, and what upstreams answer.

use tokio::io::{AsyncRead, AsyncWrite};

use crate::lm::{
    AnthropicHandler, LmCompletion, LmError, LmRequest, LmServer, OpenAiHandler, SocketHandler,
};

/// One connection to a server.
///
/// # Errors
///
/// When the stream breaks.
pub async fn serve(
    server: &LmServer,
    stream: impl AsyncRead + AsyncWrite + Unpin,
) -> std::io::Result<()> {
    server.serve_stream(stream).await
}

/// What a client makes of the reply to a batch of these.
pub async fn ask(
    client: &SocketHandler,
    stream: impl AsyncRead + AsyncWrite + Unpin,
    requests: &[LmRequest],
) -> Vec<Result<LmCompletion, LmError>> {
    client.ask_over(stream, requests).await
}

/// Reads the body of an answer.
///
/// # Errors
///
/// As of the call.
pub fn read_openai(
    handler: &OpenAiHandler,
    request: &LmRequest,
    body: Vec<u8>,
) -> Result<LmCompletion, LmError> {
    handler.read(request, body)
}

/// Reads the body of an answer.
///
/// # Errors
///
/// As of the call.
pub fn read_anthropic(
    handler: &AnthropicHandler,
    request: &LmRequest,
    body: Vec<u8>,
) -> Result<LmCompletion, LmError> {
    handler.read(request, body)
}

//! RLM's wire in both directions, and what the servers of models answer.
//!
//! The first byte of an input chooses what the rest is:
//!
//! | byte | the rest |
//! |---|---|
//! | 0 | what a client sends to the server |
//! | 1 | the payload of a client's frame |
//! | 2, 3 | the same of a server to a client that asked as many prompts as the next byte says, and 1 |
//! | 4, 5 | the body of an answer of OpenAI's, and of Anthropic's interface |
//!
//! What has to hold:
//! - a server answers with one frame that a client of Kaa's can read, or breaks off what broke off;
//! - a client has a result for each prompt;
//! - no error holds the key of an upstream, or is longer than a message should be;
//! - no clock is waited for: what waits for a peer that is gone ends at once.

use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use kaa::fuzzing::{ask, read_anthropic, read_openai, serve};
use kaa::lm::{
    AnthropicHandler, LmCompletion, LmError, LmKind, LmRequest, LmServer, LmServerOptions, LmToken,
    OpenAiHandler, Price, Prompt, ScriptedHandler, Secret, SocketHandler, UpstreamOptions,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::runtime::{Builder, Runtime};

use super::frames::frame;
use super::input::Input;

const KEY: &str = "sk-of-the-upstream";
const TOKEN: &str = "of-the-lm-server";
const PIPE_BYTES: usize = 4 << 10;
/// Of an error, with the name of the model before it: the upstream's words are cut at 500 characters.
const ERROR_CHARS_MAX: usize = 700;
/// Prompts of a request to the server.
const PROMPTS_MAX: usize = 16;

/// Both ends of the wire. Its clock stands still unless everything waits for it.
struct Wire {
    runtime: Runtime,
    server: LmServer,
    client: SocketHandler,
    openai: OpenAiHandler,
    anthropic: AnthropicHandler,
}

static WIRE: LazyLock<Mutex<Wire>> = LazyLock::new(|| Mutex::new(Wire::new()));

pub(crate) fn run(input: &[u8]) -> bool {
    let wire = WIRE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut input = Input(input);
    match input.u8() % 6 {
        0 => wire.check_server(input.0),
        1 => wire.check_server(&frame(input.0, b"")),
        2 => wire.check_client(input.u8(), input.0),
        3 => wire.check_client(input.u8(), &frame(input.0, b"")),
        4 => check_read(read_openai(&wire.openai, &request("p"), input.0.to_vec())),
        _ => check_read(read_anthropic(&wire.anthropic, &request("p"), input.0.to_vec())),
    }
}

impl Wire {
    fn new() -> Self {
        let mut runtime = Builder::new_current_thread();
        let runtime = runtime.enable_all().start_paused(true).build().unwrap();
        let options = LmServerOptions {
            token: Some(LmToken::new(TOKEN).unwrap()),
            request_bytes_max: 64 << 10,
            arriving_bytes_max: 64 << 10,
            reply_bytes_max: 64 << 10,
            prompts_max: PROMPTS_MAX,
            ..LmServerOptions::default()
        };
        let echo = Arc::new(ScriptedHandler::echo());
        let server = runtime.block_on(LmServer::bind("127.0.0.1:0", echo, options)).unwrap();
        let upstream = UpstreamOptions {
            base_url: Some("http://127.0.0.1:9/v1".into()),
            key: Some(Secret::new(KEY)),
            price: Some(Price { input: 1.0, output: 2.0 }),
            ..UpstreamOptions::default()
        };
        Self {
            runtime,
            server,
            client: SocketHandler::new("127.0.0.1:9").unwrap().with_reply_bytes_max(64 << 10),
            openai: OpenAiHandler::new("m", upstream.clone()).unwrap(),
            anthropic: AnthropicHandler::new("m", upstream).unwrap(),
        }
    }

    /// Whether the request was answered.
    fn check_server(&self, sent: &[u8]) -> bool {
        let reply = self.runtime.block_on(async {
            let (near, far) = tokio::io::duplex(PIPE_BYTES);
            let (served, reply) = tokio::join!(serve(&self.server, near), peer(far, sent));
            (!reply.is_empty() || served.is_err()).then_some(reply)
        });
        let reply = reply.expect("a reply, or a stream that broke");
        if reply.is_empty() {
            return false;
        }
        let (length, payload) = reply.split_first_chunk::<4>().expect("a frame");
        assert_eq!(u32::from_be_bytes(*length) as usize, payload.len());
        let json: serde_json::Value = serde_json::from_slice(payload).expect("JSON");
        let keys = ["chat_completion", "chat_completions", "error"];
        let is_set = |key: &&str| !json.get(*key).expect("each of the three keys").is_null();
        let set: Vec<&str> = keys.into_iter().filter(is_set).collect();
        assert_eq!(set.len(), 1, "{json}");
        let batch = json["chat_completions"].as_array().map_or(1, Vec::len);
        assert!((1..=PROMPTS_MAX).contains(&batch), "{batch}");
        // What Kaa's server says Kaa's client understands.
        let results = self.ask(batch, &reply);
        if set != ["chat_completions"] {
            return set != ["error"];
        }
        // The scripted model never fails, so that only the room can have ended.
        let has_no_room = |error: &LmError| error.message.contains("has no room");
        assert!(results.iter().all(|result| result.as_ref().err().is_none_or(has_no_room)));
        true
    }

    /// Whether any prompt was answered.
    fn check_client(&self, prompts: u8, sent: &[u8]) -> bool {
        let prompts = 1 + usize::from(prompts) % PROMPTS_MAX;
        let results = self.ask(prompts, sent);
        assert_eq!(results.len(), prompts);
        results.iter().any(Result::is_ok)
    }

    /// What a client that asked so many prompts makes of what a server sends.
    fn ask(&self, prompts: usize, sent: &[u8]) -> Vec<Result<(), LmError>> {
        let requests: Vec<LmRequest> = (0..prompts).map(|n| request(&n.to_string())).collect();
        self.runtime.block_on(async {
            let (near, far) = tokio::io::duplex(PIPE_BYTES);
            let both = async { tokio::join!(ask(&self.client, near, &requests), peer(far, sent)) };
            let both = tokio::time::timeout(Duration::from_secs(100), both).await;
            let (results, _) = both.expect("an end as soon as the server is gone");
            results.into_iter().map(|result| result.map(drop)).collect()
        })
    }
}

/// Sends this and nothing else; what it hears meanwhile.
async fn peer(stream: DuplexStream, sent: &[u8]) -> Vec<u8> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut heard = Vec::new();
    let send = async {
        // The other side may not want to hear all of it.
        let _ = writer.write_all(sent).await;
        let _ = writer.shutdown().await;
    };
    let (_, end) = tokio::join!(send, reader.read_to_end(&mut heard));
    end.unwrap();
    heard
}

fn request(prompt: &str) -> LmRequest {
    let prompt = Prompt::Text(prompt.into());
    LmRequest { kind: LmKind::Llm, prompt, model: None, depth: 1 }
}

fn check_read(read: Result<LmCompletion, LmError>) -> bool {
    let Err(LmError { message, .. }) = read else { return true };
    assert!(!message.contains(KEY), "{message}");
    assert!(message.chars().count() <= ERROR_CHARS_MAX, "{message}");
    false
}

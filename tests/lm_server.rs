//! The LM handler as a server: the bytes of rlms 0.1.3, and clients that break the rules.
//!
//! The failure guarded against: a client that stalls, lies about a length, floods or leaves takes
//! memory, tasks or paid calls with it; or one that keeps the rules gets other words than RLM's.
//! Handlers here count the calls that are alive, so that a call left behind is seen.

use std::future::{Future, pending};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use kaa::lm::{LmCompletion, LmError, LmHandler, LmKind, LmRequest, ModelUsage, Prompt};
use kaa::lm::{LmServer, LmServerOptions, LmToken, ModelRouter, ScriptedHandler, SocketHandler};
use regex::Regex;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const TOKEN: &str = "a token for the tests";

/// Long enough for a busy machine; nothing waits for it when all is well.
const PATIENCE: Duration = Duration::from_secs(20);

/// The client that the goldens were recorded with.
struct Mock;

#[async_trait]
impl LmHandler for Mock {
    fn model_name(&self, depth: i32) -> Option<&str> {
        Some(if depth == 1 { "sub" } else { "mock" })
    }

    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        let prompt = request.prompt.to_text();
        if prompt == "boom" {
            return Err(LmError::new("kaput"));
        }
        let own = self.model_name(request.depth).unwrap();
        let model = request.model.clone().unwrap_or_else(|| own.into());
        let (calls, input_tokens, output_tokens) = (1, 2, 3);
        let name = model.clone();
        let usage = ModelUsage { model: name, calls, input_tokens, output_tokens, cost: None };
        Ok(LmCompletion {
            model,
            response: format!("\u{e9}:{prompt}"),
            usage: vec![usage],
            execution_time: Duration::from_nanos(1500),
            ..LmCompletion::default()
        })
    }
}

/// Never answers, and counts the calls that are alive.
#[derive(Clone, Default)]
struct Hanging(Arc<AtomicUsize>);

struct Alive(Arc<AtomicUsize>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl LmHandler for Hanging {
    async fn complete(&self, _: &LmRequest) -> Result<LmCompletion, LmError> {
        self.0.fetch_add(1, Ordering::SeqCst);
        let _alive = Alive(Arc::clone(&self.0));
        pending().await
    }
}

impl Hanging {
    async fn reaches(&self, count: usize) {
        within(async {
            while self.0.load(Ordering::SeqCst) != count {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it takes too long")
}

struct Running {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
}

impl Running {
    fn client(&self) -> SocketHandler {
        SocketHandler::new(self.address.to_string()).unwrap()
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends bytes as they are; the payload of the reply.
    async fn exchange(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect().await;
        stream.write_all(bytes).await.unwrap();
        reply(&mut stream).await
    }

    async fn ask(&self, payload: &str) -> String {
        self.exchange(&frame(payload)).await
    }

    async fn stop(self) {
        drop(self.stop);
        within(self.serving).await.unwrap();
    }
}

async fn serve_with(handler: impl LmHandler + 'static, options: LmServerOptions) -> Running {
    let server = LmServer::bind("127.0.0.1:0", Arc::new(handler), options).await.unwrap();
    let address = server.local_addr();
    let (stop, stopped) = oneshot::channel();
    let serving = tokio::spawn(server.serve(async { drop(stopped.await) }));
    Running { address, stop, serving }
}

async fn serve(handler: impl LmHandler + 'static) -> Running {
    serve_with(handler, LmServerOptions::default()).await
}

fn frame(payload: &str) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap();
    [&length.to_be_bytes()[..], payload.as_bytes()].concat()
}

/// All that comes until the server closes; it must be one frame.
async fn reply(stream: &mut TcpStream) -> String {
    let mut received = Vec::new();
    within(stream.read_to_end(&mut received)).await.unwrap();
    let length = u32::from_be_bytes(received[..4].try_into().unwrap());
    assert_eq!(received.len(), 4 + length as usize, "not one frame");
    String::from_utf8(received.split_off(4)).unwrap()
}

fn error(text: &str) -> String {
    format!(r#"{{"error": "{text}", "chat_completion": null, "chat_completions": null}}"#)
}

fn request(prompt: &str) -> LmRequest {
    LmRequest { kind: LmKind::Llm, prompt: Prompt::Text(prompt.into()), model: None, depth: 1 }
}

/// What a good completion looks like on the wire.
fn completion(model: &str, prompt: &str, time: &str) -> String {
    let template = concat!(
        r#"{"root_model": "MODEL", "prompt": "PROMPT", "response": "\u00e9:PROMPT", "#,
        r#""usage_summary": {"model_usage_summaries": {"MODEL": {"total_calls": 1, "#,
        r#""total_input_tokens": 2, "total_output_tokens": 3}}}, "execution_time": TIME}"#,
    );
    template.replace("MODEL", model).replace("PROMPT", prompt).replace("TIME", time)
}

fn single(completion: &str) -> String {
    format!(r#"{{"chat_completion": {completion}, "chat_completions": null, "error": null}}"#)
}

fn batch(completions: &[&str]) -> String {
    let completions = completions.join(", ");
    format!(r#"{{"chat_completions": [{completions}], "chat_completion": null, "error": null}}"#)
}

/// A batch's times are measured: each becomes `TIME`, except the 0.0 of a failure.
fn timeless(reply: &str) -> String {
    let time = Regex::new(r#""execution_time": (?:[1-9][0-9.e-]*|0\.0*[1-9][0-9]*)"#).unwrap();
    time.replace_all(reply, r#""execution_time": TIME"#).into_owned()
}

/// Requests and what RLM replies; `completion` makes the good one of this model and prompt.
fn goldens(completion: impl Fn(&str, &str) -> String) -> Vec<(&'static str, String)> {
    let missing = error("Missing 'prompt' or 'prompts' in request.");
    let name = "Expecting property name enclosed in double quotes";
    let failed = concat!(
        r#"{"root_model": "sub", "prompt": "boom", "response": "", "#,
        r#""usage_summary": {"model_usage_summaries": {}}, "execution_time": 0.0, "#,
        r#""error": "llm() call failed - kaput"}"#,
    );
    vec![
        (r#"{"prompt":"hi","depth":0}"#, single(&completion("mock", "hi"))),
        (r#"{"prompt": "hi", "depth": 1}"#, single(&completion("sub", "hi"))),
        (r#"{"prompt": "hi", "depth": 2}"#, single(&completion("mock", "hi"))),
        (r#"{"prompt":"hi","model":"nope","depth":2}"#, single(&completion("nope", "hi"))),
        (r#"{"prompts":["a","boom"],"depth":1}"#, batch(&[&completion("sub", "a"), failed])),
        (r#"{"prompt":"a","prompts":["b"]}"#, batch(&[&completion("mock", "b")])),
        (r#"{"prompts":["boom"]}"#, batch(&[&failed.replace("sub", "mock")])),
        (r#"{"prompts":["boom"],"depth":1}"#, batch(&[failed])),
        (r#"{"prompt":"boom"}"#, error("kaput")),
        (r#"{"prompt":""}"#, missing.clone()),
        (r#"{"prompts":[]}"#, missing.clone()),
        ("{}", missing),
        ("[1]", error("Request must be a JSON object")),
        ("{bad", error(&format!("{name}: line 1 column 2 (char 1)"))),
        ("", error("Expecting value: line 1 column 1 (char 0)")),
    ]
}

#[tokio::test]
async fn goldens_of_rlm() {
    let server = serve(Mock).await;
    let missing = error("Missing 'prompt' or 'prompts' in request.");
    for (payload, expected) in goldens(|model, prompt| completion(model, prompt, "TIME")) {
        assert_eq!(timeless(&server.ask(payload).await), expected, "{payload}");
    }
    // The time of a single call is the handler's, printed as Python does.
    let timed = server.ask(r#"{"prompt":"hi","depth":0}"#).await;
    assert_eq!(timed, single(&completion("mock", "hi", "1.5e-06")));
    // The lengths of the recorded replies.
    assert_eq!([error("kaput").len(), missing.len()], [0x45, 0x69]);
    assert_eq!(error("Request must be a JSON object").len(), 0x5d);
    // A client that sends nothing and stops sending: RLM takes it for an empty request.
    let mut silent = server.connect().await;
    silent.shutdown().await.unwrap();
    assert_eq!(reply(&mut silent).await, missing);
    server.stop().await;
}

#[tokio::test]
async fn goldens_of_rlm_hold_for_a_router_of_scripts() {
    let script = |model: &str| {
        let script = json!({
            "model": model,
            "rules": [{"contains": "boom", "error": "kaput"}],
            "default": {"response": "\u{e9}:${prompt}"},
        });
        Arc::new(ScriptedHandler::from_json(&script.to_string()).unwrap())
    };
    let router = ModelRouter::builder()
        .model("mock", script("mock"))
        .model("sub", script("sub"))
        .default_from_depth(1, "sub")
        .build()
        .unwrap();
    let server = serve(router.with_depths_of_rlm()).await;
    // Tokens are estimated, and a script takes no time.
    let (tokens, estimated) = (
        r#""total_input_tokens": 2, "total_output_tokens": 3"#,
        r#""total_input_tokens": 1, "total_output_tokens": 1"#,
    );
    let goldens =
        goldens(|model, prompt| completion(model, prompt, "TIME").replace(tokens, estimated));
    for (payload, expected) in goldens {
        let is_single = expected.starts_with(r#"{"chat_completion":"#);
        let expected = if is_single { expected.replace("TIME", "0.0") } else { expected };
        assert_eq!(timeless(&server.ask(payload).await), expected, "{payload}");
    }
    server.stop().await;
}

#[tokio::test]
async fn only_the_first_frame_is_answered() {
    let server = serve(Mock).await;
    // The second is larger than what sockets keep: unread, it would reset the connection.
    let second = frame(&format!(r#"{{"prompt": "{}"}}"#, "x".repeat(8 << 20)));
    let mut stream = server.connect().await;
    let (mut reader, mut writer) = stream.split();
    let bytes = [frame(r#"{"prompt":"one","depth":0}"#), second].concat();
    let mut received = Vec::new();
    let read = reader.read_to_end(&mut received);
    within(async { tokio::try_join!(writer.write_all(&bytes), read) }).await.unwrap();
    let expected = frame(&single(&completion("mock", "one", "1.5e-06")));
    assert_eq!(String::from_utf8_lossy(&received), String::from_utf8_lossy(&expected));
    server.stop().await;
}

#[tokio::test]
async fn kaas_own_client_gets_what_the_handler_gave() {
    let handler = ScriptedHandler::from_fn(|request| {
        let prompt = request.prompt.to_text();
        match &*prompt {
            "fail" => Err(LmError::new("caf\u{e9} is closed")),
            _ => Ok(format!("{prompt} {:?} {}", request.model, request.depth)),
        }
    });
    let server = serve(handler).await;
    let client = server.client();
    let mut chat = request("");
    chat.prompt = Prompt::Messages(json!([{"role": "user", "content": "\u{1f600}\u{0}"}]));
    for (request, expected) in [
        (request("\u{e9}\u{1f600}\"\\"), Ok("\u{e9}\u{1f600}\"\\ None 1")),
        (
            LmRequest { model: Some("m\u{e9}".into()), depth: 7, ..request("a") },
            Ok("a Some(\"m\u{e9}\") 7"),
        ),
        (chat.clone(), Ok("[{\"content\":\"\u{1f600}\\u0000\",\"role\":\"user\"}] None 1")),
        (request("fail"), Err("caf\u{e9} is closed")),
        (request(""), Err("Missing 'prompt' or 'prompts' in request.")),
    ] {
        let answer = client.complete(&request).await;
        let answer = answer.as_ref().map(|c| &*c.response).map_err(|e| &*e.message);
        assert_eq!(answer, expected, "{request:?}");
    }
    let answers = client.complete_batch(&[request("a"), request("fail"), chat], 1).await;
    assert_eq!(answers[0].as_ref().unwrap().response, "a None 1");
    assert_eq!(answers[0].as_ref().unwrap().usage[0].calls, 1);
    assert_eq!(answers[1].as_ref().unwrap_err().message, "llm() call failed - caf\u{e9} is closed");
    assert!(answers[2].as_ref().unwrap().response.contains('\u{1f600}'));
    server.stop().await;
}

/// Says as little as it may, and to a batch too little.
struct Sparse;

#[async_trait]
impl LmHandler for Sparse {
    async fn complete(&self, _: &LmRequest) -> Result<LmCompletion, LmError> {
        let metadata = Some(json!({"iterations": 2}));
        Ok(LmCompletion { model: "m".into(), metadata, ..LmCompletion::default() })
    }

    async fn complete_batch(
        &self,
        _: &[LmRequest],
        _: usize,
    ) -> Vec<Result<LmCompletion, LmError>> {
        Vec::new()
    }
}

#[tokio::test]
async fn what_a_handler_leaves_out_is_filled_in() {
    let server = serve(Sparse).await;
    let reply = server.ask(r#"{"prompt": "a"}"#).await;
    let expected = concat!(
        r#"{"root_model": "m", "prompt": "a", "response": "", "usage_summary": "#,
        r#"{"model_usage_summaries": {"m": {"total_calls": 0, "total_input_tokens": 0, "#,
        r#""total_output_tokens": 0}}}, "execution_time": 0.0, "metadata": {"iterations": 2}}"#,
    );
    assert_eq!(reply, single(expected));
    let answer = server.client().complete(&request("a")).await.unwrap();
    assert_eq!(answer.metadata, Some(json!({"iterations": 2})));
    for answer in server.client().complete_batch(&[request("a"), request("b")], 1).await {
        let message = answer.unwrap_err().message;
        assert_eq!(message, "llm() call failed - the handler gave no answer");
    }
    server.stop().await;
}

#[tokio::test]
async fn the_cap_on_requests_is_exact_and_comes_before_the_body() {
    let payload = r#"{"prompt": "a", "depth": 0}"#;
    let options = |request_bytes_max| LmServerOptions { request_bytes_max, ..Default::default() };
    let server = serve_with(Mock, options(payload.len())).await;
    assert_eq!(server.ask(payload).await, single(&completion("mock", "a", "1.5e-06")));
    server.stop().await;

    let server = serve_with(Mock, options(1000)).await;
    // The header alone is enough to be refused.
    let mut stream = server.connect().await;
    stream.write_all(b"\xff\xff\xff\xff").await.unwrap();
    let mut received = vec![0; 4 + error("").len()];
    within(stream.read_exact(&mut received)).await.unwrap();
    assert!(String::from_utf8_lossy(&received[4..]).starts_with(r#"{"error": "a frame of 42949"#));
    drop(stream);
    // One that sends all before it reads gets the reply too.
    let reply = server.ask(&"x".repeat(8 << 20)).await;
    assert_eq!(reply, error("a frame of 8388608 bytes exceeds the maximum of 1000"));
    server.stop().await;
}

#[tokio::test]
async fn requests_may_come_byte_by_byte_but_not_for_ever() {
    let server = serve(Mock).await;
    let mut stream = server.connect().await;
    stream.set_nodelay(true).unwrap();
    for byte in frame(r#"{"prompt":"hi","depth":0}"#) {
        stream.write_all(&[byte]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(reply(&mut stream).await, single(&completion("mock", "hi", "1.5e-06")));
    server.stop().await;

    let receive_timeout = Duration::from_millis(50);
    let options = LmServerOptions { receive_timeout, ..Default::default() };
    let server = serve_with(Mock, options).await;
    let late = error("the request was not complete after 50ms");
    for start in [&b""[..], b"\0\0", b"\0\0\0\x10", b"\0\0\0\x10{\"prompt\""] {
        assert_eq!(server.exchange(start).await, late, "{start:?}");
    }
    // Bytes that keep coming don't restart the clock.
    let mut stream = server.connect().await;
    stream.write_all(b"\0\0\x10\0").await.unwrap();
    let (mut reader, mut writer) = stream.split();
    let trickle = async {
        while writer.write_all(b" ").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    let mut header = [0; 4];
    let answered = async { reader.read_exact(&mut header).await.map(drop) };
    within(async {
        tokio::select! {
            () = trickle => panic!("the reply comes before the connection closes"),
            answered = answered => answered.unwrap(),
        }
    })
    .await;
    assert_eq!(header, frame(&late)[..4]);
    server.stop().await;
}

#[tokio::test]
async fn a_handler_that_takes_too_long_is_dropped() {
    let (handler, answer_timeout) = (Hanging::default(), Duration::from_millis(50));
    let options = LmServerOptions { answer_timeout, ..Default::default() };
    let server = serve_with(handler.clone(), options).await;
    assert_eq!(server.ask(r#"{"prompt": "a"}"#).await, error("Request timed out after 50ms"));
    handler.reaches(0).await;
    for answer in server.client().complete_batch(&[request("a"), request("b")], 1).await {
        let message = answer.unwrap_err().message;
        assert_eq!(message, "llm() call failed - Request timed out after 50ms");
    }
    handler.reaches(0).await;
    server.stop().await;
}

/// Answers all but some prompts.
struct Partly(Hanging);

#[async_trait]
impl LmHandler for Partly {
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        match &*request.prompt.to_text() {
            "hang" => self.0.complete(request).await,
            _ => Mock.complete(request).await,
        }
    }
}

#[tokio::test]
async fn a_call_that_hangs_does_not_cost_the_answers_of_its_batch() {
    let hanging = Hanging::default();
    // Long enough for a busy machine: the others have to be answered within it.
    let answer_timeout = Duration::from_secs(1);
    let options = LmServerOptions { answer_timeout, batch_concurrency: 2, ..Default::default() };
    let server = serve_with(Partly(hanging.clone()), options).await;
    let prompts = ["hang", "a", "boom", "b"].map(request);
    let answers = server.client().complete_batch(&prompts, 1).await;
    let answers: Vec<_> = answers
        .iter()
        .map(|answer| answer.as_ref().map(|done| &*done.response).map_err(|e| &*e.message))
        .collect();
    let late = "llm() call failed - Request timed out after 1s";
    let failed = "llm() call failed - kaput";
    assert_eq!(answers, [Err(late), Ok("\u{e9}:a"), Err(failed), Ok("\u{e9}:b")]);
    hanging.reaches(0).await;
    server.stop().await;
}

#[tokio::test]
async fn what_has_no_room_in_a_reply_is_an_error_of_its_own() {
    let lengths = ScriptedHandler::from_fn(|request| {
        let text = request.prompt.to_text();
        text.parse()
            .map(|length| "\u{e9}".repeat(length))
            .map_err(|_| LmError::new("?".repeat(300)))
    });
    // In JSON each of these characters takes six bytes, and what is around them less than 300.
    let options = LmServerOptions { reply_bytes_max: 2000, ..Default::default() };
    let server = serve_with(lengths, options).await;
    let client = server.client();
    // What a reply repeats doesn't count.
    let fits = format!("{}100", "0".repeat(100_000));
    assert_eq!(client.complete(&request(&fits)).await.unwrap().response.len(), 200);
    let full = "bytes has no room: the answers in a reply have 2000 at most";
    let refused = client.complete(&request("400")).await.unwrap_err().message;
    assert!(refused.starts_with("the answer of 2") && refused.ends_with(full), "{refused}");
    let requests = ["400", "1", "100", "no", "200", "2"].map(request);
    let answers = client.complete_batch(&requests, 1).await;
    let fitting: Vec<_> = answers.iter().map(Result::is_ok).collect();
    assert_eq!(fitting, [false, true, true, false, false, true]);
    let message = &answers[4].as_ref().unwrap_err().message;
    assert!(message.starts_with("llm() call failed - the answer of 1"), "{message}");
    assert!(message.ends_with(full), "{message}");
    server.stop().await;
}

#[tokio::test]
async fn requests_wait_for_room() {
    let (asked, big) = (frame(r#"{"prompt": "a"}"#), 1000);
    let options =
        LmServerOptions { request_bytes_max: big, arriving_bytes_max: big, ..Default::default() };
    let handler = Hanging::default();
    let server = serve_with(handler.clone(), options).await;
    let mut unsent = server.connect().await;
    unsent.write_all(&1000_u32.to_be_bytes()).await.unwrap();
    // The header has arrived when the room is taken, which nobody tells.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        let mut stream = server.connect().await;
        stream.write_all(&asked).await.unwrap();
        streams.push(stream);
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(handler.0.load(Ordering::SeqCst), 0);
    drop(unsent);
    handler.reaches(3).await;
    // What is read and waits for its answer takes no room.
    let mut stream = server.connect().await;
    let whole = format!(r#"{{"prompt": "{}"}}"#, "x".repeat(big - 14));
    assert_eq!(whole.len(), big);
    stream.write_all(&frame(&whole)).await.unwrap();
    handler.reaches(4).await;
    server.stop().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_loses_its_reply() {
    let send_timeout = Duration::from_millis(50);
    let options = LmServerOptions { send_timeout, connections_max: 1, ..Default::default() };
    let long = ScriptedHandler::from_fn(|request| match &*request.prompt.to_text() {
        "long" => Ok("x".repeat(32 << 20)),
        _ => Ok("short".into()),
    });
    let server = serve_with(long, options).await;
    let mut stuck = server.connect().await;
    stuck.write_all(&frame(r#"{"prompt": "long"}"#)).await.unwrap();
    // There is room for one connection: this is answered when the other was given up.
    let answer = within(async { server.client().complete(&request("a")).await }).await;
    assert_eq!(answer.unwrap().response, "short");
    let mut received = Vec::new();
    let _ = within(stuck.read_to_end(&mut received)).await;
    assert!(received.len() < 32 << 20, "{}", received.len());
    server.stop().await;
}

#[tokio::test]
async fn connections_beyond_the_maximum_wait() {
    let options = LmServerOptions { connections_max: 2, ..Default::default() };
    let server = serve_with(Mock, options).await;
    let first = server.connect().await;
    let second = server.connect().await;
    let client = server.client();
    let asked = request("a");
    let mut call = client.complete(&asked);
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut call).await.is_err());
    drop(first);
    assert_eq!(within(call).await.unwrap().response, "\u{e9}:a");
    drop(second);
    server.stop().await;
}

/// Notes how many calls there were at once.
#[derive(Default)]
struct Peak {
    now: AtomicUsize,
    peak: Arc<AtomicUsize>,
}

#[async_trait]
impl LmHandler for Peak {
    async fn complete(&self, _: &LmRequest) -> Result<LmCompletion, LmError> {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.peak.fetch_max(now, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(5)).await;
        self.now.fetch_sub(1, Ordering::SeqCst);
        Ok(LmCompletion::default())
    }
}

#[tokio::test]
async fn batches_are_bounded_in_length_and_concurrency() {
    let few = LmServerOptions { batch_concurrency: 3, prompts_max: 20, ..Default::default() };
    for (options, expected) in [(LmServerOptions::default(), 16), (few.clone(), 3)] {
        let handler = Peak::default();
        let peak = Arc::clone(&handler.peak);
        let server = serve_with(handler, options).await;
        let prompts = vec![request("a"); 20];
        let answers = server.client().complete_batch(&prompts, 1).await;
        assert!(answers.len() == 20 && answers.iter().all(Result::is_ok));
        assert_eq!(peak.load(Ordering::SeqCst), expected);
        server.stop().await;
    }
    let server = serve_with(Mock, few).await;
    let answers = server.client().complete_batch(&vec![request("a"); 21], 1).await;
    for answer in answers {
        assert_eq!(answer.unwrap_err().message, "21 prompts in one request; at most 20 fit");
    }
    server.stop().await;
}

#[tokio::test]
async fn a_token_is_asked_for_and_never_shown() {
    let token = || LmToken::new(TOKEN).unwrap();
    let options = LmServerOptions { token: Some(token()), ..Default::default() };
    let server = serve_with(Mock, options.clone()).await;
    let wrong = error("Unauthorized: the request's 'token' is not this server's");
    let none = error("Unauthorized: this server wants a 'token' in each request");
    for (payload, expected) in [
        (r#"{"prompt": "a"}"#.to_owned(), none.clone()),
        // Whoever has no token learns nothing of the rest.
        (r#"{"prompts": 7, "depth": "x"}"#.to_owned(), none.clone()),
        (r#"{"prompt": "a", "token": null}"#.to_owned(), wrong.clone()),
        (r#"{"prompt": "a", "token": [1]}"#.to_owned(), wrong.clone()),
        (r#"{"prompt": "a", "token": ""}"#.to_owned(), wrong.clone()),
        (format!(r#"{{"prompt": "a", "token": "{TOKEN} "}}"#), wrong.clone()),
        (
            format!(r#"{{"prompt": "a", "depth": 1, "token": "{TOKEN}"}}"#),
            single(&completion("sub", "a", "1.5e-06")),
        ),
    ] {
        assert_eq!(server.ask(&payload).await, expected, "{payload}");
    }
    let client = server.client();
    let refused = client.complete(&request("a")).await.unwrap_err();
    assert_eq!(refused.message, "Unauthorized: this server wants a 'token' in each request");
    let client = client.with_token(token());
    assert_eq!(client.complete(&request("a")).await.unwrap().response, "\u{e9}:a");
    let answers = client.complete_batch(&[request("a"), request("boom")], 1).await;
    assert_eq!([answers[0].is_ok(), answers[1].is_ok()], [true, false]);
    server.stop().await;
    let exposed = LmServer::bind("0.0.0.0:0", Arc::new(Mock), options.clone()).await.unwrap();
    for shown in [format!("{options:?}"), format!("{client:?}"), format!("{exposed:?}")] {
        assert!(!shown.contains(TOKEN) && shown.contains("hidden"), "{shown}");
    }
}

#[tokio::test]
async fn what_cannot_be_served_is_refused_with_a_remedy() {
    let options = LmServerOptions::default;
    for (address, options, expected) in [
        ("0.0.0.0:0", options(), "set a token, or listen at 127.0.0.1"),
        ("[::]:0", options(), "set a token, or listen at 127.0.0.1"),
        ("[::ffff:10.0.0.1]:0", options(), "set a token, or listen at 127.0.0.1"),
        ("127.0.0.1", options(), "write HOST:PORT, for example 127.0.0.1:0"),
        ("127.0.0.1:65536", options(), "write HOST:PORT, for example 127.0.0.1:0"),
        (
            "127.0.0.1:0",
            LmServerOptions { connections_max: 0, ..options() },
            "connections_max: it must be more than 0",
        ),
        (
            "127.0.0.1:0",
            LmServerOptions { answer_timeout: Duration::ZERO, ..options() },
            "answer_timeout: it must be more than 0",
        ),
        (
            "127.0.0.1:0",
            LmServerOptions { request_bytes_max: 2 << 30, ..options() },
            "1073741824 bytes are less than one request may have; take 2147483648 or more",
        ),
    ] {
        let error = LmServer::bind(address, Arc::new(Mock), options).await.unwrap_err();
        assert!(matches!(error, kaa::Error::Invalid { .. }), "{error:?}");
        assert!(error.to_string().ends_with(expected), "{error}");
    }
    let taken = LmServer::bind("127.0.0.1:0", Arc::new(Mock), options()).await.unwrap();
    let address = taken.local_addr().to_string();
    let error = LmServer::bind(&address, Arc::new(Mock), options()).await.unwrap_err();
    assert!(error.to_string().starts_with(&format!("listening at {address}: ")), "{error}");
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_call_along() {
    let handler = Hanging::default();
    let server = serve(handler.clone()).await;
    for payload in [r#"{"prompt": "a"}"#, r#"{"prompts": ["a"]}"#] {
        let mut stream = server.connect().await;
        // What follows the request doesn't hide that the client leaves.
        let bytes = [frame(payload), vec![b'x'; 100_000]].concat();
        stream.write_all(&bytes).await.unwrap();
        handler.reaches(1).await;
        drop(stream);
        handler.reaches(0).await;
    }
    // One that only stops sending can't be told apart.
    let mut stream = server.connect().await;
    stream.write_all(&frame(r#"{"prompt": "a"}"#)).await.unwrap();
    handler.reaches(1).await;
    stream.shutdown().await.unwrap();
    handler.reaches(0).await;
    assert_eq!(within(stream.read(&mut [0])).await.unwrap(), 0);

    let calls: Vec<_> = (0..100)
        .map(|_| {
            let client = server.client();
            tokio::spawn(async move { client.complete(&request("a")).await })
        })
        .collect();
    handler.reaches(100).await;
    calls.iter().for_each(JoinHandle::abort);
    handler.reaches(0).await;
    server.stop().await;
}

#[tokio::test]
async fn a_server_that_ends_leaves_nothing_behind() {
    for dropped in [false, true] {
        let handler = Hanging::default();
        let server = serve(handler.clone()).await;
        let mut streams = Vec::new();
        for _ in 0..100 {
            let mut stream = server.connect().await;
            stream.write_all(&frame(r#"{"prompt": "a"}"#)).await.unwrap();
            streams.push(stream);
        }
        // One that asks nothing.
        streams.push(server.connect().await);
        handler.reaches(100).await;
        let address = server.address;
        if dropped {
            server.serving.abort();
            assert!(server.serving.await.unwrap_err().is_cancelled());
            handler.reaches(0).await;
        } else {
            server.stop().await;
            assert_eq!(handler.0.load(Ordering::SeqCst), 0);
        }
        assert!(TcpStream::connect(address).await.is_err());
        for mut stream in streams {
            assert!(matches!(within(stream.read(&mut [0])).await, Ok(0) | Err(_)));
        }
    }
}

#[tokio::test]
async fn a_handler_that_panics_costs_one_reply() {
    let handler = ScriptedHandler::from_fn(|request| match &*request.prompt.to_text() {
        "panic" => panic!("as the test wants it"),
        _ => Ok("fine".into()),
    });
    let server = serve(handler).await;
    assert!(server.client().complete(&request("panic")).await.is_err());
    assert_eq!(server.client().complete(&request("a")).await.unwrap().response, "fine");
    server.stop().await;
}

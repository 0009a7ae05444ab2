//! A chat completions server on the loopback: OpenAI's and Anthropic's formats, and their failures.
//!
//! It needs only dev-dependencies and nothing of the other tests, so that examples and benchmarks can
//! use it too: `#[path = "../tests/common/chat_server.rs"] mod chat_server;`. It runs on a thread of its
//! own; dropping it ends everything.

#![allow(dead_code, reason = "every user of this needs a part of it")]

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::thread;
use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, LOCATION, RETRY_AFTER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value as Json, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;
use tokio::time::Sleep;

/// Requests that are kept for a look at them, the newest.
const RECORDED_MAX: usize = 1024;
const CHUNK_BYTES: usize = 64 << 10;

/// How a server behaves before it comes to what it answers.
#[derive(Debug, Clone, Default)]
pub(crate) struct ChatOptions {
    /// How long every answer takes.
    pub(crate) latency: Duration,
    /// At most so much is added to it; how much depends on the request's number alone.
    pub(crate) jitter: Duration,
    /// More requests at once than this get 429.
    pub(crate) in_flight_max: Option<u64>,
    /// More requests in a second than this get 429.
    pub(crate) per_second_max: Option<u64>,
    /// The header `Retry-After` of those 429s, if any.
    pub(crate) retry_after: Option<String>,
    /// Whether [`ChatServer::requests`] keeps the newest requests.
    pub(crate) record: bool,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct ChatRequest {
    /// How many came before.
    pub(crate) number: u64,
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    /// The body; null if it's no JSON.
    pub(crate) body: Json,
}

impl ChatRequest {
    /// The text of the last message, or of its first part.
    pub(crate) fn prompt(&self) -> &str {
        let last = self.body["messages"].as_array().and_then(|messages| messages.last());
        let content = last.map(|message| &message["content"]);
        let text = content.and_then(|content| content.as_str().or(content[0]["text"].as_str()));
        text.unwrap_or_default()
    }

    fn is_anthropic(&self) -> bool {
        self.path.ends_with("/messages")
    }
}

/// What a request gets.
#[derive(Debug, Clone)]
pub(crate) enum Reply {
    /// An answer in the form of the provider whose path was asked.
    Text(String),
    /// This status, these headers and this body.
    Raw(u16, Vec<(&'static str, String)>, String),
    /// Nothing, ever.
    Hang,
    /// This status and these headers, and then never the body.
    HangingBody(u16, Vec<(&'static str, String)>),
    /// The connection is reset.
    Reset,
    /// Half of an answer, then the connection closes.
    HalfBody,
    /// An answer of so many bytes; with or without its length in the header.
    Huge { bytes: u64, declared: bool },
    /// An answer that comes byte by byte, each after this time.
    Drip(String, Duration),
    /// A redirect to there.
    Redirect(String),
}

impl Reply {
    /// This status with an error as OpenAI words it.
    pub(crate) fn error(status: u16, message: &str) -> Self {
        Self::Raw(status, Vec::new(), json!({ "error": { "message": message } }).to_string())
    }
}

impl From<String> for Reply {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&str> for Reply {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

/// What a server has counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) requests: u64,
    pub(crate) in_flight: u64,
    pub(crate) in_flight_max: u64,
    pub(crate) connections: u64,
    /// Requests whose client went away before the answer was sent.
    pub(crate) cancelled: u64,
    pub(crate) rate_limited: u64,
}

type Answer = dyn Fn(&ChatRequest) -> Reply + Send + Sync;

struct State {
    options: ChatOptions,
    answer: Box<Answer>,
    requests: AtomicU64,
    in_flight: AtomicU64,
    in_flight_max: AtomicU64,
    connections: AtomicU64,
    cancelled: AtomicU64,
    rate_limited: AtomicU64,
    second: Mutex<(Instant, u64)>,
    recorded: Mutex<VecDeque<ChatRequest>>,
}

/// A running server.
pub(crate) struct ChatServer {
    address: SocketAddr,
    state: Arc<State>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl ChatServer {
    /// Starts a server that answers with what `answer` makes of each request.
    pub(crate) fn start<R: Into<Reply>>(
        options: ChatOptions,
        answer: impl Fn(&ChatRequest) -> R + Send + Sync + 'static,
    ) -> Self {
        let state = Arc::new(State {
            options,
            answer: Box::new(move |request| answer(request).into()),
            requests: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            in_flight_max: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            cancelled: AtomicU64::new(0),
            rate_limited: AtomicU64::new(0),
            second: Mutex::new((Instant::now(), 0)),
            recorded: Mutex::new(VecDeque::new()),
        });
        // Bound here, so that the address is known; connections wait until the thread runs.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let serving = Arc::clone(&state);
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let listener = TcpListener::from_std(listener).unwrap();
                tokio::select! {
                    () = serve(&listener, &serving) => {}
                    _ = stopped => {}
                }
            });
        });
        Self { address, state, stop: Some(stop), thread: Some(thread) }
    }

    /// A server without latency that sends each prompt back.
    pub(crate) fn echo() -> Self {
        Self::start(ChatOptions::default(), |request| request.prompt().to_owned())
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The base URL for clients of OpenAI's interface.
    pub(crate) fn openai_url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// The base URL for clients of Anthropic's interface.
    pub(crate) fn anthropic_url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        Counts {
            requests: read(&self.state.requests),
            in_flight: read(&self.state.in_flight),
            in_flight_max: read(&self.state.in_flight_max),
            connections: read(&self.state.connections),
            cancelled: read(&self.state.cancelled),
            rate_limited: read(&self.state.rate_limited),
        }
    }

    /// The newest requests, oldest first; empty unless they are recorded.
    pub(crate) fn requests(&self) -> Vec<ChatRequest> {
        self.state.recorded.lock().unwrap().iter().cloned().collect()
    }

    /// Waits until the counts are as wanted; panics after ten seconds with what they are.
    pub(crate) async fn until(&self, wanted: impl Fn(&Counts) -> bool) -> Counts {
        let start = Instant::now();
        loop {
            let counts = self.counts();
            if wanted(&counts) {
                return counts;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "{counts:?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl Drop for ChatServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the server has been printed by its thread.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for ChatServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatServer").field("address", &self.address).finish_non_exhaustive()
    }
}

async fn serve(listener: &TcpListener, state: &Arc<State>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    state.connections.fetch_add(1, Ordering::SeqCst);
                    connections.spawn(converse(stream, Arc::clone(state)));
                }
                // Out of file descriptors: wait for some to come back.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Serves one connection to its end.
async fn converse(stream: TcpStream, state: Arc<State>) {
    let _ = stream.set_nodelay(true);
    let reset = Arc::new(Notify::new());
    let service = service_fn({
        let reset = Arc::clone(&reset);
        // Boxed, so that the connection can be moved and taken apart.
        move |request| -> Pin<Box<dyn Future<Output = _> + Send>> {
            Box::pin(respond(request, Arc::clone(&state), Arc::clone(&reset)))
        }
    });
    let mut connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        _ = &mut connection => {}
        () = reset.notified() => {
            let stream = connection.into_parts().io.into_inner();
            let _ = stream.set_zero_linger();
        }
    }
}

/// A request that is being answered.
struct InFlight {
    state: Arc<State>,
    done: bool,
}

impl InFlight {
    fn new(state: Arc<State>) -> Self {
        let now = state.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        state.in_flight_max.fetch_max(now, Ordering::SeqCst);
        Self { state, done: false }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.state.in_flight.fetch_sub(1, Ordering::SeqCst);
        if !self.done {
            self.state.cancelled.fetch_add(1, Ordering::SeqCst);
        }
    }
}

async fn respond(
    request: Request<Incoming>,
    state: Arc<State>,
    reset: Arc<Notify>,
) -> Result<Response<ChatBody>, Infallible> {
    let mut guard = InFlight::new(Arc::clone(&state));
    let number = state.requests.fetch_add(1, Ordering::SeqCst);
    let (head, body) = request.into_parts();
    let bytes = match body.collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => Bytes::new(),
    };
    let request = ChatRequest {
        number,
        path: head.uri.path().to_owned(),
        headers: head.headers,
        body: serde_json::from_slice(&bytes).unwrap_or_default(),
    };
    if state.options.record {
        let mut recorded = state.recorded.lock().unwrap();
        if recorded.len() == RECORDED_MAX {
            recorded.pop_front();
        }
        recorded.push_back(request.clone());
    }
    if !["/chat/completions", "/messages"].iter().any(|path| request.path.ends_with(path)) {
        return Ok(whole(404, &[], format!("no such path: {}", request.path), guard));
    }
    if is_over_rate(&state) {
        state.rate_limited.fetch_add(1, Ordering::SeqCst);
        let after = state.options.retry_after.iter();
        let headers: Vec<_> = after.map(|after| (RETRY_AFTER.as_str(), after.clone())).collect();
        let body = json!({ "error": { "message": "too many requests" } }).to_string();
        return Ok(whole(429, &headers, body, guard));
    }
    let latency = latency(&state.options, number);
    if !latency.is_zero() {
        tokio::time::sleep(latency).await;
    }
    Ok(match (state.answer)(&request) {
        Reply::Text(text) => whole(200, &[], completion(&request, &text), guard),
        Reply::Raw(status, headers, body) => whole(status, &headers, body, guard),
        Reply::Redirect(to) => whole(307, &[(LOCATION.as_str(), to)], String::new(), guard),
        Reply::Hang => std::future::pending().await,
        Reply::HangingBody(status, headers) => {
            response(status, &headers, Some(100), Source::Never, guard)
        }
        Reply::Reset => {
            guard.done = true;
            drop(guard);
            reset.notify_one();
            std::future::pending().await
        }
        Reply::HalfBody => {
            let text = completion(&request, "the half of this is lost");
            let half = Bytes::copy_from_slice(&text.as_bytes()[..text.len() / 2]);
            // A moment, in which the first half gets out.
            let sleep = Box::pin(tokio::time::sleep(Duration::from_millis(20)));
            response(200, &[], Some(text.len() as u64), Source::Half(Some(half), sleep), guard)
        }
        Reply::Huge { bytes, declared } => {
            let source = Source::Huge { chunk: vec![b'a'; CHUNK_BYTES].into(), left: bytes };
            response(200, &[], declared.then_some(bytes), source, guard)
        }
        Reply::Drip(text, every) => {
            let bytes = completion(&request, &text).into();
            let length = Bytes::len(&bytes) as u64;
            let sleep = Box::pin(tokio::time::sleep(every));
            response(200, &[], Some(length), Source::Drip { bytes, every, sleep }, guard)
        }
    })
}

fn is_over_rate(state: &State) -> bool {
    let in_flight = state.in_flight.load(Ordering::SeqCst);
    if state.options.in_flight_max.is_some_and(|most| in_flight > most) {
        return true;
    }
    let Some(most) = state.options.per_second_max else { return false };
    let mut second = state.second.lock().unwrap();
    if second.0.elapsed() >= Duration::from_secs(1) {
        *second = (Instant::now(), 0);
    }
    second.1 += 1;
    second.1 > most
}

/// The latency of the request of this number.
fn latency(options: &ChatOptions, number: u64) -> Duration {
    // The finisher of SplitMix64: numbers that follow each other give parts that don't.
    let mut mixed = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let part = (mixed >> 40) as f64 / (1u64 << 24) as f64;
    options.latency + options.jitter.mul_f64(part)
}

/// An answer as the provider words it. Its tokens are words, so that no estimate hits them by chance.
fn completion(request: &ChatRequest, text: &str) -> String {
    let input = request.prompt().split_whitespace().count();
    let output = text.split_whitespace().count();
    let model = &request.body["model"];
    let number = request.number;
    if request.is_anthropic() {
        return json!({
            "id": format!("msg_{number}"), "type": "message", "role": "assistant", "model": model,
            "content": [{ "type": "text", "text": text }], "stop_reason": "end_turn",
            "usage": { "input_tokens": input, "output_tokens": output },
        })
        .to_string();
    }
    json!({
        "id": format!("chatcmpl-{number}"), "object": "chat.completion", "created": 0, "model": model,
        "choices": [{
            "index": 0, "message": { "role": "assistant", "content": text }, "finish_reason": "stop"
        }],
        "usage": {
            "prompt_tokens": input, "completion_tokens": output, "total_tokens": input + output
        },
    })
    .to_string()
}

fn whole(
    status: u16,
    headers: &[(&'static str, String)],
    body: String,
    guard: InFlight,
) -> Response<ChatBody> {
    let bytes = Bytes::from(body);
    let length = bytes.len() as u64;
    response(status, headers, Some(length), Source::Whole(Some(bytes)), guard)
}

fn response(
    status: u16,
    headers: &[(&'static str, String)],
    length: Option<u64>,
    source: Source,
    mut guard: InFlight,
) -> Response<ChatBody> {
    // A body without bytes is never asked for them.
    guard.done |= length == Some(0);
    let mut response = Response::builder().status(status);
    if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-type")) {
        response = response.header(CONTENT_TYPE, "application/json");
    }
    for (name, value) in headers {
        response = response.header(*name, value);
    }
    if let Some(length) = length {
        response = response.header(CONTENT_LENGTH, length);
    }
    response.body(ChatBody { source, length, guard }).unwrap()
}

/// The body of an answer; its request is in flight as long as it is.
struct ChatBody {
    source: Source,
    length: Option<u64>,
    guard: InFlight,
}

enum Source {
    Whole(Option<Bytes>),
    Never,
    Half(Option<Bytes>, Pin<Box<Sleep>>),
    Huge { chunk: Bytes, left: u64 },
    Drip { bytes: Bytes, every: Duration, sleep: Pin<Box<Sleep>> },
}

impl Body for ChatBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        let (next, is_last) = match &mut this.source {
            Source::Whole(bytes) => (bytes.take().filter(|bytes| !bytes.is_empty()), true),
            Source::Never => return Poll::Pending,
            Source::Half(half, sleep) => match half.take() {
                Some(half) => (Some(half), false),
                None if sleep.as_mut().poll(context).is_pending() => return Poll::Pending,
                None => {
                    this.guard.done = true;
                    return Poll::Ready(Some(Err(std::io::Error::other("the other half is lost"))));
                }
            },
            Source::Huge { chunk, left } => {
                let now = (*left).min(chunk.len() as u64);
                *left -= now;
                ((now > 0).then(|| chunk.slice(..now as usize)), *left == 0)
            }
            Source::Drip { bytes, every, sleep } => {
                if sleep.as_mut().poll(context).is_pending() {
                    return Poll::Pending;
                }
                sleep.as_mut().reset(tokio::time::Instant::now() + *every);
                let next = (!bytes.is_empty()).then(|| bytes.split_to(1));
                (next, bytes.is_empty())
            }
        };
        this.guard.done |= is_last;
        Poll::Ready(next.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

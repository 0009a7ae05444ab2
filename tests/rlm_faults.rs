//! Models that fail and calls that are cancelled, end to end: cells ask over HTTP, and over the LM
//! handler's socket.
//!
//! The failures guarded against: a fault of a server becomes an exception in the cell, or ends the run;
//! and a cell that is stopped with calls in flight leaves calls, connections, tasks or quota behind.

mod common;

#[path = "common/chat_server.rs"]
mod chat_server;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chat_server::{ChatOptions, ChatServer, Reply};
use kaa::lm::{
    Budget, BudgetLimits, LmHandler, LmServer, LmServerOptions, ModelRouter, OpenAiHandler,
    Retries, SocketHandler, UpstreamOptions,
};
use kaa::{
    Context, Environment, EnvironmentExt, EnvironmentOptions, Limit, Limits, Outcome, Quotas, Rlm,
    RlmEvent, RlmObserver, RlmOptions, RlmProgress, RlmStop, Tenant, WasmBackend,
};
use serde_json::Value as Json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};

/// Runs one test at a time: descriptors belong to the process, and an executor has some, too.
fn alone(test: impl Future<Output = ()>) {
    static ALONE: Mutex<()> = Mutex::new(());
    // After a test that failed the others are still worth a run.
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut executor = tokio::runtime::Builder::new_multi_thread();
    executor.worker_threads(2).enable_all().build().unwrap().block_on(test);
}

/// Calls of the cells that are stopped.
const CALLS: u32 = 100;
/// When a call fails that gets no answer: longer than any other takes on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Long enough for a busy machine; nothing waits for it when all is well.
const PATIENCE: Duration = Duration::from_secs(20);

/// The way from a cell to the models.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Http,
    Socket,
}

const WAYS: [Way; 2] = [Way::Http, Way::Socket];

/// A server of models, and what asks it.
struct Rig {
    chat: ChatServer,
    lm: Arc<dyn LmHandler>,
    handler: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Rig {
    async fn new(way: Way, chat: ChatServer, timeout: Duration) -> Self {
        let model = |name: &str| {
            let options = UpstreamOptions {
                base_url: Some(chat.openai_url()),
                timeout,
                retries: Retries { max: 1, base: Duration::from_millis(1), ..Retries::default() },
                ..UpstreamOptions::default()
            };
            Arc::new(OpenAiHandler::new(name, options).unwrap())
        };
        let router = ModelRouter::builder()
            .model("root", model("root"))
            .model("m", model("m"))
            .default_from_depth(1, "m")
            .build();
        let router: Arc<dyn LmHandler> = Arc::new(router.unwrap());
        if way == Way::Http {
            return Self { chat, lm: router, handler: None };
        }
        let options =
            LmServerOptions { batch_concurrency: CALLS as usize, ..LmServerOptions::default() };
        let server = LmServer::bind("127.0.0.1:0", router, options).await.unwrap();
        let lm = Arc::new(SocketHandler::new(server.local_addr().to_string()).unwrap());
        let (stop, stopped) = oneshot::channel();
        let serving = tokio::spawn(server.serve(async { drop(stopped.await) }));
        Self { chat, lm, handler: Some((stop, serving)) }
    }

    /// Ends whoever the cells ask.
    async fn close(self) {
        drop(self.lm);
        if let Some((stop, serving)) = self.handler {
            drop(stop);
            serving.await.unwrap();
        }
    }
}

/// A server whose model `m` does what `reply` makes of a prompt, and whose model `root` says these
/// things, one per turn.
fn chat(
    root: Vec<String>,
    reply: impl Fn(&str) -> Option<Reply> + Send + Sync + 'static,
) -> ChatServer {
    ChatServer::start(ChatOptions::default(), move |request| {
        if request.body["model"] == "root" {
            let messages = request.body["messages"].as_array().unwrap().iter();
            let said = messages.filter(|message| message["role"] == "assistant").count();
            return Reply::from(root[said].as_str());
        }
        reply(request.prompt()).unwrap_or_else(|| "fine, thanks".into())
    })
}

/// One that answers everything but `hang`.
fn hanging(root: Vec<String>) -> ChatServer {
    chat(root, |prompt| (prompt == "hang").then_some(Reply::Hang))
}

fn repl(code: &str) -> String {
    format!("```repl\n{code}\n```")
}

async fn print(session: &mut impl Environment, code: &str) -> String {
    let cell = session.execute(code).await.unwrap();
    assert_eq!(cell.outcome, Outcome::Completed, "{code}: {}", cell.stderr.text());
    cell.stdout.text().into_owned()
}

/// Every fault of a model's server, and what it's called.
fn faults(address: SocketAddr) -> Vec<(&'static str, Reply, String)> {
    let raw = |body: &str| Reply::Raw(200, Vec::new(), body.into());
    let headers = |after: &str| vec![("retry-after", after.to_owned())];
    let busy = |after| Reply::Raw(429, headers(after), r#"{"error": "easy"}"#.into());
    let huge = |declared| Reply::Huge { bytes: 64 << 20, declared };
    let too_large = "m: the answer is larger than 16777216 bytes";
    let reset = format!("m: {address} reset the connection (after 2 tries)");
    [
        ("hang", Reply::Hang, "m: no answer within 2s"),
        ("drip", Reply::Drip("x".into(), Duration::from_secs(1)), "m: no answer within 2s"),
        ("reset", Reply::Reset, &reset),
        ("half", Reply::HalfBody, "m: the answer broke off in the middle (after 2 tries)"),
        ("storm", busy("0"), "m: rate limited: HTTP 429: easy (after 2 tries)"),
        (
            "hour",
            busy("3600"),
            "m: rate limited: HTTP 429: easy (the server asks to wait for 3600s; at most 60s are waited)",
        ),
        ("down", Reply::error(503, "down"), "m: HTTP 503: down (after 2 tries)"),
        ("json", raw("{\"choices\": "), "m: the answer is not JSON: EOF while parsing a value"),
        ("html", raw("<html>"), "m: the answer is not JSON: expected value"),
        ("shape", raw("[5]"), "m: the answer has not the form of a completion"),
        ("empty", raw("{}"), "m: the answer has no choices"),
        ("declared", huge(true), too_large),
        ("flood", huge(false), too_large),
    ]
    .map(|(name, reply, text)| (name, reply, text.to_owned()))
    .into()
}

#[test]
fn every_fault_of_a_server_is_a_text_and_the_run_goes_on() {
    alone(async {
        for way in WAYS {
            let any = SocketAddr::from(([127, 0, 0, 1], 0));
            let replies: HashMap<_, _> =
                faults(any).into_iter().map(|(name, reply, _)| (name, reply)).collect();
            let names: Vec<_> = faults(any).into_iter().map(|(name, ..)| name).collect();
            let ask = format!(
                "faults = {names:?}\nalone = [llm_query(fault) for fault in faults]\n\
             together = llm_query_batched(faults + ['ok'])"
            );
            let submit = "import json\n\
             answer['content'] = json.dumps([alone, together, llm_query('ok')])\n\
             answer['ready'] = True";
            let root = vec![repl(&ask), repl(submit)];
            let chat = chat(root, move |prompt| replies.get(prompt).cloned());
            let faults = faults(chat.address());
            let rig = Rig::new(way, chat, TIMEOUT).await;
            let backend = WasmBackend::new(Arc::clone(common::runtime()), common::image("base"));
            let rlm =
                Rlm::new(Arc::new(backend), Arc::clone(&rig.lm), RlmOptions::default()).unwrap();
            let done = rlm.complete(Context::Text(b"x".to_vec()), None).await.unwrap();
            assert_eq!(done.turns, 2);
            let (alone, together, after): (Vec<String>, Vec<String>, String) =
                serde_json::from_str(&done.response).unwrap();
            for (i, (name, _, text)) in faults.iter().enumerate() {
                let (alone, together) = (&alone[i], &together[i]);
                assert!(alone.starts_with(&format!("Error: {text}")), "{way:?} {name}: {alone}");
                let text = format!("Error: llm() call failed - {text}");
                assert!(together.starts_with(&text), "{way:?} {name}: {together}");
                assert!(together.len() < 700, "{way:?} {name}: {} bytes", together.len());
            }
            assert_eq!(
                (together[faults.len()].as_str(), after.as_str()),
                ("fine, thanks", "fine, thanks")
            );
            rig.chat.until(|counts| counts.in_flight == 0).await;
            rig.close().await;
        }
    });
}

/// What a broken handler sends to who asks for `fault`, after which it closes.
async fn misbehave(mut stream: TcpStream) -> std::io::Result<()> {
    let length = stream.read_u32().await?;
    let mut request = vec![0; length as usize];
    stream.read_exact(&mut request).await?;
    let request: Json = serde_json::from_slice(&request).unwrap();
    let prompt = &request["prompt"];
    let fault = prompt.as_str().or(request["prompts"][0].as_str()).unwrap();
    let deep = format!(r#"{{"chat_completion": {}"#, "[".repeat(100_000));
    let reply: &str = match fault {
        "hang" => std::future::pending().await,
        "reset" => return stream.set_zero_linger(),
        "gone" => return Ok(()),
        "half" => return stream.write_all(b"\0\0\0\x63{\"chat").await,
        "endless" => {
            stream.write_u32(200 << 20).await?;
            return std::future::pending().await;
        }
        "no json" => "nonsense",
        "list" => "[1]",
        "shape" => r#"{"chat_completion": 5, "chat_completions": 5}"#,
        "deep" => &deep,
        "refused" => r#"{"error": "not today"}"#,
        "large" => {
            let text = "a".repeat(63 << 20);
            let one = format!(r#"{{"root_model": "m", "response": "{text}"}}"#);
            let reply = match prompt.is_null() {
                true => format!(r#"{{"chat_completions": [{one}]}}"#),
                false => format!(r#"{{"chat_completion": {one}}}"#),
            };
            stream.write_u32(reply.len() as u32).await?;
            return stream.write_all(reply.as_bytes()).await;
        }
        other => panic!("no fault is called {other:?}"),
    };
    stream.write_u32(reply.len() as u32).await?;
    stream.write_all(reply.as_bytes()).await
}

/// A server of the handler's protocol that breaks it.
async fn broken_handler() -> (SocketHandler, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serving = tokio::spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            // A client that leaves early is part of the test.
            connections.spawn(async { drop(misbehave(stream).await) });
        }
    });
    (SocketHandler::new(address).unwrap().with_timeout(TIMEOUT), serving)
}

#[test]
fn every_fault_of_a_handler_is_a_text() {
    alone(async {
        let (lm, serving) = broken_handler().await;
        let unread = "Request failed: the reply can't be read: ";
        let cases = [
            ("hang", "Request failed: timed out after 2s", None),
            ("reset", "Request failed: [Errno ", None),
            // In the words of RLM's client.
            (
                "gone",
                "LM query failed - 'NoneType' object has no attribute 'response'",
                Some("No completions returned"),
            ),
            ("half", "Request failed: Connection closed before message complete", None),
            (
                "endless",
                "Request failed: a frame of 209715200 bytes exceeds the maximum of 134217",
                None,
            ),
            ("no json", unread, None),
            ("list", unread, None),
            ("shape", unread, None),
            ("deep", unread, None),
            ("refused", "not today", None),
        ];
        let lm: Arc<dyn LmHandler> = Arc::new(lm);
        let options =
            EnvironmentOptions { lm: Some(Arc::clone(&lm)), ..EnvironmentOptions::default() };
        let mut session = common::open(options);
        print(&mut session, "import json").await;
        for (name, alone, together) in cases {
            let code = format!(
                "print(json.dumps([llm_query({name:?}), *llm_query_batched([{name:?}] * 2)]), end='')"
            );
            let said: [String; 3] =
                serde_json::from_str(&print(&mut session, &code).await).unwrap();
            let together = together.unwrap_or(alone);
            for (said, expected) in said.iter().zip([alone, together, together]) {
                assert!(said.starts_with(&format!("Error: {expected}")), "{name}: {said}");
                assert!(said.len() < 700, "{name}: {} bytes", said.len());
            }
        }
        // What fits under the limit of the client comes whole.
        let code = "print(len(llm_query('large')), len(llm_query_batched(['large'])[0]))";
        assert_eq!(print(&mut session, code).await, "66060288 66060288\n");
        // What doesn't fit into the session's memory costs the call, and not the session.
        let limits = Limits { memory_bytes: 96 << 20, ..Limits::default() };
        let mut small =
            common::open(EnvironmentOptions { lm: Some(lm), limits, ..Default::default() });
        for ask in ["llm_query('large')", "llm_query_batched(['large'])[0]"] {
            let said = print(&mut small, &format!("print({ask}[:100])")).await;
            assert!(said.starts_with("Error: LM query failed - "), "{ask}: {said}");
        }
        assert_eq!(print(&mut small, "print(llm_query('refused'))").await, "Error: not today\n");
        serving.abort();
    });
}

#[test]
fn a_cell_outlives_whoever_it_asks() {
    alone(async {
        for way in WAYS {
            let rig = Rig::new(way, hanging(Vec::new()), PATIENCE).await;
            let limits = Limits { lm_concurrency: CALLS, ..Limits::default() };
            let lm = Some(Arc::clone(&rig.lm));
            let mut session =
                common::open(EnvironmentOptions { lm, limits, ..EnvironmentOptions::default() });
            let code = format!(
                "said = llm_query_batched(['hang'] * {CALLS})\n\
             said += [llm_query('ok'), *llm_query_batched(['ok'] * 2)]\n\
             print(len(said), [text for text in said if not text.startswith('Error: ')])\n\
             print(said[0], said[-3], said[-1], sep='\\n')"
            );
            let cell = tokio::spawn(async move {
                let printed = print(&mut session, &code).await;
                (session, printed)
            });
            rig.chat.until(|counts| counts.in_flight == u64::from(CALLS)).await;
            let Rig { chat, lm, handler } = rig;
            let (first, alone, together) = match handler {
                Some((stop, serving)) => {
                    drop(stop);
                    serving.await.unwrap();
                    // The handler's end is the end of its calls, too.
                    chat.until(|counts| counts.in_flight == 0).await;
                    let refused = "Request failed: [Errno ".to_owned();
                    ("No completions returned".to_owned(), refused.clone(), refused)
                }
                None => {
                    let refused =
                        format!("m: no connection to {}: connection refused", chat.address());
                    drop(chat);
                    let failed = "llm() call failed - ";
                    (format!("{failed}{refused}"), refused.clone(), format!("{failed}{refused}"))
                }
            };
            let (mut session, printed) = cell.await.unwrap();
            let lines: Vec<_> = printed.lines().collect();
            assert_eq!(lines[0], format!("{} []", CALLS + 3), "{way:?}: {printed}");
            for (line, expected) in lines[1..].iter().zip([first, alone, together]) {
                assert!(line.starts_with(&format!("Error: {expected}")), "{way:?}: {line}");
            }
            assert_eq!(print(&mut session, "print(len(said))").await, "103\n");
            drop(lm);
        }
    });
}

/// What the process and its executor hold: tasks, and descriptors where they can be counted.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Held {
    tasks: usize,
    descriptors: usize,
}

impl Held {
    fn now() -> Self {
        let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
        let descriptors = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        Self { tasks, descriptors }
    }

    /// Waits until no task is left, so that none is taken for one that may stay.
    async fn at_rest() -> Self {
        Self { tasks: 0, descriptors: usize::MAX }.returns("before").await;
        Self::now()
    }

    /// Waits until no more is held than this.
    async fn returns(self, what: &str) {
        let start = Instant::now();
        loop {
            let now = Self::now();
            if now.tasks <= self.tasks && now.descriptors <= self.descriptors {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{what}: {now:?}, before {self:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// How a cell with calls in flight is stopped.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Stop {
    /// From outside.
    Interrupt,
    /// By a limit of time.
    Wall,
    /// By dropping its future.
    Dropped,
}

const STOPS: [Stop; 3] = [Stop::Interrupt, Stop::Wall, Stop::Dropped];
/// Long enough for all calls to be sent.
const WALL: Duration = Duration::from_secs(3);

/// A tenant that may have just so many calls in flight.
fn tenant(name: &str) -> Tenant {
    let quotas = Quotas { lm_concurrency: CALLS, ..Quotas::default() };
    common::runtime().tenant(name, quotas).unwrap()
}

fn environment(tenant: &Tenant) -> EnvironmentOptions {
    EnvironmentOptions {
        tenant: Some(tenant.clone()),
        limits: Limits { lm_concurrency: CALLS, ..Limits::default() },
        ..EnvironmentOptions::default()
    }
}

async fn stop_a_cell(rig: &Rig, tenant: &Tenant, stop: Stop) {
    let budget = Budget::new(BudgetLimits::default()).unwrap();
    let mut options = environment(tenant);
    options.lm = Some(budget.handler(Arc::clone(&rig.lm)));
    if stop == Stop::Wall {
        options.limits.wall = WALL;
    }
    let mut session = common::open(options);
    assert_eq!(print(&mut session, "x = 5\nprint(llm_query('ok'))").await, "fine, thanks\n");
    let ready = Held::now();
    let code = format!("x = 6\nllm_query_batched(['hang'] * {CALLS})");
    let handle = session.interrupt();
    let all_sent = rig.chat.until(|counts| counts.in_flight == u64::from(CALLS));
    let execution = match stop {
        Stop::Dropped => {
            tokio::select! {
                execution = session.execute(&code) => panic!("{execution:?}"),
                _ = all_sent => None,
            }
        }
        Stop::Interrupt | Stop::Wall => {
            let watch = async {
                all_sent.await;
                assert_eq!(budget.spent().in_flight, CALLS);
                if stop == Stop::Interrupt {
                    handle.interrupt();
                }
            };
            let (execution, ()) = tokio::join!(session.execute(&code), watch);
            Some(execution.unwrap())
        }
    };
    let limit = execution.and_then(|execution| execution.limit);
    let expected = match stop {
        Stop::Interrupt => Some(Limit::Interrupt),
        Stop::Wall => Some(Limit::Wall),
        Stop::Dropped => None,
    };
    assert_eq!(limit, expected, "{stop:?}");
    let counts = rig.chat.until(|counts| counts.in_flight == 0).await;
    assert_eq!(counts.cancelled, u64::from(CALLS), "{stop:?}");
    assert_eq!(budget.spent().in_flight, 0, "{stop:?}");
    let usage = tenant.usage();
    assert_eq!((usage.sessions, usage.cells_running, usage.cells_waiting), (1, 0, 0), "{stop:?}");
    ready.returns(&format!("after {stop:?}")).await;
    // The session goes on, and the tenant can have as many calls in flight as before.
    let code = format!("print(x, llm_query_batched(['ok'] * {CALLS}).count('fine, thanks'))");
    let x = if stop == Stop::Dropped { 5 } else { 6 };
    assert_eq!(print(&mut session, &code).await, format!("{x} {CALLS}\n"), "{stop:?}");
}

#[test]
fn a_cell_that_is_stopped_takes_its_calls_along() {
    alone(async {
        let tenant = tenant("stopped cells");
        // What the first session opens for all.
        print(&mut common::open(environment(&tenant)), "print()").await;
        let before = Held::at_rest().await;
        for way in WAYS {
            for stop in STOPS {
                let rig = Rig::new(way, hanging(Vec::new()), PATIENCE).await;
                stop_a_cell(&rig, &tenant, stop).await;
                assert_eq!(tenant.usage().sessions, 0, "{way:?} {stop:?}");
                rig.close().await;
                before.returns(&format!("{way:?} {stop:?}")).await;
            }
        }
    });
}

/// Keeps how far a run is.
#[derive(Default)]
struct Progress(Mutex<RlmProgress>);

impl RlmObserver for Progress {
    fn event(&self, _: RlmEvent<'_>, progress: &RlmProgress) {
        *self.0.lock().unwrap() = *progress;
    }
}

async fn stop_a_run(rig: &Rig, tenant: &Tenant, stop: Stop) {
    let progress = Arc::new(Progress::default());
    let wall = if stop == Stop::Wall { WALL } else { BudgetLimits::default().wall };
    let options = RlmOptions {
        environment: environment(tenant),
        budget: BudgetLimits { wall, ..BudgetLimits::default() },
        observer: Some(Arc::clone(&progress) as _),
        ..RlmOptions::default()
    };
    let backend = WasmBackend::new(Arc::clone(common::runtime()), common::image("base"));
    let rlm = Rlm::new(Arc::new(backend), Arc::clone(&rig.lm), options).unwrap();
    let run = rlm.complete(Context::Text(b"x".to_vec()), None);
    let all_sent = rig.chat.until(|counts| counts.in_flight == u64::from(CALLS));
    let reason = match stop {
        Stop::Dropped => {
            tokio::select! {
                result = run => panic!("{result:?}"),
                _ = all_sent => None,
            }
        }
        Stop::Interrupt | Stop::Wall => {
            let watch = async {
                all_sent.await;
                if stop == Stop::Interrupt {
                    rlm.cancel();
                }
            };
            let (result, ()) = tokio::join!(run, watch);
            Some(result.unwrap_err().reason)
        }
    };
    assert!(
        matches!(
            (stop, &reason),
            (Stop::Dropped, None)
                | (Stop::Interrupt, Some(RlmStop::Cancelled))
                | (Stop::Wall, Some(RlmStop::Timeout { .. }))
        ),
        "{stop:?}: {reason:?}"
    );
    let counts = rig.chat.until(|counts| counts.in_flight == 0).await;
    assert_eq!(counts.cancelled, u64::from(CALLS), "{stop:?}");
    let progress = *progress.0.lock().unwrap();
    assert_eq!((progress.calls, progress.calls_in_flight), (1 + u64::from(CALLS), 0), "{stop:?}");
    let usage = tenant.usage();
    assert_eq!((usage.sessions, usage.cells_running, usage.cells_waiting), (0, 0, 0), "{stop:?}");
}

#[test]
fn a_run_that_is_stopped_takes_its_calls_along() {
    alone(async {
        let tenant = tenant("stopped runs");
        print(&mut common::open(environment(&tenant)), "print()").await;
        let before = Held::at_rest().await;
        for way in WAYS {
            for stop in STOPS {
                let said = repl(&format!("llm_query_batched(['hang'] * {CALLS})"));
                let rig = Rig::new(way, hanging(vec![said]), PATIENCE).await;
                stop_a_run(&rig, &tenant, stop).await;
                rig.close().await;
                before.returns(&format!("{way:?} {stop:?}")).await;
            }
        }
    });
}

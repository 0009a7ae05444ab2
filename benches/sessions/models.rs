//! Figures of calls: what a call of a model or a tool costs beside the answer, and many at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use kaa::lm::{
    LmCompletion, LmError, LmHandler, LmRequest, LmServer, LmServerOptions, OpenAiHandler,
    ScriptedHandler, SocketHandler, UpstreamOptions,
};
use kaa::{EnvironmentExt, EnvironmentOptions, Limits, Quotas, Runtime, Tool, Value};

use super::chat_server::{ChatOptions, ChatServer};
use super::{Report, common, milliseconds, pause};

/// Answers every prompt with a text of this length, after this time.
struct Answers {
    text: String,
    after: Duration,
}

#[async_trait]
impl LmHandler for Answers {
    async fn complete(&self, _: &LmRequest) -> Result<LmCompletion, LmError> {
        if !self.after.is_zero() {
            tokio::time::sleep(self.after).await;
        }
        Ok(LmCompletion { response: self.text.clone(), ..LmCompletion::default() })
    }
}

/// A handler at the other end of a socket, in this process.
async fn over_socket(handler: impl LmHandler + 'static) -> SocketHandler {
    let options = LmServerOptions { connections_max: 1_000, ..LmServerOptions::default() };
    let server = LmServer::bind("127.0.0.1:0", Arc::new(handler), options).await.unwrap();
    let address = server.local_addr().to_string();
    tokio::spawn(server.serve(std::future::pending()));
    SocketHandler::new(address).unwrap()
}

fn options(lm: impl LmHandler + 'static) -> EnvironmentOptions {
    EnvironmentOptions {
        lm: Some(Arc::new(lm)),
        tools: vec![Tool::new("echo", |call| {
            Ok(call.args.into_iter().next().unwrap_or(Value::None))
        })],
        limits: Limits { lm_calls: u32::MAX, tool_calls: u32::MAX, ..Limits::default() },
        ..EnvironmentOptions::default()
    }
}

pub(super) async fn all(report: &mut Report) {
    let runtime = common::runtime();
    one_session(report, runtime).await;
    let answers = || Answers { text: "y".into(), after: UPSTREAM };
    many_sessions(report, runtime, "in process", Arc::new(answers())).await;
    many_sessions(report, runtime, "over a socket", Arc::new(over_socket(answers()).await)).await;
    let options = ChatOptions { latency: UPSTREAM, ..ChatOptions::default() };
    let server = ChatServer::start(options, |_| "y");
    let options = UpstreamOptions {
        base_url: Some(server.openai_url()),
        concurrency: 1_000,
        ..UpstreamOptions::default()
    };
    let http = OpenAiHandler::new("m", options).unwrap();
    many_sessions(report, runtime, "over HTTP", Arc::new(http)).await;
}

async fn one_session(report: &mut Report, runtime: &Runtime) {
    let image = common::image("base");
    let megabyte = Answers { text: "y".repeat(1_000_000), after: Duration::ZERO };
    let slow = Answers { text: "y".into(), after: Duration::from_millis(20) };
    let socket = over_socket(ScriptedHandler::echo()).await;
    let echo = ScriptedHandler::echo;
    let batch = "llm_query_batched(['x'] * 20)";
    let many = "for _ in range(1000): llm_query('x')";
    let hundred = "for _ in range(100): llm_query('x')";
    let large = "s = 'x' * 1_000_000\nfor _ in range(20): r = llm_query(s)";
    let tools = "for _ in range(1000): echo(1)";
    // What is measured, its unit, the milliseconds of a cell that are one of it, and the target: a
    // thousand calls in a cell make its milliseconds microseconds of a call.
    let cases = [
        (
            "llm_query there and back, handler in process",
            "µs",
            1.0,
            options(echo()),
            many,
            Some(8.0),
        ),
        (
            "llm_query there and back, over a socket",
            "ms",
            100.0,
            options(socket),
            hundred,
            Some(0.1),
        ),
        ("llm_query, 1 MB each way", "ms", 20.0, options(megabyte), large, Some(0.6)),
        (
            "llm_query_batched of 20 prompts at 20 ms each",
            "ms",
            1.0,
            options(slow),
            batch,
            Some(22.0),
        ),
        ("host tool there and back", "µs", 1.0, options(echo()), tools, None),
    ];
    for (figure, unit, per, options, cell, target) in cases {
        if !report.wants(figure) {
            continue;
        }
        let mut session = runtime.environment(&image, options).unwrap();
        let mut samples = Vec::new();
        for _ in 0..40 {
            let start = Instant::now();
            let execution = session.execute(cell).await.unwrap();
            let time = milliseconds(start.elapsed());
            assert!(execution.exception.is_none(), "{}", execution.stderr.text());
            assert!(execution.lm_calls.iter().all(|call| !call.completion.response.is_empty()));
            samples.push(time / per);
            pause().await;
        }
        report.note(figure, unit, &mut samples[8..], target.map(|target| (target, 1)));
    }
}

/// What the upstream of [`many_sessions`] takes for an answer.
const UPSTREAM: Duration = Duration::from_millis(50);

/// A thousand prompts from a hundred sessions, all in flight at once as a batch of each, and one after
/// the other: how much longer they take than the upstream alone. The former begins and ends a hundred
/// cells within the time of one answer, so that it's a figure of cells as much as of calls.
async fn many_sessions(
    report: &mut Report,
    runtime: &'static Runtime,
    name: &str,
    handler: Arc<dyn LmHandler>,
) {
    const SESSIONS: u32 = 100;
    const PROMPTS: u32 = 10;
    let image = common::image("base");
    // All of them in flight: by default a tenant has 256.
    let quotas = Quotas { lm_concurrency: SESSIONS * PROMPTS, ..Quotas::default() };
    let tenant = runtime.tenant(&format!("asks {name}"), quotas).unwrap();
    for (what, cell, ideal) in [
        ("10 in a batch", "r = llm_query_batched(['x'] * 10)", UPSTREAM),
        ("10 one by one", "r = [llm_query('x') for _ in range(10)]", UPSTREAM * PROMPTS),
    ] {
        let figure = format!("1,000 prompts of 100 sessions at 50 ms, {what}, {name}");
        if !report.wants(&figure) {
            continue;
        }
        let mut sessions = Vec::new();
        for _ in 0..SESSIONS {
            let options = EnvironmentOptions {
                lm: Some(Arc::clone(&handler)),
                tenant: Some(tenant.clone()),
                ..EnvironmentOptions::default()
            };
            let mut session = runtime.environment(&image, options).unwrap();
            session.execute("pass").await.unwrap();
            sessions.push(session);
        }
        let mut samples = Vec::new();
        for _ in 0..12 {
            let start = Instant::now();
            let tasks: Vec<_> = sessions
                .into_iter()
                .map(|mut session| {
                    tokio::spawn(async move {
                        let execution = session.execute(cell).await.unwrap();
                        assert_eq!(execution.lm_calls.len(), PROMPTS as usize);
                        session
                    })
                })
                .collect();
            sessions = Vec::new();
            for task in tasks {
                sessions.push(task.await.unwrap());
            }
            samples.push(start.elapsed().as_secs_f64() / ideal.as_secs_f64());
            // The checkpoints of all sessions are taken meanwhile.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        report.note(&figure, "x", &mut samples[2..], Some((1.3, 1)));
    }
}

//! Sessions in containers against the bare engine, side by side: what a session costs on top of a
//! container that is started through the same API, and what its calls cost.
//!
//! `cargo bench --bench docker [-- ROUNDS]`. Medians of interleaved rounds; needs a Docker engine.

#[path = "common/cells.rs"]
mod cells;
#[path = "../tests/common/docker.rs"]
mod lab;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bollard::Docker;
use bollard::models::{ContainerCreateBody, HostConfig, HostConfigLogConfig};
use bollard::query_parameters::{AttachContainerOptions, RemoveContainerOptions};
use futures_util::StreamExt;
use kaa::benchmark::Figure;
use kaa::docker::DockerBackend;
use kaa::lm::{LmCompletion, LmError, LmHandler, LmRequest};
use kaa::{Backend, Context, EnvironmentExt, EnvironmentOptions, Limits};

const IMAGE: &str = "python:3.11-slim";
const CONTEXT_BYTES: usize = 100_000_000;

/// Answers at once.
struct Instantly;

#[async_trait]
impl LmHandler for Instantly {
    async fn complete(&self, _: &LmRequest) -> Result<LmCompletion, LmError> {
        Ok(LmCompletion { response: "yes".into(), ..LmCompletion::default() })
    }
}

/// From `create` to the first byte that the container says.
async fn bare(api: &Docker, has_sandbox: bool) -> Duration {
    let host_config = HostConfig {
        network_mode: Some("none".into()),
        auto_remove: Some(true),
        log_config: Some(HostConfigLogConfig { typ: Some("none".into()), config: None }),
        tmpfs: Some(HashMap::from([("/tmp".to_owned(), "size=64m".to_owned())])),
        ..HostConfig::default()
    };
    let command = ["python3", "-c", "print(1, flush=True); input()"];
    let body = ContainerCreateBody {
        image: Some(IMAGE.into()),
        cmd: Some(command.map(str::to_owned).to_vec()),
        open_stdin: Some(true),
        stdin_once: Some(true),
        network_disabled: Some(!has_sandbox),
        host_config: Some(host_config),
        ..ContainerCreateBody::default()
    };
    let since = Instant::now();
    let id = api.create_container(None, body).await.unwrap().id;
    let all = AttachContainerOptions {
        stream: true,
        stdin: true,
        stdout: true,
        stderr: true,
        ..AttachContainerOptions::default()
    };
    let mut attached = api.attach_container(&id, Some(all)).await.unwrap();
    api.start_container(&id, None).await.unwrap();
    let said = attached.output.next().await.unwrap().unwrap();
    let elapsed = since.elapsed();
    assert_eq!(said.into_bytes().first(), Some(&b'1'));
    let force = RemoveContainerOptions { force: true, ..RemoveContainerOptions::default() };
    api.remove_container(&id, Some(force)).await.unwrap();
    elapsed
}

async fn session(backend: &DockerBackend) -> (Duration, Duration) {
    let since = Instant::now();
    let mut session = backend.open(EnvironmentOptions::default()).await.unwrap();
    let first = session.execute("print(1)").await.unwrap();
    let elapsed = since.elapsed();
    assert_eq!(first.stdout.text(), "1\n");
    let since = Instant::now();
    session.close().await.unwrap();
    (elapsed, since.elapsed())
}

fn median(times: Vec<Duration>) -> f64 {
    let times: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1000.0).collect();
    Figure::of(&times).expect("there is a round").median
}

#[tokio::main]
async fn main() {
    let rounds: usize = std::env::args().filter_map(|arg| arg.parse().ok()).next().unwrap_or(20);
    let backend = lab::connect().await.expect("an engine");
    let api = lab::api(&lab::host());
    // The first session compiles the agent for all.
    session(&backend).await;
    bare(&api, true).await;
    let mut times = [const { Vec::new() }; 4];
    for _ in 0..rounds {
        times[0].push(bare(&api, true).await);
        times[1].push(bare(&api, false).await);
        let (opened, closed) = session(&backend).await;
        times[2].push(opened);
        times[3].push(closed);
    }
    let [plain, lean, first, close] = times.map(median);
    println!(
        "container to its first byte: {plain:.1} ms, without the engine's network {lean:.1} ms; \
         session to its first answer: {first:.1} ms ({:.2}x, {:.2}x); close: {close:.1} ms",
        first / plain,
        first / lean
    );

    let limits = Limits { lm_calls: u32::MAX, memory_bytes: 2 << 30, ..Limits::default() };
    let options =
        EnvironmentOptions { limits, lm: Some(Arc::new(Instantly)), ..Default::default() };
    let mut session = backend.open(options).await.unwrap();
    let cell = cells::milliseconds(&mut session, "x = 1", rounds * 20).await;
    let one =
        cells::milliseconds(&mut session, "for _ in range(100): llm_query('a')", rounds).await;
    println!("cell: {cell:.3} ms; llm_query: {:.3} ms", (one - cell) / 100.0);
    let text = Context::Text(vec![b'a'; CONTEXT_BYTES]);
    let since = Instant::now();
    session.add_context(text, None).await.unwrap();
    println!("context of 100 MB: {:.2} s", since.elapsed().as_secs_f64());
    let length = session.execute("print(len(context))").await.unwrap();
    assert_eq!(length.stdout.text(), format!("{CONTEXT_BYTES}\n"));
    session.close().await.unwrap();
}

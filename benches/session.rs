//! What a session costs: a fresh one, a warm cell, a call to the host, a context.
//!
//! `cargo bench --bench session`. A checkpoint is taken in the background after each cell; what is
//! timed is the cell, after a pause in which a model would have been thinking.

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use kaa::lm::ScriptedHandler;
use kaa::{
    Context, Environment, EnvironmentExt, EnvironmentOptions, Image, Runtime, Tool, Value,
    WasmEnvironment,
};

/// Long enough for a checkpoint or the recycling of an instance to be over.
const PAUSE: Duration = Duration::from_millis(1);

fn session(runtime: &Runtime, image: &Image) -> WasmEnvironment {
    let tool = Tool::new("echo", |call| Ok(call.args.into_iter().next().unwrap_or(Value::None)));
    let options = EnvironmentOptions {
        lm: Some(Arc::new(ScriptedHandler::echo())),
        tools: vec![tool],
        limits: kaa::Limits { lm_calls: u32::MAX, tool_calls: u32::MAX, ..kaa::Limits::default() },
        ..EnvironmentOptions::default()
    };
    runtime.environment(image, options).unwrap()
}

/// Waits without letting the processor sleep, which would add its wake-up to the next figure.
async fn pause() {
    let since = Instant::now();
    while since.elapsed() < PAUSE {
        tokio::task::yield_now().await;
    }
}

/// A new session, and how long it and its first cell took.
async fn first_cell(runtime: &Runtime, image: &Image, cell: &str) -> (Duration, WasmEnvironment) {
    let start = Instant::now();
    let mut session = runtime.environment(image, EnvironmentOptions::default()).unwrap();
    black_box(session.execute(cell).await.unwrap());
    (start.elapsed(), session)
}

fn fresh(c: &mut Criterion, runtime: &Runtime, tokio: &tokio::runtime::Runtime) {
    let cases = [
        ("base", "print(1+1)"),
        ("sci", "import pandas as pd\nprint(pd.DataFrame({'a': [1, 2]})['a'].sum())"),
    ];
    for (name, cell) in cases {
        let image = runtime.image(name, &|_| {}).unwrap();
        c.bench_function(&format!("fresh session and first cell, {name}"), |b| {
            b.to_async(tokio).iter_custom(|rounds| {
                let image = &image;
                async move {
                    let mut total = Duration::ZERO;
                    for _ in 0..rounds {
                        let (time, session) = first_cell(runtime, image, cell).await;
                        total += time;
                        drop(session);
                        pause().await;
                    }
                    total
                }
            });
        });
        let held = std::sync::Mutex::new(Vec::new());
        c.bench_function(
            &format!("fresh session and first cell, {name}, no instance to reuse"),
            |b| {
                b.to_async(tokio).iter_custom(|rounds| {
                    let (image, held) = (&image, &held);
                    async move {
                        let mut total = Duration::ZERO;
                        for _ in 0..rounds {
                            let start = Instant::now();
                            let mut session =
                                runtime.environment(image, EnvironmentOptions::default()).unwrap();
                            black_box(session.execute(cell).await.unwrap());
                            total += start.elapsed();
                            // Kept, so that its instance can't be used again; bounded, as memory is.
                            {
                                let mut held = held.lock().unwrap();
                                held.push(session);
                                if held.len() > 300 {
                                    held.clear();
                                }
                            }
                            pause().await;
                        }
                        total
                    }
                });
            },
        );
        drop(held);
    }
}

fn cells(c: &mut Criterion, runtime: &Runtime, tokio: &tokio::runtime::Runtime) {
    let image = runtime.image("base", &|_| {}).unwrap();
    let _guard = tokio.enter();
    let session = tokio::sync::Mutex::new(session(runtime, &image));
    let cases = [
        ("warm cell, pass", "pass", 1),
        ("warm cell, print(1+1)", "print(1+1)", 1),
        ("warm cell, a function of ten lines", TEN_LINES, 1),
        (
            "llm_query through a scripted handler, 1000 in a cell",
            "for _ in range(1000): llm_query('x')",
            1000,
        ),
        ("host tool, 1000 in a cell", "for _ in range(1000): echo(1)", 1000),
        ("llm_query, 1 MB each way", "len(llm_query('x' * 1_000_000))", 1),
        ("1 MB to a host tool and back", "s = 'x' * 1_000_000\necho(s)", 1),
    ];
    for (name, cell, calls) in cases {
        c.bench_function(name, |b| {
            b.to_async(tokio).iter_custom(|rounds| {
                let session = &session;
                async move {
                    let mut session = session.lock().await;
                    let mut total = Duration::ZERO;
                    for _ in 0..rounds {
                        pause().await;
                        let start = Instant::now();
                        black_box(session.execute(cell).await.unwrap());
                        total += start.elapsed() / calls;
                    }
                    total
                }
            });
        });
    }
}

const TEN_LINES: &str = "
def words(text):
    counts = {}
    for word in text.split():
        word = word.strip('.,').lower()
        if not word:
            continue
        counts[word] = counts.get(word, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])
print(words('The quick brown fox. The lazy dog, the end.')[:3])
";

fn contexts(c: &mut Criterion, runtime: &Runtime, tokio: &tokio::runtime::Runtime) {
    let image = runtime.image("base", &|_| {}).unwrap();
    for megabytes in [1usize, 10, 100] {
        let text: Vec<u8> =
            b"0123456789abcde\n".iter().copied().cycle().take(megabytes << 20).collect();
        c.bench_function(&format!("{megabytes} MB of context into a new session"), |b| {
            b.to_async(tokio).iter_custom(|rounds| {
                let (image, text) = (&image, &text);
                async move {
                    let mut total = Duration::ZERO;
                    for _ in 0..rounds {
                        let context = Context::Text(text.clone());
                        let start = Instant::now();
                        let mut session =
                            runtime.environment(image, EnvironmentOptions::default()).unwrap();
                        session.add_context(context, None).await.unwrap();
                        total += start.elapsed();
                        Box::new(session).close().await.unwrap();
                    }
                    total
                }
            });
        });
    }
}

fn all(c: &mut Criterion) {
    let tokio =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let runtime = common::runtime();
    fresh(c, runtime, &tokio);
    cells(c, runtime, &tokio);
    contexts(c, runtime, &tokio);
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_millis(500));
    targets = all
}
criterion_main!(benches);

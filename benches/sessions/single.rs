//! Figures of one session at a time.

use std::hint::black_box;
use std::time::{Duration, Instant};

use kaa::{
    Context, Environment, EnvironmentExt, EnvironmentOptions, Image, Quotas, Runtime,
    WasmEnvironment,
};

use super::{Report, common, milliseconds, pause, timed};

fn text(megabytes: usize) -> Vec<u8> {
    b"0123456789abcde\n".iter().copied().cycle().take(megabytes * 1_000_000).collect()
}

fn session(runtime: &Runtime, image: &Image) -> WasmEnvironment {
    runtime.environment(image, EnvironmentOptions::default()).unwrap()
}

pub(super) async fn all(report: &mut Report) {
    let runtime = common::runtime();
    let images = [("base", "print(1+1)"), ("sci", FRAME)];
    for (name, cell) in images {
        fresh(report, runtime, name, cell).await;
    }
    warm(report, runtime).await;
    forks(report, runtime).await;
    contexts(report, runtime).await;
    memory(report, runtime).await;
    fuel(report, runtime).await;
}

const FRAME: &str = "import pandas as pd\nprint(pd.DataFrame({'a': [1, 2]})['a'].sum())";

async fn fresh(report: &mut Report, runtime: &Runtime, name: &str, cell: &str) {
    let image = common::image(name);
    let (recycled, cold) = match name {
        "base" => (Some((0.15, 1)), Some((0.70, 1))),
        _ => (Some((0.65, 1)), None),
    };
    let figure = format!("fresh session and first cell, {name}, recycled slot");
    if report.wants(&figure) {
        let mut samples = timed(400, || async {
            let start = Instant::now();
            let mut session = session(runtime, &image);
            black_box(session.execute(cell).await.unwrap());
            start.elapsed()
        })
        .await;
        report.note(&figure, "ms", &mut samples, recycled);
    }
    let figure = format!("fresh session and first cell, {name}, another tenant's slot");
    if report.wants(&figure) {
        let mut number = 0;
        let mut samples = timed(300, || {
            number += 1;
            // One that has no slots yet.
            let tenant = runtime.tenant(&format!("{name} {number}"), Quotas::default()).unwrap();
            let options = EnvironmentOptions { tenant: Some(tenant), ..Default::default() };
            let image = &image;
            async move {
                let start = Instant::now();
                let mut session = runtime.environment(image, options).unwrap();
                black_box(session.execute(cell).await.unwrap());
                start.elapsed()
            }
        })
        .await;
        report.note(&figure, "ms", &mut samples, None);
    }
    let figure = format!("fresh session and first cell, {name}, cold slot");
    if report.wants(&figure) {
        let mut held = Vec::new();
        let mut samples = Vec::new();
        for _ in 0..150 {
            let start = Instant::now();
            let mut session = session(runtime, &image);
            black_box(session.execute(cell).await.unwrap());
            samples.push(milliseconds(start.elapsed()));
            // Kept, so that its slot can't be used again.
            held.push(session);
            pause().await;
        }
        report.note(&figure, "ms", &mut samples[30..], cold);
    }
}

async fn warm(report: &mut Report, runtime: &Runtime) {
    let cells = [
        ("warm cell, print(1+1)", "print(1+1)", Some((0.06, 1))),
        ("warm cell, pass", "pass", None),
        ("warm cell, a function of ten lines", TEN_LINES, None),
    ];
    for (figure, cell, target) in cells {
        if !report.wants(figure) {
            continue;
        }
        let mut session = session(runtime, &common::image("base"));
        let mut samples = Vec::new();
        for round in 0..600 {
            let start = Instant::now();
            black_box(session.execute(cell).await.unwrap());
            if round >= 100 {
                samples.push(milliseconds(start.elapsed()));
            }
            pause().await;
        }
        report.note(figure, "ms", &mut samples, target);
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

async fn forks(report: &mut Report, runtime: &Runtime) {
    let image = common::image("base");
    let dirty = "parts = [bytes([n % 256]) * 1000 for n in range(7000)]";
    let mut parent = session(runtime, &image);
    parent.execute(dirty).await.unwrap();
    parent.snapshot().await.unwrap();
    let figure = "snapshot, fork and one cell, 7 MB of dirty memory";
    if report.wants(figure) {
        let mut samples = Vec::new();
        for _ in 0..60 {
            let start = Instant::now();
            let mut fork = parent.fork_session().await.unwrap();
            black_box(fork.execute("print(len(parts))").await.unwrap());
            samples.push(milliseconds(start.elapsed()));
            drop(fork);
            pause().await;
        }
        report.note(figure, "ms", &mut samples[10..], Some((3.0, 1)));
    }
    let figure = "rewind of a session with 7 MB of dirty memory, and one cell";
    if report.wants(figure) {
        let snapshot = parent.snapshot().await.unwrap();
        let mut samples = Vec::new();
        for _ in 0..60 {
            parent.execute("parts[5] = 0; parts[70] = 1").await.unwrap();
            pause().await;
            let start = Instant::now();
            parent.restore(&snapshot).await.unwrap();
            black_box(parent.execute("print(len(parts))").await.unwrap());
            samples.push(milliseconds(start.elapsed()));
            pause().await;
        }
        report.note(figure, "ms", &mut samples[10..], None);
    }
    let figure = "fork of a template with a context of 100 MB, and a cell that reads it";
    if report.wants(figure) {
        let mut template = session(runtime, &image);
        template.add_context(Context::Text(text(100)), None).await.unwrap();
        let image = runtime.template(&template.snapshot().await.unwrap()).unwrap();
        let mut samples = timed(150, || async {
            let start = Instant::now();
            let mut child = session(runtime, &image);
            let cell = "print(len(context), context[50_000_000:50_000_010])";
            black_box(child.execute(cell).await.unwrap());
            start.elapsed()
        })
        .await;
        report.note(figure, "ms", &mut samples, Some((0.5, 1)));
    }
}

async fn contexts(report: &mut Report, runtime: &Runtime) {
    let image = common::image("base");
    for (megabytes, rounds, target) in [(1, 100, None), (10, 60, Some((8.0, 1))), (100, 15, None)] {
        let figure = format!("{megabytes} MB of context into a fresh session");
        if !report.wants(&figure) {
            continue;
        }
        let text = text(megabytes);
        let mut samples = Vec::new();
        for _ in 0..rounds {
            let context = Context::Text(text.clone());
            let start = Instant::now();
            let mut session = session(runtime, &image);
            session.add_context(context, None).await.unwrap();
            samples.push(milliseconds(start.elapsed()));
            session.snapshot().await.unwrap();
            drop(session);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        report.note(&figure, "ms", &mut samples[rounds / 5..], target);
    }
}

async fn memory(report: &mut Report, runtime: &Runtime) {
    let figure = "private memory of an idle session after print(1+1)";
    if !report.wants(figure) {
        return;
    }
    let image = common::image("base");
    let mut sessions = Vec::new();
    let mut samples = Vec::new();
    for _ in 0..50 {
        let mut session = session(runtime, &image);
        session.execute("print(1+1)").await.unwrap();
        session.snapshot().await.unwrap();
        samples.push(session.private_bytes() as f64 / f64::from(1 << 20));
        sessions.push(session);
    }
    report.note(figure, "MiB", &mut samples, Some((0.8, 1)));
}

/// What a unit of fuel is worth, of which `src/wasm/budget.rs` makes slices.
async fn fuel(report: &mut Report, runtime: &Runtime) {
    let figure = "fuel per millisecond of computing";
    if !report.wants(figure) {
        return;
    }
    let mut session = session(runtime, &common::image("base"));
    let cell = "n = 0\nfor i in range(400_000): n = (n * 31 + i) % 1_000_003";
    let mut samples = Vec::new();
    for _ in 0..20 {
        let usage = session.execute(cell).await.unwrap().usage;
        let fuel = usage.fuel.expect("it's counted") as f64;
        samples.push(fuel / milliseconds(usage.compute) / 1e6);
    }
    report.note(figure, "M", &mut samples[4..], None);
}

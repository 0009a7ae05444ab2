//! What sessions cost: every figure of the README's table, with its target.
//!
//! `cargo bench --bench sessions [-- PART...]` prints the figures whose names have one of the parts in
//! them (all by default) and writes them to `target/sessions.json`. Figures are medians; what is in
//! the background, such as checkpoints, is given a millisecond's pause to end, as a model would.

#[path = "../tests/common/chat_server.rs"]
mod chat_server;
#[path = "../tests/common/mod.rs"]
mod common;

#[path = "sessions/crowd.rs"]
mod crowd;
#[path = "sessions/models.rs"]
mod models;
#[path = "sessions/single.rs"]
mod single;

use std::future::Future;
use std::time::Duration;

use kaa::benchmark::pause;
use serde_json::{Value as Json, json};

/// Collects figures.
struct Report {
    wanted: Vec<String>,
    figures: Vec<Json>,
}

impl Report {
    fn wants(&self, name: &str) -> bool {
        self.wanted.is_empty() || self.wanted.iter().any(|part| name.contains(part.as_str()))
    }

    /// Notes a figure and what it should be at most (`up` of 1) or at least (-1).
    fn note(&mut self, name: &str, unit: &str, samples: &mut [f64], target: Option<(f64, i8)>) {
        samples.sort_by(f64::total_cmp);
        let at = |part: f64| samples[((samples.len() - 1) as f64 * part) as usize];
        let median = at(0.5);
        let met = target.map(|(target, up)| (median - target) * f64::from(up) <= 0.0);
        let verdict = match (met, target) {
            (Some(true), Some((target, _))) => format!("target {target} met"),
            (Some(false), Some((target, _))) => format!("target {target} MISSED"),
            _ => String::new(),
        };
        println!(
            "{name:<62} {median:>9.3} {unit:<4} ({:.3} .. {:.3})  {verdict}",
            at(0.1),
            at(0.9)
        );
        self.figures.push(json!({
            "name": name, "unit": unit, "median": median, "p10": at(0.1), "p90": at(0.9),
            "samples": samples.len(), "target": target.map(|(target, _)| target), "met": met,
        }));
    }

    fn write(self) {
        let cpus = std::thread::available_parallelism().map_or(0, usize::from);
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let report = json!({
            "kaa": env!("CARGO_PKG_VERSION"), "cpus": cpus, "kernel": release.trim(),
            "dirty_pages": format!("{:?}", kaa::wasm::dirty_pages_method()),
            "figures": self.figures,
        });
        let target = option_env!("CARGO_TARGET_DIR").unwrap_or("target");
        let path = format!("{}/{target}/sessions.json", env!("CARGO_MANIFEST_DIR"));
        match std::fs::write(&path, format!("{report:#}\n")) {
            Ok(()) => println!("written to {path}"),
            Err(error) => eprintln!("{path}: {error}"),
        }
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Times of `rounds` runs in milliseconds; the first ones, which warm up, are left out.
async fn timed<F: Future<Output = Duration>>(
    rounds: usize,
    mut run: impl FnMut() -> F,
) -> Vec<f64> {
    let warm_up = rounds.div_ceil(5);
    let mut samples = Vec::with_capacity(rounds);
    for round in 0..warm_up + rounds {
        let time = run().await;
        if round >= warm_up {
            samples.push(milliseconds(time));
        }
        pause().await;
    }
    samples
}

fn main() {
    let wanted = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let mut report = Report { wanted, figures: Vec::new() };
    let tokio =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    // On a worker, as in a server: from outside every await would wake a thread.
    let report = tokio.block_on(async move {
        let task = tokio::spawn(async move {
            single::all(&mut report).await;
            models::all(&mut report).await;
            crowd::all(&mut report).await;
            report
        });
        task.await.unwrap()
    });
    report.write();
}

//! What isolation costs computing code: native CPython, the guest without metering, with Kaa's
//! metering, and with wasmtime's fuel, interleaved in one run.
//!
//! `cargo bench --bench cpu [-- ROUNDS]`. The first run compiles the guest three times. Times are the
//! workload's own clock inside Python; the least of all rounds counts, and ratios are geometric
//! means over the parts.

#[path = "../tests/common/mod.rs"]
mod common;

use std::collections::BTreeMap;
use std::process::Command;

use kaa::{EnvironmentExt, EnvironmentOptions, Limits, Metering, Runtime, Store, WasmEnvironment};

/// Prints `name milliseconds` for each part.
const WORKLOAD: &str = include_str!("cpu_workload.py");

/// Milliseconds of each part, by its name.
type Times = BTreeMap<String, f64>;

fn parse(text: &str) -> Times {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(name, time)| (name.to_owned(), time.trim().parse().expect("a number")))
        .collect()
}

fn native() -> Times {
    let output = Command::new("python3").args(["-c", WORKLOAD]).output().expect("python3 runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    parse(&String::from_utf8_lossy(&output.stdout))
}

async fn guest(session: &mut WasmEnvironment) -> (Times, u64) {
    let execution = session.execute(WORKLOAD).await.unwrap();
    assert!(execution.exception.is_none(), "{}", execution.stderr.text());
    (parse(&execution.stdout.text()), execution.usage.fuel.unwrap_or(0))
}

fn least(all: &mut Times, new: Times) {
    for (name, time) in new {
        let entry = all.entry(name).or_insert(time);
        *entry = entry.min(time);
    }
}

fn ratio(a: &Times, b: &Times) -> f64 {
    let sum: f64 = a.iter().map(|(name, time)| (time / b[name]).ln()).sum();
    (sum / a.len() as f64).exp()
}

fn main() {
    let rounds = std::env::args().filter_map(|arg| arg.parse().ok()).next().unwrap_or(7);
    let root = common::store_root();
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let kinds = [Metering::Off, Metering::Kaa, Metering::WasmtimeFuel];
    let runtimes = kinds.map(|kind| {
        let runtime = Runtime::with_metering(Store::open(&root).unwrap(), kind).unwrap();
        let image = runtime.image("base", &|event| eprintln!("{kind:?}: {event:?}")).unwrap();
        (runtime, image)
    });
    tokio.block_on(async {
        let mut sessions = runtimes.each_ref().map(|(runtime, image)| {
            let limits = Limits::unlimited();
            runtime.environment(image, EnvironmentOptions { limits, ..EnvironmentOptions::default() }).unwrap()
        });
        let mut best = [const { Times::new() }; 4];
        let mut fuel = [0; 3];
        for _ in 0..rounds {
            least(&mut best[0], native());
            for (at, session) in sessions.iter_mut().enumerate() {
                let (times, spent) = guest(session).await;
                least(&mut best[at + 1], times);
                fuel[at] = spent;
            }
        }
        println!("{:<12}{:>10}{:>12}{:>10}{:>16}", "ms", "native", "unmetered", "Kaa", "wasmtime fuel");
        for name in best[0].keys() {
            print!("{name:<12}");
            for (times, width) in best.iter().zip([10, 12, 10, 16]) {
                print!("{:>width$.1}", times[name]);
            }
            println!();
        }
        let [native, off, kaa, wasmtime] = &best;
        println!("geometric means: metered/unmetered {:.3}, metered/native {:.3}, wasmtime's fuel/unmetered {:.3}", ratio(kaa, off), ratio(kaa, native), ratio(wasmtime, off));
        let total: f64 = kaa.values().sum();
        println!("fuel: {:.2} million per ms (wasmtime counts {:.2})", fuel[1] as f64 / total / 1e6, fuel[2] as f64 / wasmtime.values().sum::<f64>() / 1e6);
    });
}

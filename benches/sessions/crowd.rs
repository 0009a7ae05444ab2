//! Figures of many sessions at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kaa::{EnvironmentExt, EnvironmentOptions, Pool, PoolPolicy, Quotas, Runtime, Store};

use super::{Report, common, milliseconds};

pub(super) async fn all(report: &mut Report) {
    throughput(report).await;
    neighbours(report).await;
    density(report).await;
}

async fn throughput(report: &mut Report) {
    let figure = "fresh sessions per second, one cell each, two tasks";
    if !report.wants(figure) {
        return;
    }
    let mut samples = Vec::new();
    for round in 0..8 {
        let start = Instant::now();
        let tasks = (0..2).map(|_| {
            tokio::spawn(async {
                let (runtime, image) = (common::runtime(), common::image("base"));
                for _ in 0..1000 {
                    let mut session =
                        runtime.environment(&image, EnvironmentOptions::default()).unwrap();
                    session.execute("print(1+1)").await.unwrap();
                }
            })
        });
        for task in tasks.collect::<Vec<_>>() {
            task.await.unwrap();
        }
        if round > 0 {
            samples.push(2000.0 / start.elapsed().as_secs_f64());
        }
    }
    report.note(figure, "/s", &mut samples, Some((5000.0, -1)));
}

/// A warm cell of one tenant alone, and beside 200 sessions of another that spin.
async fn neighbours(report: &mut Report) {
    let figure = "warm cell beside 200 sessions of another tenant that spin, ratio";
    if !report.wants(figure) {
        return;
    }
    let (runtime, image) = (common::runtime(), common::image("base"));
    let tenant = |name| runtime.tenant(name, Quotas::default()).unwrap();
    let (greedy, modest) = (tenant("greedy"), tenant("modest"));
    let options = |tenant| EnvironmentOptions { tenant: Some(tenant), ..Default::default() };
    let mut session = runtime.environment(&image, options(modest)).unwrap();
    let mut cells = async |count: usize| {
        let mut samples = Vec::new();
        for _ in 0..count {
            let start = Instant::now();
            session.execute("print(1+1)").await.unwrap();
            samples.push(milliseconds(start.elapsed()));
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        samples.drain(..count / 5);
        samples
    };
    let mut alone = cells(300).await;
    report.note("warm cell every 2 ms, alone", "ms", &mut alone, None);
    let spinning: Vec<_> = (0..200)
        .map(|_| {
            let mut session = runtime.environment(&image, options(greedy.clone())).unwrap();
            tokio::spawn(async move { session.execute("while True: pass").await })
        })
        .collect();
    while greedy.usage().cells < 200 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut beside = cells(300).await;
    report.note("warm cell every 2 ms, beside 200 that spin", "ms", &mut beside, None);
    let ratio = beside[beside.len() / 2] / alone[alone.len() / 2];
    report.note(figure, "x", &mut [ratio], Some((3.0, 1)));
    spinning.iter().for_each(|cell| cell.abort());
    for cell in spinning {
        let _ = cell.await;
    }
    let usage = greedy.usage();
    assert_eq!((usage.sessions, usage.memory_bytes, usage.cells_running), (0, 0, 0));
}

/// What the process has of the machine's memory: pages that many of its mappings share count once,
/// unlike in its resident set size; page tables are counted too.
fn memory_bytes() -> f64 {
    let kilobytes = |path: &str, name: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let number =
            line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
        number.unwrap_or(0.0)
    };
    let pages = kilobytes("/proc/self/smaps_rollup", "Pss:");
    (pages + kilobytes("/proc/self/status", "VmPTE:")) * 1024.0
}

/// Ten thousand sessions of which a thousand are awake.
async fn density(report: &mut Report) {
    const SESSIONS: usize = 10_000;
    let figure = "memory of 10,000 sessions, 1,000 of them awake";
    if !report.wants(figure) {
        return;
    }
    let runtime = Arc::new(Runtime::open(Store::open(common::store_root()).unwrap()).unwrap());
    let image = runtime.image("base", &|_| {}).unwrap();
    let quotas = Quotas { sessions: SESSIONS as u32, ..Quotas::default() };
    let tenant = runtime.tenant("many", quotas).unwrap();
    let policy = PoolPolicy { awake: 1_000, idle: Duration::from_secs(3600), ..Default::default() };
    let pool = Pool::new(Arc::clone(&runtime), policy).unwrap();
    let before = memory_bytes();
    let start = Instant::now();
    let mut sessions = Vec::new();
    for n in 0..SESSIONS {
        let options =
            EnvironmentOptions { tenant: Some(tenant.clone()), ..EnvironmentOptions::default() };
        let mut session = pool.environment(&image, options).await.unwrap();
        session.execute(&format!("x = {n}")).await.unwrap();
        sessions.push(session);
    }
    let opened = start.elapsed().as_secs_f64();
    let status = pool.status();
    assert_eq!((status.awake, status.hibernated), (1_000, SESSIONS - 1_000));
    let gigabytes = (memory_bytes() - before) / 1e9;
    report.note(figure, "GB", &mut [gigabytes], Some((8.0, 1)));
    let kilobytes = status.file_bytes as f64 / status.hibernated as f64 / 1e3;
    report.note("file of a hibernated session", "kB", &mut [kilobytes], None);
    report.note("10,000 sessions opened, 9,000 hibernated", "s", &mut [opened], None);
    let mut samples = Vec::new();
    for (n, session) in sessions.iter_mut().enumerate().step_by(50).take(150) {
        let start = Instant::now();
        let value = session.execute("x").await.unwrap().value;
        samples.push(milliseconds(start.elapsed()));
        assert_eq!(value, Some(n.to_string()));
    }
    report.note("wake one, hibernate another, one cell", "ms", &mut samples, None);
}
